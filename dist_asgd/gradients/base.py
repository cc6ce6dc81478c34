"""Gradients as a step sees them, and stage 1: they arrive on the parameters, already averaged, and are checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from ..comm import Communicators
from ..comm.agreement import NO_FINGERPRINT, Agreement, CollectiveCall, Fingerprint, RankReports
from ..placements import dtensor
from ..placements.presharded import PreshardedParam, PreshardedState
from ..storage.buffers import Bucket, BucketParam, ShardedParam, StateBuffer
from ..storage.memory_order import flattened
from ..storage.snapshots import NO_GRADIENTS, GradientTable
from ..update.segments import UNSCALED


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
        self.presharded: list[PreshardedParam] = []
        self._presharded_states: list[PreshardedState] = []
        # What reduced gradients are still to be multiplied by.
        self.scaling = UNSCALED
        self._seen = NO_GRADIENTS
        self._indices: tuple[int, frozenset[int]] = (0, frozenset())

    def extend(self, buckets: Sequence[Bucket], presharded: Sequence[PreshardedState]) -> None:
        """Take all buckets, in reduce order, and what is in none; replaces what was given before."""
        self.buckets = list(buckets)
        self._presharded_states = list(presharded)
        self.presharded = [member for state_buffer in presharded for member in state_buffer.members]

    @property
    def members(self) -> Iterator[BucketParam]:
        """Every member of every bucket."""
        return (member for bucket in self.buckets for member in bucket.members)

    def take_table(self) -> GradientTable:
        """The gradients that ``agree`` saw on parameters in buckets, by parameter index; not kept here any longer."""
        seen, self._seen = self._seen, NO_GRADIENTS
        return seen

    def indices_of(self, mask: int) -> frozenset[int]:
        """``indices_of``, kept while the mask stays the same."""
        if self._indices[0] != mask:
            self._indices = (mask, indices_of(mask))
        return self._indices[1]

    @staticmethod
    def standing(members: Iterable[ShardedParam]) -> tuple[int, Exception | None]:
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
    def about_gradients(call: CollectiveCall) -> bool:
        """Whether a call of this kind reads gradients where they stand."""
        return call in (CollectiveCall.STEP, CollectiveCall.CLIP_GRAD_NORM)

    def inspect_presharded(self, call: CollectiveCall) -> tuple[int, int, Exception | None]:
        """Look once at the gradients of presharded parameters; no communication. ``agree`` calls it if it reads them.

        Returns the bits of those that are present, the bits of those that ``align_presharded`` has to put right, and
        the first problem with one of them.
        """
        present, misplaced, problem = 0, 0, None
        for state_buffer in self._presharded_states:
            # A step begins with ``check_unchanged``, which has followed the local tensors; clipping does not.
            report = state_buffer.inspect_gradients(was_followed=call is CollectiveCall.STEP)
            present |= report.present
            misplaced |= report.misplaced
            for member, gradient in report.doubtful:
                try:
                    check_gradient(member, gradient)
                except RuntimeError as error:
                    problem = problem or error
        return present, misplaced, problem

    def align_presharded(self, reports: RankReports) -> None:
        """Put the gradients of presharded parameters right, or raise on all ranks alike.

        Called on all ranks after ``agree``. Collective on the meshes of misplaced gradients; where every rank has the
        same gradients, none of them misplaced, there is nothing to do.
        """
        masks, misplaced = reports.masks(0), reports.masks(1)
        some, all_, unplaced = 0, masks[0], 0
        for mask, other in zip(masks, misplaced, strict=True):
            some, all_, unplaced = some | mask, all_ & mask, unplaced | other
        concerned = (some & ~all_) | unplaced
        for member in self.presharded if concerned else ():
            if concerned >> member.index & 1:
                member.align_gradient(_ranks_in(masks, member), _ranks_in(misplaced, member), len(masks))

    def gradient_fragment(self, member: ShardedParam) -> Tensor:
        """The part of an active member's gradient that this rank updates with, 1-D and real."""
        start = member.fragment.param_start
        flat = flattened(cast(Tensor, member.gradient), member.strides)
        return flat[start : start + member.fragment.numel]

    def pending_unscale(self, member: ShardedParam) -> Tensor | None:
        """What the member's gradient is still to be multiplied by, before clipping."""
        return None if member.bucket.reduced_gradient() is None else self.scaling.unscale

    @abstractmethod
    def apply_clip(self) -> None:
        """Multiply by a pending factor of clipping, because another is about to come."""

    def clip(self, factor: Tensor) -> None:
        """Multiply all gradients by ``factor``, 0-dim; those that are reduced at the next update."""
        multiply([member.gradient for member in (*self.members, *self.presharded)], factor)

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
    def agree(
        self, call: CollectiveCall, fingerprint: Fingerprint = NO_FINGERPRINT, problem: Exception | None = None
    ) -> RankReports:
        """Collective: agree on ``kind`` and ``fingerprint``, gradients reduced or on the way; raises on all ranks or none."""

    @abstractmethod
    def present(self, reports: RankReports) -> frozenset[int]:
        """Indices of the parameters that have a gradient, the same on all ranks; ``reports`` as for ``active``."""

    @abstractmethod
    def wait_for(self, bucket: StateBuffer | None) -> None:
        """Wait until the gradient of ``bucket`` is reduced (None: of all); between ``agree`` and the update."""

    @abstractmethod
    def active(self, reports: RankReports) -> frozenset[int]:
        """Indices of the parameters that step, the same on all ranks; ``reports`` is what ``agree`` returned."""

    @abstractmethod
    def clear(self, set_to_none: bool) -> None:
        """``zero_grad``: drop gradients that are not in ``p.grad``, or set them to zeros."""


def check_gradient(member: ShardedParam, gradient: Tensor) -> None:
    """RuntimeError unless the parameter is at home and ``gradient`` is dense and has its shape, dtype and device."""
    member.check_unmoved()
    name, param = member.name, member.param
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"dist_asgd: parameter {name} has a sparse gradient ({gradient.layout}), which ASGD does not support. "
            f"Use sparse=False in the layer that makes it."
        )
    misplaced = dtensor.gradient_problem(name, param, gradient)
    if misplaced is not None:
        raise RuntimeError(f"dist_asgd: {misplaced}")
    for what, wanted, got in (
        ("shape", tuple(param.shape), tuple(gradient.shape)),
        ("dtype", param.dtype, gradient.dtype),
        ("device", param.device, gradient.device),
    ):
        if wanted != got:
            raise RuntimeError(
                f"dist_asgd: the gradient of parameter {name} has {what} {got}, the parameter has {wanted}. "
                f"Give the gradient the parameter's {what}."
            )


def _ranks_in(masks: Sequence[int], member: ShardedParam) -> list[int]:
    """The ranks whose mask has the member's bit."""
    return [rank for rank, mask in enumerate(masks) if mask >> member.index & 1]
