"""What users see in ``p.grad`` in stage 2: ``PublishedGradients`` puts it there, and answers those who read it.

unsent     this rank's own gradient of a parameter, whole, that has not been sent with its bucket
published  a parameter is published while its ``p.grad`` is the ``GradientTensor`` that it has here. From the end of a
           backward on all are, so that every rank has the same list; during a backward, and inside ``no_sync()``,
           ``p.grad`` is the unsent gradient, an ordinary tensor
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..comm import public_call
from ..comm.masks import indices_in
from ..comm.reports import CollectiveCall
from ..storage.buffers import BucketParam
from ..storage.snapshots import unexpected_gradients
from . import clip
from .gradient_tensor import GradientTensor

if TYPE_CHECKING:
    from .reducer import Reducer


class PublishedGradients:
    """The ``GradientTensor`` of every parameter in the buckets of one reducer; it is a ``GradientReader`` for them.

    ``now`` has the parameters that are published now, ``cleared`` (bits) those whose gradient a user took out of
    ``p.grad``.
    """

    def __init__(self, reducer: Reducer) -> None:
        # Weak, because the reducer keeps this object: a deleted optimizer must be freed at once.
        self._weak_reducer = weakref.ref(reducer)
        self._members: dict[int, BucketParam] = {}
        self._tensors: dict[int, GradientTensor] = {}
        # A deleted optimizer leaves nothing of its own on the parameters.
        self._params: dict[int, weakref.ref[Tensor]] = {}
        weakref.finalize(self, _take_back, self._tensors, self._params).atexit = False
        # The parameters that are published, and those that the end of a backward will publish.
        self.now: set[int] = set()
        self._unpublished: set[int] = set()
        # All members in order: their indices, the place of each, their parameters, and what ``p.grad`` is expected to
        # be: the tensor of a published one, else None. One pass in C finds the others, of which there are few.
        self._indices: list[int] = []
        self._place_of: dict[int, int] = {}
        self._ordered_params: list[Tensor] = []
        self._expected: list[Tensor | None] = []
        # The set that ``match`` has last made ``now`` equal to; None if ``now`` has changed since.
        self._matched: frozenset[int] | None = None
        # The published ones that may have an unsent gradient behind them.
        self._with_unsent: set[int] = set()
        # Norms by order and index, each with the version that its bucket's gradient had: a user's write bumps that.
        self._norms: dict[float, dict[int, tuple[int, Tensor]]] = {}
        self.cleared = 0

    @property
    def _reducer(self) -> Reducer:
        return cast("Reducer", self._weak_reducer())

    def extend(self, members: Iterable[BucketParam], hooked: set[int]) -> None:
        """Take all members of all buckets; the end of a backward publishes those in ``hooked``."""
        members = list(members)
        for index in self._members.keys() - {member.index for member in members}:
            del self._members[index], self._tensors[index], self._params[index]
        for member in members:
            if self._members.get(member.index) is not member:
                # A tensor that an optimizer before this one has left is no gradient.
                if isinstance(member.param.grad, GradientTensor):
                    member.param.grad = None
                self._members[member.index] = member
                self._params[member.index] = weakref.ref(member.param)
                self._tensors[member.index] = GradientTensor(member.param, member.index, weakref.ref(self))
        self._unpublished = hooked - self.now
        self._indices = list(self._members)
        self._place_of = {index: place for place, index in enumerate(self._indices)}
        self._ordered_params = [member.param for member in self._members.values()]
        self._expected = [self._tensors[index] if index in self.now else None for index in self._indices]
        self._with_unsent = set(self._indices)
        self._matched = None

    # --- what is in p.grad ----------------------------------------------------------------------------------

    def unsent(self, member: BucketParam) -> Tensor | None:
        """This rank's gradient of ``member`` that is not sent yet, in ``p.grad`` or behind it."""
        gradient = member.param.grad
        return gradient.unsent if isinstance(gradient, GradientTensor) else gradient

    def publish(self, member: BucketParam, *, sent: bool = False) -> None:
        """Put the ``GradientTensor`` of ``member`` into ``p.grad``; unless ``sent`` it keeps what was there."""
        tensor, gradient = self._tensors[member.index], member.param.grad
        if gradient is not tensor:
            self._with_unsent.add(member.index)
            # First, so that an interruption between the two lines loses no gradient.
            tensor.unsent = gradient.unsent if isinstance(gradient, GradientTensor) else gradient
            try:
                member.param.grad = tensor
            except (RuntimeError, TypeError):
                # The parameter was converted since, and the next call takes it and its gradient as they are.
                tensor.unsent = None
                return
        if sent:
            tensor.unsent = None
            self._with_unsent.discard(member.index)
        # Before ``now`` has it, and further below after: an interruption must not hide what users clear.
        self._expected[self._place_of[member.index]] = tensor
        self.now.add(member.index)
        self._matched = None
        self._unpublished.discard(member.index)

    def publish_all(self, busy: set[int]) -> None:
        """Publish all but the ``busy`` ones, on which another thread is at work; called at the end of a backward."""
        for index in self._unpublished - busy:
            self.publish(self._members[index])

    def withdraw(self, index: int) -> bool:
        """Put the unsent gradient of a parameter back into ``p.grad``, for a backward that will add to it.

        Returns whether a user has taken the published one away, which says that what was reduced is to be forgotten.
        """
        param = self._members[index].param
        gradient = param.grad
        taken_away = index in self.now
        # Whatever ``now`` says, after an interruption perhaps: backward must not add to a published gradient.
        if isinstance(gradient, GradientTensor):
            unsent = gradient.unsent
            # module.to() may have converted the parameter meanwhile.
            param.grad = None if unsent is None else unsent.to(param.device, param.dtype)
            gradient.unsent = None
            taken_away &= not gradient.belongs_to(index, self)
        self.now.discard(index)
        self._matched = None
        self._expected[self._place_of[index]] = None
        self._unpublished.add(index)
        return taken_away

    def withdraw_all(self) -> None:
        """Put all unsent gradients back into ``p.grad``."""
        for index in list(self.now):
            self.withdraw(index)

    def discard_all(self, set_to_none: bool) -> None:
        """Discard unsent gradients that are published; take the published ones out of ``p.grad``, or leave zeros."""
        self.cleared = 0
        for index in self.now:
            tensor, param = self._tensors[index], self._members[index].param
            if not set_to_none and tensor.unsent is not None:
                tensor.unsent.zero_()
            elif set_to_none:
                tensor.unsent = None
                if isinstance(param.grad, GradientTensor):
                    param.grad = None
        if set_to_none:
            self._unpublished |= self.now
            self.now = set()
            self._matched = None
            self._expected = [None] * len(self._expected)
            self._with_unsent.clear()

    def scan(self) -> tuple[list[tuple[BucketParam, Tensor]], list[int]]:
        """The members that have an unsent gradient, each with it, and the indices of those that users have cleared."""
        unsent, cleared = [], []
        places = set(unexpected_gradients(self._ordered_params, self._expected))
        places.update(self._place_of[index] for index in self._with_unsent)
        for place in sorted(places):
            index = self._indices[place]
            member = self._members[index]
            gradient = member.param.grad
            if gradient is None:
                if index in self.now:
                    cleared.append(index)
            elif not isinstance(gradient, GradientTensor):
                unsent.append((member, gradient))
            elif gradient.unsent is not None:
                unsent.append((member, gradient.unsent))
        for index in cleared:
            self.withdraw(index)
        return unsent, cleared

    def match(self, present: frozenset[int]) -> None:
        """Publish the parameters in ``present``, which have a gradient on some rank, and no other."""
        if present is self._matched:
            return
        for index in self.now - present:
            self.withdraw(index)
        for index in present - self.now:
            # Hooks on it may be running in another thread, which withdraws and publishes by itself.
            if index in self._members and self._members[index].param.grad is None:
                self.publish(self._members[index])
        if self.now == self._members.keys() & present:
            self._matched = present

    def compare_cleared(self) -> None:
        """Raise on every rank if users have not cleared the same gradients on all. Collective, for all in one call."""
        cleared, self.cleared = self.cleared, 0
        agreement = self._reducer.agreement
        agreement.cleared = False
        reports = agreement.exchange(CollectiveCall.GRADIENT, masks=(cleared, 0))
        differing = reports.union(0) & ~reports.common
        if differing:
            index = min(indices_in(differing))
            ranks = [rank for rank, mask in enumerate(reports.masks(0)) if mask >> index & 1]
            names = agreement.names
            raise RuntimeError(
                f"dist_asgd: the p.grad of parameter {self._members[index].name} was taken away after its backward on "
                f"{names.describe(ranks)} of {names.total} only. Clear gradients on every rank alike: "
                f"with optimizer.zero_grad(), or p.grad = None for the same parameters."
            )

    def forget_norms(self) -> None:
        """Forget the norms; called when gradients are about to be written in a way that bumps no version."""
        self._norms.clear()

    # --- GradientReader -------------------------------------------------------------------------------------

    @public_call
    @torch.no_grad()
    def fragments(self, indices: Sequence[int]) -> list[Tensor]:
        """See ``GradientReader``. Collective if a backward ran since ranks last agreed."""
        self._reducer.settle()
        # Operators on a GradientTensor run below autograd's bookkeeping, and bump no version.
        self.forget_norms()
        return [self._fragment(self._members[index]) for index in indices]

    def _fragment(self, member: BucketParam) -> Tensor:
        reals = member.bucket.gradient_shard()[member.fragment.start : member.fragment.stop]
        return torch.view_as_complex(reals.view(-1, 2)) if member.dtype.is_complex else reals

    def fragment_of(self, index: int, whole: Tensor) -> Tensor:
        """See ``GradientReader``."""
        return self._members[index].fragment_of(whole)

    @public_call
    @torch.no_grad()
    def norm(self, index: int, norm_type: float) -> Tensor:
        """See ``GradientReader``. Not collective if norms of this type are known and the gradient has not changed."""
        shard = self._members[index].bucket.gradient_shard()
        version, norm = self._norms.get(norm_type, {}).get(index, (-1, shard))
        # Pending factors are a change that has yet to be written.
        reducer = self._reducer
        if version != shard._version or reducer.backward_since_agree or any(f is not None for f in reducer.scaling):
            norm = self._compute_norms(norm_type)[index][1]
        return norm

    def _compute_norms(self, norm_type: float) -> dict[int, tuple[int, Tensor]]:
        reducer = self._reducer
        present = reducer.settle(always=True)
        members = sorted((m for m in reducer.members if m.index in present), key=lambda m: m.index)
        found: dict[int, Tensor] = {}
        if members:
            norms = clip.param_norms(reducer, members, norm_type).unbind()
            found = dict(zip((m.index for m in members), norms, strict=True))
        for index, member in self._members.items():
            if index not in found:
                found[index] = torch.zeros((), dtype=torch.float64, device=member.bucket.device)
        self._norms[norm_type] = {
            index: (member.bucket.gradient_shard()._version, found[index]) for index, member in self._members.items()
        }
        return self._norms[norm_type]

    @public_call
    @torch.no_grad()
    def any_rank(self, flag: Tensor) -> Tensor:
        """See ``GradientReader``."""
        # Announced, so that a rank in another call is an error and not a wait.
        self._reducer.settle(always=True)
        return self._reducer.communicators.on(flag.device).reduce_scalars(flag.reshape(1).clone(), "max")


def _take_back(tensors: dict[int, GradientTensor], params: dict[int, weakref.ref[Tensor]]) -> None:
    """Leave unsent gradients in ``p.grad``, and None in the place of reduced ones, whose shards are gone."""
    for index, tensor in tensors.items():
        param = params[index]()
        if param is not None and param.grad is tensor:
            param.grad = tensor.unsent
