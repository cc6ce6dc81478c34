"""``differentiable=True``: the rule on whole parameters of one process, with every intermediate kept for autograd.

In this mode the optimizer has no buckets and no ``ParamShards``: ``optimizer.state`` is the state, as in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..storage.frozen import REQUIRES_GRAD
from . import reference
from .schedule import Cohort, Implementation, StepHyperparameters


def init_state(param: Tensor, lr: float | Tensor) -> dict[str, Tensor]:
    """The state of a parameter that has not stepped, as torch has it: ``ax`` has the parameter's shape."""
    cohort = Cohort.new(lr, ())
    average = torch.zeros_like(param, memory_format=torch.preserve_format).detach()
    return {"step": cohort.step, "eta": cohort.eta, "mu": cohort.mu, "ax": average}


def init_states(groups: Sequence[dict[str, Any]], state: Any) -> None:
    """Put the state of new ``groups`` into ``state``, which is ``optimizer.state``; frozen parameters have none."""
    for group in groups:
        for param in filter(REQUIRES_GRAD, group["params"]):
            state[param] = init_state(param, group["lr"])


@torch.enable_grad()
def step(groups: Sequence[dict[str, Any]], state: Any) -> bool:
    """One step of all parameters that have a gradient, recorded by autograd; returns whether any has.

    ``state`` is ``optimizer.state``.
    """
    any_active = False
    for group in groups:
        # torch's foreach form refuses this mode, so the for-loop form is the only one.
        hyper = StepHyperparameters.of(group, Implementation.FORLOOP)
        for param in group["params"]:
            if param.grad is None:
                continue
            any_active = True
            # Frozen parameters have no entry yet.
            entry = state[param] = state.get(param) or init_state(param, hyper.lr)
            scalars = Cohort(entry["step"], entry["eta"], entry["mu"], ())
            # A loaded state dict may have replaced the entry, so whether it is fresh is read from the scalars.
            if entry["step"].item() == 0 and entry["mu"].item() == 1:
                scalars.fresh = True
            scalars.prepare(hyper.lr)
            average = entry["ax"]
            if average.shape != param.shape:
                average = average.view_as(param)
            reference.update(_real(param), _real(param.grad), _real(average), entry["eta"], entry["mu"], hyper, None)
            with torch.no_grad():
                scalars.advance(hyper)
    return any_active


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
