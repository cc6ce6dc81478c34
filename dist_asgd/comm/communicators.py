"""The communicators of one optimizer: one per kind of device and per set of ranks, made when they are first needed.

The process groups that are made here, and the ranges of message tags, keep the messages of one optimizer apart from
those of the user and of other optimizers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from .axes import Axes, NotAMember, Ranks, timeout_of
from .base import Communicator, ShardCollectives, SingleProcess
from .board import Board
from .board import file_bytes as board_bytes
from .gloo import Gloo
from .hierarchy import Hierarchy
from .host_group import DEFAULT_TIMEOUT, HostGroup
from .hybrid import Hybrid
from .measure import Meter
from .native import NativeCollectives
from .outboxes import OUTBOX_BYTES, make_ring
from .rank_names import RankNames
from .shared_memory import SharedMemory
from .shared_pages import host_grid, on_one_host, shared_pages

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# This package uses tags from 2^30 on, because users rarely choose such large ones for their own messages. A range has
# 2^16 tags, see gloo.py.
FIRST_TAG = 1 << 30
TAG_RANGES = 1 << 12


def _backend_for(group: dist.ProcessGroup, device_type: str) -> str | None:
    """Return the name of the backend that serves ``device_type`` in ``group``, or None."""
    config = str(dist.get_backend_config(group))
    if ":" not in config:
        return config
    pairs = dict(entry.split(":", 1) for entry in config.split(","))
    return pairs.get(device_type)


def _fast_backend_for(group: dist.ProcessGroup, device: torch.device) -> str:
    """Return the name of the backend that serves ``device`` in ``group``; ValueError if none does so fast."""
    backend = _backend_for(group, device.type)
    if backend is None or device.type != {"gloo": "cpu", "nccl": "cuda"}.get(backend, device.type):
        raise ValueError(
            f"dist_asgd: parameters on {device.type!r}, but the process group's backend "
            f"({dist.get_backend_config(group)}) has no fast path for that device. Pass a process_group whose "
            f"backend serves it: init_process_group('cpu:gloo,cuda:nccl') serves both."
        )
    return backend


def _own_group(ranks: Sequence[int], backend: str, like: dist.ProcessGroup, host: Gloo | None) -> dist.ProcessGroup:
    """Make a process group of ``ranks`` with the timeout of ``like``. Collective on ``ranks`` only.

    ``host`` is a communicator over which they can already send messages, or None.
    """
    _equalise_group_counts(ranks, like, host)
    with _without_split(ranks):
        # Without this timeout torch would take the backend's default of half an hour, whatever the user chose.
        own: dist.ProcessGroup = dist.new_group(
            list(ranks), timeout=timeout_of(like), backend=backend, use_local_synchronization=True
        )
    return own


@contextmanager
def _without_split(ranks: Sequence[int]) -> Iterator[None]:
    """Let torch make a group of some ranks without the others.

    If the default group has a device bound, torch would split NCCL's communicator for it, which is collective on all
    ranks of the job (distributed_c10d.py, ``_get_split_source``): those that do not take part would never come.
    """
    default = dist.group.WORLD
    bound = None if default is None or len(ranks) == default.size() else default.bound_device_id
    if default is None or bound is None:
        yield
        return
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = bound


def _equalise_group_counts(ranks: Sequence[int], like: dist.ProcessGroup, host: Gloo | None) -> None:
    """Make groups of one rank until all of ``ranks`` are members of equally many groups. Collective on ``ranks``.

    torch puts that number into the name of a group that only its members make (distributed_c10d.py,
    ``_hash_ranks_to_str``). With different numbers they would wait for each other under different names, until the
    timeout.
    """
    own = len(dist.distributed_c10d._world.pg_names)
    if host is not None:
        most = host.among(ranks).largest([own])[0]
    elif list(ranks) == dist.get_process_group_ranks(like):
        counts: list[int] = [own] * len(ranks)
        dist.all_gather_object(counts, own, group=like)
        most = max(counts)
    else:
        return
    for _ in range(most - own):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)


class _TagRanges:
    """Counts the tag ranges in use; a global, because all optimizers of the process may send on the same group."""

    used = 0


def _with_own_tags(group: HostGroup, ranks: Sequence[int], meter: Meter) -> Gloo:
    """Return a communicator with a tag range that no optimizer on any of ``ranks`` uses. Collective on ``ranks``.

    After 4,095 optimizers a range is used again.
    """
    # The first range serves only to agree on another one.
    first = Gloo(group, FIRST_TAG, ranks, meter)
    _TagRanges.used = first.largest([_TagRanges.used])[0] + 1
    return Gloo(group, FIRST_TAG + (1 + _TagRanges.used % (TAG_RANGES - 1) << 16), ranks, meter)


def _refuse_to_be_alone() -> None:
    """Raise ValueError if a launcher has started several processes, and none of them has made a process group."""
    started = os.environ.get("WORLD_SIZE", "1")
    if dist.is_available() and dist.is_initialized():
        return
    if started.isdecimal() and int(started) > 1:
        raise ValueError(
            f"dist_asgd: WORLD_SIZE is {started}, and there is no process group: each process would train alone. Call "
            f"torch.distributed.init_process_group() before the optimizer is constructed (Accelerator() and "
            f"TrainingArguments() do so). If each is to train alone, unset WORLD_SIZE."
        )


class Communicators:
    """The communicators of one optimizer on its process group or mesh; each is made when it is first asked for.

    ``rank`` of ``world_size`` counts all ranks. ``shard_rank`` of ``num_shards`` counts the ranks that hold the shards
    of one replica, and ``replica`` of ``num_replicas`` those that hold the same shard. Without a mesh there is one
    replica.
    ``problem`` is the error in the constructor's arguments, if there is one: all ranks raise it together later.
    ``meter`` counts what is sent and waited for, and ``background_meter`` what threads beside training do of it.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, mesh: DeviceMesh | None = None, shares_memory: bool = True
    ) -> None:
        """No communication. Raises NotAMember if this rank is not in the group or mesh."""
        self._shares_memory = shares_memory
        self.meter, self.background_meter = Meter(), Meter()
        self.problem: Exception | None = None
        try:
            axes = Axes.of(group, mesh)
        except NotAMember:
            raise
        except ValueError as error:
            self.problem = error
            axes = Axes.for_reporting(group, mesh)
        if axes.group is None:
            _refuse_to_be_alone()
        self._axes = axes
        self._group = axes.group
        self._on: dict[str, ShardCollectives] = {}
        self._host: Communicator | None = None
        self._background: Communicator | None = None
        self._among: dict[tuple[str, Ranks], Communicator] = {}
        self.rank, self.world_size = axes.everyone.index(axes.this_rank), len(axes.everyone)
        self.shard_rank, self.num_shards = axes.shard.index(axes.this_rank), len(axes.shard)
        self.replica, self.num_replicas = axes.replicate.index(axes.this_rank), len(axes.replicate)

    @property
    def host(self) -> Communicator:
        """The communicator of all ranks for control words; collective on first use.

        Control words must not wait for an accelerator, so they have a group of their own beside NCCL.
        """
        if self._host is None:
            self._host = SingleProcess() if self._group is None or self.world_size == 1 else self._on_host(self._group)
        return self._host

    def share_control(self) -> None:
        """Exchange control words through memory from now on, if all ranks lie on one host. Collective.

        Called once ranks have agreed on the constructor's arguments, of which ``shared_memory`` is one.
        """
        host = self.host
        if self._shares_memory and isinstance(host, Gloo) and on_one_host(host):
            found = shared_pages(host, board_bytes(self.world_size))
            if found is not None:
                host.use_board(Board(*found, host.rank, self._timeout_s, self.meter))

    @property
    def _timeout_s(self) -> float:
        return (timeout_of(self._group) or DEFAULT_TIMEOUT).total_seconds()

    def _on_host(self, group: dist.ProcessGroup) -> Communicator:
        backend = _backend_for(group, "cpu")
        if backend == "gloo":
            return _with_own_tags(HostGroup.of(group), self.ranks, self.meter)
        if backend in (None, "nccl"):
            return _with_own_tags(HostGroup.new(self.ranks, group), self.ranks, self.meter)
        exact = self.ranks == dist.get_process_group_ranks(group)
        own = group if exact else _own_group(self.ranks, backend, group, None)
        return NativeCollectives(own, averages=False, meter=self.meter)

    @property
    def background(self) -> Communicator:
        """The communicator for control words of threads beside training (asynchronous saves); collective on first use.

        It has a group of its own: if a wait times out there because a disk is slow, the connections of the training
        loop stay open.
        """
        host = self.host
        if self._group is None or isinstance(host, SingleProcess):
            return host
        if self._background is None:
            if isinstance(host, Gloo):
                own = HostGroup.new(self.ranks, self._group)
                self._background = _with_own_tags(own, self.ranks, self.background_meter)
            else:
                backend = str(_backend_for(self._group, "cpu"))
                group = _own_group(self.ranks, backend, self._group, None)
                self._background = NativeCollectives(group, averages=False, meter=self.background_meter)
        return self._background

    def check_device(self, device: torch.device) -> None:
        """ValueError if the group has no backend for tensors on ``device``. No communication."""
        alone = self._group is None or self.world_size == 1
        if not alone and not (device.type == "cpu" and isinstance(self.host, Gloo)):
            assert self._group is not None
            _fast_backend_for(self._group, device)

    def on(self, device: torch.device) -> ShardCollectives:
        """Return the collectives for shards on ``device``. ValueError if the group has no backend for it.

        Collective when the kind of device is new.
        """
        if device.type not in self._on:
            inside = self.among(self._axes.shard, device)
            if self.num_replicas == 1:
                self._on[device.type] = inside
            else:
                self._on[device.type] = Hybrid(inside, self.among(self._axes.replicate, device))
        return self._on[device.type]

    @property
    def shard_ranks(self) -> Ranks:
        """The ranks that hold the shards of one replica, this one among them, as ranks of the default group."""
        return self._axes.shard

    def shard_rank_of(self, rank: int) -> int | None:
        """Return the number of the shard that ``rank`` of all ranks holds; None if it belongs to another replica."""
        global_rank = self._axes.everyone[rank]
        return self._axes.shard.index(global_rank) if global_rank in self._axes.shard else None

    def among(self, ranks: Ranks, device: torch.device) -> Communicator:
        """Return the communicator of ``ranks``, this one among them, for tensors on ``device``.

        ``ranks`` are ranks of the default group. Collective on them when they or the kind of device are new; other
        ranks take no part. ValueError if the group has no backend for the device.
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
            # Parameters that are offloaded to the host are sent from there, even if the group was made for GPUs.
            return self._on_host_of(host.among(ranks))
        backend = _fast_backend_for(self._group, device)
        # NCCL gets a group of its own: on the user's, one of our collectives could be paired with one of the user's if
        # ranks call them in different orders.
        shared = backend != "nccl" and list(ranks) == dist.get_process_group_ranks(self._group)
        group = (
            self._group if shared else _own_group(ranks, backend, self._group, host if isinstance(host, Gloo) else None)
        )
        return NativeCollectives(group, averages=backend == "nccl", meter=self.meter)

    def _on_host_of(self, messages: Gloo) -> Communicator:
        """Return a communicator that shares memory inside of hosts, if the ranks of ``messages`` can.

        Collective on them.
        """
        grid = host_grid(messages) if self._shares_memory else None
        if grid is None:
            return messages
        inside = messages.among([messages.ranks[rank] for rank in grid.on(grid.place(messages.rank)[0])])
        ring = make_ring(inside, OUTBOX_BYTES, self._timeout_s)
        if grid.num_hosts == 1:
            return messages if ring is None else SharedMemory(messages, ring, self._timeout_s)
        # Each host knows about its own ranks only.
        if messages.any_of(ring is None) or ring is None:
            return messages
        return Hierarchy(messages, grid, inside, ring, self._timeout_s)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group that has exactly the optimizer's ranks in their order; None if there is none."""
        exact = self._group is not None and dist.get_process_group_ranks(self._group) == self.ranks
        return self._group if exact else None

    @property
    def bound_device(self) -> torch.device | None:
        """The only accelerator that the process group serves in this process; None if none was passed to torch."""
        return None if self._group is None else self._group.bound_device_id

    @property
    def predates_group(self) -> bool:
        """Whether a default group of several ranks exists now, and did not when this was made for one process."""
        if self._group is not None or not dist.is_available():
            return False
        return dist.is_initialized() and dist.get_world_size() > 1

    @property
    def names(self) -> RankNames:
        """How errors name the optimizer's ranks."""
        return RankNames(self._axes.everyone)

    @property
    def ranks(self) -> list[int]:
        """The ranks of the optimizer, as ranks of the default group."""
        return list(self._axes.everyone)

    @property
    def ranks_on_host(self) -> int:
        """How many ranks of this host are known to be among the optimizer's, this one included."""
        return max((one.ranks_on_host for one in (self._host, *self._among.values()) if one is not None), default=1)

    def scratch_bytes(self) -> int:
        """Return the bytes of all buffers that communicators keep between steps, over all devices."""
        hybrids = [collectives for collectives in self._on.values() if isinstance(collectives, Hybrid)]
        every = (self._host, self._background, *self._among.values(), *hybrids)
        # The same one may serve several purposes.
        return sum({id(one): one.scratch_bytes() for one in every if one is not None}.values())
