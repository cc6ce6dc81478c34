"""The time of a step by mode: calls take what their links need, and run beside the computation that allows it.

A step is played once, for one rank, call by call in the order in which the optimizer, DDP or FSDP2 makes them.

compute  forward and backward without communication; a bucket, or a block of FSDP2, has the share of it that it has of
         the elements
exposed  by how much communication makes a step longer
clock    how far the rank has come, and until when its two links are busy
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..gradients.sending import MAX_IN_FLIGHT
from ..gradients.transfers import MAX_LAUNCHED
from ..storage.send_layout import DIRECT_BYTES, send_runs
from .links import Call, Links, exchanged, timed
from .modes import Layout
from .setup import Setup
from .shapes import ModelShapes
from .traffic import ddp_buckets, ring_bytes

# The share of the forward in the computation of a step.
FORWARD_SHARE = 1 / 3


@dataclass(frozen=True, slots=True)
class StepTime:
    """The estimated time of a step, in seconds.

    Attributes:
        compute: Forward and backward without communication, as ``plan`` was told; 0 if it was not.
        communication: All calls of a step, one after the other and with nothing beside them.
        exposed: By how much the step is longer than ``compute``.
        exposed_overlapped: The same with ``overlap_forward``, where parameters are gathered beside the next forward;
            None in modes whose parameters the optimizer does not gather.
    """

    compute: float
    communication: float
    exposed: float
    exposed_overlapped: float | None

    @property
    def step(self) -> float:
        """The time of the step, in seconds."""
        return self.compute + self.exposed


@dataclass(slots=True)
class _Clock:
    """Seconds since the step began; ``communication`` adds up what the calls take alone.

    ``in_turn``: a call begins when the one before has arrived, as on a stream, and not when its bytes have left.
    """

    in_turn: bool
    now: float = 0.0
    inside: float = 0.0
    across: float = 0.0
    communication: float = 0.0

    def send(self, call: Call, after: float = 0.0) -> float:
        """Start ``call``, behind the calls that are under way on its links; returns when it has arrived."""
        begin = max(self.now, after, self.inside if call.inside else 0.0, self.across if call.across else 0.0)
        end = begin + max(call.inside, call.across)
        busy = end + call.latency if self.in_turn else end
        if call.inside:
            self.inside = busy
        if call.across:
            self.across = busy
        self.communication += call.alone
        # Gloo's threads, and the copies of the kernel, take it from this rank's computation.
        self.now += call.host
        return max(end, self.now) + call.latency

    def wait(self, until: float) -> None:
        self.now = max(self.now, until)


@dataclass(slots=True)
class _Transfer:
    """One reduce-scatter, and the sum across replicas that follows it; ``arrived`` is when its last call has."""

    bucket: int
    reduce: Call
    across: Call
    arrived: float = 0.0
    is_across: bool = False


@dataclass(frozen=True, slots=True)
class _BucketCalls:
    """One bucket: its share of the elements, its transfers as (reduce-scatter, sum across), and its gather."""

    share: float
    transfers: tuple[tuple[Call, Call], ...]
    gather: Call


@dataclass(slots=True)
class _Round:
    """The reductions of one backward, which start and end where ``Transfers`` starts and ends them."""

    clock: _Clock
    contiguous: bool
    launches: deque[int] = field(default_factory=deque)
    waiting: deque[_Transfer] = field(default_factory=deque)
    started: deque[_Transfer] = field(default_factory=deque)
    last: _Transfer | None = None
    ends: dict[int, float] = field(default_factory=dict)

    def launch(self, index: int, bucket: _BucketCalls) -> None:
        """Launch a bucket; on the host it waits while too many are on their way."""
        while len(self.launches) >= MAX_LAUNCHED:
            self._finish_oldest()
        self.launches.append(index)
        self.waiting.extend(_Transfer(index, reduce, across) for reduce, across in bucket.transfers)
        self._advance()

    def start_all(self) -> None:
        """The end of backward."""
        while self.waiting:
            self._finish_oldest()

    def wait_for(self, index: int) -> None:
        """Wait until a bucket is reduced."""
        while index in self.launches:
            self._finish_oldest()
        self.clock.wait(self.ends.pop(index, 0.0))

    def _advance(self) -> None:
        while self.waiting:
            if len(self.started) < MAX_IN_FLIGHT:
                self._start()
            elif self._is_done(self.started[0]):
                self._finish()
            else:
                return

    def _is_done(self, transfer: _Transfer) -> bool:
        # Nobody can tell of a sum across that the host waits for, where it is started.
        return self.contiguous or (not transfer.across.alone and transfer.arrived <= self.clock.now)

    def _start(self) -> None:
        transfer = self.waiting.popleft()
        if self.last is not None:
            self._start_across(self.last)
        transfer.arrived = self.clock.send(transfer.reduce)
        self.last = transfer
        self.started.append(transfer)

    def _start_across(self, transfer: _Transfer) -> None:
        if transfer.is_across or not transfer.across.alone:
            return
        transfer.is_across = True
        if self.contiguous:
            # A stream waits, and not the host.
            transfer.arrived = self.clock.send(transfer.across, transfer.arrived)
        else:
            self.clock.wait(transfer.arrived)
            transfer.arrived = self.clock.send(transfer.across.half())

    def _finish_oldest(self) -> None:
        self._advance()
        self._finish()
        self._advance()

    def _finish(self) -> None:
        transfer = self.started.popleft()
        self._start_across(transfer)
        if not self.contiguous:
            self.clock.wait(transfer.arrived)
            if transfer.is_across:
                # The sums are sent on only by whoever waits for them.
                self.clock.wait(self.clock.send(transfer.across.half()))
        self.ends[transfer.bucket] = max(self.ends.get(transfer.bucket, 0.0), transfer.arrived)
        if not any(other.bucket == transfer.bucket for other in (*self.started, *self.waiting)):
            self.launches.popleft()


class StepTimer:
    """Times the steps of one model on some links."""

    def __init__(
        self, model: ModelShapes, setup: Setup, links: Links, compute: float = 0.0, update: float = 0.0
    ) -> None:
        """``compute`` and ``update``: seconds of forward and backward, and of the update of one rank's shard."""
        self._model, self._setup, self._links = model, setup, links
        self._compute, self._update = compute, update
        self._forward, self._backward = FORWARD_SHARE * compute, (1 - FORWARD_SHARE) * compute
        self._numel = sum(param.numel for param in model.trained)

    def _own(self, ranks: int, spacing: int, sent_bytes: int, passes: int = 1) -> Call:
        """A call of this package: with Gloo by messages to each other rank."""
        return timed(self._links, self._setup, ranks, spacing, sent_bytes, self._setup.contiguous, passes)

    def _ring(self, ranks: int, spacing: int, nbytes: int, kind: str) -> Call:
        """A call of DDP or FSDP2 for tensors of ``nbytes``."""
        passes = 2 if kind == "all-reduce" else 1
        return timed(self._links, self._setup, ranks, spacing, ring_bytes(ranks, nbytes, kind), True, passes)

    def unsharded(self) -> StepTime:
        """``torch.optim.ASGD`` under DDP."""
        clock = self._under_ddp()
        clock.now += self._update
        return self._result(clock, None)

    def stage1(self, layout: Layout, shards: int) -> StepTime:
        """Stage 1 under DDP, with the state sharded over ``shards`` ranks."""
        return self._ended(self._under_ddp(), self._calls(layout, shards), None)

    def stage2(self, layout: Layout, shards: int) -> StepTime:
        """Stage 2, with state and gradients sharded over ``shards`` ranks."""
        clock, buckets = _Clock(self._setup.contiguous, self._forward), self._calls(layout, shards)
        reductions = _Round(clock, self._setup.contiguous)
        for index, bucket in enumerate(buckets):
            clock.now += self._backward * bucket.share
            reductions.launch(index, bucket)
        reductions.start_all()
        return self._ended(clock, buckets, reductions)

    def dtensors(self, layout: Layout, shards: int) -> StepTime:
        """FSDP2, which gathers one block ahead of the one that computes, and reduces one behind it."""
        replicas, clock = self._setup.ranks // shards, _Clock(self._setup.contiguous)
        blocks = dict(self._model.blocks())
        blocks.setdefault("", 0)
        total = sum(blocks.values())
        # Local tensors are padded to the length of the first rank's.
        padded = shards * layout.local_bytes / total
        sizes = {name: round(size * padded) for name, size in blocks.items()}
        gathers = {name: self._ring(shards, 1, size, "all-gather") for name, size in sizes.items()}
        inner = [name for name in blocks if name]

        def passed(order: Sequence[str], seconds: float, reduces: bool) -> list[float]:
            ends, arrived = [], clock.send(gathers[order[0]])
            for index, name in enumerate(order):
                clock.wait(arrived)
                if index + 1 < len(order) and order[index + 1]:
                    arrived = clock.send(gathers[order[index + 1]])
                clock.now += seconds * blocks[name] / total
                if reduces:
                    reduced = clock.send(self._ring(shards, 1, sizes[name], "reduce-scatter"))
                    shard = self._ring(replicas, shards, sizes[name] // shards, "all-reduce")
                    ends.append(clock.send(shard) if shard.alone else reduced)
            return ends

        # What lies outside of blocks is gathered first, kept, and computed last in forward (a head).
        clock.wait(clock.send(gathers[""]))
        passed([*inner, ""], self._forward, False)
        for end in passed(["", *reversed(inner)], self._backward, True):
            clock.wait(end)
        clock.now += exchanged(self._links, self._setup) + self._update
        ends = []
        for buffer in layout.state_buffers:
            runs = send_runs(buffer.layout, DIRECT_BYTES // buffer.dtype.itemsize).runs
            numel = buffer.layout.shard_numel if self._setup.contiguous else sum(b - a for a, b, *_ in runs) // replicas
            ends.append(clock.send(self._own(replicas, shards, (replicas - 1) * numel * buffer.dtype.itemsize)))
        clock.wait(max(ends, default=0.0))
        return self._result(clock, None)

    def _under_ddp(self) -> _Clock:
        """Forward and backward under DDP, which waits for all of its buckets at the end."""
        clock, arrived = _Clock(self._setup.contiguous, self._forward), 0.0
        sizes = ddp_buckets(self._model.trained)
        for size in sizes:
            clock.now += self._backward * size / sum(sizes)
            arrived = clock.send(self._ring(self._setup.ranks, 1, size, "all-reduce"))
        clock.wait(arrived)
        return clock

    def _calls(self, layout: Layout, shards: int) -> list[_BucketCalls]:
        replicas = self._setup.ranks // shards
        found = []
        for bucket in layout.buckets:
            numel, shard = sum(member.param.numel() for member in bucket.members), bucket.layout.shard_numel
            transfers = []
            for start, stop in bucket.layout.stripes if bucket.trainable else ():
                nbytes = (stop - start) * bucket.wire_dtype.itemsize
                across = self._own(replicas, shards, ring_bytes(replicas, nbytes, "all-reduce"), 2)
                transfers.append((self._own(shards, 1, (shards - 1) * nbytes), across))
            gather = self._own(shards, 1, (shards - 1) * shard * bucket.dtype.itemsize)
            found.append(_BucketCalls(numel / self._numel, tuple(transfers), gather))
        return found

    def _ended(self, clock: _Clock, buckets: Sequence[_BucketCalls], reductions: _Round | None) -> StepTime:
        """``step()``: each bucket is updated once it is reduced, and gathered while others are updated."""
        clock.now += exchanged(self._links, self._setup)
        ahead = copy.deepcopy((clock, reductions)) if self._compute else None
        arrived = []
        for index, bucket in enumerate(buckets):
            if reductions is not None:
                reductions.wait_for(index)
            clock.now += self._update * bucket.share
            arrived.append(clock.send(bucket.gather))
        clock.wait(max(arrived))
        return self._result(clock, self._with_forward(buckets, *ahead) if ahead else None)

    def _with_forward(self, buckets: Sequence[_BucketCalls], clock: _Clock, reductions: _Round | None) -> float:
        """When the next forward would end, less its own time: what it needs first is updated and gathered first."""
        if reductions is not None:
            for index in range(len(buckets)):
                reductions.wait_for(index)
        arrived = []
        for bucket in reversed(buckets):
            clock.now += self._update * bucket.share
            arrived.append(clock.send(bucket.gather))
        for bucket, end in zip(reversed(buckets), arrived, strict=True):
            clock.wait(end)
            clock.now += self._forward * bucket.share
        return clock.now - self._forward

    def _result(self, clock: _Clock, overlapped: float | None) -> StepTime:
        exposed = max(0.0, clock.now - self._compute)
        if overlapped is not None:
            overlapped = max(0.0, overlapped - self._compute)
        return StepTime(self._compute, clock.communication, exposed, overlapped)
