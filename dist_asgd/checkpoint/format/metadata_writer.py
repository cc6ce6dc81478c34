"""DCP's ``.metadata`` from a ``ChunkTable``: the pickle that DCP's own readers unpickle, written column by column.

``pickle`` needs twice the bytes and twenty times the time for it: it writes each of the two objects that DCP has of
every chunk as a dict of its fields. Here they are calls of DCP's classes with their arguments, and whatever is used
more than once is made once, at the beginning: names of files, keys, offsets and sizes. The pickle machine remembers
these by number, its *memo*. A number below 256 takes 2 bytes and any other 5, so the keys with most chunks come first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint.metadata import TensorProperties

from .chunk_table import ChunkTable, Column
from .opcodes import (
    APPENDS,
    BUILD,
    CALL,
    CREATE,
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_TUPLE,
    FALSE,
    MARK,
    MEMOIZE,
    NONE,
    POP_MARK,
    PROTOCOL,
    SET_ITEMS,
    STOP,
    TUPLE,
    TUPLES,
    get_of,
    name_of,
    number_of,
    text_of,
    word_of,
)

_DCP = "torch.distributed.checkpoint."
_MEMO_NUMBERS_OF_TWO_BYTES = 256
_FRAME_BYTES = 1 << 16
_ROWS_AT_ONCE = 1 << 15
_INDEX, _INFO, _SIZE, _REGION, _TENSOR, _OBJECT = range(6)
_CLASSES = (
    (_DCP + "metadata", "MetadataIndex"),
    (_DCP + "filesystem", "_StorageInfo"),
    ("torch", "Size"),
    (_DCP + "metadata", "ChunkStorageMetadata"),
    (_DCP + "metadata", "TensorStorageMetadata"),
)


def metadata_bytes(table: ChunkTable) -> bytes:
    """Return the bytes of ``.metadata``. Every region of a tensor has offsets of its own."""
    return _Writer(table).run()


class _Writer:
    """One pickle, in pieces of whole opcodes; ``_memo`` has the number of each thing that is used more than once."""

    def __init__(self, table: ChunkTable) -> None:
        self._table = table
        self._pieces: list[bytes] = []
        self._count = 0
        self._memo: dict[Any, int] = {}
        self._first_rows = table.first_rows()

    def run(self) -> bytes:
        """Return all of it."""
        self._pieces.append(MARK)
        self._prepare()
        self._pieces += (POP_MARK, name_of(_DCP + "metadata", "Metadata"), EMPTY_TUPLE, CREATE, EMPTY_DICT, MARK)
        self._pieces.append(text_of("storage_data"))
        self._dict(self._places())
        self._pieces.append(text_of("state_dict_metadata"))
        self._dict(self._entries())
        self._pieces.append(text_of("planner_data"))
        self._dict(self._paths())
        # The identifier of the save comes last, where ``identity_of`` looks for it.
        meta = self._table.storage_meta
        assert meta is not None
        self._pieces += (text_of("storage_meta"), name_of(_DCP + "metadata", "StorageMeta"), EMPTY_TUPLE, CREATE)
        self._pieces += (EMPTY_DICT, MARK, text_of("checkpoint_id"), text_of(str(meta.checkpoint_id)))
        self._pieces += (text_of("save_id"), text_of(str(meta.save_id)), text_of("load_id"), NONE)
        self._pieces += (text_of("modules"), EMPTY_LIST, SET_ITEMS, BUILD)
        self._pieces += (text_of("version"), text_of(str(self._table.version)), SET_ITEMS, BUILD, STOP)
        return PROTOCOL + b"".join(_framed(self._pieces))

    # --- what is used more than once -------------------------------------------------------------------------

    def _remember(self, thing: Any, opcodes: bytes) -> None:
        """Make a thing, which stays on the stack until the mark is popped, and give it a number."""
        if thing not in self._memo:
            self._memo[thing] = self._count
            self._count += 1
            self._pieces += (opcodes, MEMOIZE)

    def _prepare(self) -> None:
        table = self._table
        for number, name in enumerate(_CLASSES):
            self._remember(number, name_of(*name))
        self._remember(_OBJECT, name_of(_DCP + "metadata", "BytesStorageMetadata") + EMPTY_TUPLE + CREATE)
        num_rows = dict(zip(table.kinds, np.diff(self._first_rows).tolist(), strict=True))
        keys = list(dict.fromkeys([*(table.planner_data or {}), *table.kinds]))
        frequent = sorted(keys, key=lambda key: -num_rows.get(key, 0))
        room = max(0, _MEMO_NUMBERS_OF_TWO_BYTES - self._count)
        for key in frequent[:room]:
            self._remember(("text", key), text_of(key))
        for source in table.sources:
            self._remember(("text", source.relative_path), text_of(source.relative_path))
        for key in frequent[room:]:
            self._remember(("text", key), text_of(key))
        for path in (table.planner_data or {}).values():
            self._remember(("text", path[0]), text_of(str(path[0])))
        for kind in table.kinds.values():
            if kind is not None:
                self._size(tuple(kind[1]))
                self._remember(("properties", kind[0].dtype), _properties(kind[0]))
        self._starts = [self._cut(number, cut) for number, cut in enumerate(table.cuts)]

    def _size(self, size: tuple[int, ...]) -> int:
        """Return the memo's number of a ``torch.Size``."""
        if size not in self._memo:
            numbers = b"".join(map(number_of, size))
            made = numbers + TUPLES[len(size)] if len(size) < len(TUPLES) else MARK + numbers + TUPLE
            self._remember(size, self._get(_SIZE) + made + TUPLES[1] + CALL)
        return self._memo[size]

    def _cut(self, number: int, cut: Column) -> Column:
        """Make the list of the regions of a cut; returns the memo's numbers of their offsets."""
        numbers = [(self._size(tuple(offsets)), self._size(tuple(sizes))) for offsets, sizes in cut.tolist()]
        region, opcodes = self._get(_REGION), list[bytes]()
        for offsets_number, sizes_number in numbers:
            opcodes += (region, get_of(offsets_number), get_of(sizes_number), TUPLES[2], CALL)
        self._remember(("cut", number), EMPTY_LIST + MARK + b"".join(opcodes) + APPENDS)
        return np.array([offsets_number for offsets_number, _ in numbers], np.int64)

    def _get(self, thing: Any) -> bytes:
        return get_of(self._memo[thing])

    # --- the dicts -------------------------------------------------------------------------------------------

    def _dict(self, items: Iterable[bytes]) -> None:
        self._pieces.append(EMPTY_DICT)
        for some in items:
            self._pieces += (MARK, some, SET_ITEMS)

    def _places(self) -> Iterator[bytes]:
        """Yield the items of ``storage_data``: the index of a chunk, and the place of it."""
        table = self._table
        files = np.array([self._memo["text", source.relative_path] for source in table.sources], np.int64)
        index, info = self._get(_INDEX), self._get(_INFO)
        objects = list[bytes]()
        names, starts, rows = list[Column](), list[Column](), list[Column]()
        waiting = 0
        for position, (key, number) in enumerate(zip(table.kinds, table.cut_of.tolist(), strict=True)):
            first, stop = self._first_rows[position], self._first_rows[position + 1]
            if number < 0:
                source, offset, length = table.ranges[first].tolist()
                place = get_of(int(files[source])) + number_of(offset) + number_of(length)
                objects += (index, self._get(("text", key)), TUPLES[1], CALL, info, place, TUPLES[3], CALL)
                continue
            names.append(np.full(stop - first, self._memo["text", key], np.int64))
            starts.append(self._starts[number])
            rows.append(np.arange(first, stop))
            waiting += stop - first
            if waiting >= _ROWS_AT_ONCE:
                yield _opcodes_of(index, info, names, starts, files, table.ranges[np.concatenate(rows)])
                names, starts, rows, waiting = [], [], [], 0
        if waiting:
            yield _opcodes_of(index, info, names, starts, files, table.ranges[np.concatenate(rows)])
        yield b"".join(objects)

    def _entries(self) -> Iterator[bytes]:
        """Yield the items of ``state_dict_metadata``."""
        tensor = self._get(_TENSOR)
        for (key, kind), number in zip(self._table.kinds.items(), self._table.cut_of.tolist(), strict=True):
            name = self._get(("text", key))
            if kind is None:
                yield name + self._get(_OBJECT)
                continue
            parts = self._get(("properties", kind[0].dtype)), self._get(tuple(kind[1])), self._get(("cut", number))
            yield name + tensor + b"".join(parts) + TUPLES[3] + CALL

    def _paths(self) -> Iterator[bytes]:
        """Yield the items of ``planner_data``: the path of each key."""
        for key, path in (self._table.planner_data or {}).items():
            words = [self._get(("text", path[0])), *map(word_of, path[1:])]
            made = b"".join(words)
            made = made + TUPLES[len(words)] if len(words) < len(TUPLES) else MARK + made + TUPLE
            yield self._get(("text", key)) + made


def _framed(pieces: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the pieces in frames, which readers of streams read at once."""
    frame, size = list[bytes](), 0
    for piece in (*pieces, b""):
        frame.append(piece)
        size += len(piece)
        if size >= _FRAME_BYTES or not piece:
            yield b"\x95" + size.to_bytes(8, "little")
            yield from frame
            frame, size = [], 0


# --- opcodes ---------------------------------------------------------------------------------------------


def _properties(properties: TensorProperties) -> bytes:
    """Return what makes the properties of a dtype; all others are those that a tensor has by default."""
    layout = name_of("torch.serialization", "_get_layout") + text_of(str(torch.strided)) + TUPLES[1] + CALL
    memory_format = name_of(_DCP + "metadata", "_MEM_FORMAT_ENCODING") + number_of(0) + TUPLES[1] + CALL
    dtype = name_of("torch", str(properties.dtype).removeprefix("torch."))
    state = MARK + dtype + layout + FALSE + memory_format + FALSE + TUPLE
    return name_of(_DCP + "metadata", "TensorProperties") + EMPTY_TUPLE + CREATE + state + BUILD


def _opcodes_of(
    index: bytes, info: bytes, names: Sequence[Column], starts: Sequence[Column], files: Column, ranges: Column
) -> bytes:
    """Return the opcodes of many rows: ``MetadataIndex(key, offsets)`` and ``_StorageInfo(file, offset, length)``.

    Args:
        names, starts: the memo's numbers of the key and of the offsets of each row.
        files: the memo's number of each file's name.
        ranges: ``(rows, 3)``, as in the table.
    """
    num_rows = len(ranges)
    fields = [
        *(_constant(index, num_rows), *map(_gets, (np.concatenate(names), np.concatenate(starts)))),
        *(_constant(TUPLES[2] + CALL + info, num_rows), _gets(files[ranges[:, 0]])),
        *(_ints(ranges[:, 1]), _ints(ranges[:, 2]), _constant(TUPLES[3] + CALL, num_rows)),
    ]
    opcodes = np.concatenate([field for field, _ in fields], axis=1)
    wanted = [np.arange(field.shape[1]) < lengths[:, None] for field, lengths in fields]
    return opcodes[np.concatenate(wanted, axis=1)].tobytes()


Field = tuple[npt.NDArray[np.uint8], Column]
"""The bytes of one field of each row, ``(rows, most)``, and how many of them count."""


def _constant(data: bytes, num_rows: int) -> Field:
    return np.tile(np.frombuffer(data, np.uint8), (num_rows, 1)), np.full(num_rows, len(data), np.int64)


def _gets(numbers: Column) -> Field:
    short = numbers < _MEMO_NUMBERS_OF_TWO_BYTES
    opcodes = np.where(short, ord("h"), ord("j")).astype(np.uint8)
    return np.column_stack([opcodes, _bytes_of(numbers, 4)]), np.where(short, 2, 5)


def _ints(numbers: Column) -> Field:
    """As ``_int`` does for one number; none is negative."""
    limits = np.array([1 << 8, 1 << 16, 1 << 31], np.int64)
    kinds = np.searchsorted(limits, numbers, "right")
    opcodes = np.frombuffer(b"KMJ\x8a", np.uint8)[kinds]
    if not (kinds == 3).any():
        return np.column_stack([opcodes, _bytes_of(numbers, 4)]), np.array([2, 3, 5])[kinds]
    # The longest has the number of its bytes before them, at the place of the first byte of the others.
    data = np.column_stack([opcodes, _bytes_of(numbers, 8), np.zeros(len(numbers), np.uint8)])
    is_long = kinds == 3
    data[is_long, 2:] = data[is_long, 1:-1]
    data[is_long, 1] = 8
    return data, np.array([2, 3, 5, 10])[kinds]


def _bytes_of(numbers: Column, count: int) -> npt.NDArray[np.uint8]:
    """Return the lowest bytes of each number, ``(rows, count)``."""
    return np.ascontiguousarray(numbers, np.dtype("<i8")).view(np.uint8).reshape(-1, 8)[:, :count]
