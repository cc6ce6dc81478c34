"""The hooks that users registered on state dicts, called when and as ``torch.optim.Optimizer`` calls them."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


def before_state_dict(optimizer: Optimizer) -> None:
    """The state_dict pre-hooks."""
    for hook in optimizer._optimizer_state_dict_pre_hooks.values():
        hook(optimizer)


def after_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state_dict post-hooks, on what they see in torch; the dict that they leave or return."""
    for hook in optimizer._optimizer_state_dict_post_hooks.values():
        replaced = hook(optimizer, state_dict)
        if replaced is not None:
            state_dict = replaced
    return state_dict


def before_load(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The load_state_dict pre-hooks, on a shallow copy; the dict to load."""
    state_dict = state_dict.copy() if isinstance(state_dict, dict) else state_dict
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = hook(optimizer, state_dict)
        if replaced is not None:
            state_dict = replaced
    return state_dict


def after_load(optimizer: Optimizer) -> None:
    """The load_state_dict post-hooks."""
    for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        hook(optimizer)
