"""Whether a step writes averages: while they are copies of their parameters, these stand for them.

It is decided before a step is planned, as plans have the addresses of averages, and some have none yet. Before that,
and before ranks agree on the step, ``about_to_write`` finds the averages that it may need memory for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..storage.buffers import ShardedParam, StateBuffer
from .schedule import Cohort, Cohorts, Implementation, StepHyperparameters

# Those whose average is a copy of the parameter while mu is 1. The foreach form computes ax + (x - ax) * 1, which
# rounds.
COPYING = (Implementation.FORLOOP, Implementation.FUSED)
# Those of ShardedAverage, which has no average before the first update that counts.
COUNTING = (Implementation.LERP, Implementation.MEAN)

Hypers = Sequence[StepHyperparameters]
HasGradient = Callable[[ShardedParam], bool]
# Whether a step of a cohort writes averages that could be copies, in one step.
Known = dict[Cohort, bool]


@dataclass(frozen=True, slots=True)
class Stand:
    """Decides it for one state ``buffer``, before any of its parameters is updated.

    cohorts   those of the parameters that step
    all_step  whether all parameters of the buffer step: one that never has does not stand for its average
    """

    buffer: StateBuffer
    cohorts: tuple[Cohort, ...]
    all_step: bool

    @classmethod
    def of(cls, buffer: StateBuffer, cohort_of: dict[int, Cohort], active: frozenset[int]) -> Stand:
        """Return the one for a step of the ``active`` parameters."""
        stepping = [member.index for member in buffer.members if member.index in active]
        cohorts = tuple({id(cohort_of[index]): cohort_of[index] for index in stepping}.values())
        return cls(buffer, cohorts, len(stepping) == len(buffer.members))

    def decide(self, hyper: StepHyperparameters, known: Known) -> None:
        """Let the parameters stand for their averages in this step, or let it write averages that have their values.

        A step at whose end averaging begins writes them: parameters may be written before the next one.
        """
        buffer = self.buffer
        is_written = _writes(buffer, self.cohorts, hyper, known)
        if hyper.implementation not in COUNTING:
            is_written |= not (self.all_step or buffer.params_stand) or buffer.average_is_shown
            if not is_written:
                buffer.let_params_stand()
        if is_written:
            buffer.write_average()
            buffer.reserve_average()


def _writes(buffer: StateBuffer, cohorts: Iterable[Cohort], hyper: StepHyperparameters, known: Known) -> bool:
    """Whether a step of ``cohorts`` makes averages of ``buffer`` other than copies of the parameters, now or next.

    What is found of a cohort, which many buffers share, is noted in ``known``.
    """
    counts = hyper.implementation in COUNTING
    if not (counts or (hyper.implementation in COPYING and buffer.params_can_stand)):
        return True
    for cohort in cohorts:
        if cohort not in known:
            number = cohort.step.item() + 1 if counts else 0
            known[cohort] = hyper.average.counts(number, hyper.t0) if counts else not cohort.only_copies(hyper)
    return any(known[cohort] for cohort in cohorts)


def about_to_write(
    buffers: Iterable[StateBuffer], cohorts: Cohorts, hypers: Hypers, has_gradient: HasGradient | None
) -> list[StateBuffer]:
    """Those of ``buffers``, for which nobody has found memory yet, whose averages a step may write.

    Called before ranks agree on which parameters step: those do that have a gradient on this rank, and perhaps others;
    without ``has_gradient``, which says it, all may.
    """
    known: Known = {}
    found = []
    for buffer in buffers:
        hyper, missing = hypers[buffer.group_index], 0
        # In most steps no cohort of the group writes, and nobody has to look at its parameters.
        is_written = _writes(buffer, cohorts.of_group(buffer.group_index), hyper, known) and _writes(
            buffer, {cohorts.by_index[member.index] for member in buffer.members}, hyper, known
        )
        if not (is_written or buffer.defers_average):
            continue
        if has_gradient is not None and not buffer.params_stand:
            missing = sum(not has_gradient(member) for member in buffer.members)
        is_idle = missing == len(buffer.members)
        if is_idle and not buffer.defers_average:
            continue
        # If one does not step, its average is no copy of it. Other ranks may have the gradients that are missing here.
        if is_written or (missing and not is_idle and buffer.defers_average):
            found.append(buffer)
    return found
