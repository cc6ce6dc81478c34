"""``python -m benchmarks.gpu``: run all parts, each in a process of its own, and write one report.

``--cpu`` tries everything out that a CPU can do, all parts in this process, so that the script is right on the day that
there is a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import platform
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.rows import FAIL, NOTE, PASS, Part, Row, one_line, rows_in

REPOSITORY = Path(__file__).parents[2]
# Seconds that each part may take, in the order in which they run: what the others need least comes last.
PARTS = {"streams": 75, "waits": 60, "nccl": 60, "averages": 30, "speed": 75, "staging": 45}
PARTS |= {"offload": 60, "graphs": 30, "suite": 320}
# All parts together, so that an eight-minute lease of a machine ends with a report.
BUDGET_S = 450


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that the command line asks for; 1 if any row of the report is a failure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="only try the script out, on the CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--markdown", type=Path, help="the report; default: benchmarks/results/gpu.md, none with --cpu")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all parts (default: %(default)s)")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.only:
        run_part(args.only, args.cpu)
        return 0
    if not args.cpu and not torch.cuda.is_available():
        print("There is no GPU that torch can use: benchmarks/gpu.sh --cpu tries the script out.", file=sys.stderr)
        return 2
    target = args.markdown or (None if args.cpu else REPOSITORY / "benchmarks" / "results" / "gpu.md")
    rows = [] if args.cpu else compile_snapshots()
    fields = machine(args.cpu)
    deadline = time.monotonic() + args.budget
    for name in args.parts:
        start = time.monotonic()
        rows += in_this_process(name) if args.cpu else in_a_process(name, min(PARTS[name], deadline - start))
        rows.append(Row(name, "seconds", f"{time.monotonic() - start:.0f} s"))
        if target is not None:
            # After each part: whatever ends the script later leaves a report of what was found until then.
            target.write_text(as_markdown(fields, rows))
    print(as_markdown(fields, rows))
    return int(any(row.result == FAIL for row in rows))


def run_part(name: str, cpu: bool) -> None:
    """Run one part, which prints its rows."""
    part = Part(name, cpu)
    try:
        importlib.import_module(f"benchmarks.gpu.{name}").run(part)
    except Exception as error:
        part.add("the whole part", FAIL, one_line(f"{type(error).__name__}: {error}"))


def in_this_process(name: str) -> list[Row]:
    """The rows of a part that is tried out on the CPU."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        run_part(name, cpu=True)
    return rows_in(output.getvalue())


def in_a_process(name: str, timeout_s: float) -> list[Row]:
    """The rows of a part, and one more if its process hung or died: a GPU that has failed is of no use to the next."""
    if timeout_s < 5:
        return [Row(name, "the whole part", NOTE, "not run: no time was left")]
    print(f"{name} (at most {timeout_s:.0f} s)", file=sys.stderr, flush=True)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--only", name]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=timeout_s)
        problem = f"ended with {process.returncode}: {one_line(errors[-1000:])}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        # With what it has started itself: tests run in processes of their own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        output, errors = process.communicate()
        problem = f"stopped after {timeout_s:.0f} s: {one_line(errors[-1000:])}"
    return rows_in(output) + ([Row(name, "the whole part", FAIL, problem)] if problem else [])


def compile_snapshots() -> list[Row]:
    """Compile the module that compares addresses if there is a compiler: without it a step costs more host time."""
    folder = REPOSITORY / "dist_asgd" / "storage"
    target = folder / f"_snapshots{sysconfig.get_config_var('EXT_SUFFIX')}"
    what = "compiled module for snapshots"
    if target.exists():
        return [Row("setup", what, PASS, "was there")]
    include = sysconfig.get_paths()["include"]
    command = ["cc", "-O3", "-shared", "-fPIC", f"-I{include}", str(folder / "snapshots.c"), "-o", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        return [Row("setup", what, NOTE, f"not compiled, host times are longer: {error}")]
    if done.returncode:
        return [Row("setup", what, NOTE, f"not compiled, host times are longer: {one_line(done.stderr[-200:])}")]
    return [Row("setup", what, PASS, "compiled")]


def machine(cpu: bool) -> dict[str, str]:
    """The fields of the report about the machine."""
    # Imported here because the parts, which run in processes of their own, need none of it.
    from benchmarks.report import surroundings

    fields = surroundings("benchmarks.gpu")
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:
        triton = "none"
    fields["versions"] += f", Triton {triton}"
    if cpu:
        return {"device": f"none: tried out on the CPU of {platform.node()}", **fields}
    found = torch.cuda.get_device_properties(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    device = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, capability {found.major}.{found.minor}"
    return {"device": device, "CUDA, NCCL": f"{torch.version.cuda}, {nccl}", **fields}


def as_markdown(fields: dict[str, str], rows: Sequence[Row]) -> str:
    """The report: the machine, the failures, and a table for each part."""
    from benchmarks.report import markdown_table

    failures = [row for row in rows if row.result == FAIL]
    sections = [
        "# Benchmark: one GPU",
        markdown_table(["field", "value"], [[k, one_line(v)] for k, v in fields.items()]),
    ]
    sections.append(f"{sum(row.result == PASS for row in rows)} rows are PASS, {len(failures)} are FAIL.")
    if failures:
        sections += [
            "## Failures",
            table([Row(row.part, f"{row.part}: {row.what}", FAIL, row.details) for row in failures]),
        ]
    for part in dict.fromkeys(row.part for row in rows):
        sections += [f"## {part.capitalize()}", table([row for row in rows if row.part == part])]
    return "\n\n".join(sections) + "\n"


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    from benchmarks.report import markdown_table

    return markdown_table(["what", "result", ""], [[one_line(r.what), r.result, one_line(r.details)] for r in rows])


if __name__ == "__main__":
    sys.exit(main())
