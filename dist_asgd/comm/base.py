"""The communication seam: the collectives that the optimizer asks of a backend, and the version for one process.

The modules of this package implement ``ShardCollectives`` and ``Communicator`` once per kind of backend, and
``Communicators`` picks one by device. Everything above this package calls these two interfaces and never
``torch.distributed``. Methods that communicate are collective: every rank of the group calls them in the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .rank_names import RankNames

# Blocks until a transfer is complete; it is called once, and raises PeerError if the transfer failed.
Wait = Callable[[], None]
# For each rank, the ranges that go into its shard: (first element in that shard, 1-D tensor).
SendList = Sequence[Sequence[tuple[int, Tensor]]]


def _done() -> None:
    """The wait of a transfer that has already finished."""


class PeerError(RuntimeError):
    """A collective failed: a peer died, was cut off, or did not arrive within the group's timeout."""


class PendingTable:
    """A table with one row of words for each rank, which is on its way: calling it waits, and returns the table.

    ``table`` is what has arrived so far, zeros elsewhere; None if that cannot be seen.
    """

    __slots__ = ("_wait", "table")

    def __init__(self, wait: Callable[[], Tensor], table: Tensor | None = None) -> None:
        self._wait = wait
        self.table = table

    def __call__(self) -> Tensor:
        return self._wait()

    def missing(self) -> list[int]:
        """Return the ranks whose rows have not arrived, if a first word of 0 means so, by position in the group."""
        return [] if self.table is None else (self.table[:, 0] == 0).nonzero().flatten().tolist()


class ShardCollectives(ABC):
    """Collectives between the ranks that hold different shards, for tensors on one kind of device.

    ``rank`` of ``world_size`` is the number of this rank's shard. Callers own the tensors that they pass, and keep
    them alive until they have called the returned wait. Buffers that an implementation needs for itself it keeps
    between steps, because memory that is touched for the first time is slow.
    """

    rank: int
    world_size: int

    @property
    def contiguous(self) -> bool:
        """Whether the ranges of a transfer must form one flat buffer, with one range of equal size per rank."""
        return False

    @abstractmethod
    def reduce_scatter(self, sends: SendList, shard: Tensor, accumulate: bool, tag: int) -> Wait:
        """Start ``shard = mean over ranks of their sends to it``, or ``shard +=`` that if ``accumulate``.

        Args:
            sends: ``sends[r]`` lists the ranges for the shard of rank r. All ranks list the same ranges. Tensors are
                only read, and must not change before the wait. Elements that no range covers keep their value.
            shard: ``(shard_numel,)``; complete after the wait.
            accumulate: add to ``shard`` instead of overwriting it.
            tag: distinguishes transfers that are in flight together.
        """

    @abstractmethod
    def all_gather(self, flat: Tensor) -> Wait:
        """Start filling ``flat`` ``(world_size * shard_numel,)`` in place, from every rank's own shard of it."""

    @abstractmethod
    def gather(self, fragment: Tensor, places: Sequence[Tensor] | None, numels: Sequence[int], to: int | None) -> None:
        """Copy every rank's 1-D ``fragment`` into ``places`` on rank ``to`` (None: on all ranks), and wait for it.

        A receiving rank needs no memory beside ``places``, and the others at most that of one fragment more.

        Args:
            fragment: ``(numels[rank],)``.
            places: one 1-D tensor per rank, ``(numels[r],)`` for rank r; None on ranks that receive nothing.
            numels: how many elements each rank sends, the same list on all ranks. Ranks that send none may take no
                part in any message.
            to: the receiving rank.
        """

    @abstractmethod
    def gather_rows(self, row: Tensor) -> Tensor:
        """Return every rank's ``row`` ``(n,)``, a few numbers on the device, as ``(num_ranks, n)``.

        The result includes the ranks of other replicas. Clipping and gradient scalers call it.
        """

    def scratch_bytes(self) -> int:
        """Return the bytes of the buffers that are kept between steps."""
        return 0


class Communicator(ShardCollectives):
    """The collectives of one group of ranks, whatever their tensors are.

    ``ranks`` are the group's ranks as ranks of the default group, in the group's order; ``ranks[rank]`` is this one.
    """

    ranks: Sequence[int]

    @abstractmethod
    def all_reduce(self, values: Tensor, tag: int) -> Wait:
        """Start ``values = mean over ranks`` in place; ``values`` is 1-D, and all ranks get the same bits.

        ``tag`` distinguishes transfers that are in flight together.
        """

    @abstractmethod
    def all_gather_uneven(self, fragments: Sequence[Sequence[Tensor]]) -> Wait:
        """Start filling ``fragments[r]``, a list of 1-D tensors, on every rank with the ones that rank r has.

        All ranks pass the same sizes. If ``contiguous``, each list has one tensor of one size, and all of them are
        consecutive in one flat buffer.
        """

    @abstractmethod
    def exchange(self, words: Tensor) -> PendingTable:
        """Start an all-gather of ``words`` ``(n,)``, int64 on the host; the returned call gives ``(world_size, n)``."""

    @abstractmethod
    def exchange_objects(self, value: Any) -> list[Any]:
        """Return all ranks' picklable values in rank order. Construction and errors call it, never a step."""


class SingleProcess(Communicator):
    """The collectives of a group of one: copies, and nothing is sent."""

    rank = 0
    world_size = 1
    ranks = (0,)

    def reduce_scatter(self, sends: SendList, shard: Tensor, accumulate: bool, tag: int) -> Wait:
        for start, source in sends[0]:
            target = shard[start : start + source.numel()]
            if accumulate:
                target.add_(source)
            else:
                target.copy_(source)
        return _done

    def all_reduce(self, values: Tensor, tag: int) -> Wait:
        return _done

    def all_gather(self, flat: Tensor) -> Wait:
        return _done

    def all_gather_uneven(self, fragments: Sequence[Sequence[Tensor]]) -> Wait:
        return _done

    def gather(self, fragment: Tensor, places: Sequence[Tensor] | None, numels: Sequence[int], to: int | None) -> None:
        if places is not None:
            places[0].copy_(fragment)

    def gather_rows(self, row: Tensor) -> Tensor:
        return row.unsqueeze(0)

    def exchange(self, words: Tensor) -> PendingTable:
        return PendingTable(lambda: words.unsqueeze(0))

    def exchange_objects(self, value: Any) -> list[Any]:
        return [value]


class GroupCommunicator(Communicator):
    """The base of the communicators that really send: they belong to a process group, and their peers can fail."""

    def __init__(self, group: dist.ProcessGroup, ranks: Sequence[int] | None = None) -> None:
        """``ranks`` are those that take part, as ranks of the default group; None: all of the group."""
        self.group = group
        self.ranks = list(ranks or dist.get_process_group_ranks(group))
        self.rank, self.world_size = self.ranks.index(dist.get_rank()), len(self.ranks)

    def peer_error(self, action: str, error: RuntimeError) -> PeerError:
        """Return the PeerError for an ``error`` that the backend raised during ``action``; the caller raises it."""
        return PeerError(
            f"dist_asgd: {action} failed on {RankNames(self.ranks).place(self.rank)}: a peer has died, was cut off, or "
            f"did not arrive within the process group's timeout (if it has fewer batches, pass the optimizer to "
            f"torch's Join). Parameters and state may differ between ranks now: restart the job from its last "
            f"checkpoint. The backend said: {error}"
        )
