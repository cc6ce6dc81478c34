"""Planning: which runs of which shards a step updates, in batches that are kept until the step's parameters change.

``ParamShards`` has one ``Plans``, which calls ``plan_batches`` for a state buffer that is not planned yet.

run  neighbouring parameters of one state buffer whose elements can be updated together: one cohort, all stepping
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ..storage.buffers import ShardedParam, StateBuffer
from . import cpu, rounding
from .batch import Batch
from .means import mean_batches
from .operators import GradientRange, OperatorBatch, Tile, tile_numel
from .schedule import Cohort, Cohorts, Implementation, StepHyperparameters
from .segments import KernelDtypes, Segment, SegmentGradients
from .stand import COUNTING, Known, Stand

# A longer fragment is a tile of its own, which reads its gradient in place; a shorter one is copied to the tile's
# scratch, which is cheaper than a set of operators of its own.
DIRECT_NUMEL = 1 << 15

CohortOf = dict[int, Cohort]
Plan = list[tuple[StateBuffer, Sequence[Batch]]]


class Plans:
    """The plans of one optimizer: each is kept as long as the same parameters step in the same implementation."""

    def __init__(self, cohorts: Cohorts) -> None:
        self._cohorts = cohorts
        # Each with what it was made for; those of single state buffers by their ids.
        self._of_step: tuple[object, Plan] | None = None
        self._of_buffer: dict[int, tuple[object, Sequence[Batch]]] = {}
        # What decides on averages, with the parameters that step: for all state buffers, and for single ones.
        self._stands: tuple[frozenset[int], list[Stand]] | None = None
        self._stand_of: dict[int, tuple[frozenset[int], Stand]] = {}

    def forget(self) -> None:
        """Forget all plans: scalars, averages or local tensors have become others, or have moved."""
        self._of_step = self._stands = None
        self._of_buffer.clear()
        self._stand_of.clear()

    def decide_writes(
        self, buffers: Sequence[StateBuffer], active: frozenset[int], hypers: Sequence[StepHyperparameters]
    ) -> None:
        """Decide which averages a step of the ``active`` parameters writes; those may move, which makes plans void.

        Called before the scalars of the step advance, and before it is planned.
        """
        if self._stands is None or self._stands[0] != active:
            stands = [Stand.of(buffer, self._cohorts.by_index, active) for buffer in buffers]
            self._stands = (active, [stand for stand in stands if stand.cohorts])
        known: Known = {}
        for stand in self._stands[1]:
            stand.decide(hypers[stand.buffer.group_index], known)

    def of_step(
        self, buffers: Sequence[StateBuffer], active: frozenset[int], hypers: Sequence[StepHyperparameters]
    ) -> Plan:
        """Those of ``buffers``, which are all, that have an ``active`` parameter, and the batches that update them."""
        key = (active, [_planned(hyper) for hyper in hypers])
        if self._of_step is None or self._of_step[0] != key:
            plan = [
                (buffer, self._batches(buffer, buffers, active, hypers))
                for buffer in buffers
                if any(member.index in active for member in buffer.members)
            ]
            self._of_step = (key, plan)
        return self._of_step[1]

    def of_buffer(
        self,
        buffer: StateBuffer,
        buffers: Sequence[StateBuffer],
        active: frozenset[int],
        hypers: Sequence[StepHyperparameters],
    ) -> Sequence[Batch]:
        """The batches that update the ``active`` parameters of ``buffer`` from where its gradient shard lies now."""
        decides = self._stand_of.get(id(buffer))
        if decides is None or decides[0] != active:
            decides = self._stand_of[id(buffer)] = (active, Stand.of(buffer, self._cohorts.by_index, active))
        decides[1].decide(hypers[buffer.group_index], {})
        gradient = buffer.reduced_gradient()
        place = None if gradient is None else gradient.data_ptr()
        key = (active, _planned(hypers[buffer.group_index]), place)
        known = self._of_buffer.get(id(buffer))
        if known is None or known[0] != key:
            known = self._of_buffer[id(buffer)] = (key, self._batches(buffer, buffers, active, hypers))
        return known[1]

    def _batches(
        self,
        buffer: StateBuffer,
        buffers: Sequence[StateBuffer],
        active: frozenset[int],
        hypers: Sequence[StepHyperparameters],
    ) -> Sequence[Batch]:
        average_bytes = sum(other.average.nbytes for other in buffers)
        return plan_batches(buffer, self._cohorts, active, hypers[buffer.group_index], average_bytes)


def _planned(hyper: StepHyperparameters) -> tuple[object, ...]:
    """The hyperparameters that a plan is made for."""
    return hyper.implementation, hyper.device, hyper.maximize, hyper.weight_decay


def plan_batches(
    buffer: StateBuffer, cohorts: Cohorts, active: frozenset[int], hyper: StepHyperparameters, average_bytes: int
) -> Sequence[Batch]:
    """The batches that update the parameters ``active`` of ``buffer``.

    ``average_bytes`` is the size of all averages that this rank updates in a step, in all state buffers.
    """
    if hyper.implementation in COUNTING:
        # Without memory there is nothing to update before the first iterate, for which plans are made anew.
        if not buffer.average_has_address:
            return []
        return mean_batches(buffer, cohorts.by_index, active, hyper.implementation)
    if hyper.device is not None:
        return [_device_batch(buffer, cohorts, active, hyper)]
    if hyper.implementation is Implementation.FUSED:
        unavailable = cpu.why_unavailable()
        if unavailable is not None:
            cpu.log_fallback(unavailable)
        elif cpu.can_update(buffer):
            return [_cpu_batch(buffer, cohorts, active, hyper, average_bytes > cpu.STREAMED_BYTES)]
    return _operator_batches(buffer, cohorts.by_index, active)


def _cpu_batch(
    buffer: StateBuffer, cohorts: Cohorts, active: frozenset[int], hyper: StepHyperparameters, streamed: bool
) -> Batch:
    segments, gradients = _segments(buffer, cohorts.by_index, active, cohorts.host_rows())
    launch = cpu.Launch(segments, KernelDtypes.of(buffer), hyper.maximize, hyper.weight_decay, streamed)
    return cpu.KernelBatch(launch, gradients, buffer)


def _device_batch(buffer: StateBuffer, cohorts: Cohorts, active: frozenset[int], hyper: StepHyperparameters) -> Batch:
    from . import cuda  # needs triton, which is installed only if there is a device to launch kernels on

    segments, gradients = _segments(buffer, cohorts.by_index, active, cohorts.device_rows())
    launch = cuda.Launch(segments, KernelDtypes.of(buffer), hyper.maximize, hyper.weight_decay, buffer.device)
    return cuda.KernelBatch(launch, gradients, buffer)


def _segments(
    buffer: StateBuffer, cohort_of: CohortOf, active: frozenset[int], rows: dict[Cohort, int]
) -> tuple[list[Segment], SegmentGradients | None]:
    """The segments of one kernel call, and where their gradients are; None if the segments have gradients."""
    reduced = buffer.reduced_gradient()
    apart = _needs_members_apart(buffer)
    segments: list[Segment] = []
    sources: list[ShardedParam] = []
    starts_bytes: list[int] = []
    for run in _runs(buffer, cohort_of, active, merge=True):
        row = rows[cohort_of[run[0].index]]
        # A reduced gradient is one array for the whole run; otherwise each parameter has its own.
        for members in [run] if reduced is not None and not apart else [[member] for member in run]:
            start, stop = members[0].fragment.start, members[-1].fragment.stop
            first, fragment = members[0], members[0].fragment
            gradient = None if reduced is None else reduced[start:stop]
            master = None if buffer.master is None else buffer.master[start:stop]
            param_stop = fragment.param_start + fragment.numel
            lanes = cpu.lanes(first.slot.numel, fragment.param_start, param_stop) if apart else 0
            key = 0 if buffer.seed is None else rounding.parameter_key(buffer.seed, first.index)
            param = first.param_range(start, stop)
            average = buffer.average[start:stop] if buffer.average_has_address else None
            segments.append(Segment(param, average, master, gradient, row, first.rng_offset, key, lanes))
            sources.append(first)
            starts_bytes.append(fragment.param_start * buffer.dtype.itemsize)
    return segments, SegmentGradients(sources, starts_bytes) if reduced is None and segments else None


def _needs_members_apart(buffer: StateBuffer) -> bool:
    # On CPUs torch rounds a 16-bit add(alpha=) otherwise in vector lanes than in the last odd elements of a
    # tensor, so its bits come back only if each parameter is a call of its own. With stochastic rounding each
    # parameter has its own random numbers.
    return buffer.seed is not None or (
        buffer.device.type == "cpu" and buffer.dtype.itemsize == 2 and not buffer.updates_in_float32
    )


def _is_narrow_scalar(member: ShardedParam) -> bool:
    # With a 0-dim eta torch promotes a 0-dim 16-bit parameter to float32, and no other shape.
    return member.param.dim() == 0 and member.dtype.itemsize == 2 and not member.bucket.updates_in_float32


def _runs(
    buffer: StateBuffer, cohort_of: CohortOf, active: frozenset[int], merge: bool
) -> Iterator[list[ShardedParam]]:
    """The runs of a state buffer; without ``merge`` long fragments are runs of their own, see ``DIRECT_NUMEL``."""
    run: list[ShardedParam] = []
    for member in buffer.members:
        if not member.fragment.numel:
            continue
        steps = member.index in active
        alone = (
            buffer.separate_params
            or _is_narrow_scalar(member)
            or (not merge and (_needs_members_apart(buffer) or member.fragment.numel >= DIRECT_NUMEL))
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


def _operator_batches(buffer: StateBuffer, cohort_of: CohortOf, active: frozenset[int]) -> list[OperatorBatch]:
    """One batch for each cohort of the buffer that steps."""
    tiles: dict[Cohort, list[Tile]] = {}
    reduced = buffer.reduced_gradient()
    merge = reduced is not None and not _needs_members_apart(buffer)
    step = tile_numel(buffer.device)
    for run in _runs(buffer, cohort_of, active, merge):
        tiles_of_cohort = tiles.setdefault(cohort_of[run[0].index], [])
        run_start, run_stop = run[0].fragment.start, run[-1].fragment.stop
        for start in range(run_start, run_stop, step):
            tiles_of_cohort.append(_tile(buffer, run, start, min(start + step, run_stop), reduced))
    return [OperatorBatch(buffer, cohort, buffer.group_index, tuple(of)) for cohort, of in tiles.items()]


def _tile(buffer: StateBuffer, run: list[ShardedParam], start: int, stop: int, reduced: Tensor | None) -> Tile:
    """The tile of elements ``start`` to ``stop`` of the buffer's shard, which belong to ``run``."""
    shape = () if _is_narrow_scalar(run[0]) else (stop - start,)
    param, average = run[0].param_range(start, stop).view(shape), buffer.average[start:stop].view(shape)
    master = None if buffer.master is None else buffer.master[start:stop]
    rounds_by = None
    if buffer.seed is not None:
        offset = run[0].rng_offset + start - run[0].fragment.start
        rounds_by = (rounding.parameter_key(buffer.seed, run[0].index), offset)
    if reduced is not None:
        return Tile(param, average, reduced[start:stop].view(shape), master=master, rounds_by=rounds_by)
    ranges: list[GradientRange] = []
    gaps: list[tuple[int, int]] = []
    filled = start
    for member in run:
        fragment = member.fragment
        low, high = max(fragment.start, start), min(fragment.stop, stop)
        if low >= high:
            continue
        if low > filled:
            gaps.append((filled - start, low - start))
        ranges.append(GradientRange(member, fragment.param_start + low - fragment.start, low - start, high - low))
        filled = high
    if filled < stop:
        gaps.append((filled - start, stop - start))
    return Tile(param, average, None, tuple(ranges), tuple(gaps), master, rounds_by)
