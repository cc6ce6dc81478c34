"""The reduce-scatter of ranks on several hosts: sums pass from host to host, and each host adds what its ranks have.

Each rank of a host works for its column (``HostGrid``): it sums the rows of the column's shards, those of its host's
ranks in rank order, on top of what the host before has sent, and sends the sums on. The last host divides, and sends
each shard's mean to its rank. So every host sends about the bucket's bytes once, whatever the number of its ranks, and
every sum is taken in rank order, with the bits of messages between all ranks.

segment  rows of a column that travel in one message. While one is summed the next is on its way, so that hosts work at
         the same time
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from .dissemination import ARRIVED, FAILED
from .gloo import BUCKET_TAGS, Gloo
from .measure import Action
from .progress import Task
from .ring import Message, Ring
from .shared_pages import HostGrid
from .sums import fold, sum_dtype

# The least size of a segment, unless all rows are smaller: a message costs about what it takes to sum so much.
SEGMENT_BYTES = 1 << 16


class Buffers:
    """Memory for sums and messages, kept for later transfers: what is touched for the first time is slow."""

    def __init__(self) -> None:
        self._free: list[tuple[Tensor, Sequence[dist.Work]]] = []
        self.nbytes = 0

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return memory ``(numel,)`` or more that nobody uses. RuntimeError if a message that reads it has failed."""
        # The other thread may give one back meanwhile, behind these.
        sizes = [(buffer.numel(), i) for i, (buffer, _) in enumerate(self._free) if buffer.dtype == dtype]
        fitting = [(size, i) for size, i in sizes if size >= numel]
        if fitting:
            buffer, works = self._free.pop(min(fitting)[1])
            # They were sent long ago: nobody waits here but for a peer that has failed.
            for work in works:
                work.wait()
            return buffer
        made = torch.empty(numel, dtype=dtype, device="cpu")
        self.nbytes += made.nbytes
        return made

    def give_back(self, buffer: Tensor, works: Sequence[dist.Work] = ()) -> None:
        """Take ``buffer`` back, which ``works`` still read."""
        self._free.append((buffer, works))


@dataclass(frozen=True, slots=True)
class Links:
    """What the transfers of one communicator have in common: the ranks by host, their messages, and memory.

    ``host`` and ``number`` are this rank's place. ``messages`` counts nothing: the thread must not change the loop's
    counters.
    """

    grid: HostGrid
    messages: Gloo
    sums: Buffers
    means: Buffers

    @property
    def host(self) -> int:
        return self.grid.place(self.messages.rank)[0]

    @property
    def number(self) -> int:
        return self.grid.place(self.messages.rank)[1]

    @property
    def is_last(self) -> bool:
        """Whether this rank's host is the last one, which divides."""
        return self.host == self.grid.num_hosts - 1


class Chain(Task):
    """One transfer's sums on this rank, and their messages. Its constructor posts those of the host before."""

    def __init__(
        self,
        links: Links,
        ring: Ring,
        message: Message,
        own: Sequence[tuple[int, Tensor]],
        width: int,
        dtype: torch.dtype,
        tag: int,
    ) -> None:
        """No waits; RuntimeError if the backend fails.

        Args:
            links: those of the communicator.
            ring: the host's.
            message: the send buffer that this rank has packed: rows of ``width`` elements for all other ranks.
            own: this rank's gradients for its own shard: ranges as in ``ShardCollectives.reduce_scatter``.
            width: the number of elements of the shards' stripe.
            dtype: of the send buffers.
            tag: of the bucket.
        """
        super().__init__()
        self._links, self._ring, self._message, self._own = links, ring, message, own
        self._width, self._dtype, self._tag = width, dtype, tag % BUCKET_TAGS
        self.dtype = sum_dtype(dtype)
        num_rows = links.grid.num_hosts
        step = max(1, SEGMENT_BYTES // max(1, width * self.dtype.itemsize))
        self._rows_of = [range(first, min(first + step, num_rows)) for first in range(0, num_rows, step)]
        numels = [1 + len(rows) * width for rows in self._rows_of]
        self._sums = links.sums.take(sum(numels), self.dtype)
        self._segments = torch.split(self._sums[: sum(numels)], numels)
        # The last host has the means of all hosts' shards, each behind its status, and the others that of their own.
        num_means = num_rows if links.is_last else 1
        self._memory = links.means.take(num_means * (1 + width), self.dtype)
        self._means = self._memory[: num_means * (1 + width)].view(num_means, 1 + width)
        self._num_sent = 0
        self._works: list[dist.Work] = []
        self._partials: list[dist.Work] = []
        if links.host:
            before = links.grid.rank(links.host - 1, links.number)
            for segment in self._segments:
                segment[0] = 0
            self._partials = self._post([(before, segment) for segment in self._segments], [])

    @property
    def sent_bytes(self) -> int:
        """How many bytes this rank sends to other hosts."""
        rows = self._links.grid.num_hosts - self._links.is_last
        return rows * self._width * self.dtype.itemsize

    def _post(self, receives: Sequence[tuple[int, Tensor]], sends: Sequence[tuple[int, Tensor]]) -> list[dist.Work]:
        return self._links.messages.post(Action.REDUCE_SCATTER, self._tag, receives, sends)

    def run(self) -> None:
        ring, message, links = self._ring, self._message, self._links
        ring.publish(message)
        numbers = range(links.grid.ranks_per_host)
        for number in numbers:
            if number != links.number:
                ring.wait_for(number, message)
        sources = [ring.outbox(number, message).view(self._dtype) for number in numbers]
        for index, rows in enumerate(self._rows_of):
            if links.host:
                self._partials[index].wait()
                _check(self._segments[index][0], links, links.host - 1)
            for row, sums in zip(rows, self._segments[index][1:].view(len(rows), -1), strict=True):
                self._add(row, sums, sources)
            self._send(index)
        ring.mark_read(message)
        # The last host sends no sums, and a message is waited for once only.
        links.sums.give_back(self._sums, () if links.is_last else self._works)

    def _add(self, row: int, sums: Tensor, sources: Sequence[Tensor]) -> None:
        """Add what this host's ranks have for the shard on host ``row`` to ``sums``; the last host divides them."""
        links, grid = self._links, self._links.grid
        target = grid.rank(row, links.number)
        for first, last, mine in self._ranges(row):
            values = [sums[first:last]] if links.host else []
            for number, rank in enumerate(grid.on(links.host)):
                if rank == target:
                    assert mine is not None
                    values.append(mine)
                else:
                    # A rank packs no row for itself.
                    at = (target - (target > rank)) * self._width
                    values.append(sources[number][at + first : at + last])
            if links.is_last:
                fold(values, self._means[row, 1 + first : 1 + last], grid.num_hosts * grid.ranks_per_host)
            else:
                fold(values, sums[first:last], 1)

    def _ranges(self, row: int) -> Iterator[tuple[int, int, Tensor | None]]:
        """The ranges of a row that are summed, each with what this rank itself has there, if the shard is its own."""
        if row != self._links.host:
            yield 0, self._width, None
            return
        for start, values in self._own:
            yield start, start + values.numel(), values

    def _sends(self, index: int) -> list[tuple[int, Tensor]]:
        """What is sent once segment ``index`` is summed: the sums, or the means of other hosts' shards."""
        links, grid = self._links, self._links.grid
        if not links.is_last:
            return [(grid.rank(links.host + 1, links.number), self._segments[index])]
        return [(grid.rank(row, links.number), self._means[row]) for row in self._rows_of[index] if row != links.host]

    def _send(self, index: int) -> None:
        sends = self._sends(index)
        for _, message in sends:
            message[0] = ARRIVED
        self._works += self._post([], sends)
        self._num_sent = index + 1

    def cancel(self) -> None:
        self._ring.abandon()
        # In memory of their own: what another host has sent may still arrive in the others.
        for rank, message in chain.from_iterable(map(self._sends, range(self._num_sent, len(self._rows_of)))):
            with contextlib.suppress(RuntimeError):
                self._works += self._post([], [(rank, torch.full_like(message, FAILED))])

    @property
    def own_row(self) -> Tensor:
        """Where the mean of this rank's stripe will be, behind its status: ``(1 + width,)``."""
        return self._means[self._links.host if self._links.is_last else 0]

    def give_back(self) -> None:
        """Give the memory of the means back; called once the mean has been read."""
        self._links.means.give_back(self._memory, self._works if self._links.is_last else ())


class Arrival(Task):
    """The mean of this rank's stripe, on its way from the last host."""

    def __init__(self, links: Links, ring: Ring, row: Tensor, tag: int) -> None:
        """Post the message into ``row``, as in ``Chain.own_row``. No waits; RuntimeError if the backend fails."""
        super().__init__()
        self._links, self._ring, self._row = links, ring, row
        row[0] = 0
        last = links.grid.rank(links.grid.num_hosts - 1, links.number)
        (self._work,) = links.messages.post(Action.REDUCE_SCATTER, tag % BUCKET_TAGS, [(last, row)], [])

    def run(self) -> None:
        self._work.wait()
        _check(self._row[0], self._links, self._links.grid.num_hosts - 1)

    def cancel(self) -> None:
        # Ranks of this host whose messages come from a rank that will send none hear of it by this.
        self._ring.abandon()


def _check(status: Tensor, links: Links, host: int) -> None:
    """RuntimeError if a message from the rank of this column on ``host`` says that it has failed."""
    if status.item() != ARRIVED:
        rank = links.messages.ranks[links.grid.rank(host, links.number)]
        raise RuntimeError(f"rank {rank} has failed, or waits for a rank that has")
