"""Reduced gradients go back to the parameters: before shards are built anew, stage 2 gives up those it holds."""

from __future__ import annotations

import torch

from ..comm import Communicators
from ..comm.measure import Action
from .base import Gradients
from .reducer import Reducer


@torch.no_grad()
def unshard_gradients(gradients: Gradients, communicators: Communicators, reduced: int) -> None:
    """Put the mean gradient of every parameter in the mask ``reduced`` into ``p.grad``, or add it there. Collective.

    ``reduced`` has the parameters of which any rank has contributed a gradient, the same mask on all ranks; nothing is
    in flight. All ranks get equal gradients, so that reducing them once more gives the same mean. A parameter that was
    converted meanwhile gets its gradient in its own dtype and on its own device. Does nothing in stage 1.
    """
    if not isinstance(gradients, Reducer):
        return
    gradients.published.withdraw_all()
    if not reduced:
        return
    gradients.scale()
    for bucket in gradients.buckets:
        members = [member for member in bucket.members if reduced >> member.index & 1]
        if not members:
            continue
        shard = bucket.gradient_shard()
        flat = shard.new_empty(bucket.layout.numel)  # (world_size * shard_numel,)
        flat.view(bucket.layout.world_size, -1)[communicators.shard_rank].copy_(shard)
        communicators.on(bucket.device).all_gather(flat, Action.GATHER)()
        for member in members:
            param, mean = member.param, flat[member.slot.offset : member.slot.stop]
            if member.dtype.is_complex:
                mean = torch.view_as_complex(mean.view(-1, 2))
            if mean.numel() != param.numel():
                continue
            whole = mean.as_strided(param.shape, member.strides).to(param.device, param.dtype, copy=True)
            param.grad = whole if param.grad is None else param.grad + whole
