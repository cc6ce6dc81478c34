"""Hooks on parameters that tell a ``Reducer`` when a gradient is complete; they keep no optimizer alive."""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import Tensor


class GradientListener(Protocol):
    """Is told when the gradient of a parameter is complete in a backward."""

    def note_ready(self, index: int) -> None:
        """Called on autograd's thread with the index of the parameter."""


def hook_on(param: Tensor, listener: weakref.ref[GradientListener], index: int) -> torch.utils.hooks.RemovableHandle:
    """Register a hook on ``param`` that calls ``note_ready(index)`` as long as the listener lives."""

    # Parameters outlive optimizers: the hook must keep neither the listener nor its buckets alive.
    def hook(_: Tensor) -> None:
        owner = listener()
        if owner is not None:
            owner.note_ready(index)

    handle: torch.utils.hooks.RemovableHandle = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def remove_hooks(hooks: list[torch.utils.hooks.RemovableHandle]) -> None:
    """Remove all hooks of the list, and empty it."""
    while hooks:
        hooks.pop().remove()
