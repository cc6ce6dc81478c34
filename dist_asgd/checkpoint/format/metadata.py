"""DCP's ``.metadata`` without ``pickle``: it may say what DCP writes there, and nothing else.

``.metadata`` is a pickle, and unpickling runs whatever the file asks for. ``parse``, which the reader calls, executes
the pickle's opcodes on a stack machine that looks up no class and calls nothing but the makers of this module.

DCP's ``Metadata`` holds, for every key, either the shape of a tensor and its chunks (regions of it), or the fact that
it is an object; and for every chunk, by its *index*, which bytes of which file hold it.

record     an object that the pickle creates empty and then gives its state
call       an object that the pickle makes of its arguments at once
constant   a name that stands for one value, such as ``torch.float32``
maker      a function of this module that turns the state of a record, or the arguments of a call, into the real object;
           it checks them and raises ``Refusal`` if they are not as DCP writes them
"""

from __future__ import annotations

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

from .manifest import CheckpointError, check_name

METADATA_NAME = ".metadata"
MAX_METADATA_BYTES = 1 << 30


class Refusal(Exception):
    """The pickle holds something that it should not hold; the message completes the sentence "it holds ..."."""


def want(ok: bool, what: str) -> None:
    """Raise ``Refusal`` unless ``ok``."""
    if not ok:
        raise Refusal(what)


Name = tuple[str, str]
"""Module and name of a class, function or constant, as pickles have them."""
Maker = Callable[[Any], Any]


class _Record:
    """A record on the stack: ``make`` is its maker until its state arrives, then None; ``value`` is the result."""

    __slots__ = ("make", "value")

    def __init__(self, make: Maker) -> None:
        self.make: Maker | None = make
        self.value: Any = None


class _Global:
    """A name on the stack, one of the tables below."""

    __slots__ = ("name",)

    def __init__(self, name: Name) -> None:
        self.name = name


_MARK = object()


def _value_of(value: Any) -> Any:
    """Return the value of an entry of the stack; raises ``Refusal`` for marks, names and records without state."""
    kind = type(value)
    if kind is _Record:
        if value.make is not None:
            raise Refusal("an object that is used before it is made")
        return value.value
    if value is _MARK or kind is _Global:
        raise Refusal("a mark or a name where a value should be")
    return value


class Machine:
    """The stack machine of ``pickle``, with no other opcodes than plain values, records and calls need."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._stack: list[Any] = []
        self._memo: list[Any] = []

    def run(self) -> Any:
        """Return the one object that the pickle makes; raises ``Refusal`` for anything that DCP does not write."""
        data, opcodes, stack, memo = self._data, self._OPCODES, self._stack, self._memo
        length = len(data)
        while self._at < length:
            code = data[self._at]
            self._at += 1
            # Two thirds of all opcodes are these; handling them here saves a function call for each.
            if code == 0x94:  # MEMOIZE
                if not stack or stack[-1] is _MARK:
                    raise Refusal("nothing to remember")
                memo.append(stack[-1])
            elif code == 0x68 or code == 0x6A:  # BINGET, LONG_BINGET
                first = self._at
                self._at += 1 if code == 0x68 else 4
                place = int.from_bytes(data[first : self._at], "little")
                if self._at > length or place >= len(memo):
                    raise Refusal("a reference to nothing")
                stack.append(memo[place])
            elif code == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif code == 0x28:  # MARK
                stack.append(_MARK)
            elif code == 0x2E:  # STOP
                want(self._at == length and len(stack) == 1, "something after the end")
                return self._pop()
            else:
                handler = opcodes.get(code)
                if handler is None:
                    raise Refusal(f"opcode 0x{code:02x}")
                handler(self)
        raise Refusal("an end before the end")

    def _take(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > len(self._data):
            raise Refusal("an end before the end")
        return self._data[start : self._at]

    def _pop(self) -> Any:
        """Pop the top of the stack as a value."""
        if not self._stack:
            raise Refusal("a missing operand")
        return _value_of(self._stack.pop())

    def _pop_to_mark(self) -> list[Any]:
        stack = self._stack
        for at in range(len(stack) - 1, -1, -1):
            if stack[at] is _MARK:
                values = [_value_of(value) for value in stack[at + 1 :]]
                del stack[at:]
                return values
        raise Refusal("a missing mark")

    def _protocol(self) -> None:
        # 4 and 5 are what Python writes by default; the older ones have more opcodes than this machine.
        want(self._take(1)[0] in (4, 5), "a pickle protocol other than 4 and 5")

    def _frame(self) -> None:
        # Its length serves readers of streams; here all bytes are in memory.
        self._take(8)

    def _tuple(self) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def _tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise Refusal("a missing operand")
        self._stack[-count:] = [tuple(map(_value_of, self._stack[-count:]))]

    def _string(self, count: int) -> None:
        length = int.from_bytes(self._take(count), "little")
        self._stack.append(str(self._take(length), "utf-8"))

    def _int(self, count: int) -> None:
        self._stack.append(int.from_bytes(self._take(count), "little", signed=count == 4))

    def _long(self) -> None:
        count = self._take(1)[0]
        # 8 bytes, and one for the sign: DCP writes no longer numbers.
        want(count <= 9, "a number beyond 64 bits")
        self._stack.append(int.from_bytes(self._take(count), "little", signed=True))

    def _append(self, values: list[Any]) -> None:
        want(bool(self._stack) and type(self._stack[-1]) is list, "an append to something else than a list")
        self._stack[-1].extend(values)

    def _set(self, values: list[Any]) -> None:
        want(bool(self._stack) and type(self._stack[-1]) is dict and len(values) % 2 == 0, "items of no dict")
        target = self._stack[-1]
        num_keys = len(target) + len(values) // 2
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in _KEY_TYPES:
                raise Refusal("a key that is no name")
            target[key] = value
        # pickle would let the second value replace the first.
        want(len(target) == num_keys, "a key that occurs twice")

    def _set_one(self) -> None:
        value = self._pop()
        self._set([self._pop(), value])

    def _find(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise Refusal("a name that is no string")
        # The name is looked up in the tables of this module, and never imported.
        full = (module, name)
        if full in _CONSTANTS:
            self._stack.append(_CONSTANTS[full])
        elif full in _RECORDS or full in _CALLS or full in _STATELESS:
            self._stack.append(_Global(full))
        else:
            raise Refusal(f"{module[:80]}.{name[:80]}")

    def _name(self) -> Name:
        found = self._stack.pop() if self._stack else None
        if type(found) is not _Global:
            raise Refusal("a call of something that has no name")
        return found.name

    def _create(self) -> None:
        args, name = self._pop(), self._name()
        want(args == (), "an object with arguments")
        if name in _RECORDS:
            self._stack.append(_Record(_RECORDS[name]))
        elif name in _STATELESS:
            self._stack.append(_STATELESS[name]())
        else:
            raise Refusal(f"an object of {'.'.join(name)}")

    def _call(self) -> None:
        args, name = self._pop(), self._name()
        make = _CALLS.get(name)
        if make is None:
            raise Refusal(f"a call of {'.'.join(name)}")
        self._stack.append(make(args))

    def _build(self) -> None:
        state = self._pop()
        made = self._stack[-1] if self._stack else None
        if type(made) is not _Record or made.make is None:
            raise Refusal("state for something that takes none")
        made.value, made.make = made.make(state), None

    _OPCODES: Mapping[int, Callable[[Machine], None]] = {
        0x80: _protocol,
        0x95: _frame,
        ord("}"): lambda self: self._stack.append({}),
        ord("]"): lambda self: self._stack.append([]),
        ord("N"): lambda self: self._stack.append(None),
        0x88: lambda self: self._stack.append(True),
        0x89: lambda self: self._stack.append(False),
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
        0x93: _find,
        0x81: _create,
        ord("R"): _call,
        ord("b"): _build,
    }


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


def _fields(state: Any, required: set[str], optional: set[str], what: str) -> dict[str, Any]:
    want(type(state) is dict and required <= state.keys() <= required | optional, f"the state of a {what}")
    return state  # type: ignore[no-any-return]


def _size(args: Any) -> torch.Size:
    want(type(args) is tuple and len(args) == 1 and type(args[0]) is tuple, "torch.Size of something else than sizes")
    # A tensor of torch has at most 64 dimensions.
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
    # The paths of StorageMeta are only shown, so a string does for them.
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
    # Copied: the pickle still refers to its own list, and later opcodes could append to it unchecked.
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
        raise Refusal(str(error)) from None
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
    planner_data: Any = fields.get("planner_data")
    storage_data: Any = fields.get("storage_data")
    entries = (TensorStorageMetadata, BytesStorageMetadata)
    want(type(keys) is dict and all(type(k) is str and type(v) in entries for k, v in keys.items()), "the keys")
    kinds = (MetadataIndex, _StorageInfo)
    ok = type(storage_data) is dict and all((type(k), type(v)) == kinds for k, v in storage_data.items())
    want(ok, "where the data lies")
    if planner_data is not None:
        ok = type(planner_data) is dict and all(type(k) is str and type(v) is tuple for k, v in planner_data.items())
        words = [word for path in planner_data.values() for word in path] if ok else []
        want(ok and all(type(word) in (str, int) for word in words), "the planner's data")
    meta, version = fields.get("storage_meta"), fields.get("version")
    want(meta is None or type(meta) is StorageMeta, "its StorageMeta")
    want(version is None or type(version) is str, "its version")
    planner_data = None if planner_data is None else dict(planner_data)
    return Metadata(dict(keys), planner_data, dict(storage_data), meta or StorageMeta(), version)


_DCP = "torch.distributed.checkpoint."
_CONSTANTS: Mapping[Name, Any] = {("torch", name): dtype for name, dtype in DTYPES.items()}
_CALLS: Mapping[Name, Maker] = {
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _layout,
    (_DCP + "metadata", "_MEM_FORMAT_ENCODING"): _memory_format,
    ("pathlib", "PosixPath"): _path,
    ("pathlib", "WindowsPath"): _path,
    ("pathlib._local", "PosixPath"): _path,
    ("pathlib._local", "WindowsPath"): _path,
}
_RECORDS: Mapping[Name, Maker] = {
    (_DCP + "metadata", "Metadata"): _metadata,
    (_DCP + "metadata", "TensorStorageMetadata"): _tensor,
    (_DCP + "metadata", "TensorProperties"): _properties,
    (_DCP + "metadata", "ChunkStorageMetadata"): _chunk,
    (_DCP + "metadata", "MetadataIndex"): _index,
    (_DCP + "metadata", "StorageMeta"): _storage_meta,
    (_DCP + "filesystem", "_StorageInfo"): _info,
}
# Objects that the pickle creates and gives no state.
_STATELESS: Mapping[Name, Callable[[], Any]] = {(_DCP + "metadata", "BytesStorageMetadata"): BytesStorageMetadata}
_KEY_TYPES = (str, MetadataIndex)


def parse(data: bytes, where: str) -> Metadata:
    """Return the ``Metadata`` in the bytes of the ``.metadata`` file at ``where``.

    Raises CheckpointError, which names ``where`` and what the file holds instead. Nothing in the file is executed.
    """
    try:
        metadata = Machine(data).run()
        want(type(metadata) is Metadata, "something that is no Metadata")
    except Refusal as refused:
        raise CheckpointError(
            f"dist_asgd: {where} is damaged, or is no metadata of torch.distributed.checkpoint: it holds {refused}. "
            f"Nothing of it was run."
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"dist_asgd: {where} is damaged: a name in it is no text ({error.reason}).") from None
    return metadata  # type: ignore[no-any-return]
