"""One rank's part of the state, marked as such."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..state import ShardedState
from .groups import pack_groups
from .shard import MARK_KEY, AverageShard


def pack(groups: Sequence[dict[str, Any]], shards: ShardedState) -> dict[str, Any]:
    """torch's layout with this rank's slices as ``ax`` and a mark in every group; scalars are copies."""
    mark = shards.mark()
    state = {}
    for member in shards.members:
        cohort = shards.cohort_of[member.index]
        state[member.index] = {
            "step": cohort.step.clone(),
            "eta": cohort.eta.clone(),
            "mu": cohort.mu.clone(),
            "ax": AverageShard.of(member.average),
        }
    return {"state": state, "param_groups": [{**group, MARK_KEY: mark} for group in pack_groups(groups)]}
