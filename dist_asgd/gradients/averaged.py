"""Stage 1: gradients arrive on the parameters, already averaged by DDP, and are compared between ranks."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..comm import Communicators
from ..comm.agreement import NO_FINGERPRINT, OF_AN_ITERATION, Agreement, Fingerprint
from ..comm.masks import bit_mask
from ..comm.reports import CollectiveCall, RankReports
from ..placements.presharded import PreshardedState
from ..storage.buffers import Bucket, BucketParam, StateBuffer
from ..storage.memory_order import flattened
from ..storage.snapshots import NO_GRADIENTS, TensorSnapshot
from .base import READ_GRADIENTS, Gradients, multiply, ranks_with
from .checksums import checksum, digest, hexadecimal, on_host
from .relay import Relay

# Nothing on the parameters tells the two causes apart: the last sentence of errors names both.
REMEDY = (
    "wrap the model in DDP or pass stage=2. If it is wrapped in DDP, run the last backward before step() outside of "
    "its no_sync(), and call the wrapped module, not the one inside: only then does DDP average. It leaves out "
    "parameters that were frozen when it was constructed: wrap the model anew after unfreezing them."
)


class AveragedGradients(Gradients):
    """Stage 1: every rank holds the same averaged gradients in ``p.grad``.

    The first step proves it with checksums; every later one only compares which parameters have a gradient.
    """

    def __init__(self, agreement: Agreement, communicators: Communicators) -> None:
        super().__init__(agreement, communicators)
        self._compared = communicators.world_size == 1
        # Bucket parameters by index, None for presharded ones: one pass over it finds all gradients.
        self._snapshot = TensorSnapshot.of(())
        # One byte for each parameter, 1 if it had a gradient when last looked at, and the same as a bit mask.
        self._last_present: tuple[bytes, int] = (b"", 0)
        # While ranks have joined: how they get gradients, which parameters step (none between steps), and a parameter
        # with the gradient that the last step used.
        self._relay: Relay | None = None
        self._relayed: frozenset[int] = frozenset()
        self._last_used: tuple[BucketParam, weakref.ref[Tensor]] | None = None

    def extend(self, buckets: Sequence[Bucket], presharded: Sequence[PreshardedState]) -> None:
        super().extend(buckets, presharded)
        # Parameters that are new may have gradients that nobody averages.
        self._compared = self.communicators.world_size == 1
        params = {member.index: member.param for member in self.members}
        self._snapshot = TensorSnapshot.of([params.get(index) for index in range(max(params, default=-1) + 1)])

    def agree(
        self, call: CollectiveCall, fingerprint: Fingerprint = NO_FINGERPRINT, problem: Exception | None = None
    ) -> RankReports:
        if call not in READ_GRADIENTS:
            if self._relay is not None and call not in (CollectiveCall.JOINED, *OF_AN_ITERATION):
                self._refuse_between_steps(call, self._relay.joined)
            return self.agreement.agree(call, fingerprint, problem=problem)
        table = self._snapshot.gradients()
        if table.present != self._last_present[0]:
            self._last_present = (table.present, bit_mask(i for i, there in enumerate(table.present) if there))
        if table.addresses is None:
            # Some gradient does not lie as its parameter does: look at each, and find what is wrong.
            _, wrong = self.present_bits(member for member in self.members if table.present[member.index])
            problem = problem or wrong
        present, misplaced = self._last_present[1], 0
        if self.presharded:
            presharded, misplaced, wrong = self.inspect_presharded(call)
            present |= presharded
            problem = problem or wrong
        reports = self.agreement.agree(call, fingerprint, (present, misplaced), problem)
        if call is CollectiveCall.STEP:
            self.table = table
        return reports

    def present(self, reports: RankReports) -> frozenset[int]:
        differing = reports.union(0) & ~reports.common
        if differing and any(differing >> member.index & 1 for member in self.members):
            self._refuse_missing(reports.masks(0), reports.active)
        if self.presharded:
            self.align_presharded(reports)
        return self.agreement.indices(reports.union(0))

    def active(self, reports: RankReports) -> frozenset[int]:
        present = self.present(reports)
        if not self._compared and present:
            self._compare(present, reports)
            self._compared = True
        if self.agreement.joined:
            self._begin_relay(present, reports)
        return present

    def wait_for(self, buffer: StateBuffer) -> None:
        """Wait for gradients on their way to ranks that have joined; on others they arrived before ``step()``."""
        if self._relayed and self._relay is not None:
            self._relay.deliver(cast(Bucket, buffer), self._relayed)

    def end_step(self) -> None:
        self.table = NO_GRADIENTS
        if self._relay is not None:
            self._relay.end()
            self._relayed = frozenset()

    def clear(self, set_to_none: bool) -> None:
        """Do nothing: all gradients are in ``p.grad``, which torch's own ``zero_grad()`` clears."""

    def keep(self) -> None:
        """Do nothing: gradients stay in ``p.grad`` until they are zeroed, and DDP adds to them."""

    def apply_pending(self) -> None:
        """Do nothing: gradients on parameters are clipped at once, so that no factor is ever pending."""

    def unscale(self, inverse: Tensor) -> None:
        multiply(self.held(), inverse)

    def held(self) -> list[Tensor]:
        return [g for member in (*self.members, *self.presharded) if (g := member.gradient) is not None]

    # --- uneven inputs --------------------------------------------------------------------------------------

    def _begin_relay(self, present: frozenset[int], reports: RankReports) -> None:
        """Get ready to bring the gradients of this step to the ranks that have joined. Collective."""
        if self._relay is None or self._relay.joined != reports.joined:
            self._relay = Relay(self.communicators, reports, self.buckets)
        members = [member for member in self.members if member.index in present]
        if members and members[0].param.grad is not None:
            self._last_used = members[0], weakref.ref(members[0].param.grad)
        self._relay.begin(members)
        self._relayed = present
        if self.communicators.rank in reports.joined:
            self.table = self._snapshot.gradients()

    def _refuse_between_steps(self, call: CollectiveCall, joined: Sequence[int]) -> None:
        """Raise RuntimeError, on all active ranks alike, if ranks that have joined cannot hear of ``call``.

        Between a step and the next backward they wait inside of torch's ``Join`` for DDP. During an iteration they
        take part in the agreement, and all ranks raise.
        """
        if self._last_used is not None:
            gradient = self._last_used[0].param.grad
            if gradient is not None and gradient is not self._last_used[1]():
                return
        raise RuntimeError(
            f"dist_asgd: {call.text} inside Join after {self.agreement.names.describe(joined)} ran out of inputs: "
            f"these ranks wait for the next iteration and cannot take part. Call it after the context."
        )

    def end_join(self) -> None:
        super().end_join()
        self.end_step()
        self._relay = self._last_used = None

    # --- comparisons ----------------------------------------------------------------------------------------

    def _refuse_missing(self, masks: Sequence[int], active: Sequence[int]) -> None:
        """Raise RuntimeError, on all ranks alike, if a bucket parameter has a gradient on some ranks only."""
        names = self.agreement.names
        for member in sorted(self.members, key=lambda m: m.index):
            have = [rank for rank in ranks_with(masks, member) if rank in active]
            if 0 < len(have) < len(active):
                raise RuntimeError(
                    f"dist_asgd: parameter {member.name} has a gradient on {names.describe(have)} of {names.total} "
                    f"only. With stage=1 gradients arrive already averaged, on all ranks or on none: {REMEDY}"
                )

    def _compare(self, present: frozenset[int], reports: RankReports) -> None:
        """Raise on all ranks if a gradient's bits differ between active ones; called at the first step. Collective."""
        members = sorted((m for m in self.members if m.index in present), key=lambda m: m.index)
        if not members:
            return
        # One that has joined has gradients left over from its own last step.
        active = self.communicators.rank not in reports.joined
        mine = members if active else []
        gradients = [flattened(m.param.grad, m.strides) for m in mine if m.param.grad is not None]
        # One word first: the others are sent only to say which parameter differs.
        if not self.communicators.host.differing(torch.tensor([digest(gradients)], device="cpu"), takes_part=active):
            return
        row = torch.zeros(len(members), dtype=torch.int64, device="cpu")
        if gradients:
            row = on_host([checksum(gradient) for gradient in gradients])
        differing = self.communicators.host.differing(row, takes_part=active)
        if not differing:
            return
        column = self.communicators.host.exchange(row[differing[:1]]).flatten().tolist()
        for rank in reports.joined:
            column[rank] = column[reports.first_active]
        raise RuntimeError(
            f"dist_asgd: at the first step the gradient of parameter {members[differing[0]].name} differs between "
            f"ranks: {self.agreement.names.by_value([f'checksum {hexadecimal(value)}' for value in column])}. With "
            f"stage=1 gradients must arrive already averaged: {REMEDY}"
        )
