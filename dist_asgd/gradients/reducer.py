"""Stage 2: gradients are reduce-scattered during backward, and only this rank's shard of their mean stays.

A hook on each parameter (``hooks.py``) notes that its gradient is complete. Once all expected gradients of a bucket
are, the bucket is packed, its ``p.grad`` freed, and its reduce-scatter launched while backward goes on.

round     one pass over all trainable buckets, launched in one fixed order on every rank. The first bucket that is
          launched opens the round, and an exchange that nobody waits for (the *header*) tells the other ranks.
joining   a rank that finds in ``agree`` that another rank has opened a round takes part in it with zeros. So ranks
          that run different numbers of backwards still make the same collective calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager

from torch import Tensor

from ..comm import Communicators, PeerError
from ..comm.agreement import NO_FINGERPRINT, Agreement, Fingerprint
from ..comm.masks import bit_mask, indices_in
from ..comm.reports import CollectiveCall, RankReports
from ..placements.presharded import PreshardedState
from ..storage.buffers import Bucket, BucketParam, ShardedParam, StateBuffer
from ..update.segments import UNSCALED, Scaling
from .base import READ_GRADIENTS, REBUILDING, Gradients, check_gradient, multiply, torn_problem
from .hooks import BackwardHooks
from .published import PublishedGradients
from .round import Header, Round, mispairing
from .sending import complete_in_background
from .transfers import Transfers


class Reducer(Gradients):
    """Stage 2: reduce-scatters gradients during backward and keeps this rank's shard of their mean.

    ``in_flight_bytes`` counts the send buffers, which are kept between steps. ``backward_since_agree`` says whether a
    backward has run on this rank since ranks last agreed.

    The life of a bucket's gradient:

    =========  ==============================  ===========================  ========================================
    state      this rank's own gradients       its gradient shard           what moves it on
    =========  ==============================  ===========================  ========================================
    empty      none                            without meaning              backward sets p.grad (``note_gradient``)
    filling    in ``p.grad`` of some           as before                    the last expected gradient, or ``agree``
    in flight  packed and freed                being written                ``wait_for``, or a lack of send buffers
    reduced    none                            mean over all ranks          ``step()``, or another backward adds to it
    used       none                            mean, read by ``step()``     ``zero_grad()`` or a backward: empty again
    =========  ==============================  ===========================  ========================================

    From the end of backward on ``p.grad`` is a ``GradientTensor`` (``published.py``).
    """

    def __init__(self, agreement: Agreement, communicators: Communicators, header: Header | None = None) -> None:
        """``header`` tells the other ranks of a round; None: one exchange for each round."""
        super().__init__(agreement, communicators)
        self.synchronising = True
        # Errors found during backward: every rank raises them at its next collective call.
        self._problem: Exception | None = None
        self._mispaired: Exception | None = None
        self._presharded_mask = 0
        self._member_of: dict[int, BucketParam] = {}
        self._hooks = BackwardHooks(self)
        self._hooked: set[int] = set()  # gradients of the others are reduced as if set by hand
        self.published = PublishedGradients(self)
        self._round = Round()
        self._header = header or Header(agreement)
        self._transfers = Transfers((), {}, self._header)
        # Since the last zero_grad(): the parameters this rank contributed to, and the buckets whose shard is valid.
        self._reduced_mask = 0
        self._buckets_with_shard: set[int] = set()
        # Parameters whose p.grad backward has filled, and which are not packed yet.
        self._unpacked: set[int] = set()
        self._used_by_step = False  # then the next gradient starts from zero
        self.backward_since_agree = False
        # The parameters with a gradient on any rank, as ``agree`` has found them.
        self._present_mask = 0
        # Whether a bucket is being launched, or that was interrupted: its gradients are torn then.
        self._is_torn = False

    def extend(self, buckets: Sequence[Bucket], presharded: Sequence[PreshardedState]) -> None:
        super().extend(buckets, presharded)
        self._presharded_mask = bit_mask(member.index for member in self.presharded)
        self._member_of = {member.index: member for member in self.members}
        self._round.extend(self.buckets)
        self._register_hooks()
        self._transfers.wait_for_all()
        collectives = {bucket.device: self.communicators.on(bucket.device) for bucket in self.buckets}
        self._transfers = Transfers(self.buckets, collectives, self._header)
        self.published.extend(self.members, self._hooked)

    def _register_hooks(self) -> None:
        hooked = [member for member in self.members if member.param.requires_grad]
        self._hooked = {member.index for member in hooked}
        self._hooks.register(hooked)

    def __del__(self) -> None:
        """Let a thread keep what is in flight until it has arrived: the other ranks wait for it."""
        if self._header.is_under_way or not self._transfers.is_idle:
            complete_in_background([self._header.complete, self._transfers.complete])

    @property
    def in_flight_bytes(self) -> int:
        """The bytes of the send buffers, which are kept between steps."""
        return self._transfers.nbytes

    # --- during backward ------------------------------------------------------------------------------------

    def before_gradient(self, index: int) -> None:
        """Make ``p.grad`` of parameter ``index`` an ordinary gradient, or None, for backward to add to."""
        if self.published.withdraw(index):
            self._forget_gradient(index)

    def note_gradient(self, index: int) -> None:
        """Note that backward has set ``p.grad`` of parameter ``index``. Called by the hook on the parameter."""
        # If another optimizer has taken the parameter over, step() says so; it follows one that was rebound.
        if self._member_of[index].is_unmoved or self._member_of[index].is_rebound:
            self._start_over_if_used()
            self._unpacked.add(index)
            self.backward_since_agree = True

    def note_complete(self, index: int) -> None:
        """Note that the gradient of parameter ``index`` is complete in this backward; launch buckets that are full.

        Called when all hooks on the parameter have run, on autograd's thread. Collective in the sense of a round: all
        ranks launch the same buckets in the same order, but nobody waits here.
        """
        bucket = self._member_of[index].bucket
        self._transfers.advance()
        if not self.synchronising or index not in self._unpacked or not bucket.trainable:
            return
        if not self._round.note_ready(index, bucket):
            return
        while self._round.next_is_full():
            self._launch_next()
            if not self._round.position:
                # The round is complete: only another gradient may open the next.
                break

    def note_end(self, busy: set[int]) -> None:
        """Publish all gradients but those that other threads are at work on, at the end of a backward."""
        self._transfers.start_all()
        if self.synchronising:
            self.published.publish_all(busy)

    def _launch_next(self) -> None:
        """Launch the next bucket of the round; the first one opens it and starts the header."""
        if not self._round.position:
            # The exchange of the last round has had a whole backward to arrive.
            self._take_header()
            self._header.send()
        self._header.poll()
        self._launch(*self._round.next)
        self._round.advance()

    def _take_header(self) -> None:
        self._check_pairing(self._header.take())

    def _check_pairing(self, reports: RankReports | None) -> None:
        # Whatever else other ranks report beside a round they repeat in the next exchange, once they have joined it.
        if reports is not None and reports.discards_differ:
            self._mispaired = mispairing(reports, self.agreement.names)

    def _launch(self, bucket: Bucket, tag: int) -> None:
        """Hand the bucket's gradients over to its reduce-scatter; waits for that of the bucket before last only."""
        # A gradient that nobody waits for stays on its parameter while hooks on that run; it is reduced later.
        running = self._hooks.running()
        self._send(bucket, tag, self._unsent(bucket, running), running)

    def _unsent(self, bucket: Bucket, left_out: Set[int]) -> list[Tensor | None]:
        """The gradients of the members of ``bucket``, checked; None for those that are ``left_out``."""
        self._start_over_if_used()
        return [None if member.index in left_out else self._checked(member) for member in bucket.members]

    def _send(self, bucket: Bucket, tag: int, gradients: Sequence[Tensor | None], left_out: Set[int]) -> None:
        """Launch ``gradients``, as ``_unsent`` gives them; those of ``left_out`` parameters stay where they are."""
        self._transfers.make_room(bucket)
        accumulate = id(bucket) in self._buckets_with_shard
        if accumulate:
            # The shard must not be scaled together with what is added to it now.
            self.scale()
        self._is_torn = True  # from here on, until the end
        self._buckets_with_shard.add(id(bucket))
        self._transfers.launch(bucket, gradients, accumulate, tag)
        self.published.forget_norms()
        for member, gradient in zip(bucket.members, gradients, strict=True):
            if member.index not in left_out:
                # What is not sent yet the transfers keep.
                self.published.publish(member, sent=True)
                self._unpacked.discard(member.index)
                self._reduced_mask |= (gradient is not None) << member.index
        self._is_torn = False

    def _start_over_if_used(self) -> None:
        """Forget gradients that a step has used, as a new one has come; a step ends all rounds, so none mixes both."""
        if self._used_by_step:
            self._used_by_step = False
            self._reduced_mask = 0
            self._buckets_with_shard.clear()
            self.scaling = UNSCALED

    def _checked(self, member: BucketParam) -> Tensor | None:
        """The gradient of ``member``; None, and a problem for all ranks at the next call, if it cannot be used."""
        gradient = self.published.unsent(member)
        if gradient is not None:
            try:
                check_gradient(member, gradient)
            except RuntimeError as error:
                self._problem = self._problem or error.with_traceback(None)  # whose frames refer to self
                return None
        return gradient

    def has_gradient(self, member: ShardedParam) -> bool:
        # Once a round is sent, ``p.grad`` says nothing until ranks have agreed.
        given = member.param.grad if not isinstance(member, BucketParam) else self.published.unsent(member)
        return given is not None or bool(self._reduced_mask >> member.index & 1)

    # --- before a collective call ---------------------------------------------------------------------------

    def agree(
        self, call: CollectiveCall, fingerprint: Fingerprint = NO_FINGERPRINT, problem: Exception | None = None
    ) -> RankReports:
        reports = self._agree(call, fingerprint, problem, keep=call not in REBUILDING)
        in_buckets = ~self._presharded_mask
        self._present_mask, second = reports.union(0), reports.union(1) & in_buckets
        if not self._present_mask & in_buckets:
            # No rank has a new gradient: those that the last step has used are there to be used again, as in torch.
            self._present_mask |= second
        else:
            self._start_over_if_used()
            self._reduce_pending(reports.in_both & in_buckets if second else 0)
        if call not in REBUILDING:
            self.published.match(self.agreement.indices(self._present_mask))
        return reports

    def settle(self, *, always: bool = False) -> frozenset[int]:
        """Reduce what a backward has left, for readers of ``p.grad``; returns the parameters that have a gradient.

        Collective if a backward has run since ranks last agreed, or ``always``. Pending factors are multiplied in.
        """
        if always or self.backward_since_agree:
            self.agree(CollectiveCall.GRADIENT)
        self.scale()
        return self.agreement.indices(self._present_mask)

    def _agree(
        self, call: CollectiveCall, fingerprint: Fingerprint, problem: Exception | None, keep: bool
    ) -> RankReports:
        """Complete this rank's round, join those of others, and agree on ``call``. Collective.

        ``keep``: gradients that are not reduced yet are announced to the other ranks; False if they are discarded.
        For parameters in buckets, the masks say: (1, 0) reduced, (1, 1) yet to be reduced, (0, 1) used by a step.
        """
        if self._is_torn or self._transfers.is_torn:
            # No round can be completed any more; the other ranks hear of it in the exchange that they wait for.
            self._transfers.abandon()
            # The exchange that opened the round goes first: other ranks may still wait for this one's part in it.
            self._header.take()
            self.agreement.agree(call, fingerprint, problem=problem or torn_problem(self.communicators.world_size))
        if self._hooks.tasks:
            self._hooks.forget()
        while self._round.position:
            # What is left of the open round goes out with zeros for gradients that did not come.
            self._launch_next()
        self._take_header()
        present, misplaced, wrong = 0, 0, None
        if self.presharded and call in READ_GRADIENTS:
            # No round changes the gradients of presharded parameters: one look is enough.
            present, misplaced, wrong = self.inspect_presharded(call)
        while True:
            try:
                self._transfers.before_exchange()
            except PeerError as error:
                # The others hear of it in the exchange that they wait for.
                self.agreement.agree(call, fingerprint, problem=error)
            pending = self._pending(keep)
            self.agreement.cleared = bool(self.published.cleared)
            problem = problem or self._mispaired or self._problem or wrong
            reduced, used = (0, self._reduced_mask) if self._used_by_step else (self._reduced_mask, 0)
            masks = (reduced | pending | present, used | pending | misplaced)
            reports = self.agreement.exchange(call, fingerprint, masks, problem is not None)
            if CollectiveCall.ROUND not in reports.calls:
                break
            self._join_round(reports)
            # After the round, as on the ranks that have opened it: if the pairing is wrong, ranks send their rows.
            self._check_pairing(reports)
        if CollectiveCall.STEP not in reports.calls:
            # A step waits bucket by bucket instead, and updates the first while the last are in flight.
            self._transfers.wait_for_all()
        self._problem = self._mispaired = None
        self.backward_since_agree = False
        self.agreement.check(reports, fingerprint, problem)
        if reports.cleared and call is not CollectiveCall.ZERO_GRAD:
            self.published.compare_cleared()
        return reports

    def _join_round(self, reports: RankReports) -> None:
        """Take part in a round that another rank has opened; ``reports``, which said so, stand for a header."""
        self._round.begin()
        for position, bucket in enumerate(self._round.buckets):
            self._launch(bucket, position)
        self._round.begin()

    def _pending(self, keep: bool) -> int:
        """The bits of parameters that have a gradient now which is not reduced yet; 0 unless ``keep``."""
        pending = 0
        unsent, cleared = self.published.scan()
        for index in cleared:
            self._forget_gradient(index)
        for member, _ in unsent if keep else ():
            self._start_over_if_used()
            pending |= 1 << member.index
            self._checked(member)
            hooked = member.index in self._hooked
            if hooked and self._reduced_mask >> member.index & 1 and member.index not in self._unpacked:
                self._problem = self._problem or RuntimeError(
                    f"dist_asgd: parameter {member.name} has a p.grad that did not come from backward, although "
                    f"backward's gradient was already reduced. With stage=2 do not wrap the model in DDP, and set "
                    f"gradients by hand only instead of a backward (after zero_grad())."
                )
        if any(member.index not in self._hooked and member.param.requires_grad for member, _ in unsent):
            # It was frozen when hooks were registered. Without one, backward would add to a published gradient.
            self._register_hooks()
        return pending

    def _forget_gradient(self, index: int) -> None:
        """Forget what was reduced of a parameter whose published gradient a user has taken out of ``p.grad``.

        Every rank does it by itself; the next call compares for which parameters they did.
        """
        self._unpacked.discard(index)
        self._reduced_mask &= ~(1 << index)
        if self._used_by_step:
            return
        self.published.cleared |= 1 << index
        member = self._member_of[index]
        # What is in flight would arrive after the zeros.
        self.wait_for(member.bucket)
        if member.bucket.gradient is not None:
            self.gradient_fragment(member).zero_()

    def _reduce_pending(self, pending: int) -> None:
        """Reduce the buckets in which any rank still has a gradient that is not reduced. Collective."""
        if not pending:
            return
        wanted = {id(self._member_of[index].bucket) for index in indices_in(pending)}
        for position, bucket in enumerate(self.buckets):
            if id(bucket) in wanted:
                # A second reduce-scatter must not write a shard that the first is still writing.
                self.wait_for(bucket)
                self._launch(bucket, position)
        self._transfers.wait_for_all()

    def present(self, reports: RankReports) -> frozenset[int]:
        if self.presharded:
            self.align_presharded(reports)
        return self.agreement.indices(self._present_mask)

    def active(self, reports: RankReports) -> frozenset[int]:
        active = self.present(reports)
        self._round.follow(active, self.communicators.host)
        self._used_by_step = True
        return active

    def wait_for(self, buffer: StateBuffer) -> None:
        self._transfers.wait_for(buffer)

    def end_step(self) -> None:
        self._transfers.wait_for_all()

    # --- what becomes of reduced gradients ------------------------------------------------------------------

    def gradient_fragment(self, member: ShardedParam) -> Tensor:
        reduced = member.bucket.reduced_gradient()
        if reduced is None:
            return super().gradient_fragment(member)
        return reduced[member.fragment.start : member.fragment.stop]

    def apply_pending(self) -> None:
        if self.scaling.clip is not None:
            self.scale()

    def clip(self, factor: Tensor) -> None:
        # At once on DTensors: backward may add to their gradients before the update, and nobody would hear of it.
        multiply([member.gradient for member in self.presharded], factor)
        self.scaling = Scaling(self.scaling.unscale, factor)

    def unscale(self, inverse: Tensor) -> None:
        multiply([member.gradient for member in self.presharded], inverse)
        self.scaling = Scaling(inverse.clone(), self.scaling.clip)

    def scale(self) -> None:
        """Multiply all shards by the pending factors, because another gradient is added or another norm is taken."""
        for factor in self.scaling:
            for bucket in self.buckets:
                if bucket.gradient is not None:
                    bucket.gradient.mul_(factor.to(bucket.device))
        self.scaling = UNSCALED

    def held(self) -> list[Tensor]:
        shards = [b.gradient for b in self.buckets if b.gradient is not None and id(b) in self._buckets_with_shard]
        return shards + [g for member in self.presharded if (g := member.gradient) is not None]

    def clear(self, set_to_none: bool) -> None:
        """Drop all reduced gradients, or set them to zeros, which stay present as in torch.

        Collective if a backward has run since ranks last agreed: a round that only some ranks opened must not be left
        for a later backward to be paired with.
        """
        if (self._is_torn or self._transfers.is_torn) and self.communicators.world_size == 1:
            # Nobody else has a part of what was torn.
            self._transfers.forget()
            self._round.begin()
            self._is_torn = self.backward_since_agree = False
        if self.backward_since_agree:
            self._agree(CollectiveCall.ZERO_GRAD, NO_FINGERPRINT, None, keep=False)
        if self._hooks.tasks:
            self._hooks.forget()
        self._transfers.wait_for_all()
        self._used_by_step = False
        self.scaling = UNSCALED
        self.published.discard_all(set_to_none)
        if not set_to_none:
            for bucket in self.buckets:
                if bucket.gradient is not None:
                    bucket.gradient.zero_()
            return
        self._round.begin()
        self._problem = None
        self._reduced_mask = 0
        self._buckets_with_shard.clear()
        self._unpacked.clear()
        self.agreement.discards += 1

    def keep(self) -> None:
        if self._used_by_step:
            self._used_by_step = False
            self.agreement.discards += 1  # ranks that differ would add to the gradients on some shards only

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        before, self.synchronising = self.synchronising, False
        try:
            yield
        finally:
            self.synchronising = before
