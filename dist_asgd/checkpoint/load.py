"""Loading a checkpoint into a model and its optimizer on all ranks: read whole, agreed on, and only then applied.

``CheckpointManager`` and the public functions of this file call ``restore``. It reads everything that this rank needs
into memory of its own (``CheckpointState``), lets all ranks agree that they can go on, and then changes model and
optimizer. Names and keys are those of ``entries``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.optim import Optimizer

from ..averaging import Averages as InPlace
from ..comm.agreement import NO_FINGERPRINT, Fingerprint, public_call
from ..comm.reports import CollectiveCall
from ..labels import Label, labelled
from ..placements.shard_tensor import ShardTensor
from ..sharded_average import ShardedAverage
from ..sharded_state import ShardedState
from ..state import MASTER_KEY
from ..state_dict.sharded import AVERAGE
from ..validation import params_of
from .apply import apply
from .averages import Averages
from .containers import Containers
from .entries import param_fragments
from .format.chunk_table import ChunkTable
from .format.identity import identity_of
from .format.layouts import Prefix, check_prefix, hint
from .format.paths import AnyPath, UserPath, as_path
from .format.reader import CheckedReader, OpenCheckpoint
from .keys import CheckpointKeys, KeyMismatch, listed
from .names import Names, names_of
from .optimizer_entries import refuse
from .optimizer_state import OptimizerState, read_optimizer
from .save import Saver, adopt_params, take_in
from .sections import EXTRA, MODEL, OPTIM, STATE, average_names, root_of

# The end of the keys under which torch keeps what get_extra_state() returns.
_EXTRA_STATE_KEY_SUFFIX = "_extra_state"
_LOG = logging.getLogger("dist_asgd")


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """What a checkpoint gives this rank, in memory of its own: nothing of it is applied yet.

    Attributes:
        model: for ``model.load_state_dict()``. Of a parameter in a bucket a rank loads only its own fragment and
            gathers the rest, so this has the live parameter itself.
        fragments: (live fragment, loaded fragment) pairs of these parameters.
        optimizer: for ``optimizer.load_state_dict()``.
        averages: the same for each average that the checkpoint has.
        extra: what this rank gave as ``extra``, or None.
        step: the number of steps of the manifest, None without a manifest.
        mismatch: the names that were not loaded.
        without_master: the parameters whose float32 masters are dropped, because the optimizer has none.
    """

    model: dict[str, Any]
    fragments: list[tuple[ShardTensor, ShardTensor]]
    optimizer: OptimizerState
    averages: dict[str, OptimizerState]
    extra: Any
    step: int | None
    mismatch: KeyMismatch
    without_master: list[str]


def load_checkpoint(
    path: UserPath,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    strict: bool = True,
    verify: bool = True,
    prefix: Prefix = "",
    averages: Averages = None,
) -> Any:
    """Load what any topology saved into ``model``, ``optimizer`` and ``averages``. Collective. Returns ``extra``.

    Everything is read into memory of its own and checked; it is applied when every rank has all it needs. If any rank
    fails, every rank raises, and model, optimizer and averages are bit for bit what they were. Nothing in the
    checkpoint is executed. Hyperparameters, and the rules of averages, come from the checkpoint, as in torch.

    Args:
        path: a checkpoint's directory, or its address in an object store.
        model, optimizer: as for ``save_checkpoint``; wrappers, stage and world size may differ from those at the save.
        strict: False: load the entries that match by name and shape, keep the rest as it is, and log what was kept.
            True: parameters and averages that were added, removed or renamed are an error that lists them, and so is
            the state of an optimizer of another class.
        verify: check every byte that is read against the manifest. False is for checkpoints that something else wrote
            (FSDP2 with ``dcp.save``) and that have none.
        prefix: where something else has put model and optimizer: a string that stands before ``model`` and ``optim``
            in the checkpoint's keys (``"app"``), or a dict that says what stands in their place
            (``{"model": "", "optim": "optimizer"}``). The error about missing names says which one fits.
        averages: a ``ShardedAverage``, or several by name, as for ``save_checkpoint``.

    Returns:
        What this rank gave as ``extra``, if as many ranks saved the checkpoint as load it; on another number of ranks
        what rank 0 gave. None if nothing was given.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, hostile or has no manifest.
        ValueError: it is of another model, nothing in it matches (also with ``strict=False``), or ranks disagree.
        PeerError: a rank died.
    """
    call = CollectiveCall.LOAD_CHECKPOINT
    saver = Saver.of(optimizer)
    kept = saver.agree_on_averages(call, averages, optimizer)
    return restore(saver, call, path, model, optimizer, strict, verify, prefix, kept).extra


def read_extra(path: UserPath, *, rank: int = 0, verify: bool = True) -> Any:
    """Read only what rank ``rank`` gave as ``extra`` when ``path`` was saved; None if it gave nothing.

    Not collective. It serves to read what must be known before the model is built, such as its configuration.
    """
    return _extra(CheckpointKeys(CheckedReader(path, verify=verify), KeyMismatch()), rank)


@public_call
def restore(
    saver: Saver,
    call: CollectiveCall,
    path: UserPath,
    model: nn.Module,
    optimizer: Optimizer,
    strict: bool,
    verify: bool,
    prefix: Prefix = "",
    averages: Mapping[str, ShardedAverage] = MappingProxyType({}),
) -> CheckpointState:
    """Do the work of ``load_checkpoint``, and return everything that was read. Collective; raises on all ranks."""
    adopt_params(optimizer)
    reader = _open_together(saver, call, path, strict, verify, prefix)
    loaded: CheckpointState | None = None
    while loaded is None or _take_in(loaded, optimizer, averages):
        problem: Exception | None = None
        try:
            loaded = _read_state(as_path(path), reader, model, optimizer, averages, strict, saver)
        except Exception as error:
            problem = error
        saver.agree(call, NO_FINGERPRINT, problem)
    apply(loaded, path, saver, call, model, optimizer, averages)
    if loaded.mismatch and saver.rank == 0:
        _LOG.warning("loaded what matches of %s: %s", path, loaded.mismatch)
    if loaded.without_master and saver.rank == 0:
        _LOG.warning(
            "loaded %s without the float32 masters of %d parameters (%s), which go on from their 16-bit values: the "
            "optimizer has no masters. Build it with master_weights=True to keep them",
            path,
            len(loaded.without_master),
            listed(loaded.without_master),
        )
    return loaded


def _take_in(loaded: CheckpointState, optimizer: Optimizer, averages: Mapping[str, ShardedAverage]) -> bool:
    """Give frozen parameters of which state was read some to load it into; whether there are any. Collective."""
    pairs = [(optimizer, loaded.optimizer), *((averages[name], state) for name, state in loaded.averages.items())]
    found = [take_in(owner, state.with_average) for owner, state in pairs]
    return any(found)


@labelled(Label.LOAD_OPEN)
def _open_together(
    saver: Saver, call: CollectiveCall, path: UserPath, strict: bool, verify: bool, prefix: Prefix
) -> CheckedReader:
    """Return a reader of the checkpoint, whose metadata and manifest rank 0 alone reads. Collective; raises on all.

    The other ranks make sure that their path leads to the same checkpoint, and get all that rank 0 has read.
    """
    fingerprint, problem, opened = NO_FINGERPRINT, None, None
    try:
        saver.wait_pending()
        check_prefix(prefix)
        if saver.rank == 0:
            opened = OpenCheckpoint(path, verify=verify, prefix=prefix)
        identity = identity_of(path, verify=verify)
        entries: list[tuple[str, object]] = [("strict", strict), ("verify", verify), ("save", identity)]
        entries.append(("prefix", repr(prefix)))
        fingerprint = Fingerprint(
            "checkpoints to load", entries, "Load the same checkpoint, with the same averages, on every rank."
        )
    except Exception as error:
        problem = error
    saver.agree(call, fingerprint, problem)
    if saver.world_size > 1:
        packed = saver.from_first(b"" if opened is None else opened.table().pack())
        # Rank 0 too: the table finds the chunks that a rank needs faster, and takes less memory.
        opened = OpenCheckpoint.of_table(path, ChunkTable.unpack(packed))
    assert opened is not None
    return CheckedReader.of(opened)


@labelled(Label.LOAD_READ)
def _read_state(
    path: AnyPath,
    reader: CheckedReader,
    model: nn.Module,
    optimizer: Optimizer,
    averages: Mapping[str, ShardedAverage],
    strict: bool,
    saver: Saver,
) -> CheckpointState:
    """Read all that this rank needs; changes nothing."""
    refuse(optimizer)
    InPlace.refuse_swapped("loading a checkpoint", params_of(optimizer.param_groups))
    mismatch = KeyMismatch()
    checkpoint = CheckpointKeys(reader, mismatch)
    names = names_of(model, optimizer)
    # The state of now says how ax and masters are sharded on this rank, and what strict=False keeps.
    live = optimizer.live_state(fresh=True) if isinstance(optimizer, ShardedState) else optimizer.state_dict()
    state = read_optimizer(checkpoint, names, optimizer, live, mismatch, OPTIM, strict)
    entries = state.state_dict[STATE]
    with_master = {n for i in state.with_average if MASTER_KEY in entries[i] for n in names.of_params[i]}
    live_fragments = param_fragments(optimizer, live, {})
    masters = _masters_of(checkpoint, names)
    model_state, fragments = _model_state(checkpoint, names, model, with_master, masters, live_fragments, mismatch)
    of_averages = _averages(checkpoint, model, averages, mismatch, strict)
    # The keys are compared before the tensors are read, so that a wrong checkpoint is refused at once.
    if any(name not in mismatch.averages for name in mismatch.missing):
        mismatch.hint = hint(checkpoint.keys, names.of_model.values())
    elif mismatch.averages:
        mismatch.hint = "Averages are loaded by averages={name: average}, under the names that they were saved with."
    mismatch.check(path, strict)
    checkpoint.read_tensors()
    saved_by = reader.opened.saved_by
    return CheckpointState(
        model_state,
        fragments,
        state,
        of_averages,
        _extra(checkpoint, saver.rank if saved_by is None or saved_by.world_size == saver.world_size else 0),
        None if saved_by is None else saved_by.step,
        mismatch,
        _without_master(names, masters, with_master, optimizer),
    )


def _without_master(names: Names, masters: Mapping[str, str], with_master: set[str], optimizer: Optimizer) -> list[str]:
    """Return the names of the parameters whose masters are not loaded, and that are too narrow to hold them."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    named = zip((aliases[0] for aliases in names.of_params), params, strict=True)
    return [n for n, p in named if n in masters and n not in with_master and p.dtype.itemsize < torch.float32.itemsize]


def _averages(
    checkpoint: CheckpointKeys,
    model: nn.Module,
    averages: Mapping[str, ShardedAverage],
    mismatch: KeyMismatch,
    strict: bool,
) -> dict[str, OptimizerState]:
    """Return ``averages`` of ``CheckpointState``, and note which averages only one side has."""
    saved = average_names(checkpoint.keys)
    missing = [root_of(name) for name in averages if name not in saved]
    unexpected = [root_of(name) for name in saved if name not in averages]
    mismatch.missing += missing
    mismatch.unexpected += unexpected
    mismatch.averages = [*missing, *unexpected]
    found = {}
    for name in saved:
        if name in averages:
            average, root = averages[name], root_of(name)
            live = average.live_state(fresh=True)
            found[name] = read_optimizer(checkpoint, names_of(model, average), average, live, mismatch, root, strict)
    return found


# --- the model -------------------------------------------------------------------------------------------


def _model_state(
    checkpoint: CheckpointKeys,
    names: Names,
    model: nn.Module,
    with_master: set[str],
    masters: Mapping[str, str],
    live_fragments: dict[int, ShardTensor],
    mismatch: KeyMismatch,
) -> tuple[dict[str, Any], list[tuple[ShardTensor, ShardTensor]]]:
    """Return ``model`` and ``fragments`` of ``CheckpointState``.

    The parameters named in ``with_master`` are not read: loading the optimizer sets them from their masters. Of those
    in ``live_fragments`` (by ``id()``) only this rank's fragment is read. ``masters`` are the keys of masters in the
    checkpoint: a parameter that has another dtype here than there comes from its master, which is not rounded.
    """
    state: dict[str, Any] = {}
    fragments: list[tuple[ShardTensor, ShardTensor]] = []
    objects: dict[str, str] = {}
    found = {name: checkpoint.find(f"{MODEL}.{name}") for name in names.of_model.values()}
    known = {key for key in found.values() if key is not None}
    for key, value in model.state_dict(keep_vars=True).items():
        name = found[names.of_model[key]]
        # What a module keeps beside its tensors may have any shape and kind: the module takes what was saved.
        if not isinstance(value, Tensor) or key.endswith(_EXTRA_STATE_KEY_SUFFIX):
            objects[name or f"{MODEL}.{names.of_model[key]}"] = key
            state[key] = value
        elif name is None:
            mismatch.missing.append(f"{MODEL}.{names.of_model[key]}")
        elif names.of_model[key] in with_master:
            state[key] = value
        else:
            master = masters.get(names.of_model[key])
            source = name if master is None or checkpoint.dtype_of(name) == value.dtype else master
            if id(value) in live_fragments:
                state[key] = value
                live = live_fragments[id(value)]
                fragments.append((live, cast(ShardTensor, checkpoint.target_for(source, live, widen=False))))
            else:
                state[key] = checkpoint.target_for(source, value.detach(), widen=False)
    mismatch.num_matches += len(known)
    known |= _read_objects(checkpoint, objects, state, mismatch)
    mismatch.unexpected += [key for key in checkpoint.keys if key.startswith(f"{MODEL}.") and key not in known]
    return state, fragments


def _masters_of(checkpoint: CheckpointKeys, names: Names) -> dict[str, str]:
    """Return the keys of the masters in the checkpoint, by every name of their parameter."""
    masters: dict[str, str] = {}
    for aliases in names.of_params:
        keys = (checkpoint.find(f"{OPTIM}.{STATE}.{name}.{MASTER_KEY}") for name in aliases)
        # Without an average beside it, it is something that another optimizer calls so.
        key = next((key for key in keys if key is not None and _has_average(checkpoint, key)), None)
        if key is not None:
            masters |= dict.fromkeys(aliases, key)
    return masters


def _has_average(checkpoint: CheckpointKeys, key: str) -> bool:
    return AVERAGE in checkpoint.parents[key.rpartition(".")[0]]


def _read_objects(
    checkpoint: CheckpointKeys, objects: Mapping[str, str], state: dict[str, Any], mismatch: KeyMismatch
) -> set[str]:
    """Replace the live values that ``objects`` names, by key of the checkpoint, in ``state`` by the saved ones.

    Returns the keys of the checkpoint that are inside them.
    """
    whole = [key for key in objects if key in checkpoint.keys]
    for key in whole:
        if checkpoint.is_tensor(key):
            live = state[objects[key]]
            state[objects[key]] = checkpoint.target_as_saved(key, live.detach() if isinstance(live, Tensor) else None)
    values = checkpoint.values([key for key in whole if not checkpoint.is_tensor(key)])
    containers = Containers(checkpoint)
    apart = {key: state[name] for key, name in objects.items() if key not in checkpoint.keys and key in containers}
    for key, value in (values | containers.read(apart, checkpoint.target_as_saved)).items():
        state[objects[key]] = value
    # DCP writes nothing of an empty container.
    absent = [key for key in objects if key not in checkpoint.keys and key not in apart]
    lost = [key for key in absent if not _is_empty(state[objects[key]])]
    mismatch.missing += lost
    for key in lost:
        del state[objects[key]]
    return {leaf for key in objects for leaf in containers.leaves(key)}


def _is_empty(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_empty, value.values()))


def _extra(checkpoint: CheckpointKeys, rank: int) -> Any:
    key = f"{EXTRA}.{rank}"
    if not isinstance(checkpoint.keys.get(key), BytesStorageMetadata):
        return None
    value = checkpoint.values([key])[key]
    # serialize() puts the caller's values into a tuple of one.
    return value[0] if isinstance(value, tuple) and len(value) == 1 else None
