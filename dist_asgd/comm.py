"""The only module that calls collectives: one strategy per kind of backend.

``Communicator`` is the seam. ``Local`` serves one process, ``Named`` uses a backend's own reduce-scatter and
all-gather (NCCL), and ``Gloo`` builds them from peer-to-peer messages and broadcasts, because Gloo emulates the
named ones with two to three times the traffic. Every method that talks is collective: all ranks of the group
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
# Elements of a 16-bit sum that are held in float32 at a time.
SUM_NUMEL = 1 << 18

Wait = Callable[[], None]


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

    def divisor(self, dtype: torch.dtype) -> int:
        """What the caller divides gradients by as it packs them, where that saves a pass; 1: the transfer divides."""
        return 1

    @property
    def takes_short(self) -> bool:
        """Whether ``send`` may end where the payload ends, so that one parameter's gradient is sent in place."""
        return False

    @abstractmethod
    def reduce_scatter(self, send: Tensor, shard: Tensor, accumulate: bool, divided: bool, tag: int) -> Wait:
        """Start ``shard (+)= mean over ranks of this rank's part of send``.

        ``send`` is ``(world_size * shard_numel,)``, or shorter where ``takes_short``, and is only read; ``shard``
        is ``(shard_numel,)`` and is complete after the wait. ``divided``: the caller has divided by the world
        size. ``tag`` tells apart transfers that are in flight together.
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

    @property
    def takes_short(self) -> bool:
        return True

    def reduce_scatter(self, send: Tensor, shard: Tensor, accumulate: bool, divided: bool, tag: int) -> Wait:
        if accumulate:
            shard[: send.numel()].add_(send)
        else:
            shard[: send.numel()].copy_(send)
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

    def reduce_scatter(self, send: Tensor, shard: Tensor, accumulate: bool, divided: bool, tag: int) -> Wait:
        # NCCL reduces in place, into the part of ``send`` that this rank owns; others need room of their own.
        mine = send.view(self.world_size, -1)[self.rank]
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
    """Gloo on the host: peer-to-peer reduce-scatter with a local sum in rank order, all-gather by broadcasts."""

    def __init__(self, group: dist.ProcessGroup, control: dist.ProcessGroup) -> None:
        super().__init__(group, control)
        self._ranks = range(self.world_size)
        self._peers = [rank for rank in self._ranks if rank != self.rank]
        self._global = [dist.get_global_rank(group, rank) for rank in range(self.world_size)]
        self._inboxes: dict[torch.dtype, list[Tensor]] = {}
        self._bytes = 0
        self._sums = torch.empty(SUM_NUMEL)

    def scratch_bytes(self) -> int:
        return self._bytes + self._sums.nbytes

    def divisor(self, dtype: torch.dtype) -> int:
        # 16-bit gradients are summed in float32 and divided there, so that they are rounded once.
        return 1 if dtype in SIXTEEN_BIT else self.world_size

    @property
    def takes_short(self) -> bool:
        return True

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

    def reduce_scatter(self, send: Tensor, shard: Tensor, accumulate: bool, divided: bool, tag: int) -> Wait:
        shard_numel = shard.numel()
        bounds = [(min(r * shard_numel, send.numel()), min((r + 1) * shard_numel, send.numel())) for r in self._ranks]
        numel = bounds[self.rank][1] - bounds[self.rank][0]
        # The first peer's part lands where the result will be; the sum is over parts in rank order all the same.
        direct = 0 if accumulate else 1
        rows = len(self._peers) - direct
        inbox = self._inbox(shard.dtype, rows * numel) if rows * numel else None
        landing = [shard[:numel]][:direct]
        if inbox is not None:
            landing += inbox[: rows * numel].view(rows, numel).unbind(0)
        works: list[dist.Work | None] = []
        with record_function("dist_asgd::reduce_scatter"), self._guard("a reduce-scatter"):
            # Receives first: a message that finds its buffer waiting is never buffered twice.
            if numel:
                for peer, place in zip(self._peers, landing, strict=True):
                    works.append(dist.irecv(place, self._global[peer], group=self.group, tag=tag))
            for peer in self._peers:
                low, high = bounds[peer]
                if low < high:
                    works.append(dist.isend(send[low:high], self._global[peer], group=self.group, tag=tag))

        def store() -> None:
            if numel:
                parts = list(landing)
                parts.insert(self.rank, send[slice(*bounds[self.rank])])
                self._store_mean(parts, shard[:numel], accumulate, divided)
            if inbox is not None:
                self._inboxes[shard.dtype].append(inbox)

        return self._waiting(works, "a reduce-scatter", store)

    def _store_mean(self, parts: list[Tensor], shard: Tensor, accumulate: bool, divided: bool) -> None:
        """``shard (+)= mean(parts)``, summed in list order; unless accumulating, the first peer's part is ``shard``."""
        if shard.dtype in SIXTEEN_BIT:
            for start in range(0, shard.numel(), SUM_NUMEL):
                chunk = slice(start, start + SUM_NUMEL)
                total = self._sums[: shard[chunk].numel()].copy_(parts[0][chunk])
                for part in parts[1:]:
                    total.add_(part[chunk])
                total.div_(len(parts))
                if accumulate:
                    shard[chunk].add_(total.to(shard.dtype))
                else:
                    shard[chunk].copy_(total)
            return
        total = parts[0 if self.rank else 1] if accumulate else shard
        torch.add(parts[0], parts[1], out=total)
        for part in parts[2:]:
            total.add_(part)
        if not divided:
            total.div_(len(parts))
        if accumulate:
            shard.add_(total)

    def all_gather(self, flat: Tensor) -> Wait:
        parts = flat.view(self.world_size, -1)
        with record_function("dist_asgd::all_gather"), self._guard("an all-gather"):
            works = [
                dist.broadcast(parts[rank], self._global[rank], group=self.group, async_op=True)
                for rank in range(self.world_size)
            ]
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


_COLLECT_TAG = 1 << 20


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
