"""Checkpoints whose tensors lie in safetensors files: bare elements behind a header in JSON, and no pickle.

DCP writes them with ``HuggingFaceStorageWriter``, whole or in regions, which it notes in the header. Other safetensors
files have whole tensors. There is no ``.metadata``: ``metadata_of_files`` makes DCP's metadata from the headers, and
``OpenCheckpoint`` reads the byte ranges that it gives.

``FileSystemWriter`` with ``serialization_format=SAFETENSORS`` writes one such file behind the objects of a data file,
and a ``.metadata``. The places of tensors in it are wrong, so torch does not read them; ``located`` puts them right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from .manifest import CheckpointError, check_name, open_confined, read_range
from .paths import AnyPath
from .safetensors import DTYPE_NAMES, SUFFIX

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# As in the library safetensors.
_MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_ARCHIVE = b"PK\x03\x04"


@dataclass
class RawRange(_StorageInfo):
    """The byte range of a chunk that has bare elements, row-major and little-endian."""


@dataclass(frozen=True, slots=True)
class _Region:
    """What a header says of one tensor: dtype, shape and byte range, and its offsets in the whole tensor."""

    dtype: torch.dtype
    sizes: torch.Size
    offsets: torch.Size
    start: int
    length: int


def tensor_files(names: list[str]) -> list[str]:
    """Return the safetensors files among ``names``."""
    return [name for name in names if name.endswith(SUFFIX)]


def metadata_of_files(directory: AnyPath, names: list[str]) -> Metadata:
    """Return DCP's metadata of the tensors in these safetensors files; CheckpointError names the file that is wrong."""
    entries: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name in names:
        for key, region in _regions(directory, name, 0).items():
            entry = entries.setdefault(key, TensorStorageMetadata(TensorProperties(region.dtype), region.sizes, []))
            index = MetadataIndex(key, region.offsets)
            if entry.properties.dtype != region.dtype or len(entry.size) != len(region.sizes) or index in storage:
                other = entry.chunks[0]
                raise CheckpointError(
                    f"dist_asgd: {directory / name} has {key} at {list(region.offsets)}, {list(region.sizes)} "
                    f"{region.dtype}, and another file has it at {list(other.offsets)}, {list(other.sizes)} "
                    f"{entry.properties.dtype}: the files belong to several checkpoints. Keep those of one."
                )
            ends = [o + s for o, s in zip(region.offsets, region.sizes, strict=True)]
            entry.size = torch.Size(map(max, entry.size, ends))
            entry.chunks.append(ChunkStorageMetadata(region.offsets, region.sizes))
            storage[index] = RawRange(name, region.start, region.length)
    return Metadata(cast(Any, entries), None, storage, StorageMeta())


def located(metadata: Metadata, directory: AnyPath) -> Metadata:
    """Return ``metadata`` with the right places of tensors that lie in one safetensors file inside a data file."""
    offsets: dict[str, set[int]] = {}
    chunks = [
        (index, info)
        for index, info in metadata.storage_data.items()
        if isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata)
    ]
    for _, info in chunks:
        offsets.setdefault(info.relative_path, set()).add(info.offset)
    # All tensors of such a file have one offset, where the safetensors file begins.
    inside = {
        name: _regions(directory, name, min(starts))
        for name, starts in offsets.items()
        if len(starts) == 1 and _is_header(directory, name, min(starts))
    }
    if not inside:
        return metadata
    storage = dict(metadata.storage_data)
    for index, info in chunks:
        if info.relative_path in inside:
            region = inside[info.relative_path].get(index.fqn)
            if region is None or region.offsets != index.offset:
                raise CheckpointError(
                    f"dist_asgd: {directory / info.relative_path} lacks {index.fqn} at {index.offset}: "
                    f"FileSystemWriter with serialization_format=SAFETENSORS keeps one region of a tensor in each file."
                )
            storage[index] = RawRange(info.relative_path, region.start, region.length)
    return replace(metadata, storage_data=storage)


def _is_header(directory: AnyPath, name: str, offset: int) -> bool:
    file, size = open_confined(directory, name)
    with file:
        if offset + _LENGTH_BYTES + 1 > size:
            return False
        start = read_range(file, directory / name, offset, _LENGTH_BYTES + 1)
    return not start.startswith(_ARCHIVE) and start.endswith(b"{")


def raw_tensor(data: bytes, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return a tensor of its own memory with the bare elements ``data``, of which there are as many as it needs."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    if data:
        memoryview(cast(Any, tensor.view(-1).view(torch.uint8).numpy()))[:] = data
    return tensor


def _regions(directory: AnyPath, name: str, base: int) -> dict[str, _Region]:
    """Return what the header at ``base`` in a file says, by key."""
    try:
        check_name(name)
        file, size = open_confined(directory, name)
        with file:
            start = read_range(file, directory / name, base, min(_LENGTH_BYTES, size - base))
            if start.startswith(_ARCHIVE):
                raise ValueError(
                    "it begins with values that are no tensors (hyperparameters, say), and HuggingFaceStorageWriter "
                    "has put its header behind them: torch cannot read it either. Save tensors only with that "
                    "writer, or save with dcp.save and its own writer"
                )
            length = int.from_bytes(start, "little")
            if len(start) < _LENGTH_BYTES or length > min(_MAX_HEADER_BYTES, size - base - _LENGTH_BYTES):
                raise ValueError("its header is cut short, or is none")
            header = json.loads(
                read_range(file, directory / name, base + _LENGTH_BYTES, length), object_pairs_hook=_unique
            )
        return dict(_parsed(header, base + _LENGTH_BYTES + length, size))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"dist_asgd: {directory / name} is no safetensors file as it should be: {error}."
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("a key occurs twice in its header")
    return body


def _parsed(header: Any, first: int, size: int) -> Iterator[tuple[str, _Region]]:
    """Yield the tensors of a header, whose data begin at byte ``first`` of a file; raises ValueError if it is wrong."""
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    notes = header.pop("__metadata__", {})
    noted = notes.get(CUSTOM_METADATA_KEY) if isinstance(notes, dict) else None
    saved = json.loads(noted, object_pairs_hook=_unique) if isinstance(noted, str) else None
    for key, entry in header.items():
        if not isinstance(entry, dict) or not isinstance(dtype := _DTYPES.get(str(entry.get("dtype"))), torch.dtype):
            raise ValueError(f"its header gives {key[:80]!r} a dtype that is not known here")
        sizes, range_ = _counts(entry.get("shape"), key), _counts(entry.get("data_offsets"), key)
        offsets = [0] * len(sizes)
        if saved is not None:
            of_key = saved.get(key) if isinstance(saved, dict) else None
            offsets = _counts(of_key.get(SAVED_OFFSETS_KEY) if isinstance(of_key, dict) else None, key)
        length = math.prod(sizes) * dtype.itemsize
        fits = len(range_) == 2 and range_[0] + length == range_[1] and first + range_[1] <= size
        if not fits or len(offsets) != len(sizes):
            raise ValueError(f"the data of {key[:80]!r} do not lie in it as its header says")
        yield key, _Region(dtype, torch.Size(sizes), torch.Size(offsets), first + range_[0], length)


def _counts(value: Any, key: str) -> list[int]:
    # type(), because a bool is an int for isinstance().
    if type(value) is not list or len(value) > 64 or not all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        raise ValueError(f"its header gives {key[:80]!r} a shape or a place that is none")
    return value
