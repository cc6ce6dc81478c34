"""Converts a checkpoint to other files, in one process: to one for ``torch.optim.ASGD``, or to the weights alone.

The commands ``export`` and ``consolidate`` call it, and ``average`` chooses and reads its tensors with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...averaging_start import averaging_metadata, start_text
from ...module_buffers import KEY as BUFFERS_KEY
from ...state import MASTER_KEY
from ..format.directory import sync_directory
from ..format.locks import open_alone
from ..format.manifest import CheckpointError
from ..format.output import Output, check_free, siblings
from ..format.paths import AnyPath
from ..format.safetensors import DEFAULT_MAX_BYTES, SUFFIX, TensorFiles, TensorSpec
from ..sections import AVERAGES, OPTIM
from ..sources import Region
from .contents import MODEL, CheckpointContents, Progress, TensorEntry, no_progress

GROUPS_KEY = "param_groups"


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of an export.

    ``key`` is the checkpoint's key that it is read from, and ``region`` the part of it, None for all; ``spec`` has the
    dtype and shape that it is written with, and ``averaged`` says whether it is a parameter's average. ``params`` are
    the optimizer's parameters that it comes from, by name; a buffer has none. ``value`` is the tensor itself if it was
    read already.
    """

    key: str
    spec: TensorSpec
    averaged: bool
    region: Region | None = None
    params: tuple[str, ...] = ()
    value: Tensor | None = None


def with_average(contents: CheckpointContents, name: str | None) -> CheckpointContents:
    """Return ``contents`` with the average ``name`` in the optimizer's place; it is the one to export.

    ``"optim"`` is the average of the optimizer itself, and None is the only one that there is.

    Raises:
        ValueError: there is none of this name, or ``name`` is None and there are several; the error lists them.
    """
    known = [OPTIM] * bool(contents.state) + contents.average_names
    if name is None and len(known) < 2:
        name = known[0] if known else OPTIM
    elif not known:
        raise ValueError(
            f"dist_asgd: {contents.opened.path} has no average {name!r}, and no other. Leave --average (average=) out "
            f"to export the last iterates."
        )
    elif name not in known:
        what = "has several averages, and export writes one" if name is None else f"has no average {name!r}"
        listed = ", ".join(
            f"{known_name} (the optimizer's)" if known_name == OPTIM else known_name for known_name in known
        )
        raise ValueError(f"dist_asgd: {contents.opened.path} {what}. Pass --average (average=) with one of: {listed}.")
    return contents if name == OPTIM else contents.average(name)


def plan_export(
    contents: CheckpointContents,
    last: bool,
    dtype: torch.dtype | None,
    *,
    ties_by_value: bool = True,
    masters: bool = False,
) -> dict[str, Weight]:
    """Choose the tensors of an export, by name: each parameter's average if its averaging has begun and not ``last``.

    Parameters of the optimizer are converted to ``dtype``, unless it is None. Buffers, and parameters that the
    optimizer does not have, keep their dtype. Raises CheckpointError if the checkpoint has no model, and ValueError if
    a tensor cannot be converted to ``dtype``, or if not every average would be in the export. Of a checkpoint without a
    record of ties, ``ties_by_value`` says whether an entry with the values of a parameter is that parameter. With
    ``masters`` the last iterate of a parameter is read from its float32 master, if it has one, also if it is not
    converted.
    """
    if not contents.model:
        raise CheckpointError(
            f"dist_asgd: {contents.opened.path} has no model (no keys '{MODEL}...'). {_advice(contents)}"
        )
    check_dtype(dtype)
    plan: dict[str, Weight] = {}
    exported: set[str] = set()
    kept = {} if last else _kept_buffers(contents)
    for name, entry in contents.model.items():
        params, region = _source(contents, name, ties_by_value)
        begun = [] if last else [param for param in params if contents.has_begun_averaging(param)]
        record = contents.sources
        is_computed = record is not None and name in record.computed
        if begun and is_computed:
            raise ValueError(
                f"dist_asgd: cannot export {name}: a state_dict hook of the model computed it from the last iterate of "
                f"{_listed(params)}, whose averaging had begun, and only the model knows how. {_REMEDY}"
            )
        wanted = entry.dtype
        optimized = tuple(param for param in params if param in contents.optimized)
        if dtype is not None and optimized:
            if entry.dtype.is_complex:
                raise ValueError(f"dist_asgd: parameter {name} is {entry.dtype} and cannot be exported as {dtype}.")
            # Hooks may quantise weights.
            wanted = dtype if entry.dtype.is_floating_point else wanted
        exported.update(begun)
        spec = TensorSpec(wanted, entry.shape)
        if name in kept:
            plan[name] = Weight(entry.key, spec, False, value=kept[name])
        elif begun:
            average = contents.state[begun[0]]["ax"]
            fits = average.shape == entry.shape if region is None else region.fits(entry.shape, average.shape)
            if not fits:
                raise CheckpointError(
                    f"dist_asgd: {contents.opened.path}: {name} is {list(entry.shape)}, and is recorded to come from "
                    f"parameter {begun[0]}, whose ax is {list(average.shape)}: the record is damaged."
                )
            plan[name] = Weight(average.key, spec, True, region, optimized)
        else:
            key, of = _last_iterate(contents, () if is_computed else params, entry, spec, region, masters)
            plan[name] = Weight(key, spec, False, of, optimized)
    left_out = [] if last else [n for n in contents.state if contents.has_begun_averaging(n) and n not in exported]
    if left_out:
        raise ValueError(
            f"dist_asgd: the averaging of {_listed(left_out)} had begun, and the model in the checkpoint has no such "
            f"parameters: a state_dict hook of the model renamed, fused or dropped them. {_REMEDY}"
        )
    return plan


def _kept_buffers(contents: CheckpointContents) -> dict[str, Tensor]:
    """Read the buffers that a ``ShardedAverage`` keeps (``buffers="average"`` or ``"copy"``), by name in the model."""
    shared, _ = contents.own_objects
    kept = shared.get(BUFFERS_KEY)
    found: dict[str, Tensor] = {}
    for name, value in kept.items() if isinstance(kept, dict) else ():
        entry = contents.model.get(name)
        if entry is not None and isinstance(value, Tensor) and (value.shape, value.dtype) == (entry.shape, entry.dtype):
            found[name] = value
    return found


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise ValueError unless weights can be converted to ``dtype``; None converts nothing."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dist_asgd: cannot export weights as {dtype}: wanted a floating-point dtype.")


_REMEDY = (
    "Load the checkpoint into the model and its optimizer (load_checkpoint()) and call export_averaged(), or export "
    "the last iterate (--last)."
)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"parameter{'s' * (len(names) > 1)} {', '.join(names[:3])}{more}"


def _source(contents: CheckpointContents, name: str, ties_by_value: bool) -> tuple[Sequence[str], Region | None]:
    """The parameters that an entry of the model comes from, and the region that it has of a single one."""
    record = contents.sources
    if record is not None and name in record.whole:
        return [record.whole[name]], None
    if record is not None and name in record.regions:
        param, region = record.regions[name]
        return [param], region
    if record is not None and name in record.computed:
        return record.computed[name], None
    return [contents.tied_by_value.get(name, name) if ties_by_value else name], None


def _last_iterate(
    contents: CheckpointContents,
    params: Sequence[str],
    entry: TensorEntry,
    spec: TensorSpec,
    region: Region | None,
    masters: bool,
) -> tuple[str, Region | None]:
    """The key, and the region of it, that has the last iterate of ``entry``: of its parameter's master if that counts.

    It counts if the entry is converted, or with ``masters`` always.
    """
    if len(params) != 1 or not contents.is_asgd or (spec.dtype == entry.dtype and not masters):
        return entry.key, None
    master = contents.state.get(params[0], {}).get(MASTER_KEY)
    if master is None:
        return entry.key, None
    fits = master.shape == entry.shape if region is None else region.fits(entry.shape, master.shape)
    return (master.key, region) if fits else (entry.key, None)


def _advice(contents: CheckpointContents) -> str:
    return f"{contents.other_keys()} Say with --prefix where else they are, if they are.".strip()


def export(
    contents: CheckpointContents,
    out: AnyPath,
    plan: Mapping[str, Weight],
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> list[AnyPath]:
    """Write the weights of ``plan``, one tensor at a time, and return the files.

    There are several files, and an index, if the weights have more than ``max_bytes``.
    """
    specs = {name: weight.spec for name, weight in plan.items()}
    files = TensorFiles(out, specs, metadata=_metadata(contents, plan), max_bytes=max_bytes, overwrite=overwrite)
    with files:
        for name, weight in plan.items():
            # The tensor gets no name, because it would live on while the next one is read.
            files.write(name, read_weight(contents, weight).to(weight.spec.dtype))
            progress(weight.spec.bytes)
    return files.paths


def _metadata(contents: CheckpointContents, plan: Mapping[str, Weight]) -> dict[str, str]:
    """What the header says about the averages; "not exported" if there are some, and these are the last iterates."""
    # The last iterates of other optimizers are exported, too.
    if not contents.is_asgd:
        return {}
    counts = [contents.averaged_steps(name) for name in contents.state]
    has_last_iterates = any(count != 0 for count in counts) and not any(weight.averaged for weight in plan.values())
    return {"averaging": "not exported"} if has_last_iterates else averaging_metadata(counts)


def note_of_last_iterates(contents: CheckpointContents) -> str:
    """Say why an export has no average, and when averaging will begin in the run that wrote the checkpoint."""
    if not contents.state:
        why = f" ({contents.optimizer_class} keeps none)" if contents.optimizer_class else ""
        return f"the checkpoint has no averages{why}: these are the last iterates."
    begun = f"averaging has not begun for any parameter: these are the last iterates. {_start_of_averaging(contents)}"
    return begun.rstrip()


def _start_of_averaging(contents: CheckpointContents) -> str:
    step = max((scalars["step"].item() for scalars in contents.scalars.values()), default=0.0)
    return start_text(step, min(contents.first_average_steps.values(), default=None))


def read_weight(contents: CheckpointContents, weight: Weight) -> Tensor:
    """Read the whole tensor of ``weight`` on the CPU, with the dtype and strides of the checkpoint."""
    whole = contents.tensor(weight.key) if weight.value is None else weight.value
    return whole if weight.region is None else weight.region.of(whole.contiguous())


def note_of_ties(contents: CheckpointContents, taken: bool) -> str:
    """Return which entries have a parameter's values in a checkpoint that does not record ties; "" if there are none.

    ``taken`` says whether they were exported as that parameter (``ties_by_value``).
    """
    tied = sorted(contents.tied_by_value.items())
    if not tied:
        return ""
    shown = ", ".join(f"{name} ({param})" for name, param in tied[:5]) + f" and {len(tied) - 5} more" * (len(tied) > 5)
    what = "were exported as that parameter" if taken else "were exported as they are"
    other = "--no-ties-by-value" if taken else "--ties-by-value"
    return (
        f"{contents.opened.path} does not record ties. Entries with the values of a parameter {what}: {shown}. Pass "
        f"{other} if they {'only look alike' if taken else 'are tied'}."
    )


def num_consolidated(contents: CheckpointContents) -> int:
    """Return how many tensors of the model, the optimizer's state and the averages there are."""
    views = (contents, *(contents.average(name) for name in contents.average_names))
    of_state = [entries for view in views for found in (view.state, view.own_tensors) for entries in found.values()]
    return len(contents.model) + sum(map(len, of_state))


def consolidate(
    contents: CheckpointContents, out: AnyPath, *, overwrite: bool = False, progress: Progress = no_progress
) -> list[AnyPath]:
    """Write the whole model, optimizer state and averages to ``out``, and return the files.

    A ``.pt`` file is a dict with ``model``, the state dict of a module, ``optim``, the state dict of a
    ``torch.optim.ASGD`` or of the optimizer that was saved, and ``averages``, those of averages by name, if there are
    any. It is assembled in memory. A ``.safetensors`` file has the tensors under the checkpoint's own keys, and the
    parameter groups as JSON in its metadata. It is written one tensor at a time. Raises CheckpointError if the
    checkpoint has no optimizer state, and ValueError for another suffix.
    """
    if not contents.state and not contents.groups:
        raise CheckpointError(
            f"dist_asgd: {contents.opened.path} has no optimizer state (no keys '{contents.state_prefix}...'). "
            f"{_advice(contents)}"
        )
    if out.suffix == SUFFIX:
        return _to_safetensors(contents, out, overwrite, progress)
    if out.suffix != ".pt":
        raise ValueError(f"dist_asgd: {out} must end in .pt or {SUFFIX}.")
    check_free(out, _taken(out), overwrite)
    whole = _whole(contents, progress)
    output = Output(out)
    try:
        output.open()
        partial = output.local.with_name(f".{out.name}.partial")
        with open_alone(partial) as file:
            try:
                _save(whole, file)
                file.flush()
                os.fsync(file.fileno())
                # Another writer may have come first since this one has begun.
                check_free(out, _taken(out), overwrite)
                partial.replace(output.local)
                sync_directory(output.local.parent)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        output.publish([out.name])
    finally:
        output.discard()
    return [out]


def _taken(out: AnyPath) -> list[AnyPath]:
    return [path for path in siblings(out) if path.name == out.name]


def _save(whole: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(whole, file)
    except RuntimeError as error:
        # If the disk is full, torch raises a RuntimeError with a position; the cause is the OSError behind it.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _whole(contents: CheckpointContents, progress: Progress) -> dict[str, Any]:
    """The content of a ``.pt`` file."""
    keys = [entry.key for entry in contents.model.values()]
    model: dict[str, Any] = {key.removeprefix(MODEL): tensor for key, tensor in contents.read(keys, progress)}
    model |= contents.model_objects()
    whole = {"model": model, OPTIM: _state_dict(contents, progress)}
    if contents.average_names:
        views = {name: contents.average(name) for name in contents.average_names}
        whole[AVERAGES] = {name: _state_dict(view, progress) for name, view in views.items()}
    return whole


def _state_dict(contents: CheckpointContents, progress: Progress) -> dict[str, Any]:
    """The state dict of the optimizer, or of the average in its place."""
    names = [name for group in contents.groups for name in group["params"]]
    unlisted = (contents.state.keys() | contents.own_tensors.keys()) - set(names)
    if unlisted:
        raise CheckpointError(
            f"dist_asgd: {contents.opened.path} has state of {sorted(unlisted)[0]}, but no hyperparameters for it."
        )
    state: dict[Any, Any] = {}
    shared, own_objects = contents.own_objects
    for index, name in enumerate(names):
        own_tensors, own = contents.own_tensors.get(name, {}), own_objects.get(name, {})
        # A parameter that never stepped has no state in torch, unless users keep something there.
        stepped = name in contents.state and contents.scalars[name]["step"].item()
        if stepped or own or own_tensors:
            entries = {**contents.state.get(name, {}), **own_tensors}
            state[index] = {state_key: contents.tensor(entry.key) for state_key, entry in entries.items()} | own
            progress(sum(entry.bytes for entry in entries.values()))
    state |= shared
    groups = []
    first = 0
    for group in contents.groups:
        count = len(group["params"])
        options = {key: value for key, value in group.items() if key != "params"}
        groups.append({**options, "param_names": group["params"], "params": list(range(first, first + count))})
        first += count
    return {"state": state, GROUPS_KEY: groups}


def _keys(contents: CheckpointContents, *prefixes: str) -> list[str]:
    return [key for key in contents.tensors if key.startswith(prefixes)]


def _to_safetensors(contents: CheckpointContents, out: AnyPath, overwrite: bool, progress: Progress) -> list[AnyPath]:
    # One file at any size: the consolidated state is read back by key, and no loader of shards expects it.
    views = {name: contents.average(name) for name in contents.average_names}
    keys = _keys(contents, MODEL, contents.state_prefix, *(view.state_prefix for view in views.values()))
    _, numbers = contents.own_objects
    if numbers and not contents.is_asgd:
        raise ValueError(
            f"dist_asgd: the optimizer in {contents.opened.path} keeps values of parameters that are no tensors, and a "
            f"{SUFFIX} file would lose them. Consolidate to a .pt file."
        )
    specs = {key: TensorSpec(contents.tensors[key].dtype, contents.tensors[key].shape) for key in keys}
    try:
        metadata = {GROUPS_KEY: json.dumps(contents.groups, default=_as_json)}
        if views:
            of_averages = {name: view.groups for name, view in views.items()}
            metadata[f"{AVERAGES}.{GROUPS_KEY}"] = json.dumps(of_averages, default=_as_json)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"dist_asgd: the options of {contents.opened.path} cannot be written as JSON ({error}), which is what a "
            f"{SUFFIX} file has. Consolidate to a .pt file."
        ) from error
    files = TensorFiles(out, specs, metadata=metadata, max_bytes=1 << 62, overwrite=overwrite)
    with files:
        for key, spec in specs.items():
            # The tensor gets no name, because it would live on while the next one is read.
            files.write(key, contents.tensor(key))
            progress(spec.bytes)
    return files.paths


def _as_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON")
