"""What a rank without further inputs does while others go on (torch's ``Join``): it takes part in their calls.

Such a rank has *joined*; the others are *active*. It does not know which call comes next: it opens each with the call
``JOINED``, and the reports say what the active ranks do.
"""

from __future__ import annotations

import torch

from ..comm.agreement import Fingerprint
from ..comm.reports import CALL, UNKNOWN_DISCARDS, CollectiveCall, RankReports
from . import clip
from .base import Gradients
from .reducer import Reducer


def shadow(gradients: Gradients, fingerprint: Fingerprint, problem: Exception | None) -> RankReports | None:
    """Take part in all calls of one iteration up to its step, whose reports are returned. Collective.

    None if the iteration ends without a step, because the active ranks discard its gradients. ``fingerprint`` are the
    hyperparameters of this rank, ``problem`` is what is wrong with its parameters.
    """
    while True:
        # This rank does not see the others' zero_grad().
        gradients.agreement.discards = UNKNOWN_DISCARDS
        reports = gradients.agree(CollectiveCall.JOINED, fingerprint, problem)
        call = reports.column(CALL)[reports.first_active]
        if call == CollectiveCall.STEP:
            return reports
        if call == CollectiveCall.ZERO_GRAD:
            gradients.clear(set_to_none=True)
            return None
        if call == CollectiveCall.CLIP_GRAD_NORM:
            max_norm, norm_type, error_if_nonfinite = gradients.lend(reports, None)
            clip.clip(gradients, gradients.present(reports), max_norm, norm_type, error_if_nonfinite)
        else:
            assert call == CollectiveCall.UNSCALE, call
            _unscale(gradients, reports)


def _unscale(gradients: Gradients, reports: RankReports) -> None:
    """Take part in ``loss_scaling.unscale``."""
    inverse, explicitly = gradients.lend(reports, None)
    reduces = isinstance(gradients, Reducer)
    # In stage 1 this rank's gradients are left over from its last step.
    overflowed = gradients.overflowed()
    if not reduces:
        overflowed.zero_()
    gradients.communicators.on(overflowed.device).reduce_scalars(overflowed, "max")
    if explicitly and reduces:
        gradients.unscale(torch.full((), inverse, dtype=torch.float32, device=gradients.buckets[0].device))
