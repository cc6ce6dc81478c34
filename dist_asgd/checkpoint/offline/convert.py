"""A checkpoint as other files: one for ``torch.optim.ASGD``, or the weights alone. One process, no process group."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..format.directory import sync_directory
from ..format.manifest import CheckpointError
from ..format.safetensors import DEFAULT_MAX_BYTES, SUFFIX, TensorFiles, TensorSpec, check_free
from .contents import MODEL, STATE, CheckpointContents, Progress, no_progress

GROUPS_KEY = "param_groups"


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of an export: the checkpoint's key it comes from, and the dtype it gets."""

    key: str
    spec: TensorSpec
    averaged: bool


def plan_export(contents: CheckpointContents, last: bool, dtype: torch.dtype | None) -> dict[str, Weight]:
    """What goes into an export, by name: the average where averaging has begun, unless ``last``.

    ``dtype`` is that of what the optimizer holds; buffers, and parameters that it does not have, stay as they are.
    """
    if not contents.model:
        raise CheckpointError(f"dist_asgd: {contents.opened.path} has no model (no keys '{MODEL}...').")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dist_asgd: cannot export weights as {dtype}: wanted a floating-point dtype.")
    plan = {}
    for name, stored in contents.model.items():
        source = contents.tied.get(name, name)
        averaged = not last and contents.begun(source)
        wanted = stored.dtype
        if dtype is not None and source in contents.optimized:
            if stored.dtype.is_complex:
                raise ValueError(f"dist_asgd: parameter {name} is {stored.dtype} and cannot be exported as {dtype}.")
            wanted = dtype
        key = contents.state[source]["ax"].key if averaged else stored.key
        plan[name] = Weight(key, TensorSpec(wanted, stored.shape), averaged)
    return plan


def export(
    contents: CheckpointContents,
    out: Path,
    plan: Mapping[str, Weight],
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> list[Path]:
    """Write the weights of ``plan``, a tensor at a time; the files, of which there are several above ``max_bytes``."""
    specs = {name: weight.spec for name, weight in plan.items()}
    files = TensorFiles(out, specs, metadata={}, max_bytes=max_bytes, overwrite=overwrite)
    with files:
        for name, weight in plan.items():
            files.write(name, contents.tensor(weight.key).to(weight.spec.dtype))
            progress(weight.spec.bytes)
    return files.paths


def consolidate(
    contents: CheckpointContents, out: Path, *, overwrite: bool = False, progress: Progress = no_progress
) -> list[Path]:
    """Write the whole model and optimizer state to one place; the files.

    ``.pt``: a dict with ``model``, a module's state dict, and ``optim``, one of ``torch.optim.ASGD``, for
    ``torch.load``; it needs the memory of its content. ``.safetensors``: the tensors under the checkpoint's own keys,
    a tensor at a time, and the parameter groups as JSON in the metadata.
    """
    if not contents.state and not contents.groups:
        raise CheckpointError(f"dist_asgd: {contents.opened.path} has no optimizer state (no keys '{STATE}...').")
    if out.suffix == SUFFIX:
        return _to_safetensors(contents, out, overwrite, progress)
    if out.suffix != ".pt":
        raise ValueError(f"dist_asgd: {out} must end in .pt or {SUFFIX}.")
    check_free(out, [out] if out.exists() else [], overwrite)
    whole = _whole(contents, progress)
    partial = out.with_name(f".{out.name}.partial")
    try:
        with partial.open("wb") as file:
            _save(whole, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
        sync_directory(out.parent)
    finally:
        partial.unlink(missing_ok=True)
    return [out]


def _save(whole: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(whole, file)
    except RuntimeError as error:
        # torch's writer says only where it was when the disk was full.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _whole(contents: CheckpointContents, progress: Progress) -> dict[str, Any]:
    model = {key.removeprefix(MODEL): tensor for key, tensor in contents.read(_keys(contents, MODEL), progress)}
    names = [name for group in contents.groups for name in group["params"]]
    unlisted = contents.state.keys() - set(names)
    if unlisted:
        raise CheckpointError(
            f"dist_asgd: {contents.opened.path} has state of {sorted(unlisted)[0]}, but no hyperparameters for it."
        )
    state: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(names):
        # A parameter that never stepped has no state in torch.
        if name in contents.state and contents.scalars[name]["step"].item():
            keys = {part: stored.key for part, stored in contents.state[name].items()}
            state[index] = {part: contents.tensor(key) for part, key in keys.items()}
            progress(sum(contents.tensors[key].bytes for key in keys.values()))
    groups = []
    first = 0
    for group in contents.groups:
        count = len(group["params"])
        options = {key: value for key, value in group.items() if key != "params"}
        groups.append({**options, "param_names": group["params"], "params": list(range(first, first + count))})
        first += count
    return {"model": model, "optim": {"state": state, GROUPS_KEY: groups}}


def _keys(contents: CheckpointContents, *prefixes: str) -> list[str]:
    return [key for key in contents.tensors if key.startswith(prefixes)]


def _to_safetensors(contents: CheckpointContents, out: Path, overwrite: bool, progress: Progress) -> list[Path]:
    keys = _keys(contents, MODEL, STATE)
    specs = {key: TensorSpec(contents.tensors[key].dtype, contents.tensors[key].shape) for key in keys}
    groups = [
        {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in contents.groups
    ]
    files = TensorFiles(out, specs, metadata={GROUPS_KEY: json.dumps(groups)}, max_bytes=1 << 62, overwrite=overwrite)
    with files:
        for key, spec in specs.items():
            # No name for the tensor: it would live on while the next is read.
            files.write(key, contents.tensor(key))
            progress(spec.bytes)
    return files.paths
