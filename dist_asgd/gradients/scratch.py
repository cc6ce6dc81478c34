"""Scratch shards: with ``step_in_backward=True`` the reduced gradient of a bucket lives until its update.

Two buckets have one at a time. They take turns at the two ends of one buffer, which is as long as the largest two
neighbours. Buckets are launched in one order in every step, so that each has the same place each time, and the
addresses in its plan stay right.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..storage.buffers import Bucket
from ..storage.layout import ALIGN_BYTES

# One is updated from while the next one is being filled.
NUM_SCRATCH_SHARDS = 2


class ScratchShards:
    """Memory for the gradient shards of ``NUM_SCRATCH_SHARDS`` buckets of each device, which is kept between steps."""

    def __init__(self) -> None:
        self._buffers: dict[torch.device, Tensor] = {}
        self._least_bytes = 0
        # Which end is next, and the bytes that the bucket at the other end has.
        self._turn = 0
        self._lent_bytes = 0

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def fit(self, buckets: Sequence[Bucket]) -> None:
        """Let go of all memory, and make a buffer that fits these ``buckets`` when the next one needs it."""
        self._buffers.clear()
        self._least_bytes = scratch_bytes(buckets)
        self.begin()

    def begin(self) -> None:
        """Begin with the first end again; called between steps, when no bucket has a scratch shard."""
        self._turn = self._lent_bytes = 0

    def lend(self, bucket: Bucket) -> None:
        """Make a scratch shard the gradient shard of ``bucket``; only the bucket of the call before still has one."""
        nbytes = scratch_bytes([bucket])
        wanted = max(nbytes + self._lent_bytes, self._least_bytes)
        buffer = self._buffers.get(bucket.device)
        if buffer is None or buffer.nbytes < wanted:
            # The bucket before keeps the old one until its update. An update runs over padding, too: hence the zeros.
            buffer = self._buffers[bucket.device] = torch.zeros(wanted, dtype=torch.uint8, device=bucket.device)
        start = buffer.nbytes - nbytes if self._turn else 0
        shard = buffer[start : start + bucket.layout.shard_numel * bucket.gradient_dtype.itemsize]
        bucket.gradient = shard.view(bucket.gradient_dtype)
        self._turn, self._lent_bytes = 1 - self._turn, nbytes


def scratch_bytes(buckets: Sequence[Bucket]) -> int:
    """The bytes of all scratch shards if ``buckets``, on one device, are launched in this order."""
    found = [-(-b.layout.shard_numel * b.gradient_dtype.itemsize // ALIGN_BYTES) * ALIGN_BYTES for b in buckets]
    return max((first + second for first, second in pairwise([0, *found])), default=0)
