"""What a gradient scaler (``torch.amp.GradScaler``) tells ``step()``: how gradients are scaled, and if any overflowed.

The scaler sets ``grad_scale`` and ``found_inf`` on the optimizer for the length of the call
(torch/amp/grad_scaler.py, ``step``); ``grad_scale`` is None where gradients are unscaled already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..comm import Communicators
from ..comm.agreement import CollectiveCall
from ..update.schedule import StepHyperparameters
from ..update.segments import Scaling
from .base import Gradients
from .reducer import Reducer


@dataclass(frozen=True, slots=True)
class ScalerInfo:
    """``by_scaler``: whether a scaler calls at all. ``found_inf`` is no tensor where it has seen no gradients."""

    by_scaler: bool
    grad_scale: Tensor | None
    found_inf: Tensor | int

    @classmethod
    def of(cls, optimizer: object) -> ScalerInfo:
        """What stands on ``optimizer`` now."""
        found_inf = getattr(optimizer, "found_inf", None)
        return cls(found_inf is not None, getattr(optimizer, "grad_scale", None), 0 if found_inf is None else found_inf)

    def problem(self, stage: int) -> Exception | None:
        """A RuntimeError, for all ranks, where the scaler cannot have looked at the gradients."""
        if stage == 1 or not self.by_scaler or isinstance(self.found_inf, Tensor):
            return None
        return RuntimeError(
            "dist_asgd: torch.amp.GradScaler found no gradients: with stage=2 they are reduced as shards and leave "
            "p.grad. Use dist_asgd.GradScaler instead, which takes the same arguments."
        )

    def _device(self, hypers: Sequence[StepHyperparameters]) -> torch.device | None:
        """The one device on which all scalars are, so that a step can be skipped there; None if there is none."""
        devices = {hyper.device for hyper in hypers}
        return devices.pop() if len(devices) == 1 else None

    def waits_for(self, hypers: Sequence[StepHyperparameters]) -> bool:
        """Whether the host has to know if gradients overflowed."""
        return self.by_scaler and self._device(hypers) is None

    def found_on_device(self, hypers: Sequence[StepHyperparameters], communicators: Communicators) -> Tensor | None:
        """Collective: ``(1,)`` float32, nonzero where any rank's gradients overflowed; None where the host knows."""
        device = self._device(hypers)
        if not self.by_scaler or device is None:
            return None
        found = torch.as_tensor(self.found_inf, dtype=torch.float32, device=device).reshape(1)
        return communicators.on(device).gather_rows(found).amax(0)

    def overflowed(self, communicators: Communicators) -> bool:
        """Collective: whether any rank has a gradient that is not finite. Waits for the device."""
        found = torch.as_tensor(self.found_inf, device="cpu").ne(0).any().long().reshape(1)
        return bool(communicators.host.exchange(found)().any())

    def factors(self, pending: Scaling) -> Scaling:
        """What the update multiplies gradients by; the inverse of the scale as torch takes it."""
        if self.grad_scale is None:
            return pending
        inverse = self.grad_scale.double().reciprocal().float()
        return Scaling(inverse if pending.unscale is None else inverse * pending.unscale, pending.clip)


def unscale(gradients: Gradients, inverse: Tensor, explicitly: bool) -> Tensor:
    """Collective, for ``GradScaler``: 1.0 where a rank's gradients overflowed, else 0.0.

    ``explicitly``: the user asks to unscale before the step. Then what is reduced keeps ``inverse``, 0-dim, for the
    update, and gradients that stand on parameters are multiplied.
    """
    problem = None
    waits = isinstance(gradients, Reducer)
    lossy = any(b.gradient_dtype == torch.float16 and not (waits and b.master is not None) for b in gradients.buckets)
    if explicitly and (lossy or any(member.dtype == torch.float16 for member in gradients.presharded)):
        problem = ValueError(
            "dist_asgd: unscale_() of float16 gradients would lose the small ones. Pass master_weights=True, or do not "
            "call unscale_(): step() unscales."
        )
    gradients.agree(CollectiveCall.UNSCALE, problem=problem)
    found = gradients.communicators.host.exchange(gradients.overflowed())().any()
    if explicitly:
        gradients.unscale(inverse.detach())
    return found.to(device=inverse.device, dtype=torch.float32)
