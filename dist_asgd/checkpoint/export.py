"""The averaged weights of a running job, straight into safetensors files: one parameter at a time on rank 0."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..comm import Communicators
from ..comm.agreement import NO_FINGERPRINT, CollectiveCall, Fingerprint
from ..optimizer import ShardedASGD
from ..placements import fsdp1
from ..placements.dtensor import is_dtensor
from ..placements.presharded import DTensorParam
from ..storage.buffers import ShardedParam
from .entries import names_of
from .format.safetensors import DEFAULT_MAX_BYTES, TensorFiles, TensorSpec
from .save import Saver

WRITER = 0


@dataclass(frozen=True, slots=True)
class _Weight:
    """One entry of the model's state dict; ``member`` where its average goes out instead of ``value``."""

    name: str
    value: Tensor
    spec: TensorSpec
    member: ShardedParam | None


def export_averaged(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    dtype: torch.dtype | None = None,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    overwrite: bool = False,
) -> None:
    """Write the averaged weights of ``model`` to ``path`` (``….safetensors``), for inference. Collective.

    Under the names of ``model.state_dict()``, without what wrappers add: ``ax`` of every parameter whose averaging has
    begun, the parameter itself of the others, buffers as they are. Statistics of BatchNorm belong to the last iterate.
    Rank 0 writes; it holds one parameter beyond its own memory, the others at most a piece of one. Training goes on
    as if nothing had been. Where the weights have more than ``max_bytes`` there are several files and an index, as
    transformers loads them:
    ``model-00001-of-00002.safetensors``, ..., ``model.safetensors.index.json``.

    Args:
        path: where rank 0 writes; files appear there whole, or not at all.
        model: the model whose parameters the optimizer has, wrapped in DDP or ``torch.compile`` or not.
        optimizer: a ShardedASGD.
        dtype: a floating-point dtype for what the optimizer holds; None: each parameter's own.
        overwrite: replace what an earlier export has left at ``path``.

    Raises:
        ValueError: an argument is not supported, ``path`` is taken, or ranks disagree; on every rank.
        RuntimeError: the disk is full or not writable (on every rank), or inside ``averaged_parameters()``.
        TypeError: the optimizer is none of this package.
        PeerError: a rank died.
    """
    saver = Saver.of(optimizer)
    files: TensorFiles | None = None
    weights: list[_Weight] = []
    fingerprint, problem = NO_FINGERPRINT, None
    try:
        weights = _plan(model, optimizer, dtype)
        fingerprint = _fingerprint(path, weights, max_bytes, overwrite)
        if saver.rank == WRITER:
            specs = {weight.name: weight.spec for weight in weights}
            files = TensorFiles(Path(path), specs, metadata={}, max_bytes=max_bytes, overwrite=overwrite)
            files.open()
    except Exception as error:
        problem = _said(error, path)
    try:
        saver.agree(CollectiveCall.EXPORT_AVERAGED, fingerprint, problem)
        problem = _stream(weights, saver.communicators, files)
        problem = problem and _said(problem, path)
        saver.agree(CollectiveCall.END_OF_EXPORT_AVERAGED, problem=problem)
    finally:
        if files is not None:
            files.discard()


def _said(error: Exception, path: str | os.PathLike[str]) -> Exception:
    if not isinstance(error, OSError):
        return error
    return RuntimeError(f"dist_asgd: cannot write {path}: {error.strerror or error}. Nothing of it is kept.")


def _plan(model: nn.Module, optimizer: Optimizer, dtype: torch.dtype | None) -> list[_Weight]:
    """What goes out, in the model's order; the same on every rank."""
    if not isinstance(optimizer, ShardedASGD) or optimizer.is_differentiable:
        raise TypeError(
            f"dist_asgd: export_averaged() is for ShardedASGD (and not with differentiable=True), got "
            f"{type(optimizer).__name__}. Save a checkpoint, and use dist-asgd export."
        )
    optimizer.averages.refuse("export_averaged()")
    shards = optimizer.shards
    params = [member.param for member in shards.members]
    fsdp1.refuse("export_averaged()", params, "Save ax of FSDP.optim_state_dict(model, optimizer)")
    shards.check_unchanged()
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dist_asgd: cannot export weights as {dtype}: wanted a floating-point dtype.")
    names = names_of(model, optimizer).of_model
    members = {id(member.param): member for member in shards.members}
    weights = []
    for key, value in model.state_dict(keep_vars=True).items():
        name, member = names[key], members.get(id(value))
        if not isinstance(value, Tensor):
            raise ValueError(
                f"dist_asgd: {name} in model.state_dict() is a {type(value).__name__}; safetensors files hold tensors. "
                f"Save a checkpoint, which holds everything."
            )
        wanted = value.dtype
        if member is not None and dtype is not None:
            if value.is_complex():
                raise ValueError(f"dist_asgd: parameter {name} is {value.dtype} and cannot be exported as {dtype}.")
            wanted = dtype
        begun = member is not None and shards.cohort_of[member.index].begun
        weights.append(_Weight(name, value.detach(), TensorSpec(wanted, tuple(value.shape)), member if begun else None))
    return weights


def _fingerprint(
    path: str | os.PathLike[str], weights: Sequence[_Weight], max_bytes: int, overwrite: bool
) -> Fingerprint:
    entries: list[tuple[str, object]] = [("path", str(path)), ("max_bytes", max_bytes), ("overwrite", overwrite)]
    entries += [
        (f"tensor {place}", (w.name, str(w.spec.dtype), w.spec.shape, w.member is not None))
        for place, w in enumerate(weights)
    ]
    return Fingerprint("arguments of export_averaged()", entries, "Pass the same on every rank.")


@torch.no_grad()
def _stream(weights: Sequence[_Weight], communicators: Communicators, files: TensorFiles | None) -> Exception | None:
    """Collective: bring averages to the writer one by one, and write everything; what went wrong there, if anything.

    After a failure the averages are still brought, to nowhere: the other ranks are on their way with them.
    """
    problem: Exception | None = None
    staging: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    brought = [w.member for w in weights if w.member is not None and not isinstance(w.member, DTensorParam)]
    spread = {w.name: tensor for w in weights if is_dtensor(tensor := _live(w))}
    numbers = {name: number for number, name in enumerate(spread)}
    assembly: Assembly | None = None
    if spread:
        # Where there are DTensors, their modules are loaded.
        from ..state_dict.assembly import Assembly

        assembly = Assembly(list(spread.values()), communicators)
    for weight in weights:
        value: Tensor | None = weight.value
        if assembly is not None and weight.name in spread:
            wholes = assembly.bring([numbers[weight.name]], [spread[weight.name]], WRITER)
            value = wholes[0] if wholes else None
        elif weight.member is not None:
            value = _bring(weight.member, communicators, staging, brought)
        if files is not None and value is not None and problem is None:
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
        # Before the other ranks hear of it: they may look.
        files.discard()
    return problem


def _live(weight: _Weight) -> Tensor:
    """What this rank holds of what goes out."""
    member = weight.member
    return member.state_entry(member.average) if isinstance(member, DTensorParam) else weight.value


def _bring(
    member: ShardedParam,
    communicators: Communicators,
    staging: dict[tuple[torch.device, torch.dtype], Tensor],
    brought: Sequence[ShardedParam],
) -> Tensor | None:
    """Collective: one parameter's whole ``ax`` on the writer, in memory that the next one will use; None elsewhere."""
    bucket, slot = member.bucket, member.slot
    target = communicators.shard_rank_of(WRITER)
    if target is None:
        # The writer's replica has all of it.
        return None
    fragments = [bucket.layout.fragment(slot, rank) for rank in range(communicators.num_shards)]
    mine = bucket.average[member.fragment.start : member.fragment.stop]
    places: list[Tensor] | None = None
    flat = mine
    if communicators.rank == WRITER:
        key = (bucket.device, bucket.average.dtype)
        if key not in staging:
            alike = (m.slot.numel for m in brought if (m.bucket.device, m.bucket.average.dtype) == key)
            staging[key] = bucket.average.new_empty(max(alike))
        flat = staging[key][: slot.numel]
        places = [flat[fragment.param_start : fragment.param_start + fragment.numel] for fragment in fragments]
    communicators.on(bucket.device).gather(mine, places, [fragment.numel for fragment in fragments], target)
    if places is None:
        return None
    whole = torch.view_as_complex(flat.view(-1, 2)) if member.dtype.is_complex else flat
    return whole.as_strided(member.param.shape, member.strides)
