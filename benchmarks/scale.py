"""``python -m benchmarks.scale``: what a rank of thousands does on its host, by world size, without the others.

Models of 7B, 70B and 405B parameters are first planned (``scale_plan.py``), which gives their buckets, bytes and
messages. Then a rank is measured that has as many parameters, in the same buckets, of 64 elements each; and one with
291 parameters in as many buckets.

Every measured figure comes from a process of its own, on torch's ``fake`` process group: it has the number and the
place of a rank, and its collectives move nothing. What is timed is this package's Python and torch's dispatch, with the
strategy that NCCL takes (collectives on flat buffers) and control messages that are posted and never sent. There is no
network and no kernel in it. It prints a Markdown report; ``benchmarks/README.md`` describes the method.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import scale_plan
from benchmarks.measure import progress
from benchmarks.report import markdown_table, surroundings
from benchmarks.scale_plan import DTENSOR, HYBRID, MODES, ONE_EACH, STAGE2
from dist_asgd import ShardedASGD
from dist_asgd.comm import communicators
from dist_asgd.comm.base import Communicator, SingleProcess
from dist_asgd.comm.dissemination import Message
from dist_asgd.comm.gloo import Gloo
from dist_asgd.comm.host_group import HostGroup
from dist_asgd.comm.measure import Action, Meter
from dist_asgd.comm.native import NativeCollectives
from dist_asgd.storage import bucketing

PHASES = ("backward", "clip", "step")


class Echo(Gloo):
    """As Gloo, but what a rank receives is what it sends: the fake group brings nothing. It counts messages."""

    num_messages = 0
    num_bytes = 0

    def post(self, action: Action, tag: int, receives: Iterable[Message], sends: Sequence[Message]) -> list[dist.Work]:
        places, outgoing = list(receives), sends
        for _, place in places:
            sent = outgoing[0][1]
            place.copy_(sent.repeat(-(-place.numel() // sent.numel()))[: place.numel()])
        Echo.num_messages += len(outgoing)
        Echo.num_bytes += sum(tensor.nbytes for _, tensor in outgoing)
        works = super().post(action, tag, (), outgoing)
        return works[:1] * len(places) + works


class Instant(NativeCollectives):
    """Collectives that cost their call only: those of torch's fake group copy something for every rank."""

    def _call(self, action: Action, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return None


def _host(group: HostGroup, ranks: Any, meter: Meter) -> Gloo:
    return Echo(group, communicators.FIRST_TAG, ranks, meter)


def _among(_communicators: Any, ranks: Any, _device: torch.device) -> Communicator:
    if len(ranks) == 1 or dist.group.WORLD is None:
        return SingleProcess()
    found = Instant(dist.group.WORLD, averages=True)
    # The world stands in for the group of some of its ranks, too: nothing is sent.
    found.rank, found.world_size = list(ranks).index(dist.get_rank()), len(ranks)
    return found


class Parameters(nn.Module):
    """``num_params`` vectors of 64 elements: what counts is how many there are."""

    def __init__(self, num_params: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(64)) for _ in range(num_params)])

    def forward(self) -> Tensor:
        return torch.stack([weight.sum() for weight in self.weights]).sum()


def measure(world_size: int, mode: str, groups: list[list[int]], num_steps: int) -> dict[str, float]:
    """Build an optimizer as the rank in the middle of ``world_size``, and take steps: milliseconds, MiB, messages.

    ``groups`` has, for each bucket, the positions of its parameters in reverse registration order.
    """
    torch.set_num_threads(1)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=world_size // 2, world_size=world_size, store=FakeStore())
    # The only stand-ins: everything above them is the package's.
    communicators._with_own_tags = _host
    communicators._backend_for = lambda *_: "gloo"
    communicators.Communicators._make_among = _among  # type: ignore[method-assign, assignment]
    bucketing.fill_buckets = lambda *_: groups  # type: ignore[attr-defined]
    num_params = sum(map(len, groups))
    model = Parameters(num_params)
    if mode == DTENSOR:
        _distribute(model, world_size)
    mesh = None
    if mode == HYBRID:
        from torch.distributed.device_mesh import DeviceMesh

        shards = scale_plan.shards_of(mode, world_size)
        ranks = torch.arange(world_size).view(-1, shards)
        mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("replicate", "shard"), _init_backend=False)
    figures: dict[str, float] = {}

    def build() -> ShardedASGD:
        stage = 2 if mode in (STAGE2, HYBRID) else 1
        return ShardedASGD(model.named_parameters(), lr=0.1, stage=stage, mesh=mesh)

    figures["construct"], optimizer = _timed(build)
    runs = []
    for step in range(num_steps + 1):
        Echo.num_messages = Echo.num_bytes = 0
        if mode == DTENSOR:
            # As FSDP2 leaves them: backward and its communication are torch's own.
            _give_gradients(model)
            times = {"backward": float("nan")}
        else:
            times = {"backward": _timed(model().backward)[0]}
        times |= {"clip": _timed(lambda: optimizer.clip_grad_norm_(1.0))[0]}
        times["step"] = _timed(optimizer.step)[0]
        optimizer.zero_grad()
        if step:  # the first one compares values and builds plans
            runs.append(times)
    figures |= {phase: statistics.median(run[phase] for run in runs) for phase in PHASES}
    figures |= {"messages": Echo.num_messages, "bytes": Echo.num_bytes}
    tracemalloc.start()
    other = Parameters(num_params)
    if mode == DTENSOR:
        _distribute(other, world_size)
    before = tracemalloc.get_traced_memory()[0]
    model = other
    kept = build()
    figures["objects MiB"] = (tracemalloc.get_traced_memory()[0] - before) / 2**20
    tracemalloc.stop()
    del kept
    return figures


def _distribute(model: Parameters, world_size: int) -> None:
    """Make DTensors of the parameters, sharded over all ranks."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh("cpu", torch.arange(world_size), _init_backend=False)
    for index, weight in enumerate(model.weights):
        local = DTensor.from_local(weight.detach(), mesh, (Shard(0),), run_check=False)
        model.weights[index] = nn.Parameter(local)


def _give_gradients(model: Parameters) -> None:
    """Give each DTensor a gradient that is placed as it is."""
    from torch.distributed.tensor import DTensor

    for weight in model.weights:
        local = torch.ones_like(weight.to_local())
        weight.grad = DTensor.from_local(local, weight.device_mesh, weight.placements, run_check=False)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of this thread's processor, and what ``call`` returns."""
    started = time.process_time()
    value = call()
    return (time.process_time() - started) * 1e3, value


def _measure_in(connection: Any, *arguments: Any) -> None:
    connection.send(measure(*arguments))


def in_process(*arguments: Any) -> dict[str, float]:
    """``measure`` in a new process: a fake group of another size leaves something behind."""
    context = multiprocessing.get_context("forkserver")
    # Each process starts as a copy of one that has imported everything and made nothing.
    context.set_forkserver_preload(["benchmarks.scale_plan"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure_in, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        found: dict[str, float] = ours.recv()
    finally:
        process.join()
    return found


def main(arguments: list[str] | None = None) -> None:
    """Plan, measure, and print the report."""
    names = (ONE_EACH, *scale_plan.MODELS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 64, 1024, 4096, 16384], help="world sizes")
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--steps", type=int, default=7, help="steps, of which the median is reported (%(default)s)")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="also write the report here")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all figures here")
    options = parser.parse_args(arguments)
    about = surroundings("benchmarks.scale")
    planned = []
    for model in options.models:
        for size in options.sizes if model != ONE_EACH else ():
            progress(f"planning {model}, {size:,} ranks")
            planned += scale_plan.planned(model, size, options.modes)
    measured: list[dict[str, Any]] = []
    for model in options.models:
        for mode in options.modes:
            first: dict[str, float] | None = None
            for size in options.sizes:
                progress(f"{model}, {mode}, {size:,} ranks")
                found = in_process(size, mode, scale_plan.groups_of(model, mode, size), options.steps)
                first = first or found
                ratios = {phase: found[phase] / first[phase] for phase in PHASES}
                measured.append({"model": model, "mode": mode, "ranks": size, **found, "ratios": ratios})
    about["load average at end"] = f"{os.getloadavg()[0]:.1f}"
    report = as_markdown(about, planned, measured)
    print(report)
    if options.markdown:
        options.markdown.write_text(report + "\n")
    if options.json:
        found_all = {"about": about, "planned": planned, "measured": measured}
        options.json.write_text(json.dumps(found_all, indent=1) + "\n")


def as_markdown(about: dict[str, str], planned: list[dict[str, Any]], measured: list[dict[str, Any]]) -> str:
    """The report: what was planned, what was measured, and where."""
    rows = []
    for found in measured:
        phases = [
            "-" if math.isnan(found[phase]) else f"{found[phase]:.1f} ({found['ratios'][phase]:.2f})"
            for phase in PHASES
        ]
        rows.append(
            [
                found["model"],
                found["mode"],
                f"{found['ranks']:,}",
                f"{found['construct']:.0f}",
                *phases,
                f"{found['messages']:.0f}",
                f"{found['bytes'] / 1e3:.1f}",
                f"{found['objects MiB']:.1f}",
            ]
        )
    head = ["model", "mode", "ranks", "construct", *PHASES, "messages", "kB sent", "objects, MiB"]
    return "\n".join(
        [
            "# One rank of 8 to 16,384",
            "",
            "## Host time (measured)",
            "",
            "On the rank in the middle, in milliseconds of its processor: the median of the steps, and in brackets how "
            "many times those of the smallest size. The rank has as many parameters as the model, in the buckets that "
            "the model has, and each of 64 elements, so that no bucket is cut into stripes; "
            f"*{ONE_EACH}* is {scale_plan.NUM_ONE_EACH} parameters in as many buckets. Messages and bytes are those of "
            "all control exchanges of one step with clipping. Objects are what Python keeps of the optimizer.",
            "",
            markdown_table(head, rows),
            "",
            *scale_plan.sections(planned),
            "What describes a checkpoint of 1,024 ranks, and what reading it costs them, is in `checkpoint_scale.md`.",
            "",
            markdown_table(["", ""], [[name, value] for name, value in about.items()]),
        ]
    )


if __name__ == "__main__":
    main(sys.argv[1:])
