"""What each rank tells rank 0 of the file that it has written, and the table of all chunks that rank 0 makes of that.

A rank has hundreds of chunks at hundreds of ranks, so they travel in columns (``packed``), and rank 0 puts those of all
ranks together at once (``table_of``). ``described`` makes the two files of the table that readers read.
"""

from __future__ import annotations

import math
import pickle
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta, TensorProperties

from .chunk_table import HASH_BYTES, ChunkTable, Column, Cuts, narrow
from .garbage import collections_paused
from .index import INDEX_NAME, decode, encode
from .manifest import FileEntry
from .metadata_writer import metadata_bytes
from .paths import AnyPath
from .room import check_room
from .table_extents import check_table
from .writer import KeyPath, WrittenFile, path_of_key

Kind = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class FileReport:
    """One rank's ``WrittenFile`` in columns.

    Attributes:
        paths, name, file: as there.
        kinds: dtype and shape of the tensors, and None for objects, by key.
        rows: the number of the key in ``kinds``, and that of the chunk, of each row, ``(rows, 2)``.
        regions: offsets and sizes of all rows, one after the other, 1-D.
        ranges: offset and length in bytes of each chunk, ``(chunks, 2)``.
        hashes: the hash of each chunk, ``(chunks, 16)``.
    """

    paths: Mapping[str, KeyPath]
    name: str
    file: FileEntry | None
    kinds: Mapping[str, Kind | None]
    rows: npt.NDArray[Any]
    regions: npt.NDArray[Any]
    ranges: npt.NDArray[Any]
    hashes: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, written: WrittenFile) -> FileReport:
        """Return the report of a file."""
        kinds: dict[str, Kind | None] = {}
        numbers: dict[str, int] = {}
        rows, regions = list[int](), list[int]()
        for key, chunk, dtype, shape, offsets, sizes in written.rows:
            kinds.setdefault(key, None if dtype is None else (dtype, shape))
            rows += (numbers.setdefault(key, len(numbers)), chunk)
            regions += offsets
            regions += sizes
        ranges = [number for chunk in written.chunks for number in (chunk.offset, chunk.length)]
        digests = bytes.fromhex("".join(chunk.xxh3_128 for chunk in written.chunks))
        return cls(
            written.paths,
            written.name,
            written.file,
            kinds,
            narrow(np.array(rows, np.int64).reshape(-1, 2)),
            narrow(np.array(regions, np.int64)),
            narrow(np.array(ranges, np.int64).reshape(-1, 2)),
            np.frombuffer(digests, np.uint8).reshape(-1, HASH_BYTES),
        )


def packed(written: WrittenFile | None) -> bytes:
    """Return the report of a file in a short form, which ranks of one job send to each other; None if there is none."""
    return zlib.compress(pickle.dumps(None if written is None else FileReport.of(written)), 1)


def unpacked(data: Iterable[bytes]) -> list[FileReport]:
    """Return the reports that ranks of this job have packed."""
    with collections_paused():
        return [cast(FileReport, pickle.loads(zlib.decompress(one))) for one in data]


def table_of(path: AnyPath, reports: Sequence[FileReport]) -> ChunkTable:
    """Return the table of the checkpoint that will be at ``path``: the keys in rank 0's order, then those of others.

    Of regions that several ranks have written it has the one of the lowest rank, of objects the one of the highest.
    Raises ValueError if ranks have written tensors of other shapes or dtypes under one key.
    """
    numbers: dict[str, int] = {}
    kinds: list[Kind | None] = []
    # Of equal shapes one object, although every rank has made one of its own.
    shapes: dict[Kind | None, Kind | None] = {}
    paths: dict[str, Any] = {}
    own_numbers: list[list[int]] = []
    for report in reports:
        paths.update(report.paths)
        own: list[int] = []
        for key, kind in report.kinds.items():
            number = numbers.setdefault(key, len(numbers))
            if number == len(kinds):
                kinds.append(shapes.setdefault(kind, kind))
            elif kinds[number] != kind:
                raise ValueError(
                    f"dist_asgd: {path} cannot be saved: {report.name} has {key} as {_shown(kind)}, and a rank before "
                    f"it as {_shown(kinds[number])}. Build the same model on every rank."
                )
            if key not in paths:
                paths[key] = path_of_key(key)
            own.append(number)
        own_numbers.append(own)
    rows = _rows_of(reports, own_numbers, [0 if kind is None else len(kind[1]) for kind in kinds])
    meta = StorageMeta(checkpoint_id=str(path), save_id=str(uuid.uuid4()))
    sources = [_StorageInfo(report.name, 0, 0) for report in reports if report.file is not None]
    cuts, cut_of, chosen = Cuts(), list[int](), list[Column]()
    for kind, first, stop in zip(kinds, rows.firsts, rows.firsts[1:], strict=False):
        at = np.arange(first, stop)
        if kind is None:
            cut_of.append(-1)
            chosen.append(at[-1:])
            continue
        cut, kept = _cut_of(rows, at, kind[1])
        cut_of.append(cuts.add(cut, *cut.shape[::2]))
        chosen.append(at[kept])
    order = np.concatenate(chosen) if chosen else np.empty(0, np.int64)
    properties = {kind[0]: TensorProperties(kind[0]) for kind in kinds if kind is not None}
    entries = [None if kind is None else (properties[kind[0]], torch.Size(kind[1])) for kind in kinds]
    return ChunkTable(
        dict(zip(numbers, entries, strict=True)),
        cuts.all,
        np.array(cut_of, np.int64),
        rows.ranges[order],
        rows.hashes[order],
        sources,
        paths,
        meta,
        CURRENT_DCP_VERSION,
        None,
    )


class _Rows(NamedTuple):
    """The rows of all ranks, sorted by key, and of one key by rank.

    ``firsts`` has the first row of each key, and the number of rows. ``starts`` says where the regions of each row
    begin in ``regions``. ``ranges`` and ``hashes`` are as in the table.
    """

    firsts: list[int]
    starts: Column
    regions: Column
    ranges: Column
    hashes: npt.NDArray[np.uint8]


def _rows_of(reports: Sequence[FileReport], own_numbers: Sequence[Sequence[int]], dimensions: Sequence[int]) -> _Rows:
    keys, ranges, hashes = list[Column](), list[Column](), list[Any]()
    source = -1
    for report, own in zip(reports, own_numbers, strict=True):
        source += report.file is not None
        chunks = report.rows[:, 1]
        keys.append(np.array(own, np.int64)[report.rows[:, 0]])
        sources = np.full((len(chunks), 1), source, np.int64)
        ranges.append(np.concatenate([sources, report.ranges[chunks].astype(np.int64)], axis=1))
        hashes.append(report.hashes[chunks])
    key_of = np.concatenate(keys)
    lengths = 2 * np.array(dimensions, np.int64)[key_of]
    order = np.argsort(key_of, kind="stable")
    firsts = np.concatenate([[0], np.cumsum(np.bincount(key_of, minlength=len(dimensions)))])
    return _Rows(
        firsts.tolist(),
        (np.cumsum(lengths) - lengths)[order],
        np.concatenate([report.regions for report in reports]).astype(np.int64),
        np.concatenate(ranges)[order],
        np.concatenate(hashes)[order],
    )


def _cut_of(rows: _Rows, at: Column, shape: tuple[int, ...]) -> tuple[Column, Column]:
    """Return the cut of a tensor whose rows are ``at``, and which of these rows are in it."""
    width = 2 * len(shape)
    cut = rows.regions[rows.starts[at][:, None] + np.arange(width)].reshape(len(at), 2, len(shape))
    kept = np.arange(len(at))
    numels = cut[:, 1].prod(axis=1)
    if not shape:
        kept = kept[:1]
    elif len(kept) > 1 and (not numels.all() or int(numels.sum()) != math.prod(shape)):
        # Several ranks may have written the same region, as all do of an empty tensor.
        order = np.argsort(numels == 0, kind="stable")
        _, first = np.unique(cut[order, 0], axis=0, return_index=True)
        kept = np.sort(order[first])
    return cut[kept], kept


def _shown(kind: Kind | None) -> str:
    return "a value" if kind is None else f"{list(kind[1])} {str(kind[0]).removeprefix('torch.')}"


@dataclass(frozen=True, slots=True)
class Described:
    """The bytes of the files that say what the data files hold: ``.metadata`` and the index."""

    metadata: bytes
    index: bytes


def described(path: AnyPath, reports: Sequence[FileReport]) -> Described:
    """Return ``.metadata`` and the index of the checkpoint that will be at ``path``; ``reports`` are in rank order.

    Raises ValueError or CheckpointError if no load would take them.
    """
    with collections_paused():
        table = table_of(path, reports)
        found = Described(metadata_bytes(table), encode(table))
    check_room(path, len(table.ranges), len(found.index), len(found.metadata))
    # What a reader would refuse must fail the save, and not the restart.
    sizes = {report.name: report.file.bytes for report in reports if report.file is not None}
    where = str(path / INDEX_NAME)
    check_table(decode(found.index, where, sizes, None), sizes, where)
    return found
