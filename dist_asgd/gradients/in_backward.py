"""Stage 2 with ``step_in_backward=True``: each bucket is updated and gathered while backward goes on.

A step begins when the first bucket of a round is launched, and ends in ``step()``. A bucket is updated when the next
but one is launched, and the last ones in ``step()``: so every rank sends its messages in the same order, and two
gradient shards are enough (``scratch.py``). By then every rank has told the others, in an exchange for each bucket
(``exchanges.py``), which of its parameters have a gradient there.

expected   parameters that took part in the last step, and so are waited for. Backward updates no others: their
           gradients stay on them until ``step()``, as a rank cannot know whether another rank has one
begun      a step has begun, and backward updates buckets: every call but ``step()`` is refused until that has ended it

What keeps a parameter from being written while backward still needs its value: autograd runs its hook once in a
backward, after all operators that compute a part of its gradient. Of any other reader, such as a ``detach()``, torch
compares the version of the parameter, and raises its error about an inplace operation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import Protocol

import torch

from ..comm import Communicators
from ..comm.agreement import NO_FINGERPRINT, Agreement, Fingerprint
from ..comm.masks import bit_mask, indices_in
from ..comm.reports import CollectiveCall, RankReports
from ..placements.presharded import PreshardedState
from ..storage.buffers import Bucket
from .averaged import AveragedGradients
from .base import Gradients
from .exchanges import BucketExchange, BucketExchanges
from .hooks import is_nested
from .reducer import Reducer
from .scratch import NUM_SCRATCH_SHARDS, ScratchShards

# The calls that read or scale gradients which are not there any more.
_READERS = (CollectiveCall.CLIP_GRAD_NORM, CollectiveCall.UNSCALE, CollectiveCall.GRADIENT)
# The calls that replace parameters and state, whatever a step that has begun has made of them.
_LOADS = (CollectiveCall.LOAD_CHECKPOINT, CollectiveCall.RESTORE_CHECKPOINT)
# What the first exchange of a step may say, for buckets to be updated in backward.
_STEPPING = frozenset((CollectiveCall.ROUND, CollectiveCall.STEP))


class BucketUpdate(Protocol):
    """What updates and gathers a bucket (``BackwardStep`` in ``backward_step.py``)."""

    @property
    def is_compared(self) -> bool:
        """Whether ranks have compared the values of all parameters."""

    def begin(self) -> tuple[bool, Fingerprint, Exception | None]:
        """Read the hyperparameters of a step that begins. Not collective.

        Returns whether parameters are as they were in the last step, the fingerprint of the hyperparameters, and what
        is wrong on this rank.
        """

    def compare(self, reports: RankReports) -> None:
        """Compare the values of all parameters. Collective; raises a RuntimeError on all ranks alike."""

    def update(self, bucket: Bucket, active: frozenset[int]) -> None:
        """Update this rank's shard of the ``active`` parameters of ``bucket``, and start to gather it. Collective."""

    def abandon(self) -> None:
        """Forget the step that backward has begun; parameters stay torn if it has updated any."""


class _Place(Enum):
    """Where the buckets of this step are updated."""

    UNDECIDED = 0  # until the exchange of the first bucket has arrived
    BACKWARD = 1
    # As without the option. Something has to be done first, or to be raised, and step() does.
    STEP = 2
    # A rank has had a problem after other buckets were updated.
    NOWHERE = 3


class StepReducer(Reducer):
    """A ``Reducer`` that hands each bucket to ``bucket_update`` as soon as it is reduced.

    ``bucket_update`` is set before the first backward.
    """

    bucket_update: BucketUpdate

    def __init__(self, agreement: Agreement, communicators: Communicators) -> None:
        self._exchanges = BucketExchanges(agreement)
        super().__init__(agreement, communicators, self._exchanges)
        self._scratch = ScratchShards()
        # Buckets that were launched and not updated, oldest first.
        self._launched: deque[BucketExchange] = deque()
        self._active_of: dict[int, tuple[int, frozenset[int]]] = {}
        # The parameters with a gradient that step() has to reduce, as bits.
        self._left = 0
        # The call that is agreed on, and the fingerprint of the step that backward has begun.
        self._call = CollectiveCall.CONSTRUCT
        self._fingerprint = NO_FINGERPRINT
        self._forget_step()

    def _forget_step(self) -> None:
        """Wait for another step to begin."""
        self._place: _Place | None = None
        self._scratch.begin()
        self._updated_mask = 0
        self._round_has_ended = False
        self._backward_has_ended = False
        self._task = -1

    def extend(self, buckets: Sequence[Bucket], presharded: Sequence[PreshardedState]) -> None:
        super().extend(buckets, presharded)
        self._scratch.fit(self.buckets)
        self._active_of.clear()

    @property
    def in_flight_bytes(self) -> int:
        return super().in_flight_bytes + self._scratch.nbytes

    @property
    def has_begun(self) -> bool:
        """Whether backward has begun a step that ``step()`` has to end."""
        return self._place in (_Place.BACKWARD, _Place.NOWHERE)

    # --- during backward ------------------------------------------------------------------------------------

    def note_gradient(self, index: int) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            if is_nested():
                self._problem = self._problem or RuntimeError(
                    "dist_asgd: a backward inside of another one, with step_in_backward=True: what the inner one has "
                    "updated the outer one may compute with once more. Pass use_reentrant=False to "
                    "torch.utils.checkpoint.checkpoint(), or step_in_backward=False to the optimizer."
                )
        if self._backward_has_ended and self._place is not _Place.STEP:
            self._problem = self._problem or RuntimeError(
                f"dist_asgd: a second backward before step(), with step_in_backward=True: parameter "
                f"{self._member_of[index].name} got a gradient after the backward before had updated parameters with "
                f"its own. Call step() after each backward, run all but the last inside no_sync(), or pass "
                f"step_in_backward=False."
            )
        super().note_gradient(index)

    def note_complete(self, index: int) -> None:
        # The gradients that come after a round stay where they are: a step has one round.
        if not self._round_has_ended or self._place is _Place.STEP:
            super().note_complete(index)

    def note_end(self, busy: set[int]) -> None:
        super().note_end(busy)
        self._backward_has_ended = self._place is not None

    def _launch_next(self) -> None:
        bucket, position = self._round.next
        self._launch_in_round(bucket, position)
        self._round.advance()
        self._round_has_ended = not self._round.position

    def _join_round(self, reports: RankReports) -> None:
        self._round.begin()
        for position, bucket in enumerate(self._round.buckets):
            self._launch_in_round(bucket, position, None if position else reports)
        self._round.begin()
        self._round_has_ended = True
        self._end_round()

    def _launch_in_round(self, bucket: Bucket, position: int, reports: RankReports | None = None) -> None:
        """Launch a bucket, after the update of the one before last; ``reports`` if its exchange has been made."""
        if not position:
            self._begin()
        self._make_place(NUM_SCRATCH_SHARDS - 1)
        left_out = {m.index for m in bucket.members if m.index not in self._round.expected} | self._hooks.running()
        gradients = self._unsent(bucket, left_out)
        sent = bit_mask(m.index for m, gradient in zip(bucket.members, gradients, strict=True) if gradient is not None)
        exchange = BucketExchange(bucket, sent, self._fingerprint, False, reports)
        self._lend(bucket)
        # First, so that whoever waits in the launch for the other ranks waits for this exchange.
        self._launched.append(exchange)
        if reports is not None:
            # Exchanges begin at the same place among the other messages on all ranks.
            self._exchanges.hold()
        else:
            exchange.problem = self._problem is not None or self._mispaired is not None
            self._exchanges.add(exchange)
        self._send(bucket, position, gradients, left_out)

    def _begin(self) -> None:
        """Begin a round, and with it a step, if none has been; its first bucket is about to be launched."""
        self._make_place(0)
        self._exchanges.begin_round()
        if self._place is not None:
            return
        self._place = _Place.UNDECIDED
        is_settled, self._fingerprint, problem = self.bucket_update.begin()
        self._problem = self._problem or problem
        if not is_settled:
            self.agreement.rebound = True

    def _lend(self, bucket: Bucket) -> None:
        if self._place is not _Place.STEP:
            self._scratch.lend(bucket)

    def _make_place(self, most: int) -> None:
        """Update buckets until at most so many are left."""
        while len(self._launched) > most:
            self._end_oldest()

    def _end_oldest(self) -> None:
        """Wait until the oldest launched bucket is reduced, and update it. Collective in the sense of a round."""
        exchange = self._launched[0]
        self._exchanges.take_reports(exchange)
        assert exchange.reports is not None
        if self._place is _Place.UNDECIDED:
            self._decide(exchange.reports)
        elif self._place is _Place.STEP:
            self._check_pairing(exchange.reports)
        elif not _is_clean(exchange.reports):
            self._stop()
        self._exchanges.go_on()
        self._transfers.wait_for(exchange.bucket)
        # All ranks start what was launched before the gather, and so send everything in the same order.
        self._transfers.start_all()
        self._launched.popleft()
        if self._place is _Place.BACKWARD:
            expected = bit_mask(m.index for m in exchange.bucket.members if m.index in self._round.expected)
            self._update(exchange.bucket, exchange.reports.union(0) & expected)
        elif self._place is _Place.NOWHERE:
            self._give_back(exchange.bucket)

    def _decide(self, reports: RankReports) -> None:
        """Decide where this step updates buckets, by what all ranks have reported with the first one."""
        self._check_pairing(reports)
        if _is_clean(reports):
            try:
                if not self.bucket_update.is_compared:
                    # Ranks that have not come here yet may wait until this one has read what they send.
                    self._transfers.before_exchange()
                    self.bucket_update.compare(reports)
            except RuntimeError as error:
                # Of all ranks alike: step() raises it.
                self._problem = self._problem or error.with_traceback(None)
            else:
                self._place = _Place.BACKWARD
                return
        self._place = _Place.STEP
        self.bucket_update.abandon()

    def _stop(self) -> None:
        """Update no further bucket in this step, on any rank."""
        self._place = _Place.NOWHERE
        self._problem = self._problem or RuntimeError(
            "dist_asgd: a rank had a problem while backward updated parameters (step_in_backward=True)."
        )

    def _update(self, bucket: Bucket, mask: int) -> None:
        """Update the parameters of ``bucket`` that are in ``mask`` with its gradient shard, which is not kept."""
        self._is_torn = True  # until the end: an update that is interrupted cannot be made good
        if mask:
            known = self._active_of.get(id(bucket), (0, frozenset()))
            if known[0] != mask:
                # The same object as long as it does not change: plans are looked up by it.
                self._active_of[id(bucket)] = known = (mask, indices_in(mask))
            self._updated_mask |= mask
            self.bucket_update.update(bucket, known[1])
        self._give_back(bucket)
        self._is_torn = False

    def _give_back(self, bucket: Bucket) -> None:
        bucket.gradient = None
        self._buckets_with_shard.discard(id(bucket))

    # --- collective calls -----------------------------------------------------------------------------------

    def agree(
        self, call: CollectiveCall, fingerprint: Fingerprint = NO_FINGERPRINT, problem: Exception | None = None
    ) -> RankReports:
        if call in _READERS:
            problem = problem or _readers_problem(call.text)
        if call is CollectiveCall.OVERLAP_FORWARD:
            problem = problem or _overlap_problem()
        self._left = 0
        try:
            reports = super().agree(call, fingerprint, problem)
        except BaseException:
            if call is CollectiveCall.STEP:
                self._abandon()
            raise
        if call is CollectiveCall.STEP and not reports.union(0) and reports.union(1):
            raise RuntimeError(
                "dist_asgd: step() once more, without a backward since the last one: with step_in_backward=True "
                "gradients are not kept, and cannot be used again. Run backward first, or call zero_grad() after each "
                "step()."
            )
        if call in _LOADS:
            self._abandon()
        return reports

    def _agree(
        self, call: CollectiveCall, fingerprint: Fingerprint, problem: Exception | None, keep: bool
    ) -> RankReports:
        self._call = call
        return super()._agree(call, fingerprint, problem, keep)

    def _take_header(self) -> None:
        self._end_round()

    def _end_round(self) -> None:
        """Update what was launched, so that nothing is on its way when the ranks agree on a call."""
        self._make_place(0)
        if self.has_begun and self._call is not CollectiveCall.STEP and self._call not in _LOADS:
            self._problem = self._problem or RuntimeError(
                f"dist_asgd: {self._call.text} between a backward and step(), with step_in_backward=True: that "
                f"backward has updated parameters, and only step() ends the step. Call step() first."
            )

    def _abandon(self) -> None:
        """Give the step up that backward has begun, on all ranks; one that step() begins can be tried again."""
        if self.has_begun:
            self.bucket_update.abandon()
            self._forget_step()

    def _reduce_pending(self, pending: int) -> None:
        if self._place is _Place.STEP:
            super()._reduce_pending(pending)
        else:
            # step() reduces and updates bucket by bucket.
            self._left = pending

    def active(self, reports: RankReports) -> frozenset[int]:
        present = self.present(reports)
        if self._place is _Place.STEP:
            self._update_reduced(bit_mask(present))
        elif self._left:
            self._update_left()
        return super().active(reports)

    def _update_reduced(self, present: int) -> None:
        """Update all buckets with the gradient shards that they have kept until ``step()``."""
        self._begin_in_step()
        for bucket in self.buckets:
            if id(bucket) in self._buckets_with_shard:
                self.wait_for(bucket)
                self._update(bucket, present & bit_mask(member.index for member in bucket.members))

    def _update_left(self) -> None:
        """Reduce and update the parameters whose gradients backward has not reduced. Collective."""
        if self._place is None:
            self._begin_in_step()
        for position, bucket in enumerate(self.buckets):
            members = bit_mask(member.index for member in bucket.members)
            if not self._left & members:
                continue
            self._lend(bucket)
            self._send(bucket, position, self._unsent(bucket, set()), set())
            self.wait_for(bucket)
            self._update(bucket, self._left & members)

    def _begin_in_step(self) -> None:
        # The agreement has made sure that nothing is wrong, and has taken over what was changed.
        is_settled, _, problem = self.bucket_update.begin()
        assert is_settled
        assert problem is None, problem

    def end_step(self) -> None:
        super().end_step()
        self._forget_step()

    def clear(self, set_to_none: bool) -> None:
        if not set_to_none:
            raise ValueError(
                "dist_asgd: zero_grad(set_to_none=False) with step_in_backward=True: gradients are not kept, so that "
                "there are none to set to zeros. Call zero_grad()."
            )
        super().clear(set_to_none)
        if self._place is not None:
            self.bucket_update.abandon()
            self._forget_step()
        for bucket in self.buckets:
            self._give_back(bucket)

    def keep(self) -> None:
        raise ValueError(
            "dist_asgd: keep_gradients() with step_in_backward=True: gradients are gone once a bucket is updated. Pass "
            "step_in_backward=False."
        )

    def settle(self, *, always: bool = False) -> frozenset[int]:
        """Raise a RuntimeError: whoever reads ``p.grad`` after backward finds that the gradient has been used."""
        raise _readers_problem("reading p.grad")

    def _forget_gradient(self, index: int) -> None:
        if self.has_begun and self._reduced_mask >> index & 1 and not self._used_by_step:
            self._problem = self._problem or RuntimeError(
                f"dist_asgd: the p.grad of parameter {self._member_of[index].name} was taken away between backward and "
                f"step(), with step_in_backward=True: backward has updated the parameter with it. Call zero_grad(), or "
                f"model.zero_grad(), after step()."
            )
            self._unpacked.discard(index)
            return
        super()._forget_gradient(index)


def gradients_of(stage: int, step_in_backward: bool, agreement: Agreement, communicators: Communicators) -> Gradients:
    """The gradients of an optimizer with these options."""
    if stage != 2:
        return AveragedGradients(agreement, communicators)
    return (StepReducer if step_in_backward else Reducer)(agreement, communicators)


def _is_clean(reports: RankReports) -> bool:
    """Whether no rank has anything to tell but that it takes part in a step with these hyperparameters."""
    differ = reports.discards_differ or reports.digests_differ
    return reports.calls <= _STEPPING and not (reports.problem or reports.rebound or reports.cleared or differ)


def _readers_problem(what: str) -> RuntimeError:
    return RuntimeError(
        f"dist_asgd: {what} with step_in_backward=True: a gradient is used as soon as it is reduced, during backward, "
        f"and nobody can clip, unscale or read it afterwards. Pass step_in_backward=False, or change gradients in a "
        f"hook on the parameter (register_post_accumulate_grad_hook)."
    )


def _overlap_problem() -> ValueError:
    return ValueError(
        "dist_asgd: overlap_forward() with step_in_backward=True: buckets are gathered during backward, and step() "
        "waits for the last ones. Leave overlap_forward() out, or pass step_in_backward=False."
    )
