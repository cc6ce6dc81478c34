"""``step``, ``eta`` and ``mu`` of one parameter group on its device, advanced there: no step waits for them.

``Cohorts`` has one table for each group that the Triton kernels update.

row  one line of the table: the scalars of one cohort, and the hyperparameters they are advanced with
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .addresses import to_device

if TYPE_CHECKING:
    from .schedule import Cohort, StepHyperparameters


@dataclass(slots=True)
class HostBound:
    """What the host knows of the scalars of a cohort, of which it reads none while a device advances them.

    most_steps  the most steps that the parameters can have taken: the device may have skipped some of them
    mu_is_one   whether mu is 1; False if the host does not know
    is_shown    whether somebody may have the tensors, and write them
    """

    most_steps: float
    mu_is_one: bool
    is_shown: bool = False

    def only_copies(self, hyper: StepHyperparameters) -> bool:
        """See ``Cohort``."""
        known = self.mu_is_one and not self.is_shown and not hyper.capturable
        return known and hyper.average.next_mu(self.most_steps + 1, hyper.t0) == 1

    def advance(self, hyper: StepHyperparameters, may_skip: bool) -> None:
        """Note a step, which the device skips perhaps: then mu stays what it was."""
        self.most_steps = math.inf if hyper.capturable else self.most_steps + 1
        becomes_one = hyper.average.next_mu(self.most_steps, hyper.t0) == 1
        self.mu_is_one = becomes_one and (self.mu_is_one or not may_skip)


class ScalarTable:
    """The rows of all cohorts of a group that have stepped. ``capacity`` is the number of the group's parameters.

    ``factors`` is ``(capacity, 4)`` float64: (c, -eta, mu, t) of each row for the step that ``advance`` was called in,
    with c = 1 - lambd * eta.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._device = device
        self._scalars = torch.zeros(capacity, 3, dtype=torch.float64, device=device)
        self._hyper = torch.zeros(capacity, 6, dtype=torch.float64, device=device)
        self.factors = torch.zeros(capacity, 4, dtype=torch.float64, device=device)
        self._cohorts: list[Cohort] = []
        # The scalars of each row once more, as views that nobody else has.
        self._homes: list[tuple[Tensor, ...]] = []
        self._uploaded: list[list[float]] = []

    def adopt(self, cohort: Cohort) -> None:
        """Move the scalars of ``cohort`` to a row of the table; from now on they are views of it, in float64.

        Called by ``Cohorts`` before the cohort's first step on the device. Cohorts keep their row if they move to the
        host and back: there are at most as many as parameters, since each split makes one smaller.
        """
        row = next((row for row, known in enumerate(self._cohorts) if known is cohort), len(self._cohorts))
        if row == len(self._cohorts):
            self._cohorts.append(cohort)
        cohort.initial = cohort.initial or cohort.fresh
        # They are on the host before the first step, and on the device if the cohort was split off another one.
        if cohort.bound is None:
            cohort.bound = HostBound(cohort.step.item(), cohort.mu.item() == 1)
        scalars = torch.stack([scalar.double() for scalar in (cohort.step, cohort.eta, cohort.mu)])
        self._scalars[row].copy_(to_device(scalars, self._device) if scalars.is_cpu else scalars)
        cohort.step, cohort.eta, cohort.mu = self._scalars[row].unbind()
        cohort.row = row
        cohort.fresh = False
        self._homes[row:] = [self._scalars[row].unbind(), *self._homes[row + 1 :]]

    @torch.no_grad()
    def follow(self, cohort: Cohort) -> bool:
        """Copy scalars that a user has moved (``eta.data = ...``) to the row, and make them show it again.

        False, and nothing is copied, if one has another shape, dtype or device than the row.
        """
        assert cohort.row is not None
        pairs = list(zip((cohort.step, cohort.eta, cohort.mu), self._homes[cohort.row], strict=True))
        if all(shown.data_ptr() == home.data_ptr() for shown, home in pairs):
            return True
        if any((s.shape, s.dtype, s.device) != (home.shape, home.dtype, home.device) for s, home in pairs):
            return False
        for shown, home in pairs:
            if shown.data_ptr() != home.data_ptr():
                home.copy_(shown)
                shown.data = home
        return True

    def advance(self, hyper: StepHyperparameters, active: frozenset[int], found_inf: Tensor | None) -> None:
        """Write ``factors`` for this step and the scalars of the next: one launch, without waiting for the device.

        ``active`` are the parameters that step. Nothing changes if ``found_inf``, ``(1,)`` float32 on the device, is
        nonzero. RuntimeError if a CUDA graph is captured and the rows would have to be uploaded.
        """
        from .cuda import advance  # needs triton, which is installed only if there is a device to launch kernels on

        lr = hyper.lr
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
        value = 0.0 if on_device else float(lr)
        rows = [
            [value, hyper.lambd, hyper.alpha, hyper.t0, bool(cohort.indices & active), cohort.initial]
            for cohort in self._cohorts
        ]
        # In most steps nothing has changed, and the device has the rows already.
        if rows != self._uploaded:
            self._upload(rows)
        num_rows = len(rows)
        if isinstance(lr, Tensor) and on_device:
            self._hyper[:num_rows, 0].copy_(lr)
        advance(self._scalars[:num_rows], self._hyper[:num_rows], self.factors[:num_rows], found_inf)
        for cohort in self._cohorts:
            if cohort.bound is not None and not cohort.indices.isdisjoint(active):
                cohort.bound.advance(hyper, may_skip=found_inf is not None)

    def _upload(self, rows: Sequence[Sequence[float]]) -> None:
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "dist_asgd: hyperparameters, or which parameters have gradients, changed since the last step and "
                "cannot be uploaded while a CUDA graph is captured. Take one step as it will be captured before the "
                "capture; an lr that is to change between replays must be a CUDA tensor."
            )
        self._hyper[: len(rows)].copy_(to_device(torch.tensor(rows, dtype=torch.float64, device="cpu"), self._device))
        self._uploaded = [list(row) for row in rows]
