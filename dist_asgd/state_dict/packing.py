"""What every form of state dict has in common: packed parameter groups, the scalars, and the user's hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..storage.buffers import ShardedParam
from ..update.schedule import Cohort

# Keys that say how a process runs and not what it trains. The groups of torch.optim.ASGD do not have them.
NOT_SAVED = ("fused",)


def _snapshot(value: Any) -> Any:
    # A Tensor lr is changed in place later, and the state dict must keep the value of now.
    return value.detach().clone() if isinstance(value, Tensor) else value


def pack_groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``param_groups`` with numbers for the parameters, in order, as ``torch.optim`` packs them."""
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
    """Return copies of step, eta and mu on the host, by parameter index.

    Every parameter gets tensors of its own, because loaders write into them in place. If scalars are on a device, the
    host waits for it once per cohort.
    """
    by_cohort: dict[int, list[ShardedParam]] = {}
    for member in members:
        by_cohort.setdefault(id(cohort_of[member.index]), []).append(member)
    snapshots: dict[int, dict[str, Tensor]] = {member.index: {} for member in members}
    for alike in by_cohort.values():
        for key, scalar in cohort_of[alike[0].index].snapshot().items():
            # One clone for all of them is much faster than one per parameter.
            for member, copied in zip(alike, scalar.expand(len(alike)).clone().unbind(), strict=True):
                # Without .data each would be a view of the clone, which autograd forbids to change in place.
                snapshots[member.index][key] = copied.data
    return snapshots


# --- the user's hooks ------------------------------------------------------------------------------------


def before_state_dict(optimizer: Optimizer) -> None:
    """Run the state_dict pre-hooks."""
    for hook in optimizer._optimizer_state_dict_pre_hooks.values():
        hook(optimizer)


def after_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Run the state_dict post-hooks on ``state_dict``; return the dict, or the one that a hook returned instead."""
    for hook in optimizer._optimizer_state_dict_post_hooks.values():
        replaced = hook(optimizer, state_dict)
        if replaced is not None:
            state_dict = replaced
    return state_dict


def before_load(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Run the load_state_dict pre-hooks on a shallow copy, as torch does; return the dict to load."""
    state_dict = state_dict.copy() if isinstance(state_dict, dict) else state_dict
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = hook(optimizer, state_dict)
        if replaced is not None:
            state_dict = replaced
    return state_dict


def after_load(optimizer: Optimizer) -> None:
    """Run the load_state_dict post-hooks."""
    for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        hook(optimizer)
