"""Whether a step writes averages: while they are copies of their parameters, these stand for them."""

from __future__ import annotations

from dataclasses import dataclass

from ..storage.buffers import StateBuffer
from .batch import Batch, StepContext
from .schedule import Cohort, Implementation, StepHyperparameters

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


@dataclass(frozen=True, slots=True)
class WriteBatch(Batch):
    """Gives averages that the next step reads their values, after the update of ``buffer``.

    It is done now, because parameters may be written before the next step, and before they travel: a backend may write
    this rank's part of them as well. ``cohorts`` are those of the parameters that step.
    """

    buffer: StateBuffer
    cohorts: tuple[Cohort, ...]

    def run(self, step: StepContext) -> None:
        """Write them if averaging begins with the next step, by the rule that ends this one."""
        if self.buffer.params_stand:
            hyper = step.hypers[self.buffer.group_index]
            next_mus = (hyper.average.next_mu(cohort.step.item() + 1, hyper.t0) for cohort in self.cohorts)
            if any(mu != 1 for mu in next_mus):
                self.buffer.write_average()
