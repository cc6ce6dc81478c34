"""The rule in torch's for-loop form, one tensor at a time: the readable oracle, and the update on CPUs.

For one step with gradient g (torch/optim/asgd.py, ``_single_tensor_asgd``; Polyak & Juditsky 1992):

    g  <- -g                      if maximize
    g  <- g + weight_decay * x    if weight_decay is not 0
    x  <- x * (1 - lambd * eta)   the factor in double precision
    x  <- x - eta * g
    ax <- ax + (x - ax) * mu      a copy of x while mu is 1

Bit-identical to ``torch.optim.ASGD(foreach=False)`` on the same device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .schedule import StepHyperparameters


def subtract(param: Tensor, average: Tensor, out: Tensor | None) -> Tensor:
    """``param - average`` in the average's dtype, into ``out``; without the temporary of torch's mixed subtraction."""
    if out is None or average.dtype == param.dtype:
        return torch.sub(param, average, out=out)
    return out.copy_(param).sub_(average)


def update(
    param: Tensor,
    gradient: Tensor,
    average: Tensor,
    eta: Tensor,
    mu: Tensor,
    hyper: StepHyperparameters,
    scratch: Tensor | None = None,
    difference: Tensor | None = None,
) -> None:
    """Update ``param`` and ``average`` in place; all tensors have one shape, real dtypes, one device.

    ``eta`` and ``mu`` are 0-dim tensors on the host. ``gradient`` is only read, and may be ``scratch``.
    ``scratch`` is of the parameter's dtype and shape, and is overwritten; None allocates instead, which keeps
    every intermediate for autograd (``differentiable``). ``average`` may be wider than ``param``;
    ``difference`` is the like of ``scratch`` in its dtype, and may be ``scratch`` where the dtypes are the same.
    """
    descend(param, gradient, eta, hyper, scratch)
    take_average(param, average, mu, difference)


def descend(param: Tensor, gradient: Tensor, eta: Tensor, hyper: StepHyperparameters, scratch: Tensor | None) -> None:
    """The lines that update ``param``."""
    eta_value = eta.item()
    if hyper.maximize:
        gradient = torch.neg(gradient, out=scratch)
    if hyper.weight_decay != 0:
        gradient = torch.add(gradient, param, alpha=hyper.weight_decay, out=scratch)
    param.mul_(1 - hyper.lambd * eta_value)
    param.add_(gradient, alpha=-eta_value)


def take_average(param: Tensor, average: Tensor, mu: Tensor, difference: Tensor | None) -> None:
    """The line that updates ``average``."""
    if mu.item() == 1:
        average.copy_(param)
    else:
        average.add_(subtract(param, average, difference).mul_(mu))
