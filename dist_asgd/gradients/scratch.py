"""Scratch shards: with ``step_in_backward=True`` the reduced gradient of a bucket lives until its update.

Two scratch shards take turns. Buckets are launched in one order in every step, so that each bucket has the same scratch
shard each time, and the addresses in its plan stay right.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..storage.buffers import Bucket

# One is updated from while the next one is being filled.
NUM_SCRATCH_SHARDS = 2


class ScratchShards:
    """Memory for the gradient shards of ``NUM_SCRATCH_SHARDS`` buckets, which is kept between steps.

    Each is as large as the largest bucket that it has served.
    """

    def __init__(self) -> None:
        self._shards: dict[tuple[torch.device, int], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of all scratch shards."""
        return sum(shard.nbytes for shard in self._shards.values())

    def forget(self) -> None:
        """Let go of all memory; called when there are other buckets. None is in use, or its bucket keeps it."""
        self._shards.clear()

    def lend(self, bucket: Bucket, number: int) -> None:
        """Make a scratch shard the gradient shard of ``bucket``, which is launched as the ``number``-th of a step."""
        key = (bucket.device, number % NUM_SCRATCH_SHARDS)
        nbytes = gradient_bytes(bucket)
        if key not in self._shards or self._shards[key].nbytes < nbytes:
            # The smaller one goes first, and zeros, because an update runs over padding, where there must be numbers.
            self._shards.pop(key, None)
            self._shards[key] = torch.zeros(nbytes, dtype=torch.uint8, device=bucket.device)
        bucket.gradient = self._shards[key][:nbytes].view(bucket.gradient_dtype)


def gradient_bytes(bucket: Bucket) -> int:
    """The bytes of a gradient shard of ``bucket``."""
    return bucket.layout.shard_numel * bucket.gradient_dtype.itemsize


def scratch_bytes(buckets: Iterable[Bucket]) -> int:
    """The bytes of all scratch shards if ``buckets`` are launched in this order."""
    largest: dict[tuple[torch.device, int], int] = {}
    for number, bucket in enumerate(buckets):
        key = (bucket.device, number % NUM_SCRATCH_SHARDS)
        largest[key] = max(gradient_bytes(bucket), largest.get(key, 0))
    return sum(largest.values())
