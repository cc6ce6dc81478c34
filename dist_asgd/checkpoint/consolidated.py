"""The state of all ranks in ``torch.optim.ASGD``'s own layout, collected a bucket at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..agreement import Claim
from ..buffers import Bucket, Housed
from ..comm import Communicators
from ..dtensor import whole_of
from ..residents import Placed
from ..state import ShardedState
from .scalars import snapshots_of

# Buffers for the largest bucket of a device and dtype, by the dtype of what is collected.
Staging = dict[tuple[torch.device, torch.dtype, torch.dtype], Tensor]


def claim_of(to: object, world_size: int) -> tuple[Claim, Exception | None]:
    """The target, as what must be equal on all ranks; and a ValueError unless it is a rank or None."""
    claim = Claim("targets of consolidated_state_dict()", [("to", to)], "Pass the same rank on every rank.")
    if to is None or (isinstance(to, int) and not isinstance(to, bool) and 0 <= to < world_size):
        return claim, None
    return claim, ValueError(
        f"dist_asgd: consolidated_state_dict(to={to!r}): wanted a rank of the process group, 0 to {world_size - 1}, or "
        f"None for all ranks."
    )


def collect_state(shards: ShardedState, communicators: Communicators, to: int | None) -> dict[int, dict[str, Tensor]]:
    """Collective: torch's ``state`` on rank ``to`` (None: all ranks), on the CPU; empty on the others.

    Parameters that never stepped have no entry, as in torch. Rank ``to`` holds the result and one bucket; of DTensors
    every rank of the mesh holds one whole tensor at a time.
    """
    here = to is None or to == communicators.rank
    stepped = [member for member in shards.members if not shards.cohort_of[member.index].fresh]
    state = snapshots_of(stepped, shards.cohort_of) if here else {}
    staging: Staging = {}
    for bucket in shards.buckets:
        housed = [member for member in bucket.members if not shards.cohort_of[member.index].fresh]
        for key, shard in bucket.shards().items() if housed else ():
            flat = _whole(bucket, shard, shards.buckets, staging, communicators, to)
            if flat is not None:
                for member in housed:
                    state[member.index][key] = _of_member(member, flat)
    for resident in stepped:
        if isinstance(resident, Placed):
            for key, slice_ in resident.slices().items():
                whole = whole_of(resident.shown(slice_))
                if here:
                    state[resident.index][key] = whole
    return state


def _whole(
    bucket: Bucket,
    shard: Tensor,
    buckets: Sequence[Bucket],
    staging: Staging,
    communicators: Communicators,
    to: int | None,
) -> Tensor | None:
    """Collective: all ranks' ``shard`` ``(num_shards * shard_numel,)``, in a buffer kept for others; None elsewhere."""
    here = to is None or to == communicators.rank
    if communicators.num_shards == 1:
        return shard if here else None
    target = None if to is None else communicators.shard_rank_of(to)
    if to is not None and target is None:
        # Another replica's: it collects its own.
        return None
    flat = None
    if here:
        key = (bucket.device, bucket.dtype, shard.dtype)
        if key not in staging:
            alike = (b.layout.numel for b in buckets if (b.device, b.dtype) == key[:2])
            staging[key] = shard.new_empty(max(alike))
        flat = staging[key][: bucket.layout.numel]
    pieces = None if flat is None else flat.view(communicators.num_shards, -1).unbind(0)
    communicators.on(bucket.device).collect(shard, pieces, target)
    return flat


def _of_member(member: Housed, flat: Tensor) -> Tensor:
    """The member's part of a whole bucket, on the CPU, with the parameter's shape and strides."""
    dtype = flat.dtype.to_complex() if member.dtype.is_complex else flat.dtype
    whole = torch.empty_strided(member.param.shape, member.strides, dtype=dtype, device="cpu")
    target = whole.as_strided((whole.numel(),), (1,))
    real = torch.view_as_real(target).view(-1) if target.is_complex() else target
    real.copy_(flat[member.slot.offset : member.slot.stop])
    return whole
