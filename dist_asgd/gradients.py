"""Gradients as a step sees them, and stage 1: they arrive on the parameters, already averaged, and are checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from .agreement import NO_CLAIM, Agreement, Answer, Claim, Kind, differing, digest_of, ranks_text
from .buffers import Bucket, Member, flattened
from .comm import Communicators
from .facts import Facts, gradient_of
from .update.segments import UNSCALED
from .validation import check_gradient


def bits(indices: Iterable[int]) -> int:
    """A bit mask of ``indices``."""
    mask = 0
    for index in indices:
        mask |= 1 << index
    return mask


def indices_of(mask: int) -> set[int]:
    """The positions of the bits set in ``mask``."""
    return {i for i, bit in enumerate(reversed(f"{mask:b}")) if bit == "1"}


class Gradients(ABC):
    """Where a step's gradients come from."""

    reduced: bool
    # Whether every gradient of this step is real and lies in memory as its parameter does.
    direct = False

    def __init__(self, agreement: Agreement, communicators: Communicators) -> None:
        self.agreement = agreement
        self.communicators = communicators
        self.buckets: list[Bucket] = []
        # What reduced gradients are still to be multiplied by.
        self.scaling = UNSCALED
        self._indices: tuple[int, set[int]] = (0, set())

    def extend(self, buckets: Sequence[Bucket]) -> None:
        """Take all buckets, in reduce order; replaces what was given before."""
        self.buckets = list(buckets)

    @property
    def members(self) -> Iterator[Member]:
        """Every member of every bucket."""
        return (member for bucket in self.buckets for member in bucket.members)

    def indices_of(self, mask: int) -> set[int]:
        """``indices_of``, kept while the mask stays the same."""
        if self._indices[0] != mask:
            self._indices = (mask, indices_of(mask))
        return self._indices[1]

    @abstractmethod
    def settle(self, kind: Kind, claim: Claim = NO_CLAIM, problem: Exception | None = None) -> Answer:
        """Collective: agree on ``kind`` and ``claim``, gradients reduced or on the way; raises on all ranks or none."""

    @abstractmethod
    def ready(self, bucket: Bucket | None) -> None:
        """Wait until the gradient of ``bucket`` is reduced (None: of all); between ``settle`` and the update."""

    @abstractmethod
    def active(self, answer: Answer) -> set[int]:
        """Indices of the parameters that step, the same on all ranks; ``answer`` is what ``settle`` returned."""

    @abstractmethod
    def forget(self, set_to_none: bool) -> None:
        """``zero_grad``: drop gradients that are not in ``p.grad``, or set them to zeros."""


class Pattern:
    """Which parameters have a gradient, as long as that stays the same; and what such gradients should be."""

    def __init__(self, members: Iterable[Member], missing: Sequence[bool]) -> None:
        self.missing = missing
        self.members = [member for member, absent in zip(members, missing, strict=True) if not absent]
        self.mask = bits(member.index for member in self.members)
        self.facts = Facts(
            [member.slot.numel // (2 if member.dtype.is_complex else 1) for member in self.members],
            [member.strides for member in self.members],
            [member.dtype for member in self.members],
        )


class Arrived(Gradients):
    """Stage 1: every rank holds the same averaged gradients in ``p.grad``."""

    reduced = False

    def __init__(self, agreement: Agreement, communicators: Communicators) -> None:
        super().__init__(agreement, communicators)
        self._checked = communicators.world_size == 1
        self._params: list[Tensor] = []
        self._pattern = Pattern((), [])

    def extend(self, buckets: Sequence[Bucket]) -> None:
        super().extend(buckets)
        self._params = [member.param for member in self.members]
        self._pattern = Pattern((), [])

    def settle(self, kind: Kind, claim: Claim = NO_CLAIM, problem: Exception | None = None) -> Answer:
        if kind is not Kind.STEP:
            return self.agreement.confer(kind, claim, problem=problem)
        gradients = list(map(gradient_of, self._params))
        missing = [gradient is None for gradient in gradients]
        if missing != self._pattern.missing:
            self._pattern = Pattern(self.members, missing)
        self.direct = self._pattern.facts.hold_for([gradient for gradient in gradients if gradient is not None])
        if not self.direct:
            try:
                for member in self._pattern.members:
                    check_gradient(member, cast(Tensor, member.param.grad))
            except RuntimeError as error:
                problem = problem or error
        return self.agreement.confer(kind, claim, (self._pattern.mask, 0), problem)

    def ready(self, bucket: Bucket | None) -> None:
        """They have arrived."""

    def forget(self, set_to_none: bool) -> None:
        """All of them are in ``p.grad``."""

    def active(self, answer: Answer) -> set[int]:
        masks = answer.masks(0)
        if len(set(masks)) > 1:
            self._raise_missing(masks)
        present = self.indices_of(masks[0])
        if not self._checked and present:
            self._compare(present)
            self._checked = True
        return present

    def _raise_missing(self, masks: list[int]) -> None:
        for member in sorted(self.members, key=lambda m: m.index):
            have = [rank for rank, mask in enumerate(masks) if mask >> member.index & 1]
            if 0 < len(have) < len(masks):
                raise RuntimeError(
                    f"dist_asgd: parameter {member.name} has a gradient on {ranks_text(have)} of {len(masks)} only. "
                    f"With stage=1 gradients arrive already averaged, on all ranks or on none: wrap the model in "
                    f"DDP or pass stage=2."
                )

    def _compare(self, present: set[int]) -> None:
        """First step: the gradients' bits must be the same on every rank."""
        members = sorted((m for m in self.members if m.index in present), key=lambda m: m.index)
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
    members = sorted(gradients.members, key=lambda m: m.index)
    if not members:
        return
    sums = torch.stack([checksum(m.bucket.flat[m.slot.offset : m.slot.stop]) for m in members]).cpu()
    table = communicators.host.exchange(torch.tensor([digest_of(sums.tolist())]))()
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
