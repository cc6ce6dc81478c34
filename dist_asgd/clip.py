"""The global gradient norm from shards, and clipping by it (stage 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .agreement import NO_CLAIM, Claim
from .buffers import Bucket, Member
from .comm import Communicators
from .reduce import Reducer
from .update.segments import Scaling


def claim_of(max_norm: float, norm_type: float) -> tuple[Claim, Exception | None]:
    """The arguments, as what must be equal on all ranks; or what is wrong with them on this one."""
    try:
        entries = [("max_norm", float(max_norm)), ("norm_type", float(norm_type))]
    except Exception as error:
        return NO_CLAIM, error
    return Claim("arguments of clip_grad_norm_()", entries, "Pass the same on every rank."), None


def _piece_norm(member: Member, norm_type: float) -> Tensor:
    """The norm of this rank's piece of the member's gradient: 0-dim float64."""
    piece = member.bucket.gradient_shard()[member.piece.start : member.piece.stop]
    if member.dtype.is_complex:
        piece = torch.view_as_complex(piece.view(-1, 2))
        norm: Tensor = torch.linalg.vector_norm(piece, norm_type).double()
    else:
        norm = torch.linalg.vector_norm(piece, norm_type, dtype=torch.float64)
    return norm


def _combined(norms: Tensor, norm_type: float) -> Tensor:
    """Norms of parts, along dim 0, to the norm of the whole."""
    if norm_type == 0:
        return norms.sum(0)
    whole: Tensor = torch.linalg.vector_norm(norms, norm_type, dim=0)
    return whole


def total_norm(buckets: Sequence[Bucket], active: set[int], norm_type: float, communicators: Communicators) -> Tensor:
    """Collective: the norm over all active gradients, 0-dim float64 on the first bucket's device; same on all ranks.

    As ``torch.nn.utils.clip_grad_norm_`` defines it: the norm of the parameters' norms. Each piece is summed in
    double precision and parts are combined in rank order, so the result does not depend on timing.
    """
    members = sorted((m for b in buckets for m in b.members if m.index in active), key=lambda m: m.index)
    if not members:
        return torch.zeros((), dtype=torch.float64)
    device = buckets[0].device
    row = torch.zeros(len(members), dtype=torch.float64, device=device)
    owned = torch.tensor([bool(m.piece.numel) for m in members])
    if bool(owned.any()):
        norms = [_piece_norm(m, norm_type).to(device) for m in members if m.piece.numel]
        row[owned.to(device)] = torch.stack(norms)
    table = communicators.on(device).gather_rows(row)
    # Which rank owns what is known from the layout: an empty piece has no norm (0 is not neutral for p < 0).
    parts = []
    for position, member in enumerate(members):
        ranks = [rank for rank, _ in member.bucket.layout.owners(member.slot)]
        if ranks:
            parts.append(_combined(table[ranks[0] : ranks[-1] + 1, position], norm_type))
        elif norm_type >= 0:
            parts.append(table.new_zeros(()))
    return torch.linalg.vector_norm(torch.stack(parts), norm_type) if parts else table.new_zeros(())


def clip(gradients: Reducer, active: set[int], max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """Collective: make the next update scale its gradients to a global norm of at most ``max_norm``.

    Returns the norm before. Reads the shards once and writes nothing: the factor is left for the update, together with
    that of a gradient scaler.
    """
    buckets, communicators = gradients.buckets, gradients.communicators
    if gradients.scaling.clip is not None:
        gradients.scale()
    total = total_norm(buckets, active, float(norm_type), communicators)
    unscale = gradients.scaling.unscale
    if unscale is not None and norm_type != 0:
        total = total * unscale.to(total.device).abs().double()
    if error_if_nonfinite and not math.isfinite(total.item()):
        raise RuntimeError(
            f"dist_asgd: the total norm of order {norm_type} of the gradients is {total.item()}, so they cannot be "
            f"clipped. Pass error_if_nonfinite=False to clip anyway."
        )
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    gradients.scaling = Scaling(unscale, factor)
    dtype = buckets[0].dtype if buckets else torch.get_default_dtype()
    for bucket in buckets:
        dtype = torch.promote_types(dtype, bucket.dtype)
    return total.to(dtype)
