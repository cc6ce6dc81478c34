"""The averages of ``ShardedAverage``: parameters are read where they lie, and nothing but the averages is written.

For one update, with the iterate x, its number n and its weight w (weights.py; torch/optim/swa_utils.py):

    LERP  ax <- lerp(ax, x, w)                   as get_ema_multi_avg_fn and get_swa_multi_avg_fn
    MEAN  ax <- decay * ax + (1 - decay) * x     exponential means, as get_ema_avg_fn
          ax <- ax + (x - ax) / n                the uniform mean, as get_swa_avg_fn
          ax <- ax + (x - ax) * w                others

The bits are those of the functions named here on the same device; the first iterate is copied. LERP moves three words
an element: it reads x and ax, and writes ax. Parameters narrower than their averages are widened tile by tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..storage.buffers import ShardedParam, StateBuffer
from .batch import Batch, StepContext
from .operators import Updater, tile_numel
from .schedule import Cohort, Implementation
from .weights import AverageRule, ExponentialMean, UniformMean


@dataclass(frozen=True, slots=True)
class MeanBatch(Batch):
    """The fragments of one cohort in one state buffer: ``averages[i]`` is the average of ``params[i]``, both 1-D."""

    cohort: Cohort
    group_index: int
    params: list[Tensor]
    averages: list[Tensor]

    def run(self, step: StepContext) -> None:
        hyper = step.hypers[self.group_index]
        rule, number = hyper.average.rule, self.cohort.step.item() + 1
        if rule is None or not hyper.average.counts(number, hyper.t0):
            return
        n = hyper.average.num_iterates(number, hyper.t0)
        if n == 1:
            torch._foreach_copy_(self.averages, self.params)
        elif hyper.implementation is Implementation.MEAN:
            for x, ax in _tiles(self, step.updater):
                take_mean(x, ax, n, rule)
        elif self.params[0].dtype == self.averages[0].dtype:
            torch._foreach_lerp_(self.averages, self.params, rule.weight(n))
        else:
            weight = rule.weight(n)
            for x, ax in _tiles(self, step.updater):
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


def _tiles(batch: MeanBatch, updater: Updater) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (parameters, averages) of each tile; parameters in the averages' dtype, in scratch if theirs is another."""
    for param, average in zip(batch.params, batch.averages, strict=True):
        numel = tile_numel(average.device)
        for start in range(0, average.numel(), numel):
            x, ax = param[start : start + numel], average[start : start + numel]
            yield x if x.dtype == ax.dtype else updater.scratch(ax).copy_(x), ax


def mean_batches(buffer: StateBuffer, cohort_of: dict[int, Cohort], active: frozenset[int]) -> list[MeanBatch]:
    """Return one batch for each cohort of the ``active`` parameters in ``buffer``."""
    by_cohort: dict[Cohort, tuple[list[Tensor], list[Tensor]]] = {}
    for member in buffer.members:
        if member.index in active and member.fragment.numel:
            params, averages = by_cohort.setdefault(cohort_of[member.index], ([], []))
            params.append(_param_of(member))
            averages.append(member.average)
    return [MeanBatch(cohort, buffer.group_index, params, averages) for cohort, (params, averages) in by_cohort.items()]


def _param_of(member: ShardedParam) -> Tensor:
    reals = member.param_range(member.fragment.start, member.fragment.stop)
    return torch.view_as_complex(reals.view(-1, 2)) if member.dtype.is_complex else reals
