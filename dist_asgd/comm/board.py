"""The board: control words of ranks on one host, in memory that they share instead of in messages.

Every rank writes its words into a row of its own and raises its signal; whoever waits for all signals reads all rows.
So an exchange is one write and some reads of memory, and nobody has to be at work for another's words to arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .base import PendingSummary, peer_error
from .measure import Action, Meter
from .pages import LINE_BYTES, Pages, Processes, Signals

# How many words an exchange may have: enough for the masks of 15,000 parameters. Longer ones go through messages.
MAX_WORDS = 512
# The rows of an exchange are written again in the one after the next. Whoever starts that has waited for the one in
# between, whose signals say that all others have read the first.
_NUM_ROWS = 2


def file_bytes(world_size: int) -> int:
    """The size of the file: the proof, two signals a rank, and the rows."""
    return LINE_BYTES * (1 + 2 * world_size) + _NUM_ROWS * world_size * MAX_WORDS * 8


class Board:
    """The rows of all ranks. Exchanges follow each other, the same on all ranks."""

    def __init__(self, pages: Pages, processes: Processes, rank: int, timeout_s: float, meter: Meter) -> None:
        """``rank`` is this one among the ranks of ``processes``; ``meter`` counts. No communication."""
        self._meter = meter
        self._rank, self._ranks = rank, processes.ranks
        self._world_size = world_size = len(processes.ranks)
        self._peers = [peer for peer in range(world_size) if peer != rank]
        # A rank whose wait has failed makes no further exchange, and says so here.
        self._failed = Signals(pages, LINE_BYTES, processes, timeout_s)
        self._written = Signals(pages, LINE_BYTES * (1 + world_size), processes, timeout_s, self._failed)
        rows = pages.memory[LINE_BYTES * (1 + 2 * world_size) :].numpy().view(np.int64)
        self._rows = rows.reshape(_NUM_ROWS, world_size, MAX_WORDS)
        self._number = 0
        self._last_read = 0

    def summarise(self, words: Sequence[int], num_largest: int) -> PendingSummary:
        """Start to combine ``words`` of all ranks, at most ``MAX_WORDS``; as ``Communicator.summarise``."""
        number = self._write(words)
        combine = partial(self._combine, number, len(words), num_largest)
        return PendingSummary(combine, None, SignalRoll(partial(self._missing, number)))

    def all_gather(self, words: Tensor) -> Tensor:
        """Return the ``words`` ``(n,)`` of all ranks, ``(world_size, n)``, int64 on the host. Waits for all ranks.

        At most ``MAX_WORDS``.
        """
        return torch.from_numpy(self._read(self._write(words.numpy()), words.numel()).copy())

    def _write(self, words: Sequence[int] | np.ndarray[Any, Any]) -> int:
        """Write this rank's row, and return the number of the exchange."""
        if self._last_read != self._number:
            # The wait for the last exchange was interrupted: others may still read the rows that come now.
            self._wait_for_all(self._number)
        self._number += 1
        # Every other rank reads the row.
        with self._meter.launching(Action.EXCHANGE, (self._world_size - 1) * 8 * len(words)):
            self._rows[self._number % _NUM_ROWS, self._rank, : len(words)] = words
            self._written.send(self._rank, self._number)
        return self._number

    def _read(self, number: int, num_words: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Wait for the rows of all ranks, which are there until the exchange after the next."""
        self._wait_for_all(number)
        return self._rows[number % _NUM_ROWS, :, :num_words]

    def _combine(self, number: int, num_words: int, num_largest: int) -> list[int]:
        rows = self._read(number, num_words)
        combined = np.bitwise_or.reduce(rows, axis=0)
        combined[:num_largest] = rows[:, :num_largest].max(axis=0)
        return cast(list[int], combined.tolist())

    def _wait_for_all(self, number: int) -> None:
        try:
            with self._meter.waiting(Action.EXCHANGE):
                for peer in self._peers:
                    self._written.wait_for(peer, number)
                # One that has failed takes part in nothing more, although its words are here. Asked last: it may have
                # failed while this rank waited for another.
                for peer in self._peers:
                    if self._failed.has(peer, 1):
                        raise RuntimeError(f"rank {self._ranks[peer]} has failed in an exchange before")
        except RuntimeError as error:
            # The late ones shall not take this exchange for complete, and then wait for this rank in the next.
            self._failed.send(self._rank, 1)
            raise peer_error(self._ranks, self._rank, Action.EXCHANGE, error) from error
        self._last_read = number

    def _missing(self, number: int) -> list[int]:
        return [rank for rank in range(self._world_size) if not self._written.has(rank, number)]


class SignalRoll:
    """The ranks that have not come to an exchange, as ``Roll`` has them: signals tell, and nobody has to write."""

    def __init__(self, missing: Callable[[], list[int]]) -> None:
        self.missing = missing

    def write(self) -> None:
        """Do nothing: a rank that waits has written its words before."""

    def erase(self) -> None:
        """Do nothing: there is nothing to erase."""
