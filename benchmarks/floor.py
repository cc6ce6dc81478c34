"""``python -m benchmarks.floor``: how fast a step of stage 2 can be on this machine, and how small, part by part.

Each part of a step on one host is measured by itself, as fast as this machine does it: forward and backward whose
gradients are dropped, and loops over as many bytes as stage 2 has to move, on all ranks at once. Their sum is a floor
for a step in which nothing waits; beside it stand the steps of stage 2 and of DDP with ``torch.optim.ASGD``, measured
in the same rounds. Memory is the peak of backward above the model, malloc threshold fixed as in ``benchmarks.step``.

update   three reads and two writes for each element of a shard, in one pass (``triad.c``)
pack     what the other ranks need of the gradients, copied to memory that they share, a stripe at a time
mean     a shard of the sum: this rank's own gradients and the others' stripes are read, and the shard written
gather   this rank's shard copied to shared memory, and the others' shards from there

It takes about a minute on 2 idle cores, and prints a Markdown report.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import MEMORY_ENVIRONMENT, progress
from benchmarks.model import Shape, batch_of, build_model, parameter_bytes
from benchmarks.ranks import Team
from benchmarks.report import markdown_table, surroundings
from benchmarks.trainer import peak_bytes, reset_peak, settled_bytes
from benchmarks.update import machine
from dist_asgd import ShardedASGD
from dist_asgd.comm.outboxes import STRIPE_BYTES

OPTIONS: dict[str, Any] = {"lr": 1e-3, "t0": 0}
PARTS = ("forward and backward", "update", "pack", "mean", "gather")
# They touch memory for the first time.
NUM_WARMUP = 3
DDP, STAGE2 = "DDP + torch.optim.ASGD", "stage 2"


class Whole:
    """Whole steps of one optimizer on one rank."""

    def __init__(self, rank: int, _world_size: int, kind: str, shape: Shape) -> None:
        self._rank, self._shape, self._number = rank, shape, 0
        self._model = build_model(shape)
        self._called: nn.Module = self._model
        if kind == DDP:
            self._called = DistributedDataParallel(self._model)
            self._optimizer: Any = torch.optim.ASGD(self._model.parameters(), **OPTIONS)
        else:
            self._optimizer = ShardedASGD(self._model.parameters(), stage=2, **OPTIONS)

    def step(self) -> float:
        """The seconds of one step, from a barrier on."""
        self._number += 1
        tokens = batch_of(self._shape, self._rank, self._number)
        dist.barrier()
        begin = time.perf_counter()
        self._optimizer.zero_grad()
        self._called(tokens).backward()
        self._optimizer.step()
        return time.perf_counter() - begin


class Parts:
    """The parts of a step on one rank, each by itself and with all ranks at once."""

    def __init__(self, rank: int, world_size: int, shape: Shape) -> None:
        self._rank, self._shape, self._number = rank, shape, 0
        self._model = build_model(shape)
        for param in self._model.parameters():
            param.register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]
        numel = parameter_bytes(self._model) // 4
        shard, others = numel // world_size, numel - numel // world_size
        stripe = STRIPE_BYTES // 4 // world_size
        # Of every buffer but the stripes a rank touches each byte once in a part.
        self._param, self._shard = torch.ones(shard), torch.ones(shard)
        self._gradient = torch.ones(others)
        self._received = torch.ones(others)
        shared = torch.ones(max(1, world_size - 1) * stripe)
        loops = {name.split()[0]: call for name, call, _ in machine(shard, 1, "cpu")}
        if "triad" not in loops:
            raise RuntimeError("the loop of the update has to be compiled: install a C compiler")
        self._calls: dict[str, Callable[[], object]] = {
            "forward and backward": self._compute,
            "update": loops["triad"],
            "pack": lambda: _to_stripe(self._gradient, shared),
            "mean": lambda: _mean(self._param, shared[:stripe], self._shard),
            "gather": partial(_gather, self._param, shared, self._received),
        }

    def seconds(self, part: str) -> float:
        """The seconds of ``part``, from a barrier on."""
        dist.barrier()
        begin = time.perf_counter()
        self._calls[part]()
        return time.perf_counter() - begin

    def _compute(self) -> None:
        self._number += 1
        self._model(batch_of(self._shape, self._rank, self._number)).backward()


class Peak:
    """The memory of forward and backward on one rank, in which every gradient is dropped as soon as it is there."""

    def __init__(self, rank: int, _world_size: int, shape: Shape) -> None:
        self._rank, self._shape = rank, shape

    def bytes(self) -> int:
        """The peak of backward above the model, code that torch loads on first use not counted."""
        for shape in (Shape(num_layers=1, width=32, num_heads=2, context=8), self._shape):
            model = build_model(shape)
            floor = settled_bytes()
            for param in model.parameters():
                param.register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]
            for number in range(3):
                reset_peak()
                model(batch_of(shape, self._rank, number)).backward()
        return peak_bytes() - floor


def _drop(param: Tensor) -> None:
    param.grad = None


def _to_stripe(source: Tensor, stripe: Tensor) -> None:
    for chunk in torch.split(source, stripe.numel()):
        stripe[: chunk.numel()].copy_(chunk)


def _from_stripe(stripe: Tensor, target: Tensor) -> None:
    for chunk in torch.split(target, stripe.numel()):
        chunk.copy_(stripe[: chunk.numel()])


def _gather(own: Tensor, stripe: Tensor, others: Tensor) -> None:
    _to_stripe(own, stripe)
    _from_stripe(stripe, others)


def _mean(own: Tensor, stripe: Tensor, shard: Tensor) -> None:
    for ours, out in zip(torch.split(own, stripe.numel()), torch.split(shard, stripe.numel()), strict=True):
        torch.add(ours, stripe[: ours.numel()], out=out)


def moved_bytes(part: str, unit: int, world_size: int) -> int | None:
    """How many bytes a rank reads and writes in memory in ``part``, stripes not counted; None for computation."""
    shard, others = unit // world_size, unit - unit // world_size
    return {"update": 5 * shard, "pack": others, "mean": 2 * shard, "gather": shard + others}.get(part)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of a run: medians of seconds, the slowest rank's in each round."""
    shape = Shape().tiny() if options.quick else Shape()
    unit = parameter_bytes(build_model(shape))
    seconds: dict[str, list[float]] = {name: [] for name in (DDP, STAGE2, *PARTS)}
    with (
        Team(Whole, options.ranks, DDP, shape) as ddp,
        Team(Whole, options.ranks, STAGE2, shape) as stage2,
        Team(Parts, options.ranks, shape) as parts,
    ):
        teams = {DDP: ddp, STAGE2: stage2}
        for team in (ddp, stage2, parts):
            team.wait_ready()
        for number in range(options.rounds + NUM_WARMUP):
            warms_up = number < NUM_WARMUP
            progress(f"warm-up {number + 1}" if warms_up else f"round {number + 1 - NUM_WARMUP} of {options.rounds}")
            for name, of_kind in seconds.items():
                found = teams[name].call("step") if name in teams else parts.call("seconds", name)
                if not warms_up:
                    of_kind.append(max(found))
    with Team(Peak, options.ranks, shape, environment=MEMORY_ENVIRONMENT) as peak:
        peak.wait_ready()
        activations = max(peak.call("bytes"))
    progress("")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    facts = surroundings("benchmarks.floor")
    return {"unit": unit, "seconds": medians, "activations_bytes": activations, "surroundings": facts}


def as_markdown(found: dict[str, Any], ranks: int) -> str:
    """The report."""
    unit, seconds = found["unit"], found["seconds"]
    rows = []
    for part in PARTS:
        moved = moved_bytes(part, unit, ranks)
        rate = "" if moved is None else f"{moved / seconds[part] / 1e9:.1f}"
        size = "" if moved is None else f"{moved / 1e6:.0f}"
        rows.append([part, size, rate, f"{seconds[part] * 1e3:.1f}", f"{seconds[part] / seconds[DDP]:.2f}"])
    total = sum(seconds[part] for part in PARTS)
    for name, value in (("floor: the sum", total), (STAGE2, seconds[STAGE2]), (DDP, seconds[DDP])):
        rows.append([name, "", "", f"{value * 1e3:.1f}", f"{value / seconds[DDP]:.2f}"])
    shards = 2 / ranks
    activations = found["activations_bytes"] / unit
    lines = [
        "# The floor of a step of stage 2",
        "",
        f"P is {unit / 1e6:.1f} MB of parameters, on {ranks} ranks of one host, t0=0. Bytes are those that a rank\n"
        f"reads and writes in memory; what passes through a cache between two ranks is not among them.",
        "",
        markdown_table(["part", "MB", "GB/s", "ms", "of DDP's step"], rows),
        "",
        f"Peak memory above the model: the shards of average and gradients are {shards:.2f} P, and forward and\n"
        f"backward need {activations:.2f} P for activations and the largest gradient, whatever the optimizer is,\n"
        f"together {shards + activations:.2f} P. Stage 2 adds its outboxes and a bucket on its way. With\n"
        f"`step_in_backward=True` there is no shard of gradients: {shards / 2 + activations:.2f} P.",
        "",
        markdown_table(["", ""], [[name, value] for name, value in found["surroundings"].items()]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and print the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floor", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21, help="timed rounds (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the model, of which the figures say little")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="also write the report here")
    options = parser.parse_args()
    text = as_markdown(measure(options), options.ranks)
    if options.markdown is not None:
        options.markdown.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
