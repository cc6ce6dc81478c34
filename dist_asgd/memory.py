"""Counts the bytes that the optimizer holds on this rank, for ``ShardedASGD.memory_report()``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .storage.buffers import ShardedParam, StateBuffer


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """The bytes that the optimizer holds on this rank, as ``ShardedASGD.memory_report()`` returns them.

    Attributes:
        parameter_bytes: Bytes of the parameters: buckets with their padding, and the local tensors of DTensors. Frozen
            ones, of which nothing is held, are not counted here or elsewhere.
        padding_bytes: Bytes of ``parameter_bytes`` that belong to no parameter.
        state_bytes: Bytes of this rank's shards of ``ax``, which they take once averaging has begun. The scalars take a
            few bytes per parameter group and are not counted.
        unwritten_state_bytes: Bytes of ``state_bytes`` that take no memory now, because parameters stand for their
            averages until averaging begins. On GPUs also those of averages that no step has written yet.
        host_state_bytes: Bytes of ``state_bytes`` that lie in page-locked host memory, of parameters on a device
            (``average_device="cpu"``).
        master_bytes: Bytes of this rank's shards of float32 masters, without what 16-bit parameters hold of them.
        gradient_bytes: Bytes of the gradients that the parameters have now. In stage 2 also those of this rank's shards
            of the reduced gradients, which are kept between steps.
        in_flight_bytes: Bytes of the buffers for buckets that are being sent, and of the update's scratch memory. Both
            are kept between steps.
        full_state_bytes: Bytes of ``ax`` that an unsharded ``torch.optim.ASGD`` would hold for the same parameters.
        full_gradient_bytes: Bytes of gradients that an unsharded ``torch.optim.ASGD`` would need.
    """

    parameter_bytes: int
    padding_bytes: int
    state_bytes: int
    unwritten_state_bytes: int
    host_state_bytes: int
    master_bytes: int
    gradient_bytes: int
    in_flight_bytes: int
    full_state_bytes: int
    full_gradient_bytes: int


def report(state_buffers: Sequence[StateBuffer], in_flight_bytes: int, has_gradients: bool = True) -> MemoryReport:
    """Add up the bytes of all state buffers of an optimizer and of their members. Not collective.

    Without ``has_gradients``, gradients are those of another optimizer, and do not count.
    """
    members: list[ShardedParam] = [member for buffer in state_buffers for member in buffer.members]
    trained = [member for member in members if has_gradients and member.param.requires_grad]
    param_gradients = has_gradients * sum(member.gradient.nbytes for member in members if member.gradient is not None)
    reduced = [buffer.reduced_gradient() for buffer in state_buffers]
    # A presharded parameter that no other rank needs lies in no flat storage.
    flat = [buffer for buffer in state_buffers if buffer.flat is not None]
    separate = sum(m.slot.numel * b.dtype.itemsize for b in state_buffers if b.flat is None for m in b.members)
    return MemoryReport(
        parameter_bytes=separate + sum(buffer.layout.numel * buffer.dtype.itemsize for buffer in flat),
        padding_bytes=sum(buffer.layout.padding_numel * buffer.dtype.itemsize for buffer in flat),
        state_bytes=sum(buffer.average.nbytes for buffer in state_buffers),
        unwritten_state_bytes=sum(buffer.average.nbytes for buffer in state_buffers if not buffer.average_takes_memory),
        host_state_bytes=sum(buffer.average.nbytes for buffer in state_buffers if buffer.is_offloaded),
        master_bytes=sum(buffer.master.nbytes for buffer in state_buffers if buffer.master is not None),
        gradient_bytes=param_gradients + sum(gradient.nbytes for gradient in reduced if gradient is not None),
        in_flight_bytes=in_flight_bytes,
        full_state_bytes=sum(member.param.nbytes for member in members),
        full_gradient_bytes=sum(member.param.nbytes for member in trained),
    )
