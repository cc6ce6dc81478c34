"""Gradients on their way: the reduce-scatters of stage 2, stripe by stripe, in one order on every rank.

transfer  one reduce-scatter: a stripe of a bucket is packed, sent, and summed into this rank's shard

The reducer launches a bucket once its gradients are there. Its transfers start in order, ``MAX_IN_FLIGHT`` at a time:
one arrives while the next is packed. Those of a bucket that is much larger than ``bucket_cap_mb`` may have to wait for
the ones before them; until then its gradients stay where backward has left them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..comm.base import Reduction, ShardCollectives
from ..comm.streams import Stream, stream_for
from ..labels import Label, label
from ..storage.buffers import Bucket, StateBuffer
from ..storage.send_layout import SendLayout
from .round import Header
from .sending import MAX_IN_FLIGHT, SendBuffers, source

# Of so many buckets the gradients are kept until they are sent; the next one has to wait for the first of them.
MAX_LAUNCHED = 2


@dataclass(slots=True)
class _Launch:
    """A bucket that was launched; ``left`` counts its transfers that have not ended, and ``unsent`` those to start.

    ``gradients`` are as in ``Bucket.pack``, and let go once the last transfer has started. ``accumulate``: they are
    added to the shard.
    """

    bucket: Bucket
    gradients: list[Tensor | None]
    accumulate: bool
    tag: int
    left: int
    unsent: int


@dataclass(slots=True)
class _Transfer:
    """One stripe of a launched bucket; ``reduction`` and ``give_back``, for its send buffer, once it has started."""

    launch: _Launch
    layout: SendLayout
    reduction: Reduction | None = None
    give_back: Callable[[], None] | None = None


class Transfers:
    """The transfers of all buckets. They start and end in the order in which buckets were launched.

    ``is_torn`` says that one of them was interrupted, or is just being started or ended: then nobody knows what its
    shard holds.
    """

    def __init__(
        self, buckets: Sequence[Bucket], collectives: Mapping[torch.device, ShardCollectives], header: Header
    ) -> None:
        self._collectives = collectives
        self._header = header
        self._send_buffers = SendBuffers(buckets, collectives)
        self._in_background = all(on.in_background for on in collectives.values())
        self._streams = {device: stream_for(device, on.contiguous) for device, on in collectives.items()}
        self.forget()

    @property
    def nbytes(self) -> int:
        """The bytes of the send buffers, which are kept between steps."""
        return self._send_buffers.nbytes

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way."""
        return not (self._launches or self._marks)

    def forget(self) -> None:
        """Drop everything that is on its way, whatever the other ranks expect."""
        self._launches: deque[_Launch] = deque()
        self._waiting: deque[_Transfer] = deque()
        self._started: deque[_Transfer] = deque()
        # What the computing stream has to wait for before it reads a shard, by the id of the bucket.
        self._marks: dict[int, Callable[[], None]] = {}
        self._send_buffers.forget()
        self.is_torn = False

    def make_room(self, bucket: Bucket) -> None:
        """Wait until ``bucket`` may be launched: the gradients of ``MAX_LAUNCHED`` buckets are kept, and not of more.

        RuntimeError while a CUDA graph is captured.
        """
        if bucket.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "dist_asgd: a backward that a CUDA graph captures cannot reduce gradients: the exchanges between ranks "
                "would not be replayed. Capture with stage=1, or leave backward outside of the graph."
            )
        while len(self._launches) >= MAX_LAUNCHED:
            self.finish_oldest()

    def launch(self, bucket: Bucket, gradients: Sequence[Tensor | None], accumulate: bool, tag: int) -> None:
        """Start to reduce ``gradients``, one for each member of ``bucket``, into its shard; None counts as zeros.

        ``tag`` distinguishes the buckets of a round. Collective, but nobody waits here, except hybrid sharding for what
        was launched before.
        """
        layouts = self._send_buffers.layouts(bucket)
        launch = _Launch(bucket, bucket.flat_gradients(gradients), accumulate, tag, len(layouts), len(layouts))
        bucket.gradient_shard()  # a step plans with it before the transfers have started
        self._launches.append(launch)
        self._waiting.extend(_Transfer(launch, layout) for layout in layouts)
        self.advance()

    def advance(self) -> None:
        """Start what has waited for transfers that have ended by now. Called whenever this rank comes by; no waits."""
        while self._waiting:
            if len(self._started) < MAX_IN_FLIGHT:
                self._start()
            elif self._is_done(self._started[0]):
                self._finish()
            else:
                return

    @staticmethod
    def _is_done(transfer: _Transfer) -> bool:
        return transfer.reduction is not None and transfer.reduction.is_done()

    def _start(self) -> None:
        transfer = self._waiting[0]
        launch, layout = transfer.launch, transfer.layout
        bucket = launch.bucket
        collectives = self._collectives[bucket.device]
        if collectives.waits_to_launch:
            self._header.wait()
        shard = bucket.gradient_shard()[layout.start : layout.stop]
        packed, give_back = self._send_buffers.take(bucket, layout.packed_numel)
        gradients = launch.gradients
        was_torn, self.is_torn = self.is_torn, True

        def send() -> None:
            with label(Label.PACK):
                bucket.pack(gradients, layout, packed)
            # Large gradients are sent from where they lie: ``sends`` keeps those alive until the wait.
            sends = [[(part.start, source(gradients, packed, part)) for part in ranges] for ranges in layout.ranges]
            transfer.reduction = collectives.reduce_scatter(sends, shard, launch.accumulate, launch.tag)

        self._stream(bucket).run(send, [gradient for gradient in gradients if gradient is not None])
        transfer.give_back = give_back
        self._started.append(self._waiting.popleft())
        launch.unsent -= 1
        if not launch.unsent:
            launch.gradients = []
        self.is_torn = was_torn

    def _stream(self, bucket: Bucket) -> Stream:
        return self._streams[bucket.device]

    def finish_oldest(self) -> None:
        """Wait for the oldest transfer, and start the next ones."""
        # Ranks that have not opened the round hear of it through this one.
        self._header.wait()
        self.advance()
        self._finish()
        self.advance()

    def _finish(self) -> None:
        was_torn, self.is_torn = self.is_torn, True
        transfer = self._started.popleft()
        launch = transfer.launch
        stream = self._stream(launch.bucket)
        stream.run(partial(_wait, transfer))
        if transfer.give_back is not None:
            transfer.give_back()
        launch.left -= 1
        if not launch.left:
            self._launches.popleft()
            mark = stream.mark()
            if mark is not None:
                self._marks[id(launch.bucket)] = mark
        self.is_torn = was_torn

    def start_all(self) -> None:
        """Start every transfer, and wait for what that needs.

        Called at the end of a backward: other ranks may wait for transfers before they make their next call.
        """
        while self._waiting:
            self.finish_oldest()

    def before_exchange(self) -> None:
        """Get as far as no other rank needs this one any more before it takes part in an exchange of control words."""
        if self._in_background:
            self.start_all()
        else:
            self.wait_for_all()

    def abandon(self) -> None:
        """Let other ranks fail that wait for transfers of this rank, which was interrupted."""
        for collectives in self._collectives.values():
            collectives.abandon()

    def wait_for(self, buffer: StateBuffer) -> None:
        """Wait until the shard of ``buffer`` is complete; on GPUs the computing stream does, and not the host."""
        while any(launch.bucket is buffer for launch in self._launches):
            self.finish_oldest()
        mark = self._marks.pop(id(buffer), None)
        if mark is not None:
            mark()

    def wait_for_all(self) -> None:
        """Wait until nothing is on its way any more."""
        while self._launches:
            self.finish_oldest()
        for mark in self._marks.values():
            mark()
        self._marks.clear()

    def complete(self) -> None:
        """Wait for everything on the host; called by a thread once the optimizer is deleted, which keeps the memory."""
        if not self.is_torn:
            self.wait_for_all()
        for stream in self._streams.values():
            stream.synchronize()


def _wait(transfer: _Transfer) -> None:
    assert transfer.reduction is not None
    transfer.reduction.wait()
