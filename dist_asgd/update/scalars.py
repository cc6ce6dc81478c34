"""``step``, ``eta`` and ``mu`` of one parameter group on its device, and advanced there: no step waits for them.

row  the scalars of one cohort, and what they are advanced with
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .schedule import Cohort, StepHyperparameters


class ScalarTable:
    """Rows of all cohorts of a group that have stepped; ``capacity`` is how many there can be: one a parameter.

    ``factors`` is ``(capacity, 4)`` float64, what the kernels of this step update with: 1 - lambd * eta, -eta, mu, t.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._device = device
        self._scalars = torch.zeros(capacity, 3, dtype=torch.float64, device=device)
        self._hyper = torch.zeros(capacity, 6, dtype=torch.float64, device=device)
        self.factors = torch.zeros(capacity, 4, dtype=torch.float64, device=device)
        self._cohorts: list[Cohort] = []
        self._uploaded: list[list[float]] = []

    def adopt(self, cohort: Cohort) -> None:
        """Move the scalars of ``cohort`` here; from now on they are views of its row, in float64."""
        row = len(self._cohorts)
        self._cohorts.append(cohort)
        cohort.initial = cohort.initial or cohort.fresh
        scalars = [scalar.to(self._device, torch.float64) for scalar in (cohort.step, cohort.eta, cohort.mu)]
        self._scalars[row].copy_(torch.stack(scalars))
        cohort.step, cohort.eta, cohort.mu = self._scalars[row].unbind()
        cohort.row = row
        cohort.fresh = False

    def advance(self, hyper: StepHyperparameters, active: frozenset[int], found_inf: Tensor | None) -> None:
        """Write ``factors`` for this step, and the scalars of the next; one launch, no synchronisation.

        ``active``: the parameters that step. ``found_inf`` ``(1,)`` float32 on the device, nonzero: nothing changes.
        """
        from .cuda import advance  # triton is needed by who launches kernels, and only there

        lr = hyper.lr
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
        value = 0.0 if on_device else float(lr)
        rows = [
            [value, hyper.lambd, hyper.alpha, hyper.t0, bool(cohort.indices & active), cohort.initial]
            for cohort in self._cohorts
        ]
        if rows != self._uploaded:
            self._upload(rows)
        num_rows = len(rows)
        if isinstance(lr, Tensor) and on_device:
            self._hyper[:num_rows, 0].copy_(lr)
        advance(self._scalars[:num_rows], self._hyper[:num_rows], self.factors[:num_rows], found_inf)

    def _upload(self, rows: Sequence[Sequence[float]]) -> None:
        pinned = self._device.type == "cuda"
        if pinned and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "dist_asgd: hyperparameters, or which parameters have gradients, changed since the last step and "
                "cannot be uploaded while a CUDA graph is captured. Take one step as it will be captured before the "
                "capture; an lr that is to change between replays must be a CUDA tensor."
            )
        host = torch.tensor(rows, dtype=torch.float64, device="cpu", pin_memory=pinned)
        self._hyper[: len(rows)].copy_(host, non_blocking=True)
        self._uploaded = [list(row) for row in rows]
