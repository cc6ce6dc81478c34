"""``export_averaged()``: the averaged weights of a running job, written to safetensors files for inference.

Ranks send their fragments of one parameter at a time to rank 0, which writes the whole tensor before the next comes;
with NCCL and the like, their shards of one bucket at a time.
Entries that state_dict hooks compute from parameters are computed once more, with the averages in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..averaging import Averages
from ..averaging_start import averaged_steps, averaging_metadata
from ..comm import Communicators
from ..comm.agreement import NO_FINGERPRINT, Fingerprint, public_call
from ..comm.reports import CollectiveCall
from ..module_buffers import KEY as BUFFERS_KEY
from ..placements import fsdp1
from ..placements.dtensor import is_dtensor
from ..sharded_state import ShardedState
from ..state import MASTER_KEY
from ..state_dict.sharded import AVERAGE
from ..state_dict.whole_tensors import whole_dtensors, whole_state
from ..storage.buffers import ShardedParam
from ..update.schedule import Cohort
from ..update.weights import AVERAGE_KEY
from .format.paths import UserPath, as_path
from .format.safetensors import DEFAULT_MAX_BYTES, TensorFiles, TensorSpec
from .names import Names, PlainNames, names_of
from .save import Saver, adopt_params
from .sources import Region, traced

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# The rank that writes, counted among all ranks of the optimizer.
WRITER = 0


@dataclass(frozen=True, slots=True)
class _Weight:
    """One entry of the model's state dict: ``value``, or instead the state ``state_key`` of ``member`` if it has one.

    That is the average, or the float32 master of a parameter that is converted before its averaging has begun.
    ``region`` is the part of it that the entry has; None if it has all of it. If ``is_computed``, hooks compute the
    entry from averages, and ``key`` is its key in the state dict; ``value`` is of the last iterate until they have done
    so.
    """

    name: str
    value: Tensor
    spec: TensorSpec
    member: ShardedParam | None
    region: Region | None = None
    is_computed: bool = False
    key: str = ""
    state_key: str = AVERAGE


@public_call
def export_averaged(
    path: UserPath,
    model: nn.Module,
    optimizer: Optimizer,
    dtype: torch.dtype | None = None,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    overwrite: bool = False,
) -> None:
    """Write the averaged weights of ``model`` to ``path`` (``….safetensors``), for inference. Collective.

    The file has the names of ``model.state_dict()``, without the parts that wrappers add. It has ``ax`` of every
    parameter whose averaging has begun, and the value itself of other parameters and of buffers. If state_dict hooks
    compute entries from parameters, they compute them from the averages, as inside ``averaged_parameters()``; a hook
    that leaves out a parameter whose averaging has begun is an error. Statistics of BatchNorm belong to the last
    iterate, unless ``update_batch_norm()`` was called before, or a ``ShardedAverage`` keeps them (``buffers="average"``
    or ``"copy"``). Rank 0 writes, and needs memory for one parameter, or with NCCL and other backends that gather by
    collectives, for one bucket; the other ranks need that of one fragment at most. The model and the optimizer do not
    change. If the weights have more than ``max_bytes``, there are several files and an index, which transformers loads:
    ``model-00001-of-00002.safetensors``, ..., ``model.safetensors.index.json``.

    Args:
        path: the file that rank 0 writes, on a file system, where it appears whole or not at all, or in an object
            store, to which it is uploaded from a temporary folder of rank 0.
        model: the model that has the optimizer's parameters; it may be wrapped in DDP or ``torch.compile``.
        optimizer: a ShardedASGD or a ShardedAverage.
        dtype: the floating-point dtype of the optimizer's parameters in the file; None: each parameter's own.
            What is converted comes from the float32 averages and masters, if there are any.
        max_bytes: the size above which there are several files, each of at most so many bytes, or of one tensor.
        overwrite: replace the files that an earlier export wrote to ``path``.

    Raises:
        ValueError: an argument is not supported, ``path`` is taken, an average would be left out, or ranks disagree;
            on every rank.
        RuntimeError: the disk is full or not writable (on every rank), or inside ``averaged_parameters()``.
        TypeError: the optimizer is no ShardedASGD and no ShardedAverage.
        PeerError: a rank died.
    """
    saver = Saver.of(optimizer)
    adopt_params(optimizer)
    files: TensorFiles | None = None
    weights: list[_Weight] = []
    fingerprint, problem = NO_FINGERPRINT, None
    try:
        weights = _plan(model, optimizer, dtype)
        _warn_before_start(cast(ShardedState, optimizer))
        out = as_path(path)
        fingerprint = _fingerprint(out, weights, max_bytes, overwrite)
        if saver.rank == WRITER:
            specs = {weight.name: weight.spec for weight in weights}
            files = TensorFiles(
                out, specs, metadata=_metadata(cast(ShardedState, optimizer)), max_bytes=max_bytes, overwrite=overwrite
            )
            files.open()
    except Exception as error:
        problem = _translated(error, path)
    try:
        saver.agree(CollectiveCall.EXPORT_AVERAGED, fingerprint, problem)
        if any(weight.is_computed for weight in weights):
            weights, problem = _computed(weights, model, cast(ShardedState, optimizer))
            saver.agree(CollectiveCall.EXPORT_AVERAGED, problem=problem)
        problem = _write_all(weights, saver.communicators, files)
        problem = problem and _translated(problem, path)
        saver.agree(CollectiveCall.END_OF_EXPORT_AVERAGED, problem=problem)
    finally:
        if files is not None:
            files.discard()


def _warn_before_start(optimizer: ShardedState) -> None:
    """Warn once, on the first rank, if no parameter's averaging has begun; raises the warning if it is an error."""
    has_begun = {cohort: cohort.begun for cohort in set(optimizer.shards.cohort_of.values())}
    problem = optimizer.averages.start.problem(
        "export_averaged()", "the file has the last iterate", has_begun, optimizer.param_groups
    )
    if problem is not None:
        raise problem


def _metadata(optimizer: ShardedState) -> dict[str, str]:
    """Return what the header says about the averages. Not collective; waits for scalars on a device."""
    shards = optimizer.shards
    # Once for each cohort, because of the waiting.
    counts: dict[Cohort, int | None] = {}
    for member in shards.held:
        cohort = shards.cohort_of[member.index]
        if cohort not in counts:
            group, scalars = optimizer.param_groups[member.bucket.group_index], (cohort.step.item(), cohort.mu.item())
            counts[cohort] = averaged_steps(*scalars, group["t0"], group.get(AVERAGE_KEY)) if cohort.begun else 0
    return averaging_metadata(counts[shards.cohort_of[member.index]] for member in shards.held)


def _translated(error: Exception, path: UserPath) -> Exception:
    """Return the error to raise on all ranks: an OSError has a number, which means nothing on another rank."""
    if not isinstance(error, OSError):
        return error
    return RuntimeError(f"dist_asgd: cannot write {path}: {error.strerror or error}. Nothing of it is kept.")


def _plan(model: nn.Module, optimizer: Optimizer, dtype: torch.dtype | None) -> list[_Weight]:
    """Return the weights to write, in the model's order: the same on every rank.

    Raises:
        TypeError: ``optimizer`` cannot be exported.
        ValueError: the model, its state dict or ``dtype`` cannot be exported.
        RuntimeError: parameters were moved, are the averaged ones now, or may be torn by a call that was interrupted.
    """
    if not isinstance(optimizer, ShardedState) or optimizer.is_differentiable:
        raise TypeError(
            f"dist_asgd: export_averaged() is for ShardedASGD (and not with differentiable=True) and ShardedAverage, "
            f"got {type(optimizer).__name__}. Save a checkpoint, and use dist-asgd export."
        )
    if optimizer.averages.is_swapped:
        raise optimizer.averages.refusal("export_averaged()")
    shards = optimizer.shards
    params = [member.param for member in shards.members]
    Averages.refuse_swapped("export_averaged()", params)
    fsdp1.refuse("export_averaged()", params, fsdp1.SAVE_AVERAGES)
    shards.check_whole()
    shards.check_unchanged(optimizer.state)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dist_asgd: cannot export weights as {dtype}: wanted a floating-point dtype.")
    state, source_of = traced(model, params)
    names = names_of(model, optimizer, state)
    buffers = _kept_buffers(model, optimizer, names)
    weights, exported = [], set[int]()
    for key, value in state.items():
        name = names.of_model[key]
        if not isinstance(value, Tensor):
            raise ValueError(
                f"dist_asgd: {name} in model.state_dict() is a {type(value).__name__}; safetensors files hold tensors. "
                f"Save a checkpoint, which holds everything."
            )
        source = source_of(value)
        exported |= source.roots
        begun = [m for m in (shards.members[root] for root in source.roots) if shards.cohort_of[m.index].begun]
        wanted = value.dtype
        if source.roots and dtype is not None:
            if value.is_complex():
                raise ValueError(f"dist_asgd: parameter {name} is {value.dtype} and cannot be exported as {dtype}.")
            # Frozen ones may be of any dtype: quantised weights stay as they are.
            wanted = dtype if value.is_floating_point() else value.dtype
        # Buffers that the average keeps take their place inside averaged_parameters() as well.
        is_computed = (bool(begun) and source.is_computed) or (not source.roots and name in buffers)
        if is_computed and wanted.itemsize > value.dtype.itemsize and any(map(_is_wider, begun)):
            raise ValueError(
                f"dist_asgd: cannot export {name} as {wanted}: a state_dict hook of the model computes it in "
                f"{value.dtype}, and the averages it computes from are wider. Leave dtype out, or remove the hook for "
                f"the export."
            )
        member = begun[0] if begun and not is_computed else None
        state_key = AVERAGE
        if not begun and not source.is_computed and wanted != value.dtype:
            member = next(
                (m for m in map(shards.members.__getitem__, source.roots) if m.bucket.master is not None), None
            )
            state_key = MASTER_KEY
        spec = TensorSpec(wanted, tuple(value.shape))
        weights.append(_Weight(name, value.detach(), spec, member, source.region, is_computed, key, state_key))
    left_out = [
        names.of_params[index][0]
        for index, member in enumerate(shards.members)
        if index not in exported and shards.cohort_of[member.index].begun
    ]
    if left_out:
        raise ValueError(
            f"dist_asgd: the averaging of {len(left_out)} parameters has begun ({', '.join(left_out[:3])}"
            f"{', ...' * (len(left_out) > 3)}), and model.state_dict() has no entry that torch computed from them: a "
            f"state_dict hook drops them, replaces them by values that it keeps, or computes outside of torch. Remove "
            f"the hook for the export, or save model.state_dict() yourself inside optimizer.averaged_parameters()."
        )
    return weights


def _kept_buffers(model: nn.Module, optimizer: ShardedState, names: Names) -> set[str]:
    """Return the names of what may come from buffers that a ``ShardedAverage`` keeps: of all but the parameters."""
    state: dict[Any, Any] = optimizer.state
    if not state.get(BUFFERS_KEY):
        return set()
    plain = PlainNames(model)
    params = {plain.of(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    return set(names.of_model.values()) - params


def _is_wider(member: ShardedParam) -> bool:
    """Whether the average has more bits than the parameter, so that the parameter cannot be the average exactly."""
    return member.bucket.average.dtype != member.bucket.dtype


def _computed(
    weights: Sequence[_Weight], model: nn.Module, optimizer: ShardedState
) -> tuple[list[_Weight], Exception | None]:
    """Let the model's hooks compute the weights that they compute, from the averages. Collective.

    Returns all weights, and this rank's problem, if any, for all ranks to raise.
    """
    computed: list[_Weight] = []
    problem: Exception | None = None
    with optimizer.averaged_parameters(), torch.no_grad():
        try:
            state = model.state_dict()
            for weight in weights:
                if not weight.is_computed:
                    computed.append(weight)
                    continue
                value = state.get(weight.key)
                if not isinstance(value, Tensor) or (value.shape, value.dtype) != (
                    weight.value.shape,
                    weight.value.dtype,
                ):
                    raise ValueError(
                        f"dist_asgd: a state_dict hook of the model gives another {weight.name} at its second call: "
                        f"{tuple(getattr(value, 'shape', ()))} {getattr(value, 'dtype', type(value).__name__)}, at the "
                        f"first one {tuple(weight.value.shape)} {weight.value.dtype}. Remove the hook for the export."
                    )
                # Copied, as it may be a view of a parameter, which is the average inside this block only.
                computed.append(replace(weight, value=value.detach().clone()))
        except Exception as error:
            problem = error
    return computed, problem


def _fingerprint(path: UserPath, weights: Sequence[_Weight], max_bytes: int, overwrite: bool) -> Fingerprint:
    """Return the arguments as they must be on all ranks."""
    entries: list[tuple[str, object]] = [("path", str(path)), ("max_bytes", max_bytes), ("overwrite", overwrite)]
    entries += [
        (
            f"tensor {position}",
            (w.name, str(w.spec.dtype), w.spec.shape, w.member is not None, w.is_computed, w.state_key),
        )
        for position, w in enumerate(weights)
    ]
    return Fingerprint("arguments of export_averaged()", entries, "Pass the same on every rank.")


@torch.no_grad()
def _write_all(weights: Sequence[_Weight], communicators: Communicators, files: TensorFiles | None) -> Exception | None:
    """Collective. Write every weight on the writer, whose ``files`` is not None; return its first error, if any.

    After an error the remaining tensors are still gathered, and dropped: the other ranks are sending them.
    """
    problem: Exception | None = None
    for weight, value in _whole_values(weights, communicators):
        if files is not None and problem is None:
            try:
                files.write(weight.name, value.to(weight.spec.dtype))
            except Exception as error:
                problem = error
    if files is not None:
        try:
            if problem is None:
                files.commit()
        except Exception as error:
            problem = error
        # The other ranks learn of the error only after this, so they find no unfinished files.
        files.discard()
    return problem


def _whole_values(weights: Sequence[_Weight], communicators: Communicators) -> Iterator[tuple[_Weight, Tensor]]:
    """Collective. Yield every weight and its whole value on the writer; on the others only weights that are whole.

    A value is valid until the next one is asked for.
    """
    # By the member's index: tied parameters have several names.
    of_state: dict[str, dict[int, list[_Weight]]] = {AVERAGE: {}, MASTER_KEY: {}}
    live: list[tuple[_Weight, DTensor]] = []
    for weight in weights:
        if weight.member is not None:
            of_state[weight.state_key].setdefault(weight.member.index, []).append(weight)
        elif is_dtensor(weight.value):
            live.append((weight, weight.value))
        else:
            yield weight, weight.value
    for wanted, by_member in of_state.items():
        members = [tied[0].member for tied in by_member.values() if tied[0].member is not None]
        masters = wanted == MASTER_KEY
        for member, key, whole in whole_state(members, communicators, WRITER, masters=masters, one_by_one=True):
            for weight in by_member[member.index] if key == wanted else ():
                yield weight, whole if weight.region is None else weight.region.of(whole)
    for position, whole in whole_dtensors([value for _, value in live], communicators, WRITER):
        yield live[position][0], whole
