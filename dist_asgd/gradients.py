"""Gradients as a step sees them, and stage 1: they arrive on the parameters, already averaged, and are checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from .agreement import NO_CLAIM, Agreement, Answer, Claim, Kind, differing, digest_of, ranks_text
from .buffers import Bucket, Housed, Member, Store, flattened
from .comm import Communicators
from .facts import NOTHING_SEEN, Facts, Seen
from .residents import Resident, Residents
from .update.segments import UNSCALED
from .validation import check_gradient


def bits(indices: Iterable[int]) -> int:
    """A bit mask of ``indices``."""
    mask = 0
    for index in indices:
        mask |= 1 << index
    return mask


def indices_of(mask: int) -> frozenset[int]:
    """The positions of the bits set in ``mask``."""
    return frozenset(i for i, bit in enumerate(reversed(f"{mask:b}")) if bit == "1")


def multiply(gradients: Iterable[Tensor | None], factor: Tensor) -> None:
    """Multiply in place, by a 0-dim tensor that may be elsewhere."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        if gradient is not None:
            by_kind.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (device, _), alike in by_kind.items():
        torch._foreach_mul_(alike, factor.to(device))


class Gradients(ABC):
    """Where a step's gradients come from."""

    def __init__(self, agreement: Agreement, communicators: Communicators) -> None:
        self.agreement = agreement
        self.communicators = communicators
        self.buckets: list[Bucket] = []
        self.residents: list[Resident] = []
        # What reduced gradients are still to be multiplied by.
        self.scaling = UNSCALED
        self._seen = NOTHING_SEEN
        self._indices: tuple[int, frozenset[int]] = (0, frozenset())

    def extend(self, buckets: Sequence[Bucket], residents: Sequence[Residents]) -> None:
        """Take all buckets, in reduce order, and what is in none; replaces what was given before."""
        self.buckets = list(buckets)
        self.residents = [member for store in residents for member in store.members]

    @property
    def members(self) -> Iterator[Housed]:
        """Every member of every bucket."""
        return (member for bucket in self.buckets for member in bucket.members)

    def take(self) -> Seen:
        """The gradients that ``settle`` saw on parameters in buckets, by parameter index; not kept here any longer."""
        seen, self._seen = self._seen, NOTHING_SEEN
        return seen

    def indices_of(self, mask: int) -> frozenset[int]:
        """``indices_of``, kept while the mask stays the same."""
        if self._indices[0] != mask:
            self._indices = (mask, indices_of(mask))
        return self._indices[1]

    @staticmethod
    def standing(members: Iterable[Member]) -> tuple[int, Exception | None]:
        """The bits of ``members`` whose ``p.grad`` is set, and what is wrong with one of those gradients."""
        present, problem = 0, None
        for member in members:
            gradient = member.param.grad
            if gradient is not None:
                present |= 1 << member.index
                try:
                    check_gradient(member, gradient)
                except RuntimeError as error:
                    problem = problem or error
        return present, problem

    @staticmethod
    def about_gradients(kind: Kind) -> bool:
        """Whether a call of this kind reads gradients where they stand."""
        return kind in (Kind.STEP, Kind.CLIP_GRAD_NORM)

    @property
    def amiss(self) -> int:
        """The bits of the residents whose gradient this rank has something to say about."""
        return bits(member.index for member in self.residents if member.amiss)

    def settle_residents(self, answer: Answer) -> None:
        """Collective: put the gradients of residents right, or raise on all ranks alike."""
        masks, amiss = answer.masks(0), answer.masks(1)
        for member in self.residents:
            member.settle_gradient(_ranks_in(masks, member), _ranks_in(amiss, member), len(masks))

    def piece(self, member: Member) -> Tensor:
        """The part of an active member's gradient that this rank updates with, 1-D and real."""
        start = member.piece.param_start
        flat = flattened(cast(Tensor, member.gradient), member.strides)
        return flat[start : start + member.piece.numel]

    def pending_unscale(self, member: Member) -> Tensor | None:
        """What the member's gradient is still to be multiplied by, before clipping."""
        return None if member.bucket.reduced() is None else self.scaling.unscale

    @abstractmethod
    def apply_clip(self) -> None:
        """Multiply by a pending factor of clipping, because another is about to come."""

    def clip(self, factor: Tensor) -> None:
        """Multiply all gradients by ``factor``, 0-dim; those that are reduced at the next update."""
        multiply([member.gradient for member in (*self.members, *self.residents)], factor)

    @abstractmethod
    def unscale(self, inverse: Tensor) -> None:
        """Take the inverse of a gradient scaler's scale, 0-dim: at the update for what is reduced, now for the rest."""

    @abstractmethod
    def _all(self) -> list[Tensor]:
        """What this rank holds of all gradients: reduced shards, and those that stand on parameters."""

    def overflowed(self) -> Tensor:
        """Whether anything in this rank's gradients is not finite: ``(1,)`` int64 on the host."""
        found = [gradient for gradient in self._all() if gradient.numel()]
        finite = [torch.linalg.vector_norm(gradient, torch.inf).isfinite().cpu() for gradient in found]
        return torch.tensor([not all(finite)], dtype=torch.int64, device="cpu")

    @abstractmethod
    def settle(self, kind: Kind, claim: Claim = NO_CLAIM, problem: Exception | None = None) -> Answer:
        """Collective: agree on ``kind`` and ``claim``, gradients reduced or on the way; raises on all ranks or none."""

    @abstractmethod
    def present(self, answer: Answer) -> frozenset[int]:
        """Indices of the parameters that have a gradient, the same on all ranks; ``answer`` as for ``active``."""

    @abstractmethod
    def ready(self, bucket: Store | None) -> None:
        """Wait until the gradient of ``bucket`` is reduced (None: of all); between ``settle`` and the update."""

    @abstractmethod
    def active(self, answer: Answer) -> frozenset[int]:
        """Indices of the parameters that step, the same on all ranks; ``answer`` is what ``settle`` returned."""

    @abstractmethod
    def forget(self, set_to_none: bool) -> None:
        """``zero_grad``: drop gradients that are not in ``p.grad``, or set them to zeros."""


def _ranks_in(masks: Sequence[int], member: Member) -> list[int]:
    """The ranks whose mask has the member's bit."""
    return [rank for rank, mask in enumerate(masks) if mask >> member.index & 1]


class Arrived(Gradients):
    """Stage 1: every rank holds the same averaged gradients in ``p.grad``."""

    def __init__(self, agreement: Agreement, communicators: Communicators) -> None:
        super().__init__(agreement, communicators)
        self._checked = communicators.world_size == 1
        self._facts = Facts.of(())
        # Which parameters in buckets had a gradient when last asked, and the bits of those.
        self._standing: tuple[bytes, int] = (b"", 0)

    def extend(self, buckets: Sequence[Bucket], residents: Sequence[Residents]) -> None:
        super().extend(buckets, residents)
        housed = {member.index: member.param for member in self.members}
        self._facts = Facts.of([housed.get(index) for index in range(max(housed, default=-1) + 1)])

    def settle(self, kind: Kind, claim: Claim = NO_CLAIM, problem: Exception | None = None) -> Answer:
        if not self.about_gradients(kind):
            return self.agreement.confer(kind, claim, problem=problem)
        seen = self._facts.gradients()
        if seen.present != self._standing[0]:
            self._standing = (seen.present, bits(index for index, there in enumerate(seen.present) if there))
        if seen.addresses is None:
            _, wrong = self.standing(member for member in self.members if seen.present[member.index])
            problem = problem or wrong
        standing, wrong = self.standing(self.residents)
        problem = problem or wrong
        amiss = 0 if problem else self.amiss
        answer = self.agreement.confer(kind, claim, (self._standing[1] | standing, amiss), problem)
        if kind is Kind.STEP:
            self._seen = seen
        return answer

    def ready(self, bucket: Store | None) -> None:
        """They have arrived."""

    def apply_clip(self) -> None:
        """None is ever pending."""

    def unscale(self, inverse: Tensor) -> None:
        multiply(self._all(), inverse)

    def _all(self) -> list[Tensor]:
        return [g for member in (*self.members, *self.residents) if (g := member.gradient) is not None]

    def forget(self, set_to_none: bool) -> None:
        """All of them are in ``p.grad``."""

    def present(self, answer: Answer) -> frozenset[int]:
        masks = answer.masks(0)
        if len(set(masks)) > 1:
            self._refuse_missing(masks)
        if self.residents:
            self.settle_residents(answer)
        return self.indices_of(answer.union(0))

    def _refuse_missing(self, masks: Sequence[int]) -> None:
        """RuntimeError, on all ranks alike, where a gradient of a plain parameter stands on some ranks only."""
        for member in sorted(self.members, key=lambda m: m.index):
            have = _ranks_in(masks, member)
            if 0 < len(have) < len(masks):
                raise RuntimeError(
                    f"dist_asgd: parameter {member.name} has a gradient on {ranks_text(have)} of {len(masks)} only. "
                    f"With stage=1 gradients arrive already averaged, on all ranks or on none: wrap the model in DDP "
                    f"or pass stage=2."
                )

    def active(self, answer: Answer) -> frozenset[int]:
        present = self.present(answer)
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
                    f"{differing([f'checksum {value & 0xFFFFFFFF:08x}' for value in column])}. With stage=1 "
                    f"gradients must arrive already averaged: wrap the model in DDP or pass stage=2."
                )


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PRIME = 1_000_003


def checksum(flat: Tensor) -> Tensor:
    """A 0-dim int64 hash of a 1-D real tensor's bits, order included: a weighted sum modulo 2^64."""
    integers = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, integers.numel(), 1 << 16):
        part = integers[start : start + (1 << 16)].long()
        weights = torch.arange(start + 1, start + 1 + part.numel(), device=flat.device)
        total += (part * (weights * _PRIME + 1)).sum()
    return total


def compare_values(gradients: Gradients, communicators: Communicators) -> None:
    """First step: raise on every rank where the parameters do not start from the same values."""
    _compare_housed(gradients, communicators)
    _compare_replicas(gradients, communicators)


def _compare_replicas(gradients: Gradients, communicators: Communicators) -> None:
    """Replicas that update a part each must have the same whole."""
    if not gradients.residents:
        return
    # Replicas name the first of them: other ranks may know nothing of their mesh, and are told all the same.
    rows = [
        torch.stack((torch.tensor(m.bucket.replicas.ranks[0], device="cpu"), checksum(m.flat).cpu()))
        if m.bucket.replicas is not None
        else torch.tensor([-1, 0], device="cpu")
        for m in gradients.residents
    ]
    table = communicators.host.exchange(torch.cat(rows))().view(communicators.world_size, -1, 2).tolist()
    for position, member in enumerate(gradients.residents):
        sums: dict[int, dict[int, int]] = {}
        for rank, row in enumerate(table):
            first, value = row[position]
            sums.setdefault(first, {})[rank] = value
        for values in sums.values():
            if len(set(values.values())) > 1:
                raise RuntimeError(
                    f"dist_asgd: parameter {member.name} does not start from the same values on "
                    f"{ranks_text(list(values))}, which hold the same part of it: checksums "
                    f"{', '.join(f'{value & 0xFFFFFFFF:08x}' for value in values.values())}. Seed these ranks alike "
                    f"before building the model, or broadcast its parameters from one of them."
                )


def _compare_housed(gradients: Gradients, communicators: Communicators) -> None:
    members = sorted(gradients.members, key=lambda m: m.index)
    if not members:
        return
    sums = torch.stack([checksum(m.bucket.flat[m.slot.offset : m.slot.stop]) for m in members]).cpu()
    table = communicators.host.exchange(torch.tensor([digest_of(sums.tolist())], device="cpu"))()
    if len(set(table[:, 0].tolist())) == 1:
        return
    columns = communicators.host.exchange(sums)()
    for position, member in enumerate(members):
        column = columns[:, position].tolist()
        if len(set(column)) > 1:
            raise RuntimeError(
                f"dist_asgd: parameter {member.name} does not start from the same values on all ranks: "
                f"{differing([f'checksum {value & 0xFFFFFFFF:08x}' for value in column])}. Seed every rank alike "
                f"before building the model, or broadcast its parameters from one rank."
            )
