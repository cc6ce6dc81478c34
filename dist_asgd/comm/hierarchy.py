"""The collectives of ranks on several hosts: through memory inside of each, and between hosts by one exchange of each.

Messages between all ranks would take the same bytes to a host once for each of its ranks. A thread (``progress.py``)
does what other ranks wait for, so that messages travel while the training loop computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ..labels import Label, label
from .base import Reduction, SendList, Wait
from .chain import Arrival, Buffers, Chain, Links
from .gloo import ALL_GATHER, ControlByMessages, Gloo
from .measure import Action, Meter
from .outboxes import HOSTS_STRIPE_BYTES, PIECE_BYTES, outbox_bytes_for, ring_for
from .progress import ProgressThread, Task
from .ring import Message, Part, Ring, cut
from .shared_pages import HostGrid
from .sums import store


class _ColumnGather(Task):
    """A gather's work on this rank: it passes to its host's ranks what its column has, and takes what theirs have."""

    def __init__(
        self,
        ring: Ring,
        messages: Sequence[Message],
        columns: Sequence[Sequence[Tensor]],
        runs: Sequence[Sequence[Sequence[Part]]],
        arrivals: Sequence[tuple[int, dist.Work]],
        sends: Sequence[dist.Work],
    ) -> None:
        """``columns[n]`` is what the column of this host's rank n has, and ``runs[n]`` are the pieces of that.

        ``arrivals`` are what this rank receives, in order, each with the first piece of its own run that needs it.
        """
        super().__init__()
        self._ring, self._messages, self._runs = ring, messages, runs
        self._columns = columns  # whose memory the runs are
        self._arrivals, self._sends = deque(arrivals), sends

    def run(self) -> None:
        ring, own = self._ring, self._runs[self._ring.rank]
        for i, message in enumerate(self._messages):
            while self._arrivals and self._arrivals[0][0] <= i:
                self._arrivals.popleft()[1].wait()
            ring.wait_for_room(message)
            if i < len(own):
                address = ring.address(ring.rank, message)
                for part in own[i]:
                    part.copy_to(address)
            ring.publish(message)
            for number, run in enumerate(self._runs):
                if number != ring.rank and i < len(run):
                    ring.wait_for(number, message)
                    address = ring.address(number, message)
                    for part in run[i]:
                        part.copy_from(address)
            ring.mark_read(message)
        for work in self._sends:
            work.wait()

    def cancel(self) -> None:
        # What this rank sends to others was posted when it was launched.
        self._ring.abandon()


class Hierarchy(ControlByMessages):
    """The collectives of ranks on several hosts. Every sum is taken in rank order, with the bits of ``Gloo``'s."""

    def __init__(self, messages: Gloo, grid: HostGrid, inside: Gloo, ring: Ring, timeout_s: float) -> None:
        """``inside`` are the messages of this host's ranks, and ``ring`` is theirs. No communication."""
        super().__init__(messages)
        self._inside = inside
        self._grid = grid
        self._ring = ring
        self._timeout_s = timeout_s
        self._host, self._number = grid.place(self.rank)
        self._column = [rank for rank in grid.column(self._number) if rank != self.rank]
        self._links = Links(grid, messages.metered_by(Meter()), Buffers(), Buffers())
        self._thread, self._arrivals = ProgressThread(), ProgressThread()
        # The tasks that may not have ended, oldest first.
        self._tasks: deque[Task] = deque()
        # Send buffers that are being packed, by their address.
        self._packing: dict[int, Message] = {}

    @property
    def ranks_on_host(self) -> int:
        return self._grid.ranks_per_host

    @property
    def reads_rows(self) -> bool:
        return True

    @property
    def max_send_bytes(self) -> int:
        return HOSTS_STRIPE_BYTES

    def scratch_bytes(self) -> int:
        return self._ring.outbox_bytes + self._links.sums.nbytes + self._links.means.nbytes

    def prepare(self, send_bytes: int) -> None:
        if outbox_bytes_for(send_bytes) > self._ring.outbox_bytes:
            while self._tasks:
                self._wait_for(Action.ALL_GATHER, self._tasks.popleft())
            self._ring = ring_for(send_bytes, self._inside, self._ring, self._timeout_s)

    def abandon(self) -> None:
        self._ring.abandon()

    # --- tasks ----------------------------------------------------------------------------------------------

    def _submit(self, task: Task) -> None:
        while self._tasks and self._tasks[0].has_ended:
            self._tasks.popleft()
        self._tasks.append(task)
        self._thread.submit(task)

    def _wait_for(self, action: Action, task: Task) -> None:
        self._waiting(action, partial(task.wait, self._ring.check_peers))

    def _waiting(self, action: Action, wait: Wait) -> None:
        try:
            with self.meter.waiting(action):
                wait()
        except RuntimeError as error:
            raise self.peer_error(action, error) from error

    # --- reductions -----------------------------------------------------------------------------------------

    def send_buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        message = self._ring.message(numel * dtype.itemsize)

        def make_room() -> None:
            # This rank's thread has to read what lies there, too.
            while self._ring.num_read < message.after:
                if not self._tasks:
                    raise RuntimeError("this rank was interrupted in an earlier call")
                self._tasks.popleft().wait(self._ring.check_peers)
            self._ring.wait_for_room(message)

        if not self._ring.has_room(message):
            self._waiting(Action.REDUCE_SCATTER, make_room)
        buffer = self._ring.outbox(self._number, message).view(dtype)[:numel]
        self._packing[buffer.data_ptr()] = message
        return buffer

    def reduce_scatter(self, sends: SendList, shard: Tensor, accumulate: bool, tag: int) -> Reduction:
        # The rows of the other ranks begin with that of the first of them.
        first = sends[0 if self.rank else 1][0][1]
        message = self._packing.pop(first.data_ptr())
        own = sends[self.rank]
        others = self._grid.ranks_per_host - 1
        self._messages.connect(self._column)
        links, ring = self._links, self._ring
        try:
            chain = Chain(links, ring, message, own, shard.numel(), first.dtype, tag)
            arrival = None if links.is_last else Arrival(links, ring, chain.own_row, tag)
        except RuntimeError as error:
            raise self.peer_error(Action.REDUCE_SCATTER, error) from error
        read_bytes = others * self._grid.num_hosts * shard.numel() * first.dtype.itemsize
        with self.meter.launching(Action.REDUCE_SCATTER, chain.sent_bytes + read_bytes):
            self._submit(chain)
            if arrival is not None:
                self._arrivals.submit(arrival)
        awaited = arrival or chain

        def wait() -> None:
            self._wait_for(Action.REDUCE_SCATTER, awaited)
            mean = chain.own_row[1:]
            with label(Label.MEAN):
                for start, values in own:
                    stretch = slice(start, start + values.numel())
                    store(mean[stretch], shard[stretch], accumulate)
            chain.give_back()

        return Reduction(wait, lambda: awaited.has_ended)

    def all_reduce(self, values: Tensor, tag: int) -> Wait:
        return self._messages.all_reduce(values, tag)

    # --- gathers --------------------------------------------------------------------------------------------

    def all_gather(self, flat: Tensor, action: Action = Action.ALL_GATHER) -> Wait:
        return self._gather(action, [[shard] for shard in flat.view(self.world_size, -1)])

    def all_gather_uneven(self, fragments: Sequence[Sequence[Tensor]]) -> Wait:
        return self._gather(Action.ALL_GATHER, fragments)

    def _gather(self, action: Action, fragments: Sequence[Sequence[Tensor]]) -> Wait:
        """Fill ``fragments`` on every rank, a column's between hosts and then inside of each."""
        filled = [[tensor for tensor in of_rank if tensor.numel()] for of_rank in fragments]
        self._messages.connect(self._column)
        # Each rank's own come first, and then those of the hosts behind it: no host is asked by all at once.
        hosts = [(self._host + i) % self._grid.num_hosts for i in range(self._grid.num_hosts)]
        columns = [
            [tensor for host in hosts for tensor in filled[self._grid.rank(host, number)]]
            for number in range(self._grid.ranks_per_host)
        ]
        runs = [cut(column, PIECE_BYTES) for column in columns]
        mates = [self._grid.rank(host, self._number) for host in hosts[1:]]
        receives = [(mate, tensor) for mate in mates for tensor in filled[mate]]
        sends = [(mate, tensor) for mate in mates for tensor in filled[self.rank]]
        works = self._messages.post(action, ALL_GATHER, receives, sends)
        at = sum(tensor.nbytes for tensor in filled[self.rank])
        arrivals: list[tuple[int, dist.Work]] = []
        for (_, tensor), work in zip(receives, works, strict=False):
            arrivals.append((at // PIECE_BYTES, work))
            at += tensor.nbytes
        messages = [self._ring.message(PIECE_BYTES) for _ in range(max(map(len, runs)))]
        task = _ColumnGather(self._ring, messages, columns, runs, arrivals, works[len(receives) :])
        with self.meter.launching(action, at * (self._grid.ranks_per_host - 1)):
            self._submit(task)
        return partial(self._wait_for, action, task)

    def gather(self, fragment: Tensor, places: Sequence[Tensor] | None, numels: Sequence[int], to: int | None) -> None:
        if to is not None or places is None:
            self._messages.gather(fragment, places, numels, to)
            return
        places[self.rank].copy_(fragment)
        self._gather(Action.GATHER, [[place] for place in places])()
