"""Ranks that hold the same local tensors of DTensors, and share the work on them and the state.

Each updates its shard of them; then all have them whole again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..comm import Communicator, Communicators
from ..storage.layout import BucketLayout, Slot
from ..storage.memory_order import as_real


@dataclass(frozen=True, slots=True)
class ReplicaGroup:
    """``ranks`` in order, as numbers in the default group; ``rank`` is this one's place among them."""

    ranks: tuple[int, ...]
    rank: int
    communicators: Communicators

    def on(self, device: torch.device) -> Communicator:
        """The communicator of these ranks; collective on them where one is first asked for."""
        return self.communicators.among(self.ranks, device)


@dataclass(frozen=True, slots=True)
class ReplicaSharding:
    """How replicas share the local tensor in ``slot``: each has the state of the piece in its shard."""

    replicas: ReplicaGroup
    layout: BucketLayout
    slot: Slot

    def gather(self, mine: Tensor) -> Tensor:
        """Collective on the replicas: all of what each has its piece ``mine`` ``(piece_numel,)`` of, 1-D."""
        numels = [self.layout.fragment(self.slot, rank).numel for rank in range(len(self.replicas.ranks))]
        reals = as_real(mine)
        # Rows of one length, as not all backends gather others.
        rows = reals.new_empty((len(numels), max(numels)))
        rows[self.replicas.rank, : reals.numel()] = reals
        self.replicas.on(mine.device).all_gather(rows.view(-1))()
        whole = torch.cat([row[:numel] for row, numel in zip(rows, numels, strict=True)])
        return torch.view_as_complex(whole.view(-1, 2)) if mine.is_complex() else whole

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplicaSharding:
        """Itself: a process group cannot be copied."""
        return self
