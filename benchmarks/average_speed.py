"""What the update of an average costs on 2 ranks: time, share of the memory's bandwidth, and memory.

Vocabulary
    peer     a way to keep an average of a model in training, with its ``update()``
    bound    a plain C loop over arrays as long as a rank's shard: two reads and one write of 4 bytes an element, as in
             STREAM's triad, which is what an update has to move
    P        the bytes of all parameters

All peers of a round are updated one after the other, in an order that rotates, each from a barrier on; the slowest rank
counts. Parameters are in pages as torch takes them, averages of ``ShardedAverage`` and that of the bound in huge pages
if the system has them.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from benchmarks.measure import progress, rotated
from benchmarks.model import GPT, Shape, WideShape, build_model, parameter_bytes
from benchmarks.peers import local, peer_of
from benchmarks.ranks import Team
from benchmarks.trainer import follow_memory, peak_bytes, reset_peak, settled_bytes
from benchmarks.update import plain_library
from dist_asgd import ShardedAverage
from dist_asgd.storage import huge_pages

NUM_RANKS = 2
DECAY = 0.999
# They make the averages, and touch memory for the first time.
NUM_WARMUP = 3
NUM_SMALL, SMALL_NUMEL = 1000, 64
BOUND = "bound"
# The same for few large parameters, in which the host has less to do for each byte.
WIDE, WIDE_BOUND = "wide-ema", "wide-bound"


class Average:
    """One average of a model: ``update`` takes the parameters in, and ``in_place`` evaluates with it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.params = list(model.parameters())

    def update(self) -> None:
        """Take the parameters as they are now. Every rank calls it."""
        raise NotImplementedError

    @contextlib.contextmanager
    def in_place(self) -> Iterator[nn.Module]:
        """Inside the block the module has the averages. Collective."""
        raise NotImplementedError
        yield


class Sharded(Average):
    """``ShardedAverage``, exponential or the mean."""

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        super().__init__(model)
        self.average = ShardedAverage(model, decay=decay)
        self.update = self.average.update  # type: ignore[method-assign]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[nn.Module]:
        with self.average.averaged_parameters():
            yield self.model


class Whole(Average):
    """torch's ``AveragedModel(use_buffers=True)``: a copy of the model on each rank."""

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        super().__init__(model)
        rule = get_swa_multi_avg_fn() if decay is None else get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.average = AveragedModel(model, multi_avg_fn=rule, use_buffers=True)

    def update(self) -> None:
        self.average.update_parameters(self.model)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[nn.Module]:
        yield self.average.module


class Shadow(Average):
    """Copies of the local tensors, and ``torch._foreach_lerp_`` by hand; with FSDP2 these are the rank's shards."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.weight = 1 - decay
        with torch.no_grad():
            self.shadows = [local(param).clone() for param in self.params]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.shadows, [local(param) for param in self.params], self.weight)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[nn.Module]:
        with torch.no_grad():
            own = [local(param).clone() for param in self.params]
            torch._foreach_copy_([local(param) for param in self.params], self.shadows)
            yield self.model
            torch._foreach_copy_([local(param) for param in self.params], own)


@dataclass(frozen=True)
class Way:
    """A line of the table: how an average of a model is made, and whether the model is wrapped in FSDP2."""

    key: str
    label: str
    make: Callable[[nn.Module], Average]
    fsdp2: bool = False


WAYS = (
    Way("ema", "ShardedAverage, EMA", lambda model: Sharded(model, DECAY)),
    Way("mean", "ShardedAverage, mean", lambda model: Sharded(model, None)),
    Way("torch-ema", "`AveragedModel(use_buffers=True)`, EMA", lambda m: Whole(m, DECAY)),
    Way("torch-mean", "`AveragedModel(use_buffers=True)`, SWA", lambda m: Whole(m, None)),
    Way("foreach", "`torch._foreach_lerp_` by hand", lambda model: Shadow(model, DECAY)),
    Way("fsdp2-ema", "ShardedAverage, EMA, on FSDP2", lambda model: Sharded(model, DECAY), fsdp2=True),
    Way("fsdp2-shadow", "shadow of local tensors by hand, on FSDP2", lambda m: Shadow(m, DECAY), fsdp2=True),
)


def way_of(key: str) -> Way:
    """The way with this key."""
    return next(way for way in WAYS if way.key == key)


class ManyTensors(nn.Module):
    """1,000 parameters of 64 elements: what the host does for each."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(SMALL_NUMEL)) for _ in range(NUM_SMALL)])


class Updates:
    """An actor of ``benchmarks.ranks``: all averages of one rank, of one plain model and of one under FSDP2."""

    def __init__(self, _rank: int, world_size: int, quick: bool) -> None:
        shape = shape_of(quick)
        plain, wrapped = build_model(shape), peer_of("fsdp2").wrap(build_model(shape))
        numel = parameter_bytes(plain) // 4
        self._calls: dict[str, Callable[[], object]] = {BOUND: bound(numel // world_size)}
        for way in WAYS:
            self._calls[way.key] = way.make(wrapped if way.fsdp2 else plain).update
        wide = build_model(WideShape().tiny() if quick else WideShape())
        self._calls[WIDE_BOUND] = bound(parameter_bytes(wide) // 4 // world_size)
        self._calls[WIDE] = Sharded(wide, DECAY).update
        small = ManyTensors()
        self._small = {way.key: way.make(small).update for way in WAYS if not way.fsdp2}

    def seconds(self, key: str, small: bool = False) -> tuple[float, float]:
        """The seconds of one update, from a barrier on, and those of the processor; ``small``: of 1,000 parameters.

        A rank has one thread, whose processor time leaves out what other programs take.
        """
        call = (self._small if small else self._calls)[key]
        dist.barrier()
        begin, begin_processor = time.perf_counter(), time.thread_time()
        call()
        return time.perf_counter() - begin, time.thread_time() - begin_processor


class Memory:
    """An actor of ``benchmarks.ranks``: one average, whose memory is measured."""

    def __init__(self, _rank: int, _world_size: int, key: str, shape: Shape) -> None:
        self._way, self._shape = way_of(key), shape

    def peaks(self) -> dict[str, int]:
        """Bytes above the model: ``held`` by the average, at the ``peak`` of making and updating, and ``evaluating``.

        The first and the last are those of resident memory after an update, and of the peak of a swap above that.
        """
        found: dict[str, int] = {}
        # The first round loads code on first use, which is not counted.
        for shape in (self._shape.miniature(), self._shape):
            model: GPT | nn.Module = build_model(shape)
            model = peer_of("fsdp2").wrap(model) if self._way.fsdp2 else model
            dist.barrier()
            floor = settled_bytes()
            reset_peak()
            average = self._way.make(model)
            for _ in range(NUM_WARMUP):
                average.update()
            found["peak"] = peak_bytes() - floor
            held = settled_bytes()
            found["held"] = held - floor
            dist.barrier()
            reset_peak()
            with average.in_place():
                pass
            found["evaluating"] = peak_bytes() - held
            del average, model
        return found


def bound(numel: int) -> Callable[[], object]:
    """The plain loop over ``numel`` elements: reads parameters and averages, writes averages."""
    library = plain_library()
    if library is None:
        raise RuntimeError("the bound is a loop that has to be compiled: install a C compiler, or set CC")
    params = torch.full((numel,), 0.5)
    averages: Tensor = huge_pages.empty(numel, torch.float32, torch.device("cpu")).fill_(0.25)

    def run() -> None:
        addresses = ctypes.c_void_p(params.data_ptr()), ctypes.c_void_p(averages.data_ptr())
        library.mean(*addresses, ctypes.c_int64(numel), ctypes.c_float(1 - DECAY))

    return run


def shape_of(quick: bool) -> Shape:
    """The sizes of the model of most lines."""
    return Shape().tiny() if quick else Shape()


def measure(quick: bool, num_rounds: int) -> dict[str, Any]:
    """All figures: medians of seconds by key, those of small parameters (of the processor), shares, and bytes."""
    shape = shape_of(quick)
    model = build_model(shape)
    keys = [BOUND, *(way.key for way in WAYS), WIDE_BOUND, WIDE]
    clock: dict[str, list[float]] = {key: [] for key in keys}
    processor: dict[str, list[float]] = {key: [] for key in keys}
    small: dict[str, list[float]] = {way.key: [] for way in WAYS if not way.fsdp2}
    with Team(Updates, NUM_RANKS, quick, start="forkserver") as team:
        team.wait_ready()
        for number in range(-NUM_WARMUP, num_rounds):
            progress(f"updates: round {number + 1} of {num_rounds}")
            for key in rotated(keys, max(number, 0)):
                ranks = team.call("seconds", key)
                if number >= 0:
                    clock[key].append(max(taken for taken, _ in ranks))
                    processor[key].append(max(taken for _, taken in ranks))
            for key in small:
                ranks = team.call("seconds", key, True)
                if number >= 0:
                    small[key].append(max(taken for _, taken in ranks))
    memory: dict[str, dict[str, int]] = {}
    for way in WAYS:
        progress(f"memory of {way.label}")
        with Team(Memory, NUM_RANKS, way.key, shape, entrance=follow_memory, start="forkserver") as team:
            team.wait_ready()
            peaks = team.call("peaks")
            memory[way.key] = {kind: max(rank[kind] for rank in peaks) for kind in peaks[0]}
    progress("")
    return {
        "parameter_bytes": parameter_bytes(model),
        "num_parameters": len(list(model.parameters())),
        "wide_bytes": parameter_bytes(build_model(WideShape().tiny() if quick else WideShape())),
        "rounds": num_rounds,
        "huge_page_bytes": huge_pages.page_bytes(),
        "seconds": {key: statistics.median(values) for key, values in clock.items()},
        "processor_seconds": {key: statistics.median(values) for key, values in processor.items()},
        "of_bound": {
            key: statistics.median(
                a / b for a, b in zip(processor[WIDE_BOUND if key == WIDE else BOUND], values, strict=True)
            )
            for key, values in processor.items()
        },
        "small_seconds": {key: statistics.median(values) for key, values in small.items()},
        "bytes": memory,
    }
