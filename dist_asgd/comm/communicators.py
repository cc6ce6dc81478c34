"""Which communicator serves which device, on the axes of an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from .axes import Axes, NotAMember, Ranks, timeout_of
from .base import Communicator, ShardCollectives, SingleProcess
from .gloo import Gloo
from .hybrid import Hybrid
from .native import NativeCollectives

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


def _serving(group: dist.ProcessGroup, device: torch.device) -> str:
    """The name of the backend that serves ``device`` in ``group``; ValueError where none does well."""
    backend = _backend_for(group, device.type)
    if backend is None or device.type != {"gloo": "cpu", "nccl": "cuda"}.get(backend, device.type):
        raise ValueError(
            f"dist_asgd: parameters on {device.type!r}, but the process group's backend "
            f"({dist.get_backend_config(group)}) has no fast path for that device. Pass a process_group whose "
            f"backend serves it: init_process_group('cpu:gloo,cuda:nccl') serves both."
        )
    return backend


def _own_group(ranks: Sequence[int], backend: str, like: dist.ProcessGroup, host: Gloo | None) -> dist.ProcessGroup:
    """Collective on ``ranks`` only: a group of them that waits as long as ``like`` does.

    ``host``: where they can send messages already.
    """
    _even_out(ranks, like, host)
    # Without a timeout torch would take the backend's own, half an hour, whatever the user chose for the group.
    own: dist.ProcessGroup = dist.new_group(
        list(ranks), timeout=timeout_of(like), backend=backend, use_local_synchronization=True
    )
    return own


def _even_out(ranks: Sequence[int], like: dist.ProcessGroup, host: Gloo | None) -> None:
    """Collective on ``ranks``: let all of them be in equally many groups, by groups of their own.

    By that number torch names a group that only its ranks make (distributed_c10d.py, ``_hash_ranks_to_str``): where it
    differs they wait for each other under different names, until the timeout.
    """
    mine = len(dist.distributed_c10d._world.pg_names)
    if host is not None:
        most = int(host.among(ranks).exchange(torch.tensor([mine], device="cpu"))().max())
    elif list(ranks) == dist.get_process_group_ranks(like):
        numbers: list[int] = [mine] * len(ranks)
        dist.all_gather_object(numbers, mine, group=like)
        most = max(numbers)
    else:
        return
    for _ in range(most - mine):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)


class _Tags:
    """Hands out a range of message tags to each optimizer of this process.

    Shared by the process, as the groups that it keeps apart are.
    """

    taken = 0


def _with_own_tags(group: dist.ProcessGroup, ranks: Sequence[int]) -> Gloo:
    """Collective on ``ranks``, of ``group``: with tags that no optimizer on any of them uses.

    Tags are used again after 4,095 optimizers.
    """
    # The first range is for finding one.
    meeting = Gloo(group, FIRST_TAG, ranks)
    _Tags.taken = int(meeting.exchange(torch.tensor([_Tags.taken], device="cpu"))().max()) + 1
    return Gloo(group, FIRST_TAG + (1 + _Tags.taken % (TAG_RANGES - 1) << 16), ranks)


class Communicators:
    """One communicator per kind of device, on one process group or mesh; made when first asked for.

    ``rank`` of ``world_size`` counts all ranks; ``shard_rank`` of ``num_shards`` those that hold shards of one replica,
    ``replica`` of ``num_replicas`` those that hold the same shard. Without a mesh there is one replica. ``problem`` is
    what is wrong with the arguments, for all ranks to be told.
    """

    def __init__(self, group: dist.ProcessGroup | None, mesh: DeviceMesh | None = None) -> None:
        self.problem: Exception | None = None
        try:
            axes = Axes.of(group, mesh)
        except NotAMember:
            raise
        except ValueError as error:
            self.problem = error
            axes = Axes.flat(group, mesh)
        self._axes = axes
        self._group = axes.group
        self._hybrids: dict[str, Hybrid] = {}
        self._host: Communicator | None = None
        self._background: Communicator | None = None
        self._among: dict[tuple[str, Ranks], Communicator] = {}
        self.rank, self.world_size = axes.everyone.index(axes.mine), len(axes.everyone)
        self.shard_rank, self.num_shards = axes.shard.index(axes.mine), len(axes.shard)
        self.replica, self.num_replicas = axes.replicate.index(axes.mine), len(axes.replicate)

    def _host_group(self, group: dist.ProcessGroup) -> tuple[dist.ProcessGroup, str]:
        """A group for small messages on the host, and its backend there; they never touch the accelerator."""
        backend = _backend_for(group, "cpu")
        if backend in (None, "nccl"):
            return _own_group(self.ranks, "gloo", group, None), "gloo"
        if backend != "gloo" and self.ranks != dist.get_process_group_ranks(group):
            return _own_group(self.ranks, backend, group, None), backend
        return group, backend

    @property
    def host(self) -> Communicator:
        """The communicator for control words."""
        if self._host is None:
            if self._group is None or self.world_size == 1:
                self._host = SingleProcess()
            else:
                group, backend = self._host_group(self._group)
                gloo = backend == "gloo"
                self._host = _with_own_tags(group, self.ranks) if gloo else NativeCollectives(group, averages=False)
        return self._host

    @property
    def background(self) -> Communicator:
        """For control words of threads that run beside training, on a group of its own; collective on first use.

        What times out there, while a disk is slow, closes no connection of the training loop.
        """
        host = self.host
        if self._group is None or isinstance(host, SingleProcess):
            return host
        if self._background is None:
            gloo = host if isinstance(host, Gloo) else None
            backend = "gloo" if gloo else str(_backend_for(self._group, "cpu"))
            group = _own_group(self.ranks, backend, self._group, gloo)
            self._background = _with_own_tags(group, self.ranks) if gloo else NativeCollectives(group, averages=False)
        return self._background

    def on(self, device: torch.device) -> ShardCollectives:
        """For shards on ``device``; ValueError where the group has no backend for it."""
        inside = self.among(self._axes.shard, device)
        if self.num_replicas == 1:
            return inside
        if device.type not in self._hybrids:
            self._hybrids[device.type] = Hybrid(inside, self.among(self._axes.replicate, device))
        return self._hybrids[device.type]

    def shard_rank_of(self, rank: int) -> int | None:
        """Which shard ``rank`` (of all) holds; None where it is of another replica than this rank."""
        global_rank = self._axes.everyone[rank]
        return self._axes.shard.index(global_rank) if global_rank in self._axes.shard else None

    def among(self, ranks: Ranks, device: torch.device) -> Communicator:
        """The communicator of some of all ranks, this one among them, for tensors on ``device``.

        ``ranks`` are in order, as numbers in the default group. Collective on them when they are first asked for; the
        others take no part. ValueError where the group has no backend for the device.
        """
        key = (device.type, ranks)
        if key not in self._among:
            self._among[key] = self._make_among(ranks, device)
        return self._among[key]

    def _make_among(self, ranks: Ranks, device: torch.device) -> Communicator:
        if self._group is None or len(ranks) == 1:
            return SingleProcess()
        host = self.host
        if device.type == "cpu" and isinstance(host, Gloo):
            # What is offloaded to the host is sent from there, whatever the group was made for.
            return host.among(ranks)
        backend = _serving(self._group, device)
        # NCCL has its own group: on a shared one a bucket could meet a collective of the user's in another order.
        shared = backend != "nccl" and list(ranks) == dist.get_process_group_ranks(self._group)
        group = (
            self._group if shared else _own_group(ranks, backend, self._group, host if isinstance(host, Gloo) else None)
        )
        return NativeCollectives(group, averages=backend == "nccl")

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group of all ranks and no others, in their order; None where there is none."""
        exact = self._group is not None and dist.get_process_group_ranks(self._group) == self.ranks
        return self._group if exact else None

    @property
    def ranks(self) -> list[int]:
        """All ranks, as numbers in the default group."""
        return list(self._axes.everyone)

    def scratch_bytes(self) -> int:
        """Bytes of receive buffers kept between steps, over all devices."""
        every = (self._host, self._background, *self._among.values(), *self._hybrids.values())
        return sum(communicator.scratch_bytes() for communicator in every if communicator is not None)
