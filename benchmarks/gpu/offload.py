"""Averages in host memory: their bits, waits, memory on the device, and what a step takes longer."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.gpu.rows import NOTE, Part, median
from benchmarks.gpu.streams import backward, params_on
from benchmarks.gpu.waits import waits_in
from dist_asgd import ShardedAverage
from dist_asgd.update.offload import NUM_LANES, TILE_BYTES

NUM_STEPS = 6
# Where averages lie: None is beside their parameters.
PLACES = (None, "cpu")


def run(part: Part) -> None:
    """Beside AdamW; the oracle is an average beside its parameters."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for foreach in (None, False):
            name = f"{str(dtype).removeprefix('torch.')}, foreach={foreach}"
            with part.attempt(name):
                _bits(part, name, dtype, foreach)
    with part.attempt("memory"):
        _memory(part)
    with part.attempt("speed"):
        _speed(part)


def _bits(part: Part, name: str, dtype: torch.dtype, foreach: bool | None) -> None:
    """Steps follow at once, so that each would overwrite what an update before it still reads."""
    numel = 30_011 if part.cpu else 3_000_011
    params = params_on(part.device, 12, numel, dtype)
    optimizer = torch.optim.AdamW(params, lr=0.1)
    beside, host = (ShardedAverage(params, decay=0.9, foreach=foreach, average_device=place) for place in PLACES)
    waits: set[str] = set()
    for step in range(NUM_STEPS):
        backward(params, step)
        optimizer.step()
        optimizer.zero_grad()
        beside.update()
        found = waits_in(part, host.update)
        waits |= set(found if step else [])
    pairs = [(host.state[p]["ax"].cpu(), beside.state[p]["ax"].cpu()) for p in params]
    wrong = sum(not torch.equal(mine, other) for mine, other in pairs)
    part.check(f"{name}: bits of an average beside its parameters", not wrong, f"{wrong} of {len(pairs)} differ")
    part.check(f"{name}: no wait in update()", not waits, ", ".join(sorted(waits)))
    values = [p.detach().clone() for p in params]
    with host.averaged_parameters():
        wrong = sum(not torch.equal(p.detach().cpu(), ax.to(dtype)) for p, (_, ax) in zip(params, pairs, strict=True))
    wrong += sum(not torch.equal(p, value) for p, value in zip(params, values, strict=True))
    part.check(f"{name}: swapped in place, and back", not wrong, f"{wrong} tensors differ")


def _memory(part: Part) -> None:
    """The scratch memory is all that the device has of them."""
    if part.cpu:
        return part.add("memory on the device", NOTE)
    params = params_on(part.device, 4, 32 << 20)
    before = torch.cuda.memory_allocated()
    average = ShardedAverage(params, decay=0.9, average_device="cpu")
    taken, scratch = torch.cuda.memory_allocated() - before, average.memory_report().in_flight_bytes
    part.add(
        "memory on the device", f"{taken / 2**20:,.0f} MiB", f"of {average.memory_report().state_bytes / 2**20:,.0f}"
    )
    part.check("memory on the device: scratch only", taken <= scratch + 2**20, f"{taken} bytes; scratch {scratch}")
    part.check("two tiles", scratch >= NUM_LANES * TILE_BYTES, f"{scratch}")
    return None


def _speed(part: Part) -> None:
    """A step that computes for longer than averages travel, so that they are hidden behind it."""
    width, batch = (64, 8) if part.cpu else (8192, 16384)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).to(part.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    inputs = torch.randn(batch, width, device=part.device)
    averages = {place: ShardedAverage(model.parameters(), decay=0.9, average_device=place) for place in PLACES}
    seconds: dict[str, list[float]] = {}
    for _ in range(2 if part.cpu else 8):
        for name, update in {
            "none": lambda: None,
            "beside": averages[None].update,
            "host": averages["cpu"].update,
        }.items():
            seconds.setdefault(name, []).append(_step_seconds(part, model, inputs, optimizer, update))
    alone = median(seconds["none"][1:])
    for name, found in seconds.items():
        part.add(
            f"step with an average: {name}", f"{median(found[1:]) * 1e3:.1f} ms", f"{median(found[1:]) / alone:.3f}"
        )


def _step_seconds(
    part: Part, model: nn.Module, inputs: torch.Tensor, optimizer: torch.optim.Optimizer, update: Callable[[], None]
) -> float:
    part.wait()
    start = time.perf_counter()
    for _ in range(4):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        update()
    part.wait()
    return (time.perf_counter() - start) / 4
