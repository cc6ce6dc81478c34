"""Stage 2: gradients are reduce-scattered during backward; only this rank's shard of their mean stays.

Hooks count the gradients of a backward as they arrive. A full bucket is packed, its ``p.grad`` freed, and its
reduce-scatter launched while backward goes on.

round     one pass over all trainable buckets, launched in one fixed order on every rank. The first bucket to
          launch opens it, and an exchange that nobody waits for tells the other ranks.
settling  before a collective call: finish an open round (zeros where no gradient came), join the rounds that
          other ranks opened, then reduce what backward did not deliver (gradients set by hand, say).
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..comm import Communicators, Wait
from ..comm.agreement import NO_FINGERPRINT, Agreement, CollectiveCall, Fingerprint, RankReports, values_by_rank
from ..placements.presharded import PreshardedState
from ..storage.buffers import Bucket, BucketParam, ShardedParam, StateBuffer
from ..storage.layout import DIRECT_BYTES, SendLayout, SendRange, send_layout, whole_layout
from ..storage.memory_order import flattened
from ..update.segments import UNSCALED, Scaling
from .base import Gradients, bits, check_gradient, indices_of, multiply

# Buckets on their way at a time: one arrives while the next is filled.
MAX_IN_FLIGHT = 2


class SendBufferPool:
    """Send buffers for what is packed of the buckets in flight: as many as buckets may be on their way."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        self._free = [torch.empty(numel, dtype=dtype, device=device) for _ in range(MAX_IN_FLIGHT)]
        self.nbytes = sum(slot.nbytes for slot in self._free)

    def take(self) -> Tensor | None:
        """A free buffer; None while there is none."""
        return self._free.pop() if self._free else None

    def give_back(self, slot: Tensor) -> None:
        """Return a buffer that ``take`` handed out."""
        self._free.append(slot)


class Reducer(Gradients):
    """Stage 2: reduce-scatters gradients during backward; keeps this rank's shard of the mean."""

    def __init__(self, agreement: Agreement, communicators: Communicators) -> None:
        super().__init__(agreement, communicators)
        self.synchronising = True
        self._problem: Exception | None = None
        self._mispaired: Exception | None = None
        self._presharded_bits = 0
        self._member_of: dict[int, BucketParam] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        # A parameter that was frozen at construction has no hook: its gradients are reduced as if set by hand.
        self._hooked: set[int] = set()
        weakref.finalize(self, _remove, self._hooks)
        self._send_buffers: dict[tuple[torch.device, torch.dtype], SendBufferPool] = {}
        self._sends: dict[int, SendLayout] = {}
        self._in_flight: deque[tuple[Bucket, Wait]] = deque()
        # Of the open round: what has come, bucket by bucket, and the next bucket to launch.
        self._round: list[Bucket] = []
        self._ready: set[int] = set()
        self._waiting_for: dict[int, int] = {}
        self._next = 0
        self._header: Callable[[], RankReports] | None = None
        # Since the last discard: parameters that this rank contributed to, and buckets with a valid shard.
        self._reduced_mask = 0
        self._buckets_with_shard: set[int] = set()
        # Parameters whose p.grad autograd has filled and nobody has packed yet.
        self._unpacked: set[int] = set()
        # Parameters that buckets wait for: those that took part in the last step.
        self._params_last_step: frozenset[int] = frozenset()
        self._used_by_step = False
        self._warned = False
        # Whether a backward has run since ranks last settled.
        self._backward_since_agree = False

    def extend(self, buckets: Sequence[Bucket], presharded: Sequence[PreshardedState]) -> None:
        super().extend(buckets, presharded)
        _remove(self._hooks)
        self._presharded_bits = bits(member.index for member in self.presharded)
        self._member_of = {member.index: member for member in self.members}
        self._round = [bucket for bucket in self.buckets if bucket.trainable]
        self._params_last_step = frozenset(member.index for bucket in self._round for member in bucket.members)
        self._begin_round()
        for member in self.members:
            if member.param.requires_grad:
                self._hooked.add(member.index)
                self._hooks.append(_hook_on(member.param, weakref.ref(self), member.index))
        self._send_buffers = {}
        self._sends = {}
        for bucket in self.buckets:
            if self.communicators.on(bucket.device).contiguous:
                self._sends[id(bucket)] = whole_layout(bucket.layout)
            else:
                as_they_lie = bucket.wire_dtype == bucket.dtype
                direct_numel = DIRECT_BYTES // bucket.dtype.itemsize if as_they_lie else sys.maxsize
                self._sends[id(bucket)] = send_layout(bucket.layout, direct_numel)

    # --- during backward ---------------------------------------------------------------------------------

    def _begin_round(self) -> None:
        self._ready = set()
        self._waiting_for = {
            id(bucket): sum(member.index in self._params_last_step for member in bucket.members)
            for bucket in self._round
        }
        self._next = 0

    def arrived(self, index: int) -> None:
        """The gradient of parameter ``index`` is complete for this backward; called by autograd."""
        member = self._member_of[index]
        if not member.is_unmoved:
            # Another optimizer has taken the parameter over; step() says so.
            return
        self._unpacked.add(member.index)
        self._backward_since_agree = True
        if not self.synchronising or member.index in self._ready or not member.bucket.trainable:
            return
        self._ready.add(member.index)
        if member.index not in self._params_last_step:
            return
        self._waiting_for[id(member.bucket)] -= 1
        while not self._waiting_for[id(self._round[self._next])]:
            self._launch_next()
            if self._next == 0:
                # The round is complete: only another gradient may open the next.
                break

    def _launch_next(self) -> None:
        if self._next == 0:
            self._await_header()
            self._header = self.agreement.start(CollectiveCall.ROUND)
        self._launch(self._round[self._next], self._next)
        self._next += 1
        if self._next == len(self._round):
            self._begin_round()

    def _await_header(self) -> None:
        if self._header is not None:
            header, self._header = self._header, None
            self._judge_round(header())

    def _judge_round(self, reports: RankReports) -> None:
        # What else others say beside a round they repeat in the next exchange, once they have joined it. But a
        # round that is paired with one from before a zero_grad() has mixed gradients: every rank sees it here.
        if len(set(reports.column(1))) > 1:
            self._mispaired = RuntimeError(
                f"dist_asgd: ranks ran different numbers of backwards before zero_grad(), so that gradients of "
                f"different steps were reduced together; zero_grad() calls so far: {values_by_rank(reports.column(1))}. "
                f"Call zero_grad() on every rank to go on, and run the same number of backwards on all of them."
            )

    def _launch(self, bucket: Bucket, tag: int) -> None:
        """Pack the bucket's gradients, free them, and start its reduce-scatter."""
        gradients = [self._checked(member) for member in bucket.members]
        slot = self._send_buffer(bucket)
        send = self._sends[id(bucket)]
        packed = slot[: send.packed_numel]
        bucket.pack(gradients, send.packed, packed)
        parts = [
            [(stretch.start, _source(bucket, gradients, packed, stretch)) for stretch in stretches]
            for stretches in send.ranges
        ]
        for member in bucket.members:
            if member.param.grad is not None:
                member.param.grad = None
                self._unpacked.discard(member.index)
                self._reduced_mask |= 1 << member.index
        shard = bucket.gradient_shard()
        accumulate = id(bucket) in self._buckets_with_shard
        if accumulate:
            self.scale()
        if accumulate and self._used_by_step and not self._warned:
            self._warned = True
            warnings.warn(
                "dist_asgd: backward adds to gradients that step() has already used. Call zero_grad() of the optimizer "
                "after each step: in stage 2 model.zero_grad() does not see the gradients.",
                stacklevel=2,
            )
        self._buckets_with_shard.add(id(bucket))
        wait = self.communicators.on(bucket.device).reduce_scatter(parts, shard, accumulate, tag)

        def finish() -> None:
            wait()
            self._send_buffers[bucket.device, bucket.wire_dtype].give_back(slot)

        self._in_flight.append((bucket, finish))

    def _send_buffer(self, bucket: Bucket) -> Tensor:
        """A free send buffer; waits for the oldest bucket in flight while there is none."""
        key = (bucket.device, bucket.wire_dtype)
        if key not in self._send_buffers:
            alike = [b for b in self.buckets if (b.device, b.wire_dtype) == key]
            numel = max(self._sends[id(b)].packed_numel for b in alike)
            self._send_buffers[key] = SendBufferPool(numel, bucket.wire_dtype, bucket.device)
        while (slot := self._send_buffers[key].take()) is None:
            self._finish_oldest()
        return slot

    def _checked(self, member: BucketParam) -> Tensor | None:
        """The member's gradient; where it cannot be used None, and a problem for all ranks at the next call."""
        gradient = member.param.grad
        if gradient is not None:
            try:
                check_gradient(member, gradient)
            except RuntimeError as error:
                self._problem = self._problem or error
                return None
        return gradient

    def _finish_oldest(self) -> None:
        _, finish = self._in_flight.popleft()
        finish()

    def wait_for(self, bucket: StateBuffer | None) -> None:
        while any(bucket is None or waiting is bucket for waiting, _ in self._in_flight):
            self._finish_oldest()

    # --- before a collective call ------------------------------------------------------------------------

    def _complete_round(self) -> None:
        """Launch what is left of the open round; zeros where no gradient came."""
        while self._next:
            self._launch_next()

    def _join_round(self) -> None:
        """Take part in a round that another rank opened; the exchange that said so stands for this rank's header."""
        self._next = 0
        for position, bucket in enumerate(self._round):
            self._launch(bucket, position)
        self._begin_round()

    def _pending(self) -> int:
        """The parameters that hold a gradient now; one that backward has already reduced must not be set again."""
        pending = 0
        for member in self.members:
            if member.param.grad is None:
                continue
            pending |= 1 << member.index
            self._checked(member)
            hooked = member.index in self._hooked
            if hooked and self._reduced_mask >> member.index & 1 and member.index not in self._unpacked:
                self._problem = self._problem or RuntimeError(
                    f"dist_asgd: parameter {member.name} has a p.grad that did not come from backward, although "
                    f"backward's gradient was already reduced. With stage=2 do not wrap the model in DDP, and set "
                    f"gradients by hand only instead of a backward (after zero_grad())."
                )
        return pending

    def agree(
        self, call: CollectiveCall, fingerprint: Fingerprint = NO_FINGERPRINT, problem: Exception | None = None
    ) -> RankReports:
        reports = self._meet(call, fingerprint, problem, keep=True)
        self._reduce_pending(reports.union(1) & ~self._presharded_bits)
        return reports

    def _meet(
        self, call: CollectiveCall, fingerprint: Fingerprint, problem: Exception | None, keep: bool
    ) -> RankReports:
        """Finish this rank's round, join those of others, and agree on ``kind``; ``keep`` pending gradients or not."""
        self._complete_round()
        self._await_header()
        # No round changes the gradients of presharded parameters: one look is enough.
        standing, misplaced, wrong = self.inspect_presharded(call) if self.about_gradients(call) else (0, 0, None)
        while True:
            pending = self._pending() if keep else 0
            problem = problem or self._mispaired or self._problem or wrong
            masks = (self._reduced_mask | pending | standing, pending | misplaced)
            reports = self.agreement.start(call, fingerprint, masks, problem is not None)()
            if CollectiveCall.ROUND not in reports.calls:
                break
            self._judge_round(reports)
            self._join_round()
        if call is not CollectiveCall.STEP:
            # A step waits bucket by bucket, and updates the first while the last are on their way.
            self.wait_for(None)
        self._problem = self._mispaired = None
        self._backward_since_agree = False
        self.agreement.check(reports, fingerprint, problem)
        return reports

    def _reduce_pending(self, pending: int) -> None:
        """Reduce, on all ranks, the buckets in which any rank still holds a gradient."""
        wanted = {id(self._member_of[index].bucket) for index in indices_of(pending)} if pending else set()
        for position, bucket in enumerate(self.buckets):
            if id(bucket) in wanted:
                self.wait_for(bucket)
                self._launch(bucket, position)
        if wanted:
            self.wait_for(None)

    def apply_clip(self) -> None:
        if self.scaling.clip is not None:
            self.scale()

    def clip(self, factor: Tensor) -> None:
        # Backward may add to a DTensor's gradient before the update, and nobody would hear of it.
        multiply([member.gradient for member in self.presharded], factor)
        self.scaling = Scaling(self.scaling.unscale, factor)

    def unscale(self, inverse: Tensor) -> None:
        multiply([member.gradient for member in self.presharded], inverse)
        self.scaling = Scaling(inverse.clone(), self.scaling.clip)

    def scale(self) -> None:
        """Multiply the shards by what is pending, because something else is about to be added or measured."""
        for factor in self.scaling:
            for bucket in self.buckets:
                if bucket.gradient is not None:
                    bucket.gradient.mul_(factor.to(bucket.device))
        self.scaling = UNSCALED

    def _all(self) -> list[Tensor]:
        shards = [b.gradient for b in self.buckets if b.gradient is not None and id(b) in self._buckets_with_shard]
        return shards + [g for member in self.presharded if (g := member.gradient) is not None]

    def present(self, reports: RankReports) -> frozenset[int]:
        """Indices of the parameters for which any rank has contributed a gradient; presharded agree theirs."""
        if self.presharded:
            self.align_presharded(reports)
        return self.indices_of(reports.union(0))

    def gradient_fragment(self, member: ShardedParam) -> Tensor:
        reduced = member.bucket.reduced_gradient()
        return (
            super().gradient_fragment(member)
            if reduced is None
            else reduced[member.fragment.start : member.fragment.stop]
        )

    def active(self, reports: RankReports) -> frozenset[int]:
        active = self.present(reports)
        if active != self._params_last_step and active:
            self._params_last_step = active
            self._begin_round()
        self._used_by_step = True
        return active

    def clear(self, set_to_none: bool) -> None:
        """Collective where a backward has run since the last step. Zeros stay present, as in torch."""
        self._settle_discarded()
        self._used_by_step = False
        self.scaling = UNSCALED
        if not set_to_none:
            for bucket in self.buckets:
                if bucket.gradient is not None:
                    bucket.gradient.zero_()
            return
        self._begin_round()
        self._problem = None
        self._reduced_mask = 0
        self._buckets_with_shard.clear()
        self._unpacked.clear()
        self.agreement.discards += 1

    def _settle_discarded(self) -> None:
        # A round that only some ranks opened must not be left for a later backward to be paired with.
        if self._backward_since_agree:
            self._meet(CollectiveCall.ZERO_GRAD, NO_FINGERPRINT, None, keep=False)
        self.wait_for(None)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside leave their gradients in ``p.grad``; the next one outside reduces the sum."""
        before, self.synchronising = self.synchronising, False
        try:
            yield
        finally:
            self.synchronising = before

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of the send buffers, kept between steps."""
        return sum(slots.nbytes for slots in self._send_buffers.values())


def _source(bucket: Bucket, gradients: Sequence[Tensor | None], packed: Tensor, stretch: SendRange) -> Tensor:
    """What is sent for ``stretch``, 1-D: a view of the packed buffer or of the gradient as it lies; zeros for None."""
    numel = stretch.stop - stretch.start
    if stretch.slot is None:
        return packed[stretch.source : stretch.source + numel]
    gradient = gradients[stretch.slot]
    if gradient is None:
        return packed.new_zeros(numel)
    return flattened(gradient, bucket.members[stretch.slot].strides)[stretch.source : stretch.source + numel]


def _hook_on(param: Tensor, reducer: weakref.ref[Reducer], index: int) -> torch.utils.hooks.RemovableHandle:
    # Parameters outlive optimizers: the hook must keep neither the reducer nor its buckets alive.
    def hook(_: Tensor) -> None:
        owner = reducer()
        if owner is not None:
            owner.arrived(index)

    handle: torch.utils.hooks.RemovableHandle = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def _remove(hooks: list[torch.utils.hooks.RemovableHandle]) -> None:
    while hooks:
        hooks.pop().remove()
