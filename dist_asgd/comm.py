"""The only module that calls collectives: one strategy per kind of backend.

``Communicator`` is the seam. ``Local`` serves one process, ``Named`` uses a backend's own reduce-scatter and
all-gather (NCCL), and ``Gloo`` builds them from peer-to-peer messages, because Gloo emulates the named ones with
two to three times the traffic. Every method that talks is collective: all ranks of the group
call it, in the same order. The mean over ranks is a sum in rank order on Gloo, whatever arrives first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.profiler import record_function

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
# Elements that are summed and divided at a time: they stay in a core's cache in between.
SUM_NUMEL = 1 << 16

Wait = Callable[[], None]
Parts = Sequence[Sequence[tuple[int, Tensor]]]


def _done() -> None:
    """The wait of a transfer that has already finished."""


class PeerError(RuntimeError):
    """A collective failed: a peer died, was cut off, or did not arrive within the group's timeout."""


@contextmanager
def _peers(action: str, rank: int, world_size: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, PeerError):
            raise
        raise PeerError(
            f"dist_asgd: {action} failed on rank {rank} of {world_size}: a peer has died, was cut off, or did not "
            f"arrive within the process group's timeout. Parameters and state may differ between ranks now: "
            f"restart the job from its last checkpoint. The backend said: {error}"
        ) from error


class Communicator(ABC):
    """The collectives of one process group for tensors of one kind of device.

    ``rank`` and ``world_size`` are those of the group. Buffers are the caller's, and stay alive until the
    returned wait has been called; what a strategy itself needs it keeps between steps.
    """

    rank: int
    world_size: int

    @property
    def contiguous(self) -> bool:
        """Whether ``reduce_scatter`` wants one flat buffer of ``world_size * shard_numel``, one part a rank."""
        return False

    @abstractmethod
    def reduce_scatter(self, parts: Parts, shard: Tensor, accumulate: bool, tag: int) -> Wait:
        """Start ``shard (+)= mean over ranks of what they send for it``.

        ``parts[r]`` lists what goes into the shard of rank r, as (start in that shard, 1-D tensor), with the same
        places on every rank; elements that no part covers are left alone. Parts are only read, and must stay as
        they are until the wait. ``shard`` is ``(shard_numel,)`` and complete after the wait. ``tag`` tells apart
        transfers that are in flight together.
        """

    @abstractmethod
    def all_gather(self, flat: Tensor) -> Wait:
        """Start filling ``flat`` ``(world_size * shard_numel,)`` in place from every rank's shard of it."""

    @abstractmethod
    def collect(self, shard: Tensor, pieces: Sequence[Tensor] | None, to: int | None) -> None:
        """Bring every rank's ``shard`` to rank ``to`` (None: all), into ``pieces``: one ``(shard_numel,)`` a rank."""

    @abstractmethod
    def gather_rows(self, row: Tensor) -> Tensor:
        """Every rank's small ``row`` ``(n,)`` on this communicator's device, as ``(world_size, n)``."""

    @abstractmethod
    def exchange(self, words: Tensor) -> Callable[[], Tensor]:
        """Start an all-gather of int64 ``words`` ``(n,)`` on the host; calling the result gives ``(world_size, n)``."""

    @abstractmethod
    def exchange_objects(self, value: Any) -> list[Any]:
        """All ranks' picklable values, in rank order. For errors and construction, never on the hot path."""

    def scratch_bytes(self) -> int:
        """Bytes of the buffers that this strategy keeps between steps."""
        return 0


class Local(Communicator):
    """One process: nothing to send."""

    rank = 0
    world_size = 1

    def reduce_scatter(self, parts: Parts, shard: Tensor, accumulate: bool, tag: int) -> Wait:
        for start, part in parts[0]:
            place = shard[start : start + part.numel()]
            if accumulate:
                place.add_(part)
            else:
                place.copy_(part)
        return _done

    def all_gather(self, flat: Tensor) -> Wait:
        return _done

    def collect(self, shard: Tensor, pieces: Sequence[Tensor] | None, to: int | None) -> None:
        if pieces is not None:
            pieces[0].copy_(shard)

    def gather_rows(self, row: Tensor) -> Tensor:
        return row.unsqueeze(0)

    def exchange(self, words: Tensor) -> Callable[[], Tensor]:
        return lambda: words.unsqueeze(0)

    def exchange_objects(self, value: Any) -> list[Any]:
        return [value]


class _Grouped(Communicator):
    """What the strategies that really communicate share: the group, and its host-side side group."""

    def __init__(self, group: dist.ProcessGroup, control: dist.ProcessGroup) -> None:
        self.group = group
        self.control = control
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def _guard(self, action: str) -> Any:
        return _peers(action, self.rank, self.world_size)

    def _waiting(self, works: Sequence[dist.Work | None], action: str, then: Wait = _done) -> Wait:
        def wait() -> None:
            with self._guard(action):
                for work in works:
                    if work is not None:
                        work.wait()
            then()

        return wait

    def gather_rows(self, row: Tensor) -> Tensor:
        table = row.repeat(self.world_size, 1)
        with self._guard("a gather of norms"):
            dist.all_gather(list(table.unbind(0)), row, group=self.group)
        return table

    def exchange(self, words: Tensor) -> Callable[[], Tensor]:
        # Pre-filled with this rank's own words, so that a group that moves nothing (``fake``) agrees with itself.
        table = words.repeat(self.world_size, 1)
        with self._guard("a control exchange"):
            work = dist.all_gather(list(table.unbind(0)), words, group=self.control, async_op=True)

        def wait() -> Tensor:
            with self._guard("a control exchange"):
                if work is not None:
                    work.wait()
            return table

        return wait

    def exchange_objects(self, value: Any) -> list[Any]:
        values: list[Any] = [value] * self.world_size
        with self._guard("an exchange of messages"):
            dist.all_gather_object(values, value, group=self.control)
        return values


class Named(_Grouped):
    """Backends whose own reduce-scatter and all-gather are the fast ones: NCCL."""

    def __init__(self, group: dist.ProcessGroup, control: dist.ProcessGroup, averages: bool) -> None:
        super().__init__(group, control)
        self._averages = averages
        # torch 2.13 renamed both; 2.11 knows only the old names.
        self._reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        self._gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    @property
    def contiguous(self) -> bool:
        return True

    def reduce_scatter(self, parts: Parts, shard: Tensor, accumulate: bool, tag: int) -> Wait:
        # NCCL reduces in place, into this rank's own part; others need room of their own.
        mine = parts[self.rank][0][1]
        send = parts[0][0][1].as_strided((self.world_size * mine.numel(),), (1,))
        out = mine if self._averages else torch.empty_like(mine)
        op = dist.ReduceOp.AVG if self._averages else dist.ReduceOp.SUM
        with record_function("dist_asgd::reduce_scatter"), self._guard("a reduce-scatter"):
            work = self._reduce(out, send, op=op, group=self.group, async_op=True)

        def store() -> None:
            if not self._averages:
                out.div_(self.world_size)
            if accumulate:
                shard.add_(out)
            else:
                shard.copy_(out)

        return self._waiting([work], "a reduce-scatter", store)

    def all_gather(self, flat: Tensor) -> Wait:
        mine = flat.view(self.world_size, -1)[self.rank]
        with record_function("dist_asgd::all_gather"), self._guard("an all-gather"):
            work = self._gather(flat, mine, group=self.group, async_op=True)
        return self._waiting([work], "an all-gather")

    def collect(self, shard: Tensor, pieces: Sequence[Tensor] | None, to: int | None) -> None:
        with self._guard("a gather"):
            if to is None:
                dist.all_gather(list(cast(Sequence[Tensor], pieces)), shard, group=self.group)
            else:
                target = dist.get_global_rank(self.group, to)
                dist.gather(shard, None if pieces is None else list(pieces), dst=target, group=self.group)


class Gloo(_Grouped):
    """Gloo on the host: both collectives from peer-to-peer messages, the sums local and in rank order."""

    def __init__(self, group: dist.ProcessGroup, control: dist.ProcessGroup) -> None:
        super().__init__(group, control)
        self._ranks = range(self.world_size)
        self._peers = [rank for rank in self._ranks if rank != self.rank]
        self._global = [dist.get_global_rank(group, rank) for rank in range(self.world_size)]
        self._inboxes: dict[torch.dtype, list[Tensor]] = {}
        self._bytes = 0
        self._sums: Tensor | None = None

    def scratch_bytes(self) -> int:
        return self._bytes + (0 if self._sums is None else self._sums.nbytes)

    def _inbox(self, dtype: torch.dtype, numel: int) -> Tensor:
        """A buffer for peers' parts, kept for other buckets; the free one that fits best, or a new one."""
        free = self._inboxes.setdefault(dtype, [])
        fitting = [inbox for inbox in free if inbox.numel() >= numel]
        if fitting:
            best = min(fitting, key=Tensor.numel)
            self._inboxes[dtype] = [inbox for inbox in free if inbox is not best]
            return best
        inbox = torch.empty(numel, dtype=dtype)
        self._bytes += inbox.nbytes
        return inbox

    def reduce_scatter(self, parts: Parts, shard: Tensor, accumulate: bool, tag: int) -> Wait:
        mine = parts[self.rank]
        numel = sum(part.numel() for _, part in mine)
        # The first peer's parts land where the result will be; the sum is in rank order all the same.
        rows = len(self._peers) - (0 if accumulate else 1)
        inbox = self._inbox(shard.dtype, rows * numel) if rows * numel else None
        landing: list[list[Tensor]] = []
        if not accumulate:
            landing.append([shard[start : start + part.numel()] for start, part in mine])
        if inbox is not None:
            sizes = [part.numel() for _, part in mine]
            landing += [list(row.split(sizes)) for row in inbox[: rows * numel].view(rows, numel)]
        works: list[dist.Work | None] = []
        with record_function("dist_asgd::reduce_scatter"), self._guard("a reduce-scatter"):
            # Receives first: a message that finds its buffer waiting is never buffered twice.
            for peer, places in zip(self._peers, landing, strict=True) if mine else ():
                works += [dist.irecv(place, self._global[peer], group=self.group, tag=tag) for place in places]
            for peer in self._peers:
                works += [dist.isend(part, self._global[peer], group=self.group, tag=tag) for _, part in parts[peer]]

        def store() -> None:
            for i, (start, part) in enumerate(mine):
                received = [places[i] for places in landing]
                received.insert(self.rank, part)
                self._store_mean(received, shard[start : start + part.numel()], accumulate)
            if inbox is not None:
                self._inboxes[shard.dtype].append(inbox)

        return self._waiting(works, "a reduce-scatter", store)

    def _store_mean(self, parts: list[Tensor], shard: Tensor, accumulate: bool) -> None:
        """``shard (+)= mean(parts)``, summed in list order; unless accumulating, the first peer's part is ``shard``.

        In stretches that stay in cache. 16-bit gradients are summed in float32, so that they are rounded once.
        """
        narrow = shard.dtype in SIXTEEN_BIT
        if narrow and self._sums is None:
            self._sums = torch.empty(SUM_NUMEL)
        for first in range(0, shard.numel(), SUM_NUMEL):
            stretch = slice(first, first + SUM_NUMEL)
            place = shard[stretch]
            chunks = [part[stretch] for part in parts]
            if narrow and self._sums is not None:
                total = self._sums[: place.numel()].copy_(chunks[0])
                total.add_(chunks[1])
            else:
                total = torch.add(chunks[0], chunks[1], out=chunks[0 if self.rank else 1] if accumulate else place)
            for chunk in chunks[2:]:
                total.add_(chunk)
            total.div_(len(chunks))
            if accumulate:
                place.add_(total.to(place.dtype) if narrow else total)
            elif narrow:
                place.copy_(total)

    def all_gather(self, flat: Tensor) -> Wait:
        parts = flat.view(self.world_size, -1)
        works: list[dist.Work | None] = []
        with record_function("dist_asgd::all_gather"), self._guard("an all-gather"):
            for peer in self._peers:
                works.append(dist.irecv(parts[peer], self._global[peer], group=self.group, tag=_GATHER_TAG))
            for peer in self._peers:
                works.append(dist.isend(parts[self.rank], self._global[peer], group=self.group, tag=_GATHER_TAG))
        return self._waiting(works, "an all-gather")

    def collect(self, shard: Tensor, pieces: Sequence[Tensor] | None, to: int | None) -> None:
        with self._guard("a gather"):
            if pieces is not None:
                pieces[self.rank].copy_(shard)
                works = [
                    dist.irecv(pieces[peer], self._global[peer], group=self.group, tag=_COLLECT_TAG)
                    for peer in self._peers
                ]
            else:
                works = []
            for target in self._peers if to is None else [to]:
                if target != self.rank:
                    works.append(dist.isend(shard, self._global[target], group=self.group, tag=_COLLECT_TAG))
            for work in works:
                if work is not None:
                    work.wait()


# Messages of one tag between two ranks keep their order; these are beyond the tags of buckets.
_COLLECT_TAG = 1 << 20
_GATHER_TAG = _COLLECT_TAG + 1


def _backend_for(group: dist.ProcessGroup, device_type: str) -> str | None:
    """The name of the backend that serves ``device_type`` in ``group``, or None."""
    config = str(dist.get_backend_config(group))
    if ":" not in config:
        return config
    pairs = dict(entry.split(":", 1) for entry in config.split(","))
    return pairs.get(device_type)


class Communicators:
    """One communicator per kind of device, on one process group; made when first asked for."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self._group = group
        self._by_device: dict[str, Communicator] = {}
        self._control: dist.ProcessGroup | None = None
        if group is not None:
            self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
            if self.rank < 0:
                raise ValueError(
                    "dist_asgd: this process is not a member of process_group. Construct the optimizer only on "
                    "the ranks of its group."
                )
        else:
            self.rank, self.world_size = 0, 1

    def _side_group(self, group: dist.ProcessGroup) -> dist.ProcessGroup:
        """A group for small messages on the host; control traffic never touches the accelerator."""
        if self._control is None:
            backend = _backend_for(group, "cpu")
            if backend is not None and backend != "nccl":
                self._control = group
            else:
                self._control = dist.new_group(
                    dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True
                )
        return self._control

    @property
    def host(self) -> Communicator:
        """The communicator for control words."""
        return self.on(torch.device("cpu"), control_only=True)

    def on(self, device: torch.device, control_only: bool = False) -> Communicator:
        """The communicator for tensors on ``device``; ValueError where the group has no backend for it."""
        if self._group is None or self.world_size == 1:
            return self._by_device.setdefault("", Local())
        key = "control" if control_only else device.type
        if key not in self._by_device:
            control = self._side_group(self._group)
            group = control if control_only else self._group
            backend = _backend_for(group, device.type)
            if (
                backend is None
                or (backend == "gloo" and device.type != "cpu")
                or (backend == "nccl" and device.type != "cuda")
            ):
                raise ValueError(
                    f"dist_asgd: parameters on {device.type!r}, but the process group's backend "
                    f"({dist.get_backend_config(group)}) has no fast path for that device. Pass a process_group "
                    f"whose backend serves it: init_process_group('cpu:gloo,cuda:nccl') serves both."
                )
            self._by_device[key] = (
                Gloo(group, control) if backend == "gloo" else Named(group, control, averages=backend == "nccl")
            )
        return self._by_device[key]

    def scratch_bytes(self) -> int:
        """Bytes of receive buffers kept between steps, over all devices."""
        return sum(communicator.scratch_bytes() for communicator in self._by_device.values())
