"""The communication seam: the collectives that the optimizer asks of a backend, and the version for one process.

The modules of this package implement ``ShardCollectives`` and ``Communicator`` once per kind of backend, and
``Communicators`` picks one by device. Everything above this package calls these two interfaces and never
``torch.distributed``. Methods that communicate are collective: every rank of the group calls them in the same order.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .measure import Action, Meter
from .rank_names import RankNames

# Blocks until a transfer is complete; it is called once, and raises PeerError if the transfer failed.
Wait = Callable[[], None]
ReduceScalars = Literal["sum", "max", "min"]


@dataclass(frozen=True, slots=True)
class Reduction:
    """A reduce-scatter on its way: ``is_done`` says whether ``wait`` would return without waiting on the host."""

    wait: Wait
    is_done: Callable[[], bool]


# For each rank, the ranges that go into its shard: (first element in that shard, 1-D tensor). For backends that are
# ``contiguous`` one range for all shards.
SendList = Sequence[Sequence[tuple[int, Tensor]]]


def _done() -> None:
    """The wait of a transfer that has already finished."""


class PeerError(RuntimeError):
    """A collective failed: a peer died, was cut off, or did not arrive within the group's timeout."""


class Attendance(Protocol):
    """Knows the ranks that wait in one exchange; see ``Roll``."""

    def write(self) -> None:
        """Note that this rank waits."""
        ...

    def missing(self) -> list[int]:
        """Return the ranks that have not noted to wait, by position in the group."""
        ...

    def erase(self) -> None:
        """Forget all notes; called when the wait is over."""
        ...


class PendingSummary:
    """Words of all ranks, combined, that are on their way: calling it waits, and returns them.

    PeerError if the wait fails. ``note_waiting`` and ``missing`` are for ranks that have waited for long, or in vain.
    """

    def __init__(
        self, wait: Callable[[], list[int]], poll: Callable[[], None] | None = None, roll: Attendance | None = None
    ) -> None:
        """``roll`` is that of this exchange, if its ranks have one."""
        self._wait, self._poll, self._roll = wait, poll, roll

    def __call__(self) -> list[int]:
        words = self._wait()
        if self._roll is not None:
            with contextlib.suppress(RuntimeError):
                self._roll.erase()
        return words

    def poll(self) -> None:
        """Send on what has arrived, without waiting: called now and then by callers that wait much later."""
        if self._poll is not None:
            self._poll()

    def note_waiting(self) -> None:
        """Let the other ranks know that this one waits here. Not collective."""
        # A store that fails went with its host: nothing more can be known.
        if self._roll is not None:
            with contextlib.suppress(RuntimeError):
                self._roll.write()

    def missing(self) -> list[int]:
        """Return the ranks that have not noted to wait here, by position in the group; [] if nobody can tell."""
        if self._roll is not None:
            with contextlib.suppress(RuntimeError):
                return self._roll.missing()
        return []


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
        """Whether a transfer takes one flat buffer, the shards of all ranks in order, instead of ranges by rank."""
        return False

    @property
    def reads_rows(self) -> bool:
        """Whether other ranks read send buffers: those of ``row_layout`` then, whose ranges ``sends[r]`` lists."""
        return False

    @property
    def waits_to_launch(self) -> bool:
        """Whether a reduce-scatter, when it starts, may wait for the one before it to arrive."""
        return False

    @property
    def gathers_contiguous(self) -> bool:
        """Whether gathers take equal parts of all ranks; those of ``all_gather_uneven`` are one flat buffer then."""
        return self.contiguous

    @property
    def in_background(self) -> bool:
        """Whether messages travel between a launch and its wait. If not, other ranks wait for this one's waits."""
        return True

    @property
    def max_send_bytes(self) -> int | None:
        """How long a send buffer should be at most; None: as long as buckets are."""
        return None

    def prepare(self, send_bytes: int) -> None:
        """Make room for send buffers of that size, if they are this object's. Collective; called before any is used."""
        return

    def abandon(self) -> None:
        """Let other ranks fail that wait for this one, which was interrupted; called before it tells them why."""
        return

    def send_buffer(self, numel: int, dtype: torch.dtype) -> Tensor | None:
        """Return memory ``(numel,)`` to pack the next reduce-scatter in; None if it may be packed anywhere.

        It may wait until the other ranks have read what was there. It is this object's again once the reduce-scatter
        has started.
        """
        return None

    @abstractmethod
    def reduce_scatter(self, sends: SendList, shard: Tensor, accumulate: bool, tag: int) -> Reduction:
        """Start ``shard = mean over ranks of their sends to it``, or ``shard +=`` that if ``accumulate``.

        Args:
            sends: ``sends[r]`` lists the ranges for the shard of rank r. Tensors are only read, and must not change
                before the wait. All ranks list the same ranges, and elements that none covers keep their value. If
                ``reads_rows``, the send buffer has one range for each other rank, and ``sends[rank]`` what this rank
                adds to its shard itself, in ranges that no other needs to know.
                If ``contiguous``, the only entry of ``sends[0]`` is the flat buffer with the shards of all ranks, which
                may be overwritten.
            shard: ``(shard_numel,)``; complete after the wait.
            accumulate: add to ``shard`` instead of overwriting it.
            tag: distinguishes transfers that are in flight together.
        """

    @abstractmethod
    def all_gather(self, flat: Tensor, action: Action = Action.ALL_GATHER) -> Wait:
        """Start filling ``flat`` ``(world_size * shard_numel,)`` in place, from every rank's own shard of it.

        ``action`` says what it counts as, and its name in a PeerError: ``Action.GATHER`` if it is not of parameters.
        """

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
    def reduce_scalars(self, values: Tensor, op: ReduceScalars) -> Tensor:
        """Return the sum, maximum or minimum of every rank's ``values`` ``(n,)``, the same bits on all ranks.

        ``values`` are a few numbers on the device, and may be overwritten. The result includes the ranks of other
        replicas; nobody waits for a device. Clipping and gradient scalers call it.
        """

    def scratch_bytes(self) -> int:
        """Return the bytes of the buffers that are kept between steps."""
        return 0


class Communicator(ShardCollectives):
    """The collectives of one group of ranks, whatever their tensors are.

    ``ranks`` are the group's ranks as ranks of the default group, in the group's order; ``ranks[rank]`` is this one.
    """

    ranks: Sequence[int]

    @property
    def ranks_on_host(self) -> int:
        """How many of the ranks lie on this one's host, itself included; 1 if that is not known."""
        return 1

    @abstractmethod
    def all_reduce(self, values: Tensor, tag: int) -> Wait:
        """Start ``values = mean over ranks`` in place; ``values`` is 1-D, and all ranks get the same bits.

        ``tag`` distinguishes transfers that are in flight together.
        """

    @abstractmethod
    def all_gather_uneven(self, fragments: Sequence[Sequence[Tensor]]) -> Wait:
        """Start filling ``fragments[r]``, a list of 1-D tensors, on every rank with the ones that rank r has.

        All ranks pass the same sizes. If ``gathers_contiguous``, the only tensor is one flat buffer, with one fragment
        of equal size for each rank.
        """

    @abstractmethod
    def summarise(self, words: Sequence[int], num_largest: int) -> PendingSummary:
        """Start to combine ``words``, integers of 64 bits, of all ranks.

        The result has the largest of each of the first ``num_largest`` words, and the union of the bits of each other
        one. All ranks pass words of one length.
        """

    def largest(self, values: Sequence[int]) -> list[int]:
        """Return the largest of each of ``values`` among all ranks: integers of 64 bits. Waits for all ranks."""
        return self.summarise(values, len(values))()

    def any_of(self, value: bool) -> bool:
        """Return whether ``value`` is true on any rank. Waits for all ranks."""
        return bool(self.largest([int(value)])[0])

    def differing(self, words: Tensor, takes_part: bool = True) -> list[int]:
        """Return the positions at which ``words`` ``(n,)``, int64 on the host, are not equal on all ranks.

        Waits for all ranks. The words of ranks that do not take part do not count.
        """
        # The smallest is the complement of the largest complement.
        count = words.numel()
        both = [*words.tolist(), *(~words).tolist()] if takes_part else [-(1 << 63)] * (2 * count)
        found = self.summarise(both, 2 * count)()
        return [i for i in range(count) if found[i] != ~found[count + i]]

    @abstractmethod
    def exchange(self, words: Tensor) -> Tensor:
        """Return every rank's ``words`` ``(n,)``, int64 on the host, as ``(world_size, n)``. Waits for all ranks.

        What is sent grows with the number of ranks: errors and construction call it, never a step.
        """

    @abstractmethod
    def exchange_objects(self, value: Any) -> list[Any]:
        """Return all ranks' picklable values in rank order. Construction and errors call it, never a step."""

    @abstractmethod
    def gather_objects(self, value: Any, to: int) -> list[Any] | None:
        """Return all ranks' picklable values on rank ``to``, in rank order, and None on the other ranks.

        Rank ``to`` gets its own value back as it is, without pickling.
        """


class SingleProcess(Communicator):
    """The collectives of a group of one: copies, and nothing is sent."""

    rank = 0
    world_size = 1
    ranks = (0,)

    def reduce_scatter(self, sends: SendList, shard: Tensor, accumulate: bool, tag: int) -> Reduction:
        for start, source in sends[0]:
            target = shard[start : start + source.numel()]
            if accumulate:
                target.add_(source)
            else:
                target.copy_(source)
        return Reduction(_done, lambda: True)

    def all_reduce(self, values: Tensor, tag: int) -> Wait:
        return _done

    def all_gather(self, flat: Tensor, action: Action = Action.ALL_GATHER) -> Wait:
        return _done

    def all_gather_uneven(self, fragments: Sequence[Sequence[Tensor]]) -> Wait:
        return _done

    def gather(self, fragment: Tensor, places: Sequence[Tensor] | None, numels: Sequence[int], to: int | None) -> None:
        if places is not None:
            places[0].copy_(fragment)

    def reduce_scalars(self, values: Tensor, op: ReduceScalars) -> Tensor:
        return values

    def summarise(self, words: Sequence[int], num_largest: int) -> PendingSummary:
        return PendingSummary(lambda: list(words))

    def exchange(self, words: Tensor) -> Tensor:
        return words.unsqueeze(0)

    def exchange_objects(self, value: Any) -> list[Any]:
        return [value]

    def gather_objects(self, value: Any, to: int) -> list[Any] | None:
        return [value]


class GroupCommunicator(Communicator):
    """The base of the communicators that really send: they belong to a process group, and their peers can fail."""

    def __init__(self, ranks: Sequence[int], meter: Meter | None = None) -> None:
        """``ranks`` are those that take part, as ranks of the default group.

        What is sent and waited for is counted by ``meter``, or by one of its own.
        """
        self.ranks = list(ranks)
        self.meter = meter or Meter()
        self.rank, self.world_size = self.ranks.index(dist.get_rank()), len(self.ranks)

    def peer_error(self, action: Action | str, error: BaseException) -> PeerError:
        """Return the PeerError for an ``error`` that the backend raised during ``action``; the caller raises it."""
        return peer_error(self.ranks, self.rank, action, error)


def peer_error(ranks: Sequence[int], rank: int, action: Action | str, error: BaseException) -> PeerError:
    """Return the PeerError of ``ranks[rank]`` for an ``error`` that the backend raised during ``action``."""
    return PeerError(
        f"dist_asgd: {action} failed on {RankNames(ranks).place(rank)}: a peer has died, was cut off, or "
        f"did not arrive within the process group's timeout (if it has fewer batches, pass the optimizer to "
        f"torch's Join). Parameters and state may differ between ranks now: restart the job from its last "
        f"checkpoint. The backend said: {error}"
    )
