"""Loss scaling: what a gradient scaler (``torch.amp.GradScaler``) hands to ``step()``, and ``unscale_()`` for it.

For the length of the call the scaler sets ``grad_scale`` and ``found_inf`` on the optimizer (torch/amp/grad_scaler.py,
``step``); ``grad_scale`` is None if gradients are unscaled already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..comm import Communicators, public_call
from ..comm.reports import CollectiveCall
from ..labels import Label, labelled
from ..placements.dtensor import has_spec_of, is_dtensor, same_placement
from ..update.schedule import StepHyperparameters
from ..update.segments import UNSCALED, Scaling
from .base import Gradients
from .reducer import Reducer


@dataclass(frozen=True, slots=True)
class ScalerInfo:
    """What a scaler has set on the optimizer for one step.

    grad_scale  the scale of the gradients, 0-dim, or None if they are unscaled already
    found_inf   nonzero if any of them overflowed, 1 element; the int 0 if torch's own scaler saw no gradient at all
    """

    grad_scale: Tensor | None
    found_inf: Tensor | int

    @classmethod
    def of(cls, optimizer: object) -> ScalerInfo | None:
        """What is set on ``optimizer`` now; None if no scaler calls."""
        found_inf = getattr(optimizer, "found_inf", None)
        return None if found_inf is None else cls(getattr(optimizer, "grad_scale", None), found_inf)

    def problem(self, stage: int) -> Exception | None:
        """A RuntimeError, to be raised on all ranks, if the scaler cannot have looked at the gradients."""
        if stage == 1 or isinstance(self.found_inf, Tensor):
            return None
        return RuntimeError(
            "dist_asgd: torch.amp.GradScaler found no gradients: this rank has run no backward. Use "
            "dist_asgd.GradScaler instead, which takes the same arguments and looks at the gradients of all ranks."
        )

    def skips_on_host(self, hypers: Sequence[StepHyperparameters], communicators: Communicators) -> bool:
        """Whether any rank's gradients overflowed, so that no rank steps. Collective; waits for the device.

        False without communication if all scalars are on one device: then the update itself changes nothing, see
        ``skip_on_device``.
        """
        return _scalar_device(hypers) is None and self.overflowed(communicators)

    def overflowed(self, communicators: Communicators) -> bool:
        """Whether any rank's gradients overflowed. Collective; waits for the device."""
        return communicators.host.any_of(bool(torch.as_tensor(self.found_inf, device="cpu").ne(0).any()))

    def skip_on_device(self, hypers: Sequence[StepHyperparameters], communicators: Communicators) -> Tensor | None:
        """The flag ``(1,)`` float32 by which kernels change nothing, nonzero if any rank overflowed. Collective.

        None if scalars are on the host, where ``skips_on_host`` decides.
        """
        device = _scalar_device(hypers)
        if device is None:
            return None
        found = torch.as_tensor(self.found_inf, dtype=torch.float32, device=device).reshape(1)
        return communicators.on(device).reduce_scalars(found.clone(), "max")

    def factors(self, pending: Scaling) -> Scaling:
        """What the update multiplies gradients by: the inverse of the scale, as torch takes it, and ``pending``."""
        if self.grad_scale is None:
            return pending
        inverse = self.grad_scale.double().reciprocal().float()
        return Scaling(inverse if pending.unscale is None else inverse * pending.unscale, pending.clip)


def factors_of_step(
    scaler: ScalerInfo | None, pending: Scaling, hypers: Sequence[StepHyperparameters], communicators: Communicators
) -> tuple[Scaling, Scaling, Tensor | None] | None:
    """What the update multiplies gradients by, and ``skip_on_device``; None if no rank steps. Collective.

    The first factors are for gradients that are reduced here, which ``pending`` are for; those on parameters, which the
    second ones are for, were multiplied by them in place.
    """
    if scaler is None:
        return pending, UNSCALED, None
    if scaler.skips_on_host(hypers, communicators):
        return None
    found_inf = scaler.skip_on_device(hypers, communicators)
    return scaler.factors(pending), scaler.factors(UNSCALED), found_inf


def _scalar_device(hypers: Sequence[StepHyperparameters]) -> torch.device | None:
    """The one device on which step, eta and mu of all groups are, so that it can skip a step; None if there is none."""
    devices = {hyper.device for hyper in hypers}
    return devices.pop() if len(devices) == 1 else None


def is_needed(gradients: Gradients) -> bool:
    """Whether ``step()`` has to unscale gradients and to skip steps, because torch's scaler cannot do it right.

    It refuses to unscale float16 gradients, which would lose the small ones, and ranks may come to different ends if it
    finds no gradients on some of them, or gradients that not all ranks hold. All others it treats as those of
    ``torch.optim.ASGD``: it does not call ``step()`` if it skips, from which trainers know that they must not call
    their schedulers.
    """
    if any(bucket.gradient_dtype == torch.float16 for bucket in gradients.buckets):
        return True
    if not gradients.presharded:
        in_stage_2 = isinstance(gradients, Reducer)
        return in_stage_2 and all(m.param.grad is None for bucket in gradients.buckets for m in bucket.members)
    params = [member.param for member in gradients.presharded]
    first = params[0]
    # torch asks the ranks of one DTensor's mesh among which that one is sharded.
    if gradients.buckets or not is_dtensor(first) or first.device_mesh.size() != gradients.communicators.world_size:
        return True
    found = [(param, param.grad) for param in params if param.grad is not None]
    for param, gradient in found:
        if not is_dtensor(param) or not is_dtensor(gradient) or not has_spec_of(gradient, param):
            return True
        if not same_placement(param, first) or gradient.dtype == torch.float16:
            return True
    return not found


@public_call
@labelled(Label.UNSCALE)
@torch.no_grad()
def unscale(gradients: Gradients, inverse: Tensor, explicitly: bool) -> Tensor:
    """Unscale gradients for ``dist_asgd.GradScaler``: 1.0 if any rank's overflowed, else 0.0. Collective.

    ``inverse`` is the inverse of the scale, 0-dim. ``explicitly``: the user has called ``unscale_()`` before the step,
    so reduced gradients keep ``inverse`` for the update, and gradients on parameters are multiplied. Otherwise the
    step unscales.
    """
    problem = None
    waits = isinstance(gradients, Reducer)
    lossy = any(b.gradient_dtype == torch.float16 and not (waits and b.master is not None) for b in gradients.buckets)
    if explicitly and (lossy or any(member.dtype == torch.float16 for member in gradients.presharded)):
        problem = ValueError(
            "dist_asgd: unscale_() of float16 gradients would lose the small ones. Pass master_weights=True, or do not "
            "call unscale_(): step() unscales."
        )
    reports = gradients.agree(CollectiveCall.UNSCALE, problem=problem)
    if reports.joined:
        gradients.lend(reports, (float(inverse), explicitly))
    # On the device, so that nobody waits for it who need not know here.
    found = gradients.overflowed()
    found = gradients.communicators.on(found.device).reduce_scalars(found, "max")[0]
    if explicitly:
        gradients.unscale(inverse.detach())
    return found.to(inverse.device)
