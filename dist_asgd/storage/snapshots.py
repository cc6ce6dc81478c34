"""Snapshots of many tensors: whether tensors, gradients and published state are still as they were at an earlier time.

Users can move, re-cast and replace parameters, gradients and state at any time, and kernels are given bare addresses.
So every step compares all of them first. One pass in C does that (snapshots.c), or a few passes in Python if the module
was not compiled. Nothing here communicates.

address  where the elements of a tensor begin in memory
direct   a gradient is direct if it is a plain tensor with the strides of its parameter, and its memory holds the values
         that it reads as (torch can negate lazily)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, compress, repeat
from operator import attrgetter, is_, is_not
from types import ModuleType
from typing import cast

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from .published import own_storage

VERSION = 3
_DTYPE = attrgetter("dtype")


@cache
def _compiled() -> ModuleType | None:
    """The module ``snapshots.c``; None if it was not compiled, or if torch has no exchange table that it can read."""
    try:
        from . import _snapshots
    except ImportError:
        return None
    if _snapshots.VERSION != VERSION:
        return None
    try:
        # One read shows whether torch has the table, in a version that the module knows.
        _snapshots.describe([torch.empty(1, device="cpu")], Tensor.__dlpack_c_exchange_api__)
    except (AttributeError, ValueError, RuntimeError):
        return None
    return _snapshots


def are_same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two lists hold the very same tensors in the same order; ``==`` would compare their elements."""
    module = _compiled()
    if module is not None and type(a) is list:
        return bool(module.same(a, b))
    return len(a) == len(b) and all(map(is_, a, b))


def unexpected_gradients(params: list[Tensor], expected: list[Tensor | None]) -> list[int]:
    """The positions, in order, at which ``p.grad`` is not the very object in ``expected``; None is no gradient.

    Called in every step of stage 2.
    """
    module = _compiled()
    if module is not None:
        return cast(list[int], module.unexpected(params, expected))
    return [i for i, (param, wanted) in enumerate(zip(params, expected, strict=True)) if param.grad is not wanted]


@dataclass(frozen=True, slots=True)
class GradientTable:
    """The gradients of some parameters, with one entry for each parameter in every field.

    gradients  ``p.grad``
    present    1 if there is a gradient, 0 if there is none
    addresses  the gradient's address as 8 bytes, 0 if there is none. None unless all gradients are direct
    """

    gradients: list[Tensor | None]
    present: bytes
    addresses: array[int] | None


NO_GRADIENTS = GradientTable([], b"", None)


class TensorSnapshot(ABC):
    """A snapshot of dtype, device, shape, strides and address of some tensors.

    Entries may be None, and are not compared then. A snapshot keeps its tensors alive.
    """

    @staticmethod
    def of(tensors: Sequence[Tensor | None]) -> TensorSnapshot:
        """Take a snapshot of ``tensors``."""
        module = _compiled()
        if module is not None:
            try:
                return _Records(module, tensors)
            except RuntimeError:
                # DLPack does not know tensors on the meta device, for example.
                pass
        return _Lists(tensors)

    @abstractmethod
    def is_current(self) -> bool:
        """Whether all tensors are as they were when the snapshot was taken."""

    @abstractmethod
    def gradients(self) -> GradientTable:
        """The ``.grad`` of each tensor; it is direct if it is compatible with the tensor as it was in the snapshot."""


class _Records(TensorSnapshot):
    """A snapshot as the records that snapshots.c makes and compares."""

    def __init__(self, module: ModuleType, tensors: Sequence[Tensor | None]) -> None:
        self._module = module
        self._exchange = Tensor.__dlpack_c_exchange_api__
        self._tensors = list(tensors)
        self._described = module.describe(self._tensors, self._exchange)

    def is_current(self) -> bool:
        return bool(self._module.unchanged(self._tensors, self._described, self._exchange))

    def gradients(self) -> GradientTable:
        # A new array each time: the caller keeps it for the whole step.
        addresses = array("Q", bytes(8 * len(self._tensors)))
        gradients, present, direct = self._module.gradients(
            self._tensors, self._described, self._exchange, Tensor, Tensor.is_neg, addresses
        )
        return GradientTable(gradients, present, addresses if direct else None)


class _Lists(TensorSnapshot):
    """A snapshot as Python lists, one for each property, which are compared list by list.

    The shape is not among them: strides and number of elements determine the shape of a dense tensor, except for
    dimensions of size 1, which do not matter.
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
        # A pass of map over one method is several times as fast as a loop over tensors.
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
        held = list(compress(cast(list[Tensor], gradients), present))
        if not self._are_direct(held, list(compress(present, self._is_held))):
            return GradientTable(gradients, present, None)
        pointers = map(Tensor.data_ptr, held)
        return GradientTable(gradients, present, array("Q", [next(pointers) if there else 0 for there in present]))

    def _are_direct(self, gradients: list[Tensor], present: list[int]) -> bool:
        """Whether ``gradients``, those of the held tensors with a 1 in ``present``, are all direct."""
        if not set(map(type, gradients)) <= {Tensor}:
            return False
        try:
            strides = list(map(Tensor.stride, gradients))
        except RuntimeError:
            # Sparse tensors have no strides.
            return False
        return (
            strides == list(compress(self._strides, present))
            and list(map(Tensor.numel, gradients)) == list(compress(self._numels, present))
            and list(map(_DTYPE, gradients)) == list(compress(self._dtypes, present))
            and True not in map(Tensor.is_neg, gradients)
        )


class PublishedState:
    """A snapshot of ``optimizer.state``: the tensor objects that it had for each parameter and key.

    Users can replace entries of ``state``; a replaced tensor would not be the one that steps update.
    """

    def __init__(self, keys: tuple[str, ...], published: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        self._keys = keys
        self._owners = list(published)
        kept = [self._values(entries) for entries in published.values()]
        self._kept = list(chain.from_iterable(kept))
        self._flat = [one for owner, values in zip(self._owners, kept, strict=True) for one in (owner, *values)]

    def _values(self, entry: Mapping[str, Tensor]) -> list[Tensor]:
        # Past the methods of the entry, which would take this for a user who reads the average.
        return [dict.__getitem__(cast(dict[str, Tensor], entry), key) for key in self._keys]

    def matches(self, state: dict[Tensor, dict[str, Tensor]]) -> bool:
        """Whether ``state``, ``optimizer.state`` as it is now, still has these very objects; it may have more."""
        # By identity: comparing values would read every scalar, and a replaced tensor may be equal.
        module = _compiled()
        if module is not None and module.shows(state, self._keys, self._flat):
            return True
        # The C function compares entries in order. In another order, or among others, they are looked up.
        try:
            values = list(chain.from_iterable(map(self._values, map(state.__getitem__, self._owners))))
        except (KeyError, TypeError):
            return False
        return all(map(is_, values, self._kept))


class PublishedAverages:
    """The averages that ``optimizer.state`` shows: plain tensors, each over memory of a state buffer (its *home*).

    Users can move such a tensor: ``share_memory_()``, a torch.multiprocessing queue and ``ax.data = ...`` do so. Steps
    read and write homes, which no user can move, and so never an address that has gone; but the moved tensor would not
    show the state any more.
    """

    def __init__(self, shown: Sequence[Tensor]) -> None:
        self._shown = list(shown)
        # Tensors of the same memory that nobody else has, in order to tell where home is.
        self._homes = [own_storage(tensor) for tensor in shown]
        # A tensor that only Python refers to takes torch three times as long to read.
        self._references = _references(self._shown)
        self._snapshot = TensorSnapshot.of(self._shown)

    @torch.no_grad()
    def follow(self, name_of: Callable[[int], str]) -> None:
        """Copy the values of moved tensors home, and make the tensors show that memory again.

        Called before each use of the averages; no communication. RuntimeError if a moved tensor has
        another shape, dtype or device; then none is followed. ``name_of`` names the parameter of an index, for it.
        """
        if self._snapshot.is_current():
            return
        pairs = list(zip(self._shown, self._homes, strict=True))
        for index, (shown, home) in enumerate(pairs):
            wanted, got = ((t.shape, t.dtype, t.device) for t in (home, shown))
            if wanted != got:
                raise RuntimeError(
                    f"dist_asgd: ax of parameter {name_of(index)} was replaced in place: it was of shape "
                    f"{tuple(home.shape)}, {home.dtype} on {home.device}, and is of shape {tuple(shown.shape)}, "
                    f"{shown.dtype} on {shown.device}. Change its values only (ax.copy_()), or call load_state_dict()."
                )
        moved = [(s, h) for s, h in pairs if s.data_ptr() != h.data_ptr() or s.stride() != h.stride()]
        # Copies first: two averages may have changed places.
        for (_, home), values in zip(moved, [shown.clone() for shown, _ in moved], strict=True):
            home.copy_(values)
        for shown, home in moved:
            # The tensor object stays the one that the user has. Its storage must not be that of the home.
            shown.data = own_storage(home)
        self._snapshot = TensorSnapshot.of(self._shown)


def _references(tensors: Sequence[Tensor]) -> list[object]:
    """An object of torch's for each tensor, which refers to it; none for tensors that DLPack does not know."""
    try:
        return [to_dlpack(tensor) for tensor in tensors]
    except (BufferError, RuntimeError):
        return []


def mark_written(tensors: Iterable[Tensor]) -> None:
    """Count a write to each tensor in its version, as an operator that writes in place does.

    Called before the flat memory under them is written, of which autograd sees nothing. A backward that needs a value
    from before the write then raises torch's own error, instead of computing with the new value.
    """
    torch.autograd.graph.increment_version(tensors)


class AddressTable:
    """Places in memory relative to tensors whose addresses change, as (index of the tensor, offset in bytes) pairs.

    A plan keeps the table, and each step fills in the addresses of its gradients.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._pairs = list(pairs)
        self._flat = array("q", chain.from_iterable(pairs))

    def of(self, addresses: array[int]) -> array[int]:
        """The address of each place, given ``addresses`` of all tensors; 0 if its tensor has the address 0."""
        module = _compiled()
        if module is None:
            offsets = ((addresses[index], offset) for index, offset in self._pairs)
            return array("Q", [address + offset if address else 0 for address, offset in offsets])
        places = array("Q", bytes(8 * len(self._pairs)))
        module.pick(addresses, self._flat, places)
        return places
