"""``python -m benchmarks.update``: the update alone, in one process; all implementations in one interleaved run."""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import MEMORY_ENVIRONMENT
from benchmarks.report import markdown_table, surroundings
from benchmarks.trainer import peak_bytes, reset_peak, settled_bytes
from dist_asgd import ShardedASGD

OPTIONS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.0}
IMPLEMENTATIONS = ["torch forloop", "torch foreach", "dist_asgd forloop", "dist_asgd foreach", "dist_asgd fused"]
# The dtype of the parameters, and whether they have float32 masters.
KINDS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16 + master": (torch.bfloat16, True),
}
Call = Callable[[], object]


def make(implementation: str, kind: str, numel: int, num_tensors: int, t0: float, device: str) -> tuple[Call, int]:
    """The ``step`` of an optimizer on fresh parameters with gradients, and the bytes that an update has to move."""
    dtype, master = KINDS[kind]
    shape = (numel // num_tensors,)
    params = [torch.nn.Parameter(torch.full(shape, 0.5, dtype=dtype, device=device)) for _ in range(num_tensors)]
    for param in params:
        param.grad = torch.full_like(param, 0.01)
    package, form = implementation.split()
    if package == "torch":
        optimizer: torch.optim.Optimizer = torch.optim.ASGD(params, **OPTIONS, t0=t0, foreach=form == "foreach")
        average_bytes = dtype.itemsize
    else:
        optimizer = ShardedASGD(
            params, **OPTIONS, t0=t0, master_weights=master, foreach=form == "foreach", fused=form == "fused"
        )
        average_bytes = 4
    for _ in range(3):
        optimizer.step()
    # Before averaging, parameters of 32 bits on CPUs stand for their averages, except in the foreach form.
    stands = package != "torch" and form != "foreach" and device == "cpu" and dtype == torch.float32
    passes = 2 if t0 == 0 else 1 - stands
    return optimizer.step, numel * (3 * dtype.itemsize + passes * average_bytes + 4 * master)


def machine(numel: int, num_threads: int, device: str) -> Iterator[tuple[str, Call, int]]:
    """Yield the simplest loops, with name, call and bytes: a copy, and on CPUs a loop with the update's accesses."""
    p, g, ax = (torch.full((numel,), value, device=device) for value in (1.0, 1e-6, 1.0))
    yield "copy (1 read, 1 write)", lambda: p.copy_(g), 8 * numel
    loop = plain_loop(p, g, ax, num_threads) if device == "cpu" else None
    if loop is not None:
        yield "triad (3 reads, 2 writes)", loop, 20 * numel


def plain_loop(p: torch.Tensor, g: torch.Tensor, ax: torch.Tensor, num_threads: int) -> Call | None:
    """A C loop with the update's accesses to these float32 arrays, in place; None without a compiler."""
    library = plain_library()
    if library is None:
        return None
    triad = library.triad
    length, factor, threads = ctypes.c_int64(p.numel()), ctypes.c_float(1e-6), ctypes.c_int64(num_threads)
    return lambda: triad(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in (p, g, ax)), length, factor, threads)


def plain_library() -> ctypes.CDLL | None:
    """Compile ``triad.c`` for this machine and load it; None without a compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "triad.so"
        source = Path(__file__).with_name("triad.c")
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def measure(
    kind: str, num_tensors: int, t0: float, numel: int, rounds: int, threads: int, device: str
) -> dict[str, float]:
    """GB/s by name, as medians over interleaved rounds."""
    print(f"{kind}, {num_tensors} tensors, t0={t0:g}", file=sys.stderr)
    # torch has no masters.
    names = [name for name in IMPLEMENTATIONS if not (KINDS[kind][1] and name.startswith("torch"))]
    calls = list(machine(numel, threads, device))
    calls += [(name, *make(name, kind, numel, num_tensors, t0, device)) for name in names]
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in calls}
    for _ in range(rounds):
        for name, call, _ in calls:
            wait(device)
            start = time.perf_counter()
            call()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: num_bytes / statistics.median(seconds[name]) / 1e9 for name, _, num_bytes in calls}


def wait(device: str) -> None:
    """Wait until the device is idle."""
    if device == "cuda":
        torch.cuda.synchronize()


def host_microseconds(device: str, rounds: int) -> list[list[str]]:
    """A row for each implementation: the time until ``step()`` returns, with 1,000 parameters of 64 elements.

    The device may still be at work then.
    """
    rows = []
    for name in IMPLEMENTATIONS:
        step, _ = make(name, "float32", 64_000, 1000, 0.0, device)
        seconds = []
        for _ in range(10 * rounds):
            wait(device)
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        rows.append([name, f"{statistics.median(seconds) * 1e6:,.0f}"])
    return rows


def peak_of_steps(kind: str, numel: int) -> int:
    """The bytes that three fused steps need in addition to those held before them. It runs in a fresh process."""
    step, _ = make("dist_asgd fused", kind, numel, 100, 0.0, "cpu")
    before = settled_bytes()
    reset_peak()
    for _ in range(3):
        step()
    return peak_bytes() - before


def peaks(numel: int) -> list[list[str]]:
    """A row for each kind, each from a fresh process that returns freed memory at once."""
    rows = []
    for kind in KINDS:
        print(f"memory, {kind}", file=sys.stderr)
        command = [sys.executable, "-m", "benchmarks.update", "--peak-of", kind, "--numel", str(numel)]
        environment = {**os.environ, **MEMORY_ENVIRONMENT}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        rows.append([kind, f"{int(done.stdout) / 1024:,.0f}"])
    return rows


def main() -> None:
    """Measure, print the report, and write it to a file if the command line asks for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=1 << 26, help="elements in all (default: 64M)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--markdown", type=Path, help="also write the report here")
    parser.add_argument("--peak-of", choices=KINDS, help="only print the extra bytes of fused steps of this kind")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak_of_steps(args.peak_of, args.numel))
        return
    names: list[str] = []
    rows = []
    for kind in KINDS:
        for num_tensors in (1, 100, 1000):
            for t0 in (0.0, 1e6):
                speeds = measure(kind, num_tensors, t0, args.numel, args.rounds, args.threads, args.device)
                names = names or list(speeds)
                phase = "averaging" if t0 == 0 else "mu = 1"
                cells = [f"{speeds[name]:.1f}" if name in speeds else "" for name in names]
                rows.append([kind, str(num_tensors), phase, *cells])
    where = {"threads": str(args.threads)} if args.device == "cpu" else {"device": torch.cuda.get_device_name()}
    fields = {**surroundings("benchmarks.update"), **where}
    sections = [
        "# Benchmark: the update alone",
        markdown_table(["field", "value"], [[key, value] for key, value in fields.items()]),
        f"GB/s of the bytes that the update has to move ({args.numel:,} elements; medians of {args.rounds} "
        "interleaved rounds). 16-bit: averages are float32 here and 16-bit in torch. While mu is 1 the average is "
        "written and not read.",
        markdown_table(["parameters", "tensors", "phase", *names], rows),
        "Host time of one step, 1,000 float32 parameters of 64 elements: until step() returns.",
        markdown_table(["form", "microseconds"], host_microseconds(args.device, args.rounds)),
    ]
    if args.device == "cpu":
        sections += [
            "What a fused step needs beyond what is held between steps (100 tensors; peak resident memory of three "
            "steps above that before them, in a fresh process).",
            markdown_table(["parameters", "KiB"], peaks(args.numel)),
        ]
    report = "\n\n".join(sections)
    print(report)
    if args.markdown:
        args.markdown.write_text(report + "\n")


if __name__ == "__main__":
    main()
