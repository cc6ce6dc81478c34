"""The ranks of an optimizer: which of them hold different shards, and which hold replicas of the same shard.

``Communicators`` reads the constructor's ``process_group`` and ``mesh`` with it. Nothing here communicates.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

REPLICATE, SHARD = "replicate", "shard"
# Ranks of the default group, in order.
Ranks = tuple[int, ...]


class NotAMember(ValueError):
    """This rank is not one of the optimizer's, so no other rank can hear of the error: it is raised here alone."""


@dataclass(frozen=True, slots=True)
class Axes:
    """The ranks of an optimizer as this rank sees them: three lists in ascending order, with this rank in each.

    group      the process group that all of them are in; None for a single process
    everyone   all ranks of the optimizer, which agree before each collective call
    shard      the ranks that hold different shards of this rank's replica
    replicate  the ranks that hold the same shard as this rank
    """

    group: dist.ProcessGroup | None
    everyone: Ranks
    shard: Ranks
    replicate: Ranks

    @property
    def this_rank(self) -> int:
        """This rank, as a rank of the default group."""
        return 0 if self.group is None else dist.get_rank()

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, mesh: DeviceMesh | None) -> Axes:
        """Return the axes for the constructor's ``process_group`` and ``mesh``.

        Raises:
            NotAMember: this rank is not in the group or mesh.
            ValueError: both are given, or the mesh is not a DeviceMesh, has more than two dimensions, or lists its
                ranks in another order.
        """
        if mesh is not None:
            if group is not None:
                raise ValueError("dist_asgd: process_group and mesh are both given. Pass one: a mesh has its ranks.")
            return cls._of_mesh(mesh)
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        if group is None:
            return cls(None, (0,), (0,), (0,))
        if dist.get_rank(group) < 0:
            raise NotAMember(
                "dist_asgd: this process is not a member of process_group. Construct the optimizer only on the ranks "
                "of its group."
            )
        ranks = tuple(dist.get_process_group_ranks(group))
        return cls(group, ranks, ranks, (dist.get_rank(),))

    @classmethod
    def for_reporting(cls, group: dist.ProcessGroup | None, mesh: object) -> Axes:
        """Return axes of all ranks that unusable arguments may mean, so that these ranks can raise the error together.

        All of them count as shards.
        """
        ranks = getattr(mesh, "mesh", None)
        if group is not None or ranks is None:
            return cls.of(group, None)
        everyone = tuple(sorted(ranks.flatten().tolist()))
        return cls(dist.group.WORLD, everyone, everyone, (dist.get_rank(),))

    @classmethod
    def _of_mesh(cls, mesh: DeviceMesh) -> Axes:
        """Return the axes of a mesh with one dimension (shards) or two (replicas of shards)."""
        from torch.distributed.device_mesh import DeviceMesh

        if not isinstance(mesh, DeviceMesh):
            raise ValueError(
                f"dist_asgd: mesh must be a DeviceMesh, got {type(mesh).__name__}. Make one with init_device_mesh("
                f"'cuda', (num_nodes, gpus_per_node), mesh_dim_names=('{REPLICATE}', '{SHARD}'))."
            )
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise NotAMember(
                "dist_asgd: this process is not in the mesh. Construct the optimizer only on the ranks of its mesh."
            )
        ranks = mesh.mesh
        if mesh.ndim not in (1, 2):
            raise ValueError(
                f"dist_asgd: mesh must have two dimensions ('{REPLICATE}', '{SHARD}'), or one to shard over, got "
                f"{mesh.ndim}: {mesh}. Pass a slice of it: mesh['{REPLICATE}', '{SHARD}']."
            )
        if any(ranks.diff(dim=dim).le(0).any() for dim in range(mesh.ndim)):
            raise ValueError(
                f"dist_asgd: the ranks of the mesh do not ascend along its dimensions: {ranks.tolist()}. Build the "
                f"mesh with init_device_mesh()."
            )
        everyone = tuple(sorted(ranks.flatten().tolist()))
        if mesh.ndim == 1:
            return cls(dist.group.WORLD, everyone, everyone, (dist.get_rank(),))
        along = [tuple(ranks[:, coordinate[1]].tolist()), tuple(ranks[coordinate[0], :].tolist())]
        across, inside = _dimensions(mesh)
        return cls(dist.group.WORLD, everyone, along[inside], along[across])


def _dimensions(mesh: DeviceMesh) -> tuple[int, int]:
    """Return which dimension of a 2-D mesh replicates and which one shards: by their names, or else in this order."""
    names = mesh.mesh_dim_names or ("", "")
    by_name = {names.index(name): name for name in (REPLICATE, SHARD) if name in names}
    if by_name.get(0) == SHARD or by_name.get(1) == REPLICATE:
        return 1, 0
    return 0, 1


def timeout_of(group: dist.ProcessGroup | None) -> timedelta | None:
    """Return the timeout that the user gave ``group``; None if its backend does not tell."""
    if group is None:
        return None
    for device in group._device_types:
        timeout = getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout
    return None


def describe_mesh(mesh: DeviceMesh | None) -> str:
    """Return the mesh as text that must be equal on all ranks, for the constructor's fingerprint."""
    ranks, names = getattr(mesh, "mesh", None), getattr(mesh, "mesh_dim_names", None)
    return "None" if ranks is None else f"{names or ''} {ranks.tolist()}".strip()
