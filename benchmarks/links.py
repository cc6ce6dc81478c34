"""``python -m benchmarks.links``: steps over a cable of 1 and of 10 Gbit/s, beside what the cost model says of them.

Two network namespaces stand for two hosts (``hosts.py``), each with one rank or two, which train over Gloo: stage 1
under DDP with gradient views, stage 2, and hybrid sharding with a replica on each host. The model gets what a user of
``dist-asgd plan`` would measure: the links, by messages of 1 MiB between all ranks at once and by the fastest of many
small ones; what messages take from the processor; forward and backward alone; the update.

computation   of an accelerator, which leaves the processor to the messages: layers that pause, and then have a
              gradient. With ``--batches`` also of the processor: the transformer of ``model.py``
compute       forward and backward of every rank at once, without communication
exposed       the step less ``compute``: what communication adds, with the update
unoverlapped  ``step()`` on gradients that are already there: reduce, update and gather, and nothing beside them

It needs root, ``ip`` and ``tc``, and about four minutes on 2 idle cores. It prints a Markdown report.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from benchmarks.hosts import MESSAGES, NUM_HOSTS, Hosts
from benchmarks.links_report import as_markdown
from benchmarks.measure import progress
from benchmarks.model import Shape, batch_of, build_model, parameter_bytes
from benchmarks.peers import HYPERPARAMETERS
from benchmarks.ranks import Team
from benchmarks.report import surroundings
from dist_asgd import ShardedASGD
from dist_asgd.planning import modes
from dist_asgd.planning.links import GBIT, Links
from dist_asgd.planning.setup import Setup
from dist_asgd.planning.sources import shapes_of
from dist_asgd.planning.timing import FORWARD_SHARE, StepTime, StepTimer
from dist_asgd.storage.precision import Precision

STAGE1, STAGE2, HYBRID, OVERLAP = "stage 1", "stage 2", "hybrid", "stage 2, overlap_forward"
# By the number of ranks. One rank a host has no shards inside of it.
MODES = {2: (STAGE1, STAGE2, OVERLAP), 4: (STAGE1, STAGE2, OVERLAP, HYBRID)}
SHAPE = Shape(width=256, num_heads=4)
# As many elements as the transformer has, in equal layers.
NUM_LAYERS, WIDTH = 28, 736
PROBE_BYTES, NUM_PROBES = 1 << 20, 32


@dataclass(frozen=True)
class Work:
    """The computation of a step: milliseconds of pauses, or sequences that the processor trains on."""

    kind: str
    amount: int

    def __str__(self) -> str:
        return f"{self.amount} ms" if self.kind == PAUSE else f"batch {self.amount}"


PAUSE, BATCH = "pause", "batch"


@dataclass(frozen=True)
class Cell:
    """One row of the report: a mode on a number of ranks, a cable and a computation."""

    ranks: int
    gbit: float
    work: Work
    mode: str


class _Pause(torch.autograd.Function):
    """Computes nothing, for a time: an accelerator is at work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float) -> Tensor:
        ctx.shape, ctx.seconds = weight.shape, seconds
        time.sleep(FORWARD_SHARE * seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        time.sleep((1 - FORWARD_SHARE) * ctx.seconds)
        return gradients[0], torch.full(ctx.shape, 1e-3), None


class PausingLayer(nn.Module):
    """A matrix, and a pause in its place in forward and in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))
        self.seconds = 0.0

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Pause.apply(x, self.weight, self.seconds)  # type: ignore[no-untyped-call]
        return result


def build(kind: str) -> nn.Module:
    """The model that computes in this way; the same on every rank."""
    return build_model(SHAPE) if kind == BATCH else nn.Sequential(*(PausingLayer() for _ in range(NUM_LAYERS)))


class Rank:
    """One rank: it builds each mode once, and measures on request. All methods are collective."""

    def __init__(self, rank: int, world_size: int, kinds: Sequence[str]) -> None:
        self.rank, self.world_size = rank, world_size
        alone = [dist.new_group([other]) for other in range(world_size)][rank]
        self._plain = {kind: build(kind) for kind in kinds}
        # All of the update on one rank: a shard of it takes its share.
        self._whole = ShardedASGD(self._plain[kinds[0]].named_parameters(), **HYPERPARAMETERS, process_group=alone)
        self._modes = {(kind, mode): self._build(kind, mode) for kind in kinds for mode in MODES[world_size]}

    def _build(self, kind: str, mode: str) -> tuple[nn.Module, ShardedASGD]:
        model = build(kind)
        mesh = None
        if mode == HYBRID:
            shape = (NUM_HOSTS, self.world_size // NUM_HOSTS)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        stage = 1 if mode == STAGE1 else 2
        optimizer = ShardedASGD(model.named_parameters(), **HYPERPARAMETERS, stage=stage, mesh=mesh)
        if mode == OVERLAP:
            optimizer.overlap_forward(model)
        return (DistributedDataParallel(model, gradient_as_bucket_view=True) if stage == 1 else model), optimizer

    def _input(self, module: nn.Module, work: Work) -> Tensor:
        if work.kind == BATCH:
            return batch_of(replace(SHAPE, batch=work.amount), self.rank, 0)
        for layer in module.modules():
            if isinstance(layer, PausingLayer):
                layer.seconds = work.amount * 1e-3 / NUM_LAYERS
        return torch.zeros(())

    # --- links ---------------------------------------------------------------------------------------------------

    def probe(self, other_host: bool) -> dict[str, float]:
        """Exchange messages with the rank in the same place on the other host, or with the next one on this host.

        Seconds of a small message, bytes per second of many large ones in each direction, by the clock and by this
        rank's processor, and the share of a core that this rank gets while all of them are busy.
        """
        per_host = self.world_size // NUM_HOSTS
        peer = (self.rank + per_host) % self.world_size if other_host else self.rank ^ 1
        sent, received = torch.zeros(PROBE_BYTES // 4), torch.zeros(PROBE_BYTES // 4)

        def swap(numel: int) -> list[dist.Work]:
            works = (dist.irecv(received[:numel], peer), dist.isend(sent[:numel], peer))
            return [work for work in works if work is not None]

        small = []
        for _ in range(60):
            begin = time.perf_counter()
            _wait(swap(1))
            small.append(time.perf_counter() - begin)
        dist.barrier()
        begin, begin_processor = time.perf_counter(), time.process_time()
        last: list[dist.Work] = []
        for _ in range(NUM_PROBES):
            works = swap(sent.numel())
            _wait(last)
            last = works
        _wait(last)
        nbytes = NUM_PROBES * sent.nbytes
        found = {"rate": nbytes / (time.perf_counter() - begin)}
        found["host_rate"] = nbytes / (time.process_time() - begin_processor)
        dist.barrier()
        begin, begin_processor = time.perf_counter(), time.process_time()
        while time.perf_counter() < begin + 0.2:
            pass
        found["share"] = (time.process_time() - begin_processor) / (time.perf_counter() - begin)
        # Processes that wait for a core are no latency of the link.
        return found | {"latency": statistics.quantiles(small, n=10)[0]}

    # --- steps ---------------------------------------------------------------------------------------------------

    def compute(self, work: Work, num: int) -> list[float]:
        """Seconds of forward and backward alone."""
        plain = self._plain[work.kind]
        inputs = self._input(plain, work)

        def run() -> None:
            plain.zero_grad()
            plain(inputs).backward()

        return self._timed(run, num)

    def update(self, num: int) -> list[float]:
        """Seconds of the update of all parameters on one rank."""
        self.compute(Work(next(iter(self._plain)), 1), 1)
        return self._timed(self._whole.step, num)

    def steps(self, mode: str, work: Work, num: int) -> list[float]:
        """Seconds of whole steps, which follow one another: from the end of one ``step()`` to that of the next."""
        module, optimizer = self._modes[work.kind, mode]
        inputs = self._input(module, work)

        def run() -> None:
            optimizer.zero_grad()
            module(inputs).backward()
            optimizer.step()

        seconds = self._timed(run, num)
        # Whoever reads parameters waits for gathers that are still under way.
        sum(float(param.detach().flatten()[0]) for param in module.parameters())
        return seconds

    def unoverlapped(self, mode: str, kind: str, num: int) -> list[float]:
        """Seconds of ``step()`` in stage 2 on gradients that were set by hand."""
        module, optimizer = self._modes[kind, mode]
        seconds = []
        for _ in range(num):
            optimizer.zero_grad()
            for param in module.parameters():
                param.grad = torch.full_like(param, 1e-3)
            seconds += self._timed(optimizer.step, 1)
        return seconds

    def _timed(self, call: Callable[[], object], num: int) -> list[float]:
        """Seconds from the end of one call to the end of the next, from a barrier on."""
        dist.barrier()
        ends = [time.perf_counter()]
        for _ in range(num):
            call()
            ends.append(time.perf_counter())
        return [end - begin for begin, end in pairwise(ends)]


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()


def slowest(by_rank: Sequence[Sequence[float]], skip: int = 0) -> list[float]:
    """Of each run the slowest rank's seconds; the first ``skip`` runs are left out."""
    return [max(times) for times in zip(*by_rank, strict=True)][skip:]


class Figures:
    """What is measured on one number of ranks, collected over all rounds."""

    def __init__(self, ranks: int, rates: Sequence[float], works: Sequence[Work]) -> None:
        self.ranks, self.rates, self.works = ranks, rates, works
        # By the other arguments of Cell, and whether the other host was probed.
        self.probes: dict[tuple[float, Work, str, bool], list[dict[str, float]]] = {}
        self.seconds: dict[tuple[Any, ...], list[float]] = {}

    def add(self, key: tuple[Any, ...], seconds: Sequence[float]) -> None:
        self.seconds.setdefault(key, []).extend(seconds)

    def median(self, *key: Any) -> float:
        return statistics.median(self.seconds[key])

    def run(self, team: Team, hosts: Hosts, number: int) -> None:
        """One round: everything once, on each cable."""
        for gbit in self.rates:
            hosts.set_rate(gbit)
            self.add(("update",), slowest(team.call("update", 3), 1))
            for mode in MODES[self.ranks]:
                for kind in sorted({work.kind for work in self.works}) if mode in (STAGE2, HYBRID) else ():
                    self.add(("unoverlapped", gbit, mode, kind), slowest(team.call("unoverlapped", mode, kind, 2)))
            for work in self.works:
                for mode in MODES[self.ranks]:
                    progress(f"round {number}: {self.ranks} ranks, {gbit:g} Gbit/s, {work}, {mode}")
                    # Just before the steps: what else the machine does meets both.
                    for other_host in (True, False)[: 1 + (self.ranks > NUM_HOSTS)]:
                        key = (gbit, work, mode, other_host)
                        self.probes.setdefault(key, []).extend(team.call("probe", other_host))
                    self.add(("compute", gbit, work, mode), slowest(team.call("compute", work, 3), 1))
                    self.add(("steps", gbit, work, mode), slowest(team.call("steps", mode, work, 4), 1))

    def links(self, gbit: float, work: Work | None = None, mode: str | None = None) -> Links:
        """The links as they were measured on this cable, before one mode's steps or all. A probe is of one rank."""
        per_host = self.ranks // NUM_HOSTS

        def of(other_host: bool, what: str) -> float:
            found = [
                probe[what]
                for (rate, before, of_mode, other), probes in self.probes.items()
                if (rate, other) == (gbit, other_host) and work in (None, before) and mode in (None, of_mode)
                for probe in probes
            ]
            return statistics.median(found)

        inside = per_host > 1
        return Links(
            link_gbit=of(True, "rate") * per_host / GBIT,
            latency_us=of(True, "latency") * 1e6,
            node_gbit=of(False, "rate") / GBIT if inside else 1.0,
            node_latency_us=of(False, "latency") * 1e6 if inside else 0.0,
            # Ranks that share a core, with one another or with other programs, pass on as much less.
            host_gbit=of(True, "host_rate") * of(True, "share") / GBIT,
        )

    def estimate(self, cell: Cell) -> StepTime:
        """What the cost model says of ``cell``."""
        per_host = cell.ranks // NUM_HOSTS
        mesh = (NUM_HOSTS, per_host) if cell.mode == HYBRID else None
        setup = Setup(cell.ranks, per_host, mesh, Precision(None, False, None, None), backend="gloo")
        with torch.device("meta"):
            model = shapes_of(build(cell.work.kind))
        compute = self.median("compute", cell.gbit, cell.work, cell.mode)
        update = self.median("update") / cell.ranks
        timer = StepTimer(model, setup, self.links(cell.gbit, cell.work, cell.mode), compute, update)
        shards = cell.ranks if mesh is None else per_host
        if cell.mode == STAGE1:
            return timer.stage1(modes.stage1(model, setup, shards), shards)
        return timer.stage2(modes.stage2(model, setup, shards), shards)

    def row(self, cell: Cell) -> dict[str, Any]:
        """The figures of one row of the report, in seconds."""
        key = (cell.gbit, cell.work, cell.mode)
        step, compute = self.median("steps", *key), self.median("compute", *key)
        estimate = self.estimate(cell)
        added = estimate.exposed_overlapped if cell.mode == OVERLAP else estimate.exposed
        assert added is not None
        kind = STAGE2 if cell.mode == OVERLAP else cell.mode
        alone = None if kind == STAGE1 else self.median("unoverlapped", cell.gbit, kind, cell.work.kind)
        low, _, high = statistics.quantiles(self.seconds["steps", cell.gbit, cell.work, cell.mode], n=4)
        return asdict(cell) | {
            "work": str(cell.work),
            "compute": compute,
            "step": step,
            "spread": (high - low) / step,
            "estimate": estimate.compute + added,
            "error": (estimate.compute + added) / step - 1,
            "exposed": step - compute,
            "unoverlapped": alone,
            "share": None if alone is None else (step - compute) / alone,
        }


def measure(rates: Sequence[float], works: Sequence[Work], rounds: int) -> list[Figures]:
    """Run all rounds on 2 and on 4 ranks."""
    found = []
    with Hosts() as hosts:
        for ranks in MODES:
            hosts.set_rate(max(rates))
            figures = Figures(ranks, rates, works)
            kinds = sorted({work.kind for work in works})
            with Team(Rank, ranks, kinds, environment=MESSAGES, entrance=hosts.entrance(ranks // NUM_HOSTS)) as team:
                team.wait_ready()
                for kind in kinds:
                    for mode in MODES[ranks]:
                        team.call("steps", mode, Work(kind, 1), 2)
                for number in range(rounds):
                    figures.run(team, hosts, number + 1)
            found.append(figures)
    return found


# --- the report ------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.links", description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 10.0], help="Gbit/s of the cable")
    parser.add_argument("--pauses", type=int, nargs="+", default=[100, 550], help="milliseconds of computation")
    parser.add_argument("--batches", type=int, nargs="+", default=[], help="sequences for the processor to train on")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with 3 steps a row (%(default)s)")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="also write the report here")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all figures here")
    options = parser.parse_args(arguments)
    if os.geteuid():
        parser.error("network namespaces need root")
    # Ended from outside, it still removes its hosts.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    works = [Work(PAUSE, ms) for ms in options.pauses] + [Work(BATCH, size) for size in options.batches]
    about = surroundings("benchmarks.links")
    begin = time.perf_counter()
    found = measure(options.rates, works, options.rounds)
    about["load average at end"] = f"{os.getloadavg()[0]:.1f}"
    about["time taken"] = f"{time.perf_counter() - begin:.0f} s"
    report = {
        "about": about,
        "elements": parameter_bytes(build(works[0].kind)) // 4,
        "links": [{"ranks": f.ranks, "gbit": gbit, **asdict(f.links(gbit))} for f in found for gbit in options.rates],
        "rows": [
            f.row(Cell(f.ranks, gbit, work, mode))
            for f in found
            for gbit in options.rates
            for work in works
            for mode in MODES[f.ranks]
        ],
    }
    text = as_markdown(report)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
