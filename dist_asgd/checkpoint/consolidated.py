"""The state of all ranks in ``torch.optim.ASGD``'s own layout, collected a bucket at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..buffers import Bucket
from ..comm import Communicators
from ..update.schedule import Cohort


def collect_state(
    buckets: Sequence[Bucket], cohort_of: dict[int, Cohort], communicators: Communicators, to: int | None
) -> dict[int, dict[str, Tensor]]:
    """Collective: torch's ``state`` on rank ``to`` (None: all ranks), on the CPU; empty on the others.

    Parameters that never stepped have no entry, as in torch. Rank ``to`` holds the result and one bucket.
    """
    here = to is None or to == communicators.rank
    state: dict[int, dict[str, Tensor]] = {}
    staging: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for bucket in buckets:
        stepped = [member for member in bucket.members if not cohort_of[member.index].fresh]
        if not stepped:
            continue
        flat = None
        if here and communicators.world_size > 1:
            flat = _staging(staging, buckets, bucket)
        elif here:
            flat = bucket.average
        communicator = communicators.on(bucket.device)
        if communicators.world_size > 1:
            pieces = None if flat is None else flat.view(communicators.world_size, -1).unbind(0)
            communicator.collect(bucket.average, pieces, to)
        if flat is None:
            continue
        for member in stepped:
            cohort = cohort_of[member.index]
            whole = torch.empty_strided(
                member.param.shape, member.strides, dtype=_widened(member.dtype, bucket), device="cpu"
            )
            target = whole.as_strided((whole.numel(),), (1,))
            real = torch.view_as_real(target).view(-1) if target.is_complex() else target
            real.copy_(flat[member.slot.offset : member.slot.stop])
            state[member.index] = {
                "step": cohort.step.clone(),
                "eta": cohort.eta.clone(),
                "mu": cohort.mu.clone(),
                "ax": whole,
            }
    return dict(sorted(state.items()))


def _widened(dtype: torch.dtype, bucket: Bucket) -> torch.dtype:
    """The dtype of ``ax``: the average's own, as complex for a complex parameter."""
    return bucket.average.dtype.to_complex() if dtype.is_complex else bucket.average.dtype


def _staging(kept: dict[tuple[torch.device, torch.dtype], Tensor], buckets: Sequence[Bucket], bucket: Bucket) -> Tensor:
    """One buffer for the largest bucket of this device and dtype."""
    key = (bucket.device, bucket.average.dtype)
    if key not in kept:
        alike = (b for b in buckets if (b.device, b.average.dtype) == key)
        kept[key] = bucket.average.new_empty(max(b.layout.numel for b in alike))
    return kept[key][: bucket.layout.numel]
