"""``differentiable=True``: one process, nothing flattened, every intermediate kept for autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .schedule import Cohort, Implementation, StepHyperparameters


def init_state(param: Tensor, lr: float | Tensor) -> dict[str, Tensor]:
    """torch's own state of one parameter: ``ax`` has the parameter's shape here."""
    cohort = Cohort.new(lr, ())
    average = torch.zeros_like(param, memory_format=torch.preserve_format).detach()
    return {"step": cohort.step, "eta": cohort.eta, "mu": cohort.mu, "ax": average}


@torch.enable_grad()
def step(groups: Sequence[dict[str, Any]], state: Any) -> None:
    """One step with gradients enabled, as torch does it here; ``state`` is the optimizer's, and the only truth."""
    for group in groups:
        hyper = StepHyperparameters.of(group, Implementation.FORLOOP)
        for param in group["params"]:
            if param.grad is None:
                continue
            own = state[param]
            scalars = Cohort(own["step"], own["eta"], own["mu"], ())
            if own["step"].item() == 0 and own["mu"].item() == 1:
                scalars.fresh = True
            scalars.prepare(hyper.lr)
            average = own["ax"]
            if average.shape != param.shape:
                average = average.view_as(param)
            reference.update(_real(param), _real(param.grad), _real(average), own["eta"], own["mu"], hyper, None)
            with torch.no_grad():
                scalars.advance(hyper)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
