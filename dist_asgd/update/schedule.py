"""``step``, ``eta`` and ``mu`` on the host, shared by all parameters with the same history.

A cohort is the set of parameters of one group that have taken the same steps. There is one at first; a parameter
that skips a step leaves its cohort and keeps scalars of its own, so the schedule costs a few host operations a
cohort and step, however many parameters there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from . import backend

# float32 counts so far, one by one.
COUNTED = 1 << 24


def scalar_dtype() -> torch.dtype:
    """The dtype of ``step``, ``eta`` and ``mu``: float64 where that is torch's default dtype, else float32."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


class Implementation(Enum):
    """Which of torch's forms the arithmetic follows, and what computes it.

    FORLOOP  torch's for-loop implementation, in chunks of torch operators
    FOREACH  torch's foreach implementation, in chunks of torch operators
    FUSED    the for-loop implementation in one pass of a compiled kernel
    """

    FORLOOP = 1
    FOREACH = 2
    FUSED = 3

    @classmethod
    def of(cls, group: dict[str, Any], device_type: str | None) -> Implementation:
        """What a group asks for by ``foreach`` and ``fused``; left open, the fastest that ``device_type`` has."""
        if group["foreach"]:
            return cls.FOREACH
        if group["fused"]:
            return cls.FUSED
        if group["foreach"] is False:
            return cls.FORLOOP
        if device_type in (None, "cpu"):
            return cls.FORLOOP if group["fused"] is False else cls.FUSED
        return cls.FOREACH


@dataclass(frozen=True, slots=True)
class StepHyperparameters:
    """The hyperparameters of one step of one group, read from the group when the step begins."""

    lr: float | Tensor
    lambd: float
    alpha: float
    t0: float
    weight_decay: float
    maximize: bool
    implementation: Implementation
    device: torch.device | None = None

    @classmethod
    def of(
        cls, group: dict[str, Any], implementation: Implementation, device: torch.device | None = None
    ) -> StepHyperparameters:
        """The rule that ``group`` gives; a Tensor lr keeps its dtype, and becomes 0-dim as in torch.

        ``device``: where the group's scalars are kept and advanced; None is the host.
        """
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.dim() != 0:
            lr = lr.squeeze()
        return cls(
            lr,
            group["lambd"],
            group["alpha"],
            group["t0"],
            group["weight_decay"],
            group["maximize"],
            implementation,
            device,
        )


def step_hyperparameters(groups: Sequence[dict[str, Any]]) -> list[StepHyperparameters]:
    """The rule of each group, as its hyperparameters are now."""
    hypers = []
    for group in groups:
        first = next(iter(group["params"]), None)
        implementation = Implementation.of(group, None if first is None else first.device.type)
        on_device = (
            implementation is Implementation.FUSED and first is not None and backend.of(first.device) is backend.TRITON
        )
        hypers.append(
            StepHyperparameters.of(group, implementation, first.device if first is not None and on_device else None)
        )
    return hypers


class Cohort:
    """The scalars of one cohort: 0-dim tensors, the very objects that ``state[p]`` of its members holds.

    On the host, or views of line ``row`` of a ``ScalarTable`` on the device.
    ``fresh`` until the first step: torch has no state for such a parameter, and makes its eta from the lr of then.
    """

    __slots__ = ("eta", "fresh", "indices", "initial", "mu", "row", "step")

    def __init__(self, step: Tensor, eta: Tensor, mu: Tensor, indices: Iterable[int], fresh: bool = False) -> None:
        self.step = step
        self.eta = eta
        self.mu = mu
        self.indices = set(indices)
        self.fresh = fresh
        self.row: int | None = None
        # On the device: eta is the lr of the first step that does not overflow.
        self.initial = False

    @classmethod
    def new(cls, lr: float | Tensor, indices: Iterable[int]) -> Cohort:
        """A cohort that has not stepped: step 0, eta = lr, mu = 1."""
        dtype = scalar_dtype()
        # On the host, whatever torch's default device is.
        step, eta, mu = (torch.tensor(value, dtype=dtype, device="cpu") for value in (0.0, 0.0, 1.0))
        cohort = cls(step, eta, mu, indices, fresh=True)
        cohort._set_first_eta(lr)
        return cohort

    def _set_first_eta(self, lr: float | Tensor) -> None:
        if isinstance(lr, Tensor):
            self.eta.copy_(lr.detach().reshape(()))
        else:
            self.eta.fill_(lr)

    def split(self, indices: set[int]) -> Cohort:
        """Take ``indices`` out into a cohort of their own, with the same scalars."""
        self.indices -= indices
        taken = Cohort(self.step.clone(), self.eta.clone(), self.mu.clone(), indices, self.fresh)
        taken.initial = self.initial
        return taken

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the scalars by key, on the host, in the dtypes that torch has; waits for the device if need be."""
        scalars = {"step": self.step, "eta": self.eta, "mu": self.mu}
        if self.row is None:
            return {key: scalar.clone() for key, scalar in scalars.items()}
        on_host = {key: scalar.cpu() for key, scalar in scalars.items()}
        counted = on_host["step"].item() <= COUNTED
        return {key: v.to(scalar_dtype()) if key != "step" or counted else v for key, v in on_host.items()}

    def come_home(self) -> None:
        """Bring scalars back from the device, for a step by another implementation."""
        scalars = self.snapshot()
        self.step, self.eta, self.mu, self.row = scalars["step"], scalars["eta"], scalars["mu"], None
        self.fresh = self.initial and self.step.item() == 0

    @property
    def begun(self) -> bool:
        """Whether ``ax`` of the members is a mean of iterates, rather than unset or a copy of the last one."""
        return not self.fresh and self.mu.item() != 1

    def prepare(self, lr: float | Tensor) -> None:
        """Before the first step, follow the lr: torch makes eta when the first gradient comes, not before."""
        if self.fresh:
            # In place, so that state[p] goes on showing them: torch takes the default dtype of the first step.
            for scalar in (self.step, self.eta, self.mu):
                scalar.data = scalar.to(scalar_dtype())
            self._set_first_eta(lr)
            self.fresh = False

    def factors(self, hyper: StepHyperparameters) -> tuple[float, float, float, float]:
        """What the kernel updates with: (1 - lambd·eta, -eta, mu, t), in double precision."""
        eta = self.eta.item()
        return 1 - hyper.lambd * eta, -eta, self.mu.item(), self.step.item() + 1

    def advance(self, hyper: StepHyperparameters) -> None:
        """After an update: ``step <- t``, ``eta <- lr / (1 + lambd·lr·t)^alpha``, ``mu <- 1 / max(1, t - t0)``.

        The for-loop implementation computes eta in double precision, the foreach implementation on 0-dim tensors: torch's two
        schedules differ in about half of the steps by one unit in the last place.
        """
        if self.step.dtype == torch.float32 and self.step.item() >= COUNTED:
            # float32 counts no further; torch's counter stops here.
            self.step.data = self.step.double()
        self.step += 1
        step = self.step.item()
        count: float | Tensor = self.step if hyper.implementation is Implementation.FOREACH else step
        self.eta.copy_(torch.as_tensor(hyper.lr / ((1 + hyper.lambd * hyper.lr * count) ** hyper.alpha), device="cpu"))
        self.mu.copy_(torch.as_tensor(1 / max(1, step - hyper.t0), device="cpu"))
