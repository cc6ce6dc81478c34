"""Which runs of which shards one step updates, and with whose gradients: planned once, executed every step.

batch   what one bucket updates with one set of operators, or in one call of the compiled kernel
run     a stretch of a shard whose parameters all step together: cut into tiles that stay in cache
source  the part of one member's gradient that fills a part of a tile (stage 1: gradients lie with the parameters)
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..storage import masters
from ..storage.buffers import ShardedParam, StateBuffer
from ..storage.memory_order import flattened
from ..storage.snapshots import AddressTable, GradientTable
from . import backend, cpu, foreach, reference, rounding
from .schedule import Cohort, Implementation, StepHyperparameters
from .segments import KernelDtypes, Scaling, Segment

if TYPE_CHECKING:
    from . import cuda

TILE_NUMEL = {"cpu": 1 << 19}
ACCELERATOR_TILE_NUMEL = 1 << 24
# Below this a copy into the tile's scratch is cheaper than a set of operators of its own.
DIRECT_NUMEL = 1 << 15


@dataclass(frozen=True, slots=True)
class GradientRange:
    """``scratch[at:at + numel]`` is the member's flat gradient from ``start``."""

    member: ShardedParam
    start: int
    at: int
    numel: int

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the member's gradient."""
        return self.numel == self.member.slot.numel


@dataclass(frozen=True, slots=True)
class Tile:
    """One call of the rule: views of parameters, their average, their masters and, in stage 2, their gradient.

    ``rounds_by`` is (key, place in the parameter) where the update is rounded stochastically.
    """

    param: Tensor
    average: Tensor
    gradient: Tensor | None
    sources: tuple[GradientRange, ...] = ()
    gaps: tuple[tuple[int, int], ...] = ()
    master: Tensor | None = None
    rounds_by: tuple[int, int] | None = None
    # Once made: scratch, and the views of it that sources are copied to.
    targets: list[tuple[Tensor | None, list[Tensor]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StepContext:
    """What batches need to know of one step.

    rows       (c, -eta, mu, t) of every cohort whose scalars are on the host
    factors    the like on the device, by group
    pending    what gradients that were reduced here are multiplied by, ``scaling`` is for others
    seen       the gradients of parameters in buckets that come with the step, by parameter index
    found_inf  (1,) float32 on the device: nonzero, and nothing is to change. None: nobody asks
    """

    updater: Updater
    hypers: Sequence[StepHyperparameters]
    rows: array[float]
    factors: dict[int, Tensor]
    pending: Scaling
    scaling: Scaling
    seen: GradientTable
    found_inf: Tensor | None


@dataclass(frozen=True, slots=True)
class Batch:
    """All tiles of one cohort in one bucket."""

    cohort: Cohort
    group_index: int
    tiles: tuple[Tile, ...]

    def run(self, step: StepContext) -> None:
        """Update them in torch operators."""
        reduced = self.tiles[0].gradient is not None
        step.updater.run(self, step.hypers[self.group_index], step.pending if reduced else step.scaling)


@dataclass(frozen=True, slots=True)
class SegmentGradients:
    """The members whose gradients the segments of a launch take, and where in them, in bytes."""

    members: list[ShardedParam]
    starts_bytes: list[int]
    picks: AddressTable

    @classmethod
    def of(cls, members: list[ShardedParam], starts_bytes: list[int]) -> SegmentGradients:
        """One for each segment."""
        indices = [member.index for member in members]
        return cls(members, starts_bytes, AddressTable(list(zip(indices, starts_bytes, strict=True))))

    def pointers(self, addresses: array[int] | None) -> tuple[array[int], list[Tensor]]:
        """Where each segment's gradient begins in this step, and the tensors that keep those alive that are copies."""
        store = self.members[0].bucket
        if addresses is not None and not store.separate_params and not store.param_dtype.is_complex:
            return self.picks.of(addresses), []
        flats = [_memory_of_gradient(member) for member in self.members]
        starts = zip(flats, self.starts_bytes, strict=True)
        return array("Q", [flat.data_ptr() + start for flat, start in starts]), flats


@dataclass(frozen=True, slots=True)
class KernelBatch:
    """One call of the C kernel: everything that steps in one bucket.

    ``sources`` is None where segments have gradients of their own (stage 2).
    """

    launch: cpu.Launch
    sources: SegmentGradients | None

    def run(self, step: StepContext) -> None:
        """Update the bucket's segments."""
        pointers, _flats = (None, None) if self.sources is None else self.sources.pointers(step.seen.addresses)
        scaling = step.pending if pointers is None else step.scaling
        self.launch.run(pointers, step.rows, *scaling.numbers())


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """One launch of the Triton kernel: everything that steps in one bucket."""

    launch: cuda.Launch
    sources: SegmentGradients | None
    group_index: int

    def run(self, step: StepContext) -> None:
        """Update the bucket's segments; does not wait for the device."""
        pointers, _flats = (None, None) if self.sources is None else self.sources.pointers(step.seen.addresses)
        scaling = step.pending if pointers is None else step.scaling
        unscale, clip = (
            None if factor is None else factor.to(self.launch.device).reshape(1)
            for factor in (scaling.unscale, scaling.clip)
        )
        self.launch.run(pointers, step.factors[self.group_index], unscale, clip, step.found_inf)


def _memory_of_gradient(member: ShardedParam) -> Tensor:
    """A tensor whose memory is the member's gradient, as 1-D reals in memory order: itself where it already lies so."""
    gradient = cast(Tensor, member.gradient)
    if gradient.stride() == member.strides and not gradient.is_complex() and not gradient.is_neg():
        return gradient
    return flattened(gradient, member.strides)


def kernel_dtypes(bucket: StateBuffer) -> KernelDtypes:
    """The dtypes of the bucket's arrays."""
    master = bucket.master is not None
    return KernelDtypes(bucket.dtype, bucket.gradient_dtype, bucket.average.dtype, master, bucket.seed is not None)


def has_kernel(bucket: StateBuffer) -> bool:
    """Whether the compiled kernel can update this bucket with torch's bits."""
    return (
        backend.of(bucket.device) is backend.C and cpu.why_unavailable() is None and cpu.supports(kernel_dtypes(bucket))
    )


def plan_kernel(
    bucket: StateBuffer,
    cohort_of: dict[int, Cohort],
    active: frozenset[int],
    hyper: StepHyperparameters,
    rows: dict[Cohort, int],
    streamed: bool,
) -> KernelBatch | DeviceBatch:
    """One kernel call for the bucket; ``rows`` has the line of each cohort's scalars."""
    reduced = bucket.reduced_gradient()
    apart = _needs_members_apart(bucket)
    segments: list[Segment] = []
    sources: list[ShardedParam] = []
    starts_bytes: list[int] = []
    for run in _runs(bucket, cohort_of, active, merge=True):
        row = rows[cohort_of[run[0].index]]
        # In one piece where that is one gradient.
        for members in [run] if reduced is not None and not apart else [[member] for member in run]:
            start, stop = members[0].fragment.start, members[-1].fragment.stop
            first, fragment = members[0], members[0].fragment
            gradient = None if reduced is None else reduced[start:stop]
            master = None if bucket.master is None else bucket.master[start:stop]
            lanes = (
                cpu.lanes(first.slot.numel, fragment.param_start, fragment.param_start + fragment.numel) if apart else 0
            )
            key = 0 if bucket.seed is None else rounding.parameter_key(bucket.seed, first.index)
            param, average = first.param_range(start, stop), bucket.average[start:stop]
            segments.append(Segment(param, average, master, gradient, row, first.rng_offset, key, lanes))
            sources.append(first)
            starts_bytes.append(fragment.param_start * bucket.dtype.itemsize)
    taken = SegmentGradients.of(sources, starts_bytes) if reduced is None and segments else None
    if hyper.device is None:
        return KernelBatch(
            cpu.Launch(segments, kernel_dtypes(bucket), hyper.maximize, hyper.weight_decay, streamed), taken
        )
    from .cuda import Launch  # triton is needed by who launches kernels, and only there

    launch = Launch(segments, kernel_dtypes(bucket), hyper.maximize, hyper.weight_decay, bucket.device)
    return DeviceBatch(launch, taken, bucket.group_index)


def tile_numel(device: torch.device) -> int:
    """Elements a tile may have on ``device``: a few arrays of them fit a CPU core's cache."""
    return TILE_NUMEL.get(device.type, ACCELERATOR_TILE_NUMEL)


def _needs_members_apart(bucket: StateBuffer) -> bool:
    # On CPUs torch rounds a 16-bit add(alpha=) otherwise in vector lanes than in the last odd elements of a
    # tensor. Its bits come back only where each parameter is a call of its own. And each has random numbers of its own.
    return bucket.seed is not None or (
        bucket.device.type == "cpu" and bucket.dtype.itemsize == 2 and not bucket.updates_in_float32
    )


def _is_narrow_scalar(member: ShardedParam) -> bool:
    # With a 0-dim eta torch promotes a 0-dim 16-bit parameter to float32, and no other shape.
    return member.param.dim() == 0 and member.dtype.itemsize == 2 and not member.bucket.updates_in_float32


def _runs(
    bucket: StateBuffer, cohort_of: dict[int, Cohort], active: frozenset[int], merge: bool
) -> Iterator[list[ShardedParam]]:
    """Neighbouring members that step together; a large one alone where its gradient is used in place."""
    run: list[ShardedParam] = []
    for member in bucket.members:
        if not member.fragment.numel:
            continue
        steps = member.index in active
        alone = (
            bucket.separate_params
            or _is_narrow_scalar(member)
            or (not merge and (_needs_members_apart(bucket) or member.fragment.numel >= DIRECT_NUMEL))
        )
        if run and (not steps or alone or cohort_of[member.index] is not cohort_of[run[-1].index]):
            yield run
            run = []
        if steps:
            run.append(member)
            if alone:
                yield run
                run = []
    if run:
        yield run


def plan_bucket(bucket: StateBuffer, cohort_of: dict[int, Cohort], active: frozenset[int]) -> list[Batch]:
    """The batches of one bucket."""
    tiles: dict[int, list[Tile]] = {}
    cohorts: dict[int, Cohort] = {}
    reduced = bucket.reduced_gradient()
    merge = reduced is not None and not _needs_members_apart(bucket)
    for run in _runs(bucket, cohort_of, active, merge):
        cohort = cohort_of[run[0].index]
        cohorts[id(cohort)] = cohort
        into = tiles.setdefault(id(cohort), [])
        first, last = run[0].fragment.start, run[-1].fragment.stop
        step = tile_numel(bucket.device)
        for start in range(first, last, step):
            into.append(_tile(bucket, run, start, min(start + step, last), reduced))
    return [Batch(cohorts[key], bucket.group_index, tuple(into)) for key, into in tiles.items()]


def _tile(bucket: StateBuffer, run: list[ShardedParam], start: int, stop: int, reduced: Tensor | None) -> Tile:
    shape = () if _is_narrow_scalar(run[0]) else (stop - start,)
    param, average = run[0].param_range(start, stop).view(shape), bucket.average[start:stop].view(shape)
    master = None if bucket.master is None else bucket.master[start:stop]
    rounds_by = None
    if bucket.seed is not None:
        place = run[0].rng_offset + start - run[0].fragment.start
        rounds_by = (rounding.parameter_key(bucket.seed, run[0].index), place)
    if reduced is not None:
        return Tile(param, average, reduced[start:stop].view(shape), master=master, rounds_by=rounds_by)
    sources: list[GradientRange] = []
    gaps: list[tuple[int, int]] = []
    filled = start
    for member in run:
        fragment = member.fragment
        low, high = max(fragment.start, start), min(fragment.stop, stop)
        if low >= high:
            continue
        if low > filled:
            gaps.append((filled - start, low - start))
        sources.append(GradientRange(member, fragment.param_start + low - fragment.start, low - start, high - low))
        filled = high
    if filled < stop:
        gaps.append((filled - start, stop - start))
    return Tile(param, average, None, tuple(sources), tuple(gaps), master, rounds_by)


class Updater:
    """Runs the rule over batches; keeps one scratch tile per device and dtype, and one more for widened parameters."""

    def __init__(self) -> None:
        self._scratch: dict[tuple[torch.device, torch.dtype, bool], Tensor] = {}

    def reserve(self, buckets: Sequence[StateBuffer]) -> None:
        """Make scratch for these buckets, once: nothing is allocated per step.

        Where a group may be updated by the Triton kernel, which needs none, it is made when it is first used.
        """
        for bucket in buckets:
            if backend.of(bucket.device) is backend.TRITON:
                continue
            numel = self.scratch_numel(bucket)
            dtypes = {bucket.dtype}
            if not has_kernel(bucket):
                dtypes |= {bucket.average.dtype, bucket.gradient_dtype}
                if bucket.updates_in_float32:
                    dtypes.add(torch.float32)
                    self._reserve((bucket.device, torch.float32, True), numel)
            for dtype in dtypes:
                self._reserve((bucket.device, dtype, False), numel)

    def _reserve(self, key: tuple[torch.device, torch.dtype, bool], numel: int) -> Tensor:
        if key not in self._scratch or self._scratch[key].numel() < numel:
            self._scratch[key] = torch.empty(numel, dtype=key[1], device=key[0])
        return self._scratch[key]

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch kept between steps."""
        return sum(scratch.nbytes for scratch in self._scratch.values())

    def scratch_numel(self, bucket: StateBuffer) -> int:
        """The longest tile of ``bucket`` that there is scratch for."""
        return min(tile_numel(bucket.device), bucket.layout.shard_numel)

    def scratch(self, like: Tensor, dtype: torch.dtype | None = None, widened: bool = False) -> Tensor:
        """Scratch for a tile of ``like``'s device, shape and dtype, or another dtype."""
        key = (like.device, dtype or like.dtype, widened)
        return self._reserve(key, like.numel())[: like.numel()].view(like.shape)

    def run(self, batch: Batch, hyper: StepHyperparameters, scaling: Scaling) -> None:
        """Update every tile of ``batch``, with gradients multiplied by ``scaling``."""
        if not batch.tiles:
            return
        implementation = foreach if hyper.implementation is Implementation.FOREACH else reference
        eta, mu = batch.cohort.eta, batch.cohort.mu
        device = batch.tiles[0].param.device
        if hyper.implementation is Implementation.FOREACH and device.type != "cpu":
            # Filled on the device from host values: a launch, not a synchronisation.
            eta = torch.full((), eta.item(), dtype=eta.dtype, device=device)
            mu = torch.full((), mu.item(), dtype=mu.dtype, device=device)
        factors = [factor.to(device) for factor in scaling]
        for tile in batch.tiles:
            narrow = tile.master is None and tile.rounds_by is None
            param = tile.param if narrow else self._widened(tile)
            scratch, difference = self.scratch(param), self.scratch(tile.average)
            implementation.descend(param, self._gradient(tile, scratch, factors), eta, hyper, scratch)
            if tile.rounds_by is not None:
                key, first = tile.rounds_by
                step = int(batch.cohort.step.item()) + 1
                random = rounding.random_16(key, step, first, param.numel(), device)
                rounding.round_stochastically(param, tile.param, random)
                param.copy_(tile.param)
            implementation.take_average(param, tile.average, mu, difference)
            if tile.master is not None:
                masters.write(param, tile.param, tile.master)

    def _widened(self, tile: Tile) -> Tensor:
        """The tile's parameters, or their masters, in float32 scratch."""
        out = self.scratch(tile.param, torch.float32, widened=True)
        return out.copy_(tile.param) if tile.master is None else masters.read(tile.param, tile.master, out)

    def _gradient(self, tile: Tile, scratch: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """The tile's gradient in the dtype of ``scratch``, scaled; in ``scratch``, or a view where it lies so."""
        gradient = tile.gradient if tile.gradient is not None else _collected(tile, self.scratch(tile.param))
        if gradient.dtype.itemsize < scratch.dtype.itemsize:
            gradient = scratch.copy_(gradient)
        for factor in factors:
            gradient = torch.mul(gradient, factor, out=self.scratch(gradient))
        return gradient if gradient.dtype == scratch.dtype else scratch.copy_(gradient)


def _flat_gradient(source: GradientRange) -> Tensor:
    flat = flattened(cast(Tensor, source.member.gradient), source.member.strides)
    return flat[source.start : source.start + source.numel]


def _target(source: GradientRange, scratch: Tensor) -> Tensor:
    """Where a source goes: shaped as its parameter if it is all of it, so that the gradient is copied as it is."""
    target = scratch[source.at : source.at + source.numel]
    if not source.is_whole:
        return target
    member = source.member
    if member.dtype.is_complex:
        target = torch.view_as_complex(target.view(-1, 2))
    return target.as_strided(member.param.shape, member.strides)


def _collected(tile: Tile, scratch: Tensor) -> Tensor:
    """The tile's gradient: a view where it lies in one piece, else gathered in ``scratch``."""
    if len(tile.sources) == 1 and not tile.gaps:
        return _flat_gradient(tile.sources[0]).view(scratch.shape)
    if not tile.targets or tile.targets[0][0] is not scratch._base:
        tile.targets[:] = [(scratch._base, [_target(source, scratch) for source in tile.sources])]
    sources = [cast(Tensor, s.member.gradient) if s.is_whole else _flat_gradient(s) for s in tile.sources]
    torch._foreach_copy_(tile.targets[0][1], sources)
    if tile.gaps:
        torch._foreach_zero_([scratch[low:high] for low, high in tile.gaps])
    return scratch
