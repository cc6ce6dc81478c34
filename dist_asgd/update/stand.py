"""Whether a step writes averages: while they are copies of their parameters, these stand for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..storage.buffers import StateBuffer
from .batch import Batch, StepContext
from .schedule import Cohort, Cohorts, Implementation, StepHyperparameters

# Those whose average is a copy of the parameter while mu is 1. The foreach form computes ax + (x - ax) * 1, which
# rounds.
COPYING = (Implementation.FORLOOP, Implementation.FUSED)


@dataclass(frozen=True, slots=True)
class StandBatch(Batch):
    """Decides it for one state ``buffer``, before any of its parameters is updated.

    cohorts    those of the parameters that step
    copies     whether this implementation copies parameters to their averages while mu is 1
    all_step   whether all parameters of the buffer step: one that never has does not stand for its average
    """

    buffer: StateBuffer
    cohorts: tuple[Cohort, ...]
    copies: bool
    all_step: bool

    @classmethod
    def of(
        cls, buffer: StateBuffer, cohort_of: dict[int, Cohort], active: frozenset[int], hyper: StepHyperparameters
    ) -> StandBatch:
        """Return the one for a step of the ``active`` parameters."""
        stepping = [member.index for member in buffer.members if member.index in active]
        copies = hyper.implementation in COPYING and buffer.params_can_stand
        cohorts = tuple({id(cohort_of[index]): cohort_of[index] for index in stepping}.values())
        return cls(buffer, cohorts, copies, len(stepping) == len(buffer.members))

    def run(self, step: StepContext) -> None:
        """Let the parameters stand for their averages in this step, or give the averages their values before it."""
        copied = self.copies and (self.all_step or self.buffer.params_stand)
        if copied and all(cohort.mu.item() == 1 for cohort in self.cohorts):
            self.buffer.let_params_stand()
        else:
            self.buffer.write_average()


def end_step(
    cohorts: Cohorts,
    buffers: Iterable[StateBuffer],
    active: frozenset[int],
    hypers: Sequence[StepHyperparameters],
    wait: Callable[[], None],
) -> None:
    """Let ``cohorts`` end a step of the ``active`` parameters, and give averages that the next one reads their values.

    ``buffers`` are all state buffers. It is done now, because parameters may be written before the next step. ``wait``
    waits for the gathers in flight: a backend may write this rank's part of the parameters as well.
    """
    begun = {index for cohort in cohorts.end_step(active, hypers) for index in cohort.indices}
    standing = [buffer for buffer in buffers if buffer.params_stand] if begun else []
    starting = [buffer for buffer in standing if any(member.index in begun for member in buffer.members)]
    if starting:
        wait()
    for buffer in starting:
        buffer.write_average()
