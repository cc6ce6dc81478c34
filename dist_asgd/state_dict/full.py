"""The state of all ranks in ``torch.optim.ASGD``'s own layout, collected a bucket at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..comm import Communicators
from ..comm.agreement import Fingerprint
from ..placements.presharded import DTensorParam
from ..state import ParamShards
from ..storage.buffers import Bucket, BucketParam
from .packing import snapshots_of

# Buffers for the largest bucket of a device and dtype, by the dtype of what is collected.
Staging = dict[tuple[torch.device, torch.dtype, torch.dtype], Tensor]


def fingerprint_of(to: object, world_size: int) -> tuple[Fingerprint, Exception | None]:
    """The target, as what must be equal on all ranks; and a ValueError unless it is a rank or None."""
    fingerprint = Fingerprint("targets of consolidated_state_dict()", [("to", to)], "Pass the same rank on every rank.")
    if to is None or (isinstance(to, int) and not isinstance(to, bool) and 0 <= to < world_size):
        return fingerprint, None
    return fingerprint, ValueError(
        f"dist_asgd: consolidated_state_dict(to={to!r}): wanted a rank of the process group, 0 to {world_size - 1}, or "
        f"None for all ranks."
    )


def collect_state(shards: ParamShards, communicators: Communicators, to: int | None) -> dict[int, dict[str, Tensor]]:
    """Collective: torch's ``state`` on rank ``to`` (None: all ranks), on the CPU; empty on the others.

    Parameters that never stepped have no entry, as in torch. Rank ``to`` holds the result and one bucket, or as much
    of DTensors; the others what they send of it.
    """
    here = to is None or to == communicators.rank
    stepped = [member for member in shards.members if not shards.cohort_of[member.index].fresh]
    state = snapshots_of(stepped, shards.cohort_of) if here else {}
    staging: Staging = {}
    for bucket in shards.buckets:
        housed = [member for member in bucket.members if not shards.cohort_of[member.index].fresh]
        for key, shard in bucket.state_shards().items() if housed else ():
            flat = _whole(bucket, shard, shards.buckets, staging, communicators, to)
            if flat is not None:
                for member in housed:
                    state[member.index][key] = _of_member(member, flat)
    placed = [member for member in stepped if isinstance(member, DTensorParam)]
    for index, key, whole in _wholes(placed, communicators, to) if placed else ():
        state[index][key] = whole
    return state


def _wholes(
    placed: Sequence[DTensorParam], communicators: Communicators, to: int | None
) -> Iterator[tuple[int, str, Tensor]]:
    """Collective: index, key and whole tensor of the state of DTensors; nothing elsewhere."""
    # Where there are DTensors, their modules are loaded.
    from .assembly import Assembly, runs_of

    averages = [member.state_entry(member.average) for member in placed]
    assembly = Assembly(averages, communicators)
    for run in runs_of(averages):
        # Masters are made for this, so only those of a run are there at a time.
        slices = [placed[i].state_fragments() for i in run]
        for key in slices[0]:
            tensors = [placed[i].state_entry(own[key]) for i, own in zip(run, slices, strict=True)]
            for i, whole in zip(run, assembly.bring(run, tensors, to), strict=False):  # none elsewhere
                yield placed[i].index, key, whole


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
    communicators.on(bucket.device).gather(shard, pieces, [shard.numel()] * communicators.num_shards, target)
    return flat


def _of_member(member: BucketParam, flat: Tensor) -> Tensor:
    """The member's part of a whole bucket, on the CPU, with the parameter's shape and strides."""
    dtype = flat.dtype.to_complex() if member.dtype.is_complex else flat.dtype
    whole = torch.empty_strided(member.param.shape, member.strides, dtype=dtype, device="cpu")
    target = whole.as_strided((whole.numel(),), (1,))
    real = torch.view_as_real(target).view(-1) if target.is_complex() else target
    real.copy_(flat[member.slot.offset : member.slot.stop])
    return whole
