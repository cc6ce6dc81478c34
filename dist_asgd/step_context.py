"""The beginning of an update in ``step()``: everything that its batches read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .gradients.base import Gradients
from .gradients.loss_scaling import ScalerInfo, factors_of_step
from .state import ParamShards
from .update.batch import StepContext
from .update.operators import Updater
from .update.schedule import step_hyperparameters


def check_capture(groups: Sequence[dict[str, Any]]) -> None:
    """Raise RuntimeError if a CUDA graph is being captured that would repeat one step's host scalars for ever."""
    if not torch.cuda.is_current_stream_capturing():
        return
    for index, group in enumerate(groups):
        if not group["capturable"]:
            raise RuntimeError(
                f"dist_asgd: step() in a CUDA graph, but param_groups[{index}] has capturable=False. Pass "
                f"capturable=True and fused=True to the constructor."
            )


def begin_update(
    shards: ParamShards,
    gradients: Gradients,
    updater: Updater,
    groups: list[dict[str, Any]],
    active: frozenset[int],
    scaler: ScalerInfo | None,
) -> StepContext | None:
    """Begin the update of the ``active`` parameters; None if gradients overflowed and no rank steps. Collective.

    ``groups`` are the parameter groups of the optimizer, and ``scaler`` is what a gradient scaler has handed to it.
    """
    hypers = step_hyperparameters(groups, shards.leads)
    factors = factors_of_step(scaler, gradients.scaling, hypers, gradients.communicators)
    if factors is None:
        return None
    pending, others, found_inf = factors
    shards.begin_update(active, hypers)
    rows, scalars = shards.cohorts.scalars(active, hypers, found_inf)
    return StepContext(updater, hypers, rows, scalars, pending, others, gradients.table, found_inf)
