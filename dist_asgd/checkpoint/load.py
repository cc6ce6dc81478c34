"""Loading a checkpoint into a model and its optimizer on all ranks: read whole, agreed on, and only then applied."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.optim import Optimizer

from ..comm.agreement import NO_FINGERPRINT, CollectiveCall, Fingerprint
from ..optimizer import ShardedASGD
from ..placements.shard_tensor import ShardTensor
from ..state_dict.sharded import AVERAGE
from .entries import EXTRA, GROUPS, MODEL, NOT_SAVED, OPTIM, SCALARS, STATE, Names, names_of, param_parts
from .format.files import CheckpointError
from .format.reader import CheckedReader
from .matching import CheckpointKeys, KeyMismatch
from .save import Saver

MASTER = "master"
NOT_LOADED = (*NOT_SAVED, "param_names")
_LOG = logging.getLogger("dist_asgd")


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A checkpoint in memory of its own, in the form that ``load_state_dict`` of model and optimizer take.

    ``parts``: of parameters that are gathered after every step each rank reads what it updates, (live, read); in
    ``model`` they are as they are.
    """

    model: dict[str, Any]
    parts: list[tuple[ShardTensor, ShardTensor]]
    optimizer: dict[str, Any]
    extra: Any
    save_id: str | None
    step: int | None
    difference: KeyMismatch


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    *,
    strict: bool = True,
    verify: bool = True,
) -> Any:
    """Load what any topology saved into ``model`` and ``optimizer``, on all ranks. Collective. Returns ``extra``.

    Everything is read into memory of its own and checked; when every rank has all it needs, it is applied. Where any
    rank fails, every rank raises, and model and optimizer are bit for bit what they were. Nothing in the checkpoint is
    executed. Hyperparameters come from the checkpoint, as in torch.

    Args:
        path: a checkpoint's directory.
        model, optimizer: as for ``save_checkpoint``; wrappers, stage and world size may be others than then.
        strict: False: load what matches, by name and shape, keep the rest as it is, and log what that was. True:
            parameters that were added, removed or renamed are an error that lists them.
        verify: check every byte that is read against the manifest. False is for checkpoints that something else wrote
            (FSDP2 with ``dcp.save``) and that have none.

    Returns:
        What this rank gave as ``extra`` when it was saved by as many ranks; on another number of ranks what rank 0
        gave; None if nothing was given.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, hostile or has no manifest.
        ValueError: it is of another model, or ranks disagree.
        PeerError: a rank died.
    """
    return restore(Saver.of(optimizer), CollectiveCall.LOAD_CHECKPOINT, path, model, optimizer, strict, verify).extra


def read_extra(path: str | os.PathLike[str], *, rank: int = 0, verify: bool = True) -> Any:
    """What rank ``rank`` gave as ``extra`` when ``path`` was saved, and nothing else of it; None if it gave nothing.

    Not collective. For what must be known before the model is built: its configuration, say.
    """
    return _extra(CheckpointKeys(CheckedReader(path, verify=verify), KeyMismatch()), rank)


def restore(
    saver: Saver,
    call: CollectiveCall,
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    strict: bool,
    verify: bool,
) -> LoadedCheckpoint:
    """Collective: ``load_checkpoint``, with all that was read."""
    staged: LoadedCheckpoint | None = None
    fingerprint, problem = NO_FINGERPRINT, None
    try:
        saver.settle_pending()
        staged = _stage(Path(path), model, optimizer, strict, verify, saver)
        entries: list[tuple[str, object]] = [("strict", strict), ("verify", verify), ("save", staged.save_id)]
        fingerprint = Fingerprint("checkpoints to load", entries, "Load the same checkpoint on every rank.")
    except Exception as error:
        problem = error
    saver.meet(call, fingerprint, problem)
    assert staged is not None
    optimizer.load_state_dict(staged.optimizer)
    with torch.no_grad():
        for live, read in staged.parts:
            live.copy_(read)
        _gather(optimizer)
        model.load_state_dict(staged.model, strict=not staged.difference)
    if staged.difference and saver.rank == 0:
        _LOG.warning("loaded what matches of %s: %s", path, staged.difference)
    return staged


def _gather(optimizer: Optimizer) -> None:
    """Collective: bring every rank's part of the parameters to all, as after a step."""
    if isinstance(optimizer, ShardedASGD):
        for bucket in optimizer.shards.buckets:
            optimizer.gatherer.launch(bucket)
        optimizer.gatherer.wait()


def _stage(
    path: Path, model: nn.Module, optimizer: Optimizer, strict: bool, verify: bool, saver: Saver
) -> LoadedCheckpoint:
    """Read all that this rank needs; changes nothing."""
    reader = CheckedReader(path, verify=verify)
    difference = KeyMismatch()
    found = CheckpointKeys(reader, difference)
    names = names_of(model, optimizer)
    live = optimizer.state_dict()
    optimizer_state = _stage_optimizer(found, names, optimizer, live, difference)
    mastered = {n for i, entry in optimizer_state["state"].items() if MASTER in entry for n in names.of_params[i]}
    model_state, parts = _stage_model(found, names, model, mastered, param_parts(optimizer, live, {}), difference)
    difference.check(path, strict)
    found.read()
    manifest, meta = reader.opened.manifest, reader.opened.metadata.storage_meta
    return LoadedCheckpoint(
        model_state,
        parts,
        optimizer_state,
        _extra(found, saver.rank if manifest is None or manifest.world_size == saver.world_size else 0),
        None if meta is None else meta.save_id,
        None if manifest is None else manifest.step,
        difference,
    )


def _stage_model(
    found: CheckpointKeys,
    names: Names,
    model: nn.Module,
    mastered: set[str],
    live_parts: dict[int, ShardTensor],
    difference: KeyMismatch,
) -> tuple[dict[str, Any], list[tuple[ShardTensor, ShardTensor]]]:
    """``mastered`` names parameters that the optimizer sets when it loads their masters: they stay as they are then.

    So do those of ``live_parts``, of which only that is read.
    """
    staged: dict[str, Any] = {}
    parts: list[tuple[ShardTensor, ShardTensor]] = []
    known = {f"{MODEL}.{name}" for name in names.of_model.values()}
    difference.unexpected += [key for key in found.keys if key.startswith(f"{MODEL}.") and key not in known]
    for key, value in model.state_dict(keep_vars=True).items():
        name = f"{MODEL}.{names.of_model[key]}"
        if name not in found.keys:
            difference.missing.append(name)
        elif names.of_model[key] in mastered:
            staged[key] = value
        elif id(value) in live_parts:
            staged[key] = value
            part = live_parts[id(value)]
            parts.append((part, cast(ShardTensor, found.memory_for(name, part, widen=False))))
        elif isinstance(value, Tensor):
            staged[key] = found.memory_for(name, value.detach(), widen=False)
        else:
            staged[key] = found.values([name])[name]
    return staged, parts


def _stage_optimizer(
    found: CheckpointKeys, names: Names, optimizer: Optimizer, live: dict[str, Any], difference: KeyMismatch
) -> dict[str, Any]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    groups = _Groups(found)
    used: set[str] = set()
    states: dict[int, dict[str, str]] = {}
    group_of: dict[int, dict[str, str]] = {}
    for index, aliases in enumerate(names.of_params):
        # Of a shared parameter any name will do: another wrapping may have put another one first.
        name = next((n for n in aliases if groups.of(n) or f"{OPTIM}.{STATE}.{n}" in found.parents), None)
        if name is None:
            difference.missing.append(f"{OPTIM}.{STATE}.{aliases[0]}")
            continue
        used.add(f"{OPTIM}.{STATE}.{name}")
        states[index] = found.parents.get(f"{OPTIM}.{STATE}.{name}", {})
        group_of[index] = groups.of(name)
    difference.unexpected += [
        parent
        for parent, below in found.parents.items()
        if parent.startswith(f"{OPTIM}.{STATE}.") and AVERAGE in below and parent not in used
    ]
    scalars = found.values(key for below in states.values() for last, key in below.items() if last in SCALARS)
    state: dict[int, Any] = {}
    for index, param in enumerate(params):
        if index not in states:
            kept = live["state"].get(index)
        else:
            model_key = next((k for k in (f"{MODEL}.{n}" for n in names.of_params[index]) if k in found.keys), None)
            kept = _stage_entry(found, states[index], scalars, live["state"].get(index), param, model_key)
        if kept is not None:
            state[index] = kept
    new_groups = [_stage_group(group, group_of, groups) for group in live["param_groups"]]
    for group in new_groups:
        for index in group["params"]:
            # As in torch: what has never stepped has no state.
            if index in state and index in states and _never_stepped(state[index], group["lr"]):
                del state[index]
    return {"state": state, "param_groups": new_groups}


def _stage_entry(
    found: CheckpointKeys,
    below: dict[str, str],
    scalars: dict[str, Tensor],
    live: dict[str, Any] | None,
    param: Tensor,
    model_key: str | None,
) -> dict[str, Any] | None:
    if AVERAGE not in below:
        return None
    absent = [key for key in SCALARS if key not in below]
    if absent:
        raise CheckpointError(f"dist_asgd: {below[AVERAGE]} is there without {absent}: this is no state of ASGD.")
    live = live or {AVERAGE: param.detach()}
    # Cloned: equal ones were read once, and torch's optimizer keeps what it is given.
    staged: dict[str, Any] = {key: scalars[below[key]].reshape(()).clone() for key in SCALARS}
    for key in (AVERAGE, MASTER):
        # A master that was not saved is the parameter that was, before it is rounded to this model's dtype.
        source = below.get(key, model_key if key == MASTER else None)
        if key in live and source is not None:
            staged[key] = found.memory_for(source, live[key], widen=True)
    return staged


def _never_stepped(entry: dict[str, Any], lr: Any) -> bool:
    eta = entry["eta"]
    return bool(entry["step"] == 0 and eta == torch.as_tensor(lr, dtype=eta.dtype, device=eta.device).reshape(()))


class _Groups:
    """Keys of each parameter's group: under its name where the state dict was flattened, else under a number."""

    def __init__(self, found: CheckpointKeys) -> None:
        self._found = found
        prefix = f"{OPTIM}.{GROUPS}."
        nested = {p: below for p, below in found.parents.items() if p.startswith(prefix) and "params" in below}
        listed = found.values(below["params"] for below in nested.values())
        self._nested = {
            name: below
            for below in nested.values()
            if isinstance(listed[below["params"]], list)
            for name in listed[below["params"]]
            if isinstance(name, str)
        }

    def of(self, name: str) -> dict[str, str]:
        """Keys by hyperparameter; empty where the checkpoint has no group with this parameter."""
        own = self._found.parents.get(f"{OPTIM}.{GROUPS}.{name}") or self._nested.get(name, {})
        return {last: key for last, key in own.items() if last not in NOT_LOADED}

    def values(self, keys: dict[str, str]) -> dict[str, Any]:
        """The hyperparameters at these keys."""
        found = self._found.values(keys.values())
        return {last: found[key] for last, key in keys.items()}


def _stage_group(live: dict[str, Any], group_of: dict[int, dict[str, str]], groups: _Groups) -> dict[str, Any]:
    """The group's values in the checkpoint, which are the same for all its parameters; else those of now."""
    first: dict[str, Any] | None = None
    for index in live["params"]:
        if not group_of.get(index):
            continue
        values = groups.values(group_of[index])
        if first is None:
            first = values
        for key in first.keys() | values.keys():
            if not _same(first.get(key), values.get(key)):
                raise ValueError(
                    f"dist_asgd: the parameters of one group were saved with different {key}: {first.get(key)} and "
                    f"{values.get(key)} ({group_of[index].get(key)}). Build the optimizer with the groups that were "
                    f"saved."
                )
    return {**live, **(first or {})}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)


def _extra(found: CheckpointKeys, rank: int) -> Any:
    key = f"{EXTRA}.{rank}"
    if not isinstance(found.keys.get(key), BytesStorageMetadata):
        return None
    value = found.values([key])[key]
    return value[0] if isinstance(value, tuple) and len(value) == 1 else None
