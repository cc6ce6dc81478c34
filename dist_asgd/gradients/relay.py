"""Stage 1 with uneven inputs: gradients that a rank without further inputs has not, on their way to it.

DDP does not give a rank that has joined (``torch.distributed.algorithms.join``) the gradients that the others average,
and what lies in ``p.grad`` there is left over from its own last step. The rank still has its shard of the state to
update. So the first active rank sends it the gradient of that shard, one bucket after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..comm import Communicators
from ..comm.reports import RankReports
from ..storage.buffers import Bucket, BucketParam
from ..storage.send_layout import whole_layout


class Relay:
    """Brings the gradients of each step from the first active rank to ranks that have joined.

    All ranks make one at the same step and keep it while the same ranks have joined. ``joined`` are these.
    """

    def __init__(self, communicators: Communicators, reports: RankReports, buckets: Sequence[Bucket]) -> None:
        """Collective: the ranks tell each other which shards they have. ``buckets`` are all that there are."""
        self.joined = reports.joined
        self._source = reports.first_active
        self._rank = communicators.rank
        self._communicators = communicators
        own = torch.tensor([communicators.shard_rank], device="cpu")
        self._shard_of: list[int] = communicators.host.exchange(own).flatten().tolist()
        # One bucket's gradient by device and dtype: each bucket is used up before the next arrives.
        self._scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        if self._rank in (self._source, *self.joined):
            for bucket in sorted(buckets, key=lambda bucket: -bucket.layout.numel):
                key = (bucket.device, bucket.gradient_dtype)
                if key not in self._scratch:
                    numel = bucket.layout.numel
                    self._scratch[key] = torch.zeros(numel, dtype=bucket.gradient_dtype, device=bucket.device)
        # On ranks that have joined: their own gradients, while those of a step are in the place of them.
        self._own_gradients: list[tuple[Tensor, Tensor | None]] = []

    def begin(self, members: Sequence[BucketParam]) -> None:
        """Let ``p.grad`` of the parameters that step be where ``deliver`` will put gradients, if this rank has joined.

        Until ``deliver`` their values are without meaning. Not collective.
        """
        if self._rank not in self.joined:
            return
        for member in members:
            received = self._bucket_gradient(member.bucket)[member.slot.offset : member.slot.stop]
            if member.dtype.is_complex:
                received = torch.view_as_complex(received.view(-1, 2))
            self._own_gradients.append((member.param, member.param.grad))
            member.param.grad = received.as_strided(member.param.shape, member.strides)

    def deliver(self, bucket: Bucket, active: frozenset[int]) -> None:
        """Bring the gradient of every joined rank's shard of ``bucket`` to it. Collective; waits for the messages."""
        if self._rank in (self._source, *self.joined):
            flat = self._bucket_gradient(bucket)
        else:
            flat = torch.empty(0, dtype=bucket.gradient_dtype, device=bucket.device)
        if self._rank == self._source:
            gradients = [member.param.grad if member.index in active else None for member in bucket.members]
            bucket.pack(bucket.flat_gradients(gradients), whole_layout(bucket.layout), flat)
        numel, empty = bucket.layout.shard_numel, flat[:0]
        everyone = self._communicators.among(tuple(self._communicators.ranks), bucket.device)
        numels = [numel if rank == self._source else 0 for rank in range(everyone.world_size)]
        for joined in self.joined:
            start = self._shard_of[joined] * numel
            shard = flat[start : start + numel]
            places = None
            if self._rank == joined:
                places = [shard if rank == self._source else empty for rank in range(everyone.world_size)]
            everyone.gather(shard if self._rank == self._source else empty, places, numels, joined)

    def end(self) -> None:
        """Put this rank's own gradients back; called after the step, also if it failed."""
        while self._own_gradients:
            param, gradient = self._own_gradients.pop()
            param.grad = gradient

    def _bucket_gradient(self, bucket: Bucket) -> Tensor:
        """Memory ``(bucket_numel,)`` for the gradient of a bucket, the same for all buckets of a kind."""
        return self._scratch[bucket.device, bucket.gradient_dtype][: bucket.layout.numel]
