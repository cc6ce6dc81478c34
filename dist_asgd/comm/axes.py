"""Which ranks an optimizer runs on, and how it cuts them: all into shards, or a mesh into replicas of shards."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

REPLICATE, SHARD = "replicate", "shard"


@dataclass(frozen=True, slots=True)
class Axes:
    """The groups of this rank; None where this process is alone.

    everyone   all ranks of the optimizer: what they agree on, they agree on together
    shard      the ranks that hold different shards of one replica
    replicate  the ranks that hold the same shard
    """

    everyone: dist.ProcessGroup | None
    shard: dist.ProcessGroup | None
    replicate: dist.ProcessGroup | None

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, mesh: DeviceMesh | None) -> Axes:
        """The axes for the constructor's ``process_group`` and ``mesh``; with a mesh of part of the ranks collective.

        Raises:
            ValueError: both are given, this rank is in neither, or the mesh has not one or two dimensions.
        """
        if mesh is not None:
            if group is not None:
                raise ValueError("dist_asgd: process_group and mesh are both given. Pass one: a mesh has its ranks.")
            return cls._of_mesh(mesh)
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        if group is not None and dist.get_rank(group) < 0:
            raise ValueError(
                "dist_asgd: this process is not a member of process_group. Construct the optimizer only on the ranks "
                "of its group."
            )
        return cls(group, group, None)

    @classmethod
    def _of_mesh(cls, mesh: DeviceMesh) -> Axes:
        from torch.distributed.device_mesh import DeviceMesh

        if not isinstance(mesh, DeviceMesh):
            raise ValueError(
                f"dist_asgd: mesh must be a DeviceMesh, got {type(mesh).__name__}. Make one with init_device_mesh("
                f"'cuda', (num_nodes, gpus_per_node), mesh_dim_names=('{REPLICATE}', '{SHARD}'))."
            )
        if mesh.get_coordinate() is None:
            raise ValueError(
                "dist_asgd: this process is not in the mesh. Construct the optimizer only on the ranks of its mesh."
            )
        if mesh.ndim == 1:
            return cls(mesh.get_group(), mesh.get_group(), None)
        if mesh.ndim != 2:
            raise ValueError(
                f"dist_asgd: mesh must have two dimensions ('{REPLICATE}', '{SHARD}'), or one to shard over, got "
                f"{mesh.ndim}: {mesh}. Pass a slice of it: mesh['{REPLICATE}', '{SHARD}']."
            )
        across, inside = (1, 0) if mesh.mesh_dim_names == (SHARD, REPLICATE) else (0, 1)
        groups = [mesh.get_group(0), mesh.get_group(1)]
        if any(mesh.mesh.diff(dim=dim).le(0).any() for dim in (0, 1)):
            raise ValueError(
                f"dist_asgd: the ranks of the mesh do not ascend along its dimensions: {mesh.mesh.tolist()}. Groups "
                f"number their ranks in ascending order: build the mesh with init_device_mesh()."
            )
        replicate, shard = groups[across], groups[inside]
        if mesh.size(across) == 1:
            return cls(shard, shard, None)
        if mesh.size(inside) == 1:
            return cls(replicate, None, replicate)
        return cls(_group_of(sorted(mesh.mesh.flatten().tolist())), shard, replicate)


def timeout_of(group: dist.ProcessGroup | None) -> timedelta | None:
    """How long the group's user lets it wait; None where its backend does not say."""
    if group is None:
        return None
    for device in group._device_types:
        timeout = getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout
    return None


def _group_of(ranks: list[int]) -> dist.ProcessGroup | None:
    """Collective over ``ranks``, in ascending order: a group of them; the default group where that has no others."""
    if ranks == list(range(dist.get_world_size())):
        return dist.group.WORLD
    group: dist.ProcessGroup = dist.new_group(
        ranks, timeout=timeout_of(dist.group.WORLD), use_local_synchronization=True
    )
    return group


def description(mesh: DeviceMesh | None) -> str:
    """The mesh as it must be on all ranks."""
    return "None" if mesh is None else f"{mesh.mesh_dim_names or ''} {mesh.mesh.tolist()}".strip()
