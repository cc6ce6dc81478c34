"""Gradients as a step reads them: the interface that stage 1 (``averaged.py``) and stage 2 (``reducer.py``) fulfil.

The optimizer asks for gradients in this order: ``agree`` (collective; opens every collective call), ``active`` (which
parameters step), ``wait_for`` (one state buffer after the other), ``end_step``.

bits        a bit mask over parameters, one bit for each index; ranks exchange such masks
misplaced   a gradient that lies on other placements than its DTensor, or one that this rank should have and has not
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor

from ..comm import Communicators
from ..comm.agreement import NO_FINGERPRINT, Agreement, Fingerprint
from ..comm.reports import CollectiveCall, RankReports
from ..placements import dtensor
from ..placements.presharded import PreshardedParam, PreshardedState
from ..storage.buffers import Bucket, BucketParam, ShardedParam, StateBuffer
from ..storage.memory_order import flattened
from ..storage.snapshots import NO_GRADIENTS
from ..update.segments import UNSCALED

# The calls that read gradients on the parameters, and so compare them between ranks.
READ_GRADIENTS = (CollectiveCall.STEP, CollectiveCall.CLIP_GRAD_NORM)
# The calls that leave gradients on the parameters as they are: another call follows, once the shards have changed.
REBUILDING = (CollectiveCall.ADOPT, CollectiveCall.UNFREEZE)


def multiply(gradients: Iterable[Tensor | None], factor: Tensor) -> None:
    """Multiply gradients in place by ``factor``, 0-dim on any device; entries that are None are skipped."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        if gradient is not None:
            by_kind.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (device, _), same_kind in by_kind.items():
        torch._foreach_mul_(same_kind, factor.to(device))


class Gradients(ABC):
    """The gradients of one optimizer: of parameters in buckets, and of presharded parameters, which arrive reduced.

    ``scaling`` holds the factors that reduced gradients still have to be multiplied by; the update applies them.
    ``table`` lists the gradients of bucket parameters that ``agree`` saw on the parameters, by parameter index; it is
    empty outside of a step, so that it keeps no gradient alive.
    ``counted_elsewhere`` has the parameters that the ranks of another mesh count in the global norm; None until the
    first norm is taken (``clip.py``).
    """

    def __init__(self, agreement: Agreement, communicators: Communicators) -> None:
        self.agreement = agreement
        self.communicators = communicators
        self.buckets: list[Bucket] = []
        self.presharded: list[PreshardedParam] = []
        self.presharded_states: list[PreshardedState] = []
        self.scaling = UNSCALED
        self.table = NO_GRADIENTS
        self.counted_elsewhere: frozenset[int] | None = None

    def extend(self, buckets: Sequence[Bucket], presharded: Sequence[PreshardedState]) -> None:
        """Take all buckets, in reduce order, and all presharded state; replaces what an earlier call gave."""
        self.buckets = list(buckets)
        self.presharded_states = list(presharded)
        self.presharded = [member for state_buffer in presharded for member in state_buffer.members]
        self.counted_elsewhere = None

    @property
    def in_flight_bytes(self) -> int:
        """The bytes of buffers for gradients in flight, which are kept between steps."""
        return 0

    @property
    def members(self) -> Iterator[BucketParam]:
        """Every parameter of every bucket."""
        return (member for bucket in self.buckets for member in bucket.members)

    # --- what the optimizer asks, in the order of a step ----------------------------------------------------

    @abstractmethod
    def agree(
        self, call: CollectiveCall, fingerprint: Fingerprint = NO_FINGERPRINT, problem: Exception | None = None
    ) -> RankReports:
        """Open a collective call: all ranks agree on ``call`` and ``fingerprint``, or all of them raise. Collective.

        Afterwards every gradient is reduced or in flight. ``problem`` is what is wrong on this rank; every rank raises
        it. Called at the beginning of every public call that is collective.
        """

    @abstractmethod
    def present(self, reports: RankReports) -> frozenset[int]:
        """The parameters that have a gradient, the same set on all ranks. ``reports`` is what ``agree`` returned.

        Collective where a presharded parameter's gradient is misplaced on all ranks: it is redistributed.
        """

    @abstractmethod
    def active(self, reports: RankReports) -> frozenset[int]:
        """The parameters that step, the same set on all ranks. ``reports`` is what ``agree`` returned."""

    def has_gradient(self, member: ShardedParam) -> bool:
        """Whether this rank has a gradient of ``member`` for the next step; others may have one. No communication."""
        return member.param.grad is not None

    @abstractmethod
    def wait_for(self, buffer: StateBuffer) -> None:
        """Wait until the gradient of ``buffer`` is reduced; called just before the update reads it."""

    @abstractmethod
    def end_step(self) -> None:
        """Wait until nothing is in flight any more, and let go of the gradients in ``table``."""

    @abstractmethod
    def clear(self, set_to_none: bool) -> None:
        """Drop the gradients that are not in ``p.grad``, or set them to zeros; called by ``zero_grad()``."""

    @abstractmethod
    def keep(self) -> None:
        """Let the next backward add to the gradients that a step has used; called by ``keep_gradients()``."""

    def no_sync(self) -> AbstractContextManager[None]:
        """Let backwards inside accumulate without communication; RuntimeError where this optimizer reduces nothing."""
        raise RuntimeError(
            "dist_asgd: no_sync() is for stage=2. With stage=1 gradients are averaged by DDP: use the no_sync() "
            "of the DistributedDataParallel module."
        )

    # --- uneven inputs (torch's Join) ---------------------------------------------------------------------

    def lend(self, reports: RankReports, value: Any) -> Any:
        """The first active rank's picklable ``value``, on all ranks. Collective; only called if ranks have joined."""
        lender = reports.first_active
        return self.communicators.host.exchange_objects(value if self.communicators.rank == lender else None)[lender]

    def end_join(self) -> None:
        """Forget which ranks have joined: called when all of them have, and when a step of one of them failed."""
        self.agreement.iterations = None

    # --- gradients on the parameters ------------------------------------------------------------------------

    @staticmethod
    def present_bits(members: Iterable[ShardedParam]) -> tuple[int, Exception | None]:
        """The bits of ``members`` that have a ``p.grad``, and what is wrong with the first such gradient, if any is."""
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

    def inspect_presharded(self, call: CollectiveCall) -> tuple[int, int, Exception | None]:
        """Look once at the gradients of presharded parameters; not collective. Called by ``agree``.

        Returns the bits of those that are present, the bits of those that ``align_presharded`` has to put right, and
        the first problem with one of them.
        """
        present, misplaced, problem = 0, 0, None
        for state_buffer in self.presharded_states:
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
        mask = (reports.union(0) & ~reports.common) | reports.union(1)
        concerned = [member for member in self.presharded if mask >> member.index & 1] if mask else []
        if concerned:
            masks, misplaced, names = reports.masks(0), reports.masks(1), self.agreement.names
            for member in concerned:
                member.align_gradient(ranks_with(masks, member), ranks_with(misplaced, member), names)

    def gradient_fragment(self, member: ShardedParam) -> Tensor:
        """The fragment of an active parameter's gradient that this rank updates with: ``(fragment_numel,)``, real."""
        start = member.fragment.param_start
        flat = flattened(cast(Tensor, member.gradient), member.strides)
        return flat[start : start + member.fragment.numel]

    # --- clipping and loss scaling --------------------------------------------------------------------------

    def pending_unscale(self, member: ShardedParam) -> Tensor | None:
        """The factor by which a reduced gradient has to be multiplied before its norm is taken, or None."""
        return None if member.bucket.reduced_gradient() is None else self.scaling.unscale

    @abstractmethod
    def apply_pending(self) -> None:
        """Multiply reduced gradients by a pending clip factor now, because another one is about to be computed."""

    def clip(self, factor: Tensor) -> None:
        """Multiply all gradients by ``factor``, 0-dim: at once on parameters, at the update if reduced here."""
        multiply([member.gradient for member in (*self.members, *self.presharded)], factor)

    @abstractmethod
    def unscale(self, inverse: Tensor) -> None:
        """Divide all gradients by a scaler's scale: at once on parameters, at the update if they are reduced here.

        ``inverse`` is the inverse of the scale, 0-dim.
        """

    @abstractmethod
    def held(self) -> list[Tensor]:
        """All gradients of which this rank holds elements: reduced shards, and tensors on the parameters."""

    def overflowed(self) -> Tensor:
        """1 if any gradient that this rank holds is not finite, else 0: ``(1,)`` float32 on the gradients' device.

        If they are on several, it is that of the first state buffer. Not collective; nobody waits for the device.
        """
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for gradient in self.held():
            if gradient.numel():
                by_kind.setdefault((gradient.device, gradient.dtype), []).append(gradient)
        found = torch.zeros(1, device=next(buffer.device for buffer in (*self.buckets, *self.presharded_states)))
        for same_kind in by_kind.values():
            largest = torch.stack(torch._foreach_norm(same_kind, torch.inf))
            found = torch.maximum(found, largest.isfinite().all().logical_not().to(found))
        return found


def check_gradient(member: ShardedParam, gradient: Tensor) -> None:
    """Raise RuntimeError unless ``gradient`` is dense and fits its parameter, which is unmoved or rebound."""
    if not member.is_rebound:
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


def ranks_with(masks: Sequence[int], member: ShardedParam) -> list[int]:
    """The ranks whose mask has the parameter's bit; ``masks`` holds one mask for each rank, in order."""
    return [rank for rank, mask in enumerate(masks) if mask >> member.index & 1]


def torn_problem(world_size: int) -> RuntimeError:
    """The error of calls after an exception or a signal has stopped the reduction of a bucket in the middle."""
    remedy = "Restart the job from its last checkpoint" if world_size > 1 else "Call zero_grad() and run backward again"
    return RuntimeError(
        f"dist_asgd: the reduction of a bucket was interrupted, and its gradients may be torn. {remedy}."
    )
