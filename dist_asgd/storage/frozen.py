"""Frozen parameters: those that get no gradient, and that have no state.

They lie where they are, so that users may move, re-cast, share and replace their memory. They keep their index and
their bit in masks beside the other members, and nothing is held or sent for them. ``state.py`` takes one in as soon as
it requires gradients, has one, or gets the state of a step: it has a bucket or a state buffer from then on, also if it
is frozen again later. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor

from .buffers import ShardedParam, StateBuffer
from .layout import Fragment, Slot, lay_out
from .precision import Precision

REQUIRES_GRAD, _GRAD = attrgetter("requires_grad"), attrgetter("grad")


def is_held(param: Tensor, state: Mapping[Any, Mapping[str, Any]]) -> bool:
    """Whether ``param`` is to have a bucket or a state buffer: it is trained, or has an average in ``state``."""
    return param.requires_grad or "ax" in state.get(param, ())


def any_trained(params: Sequence[Tensor]) -> bool:
    """Whether any of ``params`` requires gradients or has one: torch's optimizer steps those. Called in every step."""
    # One pass of map over each attribute: there may be thousands of frozen parameters beside a few trained ones.
    return True in map(REQUIRES_GRAD, params) or any(map(is_not, map(_GRAD, params), repeat(None)))


class FrozenParam(ShardedParam):
    """A frozen parameter. Its fragment is empty, whatever happens to its memory."""

    __slots__ = ()

    def __init__(self, param: Tensor, name: str, index: int, bucket: FrozenBuffer) -> None:
        super().__init__(param, name, index, bucket, Slot(0, 0), Fragment(0, 0, 0), ())

    @property
    def is_trained(self) -> bool:
        """Whether the parameter requires gradients now, or has one: it has to be taken in then."""
        return self.param.requires_grad or self.param.grad is not None

    @property
    def is_unmoved(self) -> bool:
        return True

    @property
    def dtype(self) -> torch.dtype:
        return self.param.dtype

    @property
    def gradient(self) -> Tensor | None:
        return None

    @property
    def rng_offset(self) -> int:
        return 0

    @property
    def norm_owner(self) -> int:
        return 0

    def param_range(self, start: int, stop: int) -> Tensor:
        return self.bucket.average[start:stop]

    def fragment_of(self, whole: Tensor) -> Tensor:
        return self.bucket.average[:0]

    def state_entry(self, fragment: Tensor) -> Tensor:
        return fragment


class FrozenBuffer(StateBuffer):
    """Stands for the bucket of all frozen parameters of one group. No step, gather or load has anything to do in it."""

    members: list[FrozenParam]

    def __init__(self, group_index: int) -> None:
        super().__init__(lay_out([], 4, 1), torch.empty(0, dtype=torch.float32, device="cpu"), group_index, Precision())
        self.members = []
