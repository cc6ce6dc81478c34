"""The rule in torch's foreach form, on tiles that span many parameters: the default on accelerators.

For one step of parameters x with gradients g and averages ax, with eta and mu from the step before
(torch/optim/asgd.py, ``_multi_tensor_asgd``):

    g  <- -g                      if maximize
    g  <- g + weight_decay * x    if weight_decay is not 0
    g  <- g + lambd * x
    x  <- x - eta * g
    ax <- ax + (x - ax) * mu      at every mu, so ax need not be bitwise x while mu is 1

The bits are those of ``torch.optim.ASGD(foreach=True)`` on the same device. torch needs lists of parameters; a tile is
one tensor already, so each line is one launch. ``operators.py`` calls this module for groups whose
implementation is FOREACH.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import subtract
from .schedule import StepHyperparameters


def descend(x: Tensor, g: Tensor, eta: Tensor, hyper: StepHyperparameters, scratch: Tensor | None) -> None:
    """Update the parameters ``x``, as ``reference.descend``; but ``eta`` is on their device."""
    if hyper.maximize:
        g = torch.neg(g, out=scratch)
    if hyper.weight_decay != 0:
        g = torch.add(g, x, alpha=hyper.weight_decay, out=scratch)
    g = torch.add(g, x, alpha=hyper.lambd, out=scratch)
    x.addcmul_(g, eta, value=-1)


def take_average(x: Tensor, ax: Tensor, mu: Tensor, difference: Tensor | None) -> None:
    """Update the averages ``ax``, as ``reference.take_average``; but ``mu`` is on their device."""
    ax.addcmul_(subtract(x, ax, difference), mu)
