"""A batch: what one implementation updates of one state buffer in one go; and what all batches need to know of a step.

``plan.py`` makes the batches; ``operators.py``, ``cpu.py`` and ``cuda.py`` each have one kind of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..labels import Label, labelled
from ..storage.snapshots import GradientTable
from .schedule import StepHyperparameters
from .segments import Scaling

if TYPE_CHECKING:
    from .operators import Updater


@dataclass(frozen=True, slots=True)
class StepContext:
    """The inputs of one step that its batches share; ``step()`` makes it anew each time.

    updater         the scratch memory of the implementations in torch operators
    hypers          the hyperparameters of each group
    rows            ``Cohorts.scalars``: (c, -eta, mu, t) of every cohort, zeros if its scalars are on a device
    factors         ``ScalarTable.factors``, (capacity, 4) float64, by group; only of groups that have such a table
    reduced_scaling the factors of gradients that the optimizer reduced itself and has not multiplied yet
    param_scaling   the factors of gradients that are in ``p.grad``
    gradients       the gradients of parameters in buckets (stage 1), by parameter index
    found_inf       (1,) float32 on the device; nothing is updated if it is nonzero. None if the host has decided
    """

    updater: Updater
    hypers: Sequence[StepHyperparameters]
    rows: array[float]
    factors: dict[int, Tensor]
    reduced_scaling: Scaling
    param_scaling: Scaling
    gradients: GradientTable
    found_inf: Tensor | None


class Batch(ABC):
    """Parameters of one state buffer that are updated together."""

    @abstractmethod
    def run(self, step: StepContext) -> None:
        """Update the batch's parameters, averages and masters; ``step()`` calls it once the gradients are reduced."""


@labelled(Label.UPDATE)
def run_batches(batches: Sequence[Batch], step: StepContext) -> None:
    """Update one state buffer: run all of its ``batches``."""
    for batch in batches:
        batch.run(step)
