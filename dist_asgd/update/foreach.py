"""The rule in torch's foreach form, on flat runs of many parameters: the update on accelerators.

For one step with gradient g (torch/optim/asgd.py, ``_multi_tensor_asgd``):

    g  <- -g                      if maximize
    g  <- g + weight_decay * x    if weight_decay is not 0
    g  <- g + lambd * x
    x  <- x - eta * g
    ax <- ax + (x - ax) * mu      at every mu: while mu is 1, ax need not be bitwise x

Bit-identical to ``torch.optim.ASGD(foreach=True)`` on the same device. Where torch makes lists of parameters,
a bucket's run already is one tensor, so each line is one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import subtract
from .schedule import StepHyperparameters


def descend(param: Tensor, gradient: Tensor, eta: Tensor, hyper: StepHyperparameters, scratch: Tensor | None) -> None:
    """The lines that update ``param``; as in ``reference``, but ``eta`` is on the parameters' device."""
    if hyper.maximize:
        gradient = torch.neg(gradient, out=scratch)
    if hyper.weight_decay != 0:
        gradient = torch.add(gradient, param, alpha=hyper.weight_decay, out=scratch)
    gradient = torch.add(gradient, param, alpha=hyper.lambd, out=scratch)
    param.addcmul_(gradient, eta, value=-1)


def take_average(param: Tensor, average: Tensor, mu: Tensor, difference: Tensor | None) -> None:
    """The line that updates ``average``; ``mu`` is on the parameters' device."""
    average.addcmul_(subtract(param, average, difference), mu)
