"""Ranks tell each other what they are about to do, and raise together where they disagree.

Every collective call opens with one exchange of a fixed number of int64 words, so that a rank that failed, or
that called something else, is an error on all ranks instead of a hang. Only once an exchange has shown a
difference are messages of any length gathered, to say what it is.

header   the words: kind of call, discard count, problem flag, digest, then two bit masks over parameters
digest   a 62-bit hash of plain values that must be equal on all ranks
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, NoReturn

import torch

from . import Communicator
from .masks import indices_in

MASK_BITS = 62
RAISED = (ValueError, TypeError, KeyError, RuntimeError)


class CallsDiffer(RuntimeError):
    """Ranks made different collective calls at the same point."""


class CollectiveCall(IntEnum):
    """What a rank is calling; the names are those that users see in errors."""

    ROUND = 1
    CONSTRUCT = 2
    ADD_PARAM_GROUP = 3
    STEP = 4
    CLIP_GRAD_NORM = 5
    CONSOLIDATED_STATE_DICT = 6
    LOAD_STATE_DICT = 7
    AVERAGED_PARAMETERS = 8
    END_OF_AVERAGED_PARAMETERS = 9
    ZERO_GRAD = 10
    SAVE_CHECKPOINT = 11
    ASYNC_SAVE_CHECKPOINT = 12
    LOAD_CHECKPOINT = 13
    RESTORE_CHECKPOINT = 14
    EXPORT_AVERAGED = 15
    END_OF_EXPORT_AVERAGED = 16
    UNSCALE = 17

    @property
    def text(self) -> str:
        """How an error names this call."""
        return "backward()" if self is CollectiveCall.ROUND else f"{self.name.lower()}()"


def digest_of(values: object) -> int:
    """A hash of plain values (numbers, strings, tuples of them) that is the same in every process."""
    raw = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(raw, "big") >> 2


def describe_ranks(ranks: Sequence[int]) -> str:
    """``rank 3`` or ``ranks 0-2, 5``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


def _by_value(values: Sequence[object]) -> dict[object, list[int]]:
    groups: dict[object, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return groups


def values_by_rank(values: Sequence[object]) -> str:
    """Who has what: ``ranks 0, 1 have 3; rank 2 has 4``."""
    return "; ".join(
        f"{describe_ranks(ranks)} {'has' if len(ranks) == 1 else 'have'} {value}"
        for value, ranks in _by_value(values).items()
    )


@dataclass(frozen=True)
class Fingerprint:
    """Plain values that must be equal on all ranks: ``entries`` are (label, value) pairs, ``what`` names them."""

    what: str
    entries: Sequence[tuple[str, object]]
    remedy: str

    @cached_property
    def digest(self) -> int:
        """The word that stands for the entries in an exchange."""
        return digest_of(self.entries)


NO_FINGERPRINT = Fingerprint("", (), "")


class RankReports:
    """What all ranks said in one exchange; the same on every rank, so every rank decides alike."""

    def __init__(self, rows: list[list[int]], mask_words: int) -> None:
        self._rows = rows
        self._mask_words = mask_words

    def column(self, index: int) -> list[int]:
        """One header word of every rank, in rank order."""
        return [row[index] for row in self._rows]

    @property
    def calls(self) -> list[int]:
        """The kind of call of every rank."""
        return self.column(0)

    def masks(self, which: int) -> list[int]:
        """The first (0) or second (1) bit mask of every rank."""
        start = HEADER_WORDS + which * self._mask_words
        return [
            sum(word << (MASK_BITS * i) for i, word in enumerate(row[start : start + self._mask_words]))
            for row in self._rows
        ]

    def union(self, which: int) -> int:
        """The bits set on any rank."""
        union = 0
        for mask in self.masks(which):
            union |= mask
        return union


HEADER_WORDS = 4


class Agreement:
    """The exchanges of one optimizer. All methods but ``resize`` are collective."""

    def __init__(self, communicator: Communicator) -> None:
        self._comm = communicator
        self._mask_words = 0
        self.discards = 0
        self._last_indices: tuple[int, frozenset[int]] = (0, frozenset())

    def resize(self, num_params: int) -> None:
        """Set how many parameters the bit masks cover, from the next exchange on."""
        self._mask_words = -(-num_params // MASK_BITS)

    def indices(self, mask: int) -> frozenset[int]:
        """The parameters whose bits are set in ``mask``: the very same set as long as the mask does not change."""
        if self._last_indices[0] != mask:
            self._last_indices = (mask, indices_in(mask))
        return self._last_indices[1]

    def start(
        self,
        call: CollectiveCall,
        fingerprint: Fingerprint = NO_FINGERPRINT,
        masks: tuple[int, int] = (0, 0),
        problem: bool = False,
    ) -> Callable[[], RankReports]:
        """Start an exchange; calling the result waits for it. Never raises for what other ranks say."""
        low = (1 << MASK_BITS) - 1
        words = [int(call), self.discards, int(problem), fingerprint.digest]
        for mask in masks:
            words += [(mask >> (MASK_BITS * i)) & low for i in range(self._mask_words)]
        if self._comm.world_size == 1:
            return lambda: RankReports([words], self._mask_words)
        wait = self._comm.exchange(torch.tensor(words, dtype=torch.int64, device="cpu"))
        return lambda: RankReports(wait().tolist(), self._mask_words)

    def agree(
        self,
        call: CollectiveCall,
        fingerprint: Fingerprint = NO_FINGERPRINT,
        masks: tuple[int, int] = (0, 0),
        problem: Exception | None = None,
    ) -> RankReports:
        """Exchange, and raise on every rank where any has a problem, calls something else or claims other values."""
        reports = self.start(call, fingerprint, masks, problem is not None)()
        self.check(reports, fingerprint, problem)
        return reports

    def check(self, reports: RankReports, fingerprint: Fingerprint, problem: Exception | None) -> None:
        """Raise together where ``reports`` shows different calls or claims, or a problem (``problem``: this rank's)."""
        allowed = set(reports.calls) - {CollectiveCall.ROUND}
        if len(allowed) > 1:
            calls = [CollectiveCall(call).text for call in reports.calls]
            raise CallsDiffer(
                f"dist_asgd: ranks called different things at the same point: {values_by_rank(calls)}. "
                f"Every rank must make the same collective calls in the same order."
                + (f" This rank also had a problem of its own: {problem}" if problem else "")
            )
        if len(set(reports.column(1))) > 1:
            # Said once: after the next zero_grad() on all ranks they agree again.
            self.discards = max(reports.column(1))
            raise RuntimeError(
                f"dist_asgd: ranks differ in how many times zero_grad() discarded gradients: "
                f"{values_by_rank(reports.column(1))}. Every rank must call zero_grad() between the same backwards."
            )
        if any(reports.column(2)):
            self._raise_together(problem)
        if len(set(reports.column(3))) > 1:
            self._compare(fingerprint)

    def _raise_together(self, problem: Exception | None) -> NoReturn:
        """Raise every rank's problems on every rank."""
        if self._comm.world_size == 1 and problem is not None:
            raise problem
        mine = None
        if problem is not None:
            name = next((c.__name__ for c in RAISED if isinstance(problem, c)), "RuntimeError")
            text = problem.args[0] if isinstance(problem, KeyError) and problem.args else problem
            mine = (name, str(text))
        said = self._comm.exchange_objects(mine)
        failed = [entry for entry in said if entry is not None]
        lines = [
            f"{text} [on {describe_ranks(ranks)} of {self._comm.world_size}]"
            for text, ranks in _by_value([None if entry is None else entry[1] for entry in said]).items()
            if text is not None
        ]
        kind = next(c for c in RAISED if c.__name__ == failed[0][0])
        raise kind("\n".join(lines)) from problem

    def _compare(self, fingerprint: Fingerprint) -> NoReturn:
        """Raise on every rank, naming the first entry that is not the same on all."""
        said: list[Any] = self._comm.exchange_objects(list(fingerprint.entries))
        counts = [len(entries) for entries in said]
        more = f" {values_by_rank(counts)} entries." if len(set(counts)) > 1 else ""
        first = _first_difference(said)
        raise ValueError(f"dist_asgd: {fingerprint.what} differ between ranks:{more}{first} {fingerprint.remedy}")


def _first_difference(said: Sequence[Sequence[tuple[str, object]]]) -> str:
    for position in range(max(len(entries) for entries in said)):
        row = [entries[position] if position < len(entries) else ("nothing", "") for entries in said]
        if len(set(map(repr, row))) > 1:
            labels = {label for label, _ in row}
            if len(labels) == 1:
                return f" {row[0][0]}: {values_by_rank([str(value) for _, value in row])}."
            return f" entry {position}: {values_by_rank([f'{label} {value}' for label, value in row])}."
    return ""
