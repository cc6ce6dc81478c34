"""The averages of ``ShardedAverage``: parameters are read where they lie, and nothing but the averages is written.

For one update, with the iterate x, its number n and its weight w (weights.py; torch/optim/swa_utils.py):

    LERP  ax <- lerp(ax, x, w)                   as get_ema_multi_avg_fn and get_swa_multi_avg_fn
    MEAN  ax <- decay * ax + (1 - decay) * x     exponential means, as get_ema_avg_fn
          ax <- ax + (x - ax) / n                the uniform mean, as get_swa_avg_fn
          ax <- ax + (x - ax) * w                others

The bits are those of the functions named here on the same device; the first iterate is copied. LERP moves three words
an element: it reads x and ax, and writes ax; on CPUs the compiled kernel takes all parameters of a batch in one call.
Elsewhere parameters narrower than their averages are widened tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..storage.buffers import ShardedParam, StateBuffer
from .batch import Batch, StepContext
from .cpu import Means
from .offload import HostTile, host_tiles, param_part
from .operators import tile_numel
from .schedule import Cohort, Implementation, StepHyperparameters
from .weights import AverageRule, ExponentialMean, UniformMean

# With a weight that float32 rounds to 1, torch's operators give zeros other signs in the last elements of a tensor.
LARGEST_WEIGHT = 1 - 2**-24


@dataclass(frozen=True, slots=True)
class MeanBatch(Batch):
    """The fragments of one cohort in one state buffer: ``averages[i]`` is the average of ``params[i]``, both 1-D.

    ``kernel`` takes all of them at once by LERP; None where torch's operators do.
    """

    cohort: Cohort
    group_index: int
    params: list[Tensor]
    averages: list[Tensor]
    kernel: Means | None

    def run(self, step: StepContext) -> None:
        hyper = step.hypers[self.group_index]
        n = _iterate(self.cohort, hyper)
        if n is None:
            return
        rule = hyper.average.rule
        weight = 1.0 if n == 1 or rule is None or self.kernel is None else rule.weight(n)
        if self.kernel is not None and weight <= LARGEST_WEIGHT:
            self.kernel.run(weight)
        else:
            take_iterate(n, hyper, self.params, self.averages, step.updater.scratch)


@dataclass(frozen=True, slots=True)
class HostMeanBatch(Batch):
    """The fragments of one cohort in one state ``buffer`` whose averages lie in host memory."""

    cohort: Cohort
    buffer: StateBuffer
    members: list[ShardedParam]
    tiles: list[HostTile]

    def run(self, step: StepContext) -> None:
        hyper = step.hypers[self.buffer.group_index]
        n = _iterate(self.cohort, hyper)
        if n is not None:
            take = partial(take_iterate, n, hyper)
            step.updater.offload(self.buffer.device).update(self.buffer, self.members, self.tiles, take)


def _iterate(cohort: Cohort, hyper: StepHyperparameters) -> int | None:
    """The number of the iterate that this update takes into the averages of ``cohort``; None if it does not count."""
    number = cohort.step.item() + 1
    if hyper.average.rule is None or not hyper.average.counts(number, hyper.t0):
        return None
    return hyper.average.num_iterates(number, hyper.t0)


def take_iterate(
    n: int,
    hyper: StepHyperparameters,
    params: list[Tensor],
    averages: list[Tensor],
    scratch: Callable[[Tensor], Tensor],
) -> None:
    """Take iterate ``n``, ``params``, into ``averages``, in place, by the rule and in the form of ``hyper``.

    ``scratch`` makes memory like a tensor, for parameters that are narrower than their averages.
    """
    rule = hyper.average.rule
    assert rule is not None
    if n == 1:
        torch._foreach_copy_(averages, params)
    elif hyper.implementation is Implementation.MEAN:
        for x, ax in _tiles(params, averages, scratch):
            take_mean(x, ax, n, rule)
    elif params[0].dtype == averages[0].dtype:
        torch._foreach_lerp_(averages, params, rule.weight(n))
    else:
        weight = rule.weight(n)
        for x, ax in _tiles(params, averages, scratch):
            ax.lerp_(x, weight)


def take_mean(x: Tensor, ax: Tensor, n: int, rule: AverageRule) -> None:
    """Take iterate ``n`` >= 2, ``x``, into its average ``ax``, in place; both have one shape, dtype and device.

    It is the readable reference of the rule, and the implementation MEAN.
    """
    if isinstance(rule, ExponentialMean):
        decay = rule.decay_of(n)
        ax.copy_(decay * ax + (1 - decay) * x)
    elif isinstance(rule, UniformMean):
        ax.copy_(ax + (x - ax) / n)
    else:
        ax.copy_(ax + (x - ax) * rule.weight(n))


def _tiles(
    params: list[Tensor], averages: list[Tensor], scratch: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (parameters, averages) of each tile; parameters in the averages' dtype, in scratch if theirs is another."""
    for param, average in zip(params, averages, strict=True):
        numel = tile_numel(average.device)
        for start in range(0, average.numel(), numel):
            x, ax = param[start : start + numel], average[start : start + numel]
            yield x if x.dtype == ax.dtype else scratch(ax).copy_(x), ax


def mean_batches(
    buffer: StateBuffer, cohort_of: dict[int, Cohort], active: frozenset[int], implementation: Implementation
) -> list[Batch]:
    """Return one batch for each cohort of the ``active`` parameters in ``buffer``."""
    by_cohort: dict[Cohort, list[ShardedParam]] = {}
    for member in buffer.members:
        if member.index in active:
            by_cohort.setdefault(cohort_of[member.index], []).append(member)
    if buffer.is_offloaded:
        return [HostMeanBatch(cohort, buffer, of, host_tiles(buffer, of)) for cohort, of in by_cohort.items()]
    by_kernel = implementation is Implementation.LERP and Means.can_take(buffer.param_dtype, buffer.average)
    batches: list[Batch] = []
    for cohort, of in by_cohort.items():
        held = [member for member in of if member.fragment.numel]
        if held:
            params = [param_part(member, member.fragment.start, member.fragment.stop) for member in held]
            averages = [member.average for member in held]
            kernel = Means(params, averages) if by_kernel else None
            batches.append(MeanBatch(cohort, buffer.group_index, params, averages, kernel))
    return batches
