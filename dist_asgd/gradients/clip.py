"""The global gradient norm from the parts that ranks hold, and clipping by it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..comm.agreement import NO_FINGERPRINT, Fingerprint
from .base import Gradients


def fingerprint_of(max_norm: float, norm_type: float) -> tuple[Fingerprint, Exception | None]:
    """The arguments, as what must be equal on all ranks; or what is wrong with them on this one."""
    try:
        entries = [("max_norm", float(max_norm)), ("norm_type", float(norm_type))]
    except Exception as error:
        return NO_FINGERPRINT, error
    return Fingerprint("arguments of clip_grad_norm_()", entries, "Pass the same on every rank."), None


def _norm(piece: Tensor, is_complex: bool, norm_type: float) -> Tensor:
    """The norm of this rank's piece of a gradient, 1-D and real: 0-dim float64."""
    if is_complex:
        norm: Tensor = torch.linalg.vector_norm(torch.view_as_complex(piece.view(-1, 2)), norm_type).double()
    else:
        norm = torch.linalg.vector_norm(piece, norm_type, dtype=torch.float64)
    return norm


def total_norm(gradients: Gradients, active: frozenset[int], norm_type: float) -> Tensor:
    """Collective: the norm over all active gradients, 0-dim float64 on their device; the same on all ranks.

    As ``torch.nn.utils.clip_grad_norm_`` defines it: the norm of the parameters' norms. Each piece is summed in
    double precision and parts are combined in rank order, so the result does not depend on timing.
    """
    members = [m for m in (*gradients.members, *gradients.presharded) if m.index in active]
    if not members:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    members.sort(key=lambda m: m.index)
    device = members[0].bucket.device
    row = torch.zeros(2 * len(members), dtype=torch.float64, device=device)
    counted = [member for member in members if member.norm_owner]
    if counted:
        norms = [_norm(gradients.gradient_fragment(m), m.dtype.is_complex, norm_type) for m in counted]
        if norm_type != 0:
            norms = [
                n * f.to(n) if (f := gradients.pending_unscale(m)) is not None else n
                for n, m in zip(norms, counted, strict=True)
            ]
        owned = torch.tensor([bool(m.norm_owner) for m in members], device=device)
        row[: len(members)][owned] = torch.stack([norm.to(device) for norm in norms])
    row[len(members) :] = torch.tensor([m.norm_owner for m in members], dtype=torch.float64, device=device)
    communicators = gradients.communicators
    communicator = communicators.host if device.type == "cpu" else communicators.on(device)
    norms_by_rank, numbers = communicator.gather_rows(row).chunk(2, 1)
    # Where several meshes hold a parameter, one counts: the first, on all ranks.
    first = torch.where(numbers > 0, numbers, math.inf).amin(0)
    neutral = math.inf if norm_type < 0 else 0.0
    parts = torch.where((numbers == first) & (numbers > 0), norms_by_rank, neutral)
    of_members = parts.sum(0) if norm_type == 0 else torch.linalg.vector_norm(parts, norm_type, dim=0)
    total: Tensor = torch.linalg.vector_norm(of_members, norm_type)
    return total


def clip(
    gradients: Gradients, active: frozenset[int], max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    """Collective: scale gradients to a global norm of at most ``max_norm``, those that are reduced at the next update.

    Returns the norm before. Reads reduced shards once and writes nothing: the factor is left for the update, together
    with that of a gradient scaler.
    """
    gradients.apply_clip()
    total = total_norm(gradients, active, float(norm_type))
    if error_if_nonfinite and not math.isfinite(total.item()):
        raise RuntimeError(
            f"dist_asgd: the total norm of order {norm_type} of the gradients is {total.item()}, so they cannot be "
            f"clipped. Pass error_if_nonfinite=False to clip anyway."
        )
    gradients.clip(torch.clamp(max_norm / (total + 1e-6), max=1.0))
    stores = {id(member.bucket): member.bucket for member in (*gradients.members, *gradients.presharded)}.values()
    dtype = next((store.dtype for store in stores), torch.get_default_dtype())
    for store in stores:
        dtype = torch.promote_types(dtype, store.dtype)
    return total.to(dtype)
