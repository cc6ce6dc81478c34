"""Replica groups: ranks that hold the same local tensors of DTensors, and share their state and the work on them.

HSDP and the replicated parameters of tensor parallelism make such groups. Each rank of a group has the state of its
shard of the local tensors and updates that; an all-gather inside the group makes the local tensors whole again.

No messages decide which rank has which fragment: the mesh, the layout of the local tensors and the rank do.
``build_presharded`` in ``presharded_buffers.py`` makes the groups and the layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..comm import Communicator, Communicators
from ..comm.measure import Action
from ..storage.layout import BucketLayout, Slot
from ..storage.memory_order import as_real


@dataclass(frozen=True, slots=True)
class ReplicaGroup:
    """The ranks of one replica group, in order.

    ranks          their numbers in the default process group
    rank           the position of this rank in ``ranks``
    communicators  those of the optimizer, which make and keep the group's communicator
    """

    ranks: tuple[int, ...]
    rank: int
    communicators: Communicators

    def on(self, device: torch.device) -> Communicator:
        """The communicator of these ranks for tensors on ``device``. Collective on them at the first call."""
        return self.communicators.among(self.ranks, device)


@dataclass(frozen=True, slots=True)
class ReplicaSharding:
    """How a replica group shares one local tensor, which lies in ``slot`` of ``layout``.

    Each rank has the state of the fragment that lies in its shard. State dicts carry this object, so that a
    ``ReplicaShardDTensor`` can gather its fragments.
    """

    replicas: ReplicaGroup
    layout: BucketLayout
    slot: Slot

    def gather(self, fragment: Tensor) -> Tensor:
        """Gather every rank's ``fragment`` ``(fragment_numel,)``; returns the local tensor, flat, ``(slot_numel,)``.

        Collective on the replica group. Elements of a complex ``fragment``, and of the result, count once.
        """
        numels = [self.layout.fragment(self.slot, rank).numel for rank in range(len(self.replicas.ranks))]
        reals = as_real(fragment)
        # Gloo gathers only rows of one length; the tail of shorter fragments is never read.
        rows = reals.new_empty((len(numels), max(numels)))
        rows[self.replicas.rank, : reals.numel()] = reals
        self.replicas.on(fragment.device).all_gather(rows.view(-1), Action.GATHER)()
        whole = torch.cat([row[:numel] for row, numel in zip(rows, numels, strict=True)])
        return torch.view_as_complex(whole.view(-1, 2)) if fragment.is_complex() else whole

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplicaSharding:
        """Return the object itself, because a process group cannot be copied."""
        return self
