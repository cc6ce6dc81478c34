"""What many tensors are, looked at all at once: one pass in C (snapshots.c), or a few in Python without it.

address  where the elements of a tensor begin in memory
direct   of a gradient: a plain tensor that lies in memory as its parameter does, and as it reads (no lazy negation)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, compress, repeat
from operator import attrgetter, is_, is_not, itemgetter
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

VERSION = 1
_DTYPE = attrgetter("dtype")


@cache
def _compiled() -> ModuleType | None:
    """``snapshots.c``; None where it was not compiled, or where torch has no exchange table that it can read."""
    try:
        from . import _snapshots
    except ImportError:
        return None
    if _snapshots.VERSION != VERSION:
        return None
    try:
        _snapshots.describe([torch.empty(1, device="cpu")], Tensor.__dlpack_c_exchange_api__)
    except (AttributeError, ValueError, RuntimeError):
        return None
    return _snapshots


@dataclass(frozen=True, slots=True)
class GradientTable:
    """The gradients of some parameters, one entry for each.

    present    1 where there is a gradient, 0 where there is none
    addresses  of 8 bytes each, 0 where there is no gradient; None unless all gradients are direct
    """

    gradients: list[Tensor | None]
    present: bytes
    addresses: array[int] | None


NO_GRADIENTS = GradientTable([], b"", None)


class TensorSnapshot(ABC):
    """What some tensors were when they were taken down: dtype, device, shape, strides, address; of None, nothing."""

    @staticmethod
    def of(tensors: Sequence[Tensor | None]) -> TensorSnapshot:
        """What ``tensors`` are now."""
        module = _compiled()
        if module is not None:
            try:
                return _Records(module, tensors)
            except RuntimeError:  # tensors that DLPack does not know, on the meta device, say
                pass
        return _Lists(tensors)

    @abstractmethod
    def is_current(self) -> bool:
        """Whether all tensors are what and where they were."""

    @abstractmethod
    def gradients(self) -> GradientTable:
        """What ``.grad`` of each tensor holds, compared with what that tensor was."""


class _Records(TensorSnapshot):
    """In C."""

    def __init__(self, module: ModuleType, tensors: Sequence[Tensor | None]) -> None:
        self._module = module
        self._exchange = Tensor.__dlpack_c_exchange_api__
        self._tensors = list(tensors)
        self._described = module.describe(self._tensors, self._exchange)

    def is_current(self) -> bool:
        return bool(self._module.unchanged(self._tensors, self._described, self._exchange))

    def gradients(self) -> GradientTable:
        addresses = array("Q", bytes(8 * len(self._tensors)))
        gradients, present, direct = self._module.gradients(
            self._tensors, self._described, self._exchange, Tensor, Tensor.is_neg, addresses
        )
        return GradientTable(gradients, present, addresses if direct else None)


class _Lists(TensorSnapshot):
    """In Python, a list of each fact.

    For dense tensors the strides and the number of elements say the shape, dimensions of size 1 apart.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self._tensors = list(tensors)
        self._is_held = [tensor is not None for tensor in tensors]
        self._held = held = [tensor for tensor in tensors if tensor is not None]
        self._pointers = list(map(Tensor.data_ptr, held))
        self._strides = list(map(Tensor.stride, held))
        self._numels = list(map(Tensor.numel, held))
        self._dtypes = list(map(_DTYPE, held))

    def is_current(self) -> bool:
        held = self._held
        return (
            list(map(Tensor.data_ptr, held)) == self._pointers
            and list(map(Tensor.stride, held)) == self._strides
            and list(map(Tensor.numel, held)) == self._numels
            and list(map(_DTYPE, held)) == self._dtypes
        )

    def gradients(self) -> GradientTable:
        gradients = [None if tensor is None else tensor.grad for tensor in self._tensors]
        present = bytes(map(is_not, gradients, repeat(None)))
        found = list(compress(cast(list[Tensor], gradients), present))
        if not self._are_direct(found, list(compress(present, self._is_held))):
            return GradientTable(gradients, present, None)
        pointers = map(Tensor.data_ptr, found)
        return GradientTable(gradients, present, array("Q", [next(pointers) if there else 0 for there in present]))

    def _are_direct(self, found: list[Tensor], present: list[int]) -> bool:
        if not set(map(type, found)) <= {Tensor}:
            return False
        try:
            strides = list(map(Tensor.stride, found))
        except RuntimeError:  # sparse tensors have none
            return False
        return (
            strides == list(compress(self._strides, present))
            and list(map(Tensor.numel, found)) == list(compress(self._numels, present))
            and list(map(_DTYPE, found)) == list(compress(self._dtypes, present))
            and True not in map(Tensor.is_neg, found)
        )


class PublishedState:
    """Dicts of tensors by key, one for each of some owners, as they were published: the very objects."""

    def __init__(self, keys: tuple[str, ...], published: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        self._keys = keys
        self._owners = list(published)
        self._values = itemgetter(*keys)
        kept = [self._values(entries) for entries in published.values()]
        self._kept = list(chain.from_iterable(kept))
        self._flat = [one for owner, values in zip(self._owners, kept, strict=True) for one in (owner, *values)]

    def matches(self, shown: dict[Tensor, dict[str, Tensor]]) -> bool:
        """Whether ``shown`` has these objects."""
        module = _compiled()
        if module is not None and module.shows(shown, self._keys, self._flat):
            return True
        # In another order, or among others.
        try:
            values = list(chain.from_iterable(map(self._values, map(shown.__getitem__, self._owners))))
        except (KeyError, TypeError):
            return False
        return all(map(is_, values, self._kept))


class AddressTable:
    """Places in memory that tensors' addresses give: (which tensor, how many bytes past its start) each."""

    def __init__(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._pairs = list(pairs)
        self._flat = array("q", chain.from_iterable(pairs))

    def of(self, addresses: array[int]) -> array[int]:
        """The address of each place; 0 where that of its tensor is 0."""
        module = _compiled()
        if module is None:
            starts = ((addresses[index], start) for index, start in self._pairs)
            return array("Q", [address + start if address else 0 for address, start in starts])
        picked = array("Q", bytes(8 * len(self._pairs)))
        module.pick(addresses, self._flat, picked)
        return picked
