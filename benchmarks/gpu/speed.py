"""The speed of the update, beside the device's own copy, and how long the host is busy with a step."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.late import imagined_ranks
from benchmarks.gpu.rows import FAIL, FORMS, PASS, Part, median
from benchmarks.gpu.streams import params_on
from benchmarks.update import KINDS, make
from dist_asgd import ShardedASGD

# What the update has to reach of the bandwidth of a copy for ``fused`` to be worth being the default.
SHARE_OF_COPY = 0.9
NUM_ROUNDS = 5


def run(part: Part) -> None:
    """Bandwidth by implementation and dtype, then host time."""
    numel = 1 << 16 if part.cpu else _numel_that_fits()
    with part.attempt("copy"):
        copy = _bytes_per_second(part, *_copy(numel, part.device))
        part.add(f"copy of {numel:,} float32", f"{copy / 1e9:,.0f} GB/s", "bytes read and written")
        for kind in KINDS:
            for form in FORMS:
                with part.attempt(f"update, {kind}, {form}"):
                    _bandwidth(part, kind, form, numel, copy)
                gc.collect()
    for num in (10,) if part.cpu else (291, 1000):
        with part.attempt(f"torch.optim.ASGD, {num} parameters"):
            params = params_on(part.device, num, 64)
            theirs = torch.optim.ASGD(params, lr=1e-3, t0=0, foreach=True)
            part.add(f"host time, torch.optim.ASGD foreach, {num} parameters", _milliseconds(part, params, theirs))
        for form, options in FORMS.items():
            for stage in (1, 2):
                with part.attempt(f"host time, {form}, stage {stage}"):
                    _host_time(part, form, options, stage, num)
                with (
                    part.attempt(f"host time, rank of 4, {form}, stage {stage}"),
                    imagined_ranks(late=False),
                ):
                    _host_time(part, f"rank of 4, {form}", options, stage, num)


def _numel_that_fits() -> int:
    """Elements of which an update, with 20 bytes each, has room on the device; at most 2^28."""
    free_bytes, _ = torch.cuda.mem_get_info()
    return min(1 << 28, 1 << (int(free_bytes) // 64).bit_length() - 1)


def _copy(numel: int, device: torch.device) -> tuple[Callable[[], object], int]:
    source, target = (torch.full((numel,), 1.0, device=device) for _ in range(2))
    return lambda: target.copy_(source), 8 * numel


def _bytes_per_second(part: Part, call: Callable[[], object], num_bytes: int) -> float:
    """The median over rounds, each long enough that the start of a launch does not count."""
    seconds = []
    for _ in range(NUM_ROUNDS + 2):
        part.wait()
        start = time.perf_counter()
        call()
        call()
        part.wait()
        seconds.append((time.perf_counter() - start) / 2)
    return num_bytes / median(seconds[2:])


def _bandwidth(part: Part, kind: str, form: str, numel: int, copy: float) -> None:
    step, num_bytes = make(f"dist_asgd {form}", kind, numel, 100 if not part.cpu else 4, 0.0, str(part.device))
    speed = _bytes_per_second(part, step, num_bytes)
    details = f"{speed / copy:.2f} of the copy"
    if form == "fused" and not part.cpu:
        details += f"; {SHARE_OF_COPY} wanted: {PASS if speed >= SHARE_OF_COPY * copy else FAIL}"
    part.add(f"update while averaging, {kind}, {form}", f"{speed / 1e9:,.0f} GB/s", details)


def _host_time(part: Part, name: str, options: dict[str, Any], stage: int, num: int) -> None:
    params = params_on(part.device, num, 64)
    optimizer = ShardedASGD(params, lr=1e-3, t0=0, stage=stage, **options)
    part.add(f"host time, {name}, stage {stage}, {num} parameters", _milliseconds(part, params, optimizer))


def _milliseconds(part: Part, params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> str:
    """How long ``step()`` takes to return, while the device is idle when it begins."""
    seconds = []
    for _ in range(4 if part.cpu else 13):
        torch.autograd.backward(torch.stack([p.sum() for p in params]).sum())
        part.wait()
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        part.wait()
        optimizer.zero_grad()
    return f"{median(seconds[3:]) * 1e3:.2f} ms"
