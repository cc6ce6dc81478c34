"""The oracle: a history run by ``torch.optim.ASGD`` itself, in one process, on the mean gradients.

The bits of torch on 16-bit CPU tensors depend on the memory layout: ``x.add_(g, alpha=a)`` rounds the product first in
the last ``numel % 32`` elements and in strided tensors, but not in full vector lanes. Therefore gradients have the
strides of their parameters, as backward gives them, and a 16-bit parameter that is not dense in memory is made dense,
as moving it into a bucket makes it.

For the same reason the bits of a 16-bit DTensor are those of ``torch.optim.ASGD`` on its local tensors, so such a
parameter is this rank's local tensor here. All other parameters are whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.harness.history import (
    AddGroup,
    Event,
    GroupSpec,
    History,
    SetLr,
    SetT0,
    SetTrained,
    StartAveraging,
    Step,
    like,
    make_params,
    mean_gradient,
)
from tests.harness.placements import Placements


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Set the learning rate as torch's schedulers do: in place if it is a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def group_dict(history: History, spec: GroupSpec, params: list[Tensor], first_index: int) -> dict[str, Any]:
    """The argument for one group: its options, and parameters as tensors or as (name, tensor) pairs."""
    named = [(f"p{first_index + i}", p) for i, p in enumerate(params)]
    return {"params": named if history.named else params, **spec.options()}


class Oracle:
    """Runs a history with ``torch.optim.ASGD(foreach=foreach)``, one event at a time.

    With ``widened`` it trains float32 copies of 16-bit parameters, which still get 16-bit gradients. ``placements``
    give the local tensors of DTensors.
    """

    def __init__(
        self, history: History, placements: Placements, *, foreach: bool, dyadic: bool, widened: bool = False
    ) -> None:
        self.history = history
        self.placements = placements
        self.dyadic = dyadic
        self.widened = widened
        # The parameters with the shapes and dtypes of the history, which their gradients have, too.
        self.originals: list[Tensor] = []
        self.params: list[Tensor] = []
        self.num_steps = 0
        groups = [self._make_group(spec) for spec in history.groups]
        self.optimizer = torch.optim.ASGD(groups, foreach=foreach)

    def apply(self, event: Event) -> None:
        """Run one event. ``Reload`` changes nothing here."""
        groups = self.optimizer.param_groups
        if isinstance(event, Step):
            self._step(event)
        elif isinstance(event, SetLr):
            set_lr(groups[event.group], event.lr)
        elif isinstance(event, SetT0):
            groups[event.group]["t0"] = event.t0
        elif isinstance(event, StartAveraging):
            for group in groups:
                group["t0"] = max(self._step_of(p) for p in group["params"])
        elif isinstance(event, SetTrained):
            self.params[event.index(self.history)].requires_grad_(event.trained)
        elif isinstance(event, AddGroup):
            self.optimizer.add_param_group(self._make_group(event.group))

    def _make_group(self, spec: GroupSpec) -> dict[str, Any]:
        first = len(self.params)
        self.originals += make_params(spec, self.history.seed, first)
        params = [self._own(index) for index in range(first, len(self.originals))]
        group = group_dict(self.history, spec, params, first)
        self.params.extend(params)
        return group

    def is_part(self, index: int) -> bool:
        """Whether the oracle has the local tensor of this parameter if it is a DTensor: it is a 16-bit one."""
        return self.originals[index].element_size() == 2 and not self.widened

    def _own(self, index: int) -> Tensor:
        original = self.originals[index]
        if original.element_size() != 2:
            return original
        if self.widened:
            return _float32(like(original))
        return like(self.placements.part(index, original)).requires_grad_(original.requires_grad)

    def _step(self, event: Step) -> None:
        self.num_steps += 1
        for index, param in enumerate(self.params):
            param.grad = None
            if param.requires_grad and event.who[index % len(event.who)] != "none":
                original = self.originals[index]
                mean = mean_gradient(original, self.history.seed, self.num_steps, index, dyadic=self.dyadic)
                if self.is_part(index):
                    mean = self.placements.part(index, mean)
                param.grad = torch.empty_like(param).copy_(mean)
        self.optimizer.step()

    def _step_of(self, param: Tensor) -> float:
        state = self.optimizer.state.get(param)
        return float(state["step"]) if state else 0.0


def _float32(param: Tensor) -> Tensor:
    return param.detach().float().requires_grad_(param.requires_grad)
