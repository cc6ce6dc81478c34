"""Agreement: ranks compare what they are about to do, and raise together if they disagree.

Every collective call of the optimizer begins with one exchange of a fixed number of int64 words, and so does every
round of backward. If a rank has failed, or called another function, all ranks raise; without the exchange they would
hang. What travels is a summary of all ranks (``reports.py``), in log2 N messages. Only if it shows a difference do
ranks send their own words, and messages of any length, to describe it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

import torch

from .base import Communicator, PendingSummary
from .iterations import Iterations
from .masks import indices_in
from .rank_names import RankNames, positions_by_value
from .reports import (
    CALL,
    CLEARED,
    DISCARDS,
    MASK_BITS,
    NUM_LARGEST,
    PROBLEM,
    REBOUND,
    CollectiveCall,
    RankReport,
    RankReports,
    digest_of,
)
from .tracebacks import release_frames
from .waiting import Waiting

P = ParamSpec("P")
R = TypeVar("R")

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


# The calls that a rank can take part in after it has joined; an iteration ends with one of the first two.
LAST_CALLS = (CollectiveCall.STEP, CollectiveCall.ZERO_GRAD)
OF_AN_ITERATION = (*LAST_CALLS, CollectiveCall.CLIP_GRAD_NORM, CollectiveCall.UNSCALE)
# The calls that take a change of the user's over, which their fingerprint describes.
_CHANGES = {CollectiveCall.ADOPT, CollectiveCall.UNFREEZE}


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


class PendingReports:
    """An exchange on its way: calling it waits for the reports of all ranks. PeerError if that fails."""

    def __init__(self, wait: Callable[[], RankReports], poll: Callable[[], None] | None = None) -> None:
        self._wait, self._poll = wait, poll
        self._reports: RankReports | None = None

    def __call__(self) -> RankReports:
        if self._reports is None:
            self._reports = self._wait()
        return self._reports

    def poll(self) -> None:
        """Send on what has arrived, without waiting; called now and then before the wait, which then is short."""
        if self._poll is not None:
            self._poll()


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
        self._process = os.getpid()
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
    ) -> PendingReports:
        """Start an exchange of this rank's header and masks; the returned call waits for it.

        ``problem`` tells the other ranks that this one cannot go on. The exchange raises only PeerError: callers pass
        the reports to ``check``. Callers wait before they start another. RuntimeError in a forked process, before
        anything is sent.
        """
        # The masks may be resized before the wait, and the reports keep the size that they were sent with.
        report = RankReport(
            self._comm.rank,
            call,
            self.discards,
            PROBLEM * problem + REBOUND * self.rebound + CLEARED * self.cleared,
            fingerprint.digest,
            masks,
            self._mask_words,
        )
        words = report.summary
        if self._comm.world_size == 1:
            return PendingReports(lambda: self._reports(words, report))
        if os.getpid() != self._process:
            raise self._forked(call)
        if self.iterations is not None:
            self.iterations.before(call)
        pending = self._comm.summarise(words, NUM_LARGEST)
        if self._waiting is not None:
            self._waiting.watch(pending)
        return PendingReports(lambda: self._reports(self._wait(call, pending), report), pending.poll)

    def _forked(self, call: CollectiveCall) -> RuntimeError:
        return RuntimeError(
            f"dist_asgd: {call.text} in process {os.getpid()}, which was forked from process {self._process} of "
            f"{self.names.place(self._comm.rank)}: the other ranks would take what it sends for messages of that rank. "
            f"Make the call in the process that has made the optimizer."
        )

    def _reports(self, summary: list[int], report: RankReport) -> RankReports:
        def gather_rows() -> list[list[int]]:
            row = torch.tensor(report.row, dtype=torch.int64, device="cpu")
            return cast(list[list[int]], self._comm.exchange(row).tolist())

        return RankReports(summary, report.mask_words, self._comm.world_size, gather_rows)

    def _wait(self, call: CollectiveCall, pending: PendingSummary) -> list[int]:
        return pending() if self._waiting is None else self._waiting.wait(call, pending)

    def exchange(
        self,
        call: CollectiveCall,
        fingerprint: Fingerprint = NO_FINGERPRINT,
        masks: tuple[int, int] = (0, 0),
        problem: bool = False,
    ) -> RankReports:
        """Start an exchange and wait for it: for callers that have nothing to do in between."""
        reports = self.start(call, fingerprint, masks, problem)()
        if self.discards < 0:
            self.discards = reports.discards
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
        self.joined = joined = reports.joined
        if reports.is_uniform:
            return
        # A round that another rank has opened is no difference: the caller has joined it.
        calls = reports.calls - {CollectiveCall.ROUND}
        # If this raises, ranks that have joined leave their context, and wait for no further iteration.
        iterations, self.iterations = self.iterations, None if joined else self.iterations
        if joined and len(calls) == 2 and calls <= {CollectiveCall.JOINED, *OF_AN_ITERATION}:
            calls -= {CollectiveCall.JOINED}
        if len(calls) > 1:
            texts = [CollectiveCall(call).text for call in reports.column(CALL)]
            raise CallsDiffer(
                f"dist_asgd: ranks called different things at the same point: {self.names.by_value(texts)}. "
                f"Every rank must make the same collective calls in the same order."
                + (" Inside Join, while some ranks have no inputs left, the others can only step." if joined else "")
                + (f" This rank also had a problem of its own: {problem}" if problem else "")
                + (self._changes(reports, fingerprint) if calls & _CHANGES else "")
            )
        if reports.discards_differ:
            # The ranks take the highest count, so that the error comes once: they agree again after the next
            # zero_grad() on all of them.
            self.discards = reports.discards
            raise RuntimeError(
                f"dist_asgd: ranks differ in how many times zero_grad() discarded gradients, or keep_gradients() kept "
                f"them: {self.names.by_value(reports.column(DISCARDS))}. Every rank must call both between the same "
                f"backwards."
            )
        if reports.problem:
            self._raise_together(problem)
        if reports.digests_differ:
            self._compare(fingerprint, reports)
        self.iterations = iterations

    def _changes(self, reports: RankReports, fingerprint: Fingerprint) -> str:
        """Return the sentences about parameters or groups that some ranks have changed, and others have not."""
        own = reports.column(CALL)[self._comm.rank] in _CHANGES
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
            by_rank[rank] = by_rank[reports.first_active]
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
