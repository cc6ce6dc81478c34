"""What the reduce-scatter of a bucket sends: the send buffers for packed gradients, and large gradients as they lie."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..comm.base import ShardCollectives
from ..storage.buffers import Bucket
from ..storage.layout import DIRECT_BYTES, SendLayout, SendRange, send_layout, whole_layout
from ..storage.memory_order import flattened

# Buckets in flight at a time: one arrives while the next is packed.
MAX_IN_FLIGHT = 2


class SendBuffers:
    """The send buffers of all buckets, by device and dtype, and how each bucket is sent.

    A buffer is busy until the reduce-scatter that reads it has ended. It is kept for the next bucket: memory that is
    touched for the first time costs more than the copy into it. ``nbytes`` counts all buffers.
    """

    def __init__(self, buckets: Sequence[Bucket], collectives: Mapping[torch.device, ShardCollectives]) -> None:
        self._buckets = buckets
        self._layouts: dict[int, SendLayout] = {}
        for bucket in buckets:
            if collectives[bucket.device].contiguous:
                self._layouts[id(bucket)] = whole_layout(bucket.layout)
            else:
                self._layouts[id(bucket)] = send_layout(bucket.layout, direct_numel(bucket))
        self.forget()

    def forget(self) -> None:
        """Let go of all buffers, the busy ones included."""
        self._free: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        self.nbytes = 0

    def layout(self, bucket: Bucket) -> SendLayout:
        """How ``bucket`` is sent."""
        return self._layouts[id(bucket)]

    def take(self, bucket: Bucket, finish_oldest: Callable[[], None]) -> tuple[Tensor, Callable[[], None]]:
        """A free buffer for ``bucket``, and the call that gives it back once nothing reads it any more.

        Calls ``finish_oldest``, which gives one back, while all are busy. RuntimeError while a CUDA graph is captured.
        """
        key = (bucket.device, bucket.wire_dtype)
        if bucket.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "dist_asgd: a backward that a CUDA graph captures cannot reduce gradients: the exchanges between ranks "
                "would not be replayed. Capture with stage=1, or leave backward outside of the graph."
            )
        if key not in self._free:
            same_kind = [b for b in self._buckets if (b.device, b.wire_dtype) == key]
            numel = max(self.layout(b).packed_numel for b in same_kind)
            made = [torch.empty(numel, dtype=bucket.wire_dtype, device=bucket.device) for _ in range(MAX_IN_FLIGHT)]
            self._free[key] = made
            self.nbytes += sum(buffer.nbytes for buffer in made)
        free = self._free[key]
        while not free:
            finish_oldest()
        buffer = free.pop()
        return buffer, partial(free.append, buffer)


def direct_numel(bucket: Bucket) -> int:
    """From how many elements on a gradient of ``bucket`` is sent from its own memory, if the backend can."""
    # A gradient that is sent in another dtype has to be packed, however large it is.
    return DIRECT_BYTES // bucket.dtype.itemsize if bucket.wire_dtype == bucket.dtype else sys.maxsize


def complete_in_background(waits: Sequence[Callable[[], object]]) -> None:
    """Wait for transfers in a thread of their own, which keeps their memory; for an optimizer that is deleted.

    A transfer that is dropped before it has arrived would leave the other ranks waiting.
    """
    if waits and not sys.is_finalizing():
        threading.Thread(target=_complete, args=(waits,), name="dist_asgd transfers", daemon=True).start()


def _complete(waits: Sequence[Callable[[], object]]) -> None:
    # A peer that has gone is no error any more: nobody needs the result.
    with contextlib.suppress(RuntimeError):
        for wait in waits:
            wait()


def source(bucket: Bucket, gradients: Sequence[Tensor | None], packed: Tensor, send_range: SendRange) -> Tensor:
    """The elements that are sent for ``send_range``, 1-D: a view of the packed buffer, or of the gradient as it lies.

    Zeros if the parameter has no gradient.
    """
    numel = send_range.stop - send_range.start
    if send_range.slot is None:
        return packed[send_range.source : send_range.source + numel]
    gradient = gradients[send_range.slot]
    if gradient is None:
        return packed.new_zeros(numel)
    flat = flattened(gradient, bucket.members[send_range.slot].strides)
    return flat[send_range.source : send_range.source + numel]
