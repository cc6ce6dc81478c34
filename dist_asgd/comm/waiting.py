"""Calls that wait for other ranks: the log says for whom after 10 s, and the error names them when the wait fails.

A collective call that only some ranks make, as with ``if rank == 0:`` around it, waits for the others until the process
group's timeout. ``Agreement`` waits through a ``Waiting``, which lets the other ranks know where this one waits, and
looks who else does. It does so in a thread of its own, because the waiting one is inside the backend.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Sequence

from .base import PeerError, PendingSummary
from .dissemination import LAST_WORDS_S
from .rank_names import RankNames
from .reports import CollectiveCall

# After how long a wait is worth a line in the log, how often the thread looks, and how often it sends on.
PATIENCE_S = 10.0
_INTERVAL_S = 2.0
_POLL_S = 0.25
# Ranks that wait for the same one let each other know at about the same time: for how long at most nobody else has to
# come before the rest counts as missing, and for how long ranks that have failed look.
_QUIET_S, _LAST_LOOK_S = 0.5, 5.0
_LOG = logging.getLogger("dist_asgd")


class Waiting:
    """The waits of one optimizer for the reports of all ranks, one at a time."""

    def __init__(self, names: RankNames, rank: int) -> None:
        self._names = names
        self._rank = rank
        # Since when this rank waits, in which call, and for what: replaced as a whole, as another thread reads it.
        self._current: tuple[float, CollectiveCall, PendingSummary] | None = None
        self._told: set[CollectiveCall] = set()
        self._thread: threading.Thread | None = None
        # An exchange that this rank has begun, and does not wait for.
        self._begun: PendingSummary | None = None

    def watch(self, pending: PendingSummary) -> None:
        """Send on what arrives of an exchange, for ranks that wait for it while this one is elsewhere.

        Called when an exchange starts; the one before has been waited for.
        """
        self._begun = pending

    def poll(self) -> None:
        """Send on what has arrived. Called by the thread."""
        begun = self._begun
        if begun is not None:
            begun.poll()

    def wait(self, call: CollectiveCall, pending: PendingSummary) -> list[int]:
        """Return the words of all ranks, combined. PeerError names the ranks that did not make the ``call``."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=_watch, args=(weakref.ref(self),), name="dist_asgd waiting", daemon=True
            )
            self._thread.start()
        self._current = time.monotonic(), call, pending
        try:
            return pending()
        except PeerError as error:
            pending.note_waiting()
            # Others may be telling their neighbours of the failure before they let this one know of them.
            missing = _still_missing(pending, LAST_WORDS_S + _QUIET_S)
            if not missing:
                raise
            raise PeerError(self._describe(call.text, missing, error)) from error.__cause__
        finally:
            self._current = self._begun = None

    def _describe(self, call: str, missing: Sequence[int], error: PeerError) -> str:
        others, here = self._names.describe(missing), self._names.place(self._rank)
        return (
            f"dist_asgd: {call} failed on {here}, and was not called on {others}: a peer has died, was cut off, did "
            f"not arrive within the process group's timeout (if it has fewer batches, pass the optimizer to torch's "
            f"Join), or never makes this call. Every rank must make it: no condition such as 'if rank == 0:' may stand "
            f"around it. Parameters and state may differ between ranks now: restart the job from its last checkpoint. "
            f"The backend said: {error.__cause__}"
        )

    def look(self) -> None:
        """Log once for each call, if it has waited for long. Called by the thread."""
        current = self._current
        if current is None:
            return
        since, call, pending = current
        # Every look tells, so that ranks whose patience ends sooner know of this one.
        pending.note_waiting()
        if call in self._told or time.monotonic() - since < PATIENCE_S:
            return
        missing = _still_missing(pending, _QUIET_S)
        if not missing or self._current is not current:
            return
        self._told.add(call)
        _LOG.warning(
            "%s on %s has waited %.0f s for %s. Every rank must make this call: if a condition such as 'if rank == 0:' "
            "stands around it, call it on all ranks. Nothing is wrong if the others are only slow.",
            call.text,
            self._names.place(self._rank),
            time.monotonic() - since,
            self._names.describe(missing),
        )


def _still_missing(pending: PendingSummary, quiet_s: float) -> list[int]:
    """Return the ranks that are missing, once nobody else has come for ``quiet_s`` seconds."""
    missing = pending.missing()
    last_change = deadline = time.monotonic()
    deadline += _LAST_LOOK_S
    while missing and time.monotonic() < min(deadline, last_change + quiet_s):
        time.sleep(0.05)
        now = pending.missing()
        if now != missing:
            missing, last_change = now, time.monotonic()
    return missing


def _watch(of: weakref.ref[Waiting]) -> None:
    """Look at the waits of one optimizer until it is deleted."""
    last_look = time.monotonic()
    while True:
        time.sleep(_POLL_S)
        waiting = of()
        if waiting is None:
            return
        waiting.poll()
        if time.monotonic() - last_look >= _INTERVAL_S:
            waiting.look()
            last_look = time.monotonic()
        # Held only while it is looked at, so that the optimizer can be deleted.
        del waiting
