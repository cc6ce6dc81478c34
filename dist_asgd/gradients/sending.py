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
from ..storage import huge_pages
from ..storage.buffers import Bucket
from ..storage.send_layout import DIRECT_BYTES, SendLayout, SendRange, row_layout, send_layout, whole_layout

# Reduce-scatters in flight at a time: one arrives while the next is packed.
MAX_IN_FLIGHT = 2


class SendBuffers:
    """The send buffers of all buckets, by device and dtype, and how each bucket is sent.

    A buffer is busy until the reduce-scatter that reads it has ended. It is kept for the next one: memory that is
    touched for the first time costs more than the copy into it. ``nbytes`` counts all buffers.
    """

    def __init__(self, buckets: Sequence[Bucket], collectives: Mapping[torch.device, ShardCollectives]) -> None:
        self._buckets = buckets
        self._collectives = collectives
        self._layouts = {id(bucket): send_layouts(bucket, collectives[bucket.device]) for bucket in buckets}
        for device, on in collectives.items():
            of_device = [bucket for bucket in buckets if bucket.device == device]
            on.prepare(max(x.packed_numel * b.wire_dtype.itemsize for b in of_device for x in self.layouts(b)))
        self.forget()

    def forget(self) -> None:
        """Let go of all buffers, the busy ones included."""
        self._free: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        self.nbytes = 0

    def layouts(self, bucket: Bucket) -> Sequence[SendLayout]:
        """How the stripes of ``bucket`` are sent, one after the other."""
        return self._layouts[id(bucket)]

    def take(self, bucket: Bucket, numel: int) -> tuple[Tensor, Callable[[], None]]:
        """A free buffer of ``numel`` elements for ``bucket``, and the call that gives it back when nothing reads it.

        At most ``MAX_IN_FLIGHT`` are taken at a time.
        """
        own = self._collectives[bucket.device].send_buffer(numel, bucket.wire_dtype)
        if own is not None:
            return own, _nothing
        key = (bucket.device, bucket.wire_dtype)
        if key not in self._free:
            same_kind = [b for b in self._buckets if (b.device, b.wire_dtype) == key]
            numel = max(layout.packed_numel for b in same_kind for layout in self.layouts(b))
            made = [huge_pages.empty(numel, bucket.wire_dtype, bucket.device) for _ in range(MAX_IN_FLIGHT)]
            self._free[key] = made
            self.nbytes += sum(buffer.nbytes for buffer in made)
        buffer = self._free[key].pop()
        return buffer[:numel], partial(self._free[key].append, buffer)


def _nothing() -> None:
    """What gives back a buffer of the communicator, which knows by itself."""


def send_layouts(bucket: Bucket, collectives: ShardCollectives) -> list[SendLayout]:
    """How ``collectives`` send each stripe of ``bucket``."""
    if collectives.contiguous:
        return [whole_layout(bucket.layout, *stripe) for stripe in bucket.layout.stripes]
    if collectives.reads_rows:
        numel, rank = direct_numel(bucket), collectives.rank
        return [row_layout(bucket.layout, numel, rank, *stripe) for stripe in bucket.layout.stripes]
    return [send_layout(bucket.layout, direct_numel(bucket), *stripe) for stripe in bucket.layout.stripes]


def direct_numel(bucket: Bucket) -> int:
    """From how many elements on a gradient of ``bucket`` is sent from its own memory, if the backend can."""
    # A gradient that is sent in another dtype has to be packed, however large it is.
    return DIRECT_BYTES // bucket.dtype.itemsize if bucket.wire_dtype == bucket.dtype else sys.maxsize


def complete_in_background(waits: Sequence[Callable[[], object]], *, before_exit: bool = False) -> None:
    """Wait for transfers in a thread of their own, which keeps their memory; for an optimizer that is deleted.

    A transfer that is dropped before it has arrived would leave the other ranks waiting. ``before_exit``: the process
    ends after them, because the other ranks have started them too.
    """
    if waits and not sys.is_finalizing():
        daemon = not before_exit
        threading.Thread(target=complete, args=(waits,), name="dist_asgd transfers", daemon=daemon).start()


def complete(waits: Sequence[Callable[[], object]]) -> None:
    """Wait for transfers that nobody on this rank needs. A peer that has gone is no error any more."""
    with contextlib.suppress(RuntimeError):
        for wait in waits:
            wait()


def source(gradients: Sequence[Tensor | None], packed: Tensor, send_range: SendRange) -> Tensor:
    """The elements that are sent for ``send_range``, 1-D: a view of the packed buffer, or of the gradient as it lies.

    ``gradients`` are as in ``Bucket.pack``. Zeros if the parameter has no gradient.
    """
    numel = send_range.stop - send_range.start
    if send_range.slot is None:
        return packed[send_range.source : send_range.source + numel]
    gradient = gradients[send_range.slot]
    if gradient is None:
        return packed.new_zeros(numel)
    return gradient[send_range.source : send_range.source + numel]
