"""``python -m benchmarks.update``: the update alone, on one process; all forms in one interleaved run."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.report import markdown_table, surroundings
from dist_asgd import ShardedASGD

OPTIONS = {"lr": 0.01, "weight_decay": 0.0}
Call = Callable[[], object]


def make(form: str, dtype: torch.dtype, numel: int, num_tensors: int, t0: float) -> tuple[Call, int]:
    """One optimizer's ``step`` on fresh parameters with gradients, and the bytes that the update has to move."""
    params = [torch.nn.Parameter(torch.full((numel // num_tensors,), 0.5, dtype=dtype)) for _ in range(num_tensors)]
    for param in params:
        param.grad = torch.full_like(param, 0.01)
    whose, how = form.split()
    if whose == "torch":
        optimizer: torch.optim.Optimizer = torch.optim.ASGD(params, **OPTIONS, t0=t0, foreach=how == "foreach")
        average_bytes = dtype.itemsize
    else:
        optimizer = ShardedASGD(params, **OPTIONS, t0=t0, foreach=how == "foreach", fused=how == "fused")
        average_bytes = 4
    for _ in range(3):
        optimizer.step()
    passes = 2 if t0 == 0 else 1
    return optimizer.step, numel * (3 * dtype.itemsize + passes * average_bytes)


def machine(numel: int) -> Iterator[tuple[str, Call, int]]:
    """What the memory gives to torch's own simplest operators."""
    a, b = torch.ones(numel), torch.ones(numel)
    yield "copy (1 read, 1 write)", lambda: a.copy_(b), 8 * numel
    yield "in-place add (2 reads, 1 write)", lambda: a.add_(b), 12 * numel


def main() -> None:
    """Measure, print a Markdown table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=1 << 26, help="elements in all (default: 64M)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--markdown", type=Path, help="also write the report here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    forms = ["torch forloop", "torch foreach", "dist_asgd forloop", "dist_asgd foreach", "dist_asgd fused"]
    tables = []
    for dtype in (torch.float32, torch.bfloat16):
        for num_tensors in (1, 100, 1000):
            for t0 in (0.0, 1e6):
                print(f"{dtype}, {num_tensors} tensors, t0={t0:g}", file=sys.stderr)
                calls = list(machine(args.numel))
                calls += [(form, *make(form, dtype, args.numel, num_tensors, t0)) for form in forms]
                seconds: dict[str, list[float]] = {name: [] for name, _, _ in calls}
                for _ in range(args.rounds):
                    for name, call, _ in calls:
                        start = time.perf_counter()
                        call()
                        seconds[name].append(time.perf_counter() - start)
                speeds = {name: num_bytes / statistics.median(seconds[name]) / 1e9 for name, _, num_bytes in calls}
                tables.append(
                    [
                        str(dtype).removeprefix("torch."),
                        str(num_tensors),
                        "averaging" if t0 == 0 else "mu = 1",
                        *(f"{speed:.1f}" for speed in speeds.values()),
                    ]
                )
                names = list(speeds)
    fields = [
        [key, value] for key, value in {**surroundings("benchmarks.update"), "threads": str(args.threads)}.items()
    ]
    report = "\n\n".join(
        [
            "# Benchmark: the update alone",
            markdown_table(["field", "value"], fields),
            f"GB/s of the bytes that the update has to move ({args.numel:,} elements; medians of {args.rounds} "
            "interleaved rounds). 16-bit: averages are float32 here and 16-bit in torch.",
            markdown_table(["dtype", "tensors", "phase", *names], tables),
        ]
    )
    print(report)
    if args.markdown:
        args.markdown.write_text(report + "\n")


if __name__ == "__main__":
    main()
