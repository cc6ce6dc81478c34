"""What the optimizer holds on this rank, in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .storage.buffers import ShardedParam, StateBuffer


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes that the optimizer holds on this rank, as ``ShardedASGD.memory_report()`` returns them.

    Attributes:
        parameter_bytes: the flat storage of the parameters, padding included; of DTensors, their local tensors.
        padding_bytes: the bytes of ``parameter_bytes`` that belong to no parameter.
        state_bytes: this rank's shard of ``ax``. (The scalars are a few bytes a parameter group and are not counted.)
        gradient_bytes: in stage 2 this rank's shard of the reduced gradients, which is kept between steps; in stage 1
            the gradients that the parameters have now.
        in_flight_bytes: buffers for buckets on their way, and the update's scratch memory; kept between steps.
        full_state_bytes: the bytes of ``ax`` that an unsharded ``torch.optim.ASGD`` would hold for the same model.
        full_gradient_bytes: the bytes of gradients that an unsharded ``torch.optim.ASGD`` would need.
    """

    parameter_bytes: int
    padding_bytes: int
    state_bytes: int
    gradient_bytes: int
    in_flight_bytes: int
    full_state_bytes: int
    full_gradient_bytes: int


def report(buckets: Sequence[StateBuffer], in_flight_bytes: int) -> MemoryReport:
    """The accounting of these buckets, and of parameters that are in none."""
    members: list[ShardedParam] = [member for bucket in buckets for member in bucket.members]
    own = sum(member.param.nbytes for member in members)
    standing = sum(member.gradient.nbytes for member in members if member.gradient is not None)
    shards = sum(gradient.nbytes for bucket in buckets if (gradient := bucket.reduced_gradient()) is not None)
    whole = [bucket for bucket in buckets if bucket.flat is not None]
    elsewhere = sum(m.slot.numel * b.dtype.itemsize for b in buckets if b.flat is None for m in b.members)
    return MemoryReport(
        parameter_bytes=elsewhere + sum(bucket.layout.numel * bucket.dtype.itemsize for bucket in whole),
        padding_bytes=sum(bucket.layout.padding_numel * bucket.dtype.itemsize for bucket in whole),
        state_bytes=sum(bucket.average.nbytes for bucket in buckets),
        gradient_bytes=standing + shards,
        in_flight_bytes=in_flight_bytes,
        full_state_bytes=own,
        full_gradient_bytes=sum(member.param.nbytes for member in members if member.param.requires_grad),
    )
