"""DCP's ``.metadata`` without ``pickle``: it may say what DCP writes there, and nothing else.

``.metadata`` is a pickle, and unpickling runs what the file asks for. Here its opcodes are read one by one, only those
that DCP's own files hold, and each DCP object is made by a function of this module from values that it has checked.

What DCP holds in ``Metadata``: for every key the true shape of a tensor and its chunks (boxes of it), or that it is an
object; and for every chunk (an *index*) which bytes of which file hold it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from .files import CheckpointError, check_name
from .pickles import Machine, Refused, Vocabulary, want

METADATA_NAME = ".metadata"
MAX_METADATA_BYTES = 1 << 30

_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
    )
}


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _fields(state: Any, required: set[str], optional: set[str], what: str) -> dict[str, Any]:
    want(type(state) is dict and required <= state.keys() <= required | optional, f"the state of a {what}")
    return state  # type: ignore[no-any-return]


def _size(args: Any) -> torch.Size:
    want(type(args) is tuple and len(args) == 1 and type(args[0]) is tuple, "torch.Size of something else than sizes")
    want(len(args[0]) <= 64 and all(_is_count(n) for n in args[0]), "a size that is negative or no number")
    return torch.Size(args[0])


def _layout(args: Any) -> torch.layout:
    want(args == ("torch.strided",), "a layout that is not strided")
    return torch.strided


def _memory_format(args: Any) -> torch.memory_format:
    formats = (torch.contiguous_format, torch.channels_last, torch.preserve_format)
    want(type(args) is tuple and len(args) == 1 and type(args[0]) is int and 0 <= args[0] < 3, "a memory format")
    return formats[args[0]]


def _path(args: Any) -> str:
    want(type(args) is tuple and all(type(part) is str for part in args), "a path of something else than strings")
    return str(PurePosixPath(*args))


def _properties(state: Any) -> TensorProperties:
    kinds = (torch.dtype, torch.layout, bool, torch.memory_format, bool)
    ok = type(state) is tuple and len(state) == 5 and all(type(v) is k for v, k in zip(state, kinds, strict=True))
    want(ok, "the state of a TensorProperties")
    return TensorProperties(*state)


def _chunk(state: Any) -> ChunkStorageMetadata:
    fields = _fields(state, {"offsets", "sizes"}, set(), "ChunkStorageMetadata")
    offsets, sizes = fields["offsets"], fields["sizes"]
    want(type(offsets) is type(sizes) is torch.Size and len(offsets) == len(sizes), "offsets and sizes of a chunk")
    return ChunkStorageMetadata(offsets, sizes)


def _tensor(state: Any) -> TensorStorageMetadata:
    fields = _fields(state, {"properties", "size", "chunks"}, set(), "TensorStorageMetadata")
    properties, size, chunks = fields["properties"], fields["size"], fields["chunks"]
    want(type(properties) is TensorProperties and type(size) is torch.Size, "properties or size of a tensor")
    want(type(chunks) is list and all(type(c) is ChunkStorageMetadata for c in chunks), "the chunks of a tensor")
    # Copied, so that nothing read later can change what was checked.
    return TensorStorageMetadata(properties, size, list(chunks))


def _index(state: Any) -> MetadataIndex:
    fields = _fields(state, {"fqn"}, {"offset", "index"}, "MetadataIndex")
    fqn, offset, index = fields["fqn"], fields.get("offset"), fields.get("index")
    want(type(fqn) is str and (offset is None or type(offset) is torch.Size), "the name or offset of an index")
    want(index is None or _is_count(index), "the hint of an index")
    return MetadataIndex(fqn, offset, index)


def _info(state: Any) -> _StorageInfo:
    fields = _fields(state, {"relative_path", "offset", "length"}, {"transform_descriptors"}, "_StorageInfo")
    want(not fields.get("transform_descriptors"), "data that a DCP extension has transformed (compressed, say)")
    want(_is_count(fields["offset"]) and _is_count(fields["length"]), "where the data of a chunk lies")
    try:
        name = check_name(fields["relative_path"])
    except ValueError as error:
        raise Refused(str(error)) from None
    return _StorageInfo(name, fields["offset"], fields["length"])


def _storage_meta(state: Any) -> StorageMeta:
    fields = dict(_fields(state, set(), {"checkpoint_id", "save_id", "load_id", "modules"}, "StorageMeta"))
    modules = fields.pop("modules", [])
    want(all(v is None or type(v) is str for v in fields.values()), "the state of a StorageMeta")
    want(type(modules) is list and all(type(m) is str for m in modules), "the modules of a StorageMeta")
    return StorageMeta(**fields, modules=list(modules))


def _metadata(state: Any) -> Metadata:
    optional = {"planner_data", "storage_data", "storage_meta", "version"}
    fields = _fields(state, {"state_dict_metadata"}, optional, "Metadata")
    keys: Any = fields["state_dict_metadata"]
    planned: Any = fields.get("planner_data")
    stored: Any = fields.get("storage_data")
    entries = (TensorStorageMetadata, BytesStorageMetadata)
    want(type(keys) is dict and all(type(k) is str and type(v) in entries for k, v in keys.items()), "the keys")
    ok = type(stored) is dict and all(type(k) is MetadataIndex and type(v) is _StorageInfo for k, v in stored.items())
    want(ok, "where the data lies")
    if planned is not None:
        ok = type(planned) is dict and all(type(k) is str and type(v) is tuple for k, v in planned.items())
        want(ok and all(type(part) in (str, int) for path in planned.values() for part in path), "the planner's data")
    meta, version = fields.get("storage_meta"), fields.get("version")
    want(meta is None or type(meta) is StorageMeta, "its StorageMeta")
    want(version is None or type(version) is str, "its version")
    planned = None if planned is None else dict(planned)
    return Metadata(dict(keys), planned, dict(stored), meta or StorageMeta(), version)


_DCP = "torch.distributed.checkpoint."
_VOCABULARY = Vocabulary(
    constants={("torch", name): dtype for name, dtype in _DTYPES.items()},
    calls={
        ("torch", "Size"): _size,
        ("torch.serialization", "_get_layout"): _layout,
        (_DCP + "metadata", "_MEM_FORMAT_ENCODING"): _memory_format,
        ("pathlib", "PosixPath"): _path,
        ("pathlib", "WindowsPath"): _path,
        ("pathlib._local", "PosixPath"): _path,
        ("pathlib._local", "WindowsPath"): _path,
    },
    records={
        (_DCP + "metadata", "Metadata"): _metadata,
        (_DCP + "metadata", "TensorStorageMetadata"): _tensor,
        (_DCP + "metadata", "TensorProperties"): _properties,
        (_DCP + "metadata", "ChunkStorageMetadata"): _chunk,
        (_DCP + "metadata", "MetadataIndex"): _index,
        (_DCP + "metadata", "StorageMeta"): _storage_meta,
        (_DCP + "filesystem", "_StorageInfo"): _info,
    },
    stateless={(_DCP + "metadata", "BytesStorageMetadata"): BytesStorageMetadata},
    key_types=(str, MetadataIndex),
)


def parse(data: bytes, where: str) -> Metadata:
    """The ``Metadata`` in the bytes of a ``.metadata`` file; CheckpointError names ``where`` and what is in there."""
    try:
        metadata = Machine(data, _VOCABULARY).run()
        want(type(metadata) is Metadata, "something that is no Metadata")
    except Refused as refused:
        raise CheckpointError(
            f"dist_asgd: {where} is damaged, or is no metadata of torch.distributed.checkpoint: it holds {refused}. "
            f"Nothing of it was run."
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"dist_asgd: {where} is damaged: a name in it is no text ({error.reason}).") from None
    return metadata  # type: ignore[no-any-return]


# --- extents ---------------------------------------------------------------------------------------------


def check_extents(metadata: Metadata, sizes: Mapping[str, int], where: str) -> None:
    """Every chunk lies inside its tensor and its file, no two overlap in either, and together they are the tensor.

    Objects and 0-dim tensors that are equal may share one place: every parameter has its group's hyperparameters.

    ``sizes``: bytes of each file. What passes cannot ask for more memory than the files have bytes. CheckpointError
    names the key.
    """
    wanted = set()
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            wanted.add(MetadataIndex(key))
            continue
        _check_boxes(key, entry, where)
        for chunk in entry.chunks:
            index = MetadataIndex(key, chunk.offsets)
            wanted.add(index)
            info = metadata.storage_data.get(index)
            needed = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            if info is not None and info.length < needed:
                raise CheckpointError(
                    f"dist_asgd: {where}: a chunk of {key} needs {needed} bytes, but {info.relative_path} has "
                    f"{info.length} for it."
                )
    for index in wanted - metadata.storage_data.keys():
        raise CheckpointError(f"dist_asgd: {where} does not say where {index.fqn} {index.offset} lies.")
    for index in metadata.storage_data.keys() - wanted:
        raise CheckpointError(f"dist_asgd: {where} has data of {index.fqn} {index.offset}, which no key has.")
    _check_ranges(metadata, sizes, where)


def _check_ranges(metadata: Metadata, sizes: Mapping[str, int], where: str) -> None:
    last: dict[str, tuple[int, str]] = {}
    shared: tuple[str, int, int] | None = None
    places = [
        (info.relative_path, info.offset, info.length, index.fqn) for index, info in metadata.storage_data.items()
    ]
    for name, offset, length, fqn in sorted(places):
        if name not in sizes:
            raise CheckpointError(f"dist_asgd: {name}, which holds {fqn}, is missing: {where} is not whole.")
        entry = metadata.state_dict_metadata[fqn]
        single = isinstance(entry, BytesStorageMetadata) or not entry.size
        if single and shared == (name, offset, length):
            continue
        shared = (name, offset, length) if single else None
        stop, before = last.get(name, (0, ""))
        if offset < stop:
            raise CheckpointError(f"dist_asgd: {where}: the data of {fqn} and of {before} overlap in {name}.")
        if offset + length > sizes[name]:
            raise CheckpointError(
                f"dist_asgd: {name} has {sizes[name]} bytes, but by {where} {fqn} lies at {offset} to "
                f"{offset + length} in it: a file is truncated or damaged, or belongs to another checkpoint."
            )
        last[name] = (offset + length, fqn)


def _check_boxes(key: str, entry: TensorStorageMetadata, where: str) -> None:
    """The chunks of one tensor tile it."""
    size, boxes = entry.size, []
    for chunk in entry.chunks:
        ends = [o + s for o, s in zip(chunk.offsets, chunk.sizes, strict=True)]
        if len(ends) != len(size) or any(end > n for end, n in zip(ends, size, strict=True)):
            raise CheckpointError(
                f"dist_asgd: {where}: a chunk of {key} at {list(chunk.offsets)} of shape {list(chunk.sizes)} is not "
                f"inside {list(size)}."
            )
        if math.prod(chunk.sizes):
            boxes.append((tuple(chunk.offsets), tuple(ends)))
    covered = sum(math.prod(e - s for s, e in zip(starts, ends, strict=True)) for starts, ends in boxes)
    if covered != math.prod(size):
        raise CheckpointError(
            f"dist_asgd: {where}: the chunks of {key} hold {covered} elements, its shape {list(size)} has "
            f"{math.prod(size)}."
        )
    # Sorted along one dimension, only boxes that still reach into it can overlap.
    axis = max(range(len(size)), key=lambda d: len({starts[d] for starts, _ in boxes}), default=0)
    active: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for box in sorted(boxes, key=lambda b: b[0][axis]) if len(boxes) > 1 else ():
        active = [other for other in active if other[1][axis] > box[0][axis]]
        for other in active:
            if all(a < d and c < b for a, b, c, d in zip(*box, *other, strict=True)):
                raise CheckpointError(
                    f"dist_asgd: {where}: chunks of {key} overlap, at {list(box[0])} and {list(other[0])}."
                )
        active.append(box)
