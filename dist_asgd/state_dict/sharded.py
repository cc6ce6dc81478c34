"""One rank's part of the state, in torch's layout: what ``state_dict()`` hands out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..comm import Communicators
from ..placements import fsdp1
from ..placements.presharded import DTensorParam, PreshardedParam
from ..placements.replicas import ReplicaGroup, ReplicaSharding
from ..placements.shard_tensor import ShardTensor
from ..state import ParamShards
from ..storage.buffers import ShardedParam
from .packing import pack_groups, snapshots_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class _Explained(type):
    """Of classes whose name in an error is a remedy."""

    def __repr__(cls) -> str:
        return (
            "'one rank's part' (dist_asgd: a full or offloaded state dict cannot be made of this optimizer's parts by "
            "torch.distributed.checkpoint.state_dict. Use optimizer.consolidated_state_dict(), or leave out "
            "full_state_dict and cpu_offload and save the parts with torch.distributed.checkpoint)"
        )


class FragmentMark(metaclass=_Explained):
    """``False``, as the value of ``differentiable`` in the groups of one rank's part of the state.

    Helpers that gather "full" state take every tensor that is no DTensor for a whole one. This is of no kind that they
    know, so they refuse it; for all others it is False, and it is written as False.
    """

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is False or isinstance(other, FragmentMark)

    def __hash__(self) -> int:
        return hash(False)

    def __repr__(self) -> str:
        return "False"

    def __reduce__(self) -> tuple[Any, ...]:
        return bool, (False,)


# So that files with a mark in them load with torch.load(weights_only=True).
torch.serialization.add_safe_globals([bool])


AVERAGE = "ax"
# Parts as they were made before, by the index of their parameter: taken again where they are still right.
ShardTensorCache = dict[int, ShardTensor]


def pack(
    groups: Sequence[dict[str, Any]], shards: ParamShards, communicators: Communicators, known: ShardTensorCache
) -> dict[str, Any]:
    """torch's layout with this rank's part of each sharded tensor; the sharded ones are the live ones.

    Parameters that are frozen and never stepped have no entry: torch's optimizer makes none for them either. Nor have
    those of FSDP1 of which this rank holds nothing. ``known``: of averages.
    """
    cohort_of = shards.cohort_of
    members = [m for m in shards.members if m.param.requires_grad or not cohort_of[m.index].fresh]
    members = [m for m in members if m.param.numel() or not fsdp1.is_managed(m.param)]
    state = snapshots_of(members, cohort_of)
    view = _View(shards.members, communicators, known)
    for member in members:
        entry = state[member.index]
        if cohort_of[member.index].fresh:
            # Before the first step eta follows the lr.
            lr = groups[member.bucket.group_index]["lr"]
            entry["eta"].copy_(torch.as_tensor(lr, dtype=entry["eta"].dtype, device="cpu").detach().reshape(()))
        entry.update((key, view.of(member, key, slice_)) for key, slice_ in member.state_fragments().items())
    packed = pack_groups(groups)
    # Whatever else is sharded lies as the average does.
    parts = {m.bucket.group_index for m in members if isinstance(state[m.index][AVERAGE], ShardTensor)}
    for index, group in enumerate(packed):
        # Live groups have this key and torch.optim.ASGD's have not: DCP neither writes nor asks for an empty mapping.
        group["fused"] = {}
        if index in parts:
            group["differentiable"] = FragmentMark()
    return {"state": state, "param_groups": packed}


class _View:
    """What stands for a slice: a part under the true shape, and beside DTensors the part of a DTensor.

    Of those torch's helpers make full state dicts, by the group that the ranks are in: not in hybrid sharding, where
    the ranks of a replica have none that all know of.
    """

    def __init__(self, members: Sequence[ShardedParam], communicators: Communicators, known: ShardTensorCache) -> None:
        self._communicators = communicators
        self._known = known
        mixed = any(isinstance(member, DTensorParam) for member in members)
        self._group = communicators.group if mixed and communicators.num_replicas == 1 else None
        self._meshes: dict[str, DeviceMesh] = {}

    def of(self, member: ShardedParam, key: str, slice_: Tensor) -> Tensor:
        """``slice_`` is this rank's of ``member``; shares memory."""
        known = self._known.get(member.index) if key == AVERAGE and self._group is None else None
        if known is not None and known.shares_memory_with(slice_):
            return known
        shown = self._new(member, slice_)
        if key == AVERAGE and isinstance(shown, ShardTensor) and not shown.is_inference():
            self._known[member.index] = shown
        return shown

    def _new(self, member: ShardedParam, slice_: Tensor) -> Tensor:
        if isinstance(member, PreshardedParam):
            return member.state_entry(slice_)
        communicators, shape, strides = self._communicators, member.param.shape, member.strides
        if communicators.num_shards == 1 or member.param.numel() == 0:
            return slice_.as_strided(shape, strides)
        part = ShardTensor(slice_, shape, strides, member.fragment_start)
        if self._group is None:
            return part
        from torch.distributed.device_mesh import DeviceMesh

        from ..placements.shard_dtensor import replicated_fragment

        device_type = part.device.type
        if device_type not in self._meshes:
            self._meshes[device_type] = DeviceMesh.from_group(self._group, device_type)
        replicas = ReplicaGroup(tuple(communicators.ranks), communicators.rank, communicators)
        return replicated_fragment(
            self._meshes[device_type], part, ReplicaSharding(replicas, member.bucket.layout, member.slot)
        )
