"""``python -m benchmarks.scale``: what a rank of thousands does on its host, by world size, without the others.

Every figure comes from a process of its own, on torch's ``fake`` process group: it has the number and the place of a
rank, and its collectives move nothing. What is timed is this package's Python and torch's dispatch, with the strategy
that NCCL takes (collectives on flat buffers) and control messages that are posted and never sent. There is no network
and no kernel in it. It prints a Markdown report; ``benchmarks/README.md`` describes the method.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.measure import progress
from benchmarks.report import markdown_table, surroundings
from dist_asgd import ShardedASGD
from dist_asgd.comm import communicators
from dist_asgd.comm.base import Communicator, SingleProcess
from dist_asgd.comm.dissemination import Message
from dist_asgd.comm.gloo import Gloo
from dist_asgd.comm.host_group import HostGroup
from dist_asgd.comm.native import NativeCollectives

MODES = ("stage 2", "stage 1", "DTensor")
PHASES = ("backward", "clip", "step")


class Echo(Gloo):
    """As Gloo, but what a rank receives is what it sends: the fake group brings nothing. It counts messages."""

    num_messages = 0
    num_bytes = 0

    def post(self, action: str, tag: int, receives: Iterable[Message], sends: Iterable[Message]) -> list[dist.Work]:
        places, outgoing = list(receives), list(sends)
        for _, place in places:
            sent = outgoing[0][1]
            place.copy_(sent.repeat(-(-place.numel() // sent.numel()))[: place.numel()])
        Echo.num_messages += len(outgoing)
        Echo.num_bytes += sum(tensor.nbytes for _, tensor in outgoing)
        works = super().post(action, tag, (), outgoing)
        return works[:1] * len(places) + works


class Instant(NativeCollectives):
    """Collectives that cost their call only: those of torch's fake group copy something for every rank."""

    def _call(self, action: str, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return None


def _host(group: HostGroup, ranks: Any) -> Gloo:
    return Echo(group, communicators.FIRST_TAG, ranks)


def _among(_communicators: Any, ranks: Any, _device: torch.device) -> Communicator:
    if len(ranks) == 1 or dist.group.WORLD is None:
        return SingleProcess()
    return Instant(dist.group.WORLD, averages=True)


class Parameters(nn.Module):
    """``num_params`` vectors of 64 elements, each in a bucket of its own: what counts is how many there are."""

    def __init__(self, num_params: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(64)) for _ in range(num_params)])

    def forward(self) -> Tensor:
        return torch.stack([weight.sum() for weight in self.weights]).sum()


def measure(world_size: int, mode: str, num_params: int, num_steps: int) -> dict[str, float]:
    """Build an optimizer as the rank in the middle of ``world_size``, and take steps: milliseconds, MiB, messages."""
    torch.set_num_threads(1)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=world_size // 2, world_size=world_size, store=FakeStore())
    # The only stand-ins: everything above them is the package's.
    communicators._with_own_tags = _host
    communicators._backend_for = lambda *_: "gloo"
    communicators.Communicators._make_among = _among  # type: ignore[method-assign, assignment]
    model = Parameters(num_params)
    if mode == "DTensor":
        _distribute(model, world_size)
    figures: dict[str, float] = {}

    def build() -> ShardedASGD:
        stage = 2 if mode == "stage 2" else 1
        return ShardedASGD(model.named_parameters(), lr=0.1, stage=stage, bucket_cap_mb=1e-9)

    figures["construct"], optimizer = _timed(build)
    runs = []
    for step in range(num_steps + 1):
        Echo.num_messages = Echo.num_bytes = 0
        if mode == "DTensor":
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
    if mode == "DTensor":
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
    context = multiprocessing.get_context("spawn")
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
    """Measure, and print the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 64, 1024, 4096, 16384], help="world sizes")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--params", type=int, default=291, help="parameters, each a bucket (%(default)s)")
    parser.add_argument("--steps", type=int, default=7, help="steps, of which the median is reported (%(default)s)")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="also write the report here")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all figures here")
    options = parser.parse_args(arguments)
    about = surroundings("benchmarks.scale")
    figures: dict[str, dict[int, dict[str, float]]] = {}
    for mode in options.modes:
        for size in options.sizes:
            progress(f"{mode}, {size:,} ranks")
            figures.setdefault(mode, {})[size] = in_process(size, mode, options.params, options.steps)
    report = as_markdown(about, figures, options.params)
    print(report)
    if options.markdown:
        options.markdown.write_text(report + "\n")
    if options.json:
        options.json.write_text(json.dumps({"about": about, "figures": figures}, indent=1) + "\n")


def _beside(value: float, first: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f} ({value / first:.2f})"


def as_markdown(about: dict[str, str], figures: dict[str, dict[int, dict[str, float]]], num_params: int) -> str:
    """The report: where it ran, and one table of all modes and sizes."""
    rows = []
    for mode, by_size in figures.items():
        first = next(iter(by_size.values()))
        for size, found in by_size.items():
            phases = [_beside(found[phase], first[phase]) for phase in PHASES]
            rows.append(
                [
                    mode,
                    f"{size:,}",
                    f"{found['construct']:.0f}",
                    *phases,
                    f"{found['messages']:.0f}",
                    f"{found['bytes'] / 1e3:.1f}",
                    f"{found['objects MiB']:.1f}",
                ]
            )
    head = ["mode", "ranks", "construct", *PHASES, "messages", "kB sent", "objects, MiB"]
    return "\n".join(
        [
            "# Host time by the number of ranks",
            "",
            f"{num_params} parameters in as many buckets, on the rank in the middle; milliseconds of its processor, "
            "the median of the steps, and in brackets how many times those of the smallest size. Messages and bytes: "
            "all control exchanges of one step with clipping. Objects are what Python keeps of the optimizer.",
            "",
            markdown_table(head, rows),
            "",
            markdown_table(["", ""], [[name, value] for name, value in about.items()]),
        ]
    )


if __name__ == "__main__":
    main(sys.argv[1:])
