"""State beside FSDP1: what FSDP1 does not hold is whole in the state dicts that its helpers take.

``FSDP.optim_state_dict`` and its relatives, and ``get_state_dict`` where the model has FSDP1 modules, gather the state
of parameters that FSDP1 manages. The state of all other parameters they hand on as it is, for whole, also where only
rank 0 keeps it. No form of a fragment could be gathered there any more, so ``state_dict()`` gathers before: it is
collective then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..comm import Communicators
from ..comm.agreement import Fingerprint
from ..placements import fsdp1
from ..state import ParamShards
from ..storage.buffers import ShardedParam
from .whole_tensors import whole_state

# Makes all ranks agree on a state dict; takes its fingerprint and what is wrong on this rank.
Agree = Callable[[Fingerprint, Exception | None], object]


def needs_whole(shards: ParamShards, communicators: Communicators) -> bool:
    """Whether a state dict of now has state to gather; the same on all ranks. No communication."""
    if communicators.world_size == 1:
        return False
    # Parameters in buckets, of which there may be many, are never FSDP1's.
    presharded = [member.param for buffer in shards.presharded for member in buffer.members]
    managed = [fsdp1.is_managed(param) for param in presharded]
    if all(managed) and (communicators.num_shards == 1 or not shards.buckets):
        return False
    return any(managed) or any(fsdp1.is_managed(m.param) for m in shards.frozen) or fsdp1.is_collecting_state()


@torch.no_grad()
def gather(
    members: Sequence[ShardedParam], communicators: Communicators, agree: Agree, problem: Exception | None
) -> dict[int, dict[str, Tensor]]:
    """Return the tensors of those ``members`` that FSDP1 does not manage, whole, by parameter index. Collective.

    They are new tensors on the parameter's device. ``problem`` is what is wrong on this rank; all ranks raise it.
    """
    others = [member for member in members if not fsdp1.is_managed(member.param)]
    entries = [("parameter", member.name) for member in others]
    remedy = "Freeze the same parameters on every rank, and keep entries of the same ones in optimizer.state."
    agree(Fingerprint("parameters with state", entries, remedy), problem)
    whole: dict[int, dict[str, Tensor]] = {member.index: {} for member in others}
    for member, key, tensor in whole_state(others, communicators, None, masters=True, one_by_one=False):
        whole[member.index][key] = tensor.to(member.bucket.device)
    return whole
