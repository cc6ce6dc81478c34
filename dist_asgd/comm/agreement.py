"""Agreement: ranks compare what they are about to do, and raise together if they disagree.

Every collective call of the optimizer begins with one exchange of a fixed number of int64 words, and so does every
round of backward. If a rank has failed, or called another function, all ranks raise; without the exchange they would
hang. Only if an exchange shows a difference do ranks send messages of any length, to describe it.

joined   a rank without further inputs inside torch's ``Join``; it takes part in the calls of the other, *active* ranks
header   the first four words: the kind of call, the discard count, flags (a problem, rebound parameters), and a digest
digest   a 62-bit hash of plain values that must be equal on all ranks (a fingerprint)
masks    the words after the header: two bit masks with one bit per parameter, 62 bits to a word
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, wraps
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

import torch

from .base import Communicator, PendingTable
from .iterations import Iterations
from .masks import indices_in
from .rank_names import RankNames, positions_by_value
from .tracebacks import release_frames
from .waiting import Waiting

P = ParamSpec("P")
R = TypeVar("R")

# Where the words of the header lie.
CALL, DISCARDS, FLAGS, DIGEST = range(4)
# The bits of the flags.
PROBLEM, REBOUND, CLEARED = 1, 2, 4
HEADER_WORDS = 4
# The discard count of a rank that has joined, or that Join has interrupted; it stays below 0 if zero_grad() counts on.
UNKNOWN_DISCARDS = -(1 << 40)
# Bits per word of a mask: words are int64, and must stay positive.
MASK_BITS = 62
_MASK = (1 << MASK_BITS) - 1
# The types in which a problem of one rank is raised on the others, beside SharedError and all below it; every other
# type becomes RuntimeError.
RAISED = (ValueError, TypeError, KeyError, RuntimeError)
# The attribute of errors that every rank has raised.
_ON_ALL_RANKS = "dist_asgd_on_all_ranks"


def is_on_all_ranks(error: BaseException | None) -> bool:
    """Whether ``error`` is the one that an agreement has raised on every rank, with the ranks that it comes from."""
    return hasattr(error, _ON_ALL_RANKS)


def public_call(method: Callable[P, R]) -> Callable[P, R]:
    """Decorate a call of users that agrees: it breaks graphs of ``torch.compile``, and its errors leave no cycles.

    Only for functions that live as long as their module: the decorated one refers to itself.
    """

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            # The compiler cannot trace addresses and messages. This runs the call as if nothing were compiled.
            uncompiled = cast(Callable[P, R], torch.compiler.disable(call))  # type: ignore[no-untyped-call]
            return uncompiled(*args, **kwargs)
        try:
            return method(*args, **kwargs)
        except BaseException as error:
            # They may hold the error as well, and its traceback holds this frame.
            del args, kwargs
            release_frames(error)
            raise

    return call


class SharedError(RuntimeError):
    """A problem that every rank raises in its own type, so that all can react to it alike; made of its text alone."""


class CallsDiffer(RuntimeError):
    """Ranks made different collective calls at the same point."""


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

    @property
    def text(self) -> str:
        """The name of this call in an error."""
        if self is CollectiveCall.ADOPT:
            return "a call after parameters or param_groups were changed"
        if self is CollectiveCall.UNFREEZE:
            return "a call after frozen parameters became trained ones"
        if self is CollectiveCall.GRADIENT:
            return "an operator on p.grad"
        if self is CollectiveCall.JOINED:
            return "nothing more: no inputs are left"
        return "backward()" if self is CollectiveCall.ROUND else f"{self.name.lower()}()"


# The calls that a rank can take part in after it has joined; an iteration ends with one of the first two.
LAST_CALLS = (CollectiveCall.STEP, CollectiveCall.ZERO_GRAD)
OF_AN_ITERATION = (*LAST_CALLS, CollectiveCall.CLIP_GRAD_NORM, CollectiveCall.UNSCALE)
# The calls that take a change of the user's over, which their fingerprint describes.
_CHANGES = {CollectiveCall.ADOPT, CollectiveCall.UNFREEZE}


def digest_of(values: object) -> int:
    """Return a 62-bit hash of plain values (numbers, strings, tuples of them) that is the same in every process."""
    raw = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(raw, "big") >> 2


@dataclass(frozen=True)
class Fingerprint:
    """Plain values that must be equal on all ranks, and their hash.

    ``what`` names the values in an error, ``entries`` are (label, value) pairs, and ``remedy`` is the error's last
    sentence.
    """

    what: str
    entries: Sequence[tuple[str, object]]
    remedy: str

    @cached_property
    def digest(self) -> int:
        """The word that stands for the entries in an exchange, 62 bits."""
        return digest_of(self.entries)


NO_FINGERPRINT = Fingerprint("", (), "")


@dataclass(frozen=True, slots=True)
class RankReports:
    """The words that all ranks sent in one exchange.

    They are the same on every rank, so every rank draws the same conclusion from them. ``rows[r]`` has the header and
    then the two masks of rank r, ``mask_words`` words each.
    """

    rows: list[list[int]]
    mask_words: int

    def column(self, index: int) -> list[int]:
        """Return one header word of every rank, in rank order."""
        return [row[index] for row in self.rows]

    @property
    def problem(self) -> bool:
        """Whether any rank has a problem."""
        return any(flags & PROBLEM for flags in self.column(FLAGS))

    @property
    def rebound(self) -> bool:
        """Whether parameters were rebound on any rank since the last step."""
        return any(flags & REBOUND for flags in self.column(FLAGS))

    @property
    def cleared(self) -> bool:
        """Whether a user of any rank took gradients out of ``p.grad``."""
        return any(flags & CLEARED for flags in self.column(FLAGS))

    @property
    def calls(self) -> list[int]:
        """The ``CollectiveCall`` of every rank."""
        return self.column(CALL)

    @property
    def joined(self) -> tuple[int, ...]:
        """The ranks that have joined: none outside of torch's ``Join``."""
        return tuple(rank for rank, row in enumerate(self.rows) if row[CALL] == CollectiveCall.JOINED)

    @property
    def active(self) -> tuple[int, ...]:
        """The ranks that have not joined."""
        return tuple(rank for rank, row in enumerate(self.rows) if row[CALL] != CollectiveCall.JOINED)

    @classmethod
    def of(cls, rows: list[list[int]], mask_words: int) -> RankReports:
        """The reports with these words; ranks whose discard count is unknown get the first one that is known."""
        if any(row[DISCARDS] < 0 for row in rows):
            known = next((row[DISCARDS] for row in rows if row[DISCARDS] >= 0), 0)
            rows = [[known if i == DISCARDS and w < 0 else w for i, w in enumerate(row)] for row in rows]
        return cls(rows, mask_words)

    def masks(self, which: int) -> list[int]:
        """Return the first (0) or the second (1) bit mask of every rank; bit i stands for parameter i."""
        start = HEADER_WORDS + which * self.mask_words
        masks = []
        for row in self.rows:
            mask = 0
            for word in reversed(row[start : start + self.mask_words]):
                mask = mask << MASK_BITS | word
            masks.append(mask)
        return masks

    def union(self, which: int) -> int:
        """Return the bits that are set in the first (0) or second (1) mask of any rank."""
        union = 0
        for mask in self.masks(which):
            union |= mask
        return union


class Agreement:
    """The exchanges of one optimizer, and the errors that follow from them.

    All methods but ``resize`` are collective. ``discards`` counts how often ``zero_grad()`` has discarded reduced
    gradients (stage 2), or ``keep_gradients()`` kept them; it travels in every header, because ranks that differ in it
    mix gradients of different steps.
    ``rebound`` says whether parameters were rebound on this rank since the last step; ranks may differ in that.
    ``cleared`` says whether a user took gradients out of ``p.grad`` in stage 2, which the ranks compare then.
    ``joined`` are the ranks that had joined when ranks last agreed.
    """

    def __init__(self, communicator: Communicator, *, watches_waits: bool = True) -> None:
        """With ``watches_waits`` waits for ranks that do not make a call are logged, and named when they fail."""
        self._comm = communicator
        self.names = RankNames(communicator.ranks)
        self._waiting = Waiting(self.names, communicator.rank) if watches_waits else None
        self._mask_words = 0
        self.discards = 0
        self.rebound = False
        self.cleared = False
        self.joined: tuple[int, ...] = ()
        # Inside torch's Join, if it leaves it to this optimizer to say when an iteration begins (stage 2).
        self.iterations: Iterations | None = None
        self._last_indices: tuple[int, frozenset[int]] = (0, frozenset())

    def resize(self, num_params: int) -> None:
        """Set how many parameters the bit masks cover, from the next exchange on; the same number on all ranks."""
        self._mask_words = -(-num_params // MASK_BITS)

    def indices(self, mask: int) -> frozenset[int]:
        """Return the parameters whose bits are set in ``mask``; the same object while the mask does not change."""
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
        """Start an exchange of this rank's header and masks; the returned call waits for it.

        ``problem`` tells the other ranks that this one cannot go on. The exchange raises only PeerError: callers pass
        the reports to ``check``.
        """
        words = self._words(call, fingerprint, masks, problem)
        if self._comm.world_size == 1:
            return lambda: RankReports([words], self._mask_words)
        if self.iterations is not None:
            self.iterations.before(call)
        # The masks may be resized before the wait, and the reports keep the size that they were sent with.
        mask_words = self._mask_words
        wait = self._comm.exchange(torch.tensor(words, dtype=torch.int64, device="cpu"))
        return lambda: RankReports.of(self._wait(call, wait).tolist(), mask_words)

    def _wait(self, call: CollectiveCall, pending: PendingTable) -> torch.Tensor:
        return pending() if self._waiting is None else self._waiting.wait(call.text, pending)

    def exchange(
        self,
        call: CollectiveCall,
        fingerprint: Fingerprint = NO_FINGERPRINT,
        masks: tuple[int, int] = (0, 0),
        problem: bool = False,
    ) -> RankReports:
        """Start an exchange and wait for it: for callers that have nothing to do in between."""
        words = self._words(call, fingerprint, masks, problem)
        if self._comm.world_size == 1:
            return RankReports([words], self._mask_words)
        if self.iterations is not None:
            self.iterations.before(call)
        wait = self._comm.exchange(torch.tensor(words, dtype=torch.int64, device="cpu"))
        reports = RankReports.of(self._wait(call, wait).tolist(), self._mask_words)
        if self.discards < 0:
            self.discards = reports.rows[0][DISCARDS]
        if self.iterations is not None and CollectiveCall.ROUND not in reports.calls:
            self.iterations.after(call)
        return reports

    def agree(
        self,
        call: CollectiveCall,
        fingerprint: Fingerprint = NO_FINGERPRINT,
        masks: tuple[int, int] = (0, 0),
        problem: Exception | None = None,
    ) -> RankReports:
        """Exchange and check: return only if all ranks make this call, with equal fingerprints and no problem."""
        reports = self.exchange(call, fingerprint, masks, problem is not None)
        self.check(reports, fingerprint, problem)
        return reports

    def _words(
        self, call: CollectiveCall, fingerprint: Fingerprint, masks: tuple[int, int], problem: bool
    ) -> list[int]:
        words = [int(call), self.discards, self._flags(problem), fingerprint.digest]
        for mask in masks:
            words += [(mask >> (MASK_BITS * i)) & _MASK for i in range(self._mask_words)]
        return words

    def _flags(self, problem: bool) -> int:
        return PROBLEM * problem + REBOUND * self.rebound + CLEARED * self.cleared

    def check(self, reports: RankReports, fingerprint: Fingerprint, problem: Exception | None) -> None:
        """Raise on all ranks if ``reports`` has different calls, discard counts or fingerprints, or a problem.

        ``fingerprint`` and ``problem`` are this rank's own. To describe the difference, ranks exchange messages again,
        so every rank must call this with the same reports.

        Raises:
            CallsDiffer: ranks make different calls.
            RuntimeError: discard counts differ.
            ValueError: fingerprints differ; the error names the first entry that does.
            Exception: some rank has a problem. All ranks raise all problems, as the type of the first one.
        """
        self.joined = ()
        first = reports.rows[0][:HEADER_WORDS]
        if not first[FLAGS] and all(row[:HEADER_WORDS] == first for row in reports.rows):
            return
        # A round that another rank has opened is no difference: the caller has joined it.
        calls = set(reports.calls) - {CollectiveCall.ROUND}
        self.joined = joined = reports.joined
        # If this raises, ranks that have joined leave their context, and wait for no further iteration.
        iterations, self.iterations = self.iterations, None if joined else self.iterations
        if joined and len(calls) == 2 and calls <= {CollectiveCall.JOINED, *OF_AN_ITERATION}:
            calls -= {CollectiveCall.JOINED}
        if len(calls) > 1:
            texts = [CollectiveCall(call).text for call in reports.calls]
            raise CallsDiffer(
                f"dist_asgd: ranks called different things at the same point: {self.names.by_value(texts)}. "
                f"Every rank must make the same collective calls in the same order."
                + (" Inside Join, while some ranks have no inputs left, the others can only step." if joined else "")
                + (f" This rank also had a problem of its own: {problem}" if problem else "")
                + (self._changes(reports, fingerprint) if calls & _CHANGES else "")
            )
        discards = reports.column(DISCARDS)
        if len(set(discards)) > 1:
            # The ranks take the highest count, so that the error comes once: they agree again after the next
            # zero_grad() on all of them.
            self.discards = max(discards)
            raise RuntimeError(
                f"dist_asgd: ranks differ in how many times zero_grad() discarded gradients, or keep_gradients() kept "
                f"them: {self.names.by_value(discards)}. Every rank must call both between the same backwards."
            )
        if reports.problem:
            self._raise_together(problem)
        # Ranks that have joined take over whatever the active ones agree on.
        if len({reports.rows[rank][DIGEST] for rank in reports.active}) > 1:
            self._compare(fingerprint, reports)
        self.iterations = iterations

    def _changes(self, reports: RankReports, fingerprint: Fingerprint) -> str:
        """Return the sentences about parameters or groups that some ranks have changed, and others have not."""
        own = reports.calls[self._comm.rank] in _CHANGES
        changes = self._comm.exchange_objects(fingerprint.what if own else "no change")
        return f" {self.names.by_value(changes)}. Change parameters and param_groups on every rank alike."

    def _raise_together(self, problem: Exception | None) -> NoReturn:
        """Raise all ranks' problems on every rank, each with the ranks that have it."""
        if self._comm.world_size == 1 and problem is not None:
            raise problem
        own = None
        if problem is not None:
            kinds = (type(problem),) if isinstance(problem, SharedError) else RAISED
            kind = next((c for c in kinds if isinstance(problem, c)), RuntimeError)
            own = (kind, text_of(problem))
        problems = self._comm.exchange_objects(own)
        kind_of_first = next(entry[0] for entry in problems if entry is not None)
        lines = [
            f"{text} [on {self.names.describe(ranks)} of {self.names.total}]"
            for text, ranks in positions_by_value([None if entry is None else entry[1] for entry in problems]).items()
            if text is not None
        ]
        raised = kind_of_first("\n".join(lines))
        setattr(raised, _ON_ALL_RANKS, True)
        raise raised from problem

    def _compare(self, fingerprint: Fingerprint, reports: RankReports) -> NoReturn:
        """Raise on every rank, and name the first entry that is not equal on all active ranks."""
        by_rank: list[Any] = self._comm.exchange_objects(list(fingerprint.entries))
        for rank in reports.joined:
            by_rank[rank] = by_rank[reports.active[0]]
        counts = [len(entries) for entries in by_rank]
        more = f" {self.names.by_value(counts)} entries." if len(set(counts)) > 1 else ""
        first = self.names.first_difference(by_rank)
        raise ValueError(f"dist_asgd: {fingerprint.what} differ between ranks:{more}{first} {fingerprint.remedy}")


def text_of(error: Exception) -> str:
    """Return the text of ``error``, which may be one of the user's own classes; raises nothing."""
    try:
        return str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    except Exception as failure:
        # The other ranks wait for this one, whatever its error is.
        return f"{type(error).__name__}, whose text cannot be made ({type(failure).__name__})"


def gather_objects(communicator: Communicator, value: Any, to: int) -> list[Any] | None:
    """Return all ranks' picklable values on rank ``to``, in rank order, and None on the other ranks. Collective.

    Rank ``to`` gets its own value back as it is, without pickling.
    """
    here = communicator.rank == to
    # The receiving rank sends itself one byte, because a tensor from an empty buffer is an error.
    data = torch.frombuffer(bytearray(b"" if here else pickle.dumps(value)) or bytearray(1), dtype=torch.uint8)
    numels = communicator.exchange(torch.tensor([data.numel()], device="cpu"))().flatten().tolist()
    places = [torch.empty(numel, dtype=torch.uint8, device="cpu") for numel in numels] if here else None
    communicator.gather(data, places, numels, to)
    if places is None:
        return None
    return [value if r == to else pickle.loads(place.numpy().tobytes()) for r, place in enumerate(places)]
