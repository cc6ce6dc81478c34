"""Tells users when averaging begins, and how many iterates an average holds.

``averaged_parameters()`` and ``export_averaged()`` warn through a ``StartNotice`` if there is no average yet: with the
default ``t0`` of 1e6 most runs never have one. The command line and the exports' metadata count by ``averaged_steps``.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .update.schedule import Cohort
from .update.weights import AverageRule, AverageSchedule, UniformMean

# Files whose frames are not the user's: a warning points at the line that called this package, through decorators too.
_INSIDE = (str(Path(__file__).parent), contextlib.__file__, str(Path(torch.__file__).parent))


def averaged_steps(step: float, mu: float, t0: float | None, average: object = None) -> int | None:
    """How many iterates have entered ``ax`` after ``step`` steps.

    Args:
        step, mu, t0: those of the parameter and of its group; None if the group's ``t0`` is unknown.
        average: the group's rule of averaging, or its options as checkpoints have them. None is the mean of
            ``torch.optim.ASGD``, whose ``mu`` after ``step`` steps is ``1 / max(1, step - t0)``.

    Returns:
        0 if ``mu`` is 1, because ``ax`` is a copy of the last iterate then. None if the number is not known: ``mu`` is
        not that of the mean, because ``t0`` was changed after averaging had begun.
    """
    if mu == 1:
        return 0
    if t0 is None or (average is None and not math.isclose(mu * (step - t0), 1, rel_tol=1e-5)):
        return None
    every = average.every if isinstance(average, AverageRule) else 1
    if isinstance(average, Mapping) and isinstance(average.get("every"), int):
        every = max(1, average["every"])
    return AverageSchedule(UniformMean(every=every)).num_iterates(step, t0)


def summarized_steps(counts: Iterable[int | None]) -> str:
    """``counts``, of several parameters, as one text: ``"749"``, ``"12 to 749"``, or ``"unknown"``."""
    known = set(counts)
    if not known or None in known:
        return "unknown"
    fewest, most = min(n for n in known if n is not None), max(n for n in known if n is not None)
    return str(most) if fewest == most else f"{fewest} to {most}"


def averaging_metadata(counts: Iterable[int | None]) -> dict[str, str]:
    """The entries of an export's header: whether averaging has begun, and of how many iterates the averages are.

    ``counts`` are the ``averaged_steps`` of every parameter that has state.
    """
    by_parameter = list(counts)
    begun = [count for count in by_parameter if count != 0]
    state = "not begun" if not begun else "begun" if len(begun) == len(by_parameter) else "begun for some parameters"
    return {"averaging": state, "averaged_steps": summarized_steps(begun) if begun else "0"}


def start_text(step: float, t0: float | None) -> str:
    """A sentence that says when the averaging of a run begins that has taken ``step`` steps; "" if ``t0`` is None."""
    if t0 is None:
        return ""
    if t0 < 0:
        return f"Averaging begins with the iterate of step {t0 + 2:,.0f}; this is step {step:,.0f}."
    shown = f"{t0:,.0f}" if float(t0).is_integer() else f"{t0:,}"
    if step < t0:
        return (
            f"Averaging begins after step {shown} (t0); this is step {step:,.0f}. Call start_averaging(), or set t0 to "
            f"an earlier step."
        )
    # mu is stored, so that the first iterate of the average is that of step t0 + 2.
    return f"Averaging begins after step {shown} (t0) with the iterate of step {t0 + 2:,.0f}; this is step {step:,.0f}."


class StartNotice:
    """Warns once for each optimizer that averages are asked for and have not begun; only on the first of its ranks.

    The ranks need not agree on it, because nothing is sent. Whoever has warnings raised as errors gets them from
    ``problem``, which the caller shares with the other ranks: no rank is left alone in a collective call.
    """

    def __init__(self, is_first_rank: bool, counts_updates: bool) -> None:
        """Begin silent. With ``counts_updates`` a step is one call of ``update()``, as in ``ShardedAverage``."""
        self._is_pending = is_first_rank
        self._counts_updates = counts_updates

    def problem(
        self, call: str, result: str, has_begun: Mapping[Cohort, bool], groups: Sequence[Mapping[str, Any]]
    ) -> Exception | None:
        """Warn if no parameter's averaging has begun; ``result`` says what ``call`` does then. Not collective.

        ``has_begun`` has every cohort. Returns the warning if it is raised as an error, which happens with the filter
        "error" of ``warnings``.
        """
        if not self._is_pending:
            return None
        self._is_pending = False
        if any(has_begun.values()):
            return None
        step = max((cohort.step.item() for cohort in has_begun), default=0.0)
        t0 = min((float(group["t0"]) for group in groups if "t0" in group), default=None)
        when = start_text(step, t0)
        if self._counts_updates and t0 is not None:
            when = f"Averaging begins with update() number {t0 + 2:,.0f}; {step:,.0f} were made."
        text = f"dist_asgd: {call} before averaging has begun: {result}. {when}".rstrip()
        try:
            warnings.warn(text, UserWarning, stacklevel=_user_level(inspect.currentframe()))
        except UserWarning as error:
            return error
        return None


def _user_level(frame: FrameType | None) -> int:
    """The ``stacklevel`` of the innermost frame that is of no file of this package, counted from ``frame``."""
    level = 1
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level
