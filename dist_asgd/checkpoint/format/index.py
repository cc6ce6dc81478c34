"""``chunks.index``: where the chunks of a checkpoint lie, with a hash of each, in columns that are read at once.

It says what DCP's ``.metadata`` and the hashes of a manifest of format 1 say together. ``.metadata``, a pickle, serves
DCP's own readers; a load of this package reads the index, which takes a tenth of the time. Rank 0 makes both of one
``ChunkTable``, the manifest has a hash of both, and ``verify`` compares them. It was not necessarily this package that
wrote an index: ``decode`` checks all of it, and ``check_table`` that it fits the data files.

::

    "dist_asgd chunks\\n"   and the length of the header, 8 bytes
    header                 JSON: keys, files, cuts, and the type of each column
    columns                numbers without a sign, little-endian: offsets and sizes of all regions of all cuts; then of
                           each row its file, its offset and its length in bytes; then the hashes, 16 bytes each

The words are those of ``chunk_table``.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, NoReturn

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta, TensorProperties

from .chunk_table import HASH_BYTES, ChunkTable, Column, SavedBy, narrow
from .manifest import CheckpointError, check_name
from .metadata import DTYPES
from .writer import path_of_key

INDEX_NAME = "chunks.index"
MAX_INDEX_BYTES = 1 << 28
_MAGIC = b"dist_asgd chunks\n"
_LENGTH_BYTES = 8
_HEADER = {"checkpoint_id", "columns", "cuts", "files", "keys", "paths", "save_id", "version"}
_COLUMN_TYPES = ("u1", "u2", "u4", "u8")
# The type of each column of rows; the regions come before them.
_NUM_COLUMNS = 4
_MAX_DIMENSIONS = 64
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


def encode(table: ChunkTable) -> bytes:
    """Return the bytes of the index of ``table``, which has hashes, and whose tensors have no properties but a dtype.

    Tables that differ have different bytes.
    """
    assert table.hashes is not None
    assert table.storage_meta is not None
    regions = np.concatenate([cut.ravel() for cut in table.cuts]) if table.cuts else np.empty(0, np.int64)
    columns = [narrow(column) for column in (regions, *table.ranges.T)]
    keys: list[Any] = [
        key if kind is None else [key, _NAME_OF[kind[0].dtype], list(kind[1]), number]
        for (key, kind), number in zip(table.kinds.items(), table.cut_of.tolist(), strict=True)
    ]
    positions = {key: position for position, key in enumerate(table.kinds)}
    paths: list[Any] = []
    for key, path in (table.planner_data or {}).items():
        position = positions.get(key)
        paths.append(position if position is not None and path == path_of_key(key) else [key, *path])
    header = {
        "checkpoint_id": str(table.storage_meta.checkpoint_id),
        "columns": [column.dtype.str[1:] for column in columns],
        "cuts": [[len(cut), cut.shape[2]] for cut in table.cuts],
        "files": [source.relative_path for source in table.sources],
        "keys": keys,
        "paths": paths,
        "save_id": table.storage_meta.save_id,
        "version": table.version,
    }
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    little = [column.astype(column.dtype.newbyteorder("<"), copy=False).tobytes() for column in columns]
    return b"".join((_MAGIC, len(text).to_bytes(_LENGTH_BYTES, "little"), text, *little, table.hashes.tobytes()))


def decode(data: bytes, where: str, files: Collection[str], saved_by: SavedBy | None) -> ChunkTable:
    """Parse and check an index that anybody may have written; ``files`` are the names in the manifest.

    Raises CheckpointError, which names ``where`` and what is wrong.
    """
    try:
        return _decode(data, files, saved_by)
    except _WrongError as error:
        raise CheckpointError(
            f"dist_asgd: {where} is damaged, or was not written by dist_asgd: {error}. Use another checkpoint; the "
            f"tensors of this one may still be read with verify=False (--no-verify), without any hashes."
        ) from None


class _WrongError(Exception):
    """What is wrong with an index."""


def _refuse(what: str) -> NoReturn:
    raise _WrongError(what)


def _want(condition: bool, what: str) -> None:
    if not condition:
        raise _WrongError(what)


def _is_count(value: object) -> bool:
    # As in ``metadata``: no bool, and the sum of two fits into 64 bits.
    return type(value) is int and 0 <= value < 1 << 62


def _decode(data: bytes, files: Collection[str], saved_by: SavedBy | None) -> ChunkTable:
    start = len(_MAGIC) + _LENGTH_BYTES
    _want(data.startswith(_MAGIC), "it does not begin as an index does")
    stop = start + int.from_bytes(data[len(_MAGIC) : start], "little")
    _want(start <= stop <= len(data), "its header is longer than the file")
    header = _header_of(data[start:stop])
    names = _names_of(header["files"], files)
    shapes = _cut_shapes(header["cuts"])
    kinds, cut_of = _kinds_of(header["keys"], shapes)
    num_rows = sum(1 if number < 0 else shapes[number][0] for number in cut_of)
    regions, *ranges, digests = _columns_of(memoryview(data)[stop:], header["columns"], shapes, num_rows)
    _want(not num_rows or int(ranges[0].max()) < len(names), "a chunk lies in a file that it does not list")
    cuts, first = list[Column](), 0
    for count, dimensions in shapes:
        numbers = 2 * count * dimensions
        cuts.append(regions[first : first + numbers].reshape(count, 2, dimensions))
        first += numbers
    meta, version = (header["checkpoint_id"], header["save_id"]), header["version"]
    ok = all(type(text) is str for text in (*meta, version))
    _want(ok, "'checkpoint_id', 'save_id' and 'version' must be strings")
    return ChunkTable(
        kinds,
        cuts,
        np.array(cut_of, np.int64),
        np.stack(ranges, axis=1),
        digests,
        [_StorageInfo(name, 0, 0) for name in names],
        _paths_of(header["paths"], list(kinds)),
        StorageMeta(*meta),
        version,
        saved_by,
    )


def _header_of(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        header = dict(pairs)
        _want(len(header) == len(pairs), "a key of its header occurs twice")
        return header

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        _refuse(f"its header is not JSON as it should be ({error})")
    _want(isinstance(header, dict) and set(header) == _HEADER, f"its header has not the keys {sorted(_HEADER)}")
    for name in ("columns", "cuts", "files", "keys", "paths"):
        _want(type(header[name]) is list, f"'{name}' must be a list")
    return header  # type: ignore[no-any-return]


def _names_of(names: list[Any], files: Collection[str]) -> list[str]:
    try:
        found = [check_name(name) for name in names]
    except ValueError as error:
        _refuse(str(error))
    for name in found:
        _want(name in files, f"{name} is not among the files of the manifest")
    _want(len(set(found)) == len(found), "a file is listed twice")
    return found


def _cut_shapes(cuts: list[Any]) -> list[tuple[int, int]]:
    """Return the numbers of regions and of dimensions of each cut."""
    for cut in cuts:
        ok = type(cut) is list and len(cut) == 2 and all(map(_is_count, cut)) and cut[1] <= _MAX_DIMENSIONS
        _want(ok, "a cut must be the numbers of its regions and of its dimensions")
    return [(count, dimensions) for count, dimensions in cuts]


def _kinds_of(
    keys: list[Any], shapes: list[tuple[int, int]]
) -> tuple[dict[str, tuple[TensorProperties, torch.Size] | None], list[int]]:
    """Return ``kinds`` and ``cut_of`` of the table."""
    kinds: dict[str, tuple[TensorProperties, torch.Size] | None] = {}
    cut_of = list[int]()
    properties: dict[str, TensorProperties] = {}
    for entry in keys:
        if type(entry) is str:
            kinds[entry] = None
            cut_of.append(-1)
            continue
        _want(type(entry) is list and len(entry) == 4, "a key must be a string, or [key, dtype, shape, cut]")
        key, dtype, shape, number = entry
        _want(type(key) is str, "a key that is no string")
        _want(type(dtype) is str and dtype in DTYPES, f"the dtype of {key} is none")
        ok = type(shape) is list and len(shape) <= _MAX_DIMENSIONS and all(map(_is_count, shape))
        _want(ok, f"the shape of {key} must be a list of whole numbers")
        _want(_is_count(number) and number < len(shapes), f"{key} has a cut that is not there")
        _want(shapes[number][1] == len(shape), f"the cut of {key} has other dimensions than its shape")
        if dtype not in properties:
            properties[dtype] = TensorProperties(DTYPES[dtype])
        kinds[key] = properties[dtype], torch.Size(shape)
        cut_of.append(number)
    _want(len(kinds) == len(keys), "a key occurs twice")
    return kinds, cut_of


def _columns_of(data: memoryview, types: list[Any], shapes: list[tuple[int, int]], num_rows: int) -> list[Any]:
    """Return the columns, int64, and at the end the hashes ``(rows, 16)``."""
    ok = len(types) == _NUM_COLUMNS and all(type(kind) is str and kind in _COLUMN_TYPES for kind in types)
    _want(ok, f"'columns' must be {_NUM_COLUMNS} of {list(_COLUMN_TYPES)}")
    counts = [sum(2 * count * dimensions for count, dimensions in shapes), *[num_rows] * (_NUM_COLUMNS - 1)]
    sizes = [count * np.dtype(kind).itemsize for count, kind in zip(counts, types, strict=True)]
    # Before any memory is taken: the header may say anything.
    wanted = sum(sizes) + num_rows * HASH_BYTES
    _want(wanted == len(data), f"its columns have {len(data)} bytes, and its header says {wanted}")
    columns, at = list[Any](), 0
    for kind, size in zip(types, sizes, strict=True):
        column = np.frombuffer(data[at : at + size], np.dtype(f"<{kind}"))
        _want(not size or int(column.max()) < 1 << 62, "a number beyond 62 bits")
        columns.append(column.astype(np.int64))
        at += size
    columns.append(np.frombuffer(data[at:], np.uint8).reshape(-1, HASH_BYTES))
    return columns


def _paths_of(paths: list[Any], keys: list[str]) -> dict[str, Any]:
    """Return DCP's path of each key: a number stands for the usual path of the key with this number."""
    found: dict[str, Any] = {}
    for entry in paths:
        if type(entry) is int:
            _want(0 <= entry < len(keys), "the path of a key that is not there")
            found[keys[entry]] = path_of_key(keys[entry])
            continue
        ok = type(entry) is list and len(entry) > 1 and type(entry[0]) is str
        _want(ok and all(type(word) in (str, int) for word in entry), "a path must be a number, or [key, ...]")
        found[entry[0]] = tuple(entry[1:])
    _want(len(found) == len(paths), "a key has two paths")
    return found


def least_bytes_of_rows(count: int, largest_offset: int, largest_length: int) -> int:
    """Return how many bytes ``count`` rows of one file take at least."""
    widths = sum(np.min_scalar_type(number).itemsize for number in (largest_offset, largest_length))
    return count * (1 + widths + HASH_BYTES)
