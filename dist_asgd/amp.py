"""Loss scaling for float16 gradients that are reduced as shards."""

from __future__ import annotations

import torch
from torch import Tensor

from .optimizer import ShardedASGD


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` that also knows where a ``ShardedASGD`` in stage 2 keeps its gradients.

    Arguments and methods are torch's; other optimizers, and stage 1, are treated as torch treats them. With stage 2
    ``unscale_()`` and ``step()`` are collective, all ranks skip the same steps, and unscaling costs no pass over the
    gradients: the factor is applied by the update.
    """

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        if isinstance(optimizer, ShardedASGD) and optimizer.reduces_gradients:
            return {inv_scale.device: optimizer.unscale_gradients(inv_scale, not allow_fp16)}
        unscaled: dict[torch.device, Tensor] = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        return unscaled
