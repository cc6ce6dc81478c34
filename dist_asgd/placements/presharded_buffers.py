"""Presharded parameters are divided into state buffers: by dtype, device and the ranks that share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..comm import Communicators
from ..storage.layout import MIN_BUCKETS, bucket_cap_bytes, fill_buckets
from ..storage.precision import Precision
from . import dtensor, fsdp1
from .presharded import NamedParam, PreshardedState, local_tensor_of, num_reals
from .replicas import ReplicaGroup

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def fill_state_buffers(
    numels: Sequence[int], itemsize: int, bucket_cap_mb: float, num_replicas: int
) -> list[list[int]]:
    """Put local tensors that one replica group shares into state buffers; returns the positions of each one's."""
    cap_bytes = bucket_cap_bytes(bucket_cap_mb, sum(numels) * itemsize, MIN_BUCKETS[2], num_replicas)
    return fill_buckets(numels, itemsize, cap_bytes)


def build_presharded(
    params: Sequence[NamedParam],
    group_index: int,
    precision: Precision,
    bucket_cap_mb: float,
    communicators: Communicators | None,
) -> list[PreshardedState]:
    """Make the state buffers of one group's presharded parameters, given as (index, name, parameter).

    With ``communicators``, replica groups share their parameters, and the call is collective on each of them; their
    state buffers have at most ``bucket_cap_mb`` MiB of parameters, so that one is gathered while the next is updated.
    Without ``communicators``, each rank has the state of its whole local tensors.
    """
    classes: dict[tuple[torch.dtype, torch.device, tuple[int, ...]], list[NamedParam]] = {}
    for entry in params:
        local = local_tensor_of(entry[2])
        # A state buffer belongs to one replica group, whose ranks gather it.
        ranks = _replica_ranks(entry[2], communicators)
        classes.setdefault((local.dtype, local.device, ranks), []).append(entry)
    state_buffers: list[PreshardedState] = []
    for (dtype, device, ranks), alike in classes.items():
        if communicators is None or not ranks:
            state_buffers.append(PreshardedState(alike, group_index, precision, None))
            continue
        replicas = ReplicaGroup(ranks, ranks.index(communicators.ranks[communicators.rank]), communicators)
        # All ranks make their communicators now, in one order: if that fails, the constructor fails and not a step.
        replicas.on(device)
        numels = [num_reals(param) for _, _, param in alike]
        for chosen in fill_state_buffers(numels, dtype.to_real().itemsize, bucket_cap_mb, len(ranks)):
            state_buffers.append(PreshardedState([alike[i] for i in chosen], group_index, precision, replicas))
    return state_buffers


def _replica_ranks(param: Tensor, communicators: Communicators | None) -> tuple[int, ...]:
    """The ranks that share the local tensor of ``param``, of the default group; none if only this one updates it."""
    if communicators is None or fsdp1.is_managed(param):
        return ()
    is_dtensor = dtensor.is_dtensor(param)
    ranks = dtensor.replica_ranks(cast("DTensor", param)) if is_dtensor else communicators.shard_ranks
    return ranks if len(ranks) > 1 else ()
