"""The sharded state dict: torch's layout with this rank's fragments. ``state_dict()`` returns it.

The other forms of state dict pack groups (``pack_groups``) and scalars (``snapshots_of``) in the same way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..comm import Communicators
from ..placements import fsdp1
from ..placements.dtensor import is_dtensor
from ..placements.presharded import DTensorParam
from ..placements.replicas import ReplicaGroup, ReplicaSharding
from ..placements.shard_tensor import ShardTensor
from ..state import ParamShards
from ..storage.buffers import ShardedParam
from ..storage.published import as_strided, own_storage
from ..update.schedule import Cohort
from ..update.weights import AverageRule

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class _RemedyAsName(type):
    """The metaclass of ``NotGatherable``: torch's error shows the class, and so the remedy."""

    def __repr__(cls) -> str:
        return (
            "'one rank's part' (dist_asgd: a full or offloaded state dict cannot be made of this optimizer's parts by "
            "torch.distributed.checkpoint.state_dict. Use optimizer.consolidated_state_dict(), or leave out "
            "full_state_dict and cpu_offload and save the parts with torch.distributed.checkpoint)"
        )


class NotGatherable(metaclass=_RemedyAsName):
    """A ``False`` that torch's helpers for full state dicts refuse: they raise a TypeError that shows this class.

    It is the value of ``differentiable`` in the groups of a sharded state dict. The helpers would take every tensor
    that is not a DTensor for a whole one, and gather fragments as if they were. For all other code it equals False, and
    it is pickled as False.
    """

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is False or isinstance(other, NotGatherable)

    def __hash__(self) -> int:
        return hash(False)

    def __repr__(self) -> str:
        return "False"

    def __deepcopy__(self, memo: dict[int, Any]) -> bool:
        """Return False, as pickling does; RuntimeError if FSDP1 copies the group into a full state dict.

        It would hand the fragments on as whole. This happens only to a state dict that was made before FSDP1 was asked,
        by an optimizer without a parameter of FSDP1.
        """
        if fsdp1.is_making_full_state():
            raise RuntimeError(
                f"dist_asgd: FSDP1 was given a state dict of fragments, and would make a full one of them as if they "
                f"were whole. {fsdp1.CALL_FSDP1}, without a state dict of your own."
            )
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        return bool, (False,)


# A pickled NotGatherable calls bool(False), which torch.load(weights_only=True) has to allow.
torch.serialization.add_safe_globals([bool])


AVERAGE = "ax"
# Keys that say how a process runs and not what it trains. The groups of torch.optim.ASGD do not have them.
NOT_SAVED = ("fused",)
# The tensors that stand for averages, by parameter index: they are used again while they show the right memory.
ShardTensorCache = dict[int, ShardTensor]


def members_with_entry(shards: ParamShards, fresh: bool, with_own: Collection[int]) -> list[ShardedParam]:
    """Return the parameters that have an entry in this rank's sharded state dict, in order.

    Frozen parameters that never stepped have none, as in torch; with ``fresh`` those have one that were taken in, so
    that a load can fill it, and so have those with own entries (``with_own`` has the indices). FSDP1 parameters of
    which this rank holds nothing have none either.
    """
    cohort_of = shards.cohort_of
    members = [
        m for m in shards.held if fresh or m.param.requires_grad or m.index in with_own or not cohort_of[m.index].fresh
    ]
    return [m for m in members if m.param.numel() or not fsdp1.is_managed(m.param)]


def pack(
    groups: Sequence[dict[str, Any]],
    shards: ParamShards,
    communicators: Communicators,
    cache: ShardTensorCache,
    members: Sequence[ShardedParam],
    whole: Mapping[int, Mapping[str, Tensor]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return torch's layout with this rank's fragment of each sharded tensor. No communication.

    ``members`` have an entry. Averages share memory with the optimizer's state, scalars and masters are copies. The
    tensors in ``whole``, by parameter index, take the place of fragments.
    """
    cohort_of = shards.cohort_of
    state = snapshots_of(members, cohort_of)
    mixed = any(isinstance(member, DTensorParam) for member in shards.held)
    mixed = mixed or any(is_dtensor(member.param) for member in shards.frozen)
    entries = _EntryTensors(mixed, communicators, cache)
    for member in members:
        entry = state[member.index]
        if cohort_of[member.index].fresh:
            # torch makes the state in the first step, with the lr of then: until then eta follows the lr.
            lr = groups[member.bucket.group_index]["lr"]
            entry["eta"].copy_(torch.as_tensor(lr, dtype=entry["eta"].dtype, device="cpu").detach().reshape(()))
        if member.index in whole:
            entry.update(whole[member.index])
        else:
            entry.update((key, entries.get(member, key, own)) for key, own in member.state_fragments().items())
    packed = pack_groups(groups)
    # A master is a ShardTensor exactly if the average is one.
    with_fragments = {m.bucket.group_index for m in members if isinstance(state[m.index][AVERAGE], ShardTensor)}
    for index, group in enumerate(packed):
        # torch's helpers expect the keys of live groups. Those of torch.optim.ASGD and its checkpoints do not have this
        # one, and ours only if it was given. DCP
        # neither writes an empty mapping nor asks for it.
        if "fused" in groups[index]:
            group["fused"] = {}
        if index in with_fragments:
            group["differentiable"] = NotGatherable()
    return {"state": state, "param_groups": packed}


class _EntryTensors:
    """Makes the tensors of a sharded state dict, which have the parameter's shape and hold this rank's fragment.

    They are ShardTensors. If the optimizer also has DTensors (``mixed``), frozen ones included, they are DTensors,
    because get_state_dict(full_state_dict=True) can gather those: their mesh is the optimizer's process group. Hybrid
    sharding has no process group for one replica, so it stays with ShardTensors.
    """

    def __init__(self, mixed: bool, communicators: Communicators, cache: ShardTensorCache) -> None:
        self._communicators = communicators
        self._cache = cache
        self._group = communicators.group if mixed and communicators.num_replicas == 1 else None
        self._meshes: dict[str, DeviceMesh] = {}

    def get(self, member: ShardedParam, key: str, fragment: Tensor) -> Tensor:
        """Return the tensor for this rank's ``fragment`` ``(numel,)`` of the state ``key``; they share memory."""
        cached = self._cache.get(member.index) if key == AVERAGE and self._group is None else None
        if cached is not None and cached.shares_memory_with(fragment):
            return cached
        made = self._make(member, fragment)
        # A tensor made in inference mode could not be changed outside of it later.
        if key == AVERAGE and isinstance(made, ShardTensor) and not made.is_inference():
            self._cache[member.index] = made
        return made

    def _make(self, member: ShardedParam, fragment: Tensor) -> Tensor:
        if not member.is_whole:
            return member.state_entry(fragment)
        fragment = own_storage(fragment)
        communicators, shape, strides = self._communicators, member.param.shape, member.strides
        if communicators.num_shards == 1 or member.param.numel() == 0:
            return as_strided(fragment, shape, strides)
        shard = ShardTensor(fragment, shape, strides, member.fragment_start)
        if self._group is None:
            return shard
        from torch.distributed.device_mesh import DeviceMesh

        from ..placements.shard_dtensor import replicated_fragment

        device_type = shard.device.type
        if device_type not in self._meshes:
            self._meshes[device_type] = DeviceMesh.from_group(self._group, device_type)
        replicas = ReplicaGroup(tuple(communicators.ranks), communicators.rank, communicators)
        return replicated_fragment(
            self._meshes[device_type], shard, ReplicaSharding(replicas, member.bucket.layout, member.slot)
        )


# --- groups and scalars ----------------------------------------------------------------------------------


def _snapshot(value: Any) -> Any:
    if isinstance(value, AverageRule):
        # Plain values, which load without executing anything.
        return value.options()
    # A Tensor lr is changed in place later, and the state dict must keep the value of now.
    return value.detach().clone() if isinstance(value, Tensor) else value


def pack_groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``param_groups`` with numbers for the parameters, in order, as ``torch.optim`` packs them."""
    packed = []
    first = 0
    for group in groups:
        entry = {key: _snapshot(value) for key, value in group.items() if key not in ("params", *NOT_SAVED)}
        entry["params"] = list(range(first, first + len(group["params"])))
        first += len(group["params"])
        packed.append(entry)
    return packed


def snapshots_of(members: Sequence[ShardedParam], cohort_of: dict[int, Cohort]) -> dict[int, dict[str, Tensor]]:
    """Return copies of step, eta and mu on the host, by parameter index.

    Every parameter gets tensors of its own, because loaders write into them in place. If scalars are on a device, the
    host waits for it once per cohort.
    """
    by_cohort: dict[int, list[ShardedParam]] = {}
    for member in members:
        by_cohort.setdefault(id(cohort_of[member.index]), []).append(member)
    snapshots: dict[int, dict[str, Tensor]] = {member.index: {} for member in members}
    for alike in by_cohort.values():
        for key, scalar in cohort_of[alike[0].index].snapshot().items():
            # One clone for all of them is much faster than one per parameter.
            for member, copied in zip(alike, scalar.expand(len(alike)).clone().unbind(), strict=True):
                # Without .data each would be a view of the clone, which autograd forbids to change in place.
                snapshots[member.index][key] = copied.data
    return snapshots
