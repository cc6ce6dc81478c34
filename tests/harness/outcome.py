"""The outcome of a job on each rank, which the thread and the process harness share.

Vocabulary
    job      a function that every rank runs as ``fn(rank, world_size, *args)``
    outcome  the value that a job returned on one rank, or the error that it raised

A test expects a value on every rank (``values``) or an error on every rank (``errors``). An error on some ranks only is
always a failure, because the other ranks would hang in production.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RankError:
    """The exception of one rank, as text, so that it can be sent between processes whatever its type is."""

    rank: int
    type_name: str
    message: str
    traceback: str

    @staticmethod
    def of(rank: int, error: BaseException) -> RankError:
        """Describe the exception ``error`` of ``rank``."""
        return RankError(rank, type(error).__name__, str(error), "".join(traceback.format_exception(error)))


@dataclass(frozen=True)
class Outcome:
    """The value or the error of rank ``rank``, which ended ``seconds`` after the job began."""

    rank: int
    value: Any
    error: RankError | None
    seconds: float


class RanksFailed(AssertionError):
    """Raised if a job that should have returned on every rank raised an error, hung or died on some of them."""

    def __init__(self, errors: Sequence[RankError]) -> None:
        self.errors = list(errors)
        parts = [f"--- rank {e.rank}: {e.type_name}: {e.message}\n{e.traceback}" for e in self.errors]
        super().__init__(f"{len(self.errors)} rank(s) failed\n" + "\n".join(parts))


def values(outcomes: Sequence[Outcome]) -> list[Any]:
    """The return value of every rank, in rank order. Raises ``RanksFailed`` if a rank has none."""
    failed = [o.error for o in outcomes if o.error is not None]
    if failed:
        raise RanksFailed(failed)
    return [o.value for o in outcomes]


def errors(outcomes: Sequence[Outcome], within_s: float = 10.0) -> list[RankError]:
    """The error of every rank, in rank order. Fails if a rank returned, hung, died, or took over ``within_s``."""
    returned = [o.rank for o in outcomes if o.error is None]
    assert not returned, f"ranks {returned} returned, but every rank should have raised; the others: " + "; ".join(
        f"rank {o.rank}: {o.error.type_name}: {o.error.message}" for o in outcomes if o.error
    )
    found = [o.error for o in outcomes if o.error is not None]
    stuck = [e for e in found if e.type_name in ("RankHung", "RankDied")]
    if stuck:
        raise RanksFailed(found)
    slow = {o.rank: round(o.seconds, 1) for o in outcomes if o.seconds > within_s}
    assert not slow, f"raised, but only after {slow} seconds: {[e.message for e in found]}"
    return found
