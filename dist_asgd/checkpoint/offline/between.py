"""Plans the mean of the iterates between two checkpoints of a run, from their averages alone.

If ``ax1`` is the mean of n1 iterates and ``ax2`` that of n2, of which n1 are the same, the mean of the others is
(n2 * ax2 - n1 * ax1) / (n2 - n1). ``average_between`` and ``dist-asgd average --between`` call it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ...update.weights import AVERAGE_KEY, AverageSchedule, UniformMean, rule_of
from ..format.manifest import CheckpointError
from ..format.paths import AnyPath
from ..format.safetensors import TensorSpec
from .average import check_same_names, check_same_shapes, notes_of_ties, result_dtype, sources_as_facts
from .combination import Combination, Merge, Term, copy_of
from .contents import CheckpointContents
from .convert import check_dtype, plan_export

# A run may change its learning rate, but an optimizer with another one of these is taken for another run.
_OF_A_RUN = ("t0", AVERAGE_KEY, "lambd", "alpha", "weight_decay", "maximize")
# mu is stored in float32.
_TOLERANCE = 1e-6
# The share of the weights from which on rounding errors are worth a note.
_NOTABLE = 1e-3


@dataclass(frozen=True, slots=True)
class _Progress:
    """How far the average of one parameter is: its steps, its ``t0``, and ``mu``, the weight of the next iterate.

    ``schedule`` is that of a uniform mean: torch's own, or ``UniformMean`` with its ``every``.
    """

    step: float
    t0: float
    mu: float
    schedule: AverageSchedule

    @property
    def iterates(self) -> float:
        """How many iterates the average holds, as ``averaged_steps()`` counts them; below 0 before it begins.

        Of torch's own mean, 1 / max(1, s - t0) is the next weight after step s (torch/optim/asgd.py), so it holds
        s - t0 - 1 iterates. If t0 is no whole number, the first one counts for less than one.
        """
        place = self.step - self.t0 - 1
        return place if self.schedule.rule is None or place < 0 else self.schedule.num_iterates(self.step, self.t0)

    @property
    def wanted_mu(self) -> float:
        """The weight of the next iterate in a uniform mean since ``t0``."""
        return self.schedule.next_mu(self.step, self.t0)

    @property
    def is_uniform(self) -> bool:
        """Whether ``mu`` is that of a uniform mean since ``t0``, and not that of an EMA or another rule."""
        return math.isclose(self.mu, self.wanted_mu, rel_tol=_TOLERANCE)


class _Run:
    """The progress of all averages of a checkpoint, and the hyperparameters that its run does not change."""

    def __init__(self, contents: CheckpointContents) -> None:
        if not contents.is_asgd or not contents.state:
            raise CheckpointError(
                f"dist_asgd: {contents.opened.path} has no averages: there is no state of ASGD under "
                f"'{contents.state_prefix}...'. The mean of the iterates between two checkpoints follows from their "
                f"averages only."
            )
        self._contents = contents
        self.path = contents.opened.path

    @cached_property
    def _options(self) -> dict[str, Mapping[str, Any]]:
        return {name: group for group in self._contents.groups for name in group["params"]}

    def options(self, param: str) -> Mapping[str, Any]:
        """Return the hyperparameters of a parameter; raises CheckpointError if they are not recorded."""
        found = self._options.get(param)
        if found is None or "t0" not in found:
            raise CheckpointError(
                f"dist_asgd: {self.path} does not record t0 of parameter {param}, so the number of iterates in its "
                f"average is unknown."
            )
        return found

    def step(self, param: str) -> float:
        """Return the steps that a parameter has taken; 0 if there is no state of it."""
        scalars = self._contents.scalars.get(param)
        return 0.0 if scalars is None else float(scalars["step"])

    def progress(self, param: str) -> _Progress:
        """Return how far the average of a parameter with state is."""
        options = self.options(param)
        mu = float(self._contents.scalars[param]["mu"])
        return _Progress(self.step(param), float(options["t0"]), mu, _schedule(options, param, self.path))


def _schedule(options: Mapping[str, Any], param: str, path: AnyPath) -> AverageSchedule:
    """The schedule of a uniform mean in the options of a group; ValueError if they have another rule."""
    rule = options.get(AVERAGE_KEY)
    if rule is None:
        return AverageSchedule()
    if not isinstance(rule, Mapping) or rule.get("rule") != UniformMean.name:
        raise ValueError(
            f"dist_asgd: the average of parameter {param} in {path} is no uniform mean, but has the rule {rule}. The "
            f"mean of the iterates between two checkpoints follows from uniform means only."
        )
    return AverageSchedule(rule_of(rule, None))


def plan_between(
    first: CheckpointContents,
    second: CheckpointContents,
    *,
    dtype: torch.dtype | None = None,
    ties_by_value: bool = True,
) -> Merge:
    """Plan the mean of the iterates after ``first`` up to ``second``, of each parameter that stepped between them.

    The other entries, buffers among them, are copied from ``second``. Raises CheckpointError if a checkpoint is damaged
    or has no averages, and ValueError, naming the parameter and both checkpoints, if averaging had not begun in
    ``first``, if their averages are no uniform means or began at different t0, if ``second`` is not the later one, or
    if their models or hyperparameters differ.
    """
    check_dtype(dtype)
    sources = first, second
    earlier, later = _Run(first), _Run(second)
    plans = [plan_export(source, False, None, ties_by_value=ties_by_value, masters=True) for source in sources]
    check_same_names(sources, plans)
    lasts = plan_export(second, True, None, ties_by_value=ties_by_value, masters=True)
    tensors: dict[str, Combination] = {}
    counts: set[float] = set()
    rounding = 0.0
    for name, entry in plans[1].items():
        entries = [plan[name] for plan in plans]
        # What hooks compute from several parameters is refused by plan_export, if their averaging has begun.
        param = next(iter(entry.params), None)
        if param is None or not _has_moved(param, earlier, later):
            # It did not change in between: its last iterate is the mean, and its average may reach further back.
            tensors[name] = copy_of(second, lasts[name])
            continue
        check_same_shapes(name, sources, entries)
        n1, n2 = _counts(param, earlier, later)
        spec = TensorSpec(result_dtype(name, sources, entries, dtype), entry.spec.shape)
        # With n1 = 0 the first average has no iterate yet: its ax is the last iterate.
        terms = [Term(second, entry, n2), *([Term(first, entries[0], -n1)] if n1 else [])]
        tensors[name] = Combination(spec, tuple(terms), n2 - n1)
        counts.add(n2 - n1)
        rounding = max(rounding, _rounding(n1, n2, second.tensors[entry.key].dtype))
    if not counts:
        raise ValueError(
            f"dist_asgd: no parameter stepped between {earlier.path} and {later.path}, so there is no iterate between "
            f"them: name two checkpoints of different steps."
        )
    facts = {
        "rule": "between",
        "of": "averages",
        **sources_as_facts(sources),
        "iterates": [min(counts), max(counts)],
        "rounding": rounding,
    }
    combined = sum(tensor.divisor is not None for tensor in tensors.values())
    merge = Merge(tensors, facts, combined, notes_of_ties(sources, ties_by_value))
    if rounding > _NOTABLE:
        merge.notes.append(
            f"the averages were rounded at every step, and their difference magnifies that: expect relative errors of "
            f"up to about {rounding:.1g}. Checkpoints farther apart, or averages in a wider dtype, give smaller ones."
        )
    return merge


def _has_moved(param: str, earlier: _Run, later: _Run) -> bool:
    """Whether a parameter stepped between the two; raises ValueError if the second one has fewer steps."""
    first, second = earlier.step(param), later.step(param)
    if second < first:
        raise ValueError(
            f"dist_asgd: parameter {param} has taken {first:g} steps in {earlier.path} and {second:g} in {later.path}: "
            f"name the earlier checkpoint first (--between EARLIER LATER)."
        )
    return second > first


def _counts(param: str, earlier: _Run, later: _Run) -> tuple[float, float]:
    """The numbers of iterates in both averages of a parameter; raises ValueError unless they are of one mean."""
    options = earlier.options(param), later.options(param)
    for option in _OF_A_RUN:
        one, other = (found.get(option) for found in options)
        if one != other:
            began = "averaging has begun anew in between" if option == "t0" else "these are different runs"
            raise ValueError(
                f"dist_asgd: {option} of parameter {param} is {one} in {earlier.path} and {other} in {later.path}: "
                f"{began}, so the averages do not have their first iterates in common. Name two checkpoints of one run "
                f"with one {option}."
            )
    if earlier.step(param) == 0:
        raise _not_begun(param, earlier, later, options[0]["t0"])
    progress = earlier.progress(param), later.progress(param)
    for run, found in zip((earlier, later), progress, strict=True):
        if not found.is_uniform:
            raise ValueError(
                f"dist_asgd: the average of parameter {param} in {run.path} is no uniform mean since t0 = "
                f"{found.t0:g}: after step {found.step:g} the weight of the next iterate is {found.mu:.6g}, where "
                f"{found.wanted_mu:.6g} was wanted. Of an EMA, or a mean with another rule, the "
                f"iterates between two checkpoints cannot be told."
            )
    if progress[0].iterates < 0:
        raise _not_begun(param, earlier, later, options[0]["t0"])
    n1, n2 = (found.iterates for found in progress)
    if n1 == n2:
        raise ValueError(
            f"dist_asgd: no iterate of parameter {param} was counted between {earlier.path} (step "
            f"{progress[0].step:g}) and {later.path} (step {progress[1].step:g}): with {AVERAGE_KEY} "
            f"{options[0].get(AVERAGE_KEY)} both averages hold {n1:g}. Name checkpoints farther apart."
        )
    return n1, n2


def _not_begun(param: str, earlier: _Run, later: _Run, t0: float) -> ValueError:
    return ValueError(
        f"dist_asgd: the averaging of parameter {param} had not begun in {earlier.path} (step "
        f"{earlier.step(param):g}, t0 {float(t0):g}): its average has no iterates to take away from those of "
        f"{later.path}. Name a checkpoint of step {float(t0) + 1:g} or later, or export {later.path} alone."
    )


def _rounding(n1: float, n2: float, dtype: torch.dtype) -> float:
    """Estimate the relative error of the mean of n2 - n1 iterates, where ax was rounded to ``dtype`` at each step.

    The error of step k, of eps / sqrt(12) as a random number, weighs k in n * ax. Those of the first n1 steps cancel in
    the difference, and the root of the sum of squares of the others is at most n2 * sqrt(n2 - n1).
    """
    return torch.finfo(dtype).eps / math.sqrt(12) * n2 / math.sqrt(n2 - n1)
