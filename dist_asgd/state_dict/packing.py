"""Parameter groups in state dicts: parameters as numbers, in the order of registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..storage.buffers import ShardedParam
from ..update.schedule import Cohort

# How a process runs, not what it trains; torch.optim.ASGD's groups have no such key.
NOT_SAVED = ("fused",)


def _snapshot(value: Any) -> Any:
    # A Tensor lr changes in place; what was saved must not.
    return value.detach().clone() if isinstance(value, Tensor) else value


def pack_groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``param_groups`` with parameters numbered in order, as ``torch.optim`` packs them."""
    packed = []
    first = 0
    for group in groups:
        entry = {key: _snapshot(value) for key, value in group.items() if key not in ("params", *NOT_SAVED)}
        entry["params"] = list(range(first, first + len(group["params"])))
        first += len(group["params"])
        packed.append(entry)
    return packed


# --- step, eta and mu ------------------------------------------------------------------------------------


def snapshots_of(members: Sequence[ShardedParam], cohort_of: dict[int, Cohort]) -> dict[int, dict[str, Tensor]]:
    """Copies for each parameter index, on the host; where scalars are on a device, it is waited for once a cohort.

    Parameters share none: whoever loads into them must not write one through another.
    """
    together: dict[int, list[ShardedParam]] = {}
    for member in members:
        together.setdefault(id(cohort_of[member.index]), []).append(member)
    snapshots: dict[int, dict[str, Tensor]] = {member.index: {} for member in members}
    for alike in together.values():
        for key, scalar in cohort_of[alike[0].index].snapshot().items():
            # A tensor each, made at once.
            for member, copied in zip(alike, scalar.expand(len(alike)).clone().unbind(), strict=True):
                # As any other tensor, and no view to autograd.
                snapshots[member.index][key] = copied.data
    return snapshots


# --- hooks of the user's ---------------------------------------------------------------------------------


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
