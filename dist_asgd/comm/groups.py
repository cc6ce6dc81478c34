"""Which communicator serves which device, on the axes of an optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from .axes import Axes, timeout_of
from .base import Communicator, Local
from .gloo import Gloo
from .hybrid import Hybrid
from .named import Named

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Tags from 2^30 on are ours; what users choose for their own messages is rarely that large.
FIRST_TAG = 1 << 30
TAG_RANGES = 1 << 12


def _backend_for(group: dist.ProcessGroup, device_type: str) -> str | None:
    """The name of the backend that serves ``device_type`` in ``group``, or None."""
    config = str(dist.get_backend_config(group))
    if ":" not in config:
        return config
    pairs = dict(entry.split(":", 1) for entry in config.split(","))
    return pairs.get(device_type)


def _own_group(group: dist.ProcessGroup, backend: str) -> dist.ProcessGroup:
    ranks = dist.get_process_group_ranks(group)
    # Without a timeout torch would take the backend's own, half an hour, whatever the user chose for the group.
    own: dist.ProcessGroup = dist.new_group(
        ranks, timeout=timeout_of(group), backend=backend, use_local_synchronization=True
    )
    return own


def _place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Rank in ``group``, and its size."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


class _Tags:
    """Hands out a range of message tags to each optimizer of this process.

    Shared by the process, as the groups that it keeps apart are.
    """

    taken = 0


def _agree_on_tags(group: dist.ProcessGroup) -> int:
    """Collective: a first tag that no optimizer on any rank of ``group`` uses. Reused after 4,096 optimizers."""
    number = torch.tensor([_Tags.taken])
    dist.all_reduce(number, dist.ReduceOp.MAX, group=group)
    _Tags.taken = int(number.item()) + 1
    return FIRST_TAG + (_Tags.taken % TAG_RANGES << 16)


class Communicators:
    """One communicator per kind of device, on one process group or mesh; made when first asked for.

    ``rank`` of ``world_size`` counts all ranks; ``shard_rank`` of ``num_shards`` those that hold shards of one replica,
    ``replica`` of ``num_replicas`` those that hold the same shard. Without a mesh there is one replica.
    """

    def __init__(self, group: dist.ProcessGroup | None, mesh: DeviceMesh | None = None) -> None:
        self._axes = Axes.of(group, mesh)
        self._group = self._axes.everyone
        self._by_device: dict[str, Communicator] = {}
        self._first_tag = 0
        self.rank, self.world_size = _place_in(self._group)
        self.shard_rank, self.num_shards = _place_in(self._axes.shard)
        self.replica, self.num_replicas = _place_in(self._axes.replicate)

    def _host_group(self, group: dist.ProcessGroup) -> dist.ProcessGroup:
        """A group for small messages on the host; control traffic never touches the accelerator."""
        backend = _backend_for(group, "cpu")
        if backend is not None and backend != "nccl":
            return group
        return _own_group(group, "gloo")

    @property
    def host(self) -> Communicator:
        """The communicator for control words."""
        if self._group is None or self.world_size == 1:
            return self._by_device.setdefault("", Local())
        if "control" not in self._by_device:
            group = self._host_group(self._group)
            if _backend_for(group, "cpu") == "gloo":
                self._first_tag = _agree_on_tags(group)
                self._by_device["control"] = Gloo(group, self._first_tag)
            else:
                self._by_device["control"] = Named(group, averages=False)
        return self._by_device["control"]

    @property
    def background(self) -> Communicator:
        """For control words of threads that run beside training, on a group of its own; collective on first use."""
        if self._group is None or self.world_size == 1:
            return self._by_device.setdefault("", Local())
        if "background" not in self._by_device:
            host = self._host_group(self._group)
            backend = _backend_for(host, "cpu")
            assert backend is not None
            group = _own_group(self._group, backend)
            self._by_device["background"] = (
                Gloo(group, _agree_on_tags(group)) if backend == "gloo" else Named(group, averages=False)
            )
        return self._by_device["background"]

    def on(self, device: torch.device) -> Communicator:
        """The communicator for shards on ``device``; ValueError where a group has no backend for it."""
        if device.type not in self._by_device:
            shards = self._make(self._axes.shard, device)
            if self.num_replicas > 1:
                shards = Hybrid(shards, self._make(self._axes.replicate, device))
            self._by_device[device.type] = shards
        return self._by_device[device.type]

    def _make(self, group: dist.ProcessGroup | None, device: torch.device) -> Communicator:
        if group is None or dist.get_world_size(group) == 1:
            return Local()
        backend = _backend_for(group, device.type)
        if backend == "gloo" and device.type == "cpu":
            return Gloo(group, self._first_tag)
        if backend == "nccl" and device.type == "cuda":
            # Its own group: on a shared one a bucket could meet a collective of the user's in another order.
            return Named(_own_group(group, "nccl"), averages=True)
        if backend in (None, "gloo", "nccl"):
            raise ValueError(
                f"dist_asgd: parameters on {device.type!r}, but the process group's backend "
                f"({dist.get_backend_config(group)}) has no fast path for that device. Pass a process_group whose "
                f"backend serves it: init_process_group('cpu:gloo,cuda:nccl') serves both."
            )
        return Named(group, averages=False)

    def shard_rank_of(self, rank: int) -> int | None:
        """Which shard ``rank`` (of all) holds; None where it is of another replica than this rank."""
        if self._group is None or self._axes.shard is None:
            return 0 if rank == self.rank else None
        found = dist.get_process_group_ranks(self._axes.shard)
        global_rank = self.ranks[rank]
        return found.index(global_rank) if global_rank in found else None

    @property
    def ranks(self) -> list[int]:
        """All ranks, as numbers in the default group."""
        return [0] if self._group is None else dist.get_process_group_ranks(self._group)

    def scratch_bytes(self) -> int:
        """Bytes of receive buffers kept between steps, over all devices."""
        return sum(communicator.scratch_bytes() for communicator in self._by_device.values())
