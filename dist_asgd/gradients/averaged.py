"""Stage 1: gradients arrive on the parameters, already averaged by DDP, and are checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..comm import Communicators
from ..comm.agreement import (
    NO_FINGERPRINT,
    Agreement,
    CollectiveCall,
    Fingerprint,
    RankReports,
    describe_ranks,
    values_by_rank,
)
from ..placements.presharded import PreshardedState
from ..storage.buffers import Bucket, StateBuffer
from ..storage.memory_order import flattened
from ..storage.snapshots import TensorSnapshot
from .base import Gradients, _ranks_in, bits, multiply
from .checksums import checksum


class AveragedGradients(Gradients):
    """Stage 1: every rank holds the same averaged gradients in ``p.grad``."""

    def __init__(self, agreement: Agreement, communicators: Communicators) -> None:
        super().__init__(agreement, communicators)
        self._checked = communicators.world_size == 1
        self._facts = TensorSnapshot.of(())
        # Which parameters in buckets had a gradient when last asked, and the bits of those.
        self._standing: tuple[bytes, int] = (b"", 0)

    def extend(self, buckets: Sequence[Bucket], presharded: Sequence[PreshardedState]) -> None:
        super().extend(buckets, presharded)
        housed = {member.index: member.param for member in self.members}
        self._facts = TensorSnapshot.of([housed.get(index) for index in range(max(housed, default=-1) + 1)])

    def agree(
        self, call: CollectiveCall, fingerprint: Fingerprint = NO_FINGERPRINT, problem: Exception | None = None
    ) -> RankReports:
        if not self.about_gradients(call):
            return self.agreement.agree(call, fingerprint, problem=problem)
        seen = self._facts.gradients()
        if seen.present != self._standing[0]:
            self._standing = (seen.present, bits(index for index, there in enumerate(seen.present) if there))
        if seen.addresses is None:
            _, wrong = self.standing(member for member in self.members if seen.present[member.index])
            problem = problem or wrong
        standing, misplaced, wrong = self.inspect_presharded(call)
        problem = problem or wrong
        reports = self.agreement.agree(call, fingerprint, (self._standing[1] | standing, misplaced), problem)
        if call is CollectiveCall.STEP:
            self._seen = seen
        return reports

    def wait_for(self, bucket: StateBuffer | None) -> None:
        """They have arrived."""

    def apply_clip(self) -> None:
        """None is ever pending."""

    def unscale(self, inverse: Tensor) -> None:
        multiply(self._all(), inverse)

    def _all(self) -> list[Tensor]:
        return [g for member in (*self.members, *self.presharded) if (g := member.gradient) is not None]

    def clear(self, set_to_none: bool) -> None:
        """All of them are in ``p.grad``."""

    def present(self, reports: RankReports) -> frozenset[int]:
        masks = reports.masks(0)
        if len(set(masks)) > 1:
            self._refuse_missing(masks)
        if self.presharded:
            self.align_presharded(reports)
        return self.indices_of(reports.union(0))

    def _refuse_missing(self, masks: Sequence[int]) -> None:
        """RuntimeError, on all ranks alike, where a gradient of a plain parameter stands on some ranks only."""
        for member in sorted(self.members, key=lambda m: m.index):
            have = _ranks_in(masks, member)
            if 0 < len(have) < len(masks):
                raise RuntimeError(
                    f"dist_asgd: parameter {member.name} has a gradient on {describe_ranks(have)} of {len(masks)} only. "
                    f"With stage=1 gradients arrive already averaged, on all ranks or on none: wrap the model in DDP "
                    f"or pass stage=2."
                )

    def active(self, reports: RankReports) -> frozenset[int]:
        present = self.present(reports)
        if not self._checked and present:
            self._compare(present)
            self._checked = True
        return present

    def _compare(self, present: frozenset[int]) -> None:
        """First step: the gradients' bits must be the same on every rank."""
        members = sorted((m for m in self.members if m.index in present), key=lambda m: m.index)
        if not members:
            return
        sums = [checksum(flattened(m.param.grad, m.strides)) for m in members if m.param.grad is not None]
        table = self.communicators.host.exchange(torch.stack(sums).cpu())()
        for position, member in enumerate(members):
            column = table[:, position].tolist()
            if len(set(column)) > 1:
                raise RuntimeError(
                    f"dist_asgd: at the first step the gradient of parameter {member.name} differs between ranks: "
                    f"{values_by_rank([f'checksum {value & 0xFFFFFFFF:08x}' for value in column])}. With stage=1 "
                    f"gradients must arrive already averaged: wrap the model in DDP or pass stage=2."
                )
