"""``differentiable=True``: one process, nothing flattened, every intermediate kept for autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checkpoint.groups import pack_groups
from .checkpoint.loading import Loaded
from .update import reference
from .update.schedule import Cohort, Form, Rule


def init_state(param: Tensor, lr: float | Tensor) -> dict[str, Tensor]:
    """torch's own state of one parameter: ``ax`` has the parameter's shape here."""
    cohort = Cohort.new(lr, ())
    average = torch.zeros_like(param, memory_format=torch.preserve_format).detach()
    return {"step": cohort.step, "eta": cohort.eta, "mu": cohort.mu, "ax": average}


@torch.enable_grad()
def step(groups: Sequence[dict[str, Any]], state: Any) -> None:
    """One step with gradients enabled, as torch does it here; ``state`` is the optimizer's, and the only truth."""
    for group in groups:
        rule = Rule.of(group, Form.FORLOOP)
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
            reference.update(_real(param), _real(param.grad), _real(average), own["eta"], own["mu"], rule, None)
            with torch.no_grad():
                scalars.advance(rule)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def pack(groups: Sequence[dict[str, Any]], state: Any) -> dict[str, Any]:
    """torch's own state dict; tensors are the live ones, as in torch."""
    params = [param for group in groups for param in group["params"]]
    return {"state": {i: dict(state[p]) for i, p in enumerate(params)}, "param_groups": pack_groups(groups)}


def apply(loaded: Loaded, groups: Sequence[dict[str, Any]], state: Any) -> None:
    """Replace the state by a loaded one; nothing is cast to a narrower dtype."""
    params = [(param, group["lr"]) for group in groups for param in group["params"]]
    for index, (param, lr) in enumerate(params):
        state[param] = init_state(param, lr)
        entry = loaded.entries.get(index)
        if entry is not None:
            dtype = torch.promote_types(entry.average.dtype, param.dtype)
            average = entry.average.detach().to(param.device, dtype, copy=True)
            state[param] = {"step": entry.step, "eta": entry.eta, "mu": entry.mu, "ax": average}
