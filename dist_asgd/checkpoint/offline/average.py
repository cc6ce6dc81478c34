"""Plans the weighted mean, or the EMA, of the weights of several checkpoints. Nothing is read but metadata and scalars.

``average_checkpoints`` and the command ``average`` call it. A checkpoint's *value* of a parameter is what ``export``
would write: its average ``ax`` if averaging has begun, or with ``last`` its last iterate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce

import torch

from ..format.manifest import CheckpointError
from ..format.safetensors import TensorSpec
from .combination import Combination, Merge, Term, copy_of, scaled_weights
from .contents import CheckpointContents
from .convert import Weight, check_dtype, note_of_ties, plan_export

Plan = Mapping[str, Weight]
"""The tensors of one checkpoint by name, as ``plan_export`` chooses them."""


def plan_average(
    sources: Sequence[CheckpointContents],
    *,
    weights: Sequence[float] | None = None,
    decay: float | None = None,
    last: bool = False,
    dtype: torch.dtype | None = None,
    ties_by_value: bool = True,
) -> Merge:
    """Plan the mean of all parameters over ``sources``, or with ``decay`` their EMA in this order.

    With weights w the value is sum(w * x) / sum(w). With ``decay`` d it is x of the first checkpoint, and then
    d * value + (1 - d) * x for each further one. An entry is combined if it comes from a parameter that the optimizer
    of any source has; if no source records any, every floating-point entry is. All others are copied from the last
    source. The dtype of a combined entry is ``dtype``, or the parameter's; the wider one if those differ.

    Raises CheckpointError if a source is damaged or has no model, and ValueError if sources differ in names, in shapes
    of parameters or in whether averaging has begun, or if an argument is not supported.
    """
    check_dtype(dtype)
    factors, divisor = _factors(len(sources), weights, decay)
    plans = [_values(source, last, ties_by_value) for source in sources]
    check_same_names(sources, plans)
    recorded = any(source.optimized for source in sources)
    tensors: dict[str, Combination] = {}
    num_averages, iterates = 0, []
    for name in plans[-1]:
        entries = [plan[name] for plan in plans]
        dtypes = {entry.spec.dtype for entry in entries}
        combined = any(entry.params for entry in entries) if recorded else any(map(_is_number, dtypes))
        if not combined or _is_constant(sources, entries):
            tensors[name] = copy_of(sources[-1], entries[-1])
            continue
        check_same_shapes(name, sources, entries)
        if not last:
            _check_begun(name, sources, plans)
        is_average = any(entry.averaged for entry in entries)
        num_averages += is_average
        if not is_average and any(map(_has_stepped, sources, entries)):
            iterates.append(name)
        spec = TensorSpec(result_dtype(name, sources, entries, dtype), entries[-1].spec.shape)
        terms = zip(sources, entries, factors, strict=True)
        # A weight of 0 leaves a checkpoint out, also if it has NaNs there.
        tensors[name] = Combination(spec, tuple(Term(s, e, f) for s, e, f in terms if f), divisor)
    total = math.fsum(factors)
    facts = {
        "rule": "mean" if decay is None else "ema",
        **({} if decay is None else {"decay": decay}),
        "of": "last iterates" if last or not num_averages else "averages",
        **sources_as_facts(sources),
        "weights": [factor / total for factor in factors],
    }
    merge = Merge(tensors, facts, num_averages, notes_of_ties(sources, ties_by_value))
    if not last and not num_averages:
        merge.notes.append("averaging has not begun for any parameter: this is a mean of last iterates.")
    elif not last and iterates:
        more = f" and {len(iterates) - 3} more" if len(iterates) > 3 else ""
        merge.notes.append(
            f"averaging has not begun in any checkpoint for {', '.join(iterates[:3])}{more}: their last iterates were "
            f"combined."
        )
    if not recorded:
        merge.notes.append(
            "no checkpoint records which tensors an optimizer had, so all floating-point tensors were combined, also "
            "buffers such as the statistics of BatchNorm."
        )
    return merge


def _factors(count: int, weights: Sequence[float] | None, decay: float | None) -> tuple[list[float], float]:
    """The factor of each of ``count`` checkpoints, and what the sum is divided by."""
    if not count:
        raise ValueError("dist_asgd: there is no checkpoint to average: name at least one.")
    if decay is None:
        factors = scaled_weights(weights, count)
        return factors, math.fsum(factors)
    if weights is not None:
        raise ValueError(
            "dist_asgd: an EMA gives each checkpoint a weight by its place, so weights cannot be given beside it: "
            "leave out one of the two (--weights, --ema)."
        )
    check_decay(decay)
    return [(1 - decay if place else 1.0) * decay ** (count - 1 - place) for place in range(count)], 1.0


def check_decay(decay: float) -> None:
    """Raise ValueError unless ``decay`` is a factor of an EMA."""
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
        raise ValueError(
            f"dist_asgd: the decay of an EMA must be at least 0 and below 1, got {decay!r}: ema <- decay * ema + "
            f"(1 - decay) * x, as in 0.9."
        )


def _values(source: CheckpointContents, last: bool, ties_by_value: bool) -> Plan:
    if not last and not source.is_asgd:
        raise CheckpointError(
            f"dist_asgd: {source.opened.path} has no averages: the state under '{source.state_prefix}...' is not that "
            f"of ASGD. Average the last iterates (--last, last=True)."
        )
    # Masters, because a parameter in 16 bits is a rounded copy of its master.
    return plan_export(source, last, None, ties_by_value=ties_by_value, masters=True)


def _is_number(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _has_stepped(source: CheckpointContents, entry: Weight) -> bool:
    if not source.is_asgd:
        return bool(entry.params)
    return any(param in source.scalars and source.scalars[param]["step"].item() > 0 for param in entry.params)


def _is_constant(sources: Sequence[CheckpointContents], entries: Sequence[Weight]) -> bool:
    """Whether an entry is no floating-point number and no parameter that was trained, as quantised frozen weights."""
    return not any(_is_number(entry.spec.dtype) for entry in entries) and not any(map(_has_stepped, sources, entries))


def _check_begun(name: str, sources: Sequence[CheckpointContents], plans: Sequence[Plan]) -> None:
    """Raise ValueError if one source has an average of a parameter, and another one a last iterate.

    A parameter that never stepped is its own average, unless nothing is averaged in that checkpoint.
    """
    entries = [plan[name] for plan in plans]
    with_average = [source for source, entry in zip(sources, entries, strict=True) if entry.averaged]
    if not with_average:
        return
    for source, plan, entry in zip(sources, plans, entries, strict=True):
        if not entry.averaged and (_has_stepped(source, entry) or not any(other.averaged for other in plan.values())):
            raise ValueError(
                f"dist_asgd: the averaging of {name} had begun in {with_average[0].opened.path}, and not in "
                f"{source.opened.path}: a mean of averages and last iterates is neither. Average the last iterates of "
                f"all (--last, last=True), or leave out the checkpoints from before averaging began."
            )


def check_same_names(sources: Sequence[CheckpointContents], plans: Sequence[Plan]) -> None:
    """Raise ValueError, naming an entry and both checkpoints, unless all have the same entries."""
    for source, plan in zip(sources[1:], plans[1:], strict=True):
        for one, other, names in ((sources[0], source, [*plans[0]]), (source, sources[0], [*plan])):
            apart = [name for name in names if name not in (plan if other is source else plans[0])]
            if apart:
                more = f" ({len(apart)} such names)" if len(apart) > 1 else ""
                raise ValueError(
                    f"dist_asgd: {apart[0]} is in {one.opened.path} and not in {other.opened.path}{more}: these are "
                    f"checkpoints of different models. Combine checkpoints of one model."
                )


def check_same_shapes(name: str, sources: Sequence[CheckpointContents], entries: Sequence[Weight]) -> None:
    """Raise ValueError, naming both checkpoints, unless the entry ``name`` has one shape in all of them."""
    for source, entry in zip(sources[1:], entries[1:], strict=True):
        if entry.spec.shape != entries[0].spec.shape:
            raise ValueError(
                f"dist_asgd: {name} is {list(entries[0].spec.shape)} in {sources[0].opened.path} and "
                f"{list(entry.spec.shape)} in {source.opened.path}: these are checkpoints of different models. Combine "
                f"checkpoints of one model."
            )


def result_dtype(
    name: str, sources: Sequence[CheckpointContents], entries: Sequence[Weight], dtype: torch.dtype | None
) -> torch.dtype:
    """Return the dtype that a combined entry is written in; raises ValueError if the entries are of different kinds."""
    dtypes = [entry.spec.dtype for entry in entries]
    for source, found in zip(sources, dtypes, strict=True):
        if not _is_number(found):
            raise ValueError(
                f"dist_asgd: {name} is {found} in {source.opened.path}, and comes from a parameter that was trained: "
                f"whole numbers have no mean. Load the checkpoints into the model and save them without the hook that "
                f"converts it."
            )
        if found.is_complex != dtypes[0].is_complex:
            raise ValueError(
                f"dist_asgd: {name} is {dtypes[0]} in {sources[0].opened.path} and {found} in {source.opened.path}: "
                f"combine checkpoints of one model."
            )
    if dtype is not None and dtypes[0].is_complex:
        raise ValueError(f"dist_asgd: parameter {name} is {dtypes[0]} and cannot be exported as {dtype}.")
    return dtype or reduce(lambda one, other: one if one == other else torch.promote_types(one, other), dtypes)


def sources_as_facts(sources: Sequence[CheckpointContents]) -> dict[str, list[str] | list[int | None]]:
    """Return the paths of the checkpoints, and their steps, None without a manifest."""
    manifests = [source.opened.manifest for source in sources]
    return {
        "sources": [str(source.opened.path) for source in sources],
        "steps": [None if manifest is None else manifest.step for manifest in manifests],
    }


def notes_of_ties(sources: Sequence[CheckpointContents], ties_by_value: bool) -> list[str]:
    """Return a note for each checkpoint that does not record ties and has entries with a parameter's values."""
    notes = (note_of_ties(source, ties_by_value) for source in sources)
    return [note for note in notes if note]
