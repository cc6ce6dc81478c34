"""``differentiable=True``: one process, nothing flattened, every intermediate kept for autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .update import reference
from .update.schedule import Cohort, Rule, scalar_dtype


def init_state(param: Tensor, lr: float | Tensor) -> dict[str, Tensor]:
    """torch's own state of one parameter: ``ax`` has the parameter's shape here."""
    cohort = Cohort.new(lr, ())
    average = torch.zeros_like(param, memory_format=torch.preserve_format).detach()
    return {"step": cohort.step, "eta": cohort.eta, "mu": cohort.mu, "ax": average}


def step(groups: Sequence[dict[str, Any]], state: Any) -> None:
    """One step, with gradients enabled as the caller set them; ``state`` is the optimizer's, and the only truth."""
    for group in groups:
        rule = Rule.of(group, foreach=False)
        for param in group["params"]:
            if param.grad is None:
                continue
            own = state[param]
            scalars = Cohort(own["step"], own["eta"], own["mu"], ())
            if own["step"].item() == 0 and own["mu"].item() == 1:
                scalars.fresh = True
            scalars.prepare(rule.lr)
            average = own["ax"]
            if average.shape != param.shape:
                average = average.view_as(param)
            values = [torch.view_as_real(t) if t.is_complex() else t for t in (param, param.grad, average)]
            reference.update(*values, own["eta"], own["mu"], rule, None)
            with torch.no_grad():
                scalars.advance(rule)


def load_state(saved: dict[str, Any], param: Tensor, name: str) -> dict[str, Tensor]:
    """One parameter's state from a torch state dict; scalars and ``ax`` are never cast to a narrower dtype."""
    if not set(saved) == {"step", "eta", "mu", "ax"} or tuple(saved["ax"].shape) != tuple(param.shape):
        raise ValueError(f"dist_asgd: the loaded state of parameter {name} is not that of ASGD on this parameter.")
    scalars = {
        key: torch.as_tensor(saved[key], dtype=scalar_dtype()).detach().clone() for key in ("step", "eta", "mu")
    }
    dtype = torch.promote_types(saved["ax"].dtype, param.dtype)
    return {**scalars, "ax": saved["ax"].detach().to(param.device, dtype, copy=True)}
