"""The buffers that the communicators for Gloo keep: inboxes for the messages of peers, and what hybrid sums need.

It follows ``comm/gloo.py`` and ``comm/hybrid.py`` through one step without sending anything. Other backends keep no
buffers of their own that torch would show.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..comm.sums import SIXTEEN_BIT, SUM_NUMEL
from ..gradients.sending import MAX_IN_FLIGHT, direct_numel
from ..storage.buffers import Bucket
from ..storage.send_layout import send_runs

# The free buffers of a pool are the same at the end of each step from the second or third step on.
_STEPS = 3


@dataclass(slots=True)
class _Pool:
    """Buffers that are kept: a free one that is long enough is taken, the shortest of them, or a new one is made."""

    free: list[tuple[torch.dtype, int]] = field(default_factory=list)
    nbytes: int = 0

    def take(self, dtype: torch.dtype, numel: int) -> Callable[[], None]:
        """Take a buffer of ``numel`` elements; returns the call that gives it back."""
        fitting = [buffer for buffer in self.free if buffer[0] == dtype and buffer[1] >= numel]
        if fitting:
            taken = min(fitting, key=lambda buffer: buffer[1])
            self.free.remove(taken)
        else:
            taken = (dtype, numel)
            self.nbytes += numel * dtype.itemsize
        return lambda: self.free.append(taken)


class _Step:
    """What is taken and given back while the buckets of one rank are reduced."""

    def __init__(self, shards: int, replicas: int) -> None:
        self._shards, self._replicas = shards, replicas
        self._inside, self._across, self._partial = _Pool(), _Pool(), _Pool()
        self._sums: dict[str, int] = {}
        # Calls that end what is in flight, oldest first; and the reduction that has yet to start across replicas.
        self._in_flight: deque[Callable[[], None]] = deque()
        self._last: Callable[[], None] | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of all pools and of the memory for sums."""
        pools = (self._inside, self._across, self._partial)
        return sum(pool.nbytes for pool in pools) + sum(self._sums.values())

    def run(self, buckets: Sequence[Bucket]) -> None:
        """Reduce all buckets of a step."""
        for bucket in buckets:
            if not bucket.trainable:
                continue
            for stripe in bucket.layout.stripes:
                # A send buffer is free again once what was sent from it has arrived.
                while len(self._in_flight) >= MAX_IN_FLIGHT:
                    self._in_flight.popleft()()
                self._in_flight.append(self._launch(bucket, *stripe))
        while self._in_flight:
            self._in_flight.popleft()()

    def _launch(self, bucket: Bucket, start: int, stop: int) -> Callable[[], None]:
        in_place = bucket.wire_dtype == bucket.gradient_dtype
        if self._replicas == 1:
            return self._reduce_scatter(bucket, start, stop, in_place)
        if self._last is not None:
            self._last()
        give_back = None if in_place else self._partial.take(bucket.wire_dtype, stop - start)
        end_inside = self._reduce_scatter(bucket, start, stop, True)
        ends: list[Callable[[], None]] = []

        def start_across() -> None:
            if not ends:
                end_inside()
                ends.append(self._all_reduce(bucket, stop - start))

        def finish() -> None:
            start_across()
            ends[0]()
            if give_back is not None:
                give_back()

        self._last = start_across
        return finish

    def _reduce_scatter(self, bucket: Bucket, start: int, stop: int, in_place: bool) -> Callable[[], None]:
        if self._shards == 1:
            return lambda: None
        runs = send_runs(bucket.layout, direct_numel(bucket)).runs
        # What of the first rank's stripe lies in runs.
        numel = sum(max(0, min(last, stop) - max(first, start)) for first, last, *_ in runs)
        self._note_sum("inside", bucket)
        rows = self._shards - 1 - in_place
        return self._inside.take(bucket.wire_dtype, rows * numel) if rows * numel else lambda: None

    def _all_reduce(self, bucket: Bucket, numel: int) -> Callable[[], None]:
        self._note_sum("across", bucket)
        own = -(-numel // self._replicas)
        return self._across.take(bucket.wire_dtype, self._replicas * own)

    def _note_sum(self, where: str, bucket: Bucket) -> None:
        if bucket.wire_dtype in SIXTEEN_BIT:
            self._sums[where] = SUM_NUMEL * torch.float32.itemsize


def gloo_bytes(buckets: Sequence[Bucket], shards: int, replicas: int) -> int:
    """The bytes that the communicators of stage 2 keep on the first rank, after some steps."""
    step = _Step(shards, replicas)
    for _ in range(_STEPS):
        step.run(buckets)
    return step.nbytes
