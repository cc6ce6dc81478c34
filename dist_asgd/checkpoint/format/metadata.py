"""DCP's ``.metadata`` without ``pickle``: it may say what DCP writes there, and nothing else.

``.metadata`` is a pickle, and unpickling runs whatever the file asks for. ``parse``, which the reader calls, executes
the pickle's opcodes on the stack machine of ``pickles``, which looks up no class and calls nothing but the makers of
this module.

DCP's ``Metadata`` holds, for every key, either the shape of a tensor and its chunks (regions of it), or the fact that
it is an object; and for every chunk, by its *index*, which bytes of which file hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import chain
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

from .manifest import CheckpointError, check_name
from .pickles import Machine, Maker, Name, Names, Refusal, UnknownNameError, want

METADATA_NAME = ".metadata"
MAX_METADATA_BYTES = 1 << 30
_MAX_DESCRIPTORS = 8

# --- what DCP writes --------------------------------------------------------------------------------------

DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        "float4_e2m1fn_x2",
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
    )
}


def _is_count(value: object) -> bool:
    # type(), because a bool is an int for isinstance(); below 2^62, so that the sum of two fits into 64 bits.
    return type(value) is int and 0 <= value < 1 << 62


class _Fields:
    """The fields that the state of a record must have, and may have."""

    def __init__(self, what: str, required: set[str], optional: set[str] | None = None) -> None:
        self._what, self._required, self._all = what, required, required | (optional or set())

    def of(self, state: Any) -> dict[str, Any]:
        """Return ``state``; raises ``Refusal`` unless it is a dict with these fields."""
        if type(state) is not dict or not self._required <= state.keys() <= self._all:
            raise Refusal(f"the state of a {self._what}")
        return state


_CHUNK = _Fields("ChunkStorageMetadata", {"offsets", "sizes"})
_TENSOR = _Fields("TensorStorageMetadata", {"properties", "size", "chunks"})
_INDEX = _Fields("MetadataIndex", {"fqn"}, {"offset", "index"})
_INFO = _Fields("_StorageInfo", {"relative_path", "offset", "length"}, {"transform_descriptors"})
_META = _Fields("StorageMeta", set(), {"checkpoint_id", "save_id", "load_id", "modules"})
_METADATA = _Fields("Metadata", {"state_dict_metadata"}, {"planner_data", "storage_data", "storage_meta", "version"})


def _size(args: Any) -> torch.Size:
    want(type(args) is tuple and len(args) == 1 and type(args[0]) is tuple, "torch.Size of something else than sizes")
    # A tensor of torch has at most 64 dimensions.
    want(len(args[0]) <= 64 and all(_is_count(n) for n in args[0]), "a size that is negative or no number")
    return torch.Size(args[0])


def _layout(args: Any) -> torch.layout:
    want(args == ("torch.strided",), "a layout that is not strided")
    return torch.strided


def _memory_format(args: Any) -> torch.memory_format:
    # torch.distributed.checkpoint had an enumeration of its own from torch 2.3 on; both have the same values.
    formats = (torch.contiguous_format, torch.channels_last, torch.preserve_format)
    want(type(args) is tuple and len(args) == 1 and type(args[0]) is int and 0 <= args[0] < 3, "a memory format")
    return formats[args[0]]


def _path(args: Any) -> str:
    # The paths of StorageMeta are only shown, so a string does for them.
    want(type(args) is tuple and all(type(part) is str for part in args), "a path of something else than strings")
    return str(PurePosixPath(*args))


def _properties(state: Any) -> TensorProperties:
    kinds = (torch.dtype, torch.layout, bool, torch.memory_format, bool)
    ok = type(state) is tuple and len(state) == 5 and all(type(v) is k for v, k in zip(state, kinds, strict=True))
    want(ok, "the state of a TensorProperties")
    return TensorProperties(*state)


def _chunk(state: Any) -> ChunkStorageMetadata:
    fields = _CHUNK.of(state)
    offsets, sizes = fields["offsets"], fields["sizes"]
    want(type(offsets) is type(sizes) is torch.Size and len(offsets) == len(sizes), "offsets and sizes of a chunk")
    return ChunkStorageMetadata(offsets, sizes)


_CHUNK_TYPES = {ChunkStorageMetadata}


def _tensor(state: Any) -> TensorStorageMetadata:
    fields = _TENSOR.of(state)
    properties, size, chunks = fields["properties"], fields["size"], fields["chunks"]
    want(type(properties) is TensorProperties and type(size) is torch.Size, "properties or size of a tensor")
    want(type(chunks) is list and set(map(type, chunks)) <= _CHUNK_TYPES, "the chunks of a tensor")
    # Copied: the pickle still refers to its own list, and later opcodes could append to it unchecked.
    return TensorStorageMetadata(properties, size, list(chunks))


def _index(state: Any) -> MetadataIndex:
    fields = _INDEX.of(state)
    fqn, offset, index = fields["fqn"], fields.get("offset"), fields.get("index")
    want(type(fqn) is str and (offset is None or type(offset) is torch.Size), "the name or offset of an index")
    want(index is None or _is_count(index), "the hint of an index")
    made = index_of(fqn, offset)
    if index is not None:
        made.__dict__["index"] = index
    return made


def index_of(key: str, offsets: torch.Size | None) -> MetadataIndex:
    """Return the index of a chunk of a tensor at ``offsets``, or of an object at None, as pickle makes it.

    The constructor, which copies the offsets, takes longer than all checks of metadata.
    """
    made = object.__new__(MetadataIndex)
    made.__dict__["fqn"] = key
    if offsets is not None:
        made.__dict__["offset"] = offsets
    return made


# A file has a name, and chunks by the hundred.
_checked_name = lru_cache(maxsize=1 << 12)(check_name)


def _info(state: Any) -> _StorageInfo:
    fields = _INFO.of(state)
    descriptors = fields.get("transform_descriptors") or None
    if descriptors is not None:
        ok = type(descriptors) in (list, tuple) and len(descriptors) <= _MAX_DESCRIPTORS
        want(ok and all(type(text) is str for text in descriptors), "the extensions of DCP that have transformed data")
        descriptors = tuple(descriptors)
    return _place(fields["relative_path"], fields["offset"], fields["length"], descriptors)


def _place(name: Any, offset: Any, length: Any, descriptors: Any = None) -> _StorageInfo:
    want(_is_count(offset) and _is_count(length), "where the data of a chunk lies")
    try:
        name = _checked_name(name) if type(name) is str else check_name(name)
    except ValueError as error:
        raise Refusal(str(error)) from None
    return _StorageInfo(name, offset, length, descriptors)


def _with_arguments(record: Maker, *names: str) -> Maker:
    """Return the maker of a record by a call with these arguments, which is how ``metadata_writer`` writes it."""

    def make(args: Any) -> Any:
        want(type(args) is tuple and 0 < len(args) <= len(names), "a call with other arguments")
        return record(dict(zip(names, args, strict=False)))

    return make


def _index_call(args: Any) -> MetadataIndex:
    # Objects have no offsets.
    if type(args) is tuple and len(args) == 1:
        return _index({"fqn": args[0]})
    want(type(args) is tuple and len(args) == 2, "a call with other arguments")
    key, offsets = args
    want(type(key) is str and type(offsets) is torch.Size, "the name or offset of an index")
    return index_of(key, offsets)


def _info_call(args: Any) -> _StorageInfo:
    want(type(args) is tuple and len(args) == 3, "a call with other arguments")
    return _place(*args)


def _storage_meta(state: Any) -> StorageMeta:
    fields = dict(_META.of(state))
    modules = fields.pop("modules", [])
    want(all(v is None or type(v) is str for v in fields.values()), "the state of a StorageMeta")
    want(type(modules) is list and all(type(m) is str for m in modules), "the modules of a StorageMeta")
    return StorageMeta(**fields, modules=list(modules))


def _is_dict_of(value: Any, keys: set[type], values: set[type]) -> bool:
    return type(value) is dict and set(map(type, value)) <= keys and set(map(type, value.values())) <= values


def _metadata(state: Any) -> Metadata:
    fields = _METADATA.of(state)
    keys: Any = fields["state_dict_metadata"]
    planner_data: Any = fields.get("planner_data")
    storage_data: Any = fields.get("storage_data")
    want(_is_dict_of(keys, {str}, {TensorStorageMetadata, BytesStorageMetadata}), "the keys")
    want(_is_dict_of(storage_data, {MetadataIndex}, {_StorageInfo}), "where the data lies")
    if planner_data is not None:
        ok = _is_dict_of(planner_data, {str}, {tuple})
        words = chain.from_iterable(planner_data.values()) if ok else ()
        want(ok and set(map(type, words)) <= {str, int}, "the planner's data")
    meta, version = fields.get("storage_meta"), fields.get("version")
    want(meta is None or type(meta) is StorageMeta, "its StorageMeta")
    want(version is None or type(version) is str, "its version")
    planner_data = None if planner_data is None else dict(planner_data)
    return Metadata(dict(keys), planner_data, dict(storage_data), meta or StorageMeta(), version)


_DCP = "torch.distributed.checkpoint."
_SHARDED = "torch.distributed._shard.sharded_tensor."
_CONSTANTS: Mapping[Name, Any] = {("torch", name): dtype for name, dtype in DTYPES.items()}
_CALLS: Mapping[Name, Maker] = {
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _layout,
    (_DCP + "metadata", "_MEM_FORMAT_ENCODING"): _memory_format,
    (_SHARDED + "metadata", "MEM_FORMAT_ENCODING"): _memory_format,
    ("pathlib", "PosixPath"): _path,
    ("pathlib", "WindowsPath"): _path,
    ("pathlib._local", "PosixPath"): _path,
    ("pathlib._local", "WindowsPath"): _path,
    # What ``metadata_writer`` calls, where DCP gives a state to the object.
    (_DCP + "metadata", "MetadataIndex"): _index_call,
    (_DCP + "metadata", "ChunkStorageMetadata"): _with_arguments(_chunk, "offsets", "sizes"),
    (_DCP + "metadata", "TensorStorageMetadata"): _with_arguments(_tensor, "properties", "size", "chunks"),
    (_DCP + "filesystem", "_StorageInfo"): _info_call,
}
_RECORDS: Mapping[Name, Maker] = {
    (_DCP + "metadata", "Metadata"): _metadata,
    (_DCP + "metadata", "TensorStorageMetadata"): _tensor,
    (_DCP + "metadata", "TensorProperties"): _properties,
    (_DCP + "metadata", "ChunkStorageMetadata"): _chunk,
    (_DCP + "metadata", "MetadataIndex"): _index,
    (_DCP + "metadata", "StorageMeta"): _storage_meta,
    (_DCP + "filesystem", "_StorageInfo"): _info,
    # Until torch 2.2.
    (_SHARDED + "metadata", "TensorProperties"): _properties,
}
# The package's name in torch 1.13.
_OLD_DCP = "torch.distributed._shard.checkpoint."
# Objects that the pickle creates and gives no state.
_STATELESS: Mapping[Name, Callable[[], Any]] = {(_DCP + "metadata", "BytesStorageMetadata"): BytesStorageMetadata}


def _with_old_names(table: Mapping[Name, Any]) -> Mapping[Name, Any]:
    """Return a table that has the names of DCP also as torch 1.13 writes them."""
    old = {(m.replace(_DCP, _OLD_DCP), n): value for (m, n), value in table.items() if m.startswith(_DCP)}
    return {**table, **old}


_NAMES = Names(
    constants=_CONSTANTS,
    calls=_with_old_names(_CALLS),
    records=_with_old_names(_RECORDS),
    stateless=_with_old_names(_STATELESS),
    key_types=frozenset((str, MetadataIndex)),
)


def _remedy(name: Name) -> str:
    """Return what to do about a checkpoint in which a name stands that DCP does not write, with a space before it."""
    if name[0].startswith(_OLD_DCP):
        return (
            " torch 1.12 or earlier wrote it, in a format of its own: load it there, write the state dict with "
            "torch.save, and convert that file with torch_save_to_dcp of torch.distributed.checkpoint.format_utils."
        )
    return (
        " If another program or another version of torch wrote it, load it there and write it again with dcp.save of "
        "torch 2.11 or later."
    )


def parse(data: bytes, where: str) -> Metadata:
    """Return the ``Metadata`` in the bytes of the ``.metadata`` file at ``where``.

    Raises CheckpointError, which names ``where`` and what the file holds instead. Nothing in the file is executed.
    """
    try:
        metadata = Machine(data, _NAMES).run()
        want(type(metadata) is Metadata, "something that is no Metadata")
    except Refusal as refused:
        remedy = _remedy(refused.name) if isinstance(refused, UnknownNameError) else ""
        raise CheckpointError(
            f"dist_asgd: {where} is damaged, or is no metadata of torch.distributed.checkpoint: it holds {refused}. "
            f"Nothing of it was run.{remedy}"
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"dist_asgd: {where} is damaged: a name in it is no text ({error.reason}).") from None
    return metadata  # type: ignore[no-any-return]
