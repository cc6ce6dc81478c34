"""The keys of a checkpoint that is being loaded, and the names that it and the model do not have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..placements.shard_tensor import shard_tensor_of
from ..state_dict.wrapper_names import without_parts
from .format.manifest import CheckpointError
from .format.paths import AnyPath
from .format.reader import CheckedReader
from .format.writer import KeyPath

_MAX_LISTED = 20


@dataclass
class KeyMismatch:
    """Names that the checkpoint lacks, names that only the checkpoint has, and shapes that differ.

    ``num_matches`` counts the names that both have. ``averages`` are those of the names that are averages. ``hint``
    says what else to do about the names.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    num_matches: int = 0
    averages: list[str] = field(default_factory=list)
    hint: str = ""

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected)

    def __str__(self) -> str:
        lists = [("missing in the checkpoint", self.missing), ("in the checkpoint only", self.unexpected)]
        return "; ".join(f"{what}: {listed(names)}" for what, names in lists if names) + f". {self.hint}".rstrip(". ")

    def check(self, path: AnyPath, strict: bool) -> None:
        """Raise ValueError if shapes differ, or, with ``strict``, names."""
        if self.shapes:
            raise ValueError(f"dist_asgd: {path} does not fit the model: {listed(self.shapes)}.")
        if strict and self:
            raise ValueError(
                f"dist_asgd: {path} is of another model or optimizer: {self}. Pass strict=False to load what matches, "
                f"or build the model that was saved."
            )
        if self.missing and not self.num_matches:
            raise ValueError(
                f"dist_asgd: nothing in {path} matches the model or the optimizer, so there is nothing to load: {self}."
            )


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more


class PlainNameIndex:
    """Finds names in a checkpoint, also if parts of wrappers are in them.

    torch's own recipe, and version 0.1, leave such parts if one wrapper is right inside another.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._by_plain_name: dict[str, list[str]] | None = None

    def find(self, name: str) -> str | None:
        """Return ``name`` if it is there, or the only name that is ``name`` but for parts of wrappers, or None."""
        if name in self._names:
            return name
        if self._by_plain_name is None:
            self._by_plain_name = {}
            for known in self._names:
                self._by_plain_name.setdefault(without_parts(known), []).append(known)
        found = self._by_plain_name.get(without_parts(name), [])
        return found[0] if len(found) == 1 else None


class CheckpointKeys:
    """The keys of an open checkpoint. Values are read at once; tensors later and together, by ``read_tensors``.

    Attributes:
        keys: DCP's description of each key's tensor or object.
        parents: keys by everything before their last dot, and then by the word after it.
    """

    def __init__(self, reader: CheckedReader, mismatch: KeyMismatch) -> None:
        self._reader = reader
        self._mismatch = mismatch
        # A key may be read into several tensors (ax and a new master), each in a pass of its own.
        self._passes: list[dict[str, Tensor]] = [{}]
        self.keys = reader.opened.metadata.state_dict_metadata
        self.parents: dict[str, dict[str, str]] = {}
        for key in self.keys:
            parent, _, last = key.rpartition(".")
            self.parents.setdefault(parent, {})[last] = key
        self._index = PlainNameIndex(self.keys)

    def find(self, key: str) -> str | None:
        """Return ``key`` if the checkpoint has it, or the only key that differs in parts of wrappers only, or None."""
        return self._index.find(key)

    def target_for(self, key: str, like: Tensor, *, widen: bool) -> Tensor:
        """Return new memory, shaped, sharded and placed as ``like``, that ``read_tensors`` fills with ``key``.

        It has the dtype of ``like``; with ``widen`` the wider of that and the checkpoint's, so that nothing is lost.
        If the tensor in the checkpoint has another shape or kind, the mismatch is noted and ``like`` returned.
        """
        entry = self.keys[key]
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"dist_asgd: {key} is no tensor in {self._reader.opened.path}.")
        saved = entry.properties.dtype
        same_kind = (saved.is_complex, saved.is_floating_point) == (like.dtype.is_complex, like.dtype.is_floating_point)
        if tuple(entry.size) != tuple(like.shape) or not same_kind:
            self._mismatch.shapes.append(
                f"{key} is {tuple(entry.size)} {saved} in the checkpoint and {tuple(like.shape)} {like.dtype} here"
            )
            return like
        dtype = torch.promote_types(saved, like.dtype) if widen else like.dtype
        fragment = None if type(like) is Tensor else shard_tensor_of(like)
        if fragment is not None:
            # The like() of ``like``, and not of its fragment: DTensors that replicas share have one of their own.
            target: Tensor = cast(Any, like).like(torch.empty_like(fragment.to_local(), dtype=dtype))
        else:
            target = torch.empty_like(like, dtype=dtype, requires_grad=False)
        self._read_later(key, target)
        return target

    def target_as_saved(self, key: str, like: Tensor | None) -> Tensor:
        """Return new memory for ``key`` with the shape and dtype of the checkpoint, which ``read_tensors`` fills.

        It is whole and on the host, or placed as ``like`` if that has its shape.
        """
        entry = self.keys[key]
        assert isinstance(entry, TensorStorageMetadata)
        dtype = entry.properties.dtype
        if like is None or tuple(like.shape) != tuple(entry.size):
            target = torch.empty(tuple(entry.size), dtype=dtype, device="cpu")
        else:
            target = torch.empty_like(like, dtype=dtype, requires_grad=False)
        self._read_later(key, target)
        return target

    def _read_later(self, key: str, target: Tensor) -> None:
        targets = next((targets for targets in self._passes if key not in targets), None)
        if targets is None:
            targets = {}
            self._passes.append(targets)
        targets[key] = target

    def values(self, keys: Sequence[str]) -> dict[str, Any]:
        """Read objects and 0-dim tensors; returns them by key."""
        return self._reader.opened.values(keys)

    def is_tensor(self, key: str) -> bool:
        """Whether ``key`` is a tensor, of any shape, and no object."""
        return isinstance(self.keys[key], TensorStorageMetadata)

    def dtype_of(self, key: str) -> torch.dtype | None:
        """Return the dtype of a tensor; None for an object."""
        entry = self.keys[key]
        return entry.properties.dtype if isinstance(entry, TensorStorageMetadata) else None

    def shape_of(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        entry = self.keys[key]
        assert isinstance(entry, TensorStorageMetadata)
        return tuple(entry.size)

    def is_single(self, key: str) -> bool:
        """Whether ``key`` is a tensor of one element in one chunk, which ``values`` reads."""
        entry = self.keys[key]
        return isinstance(entry, TensorStorageMetadata) and entry.size.numel() == 1 == len(entry.chunks)

    def path_of(self, key: str) -> KeyPath:
        """Return the keys and indices by which DCP's planner reached ``key``; its words if the checkpoint has none."""
        path = (self._reader.opened.metadata.planner_data or {}).get(key)
        return tuple(key.split(".") if path is None else path)

    def saved_order(self) -> Iterable[str]:
        """Return keys in the order in which they were saved, as far as the checkpoint says."""
        return self._reader.opened.metadata.planner_data or {}

    def tensor(self, key: str) -> Tensor:
        """Read one whole tensor at once, on the host."""
        return self._reader.opened.whole_tensor(key)

    def read_tensors(self) -> None:
        """Fill every tensor that ``target_for`` has returned."""
        for targets in self._passes:
            self._reader.read_into(targets)
