"""Messages through shared pages: each rank has an outbox in them, which it fills in a circle and the others read.

message  a range of every rank's outbox, the same range in each, with a number that counts from 1. All ranks make the
         same messages in the same order, and each fills its own range, publishes it, and reads those of the others
room     a rank may fill the range of a message once all others have read the earlier messages that lie there
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .pages import LINE_BYTES, Pages, Processes, Signals

ALIGN_BYTES = 64


def header_bytes(world_size: int) -> int:
    """The bytes before the outboxes: the proof, and three signals a rank, rounded up to whole pages of memory."""
    return -(-(1 + 3 * world_size) * LINE_BYTES // 4096) * 4096


def file_bytes(world_size: int, outbox_bytes: int) -> int:
    """The size of the whole file."""
    return header_bytes(world_size) + world_size * outbox_bytes


@dataclass(frozen=True, slots=True)
class Message:
    """Bytes ``[start, stop)`` of every outbox. ``after`` is the last message that has to be read before; 0 if none."""

    number: int
    start: int
    stop: int
    after: int


class Ring:
    """The outboxes of ``world_size`` ranks, of which this is ``rank``; ``outbox_bytes`` is the size of each.

    ``waited_s`` counts the seconds that this rank has waited for others.
    """

    def __init__(
        self, pages: Pages, rank: int, processes: Processes, world_size: int, outbox_bytes: int, timeout_s: float
    ) -> None:
        self.outbox_bytes = outbox_bytes
        self.rank = rank
        self._ranks = processes.ranks
        self._peers = [peer for peer in range(world_size) if peer != rank]
        first = header_bytes(world_size)
        self._outboxes = pages.memory[first:].view(world_size, outbox_bytes)
        self._addresses: list[int] = [outbox.data_ptr() for outbox in self._outboxes]
        self._abandoned = Signals(pages, LINE_BYTES, processes, timeout_s)
        self._published = Signals(pages, (1 + world_size) * LINE_BYTES, processes, timeout_s, self._abandoned)
        self._read = Signals(pages, (1 + 2 * world_size) * LINE_BYTES, processes, timeout_s, self._abandoned)
        self.waited_s = 0.0
        self._number = 0
        self._next_start = 0
        self._num_read = 0
        self._after = 0
        # Messages whose bytes no later message has taken, oldest first.
        self._last: deque[Message] = deque()

    def message(self, nbytes: int) -> Message:
        """Make the next message, of at most ``outbox_bytes`` bytes. All ranks make the same; nobody waits."""
        size = -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
        assert 0 < size <= self.outbox_bytes
        start = self._next_start if self._next_start + size <= self.outbox_bytes else 0
        stop = start + size
        overlapping = [other.number for other in self._last if other.start < stop and start < other.stop]
        self._after = max(overlapping, default=self._after)
        # Messages are read in order: with the last of them all earlier ones are.
        while self._last and self._last[0].number <= self._after:
            self._last.popleft()
        self._number += 1
        self._next_start = stop
        made = Message(self._number, start, stop, self._after)
        self._last.append(made)
        return made

    @property
    def num_read(self) -> int:
        """The last message that this rank has read."""
        return self._num_read

    def has_room(self, message: Message) -> bool:
        """Whether this rank may fill its range of ``message`` now."""
        # This rank reads its own outbox, too.
        own = self._num_read >= message.after
        return own and (not message.after or all(self._read.has(peer, message.after) for peer in self._peers))

    def wait_for_room(self, message: Message) -> None:
        """Wait until the others have made room; this rank has. RuntimeError if another has ended or is late."""
        assert self._num_read >= message.after
        if message.after:
            for peer in self._peers:
                self._await(self._read, peer, message.after)

    def outbox(self, rank: int, message: Message) -> Tensor:
        """The bytes of ``message`` in the outbox of ``rank``: ``(nbytes,)`` uint8, rounded up to 64 bytes."""
        return self._outboxes[rank, message.start : message.stop]

    def address(self, rank: int, message: Message) -> int:
        """Where ``outbox`` begins, for callers that copy many."""
        return self._addresses[rank] + message.start

    def abandon(self) -> None:
        """Tell the other ranks that this one was interrupted: what they wait for it may never do."""
        self._abandoned.send(self.rank, 1)

    def check_peers(self) -> None:
        """RuntimeError if another rank has abandoned the ring. Waits for nobody."""
        for peer in self._peers:
            if self._abandoned.has(peer, 1):
                raise RuntimeError(f"rank {self._ranks[peer]} was interrupted, or has failed, in such a call")

    def publish(self, message: Message) -> None:
        """Let the other ranks read this rank's range, which is filled; in the order of messages."""
        self._published.send(self.rank, message.number)

    def is_published(self, message: Message) -> bool:
        """Whether every other rank has published the message."""
        return all(self._published.has(peer, message.number) for peer in self._peers)

    def wait_for(self, peer: int, message: Message) -> None:
        """Wait until ``peer`` has published the message. RuntimeError if it has ended or is late."""
        self._await(self._published, peer, message.number)

    def _await(self, signals: Signals, peer: int, number: int) -> None:
        started = time.perf_counter()
        try:
            signals.wait_for(peer, number)
        finally:
            self.waited_s += time.perf_counter() - started

    def mark_read(self, message: Message) -> None:
        """Tell the other ranks that this one reads nothing of this message, and of those before it, any more."""
        self._num_read = message.number
        self._read.send(self.rank, message.number)


class Part(NamedTuple):
    """Bytes of a tensor that travel in one message: where they begin there, their address, and their number."""

    at: int
    address: int
    nbytes: int

    def copy_to(self, message_address: int) -> None:
        """Copy them to the message that begins at this address."""
        ctypes.memmove(message_address + self.at, self.address, self.nbytes)

    def copy_from(self, message_address: int) -> None:
        """Copy them from there."""
        ctypes.memmove(self.address, message_address + self.at, self.nbytes)


def cut(fragments: Sequence[Tensor], nbytes: int) -> list[list[Part]]:
    """Cut ``fragments``, 1-D tensors one after the other, into runs of ``nbytes`` bytes; returns the parts of each.

    Parts are addresses, because views and copies of tensors cost more than a copy of some KiB: the caller keeps the
    fragments.
    """
    runs: list[list[Part]] = []
    at = nbytes
    for fragment in fragments:
        # Refuses elements that do not lie one after the other.
        left = fragment.view(torch.uint8).numel()
        address = fragment.data_ptr()
        while left:
            if at == nbytes:
                runs.append([])
                at = 0
            size = min(left, nbytes - at)
            runs[-1].append(Part(at, address, size))
            at, address, left = at + size, address + size, left - size
    return runs
