"""``BackwardStep``: the steps of ``step_in_backward=True``, which backward begins and ``step()`` ends.

The reducer (``gradients/in_backward.py``) says when a bucket is reduced; here it is updated and gathered. Cohorts are
not split before ``step()``, as only then it is known which parameters step: until they are split, their parameters
have the same scalars in any case.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from .averaging import Averages
from .comm.agreement import NO_FINGERPRINT, Fingerprint
from .comm.reports import RankReports
from .fingerprints import Hyperparameters
from .gather import Gatherer
from .gradients.base import Gradients
from .gradients.in_backward import StepReducer
from .interruption import IN_BACKWARD, torn_problem
from .registry import ParamRegistry
from .state import ParamShards
from .storage.buffers import Bucket
from .storage.snapshots import NO_GRADIENTS, mark_written
from .update.batch import StepContext, run_batches
from .update.offload import Offload
from .update.operators import Updater
from .update.schedule import StepHyperparameters, step_hyperparameters
from .update.segments import UNSCALED


class Owner(Protocol):
    """The optimizer, as far as it is needed here."""

    param_groups: list[dict[str, Any]]
    state: Any
    averages: Averages
    gatherer: Gatherer
    gradients: Gradients
    registry: ParamRegistry
    shards: ParamShards


@dataclass(frozen=True, slots=True)
class _Begun:
    """A step that has begun: what its updates read, and which first steps may take their eta from this ``lr``."""

    context: StepContext
    any_is_fresh: bool


class BackwardStep:
    """Updates the buckets of one step as they are reduced; the ``BucketUpdate`` of a ``StepReducer``.

    ``is_open`` says whether a step has begun that ``step()`` can still end.
    """

    def __init__(
        self,
        owner: Owner,
        shards: ParamShards,
        gatherer: Gatherer,
        updater: Updater,
        hyperparameters: Hyperparameters,
    ) -> None:
        # Weak, because the optimizer keeps this object.
        self._weak_owner = weakref.ref(owner)
        self._shards = shards
        self._gatherer = gatherer
        self._updater = updater
        self._hyperparameters = hyperparameters
        self._begun: _Begun | None = None

    @property
    def is_open(self) -> bool:
        """See the class."""
        return self._begun is not None

    @classmethod
    def of(cls, owner: Owner, updater: Updater, hyperparameters: Hyperparameters) -> BackwardStep | None:
        """The one of the optimizer ``owner``, which is being constructed; None unless backward updates buckets."""
        reducer = owner.gradients
        if not isinstance(reducer, StepReducer):
            return None
        made = cls(owner, owner.shards, owner.gatherer, updater, hyperparameters)
        reducer.bucket_update = made
        return made

    @property
    def _owner(self) -> Owner:
        owner = self._weak_owner()
        assert owner is not None
        return owner

    # --- what the reducer calls -----------------------------------------------------------------------------

    @property
    def is_compared(self) -> bool:
        """See ``BucketUpdate``: the first step compares them."""
        return self._owner.registry.values_compared

    def begin(self) -> tuple[bool, Fingerprint, Exception | None]:
        """See ``BucketUpdate``. A parameter that was rebound, unfrozen or replaced is left to ``step()``."""
        owner, shards = self._owner, self._shards
        Offload.before_write()
        groups = owner.param_groups
        if owner.averages.is_swapped or not shards.hold(groups) or not shards.are_in_place():
            return False, NO_FINGERPRINT, None
        try:
            shards.check_unchanged(owner.state)
            shards.check_whole()
            self._hyperparameters.check(groups, shards.devices_of)
            fingerprint = self._hyperparameters.fingerprint(groups, False)
            hypers = step_hyperparameters(groups, shards.leads)
            # Which parameters will have a gradient is not known yet.
            shards.make_room(lambda: hypers)
        except Exception as error:
            return True, NO_FINGERPRINT, error
        any_is_fresh = shards.cohorts.preview(hypers)
        self._begun = _Begun(self._context(hypers), any_is_fresh)
        return True, fingerprint, None

    def _context(self, hypers: Sequence[StepHyperparameters]) -> StepContext:
        rows: array[float] = self._shards.cohorts.scalars(frozenset(), hypers, None)[0]
        return StepContext(self._updater, hypers, rows, {}, UNSCALED, UNSCALED, NO_GRADIENTS, None)

    def compare(self, reports: RankReports) -> None:
        """See ``BucketUpdate``."""
        self._owner.registry.compare_values(reports)

    @torch.no_grad()
    def update(self, bucket: Bucket, active: frozenset[int]) -> None:
        """See ``BucketUpdate``."""
        assert self._begun is not None
        self._shards.torn_by = IN_BACKWARD
        # A bucket is updated twice if step() reduces gradients that backward has not: not under its own gather.
        self._gatherer.arrivals.wait_for((id(bucket),))
        # Before the write, so that a backward that still needs one of the values raises torch's error.
        mark_written([member.param for member in bucket.members if member.index in active])
        context = self._begun.context
        run_batches(self._shards.plan_of(bucket, active, context.hypers), context)
        self._gatherer.launch(bucket)

    def abandon(self) -> None:
        """See ``BucketUpdate``."""
        self._begun = None

    # --- what step() calls ----------------------------------------------------------------------------------

    @staticmethod
    def refuse_closure() -> NoReturn:
        """Raise the ValueError of a ``step()`` with a closure."""
        raise ValueError(
            "dist_asgd: step(closure) with step_in_backward=True: the backward of the closure would update parameters, "
            "and the closure may run another one. Call the closure's forward and backward before step(), or pass "
            "step_in_backward=False."
        )

    def problem(self, by_scaler: bool) -> Exception | None:
        """What is wrong on this rank with a ``step()`` that ends this step, for all ranks to raise; None if nothing is.

        ``by_scaler`` says whether a gradient scaler has called it. Hyperparameters that the update has read must not
        have changed since; others are read now.
        """
        if by_scaler:
            return ValueError(
                "dist_asgd: step() called by a GradScaler, with step_in_backward=True: backward has updated parameters "
                "with gradients that were still scaled. Use bfloat16 without a scaler, or pass step_in_backward=False."
            )
        if self._begun is None:
            return None
        before = self._begun.context.hypers
        now = step_hyperparameters(self._owner.param_groups, self._shards.leads)
        names = ["lambd", "weight_decay", "maximize", "implementation", *(["lr"] if self._begun.any_is_fresh else [])]
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            for name in names:
                was, is_now = (_plain(getattr(one, name)) for one in (old, new))
                if was != is_now:
                    return RuntimeError(
                        f"dist_asgd: param_groups[{index}] had {name}={was} when backward began the step "
                        f"(step_in_backward=True), and has {name}={is_now} at step(). Change hyperparameters before "
                        f"backward, or after step()."
                    )
        return None

    def end(self, active: frozenset[int]) -> StepContext | None:
        """End the step of the ``active`` parameters, all of which are updated: their scalars advance.

        Returns what the updates have read; None if no parameter has a gradient.
        """
        hypers = step_hyperparameters(self._owner.param_groups, self._shards.leads)
        self._shards.prepare_step(active, hypers)
        self._shards.cohorts.end_step(active, hypers)
        self._shards.cohorts.end_preview()
        begun, self._begun = self._begun, None
        return None if begun is None else begun.context


def check_whole(shards: ParamShards, backward_step: BackwardStep | None, ends_step: bool) -> None:
    """Raise RuntimeError if parameters may be torn, or if a backward has begun a step; ``step()`` itself ends that."""
    is_open = backward_step is not None and backward_step.is_open
    if is_open and not ends_step:
        raise torn_problem(IN_BACKWARD)
    if not is_open:
        shards.check_whole()


def _plain(value: object) -> object:
    """A hyperparameter as a value that can be compared."""
    return value.item() if isinstance(value, Tensor) else value
