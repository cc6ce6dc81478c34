"""From which parameters the entries of ``model.state_dict()`` come: hooks may rename, cast, split, fuse or drop them.

An export puts averages in the place of parameters, and must know where they went. ``Provenance`` watches the operators
that run while the state dict is made. ``export_averaged`` uses it, and so does saving, if an entry is no tensor of the
model itself.

root      a parameter of the optimizer
source    a root that an entry has values of
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

Geometry = tuple[torch.Size, tuple[int, ...], int, torch.dtype]
"""Shape, strides, storage offset and dtype of a tensor."""
# Operators that give every value of their input, at its place.
_COPIES = {
    torch.ops.aten._to_copy.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.lift_fresh_copy.default,
}


@dataclass(frozen=True, slots=True)
class Region:
    """A view of a root: its elements by shape and strides, from ``offset`` on, counted from the root's first one."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def fits(self, shape: tuple[int, ...], root_shape: tuple[int, ...]) -> bool:
        """Whether it is a view of ``shape`` that lies in a root of ``root_shape``."""
        if self.shape != shape or len(self.strides) != len(shape):
            return False
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return 0 in shape or self.offset + last < math.prod(root_shape)

    def of(self, whole: Tensor) -> Tensor:
        """The same view of ``whole``, which has the strides of the root."""
        return whole.as_strided(self.shape, self.strides, whole.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class Source:
    """What an entry has of the roots, which are given by their number.

    Attributes:
        roots: all of which it has values; more than one if it is fused.
        whole: it is the only root, as it is, except for its dtype, strides and device.
        region: it is a view of a part of the only root.
    """

    roots: frozenset[int]
    whole: bool = False
    region: Region | None = None

    @property
    def is_computed(self) -> bool:
        """Whether only the hooks know how its values follow from those of the roots."""
        return bool(self.roots) and not self.whole and self.region is None


NO_SOURCE = Source(frozenset())


class Provenance(TorchDispatchMode):
    """Inside the context, remembers of every tensor that operators make which roots its values come from.

    Tensors are recognised by their storages, so everything made inside is kept until the object is dropped.
    """

    def __init__(self, roots: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._roots = roots
        self._made: dict[int, set[int]] = {}
        # Whole copies of a root by storage, as long as nothing is written to them.
        self._copies: dict[int, tuple[int, Geometry]] = {}
        self._kept: list[Tensor] = []

    @cached_property
    def _root_at(self) -> dict[int, list[int]]:
        """The numbers of the roots in each storage. Made at the first operator: most state dicts need none."""
        found: dict[int, list[int]] = {}
        for number, root in enumerate(self._roots):
            for storage, _ in _storages(root):
                found.setdefault(storage, []).append(number)
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        roots = {root for value in inputs for root in self._roots_of(value)}
        written = [value for value in _written(func, args, kwargs or {}) if isinstance(value, Tensor)]
        outputs = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        for value in written:
            for storage, _ in _storages(value):
                self._copies.pop(storage, None)
        for value in (*outputs, *written) if roots else ():
            self._kept.append(value)
            for storage, _ in _storages(value):
                if storage not in self._root_at:
                    self._made.setdefault(storage, set()).update(roots)
        if roots and func in _COPIES:
            self._note_copy(outputs[0], inputs[0])
        elif roots and func is torch.ops.aten.copy_.default and inputs[0].shape == inputs[1].shape:
            self._note_copy(inputs[0], inputs[1])
        return result

    def _note_copy(self, copy: Tensor, origin: Tensor) -> None:
        root = self._whole_root(origin)
        # A value that is rounded twice is not the rounded value.
        if root is not None and origin.dtype in (self._roots[root].dtype, copy.dtype):
            for storage, _ in _storages(copy):
                if storage not in self._root_at:
                    self._copies[storage] = (root, _geometry(copy))

    def _roots_of(self, value: Tensor) -> set[int]:
        found: set[int] = set()
        for storage, inner in _storages(value):
            found |= self._made.get(storage, set())
            for number in self._root_at.get(storage, ()):
                root = next((r for s, r in _storages(self._roots[number]) if s == storage), None)
                if root is not None and _overlap(inner, root):
                    found.add(number)
        return found

    def _whole_root(self, value: Tensor) -> int | None:
        """The root that ``value`` is, or is a copy of; None if there is none."""
        for storage, _ in _storages(value):
            for number in self._root_at.get(storage, ()):
                root = self._roots[number]
                if value is root or (type(value) is _plain_type(root) and _geometry(value) == _geometry(root)):
                    return number
            if storage in self._copies:
                number, geometry = self._copies[storage]
                return number if geometry == _geometry(value) else None
        return None

    def source_of(self, value: Any) -> Source:
        """What ``value``, an entry of the state dict, has of the roots."""
        if not isinstance(value, Tensor):
            return NO_SOURCE
        roots = self._roots_of(value)
        whole = self._whole_root(value)
        if whole is not None and (not roots or whole in roots):
            return Source(frozenset({whole}), whole=True)
        if len(roots) == 1:
            (number,) = roots
            root = self._roots[number]
            # Parts of a DTensor lie on several ranks.
            if type(value) is Tensor and _plain_type(root) is Tensor and value.dtype == root.dtype:
                same_storage = _storages(value)[0][0] == _storages(root)[0][0]
                if same_storage and not value.is_conj() and not value.is_neg():
                    offset = value.storage_offset() - root.storage_offset()
                    return Source(frozenset(roots), region=Region(tuple(value.shape), value.stride(), int(offset)))
        return Source(frozenset(roots))


def _plain_type(root: Tensor) -> type:
    return Tensor if type(root) is nn.Parameter else type(root)


def _storages(value: Tensor) -> list[tuple[int, Tensor]]:
    """The storages of a tensor, of a wrapper those of the tensors in it, each by its address, with its tensor."""
    if is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()
        inner = [getattr(value, name) for name in names]
        return [pair for tensor in inner if isinstance(tensor, Tensor) for pair in _storages(tensor)]
    try:
        return [(value.untyped_storage()._cdata, value)]
    except (NotImplementedError, RuntimeError):
        # Sparse and quantised tensors have none: no root is one, as frozen ones are no sources.
        return []


def _geometry(value: Tensor) -> Geometry:
    return value.shape, value.stride(), int(value.storage_offset()), value.dtype


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage may have bytes in common."""
    if not a.numel() or not b.numel():
        return _geometry(a) == _geometry(b)
    (a_first, a_stop), (b_first, b_stop) = _bytes(a), _bytes(b)
    return a_first < b_stop and b_first < a_stop


def _bytes(value: Tensor) -> tuple[int, int]:
    first = int(value.storage_offset())
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return first * value.itemsize, (first + extent) * value.itemsize


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments that the operator ``func`` writes to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from tree_leaves(given)


@torch.no_grad()
def traced(
    model: nn.Module, roots: Sequence[Tensor], *, keep_vars: bool = False
) -> tuple[dict[str, Any], Callable[[Any], Source]]:
    """Return ``model.state_dict(keep_vars=keep_vars)``, and the function that gives the source of an entry."""
    provenance = Provenance(roots)
    with provenance:
        state = model.state_dict(keep_vars=keep_vars)
    return state, provenance.source_of
