"""Exchanges among N ranks in ceil(log2 N) messages a rank, instead of one to every other rank.

In hop k a rank sends what it knows to the rank 2^k ahead of it, and learns what the one 2^k behind knows; after the
last hop every rank knows of all (Hensgen, Finkel & Manber 1988, "Two algorithms for barrier synchronization"). Values
that may be combined twice (maxima, unions of bits) stay of one length on the way. Rows of all ranks double with each
hop (Bruck et al. 1997, "Efficient algorithms for all-to-all communications"). All of them use the same connections,
2 log2 N of each rank.

Every message begins with a status. A rank whose wait fails sends FAILED in all messages that it still owes, so that
each rank hears of a dead peer as soon as one does, however few connections it has.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from itertools import accumulate
from typing import Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .base import PeerError
from .measure import Action, Meter

# The first element of each message. A buffer is zeros until a message arrives in it.
ARRIVED, FAILED = 1, 2
# How long a rank whose exchange has failed tries to say so to others, in seconds.
LAST_WORDS_S = 1.0

# A peer, and the tensor that is sent to it or received from it.
Message = tuple[int, Tensor]


class Messenger(Protocol):
    """What sends messages between the ranks of one group: ``Gloo``."""

    rank: int
    world_size: int
    meter: Meter

    def connect(self, peers: Iterable[int]) -> None:
        """Make sure that there are connections to ``peers``, which do the same."""
        ...

    def post(self, action: Action, tag: int, receives: Iterable[Message], sends: Sequence[Message]) -> list[dist.Work]:
        """Start messages of the collective ``action``."""
        ...

    def peer_error(self, action: Action, error: BaseException) -> PeerError:
        """Return the error for what the backend raised."""
        ...


def num_hops(world_size: int) -> int:
    """Return ceil(log2 N), the number of messages that a rank sends and receives."""
    return (world_size - 1).bit_length()


class Hops:
    """The messages of one exchange, which each rank sends on as the one before arrives. Collective.

    A receive is posted for every hop at once, so that no message has to wait for one.
    """

    def __init__(
        self,
        messenger: Messenger,
        tag: int,
        outgoing: Sequence[Tensor],
        incoming: Sequence[Tensor],
        statuses: Callable[[int], int],
        merge: Callable[[int], None] | None = None,
    ) -> None:
        """Start. Messages of all hops have the same ``tag``.

        Args:
            outgoing: the message of each hop, 1-D; only its first element may change once it is sent.
            incoming: memory for the message of each hop, which begins with a zero.
            statuses: reads the first element of the incoming message of a hop.
            merge: prepares ``outgoing[k + 1]`` when ``incoming[k]`` has arrived; called once for each hop k.
        """
        self._messenger, self._tag = messenger, tag
        self._outgoing, self._statuses, self._merge = outgoing, statuses, merge
        rank, world_size = messenger.rank, messenger.world_size
        self._ahead = [(rank + (1 << k)) % world_size for k in range(len(outgoing))]
        behind = [(rank - (1 << k)) % world_size for k in range(len(outgoing))]
        messenger.connect({*self._ahead, *behind})
        self._receives: list[dist.Work] = []
        self._sends: list[dist.Work] = []
        self._error: BaseException | None = None
        # Held while a hop is taken: a thread polls for callers that are elsewhere.
        self._lock = threading.Lock()
        try:
            self._receives = messenger.post(
                Action.EXCHANGE, tag, list(zip(behind, incoming, strict=True)), [(self._ahead[0], outgoing[0])]
            )
            self._sends.append(self._receives.pop())
        except RuntimeError as error:
            # A connection was known to be closed. ``wait`` raises; the ranks ahead must not wait for this one.
            self._fail(-1, error)

    def poll(self) -> None:
        """Send on what has arrived, without waiting for what has not. Raises nothing: ``wait`` does."""
        if self._lock.acquire(blocking=False):
            try:
                while self._receives and self._statuses(self._hop):
                    self._take()
            finally:
                self._lock.release()

    def wait(self) -> None:
        """Wait until this rank knows of all ranks, and they have been sent what it knew. PeerError if that fails."""
        with self._messenger.meter.waiting(Action.EXCHANGE):
            with self._lock:
                while self._receives:
                    self._take()
            if self._error is not None:
                raise self._messenger.peer_error(Action.EXCHANGE, self._error) from self._error
            try:
                for work in self._sends:
                    work.wait()
            except RuntimeError as error:
                raise self._messenger.peer_error(Action.EXCHANGE, error) from error

    @property
    def _hop(self) -> int:
        """The hop whose message this rank waits for."""
        return len(self._outgoing) - len(self._receives)

    def _take(self) -> None:
        """Wait for the message of a hop, and send that of the next."""
        hop = self._hop
        try:
            self._receives[0].wait()
            if self._statuses(hop) == FAILED:
                raise RuntimeError("another rank's connection failed, or its wait timed out")
            if self._merge is not None:
                self._merge(hop)
            if hop + 1 < len(self._outgoing):
                message = self._ahead[hop + 1], self._outgoing[hop + 1]
                self._sends += self._messenger.post(Action.EXCHANGE, self._tag, (), [message])
            del self._receives[0]
        except RuntimeError as error:
            self._fail(hop, error)

    def _fail(self, hop: int, error: RuntimeError) -> None:
        """Keep ``error`` for ``wait``, and tell the ranks that wait for a message after ``hop``, for a bounded time."""
        self._receives.clear()
        # Without its traceback, which refers to this object: every wait from now on raises it.
        cause = error.__cause__ if isinstance(error, PeerError) else error
        self._error = (cause or error).with_traceback(None)
        deadline = time.monotonic() + LAST_WORDS_S
        last_words: list[dist.Work] = []
        for later in range(hop + 1, len(self._outgoing)):
            self._outgoing[later][0] = FAILED
            with contextlib.suppress(RuntimeError):
                message = self._ahead[later], self._outgoing[later]
                last_words += self._messenger.post(Action.EXCHANGE, self._tag, (), [message])
        for work in last_words:
            with contextlib.suppress(RuntimeError):
                # Gloo takes no timeout of zero. One that has run out closes the connection, which says the same.
                work.wait(timedelta(seconds=max(0.01, deadline - time.monotonic())))


class Summary:
    """An exchange of words that all ranks have combined at its end: maxima of the first ones, unions of the others."""

    def __init__(self, messenger: Messenger, tag: int, words: Sequence[int], num_largest: int) -> None:
        """Start. ``words`` are integers of 64 bits; the first ``num_largest`` are compared, the others are bits."""
        hops = num_hops(messenger.world_size)
        # Arrays of numpy, because operators of torch cost several times as much on a few words.
        known = np.empty((hops + 1, 1 + len(words)), np.int64)
        known[0, 0] = ARRIVED
        known[0, 1:] = words
        arrived = np.zeros((hops, 1 + len(words)), np.int64)
        # The status is a maximum too, so that FAILED wins.
        split = 1 + num_largest

        # It refers to arrays only, so that the connections are freed with their last user, not by the collector.
        def combine(hop: int) -> None:
            before, new, after = known[hop], arrived[hop], known[hop + 1]
            np.maximum(before[:split], new[:split], out=after[:split])
            np.bitwise_or(before[split:], new[split:], out=after[split:])

        self._result = known[hops, 1:]
        outgoing, incoming = torch.from_numpy(known).unbind()[:-1], torch.from_numpy(arrived).unbind()
        self._hops = Hops(messenger, tag, outgoing, incoming, lambda hop: int(arrived[hop, 0]), combine)

    def poll(self) -> None:
        """Send on what has arrived, without waiting for what has not."""
        self._hops.poll()

    def wait(self) -> list[int]:
        """Wait for all ranks, and return the combined words. PeerError if that fails."""
        self._hops.wait()
        return cast(list[int], self._result.tolist())


def all_gather(messenger: Messenger, tag: int, own: Tensor, numels: Sequence[int]) -> list[Tensor]:
    """Return every rank's 1-D tensor on every rank, in rank order; wait for them. Collective.

    ``own`` is int64 or uint8 on the host, ``(numels[rank],)``; all ranks pass the same ``numels``.
    """
    rank, world_size = messenger.rank, messenger.world_size
    # Block j is that of the rank j behind, a status before it: what a rank knows is always the first blocks.
    starts = list(accumulate((1 + numels[(rank - j) % world_size] for j in range(world_size)), initial=0))
    blocks = own.new_zeros(starts[-1])
    blocks[0] = ARRIVED
    blocks[1 : starts[1]] = own
    distances = [1 << k for k in range(num_hops(world_size))]
    counts = [min(distance, world_size - distance) for distance in distances]
    outgoing = [blocks[: starts[count]] for count in counts]
    incoming = [blocks[starts[d] : starts[d + count]] for d, count in zip(distances, counts, strict=True)]
    array = blocks.numpy()
    Hops(messenger, tag, outgoing, incoming, lambda hop: int(array[starts[distances[hop]]])).wait()
    return [blocks[starts[j] + 1 : starts[j + 1]] for j in ((rank - r) % world_size for r in range(world_size))]


def gather(messenger: Messenger, tag: int, own: Tensor, numels: Sequence[int], to: int) -> list[Tensor] | None:
    """Return every rank's 1-D uint8 tensor on rank ``to``, in rank order, and None on the others. Collective.

    Ranks send what they have gathered along a tree with ``to`` at its root: log2 N messages of the root at most, over
    the connections that the other exchanges use. All ranks pass the same ``numels``.
    """
    rank, world_size = messenger.rank, messenger.world_size
    # This rank is ``place`` ahead of the root. It gathers for itself and the ranks up to the next sender ahead.
    place = (rank - to) % world_size
    covered = min(place & -place if place else 1 << num_hops(world_size), world_size - place)
    starts = list(accumulate((1 + numels[(rank + j) % world_size] for j in range(covered)), initial=0))
    blocks = own.new_zeros(starts[-1])
    blocks[0] = ARRIVED
    blocks[1 : starts[1]] = own
    failure: RuntimeError | None = None
    distances = [1 << k for k in range(num_hops(covered))]
    arriving = [blocks[starts[d] : starts[min(2 * d, covered)]] for d in distances]
    peers = [(rank + distance) % world_size for distance in distances]
    try:
        receives = messenger.post(Action.GATHER_OBJECTS, tag, list(zip(peers, arriving, strict=True)), ())
        with messenger.meter.waiting(Action.GATHER_OBJECTS):
            for work, message in zip(receives, arriving, strict=True):
                work.wait()
                if message[0] == FAILED:
                    raise RuntimeError("another rank's connection failed, or its wait timed out")
    except RuntimeError as error:
        failure = error
        blocks[0] = FAILED
    try:
        if place:
            behind = (rank - (place & -place)) % world_size
            works = messenger.post(Action.GATHER_OBJECTS, tag, (), [(behind, blocks)])
            with messenger.meter.waiting(Action.GATHER_OBJECTS):
                for work in works:
                    work.wait()
    except RuntimeError as error:
        failure = failure or error
    if failure is not None:
        raise messenger.peer_error(Action.GATHER_OBJECTS, failure) from failure
    if place:
        return None
    found = [blocks[starts[j] + 1 : starts[j + 1]] for j in range(world_size)]
    return [found[(r - to) % world_size] for r in range(world_size)]
