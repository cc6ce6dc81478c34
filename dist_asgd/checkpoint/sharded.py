"""One rank's part of the state, marked as such."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..agreement import digest_of
from ..comm import Communicators
from ..state import ShardedState
from .groups import pack_groups
from .shard import MARK_KEY, AverageShard, ShardMark


def mark_of(shards: ShardedState, communicators: Communicators) -> ShardMark:
    """Whose shard this is, and a digest of the layout it is a shard of."""
    places = {id(bucket): place for place, bucket in enumerate(shards.buckets)}
    layout = [
        (tuple(m.param.shape), str(m.dtype), m.strides, places[id(m.bucket)], m.slot.offset) for m in shards.members
    ]
    fresh = tuple(m.index for m in shards.members if shards.cohort_of[m.index].fresh)
    return ShardMark(communicators.rank, communicators.world_size, digest_of(layout), fresh)


def pack(groups: Sequence[dict[str, Any]], shards: ShardedState, mark: ShardMark) -> dict[str, Any]:
    """torch's layout with this rank's slices as ``ax`` and ``mark`` in every group; tensors are the live ones."""
    state = {}
    for member in shards.members:
        cohort = shards.cohort_of[member.index]
        state[member.index] = {
            "step": cohort.step,
            "eta": cohort.eta,
            "mu": cohort.mu,
            **{key: AverageShard.of(slice_) for key, slice_ in member.slices().items()},
        }
    return {"state": state, "param_groups": [{**group, MARK_KEY: mark} for group in pack_groups(groups)]}
