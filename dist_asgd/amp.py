"""Loss scaling for gradients that are reduced as shards, or are DTensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .optimizer import ShardedASGD
from .placements.dtensor import is_dtensor


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` that also knows where a ``ShardedASGD`` has its gradients.

    Arguments and methods are torch's; other optimizers, and stage 1 with plain parameters only, are treated as torch
    treats them. With stage 2 or DTensors ``unscale_()`` and ``step()`` are collective, and all ranks skip the same
    steps. What stage 2 has reduced is unscaled by the update, at the cost of no pass of its own.
    """

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        if isinstance(optimizer, ShardedASGD) and (optimizer.reduces_gradients or _has_dtensors(optimizer)):
            return {inv_scale.device: optimizer.unscale_gradients(inv_scale, not allow_fp16)}
        unscaled: dict[torch.device, Tensor] = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        return unscaled


def _has_dtensors(optimizer: torch.optim.Optimizer) -> bool:
    return any(is_dtensor(param) for group in optimizer.param_groups for param in group["params"])
