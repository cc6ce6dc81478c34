"""The rule in torch's for-loop form, one tensor at a time: the readable reference that every kernel is held to.

For one step of parameters x with gradients g and averages ax, with eta and mu from the step before
(torch/optim/asgd.py, ``_single_tensor_asgd``; Polyak & Juditsky 1992):

    g  <- -g                      if maximize
    g  <- g + weight_decay * x    if weight_decay is not 0
    x  <- x * c                   c = 1 - lambd * eta, in double precision
    x  <- x - eta * g
    ax <- ax + (x - ax) * mu      a copy of x while mu is 1

``schedule.py`` computes the next step's eta and mu from lr, lambd, alpha and t0. The bits are those of
``torch.optim.ASGD(foreach=False)`` on the same device. ``operators.py`` calls this module for groups whose
implementation is FORLOOP, and for FUSED ones on CPUs where the C kernel cannot run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .schedule import StepHyperparameters


def update(
    x: Tensor,
    g: Tensor,
    ax: Tensor,
    eta: Tensor,
    mu: Tensor,
    hyper: StepHyperparameters,
    scratch: Tensor | None = None,
    difference: Tensor | None = None,
) -> None:
    """Update ``x`` and ``ax`` in place; all tensors but eta and mu have one shape, real dtypes and one device.

    Args:
        x: the parameters.
        g: the gradients, of the parameters' dtype; they are only read, and may be ``scratch``.
        ax: the averages, of the parameters' dtype or a wider one.
        eta, mu: 0-dim, on the host.
        hyper: the hyperparameters of the group.
        scratch: memory of x's shape and dtype, which is overwritten. None allocates every intermediate instead, which
            autograd needs (``differentiable``).
        difference: memory of ax's shape and dtype, which is overwritten; may be ``scratch`` if the dtypes are equal.
    """
    descend(x, g, eta, hyper, scratch)
    take_average(x, ax, mu, difference)


def descend(x: Tensor, g: Tensor, eta: Tensor, hyper: StepHyperparameters, scratch: Tensor | None) -> None:
    """Update the parameters ``x``: all lines of the rule but the last."""
    eta_value = eta.item()
    c = 1 - hyper.lambd * eta_value
    if hyper.maximize:
        g = torch.neg(g, out=scratch)
    if hyper.weight_decay != 0:
        g = torch.add(g, x, alpha=hyper.weight_decay, out=scratch)
    x.mul_(c)
    x.add_(g, alpha=-eta_value)


def take_average(x: Tensor, ax: Tensor, mu: Tensor, difference: Tensor | None) -> None:
    """Update the averages ``ax`` with the parameters ``x``: the last line of the rule."""
    if mu.item() == 1:
        ax.copy_(x)
    else:
        ax.add_(subtract(x, ax, difference).mul_(mu))


def subtract(x: Tensor, ax: Tensor, out: Tensor | None) -> Tensor:
    """``x - ax`` in the dtype of ``ax``, in ``out``, without the temporary of torch's subtraction of mixed dtypes."""
    if out is None or ax.dtype == x.dtype:
        return torch.sub(x, ax, out=out)
    return out.copy_(x).sub_(ax)
