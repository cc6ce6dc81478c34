"""The global gradient norm from the fragments that ranks hold, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..comm.agreement import NO_FINGERPRINT, Fingerprint
from ..comm.reports import CollectiveCall
from ..labels import Label, labelled
from ..placements.presharded import DTensorParam
from ..storage.buffers import ShardedParam
from .base import Gradients


def fingerprint_of(max_norm: float, norm_type: float) -> tuple[Fingerprint, Exception | None]:
    """The fingerprint of the arguments of ``clip_grad_norm_()``, or what is wrong with them on this rank."""
    try:
        entries = [("max_norm", float(max_norm)), ("norm_type", float(norm_type))]
    except Exception as error:
        return NO_FINGERPRINT, error
    return Fingerprint("arguments of clip_grad_norm_()", entries, "Pass the same on every rank."), None


def total_norm(gradients: Gradients, active: frozenset[int], norm_type: float) -> Tensor:
    """The norm over all active gradients, 0-dim float64 on their device, the same on all ranks. Collective.

    It is the norm of the parameters' norms, as ``torch.nn.utils.clip_grad_norm_`` defines it.
    """
    members = [m for m in (*gradients.members, *gradients.presharded) if m.index in active]
    if not members:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    members.sort(key=lambda m: m.index)
    if norm_type == 0:
        # The number of parameters that are not zero, for which it is not enough to know how many elements are not.
        norms = param_norms(gradients, members, norm_type)
        total: Tensor = torch.linalg.vector_norm(norms, norm_type)
        return total
    counted = _counted(gradients, members)
    own = _norms(gradients, [m for m, counts in zip(members, counted, strict=True) if counts], norm_type)
    device = members[0].bucket.device
    if own:
        # One number a rank: the norm of its fragments.
        value = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in own]), norm_type)
    else:
        value = torch.full((), _neutral(norm_type), dtype=torch.float64, device=device)
    return _over_ranks(gradients, value.reshape(1), norm_type)[0]


def param_norms(gradients: Gradients, members: Sequence[ShardedParam], norm_type: float) -> Tensor:
    """The norm of the gradient of each of ``members``, ``(len(members),)`` float64, the same on all ranks. Collective.

    ``members`` are not empty, and the same in the same order on all ranks. Each fragment is summed in double precision.
    """
    device = members[0].bucket.device
    counted = _counted(gradients, members)
    own = iter(_norms(gradients, [m for m, counts in zip(members, counted, strict=True) if counts], norm_type))
    neutral = torch.full((), _neutral(norm_type), dtype=torch.float64, device=device)
    values = torch.stack([next(own).to(device) if counts else neutral for counts in counted])
    return _over_ranks(gradients, values, norm_type)


def _norms(gradients: Gradients, members: Sequence[ShardedParam], norm_type: float) -> list[Tensor]:
    """The norm of this rank's fragment of each gradient of ``members``: 0-dim float64 on the gradient's device."""
    norms: list[Tensor | None] = [None] * len(members)
    # One operator for all fragments of a kind: on accelerators it is a few launches, however many fragments there are.
    kinds: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[Tensor]]] = {}
    for position, member in enumerate(members):
        fragment = gradients.gradient_fragment(member)
        if member.dtype.is_complex:
            complex_norm: Tensor = torch.linalg.vector_norm(torch.view_as_complex(fragment.view(-1, 2)), norm_type)
            norms[position] = complex_norm.double()
            continue
        positions, fragments = kinds.setdefault((fragment.device, fragment.dtype), ([], []))
        positions.append(position)
        fragments.append(fragment)
    for positions, fragments in kinds.values():
        found = torch._foreach_norm(fragments, norm_type, dtype=torch.float64)
        for position, norm in zip(positions, found, strict=True):
            norms[position] = norm
    return [
        norm if norm_type == 0 or (factor := gradients.pending_unscale(member)) is None else norm * factor.to(norm)
        for norm, member in zip(cast(list[Tensor], norms), members, strict=True)
    ]


def _neutral(norm_type: float) -> float:
    """The norm that changes no other norm which it is combined with."""
    return math.inf if norm_type < 0 else 0.0


def _over_ranks(gradients: Gradients, norms: Tensor, norm_type: float) -> Tensor:
    """The norms over all ranks, ``(n,)`` float64, of which ``norms`` are over this rank's elements. Collective."""
    communicator = gradients.communicators.on(norms.device)
    if math.isinf(norm_type):
        return communicator.reduce_scalars(norms, "max" if norm_type > 0 else "min")
    if norm_type == 0:
        return communicator.reduce_scalars(norms, "sum")
    return communicator.reduce_scalars(norms**norm_type, "sum") ** (1 / norm_type)


def _counted(gradients: Gradients, members: Sequence[ShardedParam]) -> list[bool]:
    """Whether this rank's fragment of each of ``members`` counts: every element of a gradient counts once.

    Collective at the first call since the gradients were given their members.
    """
    if gradients.counted_elsewhere is None:
        gradients.counted_elsewhere = _counted_elsewhere(gradients)
    return [m.norm_owner > 0 and m.index not in gradients.counted_elsewhere for m in members]


def _counted_elsewhere(gradients: Gradients) -> frozenset[int]:
    """The parameters that the ranks of another mesh count. Collective.

    If several meshes hold a parameter, as replicas of a model do that know nothing of each other, the first counts it.
    """
    members = [member for member in gradients.presharded if isinstance(member, DTensorParam)]
    if not members:
        return frozenset()
    none = torch.iinfo(torch.int64).max
    own = [member.norm_owner or none for member in members]
    first = [-largest for largest in gradients.communicators.host.largest([-owner for owner in own])]
    every = zip(members, own, first, strict=True)
    return frozenset(member.index for member, owner, lowest in every if lowest < owner < none)


@labelled(Label.CLIP)
def clip(
    gradients: Gradients, active: frozenset[int], max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    """Scale gradients to a global norm of at most ``max_norm``; returns the norm before, 0-dim. Collective.

    Reduced shards are read once and not written: the factor is left for the update, together with that of a gradient
    scaler. Gradients on parameters are scaled at once.
    """
    gradients.apply_pending()
    total = total_norm(gradients, active, float(norm_type))
    if error_if_nonfinite and not math.isfinite(total.item()):
        raise RuntimeError(
            f"dist_asgd: the total norm of order {norm_type} of the gradients is {total.item()}, so they cannot be "
            f"clipped. Pass error_if_nonfinite=False to clip anyway."
        )
    gradients.clip(torch.clamp(max_norm / (total + 1e-6), max=1.0))
    buffers = {id(member.bucket): member.bucket for member in (*gradients.members, *gradients.presharded)}.values()
    dtype = next((buffer.dtype for buffer in buffers), torch.get_default_dtype())
    for buffer in buffers:
        dtype = torch.promote_types(dtype, buffer.dtype)
    return total.to(dtype)


@torch.no_grad()
def clip_grad_norm(gradients: Gradients, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """Agree on the arguments and on which gradients there are, and ``clip``; for ``clip_grad_norm_()``. Collective."""
    fingerprint, problem = fingerprint_of(max_norm, norm_type)
    reports = gradients.agree(CollectiveCall.CLIP_GRAD_NORM, fingerprint, problem)
    if reports.joined:
        gradients.lend(reports, (float(max_norm), float(norm_type), error_if_nonfinite))
    return clip(gradients, gradients.present(reports), max_norm, norm_type, error_if_nonfinite)
