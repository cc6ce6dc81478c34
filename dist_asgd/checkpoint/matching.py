"""What a checkpoint has beside what a model and its optimizer want, and memory for what they want of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorStorageMetadata

from ..placements.shard_tensor import shard_tensor_of
from .entries import by_parent
from .format.files import CheckpointError
from .format.reader import CheckedReader

_MAX_LISTED = 20


@dataclass
class KeyMismatch:
    """Names that the checkpoint lacks, names that it has beyond what is wanted, and shapes that differ."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected)

    def __str__(self) -> str:
        parts = [("missing in the checkpoint", self.missing), ("in the checkpoint only", self.unexpected)]
        return "; ".join(f"{what}: {_listed(names)}" for what, names in parts if names)

    def check(self, path: Path, strict: bool) -> None:
        """ValueError where nothing can be loaded: other shapes, and with ``strict`` any difference."""
        if self.shapes:
            raise ValueError(f"dist_asgd: {path} does not fit the model: {_listed(self.shapes)}.")
        if strict and self:
            raise ValueError(
                f"dist_asgd: {path} is of another model or optimizer: {self}. Pass strict=False to load what matches, "
                f"or build the model that was saved."
            )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more


class CheckpointKeys:
    """The keys of an open checkpoint; tensors are read all at once, by ``read``, into memory of their own."""

    def __init__(self, reader: CheckedReader, difference: KeyMismatch) -> None:
        self._reader = reader
        self._opened = reader.opened
        self._difference = difference
        self._passes: list[dict[str, Tensor]] = [{}]
        # Read before, by place: what nobody can change.
        self._plain: dict[object, Any] = {}
        self.keys = self._opened.metadata.state_dict_metadata
        self.parents = by_parent(self.keys)

    def memory_for(self, key: str, like: Tensor, *, widen: bool) -> Tensor:
        """Memory that ``read`` fills with ``key``: shaped, sharded and placed as ``like``.

        In the dtype of ``like``; with ``widen`` in the wider of that and the checkpoint's, so that nothing is lost.
        """
        entry = self.keys[key]
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"dist_asgd: {key} is no tensor in {self._opened.path}.")
        saved = entry.properties.dtype
        alike = (saved.is_complex, saved.is_floating_point) == (like.dtype.is_complex, like.dtype.is_floating_point)
        if tuple(entry.size) != tuple(like.shape) or not alike:
            self._difference.shapes.append(
                f"{key} is {tuple(entry.size)} {saved} in the checkpoint and {tuple(like.shape)} {like.dtype} here"
            )
            return like
        dtype = torch.promote_types(saved, like.dtype) if widen else like.dtype
        part = shard_tensor_of(like)
        if part is not None:
            target: Tensor = cast(Any, like).like(torch.empty_like(part.to_local(), dtype=dtype))
        else:
            target = torch.empty_like(like, dtype=dtype, requires_grad=False)
        free = next((targets for targets in self._passes if key not in targets), None)
        if free is None:
            free = {}
            self._passes.append(free)
        free[key] = target
        return target

    def values(self, keys: Iterable[str]) -> dict[str, Any]:
        """Objects and 0-dim tensors by key; what lies in one place is read once."""
        found: dict[str, Any] = {}
        places: dict[object, list[str]] = {}
        indices: dict[MetadataIndex, object] = {}
        for key in keys:
            entry = self.keys[key]
            index = MetadataIndex(key)
            if isinstance(entry, TensorStorageMetadata):
                if len(entry.chunks) != 1 or entry.size.numel() != 1:
                    raise CheckpointError(f"dist_asgd: {key} in {self._opened.path} is no single value.")
                index = MetadataIndex(key, entry.chunks[0].offsets)
            info = self._opened.place(index)
            place = (type(entry), info.relative_path, info.offset, info.length)
            if place in self._plain:
                found[key] = self._plain[place]
                continue
            if place not in places:
                indices[index] = place
            places.setdefault(place, []).append(key)
        for index, data in self._opened.chunks(list(indices)):
            is_object = isinstance(self.keys[index.fqn], BytesStorageMetadata)
            value = self._opened.value(index, data) if is_object else self._opened.tensor(index, data)
            found.update(dict.fromkeys(places[indices[index]], value))
            if isinstance(value, bool | int | float | str | None):
                self._plain[indices[index]] = value
        return found

    def read(self) -> None:
        """Fill all memory that was asked for."""
        metadata = self._opened.metadata
        for targets in self._passes:
            planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            planner.set_up_planner(dict(targets), metadata, is_coordinator=True)
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
            plan = self._reader.prepare_local_plan(planner.create_local_plan())
            self._reader.read_data(planner.finish_plan(plan), planner).wait()
