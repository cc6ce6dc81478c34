"""Scratch shards: with ``step_in_backward=True`` the reduced gradient of a bucket lives until its update.

A scratch shard serves one bucket after the other. Buckets are launched in one order in every step, so that each bucket
has the same scratch shard each time, and the addresses in its plan stay right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..storage.buffers import Bucket

# One is updated from while the next one is being filled.
NUM_SCRATCH_SHARDS = 2


class ScratchShards:
    """Memory for the gradient shards of ``NUM_SCRATCH_SHARDS`` buckets, on each device; kept between steps."""

    def __init__(self) -> None:
        self._shards: dict[tuple[torch.device, int], Tensor] = {}
        self._nbytes: dict[torch.device, int] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of all scratch shards."""
        return sum(shard.nbytes for shard in self._shards.values())

    def fit(self, buckets: list[Bucket]) -> None:
        """Make room for these buckets from the next ``lend`` on; none is in use."""
        self._shards.clear()
        self._nbytes = {}
        for bucket in buckets:
            nbytes = scratch_bytes(bucket)
            self._nbytes[bucket.device] = max(nbytes, self._nbytes.get(bucket.device, 0))

    def lend(self, bucket: Bucket, number: int) -> None:
        """Make a scratch shard the gradient shard of ``bucket``, the one with this ``number`` since the step began."""
        key = (bucket.device, number % NUM_SCRATCH_SHARDS)
        if key not in self._shards:
            # Zeros, because an update runs over padding, too: there must be numbers.
            self._shards[key] = torch.zeros(self._nbytes[bucket.device], dtype=torch.uint8, device=bucket.device)
        numel = bucket.layout.shard_numel
        bucket.gradient = self._shards[key][: scratch_bytes(bucket)].view(bucket.gradient_dtype)[:numel]


def scratch_bytes(bucket: Bucket) -> int:
    """The bytes of a gradient shard of ``bucket``."""
    return bucket.layout.shard_numel * bucket.gradient_dtype.itemsize
