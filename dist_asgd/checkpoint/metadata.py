"""DCP's ``.metadata`` without ``pickle``: it may say what DCP writes there, and nothing else.

``.metadata`` is a pickle, and unpickling runs what the file asks for. Here its opcodes are read one by one, only those
that DCP's own files hold; a class is never looked up by name, and each DCP object is made by a function of this
module from values that it has checked. What DCP holds in ``Metadata``: for every key the true shape of a tensor and
its chunks (boxes of it), or that it is an object; and for every chunk (an *index*) which bytes of which file hold it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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


class _Refused(Exception):
    """What is in the pickle that should not be there."""


class _Made:
    """An object of the pickle: named when it is created, given its value when its state arrives."""

    __slots__ = ("make", "value")

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make: Callable[[Any], Any] | None = make
        self.value: Any = None


def _want(ok: bool, what: str) -> None:
    if not ok:
        raise _Refused(what)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _fields(state: Any, required: set[str], optional: set[str], what: str) -> dict[str, Any]:
    _want(type(state) is dict and required <= state.keys() <= required | optional, f"the state of a {what}")
    return state  # type: ignore[no-any-return]


def _size(args: Any) -> torch.Size:
    _want(type(args) is tuple and len(args) == 1 and type(args[0]) is tuple, "torch.Size of something else than sizes")
    _want(len(args[0]) <= 64 and all(_is_count(n) for n in args[0]), "a size that is negative or no number")
    return torch.Size(args[0])


def _layout(args: Any) -> torch.layout:
    _want(args == ("torch.strided",), "a layout that is not strided")
    return torch.strided


def _memory_format(args: Any) -> torch.memory_format:
    formats = (torch.contiguous_format, torch.channels_last, torch.preserve_format)
    _want(type(args) is tuple and len(args) == 1 and type(args[0]) is int and 0 <= args[0] < 3, "a memory format")
    return formats[args[0]]


def _path(args: Any) -> str:
    _want(type(args) is tuple and all(type(part) is str for part in args), "a path of something else than strings")
    return str(PurePosixPath(*args))


def _properties(state: Any) -> TensorProperties:
    kinds = (torch.dtype, torch.layout, bool, torch.memory_format, bool)
    ok = type(state) is tuple and len(state) == 5 and all(type(v) is k for v, k in zip(state, kinds, strict=True))
    _want(ok, "the state of a TensorProperties")
    return TensorProperties(*state)


def _chunk(state: Any) -> ChunkStorageMetadata:
    fields = _fields(state, {"offsets", "sizes"}, set(), "ChunkStorageMetadata")
    offsets, sizes = fields["offsets"], fields["sizes"]
    _want(type(offsets) is type(sizes) is torch.Size and len(offsets) == len(sizes), "offsets and sizes of a chunk")
    return ChunkStorageMetadata(offsets, sizes)


def _tensor(state: Any) -> TensorStorageMetadata:
    fields = _fields(state, {"properties", "size", "chunks"}, set(), "TensorStorageMetadata")
    properties, size, chunks = fields["properties"], fields["size"], fields["chunks"]
    _want(type(properties) is TensorProperties and type(size) is torch.Size, "properties or size of a tensor")
    _want(type(chunks) is list and all(type(c) is ChunkStorageMetadata for c in chunks), "the chunks of a tensor")
    # Copied, so that nothing read later can change what was checked.
    return TensorStorageMetadata(properties, size, list(chunks))


def _index(state: Any) -> MetadataIndex:
    fields = _fields(state, {"fqn"}, {"offset", "index"}, "MetadataIndex")
    fqn, offset, index = fields["fqn"], fields.get("offset"), fields.get("index")
    _want(type(fqn) is str and (offset is None or type(offset) is torch.Size), "the name or offset of an index")
    _want(index is None or _is_count(index), "the hint of an index")
    return MetadataIndex(fqn, offset, index)


def _info(state: Any) -> _StorageInfo:
    fields = _fields(state, {"relative_path", "offset", "length"}, {"transform_descriptors"}, "_StorageInfo")
    _want(not fields.get("transform_descriptors"), "data that a DCP extension has transformed (compressed, say)")
    _want(_is_count(fields["offset"]) and _is_count(fields["length"]), "where the data of a chunk lies")
    return _StorageInfo(check_name(fields["relative_path"], "its metadata"), fields["offset"], fields["length"])


def _storage_meta(state: Any) -> StorageMeta:
    fields = dict(_fields(state, set(), {"checkpoint_id", "save_id", "load_id", "modules"}, "StorageMeta"))
    modules = fields.pop("modules", [])
    _want(all(v is None or type(v) is str for v in fields.values()), "the state of a StorageMeta")
    _want(type(modules) is list and all(type(m) is str for m in modules), "the modules of a StorageMeta")
    return StorageMeta(**fields, modules=list(modules))


def _metadata(state: Any) -> Metadata:
    optional = {"planner_data", "storage_data", "storage_meta", "version"}
    fields = _fields(state, {"state_dict_metadata"}, optional, "Metadata")
    keys: Any = fields["state_dict_metadata"]
    planned: Any = fields.get("planner_data")
    stored: Any = fields.get("storage_data")
    entries = (TensorStorageMetadata, BytesStorageMetadata)
    _want(type(keys) is dict and all(type(k) is str and type(v) in entries for k, v in keys.items()), "the keys")
    ok = type(stored) is dict and all(type(k) is MetadataIndex and type(v) is _StorageInfo for k, v in stored.items())
    _want(ok, "where the data lies")
    if planned is not None:
        ok = type(planned) is dict and all(type(k) is str and type(v) is tuple for k, v in planned.items())
        _want(ok and all(type(part) in (str, int) for path in planned.values() for part in path), "the planner's data")
    meta, version = fields.get("storage_meta"), fields.get("version")
    _want(meta is None or type(meta) is StorageMeta, "its StorageMeta")
    _want(version is None or type(version) is str, "its version")
    planned = None if planned is None else dict(planned)
    return Metadata(dict(keys), planned, dict(stored), meta or StorageMeta(), version)


_DCP = "torch.distributed.checkpoint."
# Made by NEWOBJ, then given their state by BUILD.
_RECORDS: Mapping[tuple[str, str], Callable[[Any], Any]] = {
    (_DCP + "metadata", "Metadata"): _metadata,
    (_DCP + "metadata", "TensorStorageMetadata"): _tensor,
    (_DCP + "metadata", "TensorProperties"): _properties,
    (_DCP + "metadata", "ChunkStorageMetadata"): _chunk,
    (_DCP + "metadata", "MetadataIndex"): _index,
    (_DCP + "metadata", "StorageMeta"): _storage_meta,
    (_DCP + "filesystem", "_StorageInfo"): _info,
}
_BYTES_ENTRY = (_DCP + "metadata", "BytesStorageMetadata")
# Called by REDUCE.
_CALLS: Mapping[tuple[str, str], Callable[[Any], Any]] = {
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _layout,
    (_DCP + "metadata", "_MEM_FORMAT_ENCODING"): _memory_format,
    ("pathlib", "PosixPath"): _path,
    ("pathlib", "WindowsPath"): _path,
    ("pathlib._local", "PosixPath"): _path,
    ("pathlib._local", "WindowsPath"): _path,
}


class _Global:
    """A name that the pickle refers to; one of those above."""

    __slots__ = ("name",)

    def __init__(self, name: tuple[str, str]) -> None:
        self.name = name


_MARK = object()


class _Reader:
    """The stack machine of ``pickle``, with the opcodes that DCP's metadata needs."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._stack: list[Any] = []
        self._memo: list[Any] = []
        self._globals: dict[tuple[str, str], Any] = {}

    def read(self) -> Metadata:
        """Run to the end; the one object that is left."""
        data, opcodes = self._data, self._OPCODES
        while True:
            _want(self._at < len(data), "an end before the end")
            code = data[self._at]
            self._at += 1
            if code == 0x2E:  # STOP
                break
            handler = opcodes.get(code)
            if handler is None:
                raise _Refused(f"opcode 0x{code:02x}")
            handler(self)
        _want(self._at == len(data) and len(self._stack) == 1, "something after the end")
        result = self._stack[0]
        result = result.value if type(result) is _Made else result
        _want(type(result) is Metadata, "something that is no Metadata")
        return result  # type: ignore[no-any-return]

    def _take(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        _want(self._at <= len(self._data), "an end before the end")
        return self._data[start : self._at]

    def _pop(self) -> Any:
        """The top of the stack as a finished value."""
        _want(bool(self._stack), "a missing operand")
        value = self._stack.pop()
        if type(value) is _Made:
            _want(value.make is None, "an object that is used before it is made")
            value = value.value
        _want(value is not _MARK and type(value) is not _Global, "a mark or a name where a value should be")
        return value

    def _pop_to_mark(self) -> list[Any]:
        values = []
        while self._stack and self._stack[-1] is not _MARK:
            values.append(self._pop())
        _want(bool(self._stack), "a missing mark")
        self._stack.pop()
        values.reverse()
        return values

    def _protocol(self) -> None:
        _want(self._take(1)[0] in (4, 5), "a pickle protocol other than 4 and 5")

    def _frame(self) -> None:
        self._take(8)

    def _mark(self) -> None:
        self._stack.append(_MARK)

    def _tuple(self) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def _tuple_of(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(values)))

    def _string(self, count: int) -> None:
        length = int.from_bytes(self._take(count), "little")
        self._stack.append(str(self._take(length), "utf-8"))

    def _int(self, count: int) -> None:
        self._stack.append(int.from_bytes(self._take(count), "little", signed=count == 4))

    def _long(self) -> None:
        count = self._take(1)[0]
        _want(count <= 9, "a number beyond 64 bits")
        self._stack.append(int.from_bytes(self._take(count), "little", signed=True))

    def _append(self, values: list[Any]) -> None:
        _want(bool(self._stack) and type(self._stack[-1]) is list, "an append to something else than a list")
        self._stack[-1].extend(values)

    def _set(self, values: list[Any]) -> None:
        _want(bool(self._stack) and type(self._stack[-1]) is dict and len(values) % 2 == 0, "items of no dict")
        target = self._stack[-1]
        for key, value in zip(values[::2], values[1::2], strict=True):
            _want(type(key) in (str, MetadataIndex), "a key that is no name")
            _want(key not in target, "a key that occurs twice")
            target[key] = value

    def _set_one(self) -> None:
        value = self._pop()
        self._set([self._pop(), value])

    def _remember(self) -> None:
        _want(bool(self._stack) and self._stack[-1] is not _MARK, "nothing to remember")
        self._memo.append(self._stack[-1])

    def _recall(self, count: int) -> None:
        place = int.from_bytes(self._take(count), "little")
        _want(place < len(self._memo), "a reference to nothing")
        self._stack.append(self._memo[place])

    def _find(self) -> None:
        name, module = self._pop(), self._pop()
        _want(type(name) is str and type(module) is str, "a name that is no string")
        full = (module, name)
        if module == "torch" and name in _DTYPES:
            self._stack.append(_DTYPES[name])
        elif full in _RECORDS or full in _CALLS or full == _BYTES_ENTRY:
            self._stack.append(self._globals.setdefault(full, _Global(full)))
        else:
            raise _Refused(f"{module[:80]}.{name[:80]}")

    def _name(self) -> tuple[str, str]:
        found = self._stack.pop() if self._stack else None
        if type(found) is not _Global:
            raise _Refused("a call of something that has no name")
        return found.name

    def _create(self) -> None:
        args, name = self._pop(), self._name()
        _want(args == () and (name in _RECORDS or name == _BYTES_ENTRY), "an object with arguments")
        self._stack.append(BytesStorageMetadata() if name == _BYTES_ENTRY else _Made(_RECORDS[name]))

    def _call(self) -> None:
        args, name = self._pop(), self._name()
        make = _CALLS.get(name)
        if make is None:
            raise _Refused(f"a call of {'.'.join(name)}")
        self._stack.append(make(args))

    def _build(self) -> None:
        state = self._pop()
        made = self._stack[-1] if self._stack else None
        if type(made) is not _Made or made.make is None:
            raise _Refused("state for something that takes none")
        made.value, made.make = made.make(state), None

    _OPCODES: Mapping[int, Callable[[_Reader], None]] = {
        0x80: _protocol,
        0x95: _frame,
        ord("}"): lambda self: self._stack.append({}),
        ord("]"): lambda self: self._stack.append([]),
        ord(")"): lambda self: self._stack.append(()),
        ord("N"): lambda self: self._stack.append(None),
        0x88: lambda self: self._stack.append(True),
        0x89: lambda self: self._stack.append(False),
        ord("("): _mark,
        ord("t"): _tuple,
        0x85: lambda self: self._tuple_of(1),
        0x86: lambda self: self._tuple_of(2),
        0x87: lambda self: self._tuple_of(3),
        0x8C: lambda self: self._string(1),
        ord("X"): lambda self: self._string(4),
        ord("K"): lambda self: self._int(1),
        ord("M"): lambda self: self._int(2),
        ord("J"): lambda self: self._int(4),
        0x8A: _long,
        ord("a"): lambda self: self._append([self._pop()]),
        ord("e"): lambda self: self._append(self._pop_to_mark()),
        ord("s"): _set_one,
        ord("u"): lambda self: self._set(self._pop_to_mark()),
        0x94: _remember,
        ord("h"): lambda self: self._recall(1),
        ord("j"): lambda self: self._recall(4),
        0x93: _find,
        0x81: _create,
        ord("R"): _call,
        ord("b"): _build,
    }


def parse(data: bytes, where: str) -> Metadata:
    """The ``Metadata`` in the bytes of a ``.metadata`` file; CheckpointError names ``where`` and what is in there."""
    try:
        return _Reader(data).read()
    except _Refused as refused:
        raise CheckpointError(
            f"dist_asgd: {where} is damaged, or is no metadata of torch.distributed.checkpoint: it holds {refused}. "
            f"Nothing of it was run."
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"dist_asgd: {where} is damaged: a name in it is no text ({error.reason}).") from None


def check(metadata: Metadata, sizes: Mapping[str, int], where: str) -> None:
    """Every chunk lies inside its tensor and its file, no two overlap in either, and together they are the tensor.

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
    places = [
        (info.relative_path, info.offset, info.length, index.fqn) for index, info in metadata.storage_data.items()
    ]
    for name, offset, length, fqn in sorted(places):
        if name not in sizes:
            raise CheckpointError(f"dist_asgd: {name}, which holds {fqn}, is missing: {where} is not whole.")
        stop, before = last.get(name, (0, ""))
        if offset < stop:
            raise CheckpointError(f"dist_asgd: {where}: the data of {fqn} and of {before} overlap in {name}.")
        if offset + length > sizes[name]:
            raise CheckpointError(
                f"dist_asgd: {name} has {sizes[name]} bytes, but {fqn} lies at {offset} to {offset + length} in it: "
                f"the file is truncated, or belongs to another checkpoint."
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
