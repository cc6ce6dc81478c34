"""The gradient scaler for gradients that stage 2 has reduced, and for gradients that are DTensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gradients.loss_scaling import unscale
from .optimizer import ShardedASGD
from .placements.dtensor import is_dtensor


class GradScaler(torch.amp.GradScaler):
    """A ``torch.amp.GradScaler`` that also finds the gradients of a ``ShardedASGD`` in stage 2 and those of DTensors.

    Arguments and methods are torch's. Other optimizers, and a ``ShardedASGD`` in stage 1 with plain parameters only,
    are treated as torch treats them. In stage 2, or if there are DTensors, ``unscale_()`` and ``step()`` are
    collective, and all ranks skip the same steps. Gradients that stage 2 has reduced are unscaled by the update
    itself, without an additional pass over memory.
    """

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        # torch calls this in unscale_(), and in step() if unscale_() was not called before.
        if isinstance(optimizer, ShardedASGD) and (optimizer.reduces_gradients or _has_dtensors(optimizer)):
            optimizer.adopt_params()
            return {inv_scale.device: unscale(optimizer.gradients, inv_scale, not allow_fp16)}
        unscaled: dict[torch.device, Tensor] = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        return unscaled

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step as ``torch.amp.GradScaler`` does. In stage 2, or if there are DTensors, collective."""
        if not isinstance(optimizer, ShardedASGD):
            return super().step(optimizer, *args, **kwargs)
        optimizer.has_own_scaler = True
        try:
            return super().step(optimizer, *args, **kwargs)
        finally:
            optimizer.has_own_scaler = False


def _has_dtensors(optimizer: torch.optim.Optimizer) -> bool:
    return any(is_dtensor(param) for group in optimizer.param_groups for param in group["params"])
