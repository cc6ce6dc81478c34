"""What the optimizer holds on this rank, in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .buffers import Bucket


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes held on this rank; ``full_*`` is what an unsharded ``torch.optim.ASGD`` would hold for the same model.

    parameter_bytes   the flat storage, padding included
    padding_bytes     of that, elements that belong to no parameter
    state_bytes       this rank's shard of ``ax`` (the scalars are a few bytes a parameter group)
    gradient_bytes    stage 2: this rank's shard of reduced gradients, kept between steps. Stage 1: the gradients
                      that stand on the parameters now
    in_flight_bytes   buffers for buckets on their way, and the update's scratch; kept between steps
    """

    parameter_bytes: int
    padding_bytes: int
    state_bytes: int
    gradient_bytes: int
    in_flight_bytes: int
    full_state_bytes: int
    full_gradient_bytes: int


def report(buckets: Sequence[Bucket], in_flight_bytes: int) -> MemoryReport:
    """The accounting of these buckets."""
    members = [member for bucket in buckets for member in bucket.members]
    own = sum(member.param.nbytes for member in members)
    standing = sum(member.param.grad.nbytes for member in members if member.param.grad is not None)
    shards = sum(bucket.gradient.nbytes for bucket in buckets if bucket.gradient is not None)
    return MemoryReport(
        parameter_bytes=sum(bucket.flat.nbytes for bucket in buckets),
        padding_bytes=sum(bucket.layout.padding_numel * bucket.dtype.itemsize for bucket in buckets),
        state_bytes=sum(bucket.average.nbytes for bucket in buckets),
        gradient_bytes=standing + shards,
        in_flight_bytes=in_flight_bytes,
        full_state_bytes=own,
        full_gradient_bytes=sum(member.param.nbytes for member in members if member.param.requires_grad),
    )
