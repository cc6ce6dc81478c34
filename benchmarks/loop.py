"""``python -m benchmarks.loop``: what is between ``fused`` on CPUs and a plain C loop over the same arrays.

Everything runs in one process and takes turns. The kernel and the loop get the very same arrays, so that each row
differs from an earlier one in one thing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import markdown_table, surroundings
from benchmarks.update import OPTIONS, plain_loop
from dist_asgd import ShardedASGD
from dist_asgd.storage import huge_pages
from dist_asgd.update.cpu import Launch
from dist_asgd.update.segments import KernelDtypes, Segment

NUM_TENSORS = 100
FLOAT32 = KernelDtypes(torch.float32, torch.float32, torch.float32)
CPU = torch.device("cpu")
Call = Callable[[], object]


def small_pages(numel: int) -> Tensor:
    """Memory as torch makes it, touched."""
    return torch.full((numel,), 0.5)


def large_pages(numel: int) -> Tensor:
    """Memory as the optimizer makes it, touched."""
    return huge_pages.empty(numel, torch.float32, CPU).fill_(0.5)


def kernel(arrays: tuple[Tensor, Tensor, Tensor], num_segments: int) -> Call:
    """A call of the kernel alone for parameters, gradients and averages, while averaging."""
    each = len(arrays[0]) // num_segments
    ranges = [slice(i * each, (i + 1) * each) for i in range(num_segments)]
    p, g, ax = arrays
    launch = Launch([Segment(p[r], ax[r], None, g[r], 0) for r in ranges], FLOAT32, False, 0.0, streamed=False)
    rows = array("d", [0.9999, -1e-6, 1e-6, 3.0])
    return lambda: launch.run(None, rows, 1.0, 1.0)


def step(numel: int, gradients: Tensor | None = None) -> Call:
    """``step()`` of one process for ``NUM_TENSORS`` parameters; their gradients lie in ``gradients``, if given."""
    each = numel // NUM_TENSORS
    params = [torch.nn.Parameter(small_pages(each)) for _ in range(NUM_TENSORS)]
    for i, param in enumerate(params):
        whole = torch.full_like(param, 1e-6) if gradients is None else gradients[i * each : (i + 1) * each]
        param.grad = whole
    optimizer = ShardedASGD(params, **OPTIONS, t0=0.0, fused=True)
    for _ in range(3):
        optimizer.step()
    return optimizer.step


def calls(numel: int, num_threads: int) -> Iterator[tuple[str, Call]]:
    """The rows of the table; the first is the plain loop."""
    small = (small_pages(numel), small_pages(numel), small_pages(numel))
    huge = (large_pages(numel), large_pages(numel), large_pages(numel))
    mixed = (huge[0], small[1], huge[2])
    for name, arrays in (("small pages", small), ("huge pages", huge)):
        loop = plain_loop(*arrays, num_threads)
        if loop is None:
            raise SystemExit("the plain loop needs a C compiler: set CC")
        yield f"plain loop, {name}", loop
        yield f"kernel, {name}", kernel(arrays, 1)
    yield "kernel, huge pages but for gradients", kernel(mixed, 1)
    yield f"kernel, huge pages but for gradients, {NUM_TENSORS} segments", kernel(mixed, NUM_TENSORS)
    found, huge_pages.page_bytes = huge_pages.page_bytes, lambda: 0  # type: ignore[assignment]
    try:
        yield "step(), small pages", step(numel)
    finally:
        huge_pages.page_bytes = found
    yield "step()", step(numel)
    yield "step(), gradients in huge pages", step(numel, large_pages(numel))
    # What it costs beside the kernel: between others that move much memory, nothing of it is left in the caches.
    yield f"step() of {NUM_TENSORS} parameters with 64 elements", step(64 * NUM_TENSORS)


def main() -> None:
    """Measure, print the table, and write it to a file if the command line asks for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=24_000_000, help="elements in all (default: 24M)")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--markdown", type=Path, help="also write the report here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    timed = list(calls(args.numel, args.threads))
    # With one thread its processor time leaves out what other programs take.
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name, _ in timed}
    for done in range(args.rounds):
        print(f"round {done + 1} of {args.rounds}", file=sys.stderr)
        for name, call in timed:
            start = clock()
            call()
            seconds[name].append(clock() - start)
    plain = seconds[timed[0][0]]
    rows = [
        [
            name,
            f"{statistics.median(of_name) * 1e3:.2f}",
            f"{statistics.median(one / base for one, base in zip(of_name, plain, strict=True)):.2f}",
        ]
        for name, of_name in seconds.items()
    ]
    fields = {**surroundings("benchmarks.loop"), "threads": str(args.threads)}
    fields["huge page"] = f"{huge_pages.page_bytes() >> 10} KiB"
    report = "\n\n".join(
        [
            "# Benchmark: the update beside a plain loop",
            markdown_table(["field", "value"], [[key, value] for key, value in fields.items()]),
            f"float32, {args.numel:,} elements, while averaging: three reads and two writes of 4 bytes an element, "
            f"{20 * args.numel / 1e6:.0f} MB. Times are medians of {args.rounds} interleaved rounds, and so are the "
            "ratios to the plain loop of the same round.",
            markdown_table(["what", "ms", "time / plain loop"], rows),
        ]
    )
    print(report)
    if args.markdown:
        args.markdown.write_text(report + "\n")


if __name__ == "__main__":
    main()
