"""The collectives of ranks on one host, through memory that they share; their control words stay on Gloo.

A gradient crosses a process in one copy and one sum, where Gloo takes it through the kernel twice. Nothing happens
between a launch and its wait: a rank itself copies and sums. So all ranks end their collectives in the order of
launches, and ``Reduction.is_done`` says when a wait would wait for nobody.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..labels import Label, label
from .base import Reduction, SendList, Wait
from .gloo import ControlByMessages, Gloo
from .measure import Action
from .outboxes import PIECE_BYTES, STRIPE_BYTES, outbox_bytes_for, ring_for
from .ring import Message, Part, Ring, cut
from .sums import Means

# Takes from a message what its number i holds of each rank.
Read = Callable[[int, Message], None]


class _Operation(ABC):
    """A collective that was launched; ``run`` ends it, in the order of launches."""

    has_ended = False

    @property
    @abstractmethod
    def is_published(self) -> bool:
        """Whether all that this rank sends for it is published."""

    @abstractmethod
    def run(self) -> None:
        """Wait for the other ranks, and do the rest of the work."""


class _Mean(_Operation):
    """A reduce-scatter, whose send buffer is published."""

    is_published = True

    def __init__(self, ring: Ring, message: Message, end: Callable[[Message], None]) -> None:
        self._ring, self._message, self._end = ring, message, end

    def run(self) -> None:
        self._end(self._message)
        self._ring.mark_read(self._message)


class _Stream(_Operation):
    """What each rank sends to all others, in pieces; ``own`` are this rank's, and ``read`` takes piece i of all."""

    def __init__(
        self,
        ring: Ring,
        own: Sequence[Sequence[Part]],
        messages: Sequence[Message],
        read: Read,
        ahead: bool,
    ) -> None:
        """``ahead``: publish at once what there is room for."""
        self._ring, self._own, self._messages, self._read = ring, own, messages, read
        self._num_published = 0
        if ahead:
            self._publish_ahead()

    @property
    def is_published(self) -> bool:
        return self._num_published == len(self._messages)

    def _publish_ahead(self) -> None:
        """Publish as much as there is room for."""
        while not self.is_published and self._ring.has_room(self._messages[self._num_published]):
            self._publish()

    def _publish(self) -> None:
        message = self._messages[self._num_published]
        if self._num_published < len(self._own):
            address = self._ring.address(self._ring.rank, message)
            for part in self._own[self._num_published]:
                part.copy_to(address)
        self._ring.publish(message)
        self._num_published += 1

    def run(self) -> None:
        for i, message in enumerate(self._messages):
            # Whoever waits for a piece has published its own before: so the first that waits is never waited for.
            if self._num_published == i:
                self._ring.wait_for_room(message)
                self._publish()
            self._publish_ahead()
            self._read(i, message)
            self._ring.mark_read(message)


class SharedMemory(ControlByMessages):
    """The collectives of ranks of one host. Every sum is taken in rank order, with the bits of ``Gloo``'s."""

    def __init__(self, messages: Gloo, ring: Ring, timeout_s: float) -> None:
        """``messages`` are those of the same ranks, for control words. No communication."""
        super().__init__(messages)
        self._ring = ring
        self._timeout_s = timeout_s
        self._queue: deque[_Operation] = deque()
        # Why an operation has failed here.
        self._failure: RuntimeError | None = None
        # Send buffers that are being packed, by their address.
        self._packing: dict[int, Message] = {}
        self._means = Means()
        self._peers = [rank for rank in range(self.world_size) if rank != self.rank]

    @property
    def ranks_on_host(self) -> int:
        return self.world_size

    @property
    def reads_rows(self) -> bool:
        return True

    @property
    def in_background(self) -> bool:
        return False

    def scratch_bytes(self) -> int:
        return self._ring.outbox_bytes + self._means.nbytes

    # --- the order of operations --------------------------------------------------------------------------

    def _launch(self, action: Action, operation: _Operation) -> Wait:
        self._queue.append(operation)
        return partial(self._end, action, operation)

    def _end(self, action: Action, operation: _Operation) -> None:
        """End all operations up to this one."""
        try:
            with self.meter.waiting(action, self._waited_s):
                while not operation.has_ended:
                    # Those behind it wait for the same ranks: not for the group's timeout once more each, or at exit.
                    if self._failure is not None:
                        raise self._failure
                    oldest = self._queue[0]
                    oldest.run()
                    oldest.has_ended = True
                    self._queue.popleft()
        except RuntimeError as error:
            # Without its traceback, which refers to this object.
            self._failure = error.with_traceback(None)
            self.abandon()
            raise self.peer_error(action, error) from error
        except BaseException:
            self.abandon()
            raise

    def _waited_s(self) -> float:
        """The clock of waits, which copy and sum as well: only the time in which this rank stands still counts."""
        return self._ring.waited_s

    def abandon(self) -> None:
        self._ring.abandon()

    # --- reductions ----------------------------------------------------------------------------------------

    @property
    def max_send_bytes(self) -> int:
        return STRIPE_BYTES

    def prepare(self, send_bytes: int) -> None:
        if outbox_bytes_for(send_bytes) > self._ring.outbox_bytes:
            if self._queue:
                self._end(Action.ALL_GATHER, self._queue[-1])
            self._ring = ring_for(send_bytes, self._messages, self._ring, self._timeout_s)

    def send_buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        message = self._ring.message(numel * dtype.itemsize)
        # Others may wait for what this rank has launched before, and it may have to read what lies there itself.
        while not all(operation.is_published for operation in self._queue) or self._ring.num_read < message.after:
            self._end(Action.ALL_GATHER, self._queue[0])
        try:
            if not self._ring.has_room(message):
                with self.meter.waiting(Action.REDUCE_SCATTER, self._waited_s):
                    self._ring.wait_for_room(message)
        except RuntimeError as error:
            raise self.peer_error(Action.REDUCE_SCATTER, error) from error
        buffer = self._ring.outbox(self.rank, message).view(dtype)[:numel]
        self._packing[buffer.data_ptr()] = message
        return buffer

    def reduce_scatter(self, sends: SendList, shard: Tensor, accumulate: bool, tag: int) -> Reduction:
        # The rows of the other ranks begin with that of the first of them.
        message = self._packing.pop(sends[self._peers[0]][0][1].data_ptr())
        sent_bytes = sum(row.nbytes for peer in self._peers for _, row in sends[peer])
        with self.meter.launching(Action.REDUCE_SCATTER, sent_bytes):
            self._ring.publish(message)
        end = partial(self._mean_of, sends[self.rank], shard, accumulate)
        mean = _Mean(self._ring, message, end)
        ring = self._ring
        wait = self._launch(Action.REDUCE_SCATTER, mean)
        return Reduction(wait, lambda: mean.has_ended or ring.is_published(message))

    def _mean_of(self, own: Sequence[tuple[int, Tensor]], shard: Tensor, accumulate: bool, message: Message) -> None:
        """``shard = mean`` of ``own`` ranges and the rows that others have published of ``message``, or ``+=``."""
        for peer in self._peers:
            self._ring.wait_for(peer, message)
        numel = shard.numel()
        with label(Label.MEAN):
            for at, values in own:
                every = [values] * self.world_size
                for peer in self._peers:
                    # A rank packs no row for itself.
                    first = (self.rank - (self.rank > peer)) * numel + at
                    every[peer] = self._ring.outbox(peer, message).view(values.dtype)[first : first + values.numel()]
                self._means.store(every, shard[at : at + values.numel()], accumulate)

    def all_reduce(self, values: Tensor, tag: int) -> Wait:
        """Every rank publishes all of its values, and sums all."""
        runs = cut([values], PIECE_BYTES)
        pieces = torch.split(values, PIECE_BYTES // values.itemsize)

        def read(i: int, message: Message) -> None:
            for peer in self._peers:
                self._ring.wait_for(peer, message)
            piece = pieces[i]
            every = [self._ring.outbox(rank, message)[: piece.nbytes] for rank in range(self.world_size)]
            with label(Label.MEAN):
                self._means.store([one.view(values.dtype) for one in every], piece, False)

        return self._stream(Action.ALL_REDUCE, runs, len(runs), read, len(self._peers))

    # --- gathers -------------------------------------------------------------------------------------------

    def _stream(
        self,
        action: Action,
        own: Sequence[Sequence[Part]],
        num_pieces: int,
        read: Read,
        num_readers: int,
    ) -> Wait:
        """Start to let ``num_readers`` other ranks read ``own``."""
        messages = [self._ring.message(PIECE_BYTES) for _ in range(num_pieces)]
        sent_bytes = num_readers * sum(part.nbytes for run in own for part in run)
        with self.meter.launching(action, sent_bytes):
            # What was launched before is published before.
            operation = _Stream(self._ring, own, messages, read, ahead=all(other.is_published for other in self._queue))
        return self._launch(action, operation)

    def all_gather(self, flat: Tensor, action: Action = Action.ALL_GATHER) -> Wait:
        runs = [cut([shard], PIECE_BYTES) for shard in flat.view(self.world_size, -1)]
        return self._gather(action, runs, reads=True, num_readers=len(self._peers))

    def all_gather_uneven(self, fragments: Sequence[Sequence[Tensor]]) -> Wait:
        runs = [cut(of_rank, PIECE_BYTES) for of_rank in fragments]
        return self._gather(Action.ALL_GATHER, runs, reads=True, num_readers=len(self._peers))

    def _gather(self, action: Action, runs: Sequence[Sequence[Sequence[Part]]], reads: bool, num_readers: int) -> Wait:
        """Fill ``runs[r]`` from what rank r has there, on this rank if it ``reads``, and on ``num_readers`` others."""

        def read(i: int, message: Message) -> None:
            for peer in self._peers if reads else ():
                if i < len(runs[peer]):
                    self._ring.wait_for(peer, message)
                    address = self._ring.address(peer, message)
                    for part in runs[peer][i]:
                        part.copy_from(address)

        return self._stream(action, runs[self.rank], max(map(len, runs)), read, num_readers)

    def gather(self, fragment: Tensor, places: Sequence[Tensor] | None, numels: Sequence[int], to: int | None) -> None:
        runs: list[list[list[Part]]] = []
        for rank, numel in enumerate(numels):
            if rank == self.rank:
                runs.append(cut([fragment], PIECE_BYTES))
            elif places is not None:
                runs.append(cut([places[rank]], PIECE_BYTES))
            else:
                runs.append([[]] * -(-numel * fragment.dtype.itemsize // PIECE_BYTES))
        if places is not None:
            places[self.rank].copy_(fragment)
        num_readers = len(self._peers) if to is None else int(to != self.rank)
        self._gather(Action.GATHER, runs, places is not None, num_readers)()
