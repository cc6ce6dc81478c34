"""The reduce-scatter of ranks on several hosts: sums pass from host to host, and each host adds what its ranks have.

Each rank of a host works for its column (``HostGrid``): it sums the rows of the column's shards, those of its host's
ranks in rank order, on top of what the host before has sent, and sends the sums on. The last host divides, and sends
each shard's mean to its rank. So every host sends about the bucket's bytes once, whatever the number of its ranks, and
every sum is taken in rank order, with the bits of messages between all ranks.

segment  a stretch of a column's rows that travels in one message. While one is summed the next is on its way, so hosts
         work at the same time
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

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

# A segment's size: small, so that a chain of hosts is soon busy everywhere, and large beside the cost of a message.
SEGMENT_BYTES = 1 << 17


class Span(NamedTuple):
    """Elements ``[first, last)`` of the row of host ``row``, and where they begin in their segment."""

    row: int
    first: int
    last: int
    at: int


def spans_of(num_rows: int, width: int, segment_numel: int) -> list[list[Span]]:
    """Cut ``num_rows`` rows of ``width`` elements, one after the other, into segments, and these by rows."""
    segments: list[list[Span]] = []
    for start in range(0, num_rows * width, segment_numel):
        stop = min(start + segment_numel, num_rows * width)
        rows = range(start // width, (stop - 1) // width + 1)
        segments.append(
            [
                Span(row, max(start - row * width, 0), min(stop - row * width, width), max(row * width - start, 0))
                for row in rows
            ]
        )
    return segments


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
        self._spans = spans_of(links.grid.num_hosts, width, max(1, SEGMENT_BYTES // self.dtype.itemsize))
        numels = [1 + spans[-1].at + spans[-1].last - spans[-1].first for spans in self._spans]
        self._sums = links.sums.take(sum(numels), self.dtype)
        self._segments = torch.split(self._sums[: sum(numels)], numels)
        # The last host has the means of all hosts' shards, each behind its status, and the others that of their own.
        rows = links.grid.num_hosts if links.is_last else 1
        self._means = links.means.take(rows * (1 + width), self.dtype)
        self._rows = self._means[: rows * (1 + width)].view(rows, 1 + width)
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
        locals_ = range(links.grid.ranks_per_host)
        for number in locals_:
            if number != links.number:
                ring.wait_for(number, message)
        sources = [ring.outbox(number, message).view(self._dtype) for number in locals_]
        for index, spans in enumerate(self._spans):
            if links.host:
                self._partials[index].wait()
                _check(self._segments[index][0], links, links.host - 1)
            for span in spans:
                self._add(span, self._segments[index][1:], sources)
            self._send(index)
        ring.mark_read(message)
        # The last host sends no sums, and a message is waited for once only.
        links.sums.give_back(self._sums, () if links.is_last else self._works)

    def _add(self, span: Span, segment: Tensor, sources: Sequence[Tensor]) -> None:
        """Add what this host's ranks have of ``span`` to the sums in ``segment``; the last host divides them."""
        links, grid = self._links, self._links.grid
        target = grid.rank(span.row, links.number)
        for first, last, mine in self._ranges(span):
            at = span.at + first - span.first
            sums = segment[at : at + last - first]
            values = [sums] if links.host else []
            for number, rank in enumerate(grid.on(links.host)):
                if rank == target:
                    assert mine is not None
                    values.append(mine)
                else:
                    # A rank packs no row for itself.
                    row = (target - (target > rank)) * self._width
                    values.append(sources[number][row + first : row + last])
            if links.is_last:
                fold(values, self._rows[span.row, 1 + first : 1 + last], grid.num_hosts * grid.ranks_per_host)
            else:
                fold(values, sums, 1)

    def _ranges(self, span: Span) -> Iterator[tuple[int, int, Tensor | None]]:
        """The ranges of ``span``, each with what this rank itself has there, if the shard is its own."""
        if span.row != self._links.host:
            yield span.first, span.last, None
            return
        for start, values in self._own:
            first, last = max(span.first, start), min(span.last, start + values.numel())
            if first < last:
                yield first, last, values[first - start : last - start]

    def _sends(self, index: int) -> list[tuple[int, Tensor]]:
        """What is sent once segment ``index`` is summed: the sums, or the means that are complete with it."""
        links, grid = self._links, self._links.grid
        if not links.is_last:
            return [(grid.rank(links.host + 1, links.number), self._segments[index])]
        return [
            (grid.rank(span.row, links.number), self._rows[span.row])
            for span in self._spans[index]
            if span.last == self._width and span.row != links.host
        ]

    def _send(self, index: int) -> None:
        sends = self._sends(index)
        for _, message in sends:
            message[0] = ARRIVED
        self._works += self._post([], sends)
        self._num_sent = index + 1

    def cancel(self) -> None:
        self._ring.abandon()
        # In memory of their own: what another host has sent may still arrive in the others.
        for rank, message in chain.from_iterable(map(self._sends, range(self._num_sent, len(self._spans)))):
            with contextlib.suppress(RuntimeError):
                self._works += self._post([], [(rank, torch.full_like(message, FAILED))])

    @property
    def own_row(self) -> Tensor:
        """Where the mean of this rank's stripe will be, behind its status: ``(1 + width,)``."""
        return self._rows[self._links.host if self._links.is_last else 0]

    def give_back(self) -> None:
        """Give the memory of the means back; called once the mean has been read."""
        self._links.means.give_back(self._means, self._works if self._links.is_last else ())


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
