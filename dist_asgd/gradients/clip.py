"""The global gradient norm from the fragments that ranks hold, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..comm.agreement import NO_FINGERPRINT, Fingerprint
from ..comm.reports import CollectiveCall
from ..storage.buffers import ShardedParam
from .base import Gradients


def fingerprint_of(max_norm: float, norm_type: float) -> tuple[Fingerprint, Exception | None]:
    """The fingerprint of the arguments of ``clip_grad_norm_()``, or what is wrong with them on this rank."""
    try:
        entries = [("max_norm", float(max_norm)), ("norm_type", float(norm_type))]
    except Exception as error:
        return NO_FINGERPRINT, error
    return Fingerprint("arguments of clip_grad_norm_()", entries, "Pass the same on every rank."), None


def _norm(fragment: Tensor, is_complex: bool, norm_type: float) -> Tensor:
    """The norm of this rank's fragment of a gradient, ``(fragment_numel,)`` and real: 0-dim float64."""
    if is_complex:
        norm: Tensor = torch.linalg.vector_norm(torch.view_as_complex(fragment.view(-1, 2)), norm_type).double()
    else:
        norm = torch.linalg.vector_norm(fragment, norm_type, dtype=torch.float64)
    return norm


def total_norm(gradients: Gradients, active: frozenset[int], norm_type: float) -> Tensor:
    """The norm over all active gradients, 0-dim float64 on their device, the same on all ranks. Collective.

    It is the norm of the parameters' norms, as ``torch.nn.utils.clip_grad_norm_`` defines it.
    """
    members = [m for m in (*gradients.members, *gradients.presharded) if m.index in active]
    if not members:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    members.sort(key=lambda m: m.index)
    total: Tensor = torch.linalg.vector_norm(param_norms(gradients, members, norm_type), norm_type)
    return total


def param_norms(gradients: Gradients, members: Sequence[ShardedParam], norm_type: float) -> Tensor:
    """The norm of the gradient of each of ``members``, ``(len(members),)`` float64, the same on all ranks. Collective.

    ``members`` are not empty, in the order of their indices, the same on all ranks. Each fragment is summed in double
    precision and fragments are combined in rank order, so that the result does not depend on timing.
    """
    device = members[0].bucket.device
    # One row a rank: the norms of its fragments, then which set of ranks counts each (0: not this rank's to count).
    row = torch.zeros(2 * len(members), dtype=torch.float64, device=device)
    counted = [member for member in members if member.norm_owner]
    if counted:
        own = [_norm(gradients.gradient_fragment(m), m.dtype.is_complex, norm_type) for m in counted]
        if norm_type != 0:
            own = [
                n * f.to(n) if (f := gradients.pending_unscale(m)) is not None else n
                for n, m in zip(own, counted, strict=True)
            ]
        owned = torch.tensor([bool(m.norm_owner) for m in members], device=device)
        row[: len(members)][owned] = torch.stack([norm.to(device) for norm in own])
    row[len(members) :] = torch.tensor([m.norm_owner for m in members], dtype=torch.float64, device=device)
    communicators = gradients.communicators
    communicator = communicators.host if device.type == "cpu" else communicators.on(device)
    norms_by_rank, owners = communicator.gather_rows(row).chunk(2, 1)  # (ranks, len(members)) each
    # If several meshes hold a parameter, the first of them counts it, on all ranks alike.
    first = torch.where(owners > 0, owners, math.inf).amin(0)
    neutral = math.inf if norm_type < 0 else 0.0
    fragments = torch.where((owners == first) & (owners > 0), norms_by_rank, neutral)
    norms: Tensor = fragments.sum(0) if norm_type == 0 else torch.linalg.vector_norm(fragments, norm_type, dim=0)
    return norms


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
