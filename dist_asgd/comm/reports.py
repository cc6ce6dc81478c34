"""What each rank reports in an exchange, and what all ranks know of all reports after it.

joined   a rank without further inputs inside torch's ``Join``; it takes part in the calls of the other, *active* ranks
row      the words of one rank: a header and two bit masks
header   the first four words: the kind of call, the discard count, flags (a problem, rebound parameters), and a digest
digest   a 62-bit hash of plain values that must be equal on all ranks (a fingerprint)
masks    the words after the header: two bit masks with one bit per parameter, 62 bits to a word
summary  the rows of all ranks combined: as long for sixteen thousand ranks as for two
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

# Where the words of the header lie in a row.
CALL, DISCARDS, FLAGS, DIGEST = range(4)
HEADER_WORDS = 4
# The bits of the flags.
PROBLEM, REBOUND, CLEARED = 1, 2, 4
# The discard count of a rank that has joined, or that Join has interrupted; it stays below 0 if zero_grad() counts on.
UNKNOWN_DISCARDS = -(1 << 40)
# Bits per word of a mask: words are int64, and must stay positive.
MASK_BITS = 62
_MASK = (1 << MASK_BITS) - 1
# Below every word that a rank reports.
_NOTHING = -(1 << 63)
# The words of a summary that are maxima: discards and digest, each with its complement, and the complement of the first
# active rank. Unions follow: the calls, the flags, and the masks.
NUM_LARGEST = 5
_NUM_UNIONS = 2


class CollectiveCall(IntEnum):
    """The collective call that a rank makes. Errors show the names to users."""

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
    ADOPT = 18
    GRADIENT = 19
    UNFREEZE = 20
    JOINED = 21
    END_OF_JOIN = 22
    STATE_DICT = 23
    OVERLAP_FORWARD = 24
    UPDATE_TRIGGER = 25
    UPDATE_BATCH_NORM = 26

    @property
    def text(self) -> str:
        """The name of this call in an error."""
        if self is CollectiveCall.ADOPT:
            return "a call after parameters or param_groups were changed"
        if self is CollectiveCall.UNFREEZE:
            return "a call after frozen parameters became trained ones"
        if self is CollectiveCall.UPDATE_TRIGGER:
            return "NonMonotonicTrigger.update()"
        if self is CollectiveCall.GRADIENT:
            return "an operator on p.grad"
        if self is CollectiveCall.JOINED:
            return "nothing more: no inputs are left"
        return "backward()" if self is CollectiveCall.ROUND else f"{self.name.lower()}()"


def digest_of(values: object) -> int:
    """Return a 62-bit hash of plain values (numbers, strings, tuples of them) that is the same in every process."""
    raw = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(raw, "big") >> 2


@lru_cache(maxsize=64)
def _calls_in(bits: int) -> frozenset[CollectiveCall]:
    return frozenset(call for call in CollectiveCall if bits >> call & 1)


# Kept, because most steps exchange the masks of the step before.
@lru_cache(maxsize=64)
def _to_words(mask: int, num_words: int) -> tuple[int, ...]:
    return tuple((mask >> (MASK_BITS * i)) & _MASK for i in range(num_words))


@lru_cache(maxsize=64)
def _to_mask(words: tuple[int, ...]) -> int:
    mask = 0
    for word in reversed(words):
        mask = mask << MASK_BITS | word
    return mask


@dataclass(frozen=True, slots=True)
class RankReport:
    """What one rank reports: the fields of a row. Each mask has ``mask_words`` words of it."""

    rank: int
    call: CollectiveCall
    discards: int
    flags: int
    digest: int
    masks: tuple[int, int]
    mask_words: int

    @property
    def row(self) -> list[int]:
        """The words that describe this rank alone."""
        first, second = (_to_words(mask, self.mask_words) for mask in self.masks)
        return [int(self.call), self.discards, self.flags, self.digest, *first, *second]

    @property
    def summary(self) -> list[int]:
        """The words that are combined with those of all ranks, ``NUM_LARGEST`` of them by their maxima."""
        known = self.discards if self.discards >= 0 else None
        active = self.call is not CollectiveCall.JOINED
        largest = [
            _NOTHING if known is None else known,
            _NOTHING if known is None else ~known,
            # Ranks that have joined take over whatever the active ones agree on.
            self.digest if active else _NOTHING,
            ~self.digest if active else _NOTHING,
            ~self.rank if active else _NOTHING,
        ]
        unions = [1 << self.call, self.flags]
        first, second = self.masks
        absent = ~first & (1 << MASK_BITS * self.mask_words) - 1 if active else 0
        for mask in (first, absent, second, first & second):
            unions += _to_words(mask, self.mask_words)
        return [*largest, *unions]


class RankReports:
    """The reports of all ranks in one exchange: their summary, and the row of each if somebody asks.

    All of it is the same on every rank, so every rank draws the same conclusion from it. ``calls`` are the calls that
    ranks make, ``first_active`` is the first rank that has not joined. ``common`` has the bits that are set in the
    first mask of every active rank, ``in_both`` those that are set in both masks of any rank.
    """

    def __init__(
        self, words: list[int], mask_words: int, world_size: int, gather_rows: Callable[[], list[list[int]]]
    ) -> None:
        """``gather_rows`` is collective, and called once at most."""
        discards, discards_complement, digest, digest_complement, active_complement = words[:NUM_LARGEST]
        self._discards = (~discards_complement, discards) if discards != _NOTHING else (0, 0)
        self._digests = (~digest_complement, digest) if digest != _NOTHING else (0, 0)
        self.first_active = ~active_complement
        calls, self._flags = words[NUM_LARGEST : NUM_LARGEST + _NUM_UNIONS]
        self.calls = _calls_in(calls)
        start = NUM_LARGEST + _NUM_UNIONS
        first, absent, second, both = (
            _to_mask(tuple(words[start + i * mask_words : start + (i + 1) * mask_words])) for i in range(4)
        )
        self._unions, self.common, self.in_both = (first, second), first & ~absent, both
        self._mask_words = mask_words
        self._world_size = world_size
        self._gather_rows = gather_rows
        self._rows: list[list[int]] | None = None

    # --- what the summary says ----------------------------------------------------------------------------

    @property
    def is_uniform(self) -> bool:
        """Whether all ranks make the same call, in the same state, and none has anything to tell."""
        alike = len(self.calls) == 1 and CollectiveCall.JOINED not in self.calls
        return alike and not (self._flags or self.discards_differ or self.digests_differ)

    @property
    def problem(self) -> bool:
        """Whether any rank has a problem."""
        return bool(self._flags & PROBLEM)

    @property
    def rebound(self) -> bool:
        """Whether parameters were rebound on any rank since the last step."""
        return bool(self._flags & REBOUND)

    @property
    def cleared(self) -> bool:
        """Whether a user of any rank took gradients out of ``p.grad``."""
        return bool(self._flags & CLEARED)

    @property
    def discards(self) -> int:
        """The highest discard count of a rank that knows it; 0 if none does."""
        return self._discards[1]

    @property
    def discards_differ(self) -> bool:
        """Whether ranks that know their discard counts have different ones."""
        return self._discards[0] != self._discards[1]

    @property
    def digests_differ(self) -> bool:
        """Whether active ranks have different digests."""
        return self._digests[0] != self._digests[1]

    @property
    def joined(self) -> tuple[int, ...]:
        """The ranks that have joined: none outside of torch's ``Join``, inside of which this is collective."""
        if CollectiveCall.JOINED not in self.calls:
            return ()
        return tuple(rank for rank, call in enumerate(self.column(CALL)) if call == CollectiveCall.JOINED)

    @property
    def active(self) -> tuple[int, ...]:
        """The ranks that have not joined, as ``joined``."""
        joined = set(self.joined)
        return tuple(rank for rank in range(self._world_size) if rank not in joined)

    def union(self, which: int) -> int:
        """Return the bits that are set in the first (0) or second (1) mask of any rank."""
        return self._unions[which]

    # --- the rows: collective the first time, for errors and for Join ---------------------------------------

    def column(self, index: int) -> list[int]:
        """Return one header word of every rank, in rank order. Collective."""
        column = [row[index] for row in self._all_rows]
        if index == DISCARDS:
            # Ranks whose count is unknown get the one that is known.
            return [self.discards if word < 0 else word for word in column]
        return column

    def masks(self, which: int) -> list[int]:
        """Return the first (0) or the second (1) bit mask of every rank; bit i is parameter i's. Collective."""
        start = HEADER_WORDS + which * self._mask_words
        return [_to_mask(tuple(row[start : start + self._mask_words])) for row in self._all_rows]

    @property
    def _all_rows(self) -> list[list[int]]:
        if self._rows is None:
            self._rows = self._gather_rows()
        return self._rows
