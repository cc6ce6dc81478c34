"""Where the chunks of a checkpoint lie, as columns of numbers: rank 0 makes them of what it has read, for all ranks.

``OpenCheckpoint.table`` makes a ``ChunkTable``, which is sent to the other ranks, and ``OpenCheckpoint.of_table`` makes
a checkpoint of it that opens data files only. A checkpoint of many ranks has hundreds of chunks for each tensor, and a
rank reads a few of them: DCP's objects are made for these alone.

source   the file of a chunk, and the form in which its bytes are there
row      one chunk; the rows of a key follow each other, in the order of DCP's metadata
cut      the regions into which a tensor is cut, in the order of its rows
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, cast, overload

import numpy as np
import numpy.typing as npt
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

from .garbage import collections_paused
from .manifest import Chunk
from .metadata import index_of

Column = npt.NDArray[np.int64]
Entry = TensorStorageMetadata | BytesStorageMetadata
HASH_BYTES = 16
_NOTHING: Column = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class SavedBy:
    """What the manifest says of the save: the number of steps before it, and of the ranks that took part."""

    step: int
    world_size: int


@dataclass(frozen=True)
class ChunkTable:
    """A checkpoint's keys and chunks.

    Attributes:
        kinds: properties and shape of each tensor, and None for an object, by key.
        cuts: the cuts of all tensors, each ``(regions, 2, dimensions)``: offsets and sizes of each region.
        cut_of: the number of each key's cut, ``(keys,)``; -1 for an object, which has one row.
        ranges: number of the source, offset and length in bytes of each row, ``(rows, 3)``.
        hashes: the hash of each row's bytes, ``(rows, 16)``; None without a manifest.
        sources: the sources, each as a ``_StorageInfo`` of offset and length 0.
        planner_data, storage_meta, version: as in DCP's metadata.
        saved_by: None without a manifest.
    """

    kinds: dict[str, tuple[TensorProperties, torch.Size] | None]
    cuts: list[Column]
    cut_of: Column
    ranges: Column
    hashes: npt.NDArray[np.uint8] | None
    sources: list[_StorageInfo]
    planner_data: dict[str, Any] | None
    storage_meta: StorageMeta | None
    version: str | None
    saved_by: SavedBy | None

    @classmethod
    def of(
        cls,
        metadata: Metadata,
        places: Sequence[_StorageInfo] | None,
        hashes: Mapping[tuple[str, int, int], str] | None,
        saved_by: SavedBy | None,
    ) -> ChunkTable:
        """Return the table of checked ``metadata``, of which every chunk has a place and, with ``hashes``, a hash.

        ``places`` are those of all chunks, in the order of keys and chunks; None if they are to be looked up.
        """
        kinds: dict[str, tuple[TensorProperties, torch.Size] | None] = {}
        cuts, cut_of = Cuts(), list[int]()
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                kinds[key] = entry.properties, entry.size
                numbers = list[int]()
                for chunk in entry.chunks:
                    numbers += chunk.offsets
                    numbers += chunk.sizes
                cut_of.append(cuts.add(numbers, len(entry.chunks), len(entry.size)))
            else:
                kinds[key] = None
                cut_of.append(-1)
        ranges, texts = list[int](), list[str]()
        numbers_of: dict[tuple[str, type, Any], int] = {}
        sources: list[_StorageInfo] = []
        for info in _places_of(metadata) if places is None else places:
            name, offset, length = info.relative_path, info.offset, info.length
            source = (name, type(info), info.transform_descriptors)
            number = numbers_of.get(source)
            if number is None:
                number = numbers_of[source] = len(sources)
                sources.append(replace(info, offset=0, length=0))
            ranges += (number, offset, length)
            if hashes is not None:
                texts.append(hashes[name, offset, length])
        digests = np.frombuffer(bytes.fromhex("".join(texts)), np.uint8).reshape(-1, HASH_BYTES)
        return cls(
            kinds,
            cuts.all,
            np.array(cut_of, np.int64),
            np.array(ranges, np.int64).reshape(-1, 3),
            None if hashes is None else digests,
            sources,
            metadata.planner_data,
            metadata.storage_meta,
            metadata.version,
            saved_by,
        )

    def first_rows(self) -> list[int]:
        """Return the first row of each key, and at the end the number of rows."""
        counts = [1 if number < 0 else len(self.cuts[number]) for number in self.cut_of.tolist()]
        return [0, *accumulate(counts)]

    def is_alike(self, key: str, other: ChunkTable) -> bool:
        """Whether ``other``, which has ``key`` too, says the same of it; hashes are not compared."""
        (kind, cut, places), (other_kind, other_cut, other_places) = self._all_of(key), other._all_of(key)
        if kind != other_kind or places != other_places:
            return False
        return np.array_equal(_NOTHING if cut is None else cut, _NOTHING if other_cut is None else other_cut)

    def _all_of(self, key: str) -> tuple[Any, Column | None, list[tuple[_StorageInfo, int, int]]]:
        """Return kind, cut and places of a key."""
        position, first, stop = self._positions[key]
        number = int(self.cut_of[position])
        places = [(self.sources[source], o, n) for source, o, n in self.ranges[first:stop].tolist()]
        return self.kinds[key], None if number < 0 else self.cuts[number], places

    @cached_property
    def _positions(self) -> dict[str, tuple[int, int, int]]:
        """The number of each key, its first row, and the row after its last one."""
        firsts = self.first_rows()
        return {key: (n, firsts[n], firsts[n + 1]) for n, key in enumerate(self.kinds)}

    def chunks(self) -> dict[str, list[Chunk]]:
        """Return the chunks of each file by its name, in order of offset; those that rows share once."""
        assert self.hashes is not None
        found: dict[str, dict[tuple[int, int], Chunk]] = {source.relative_path: {} for source in self.sources}
        names = list(found)
        order = np.lexsort((self.ranges[:, 2], self.ranges[:, 1]))
        texts = self.hashes.tobytes().hex()
        for row, (source, offset, length) in zip(order.tolist(), self.ranges[order].tolist(), strict=True):
            text = texts[2 * HASH_BYTES * row : 2 * HASH_BYTES * (row + 1)]
            found[names[source]].setdefault((offset, length), Chunk(offset, length, text))
        return {name: list(chunks.values()) for name, chunks in found.items()}

    def pack(self) -> bytes:
        """Return the table in a short form, which ranks of one job send to each other; it is no format of files."""
        columns = [narrow(column) for column in self.ranges.T]
        rest = replace(self, cuts=[narrow(cut) for cut in self.cuts], ranges=_NOTHING)
        with collections_paused():
            return zlib.compress(pickle.dumps((rest, columns)), 1)

    @classmethod
    def unpack(cls, data: bytes) -> ChunkTable:
        """Return the table that another rank of this job has packed."""
        with collections_paused():
            rest, columns = pickle.loads(zlib.decompress(data))
        cuts = [cut.astype(np.int64) for cut in rest.cuts]
        ranges = np.stack([column.astype(np.int64) for column in columns], axis=1)
        return replace(cast(ChunkTable, rest), cuts=cuts, ranges=ranges)


class Cuts:
    """Cuts by number; equal ones have one number: a parameter, its average and those of other layers are cut alike."""

    def __init__(self) -> None:
        self.all: list[Column] = []
        self._numbers: dict[tuple[tuple[int, ...], bytes], int] = {}

    def add(self, numbers: Any, count: int, dimensions: int) -> int:
        """Return the number of a cut, of which ``numbers`` are the offsets and sizes of each of ``count`` regions."""
        cut = np.array(numbers, np.int64).reshape(count, 2, dimensions)
        number = self._numbers.setdefault((cut.shape, cut.tobytes()), len(self.all))
        if number == len(self.all):
            self.all.append(cut)
        return number


def _places_of(metadata: Metadata) -> Iterator[_StorageInfo]:
    """Yield where each chunk lies, in the order of keys and chunks."""
    for key, entry in metadata.state_dict_metadata.items():
        for offsets in [c.offsets for c in entry.chunks] if isinstance(entry, TensorStorageMetadata) else [None]:
            yield metadata.storage_data[index_of(key, offsets)]


def narrow(column: Column) -> npt.NDArray[Any]:
    """Return the numbers of ``column``, none of which is negative, in the shortest dtype that holds them."""
    return column.astype(np.min_scalar_type(int(column.max(initial=0))))


class TableChunks:
    """The chunks of a ``ChunkTable`` as DCP's objects, each of which is made when it is first asked for.

    ``metadata`` is DCP's; the chunks of a tensor that has several are a ``_Regions``. ``storage_data`` and ``hashes``,
    the hash of each byte range, have the chunks that were asked for.
    """

    def __init__(self, table: ChunkTable) -> None:
        self._table = table
        self.hashes: dict[tuple[str, int, int], str] | None = None if table.hashes is None else {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        entries: dict[str, Entry] = {}
        for (key, kind), number, first in zip(
            table.kinds.items(), table.cut_of.tolist(), table.first_rows(), strict=False
        ):
            if kind is None:
                entries[key] = BytesStorageMetadata()
                self._place(index_of(key, None), first)
                continue
            regions = _Regions(self, key, first, table.cuts[number])
            # The list of a single region is read for its only item in many places.
            chunks = list(regions) if len(regions) < 2 else cast(Any, regions)
            entries[key] = TensorStorageMetadata(*kind, chunks)
        self.metadata = Metadata(entries, table.planner_data, self._storage, table.storage_meta, table.version)

    def _place(self, index: MetadataIndex, row: int) -> None:
        """Add place and hash of a chunk, which is ``row`` of the table."""
        if index in self._storage:
            # Of regions with one offset all but one are empty, and share its place.
            return
        number, offset, length = self._table.ranges[row].tolist()
        info = replace(self._table.sources[number], offset=offset, length=length)
        self._storage[index] = info
        if self.hashes is not None and self._table.hashes is not None:
            self.hashes[info.relative_path, offset, length] = self._table.hashes[row].tobytes().hex()

    def region(self, key: str, first: int, numbers: Column, at: int) -> ChunkStorageMetadata:
        """Make one region of a tensor; ``first`` is its first row, and ``numbers`` its part of the table."""
        offsets, sizes = map(torch.Size, numbers[at].tolist())
        self._place(index_of(key, offsets), first + at)
        return ChunkStorageMetadata(offsets, sizes)


class _Regions(Sequence[ChunkStorageMetadata]):
    """The regions of one tensor, in columns: ``numbers`` ``(regions, 2, dimensions)`` are offsets and sizes."""

    def __init__(self, chunks: TableChunks, key: str, first: int, numbers: Column) -> None:
        self._chunks = chunks
        self._key = key
        self._first = first
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> ChunkStorageMetadata: ...
    @overload
    def __getitem__(self, at: slice) -> list[ChunkStorageMetadata]: ...
    def __getitem__(self, at: int | slice) -> ChunkStorageMetadata | list[ChunkStorageMetadata]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        return self._chunks.region(self._key, self._first, self._numbers, at % len(self))

    def __iter__(self) -> Iterator[ChunkStorageMetadata]:
        return (self[at] for at in range(len(self)))

    def overlapping(self, boxes: Iterable[ChunkStorageMetadata]) -> list[ChunkStorageMetadata]:
        """Return the regions that have an element in common with one of ``boxes``, in order."""
        starts, stops = self._numbers[:, 0], self._numbers.sum(axis=1)
        found = np.zeros(len(self), bool)
        for box in boxes:
            low, high = np.array(box.offsets, np.int64), np.array(box.offsets, np.int64) + np.array(box.sizes, np.int64)
            found |= ((starts < high) & (stops > low)).all(axis=1)
        return [self[at] for at in np.flatnonzero(found).tolist()]


def near(metadata: Metadata, boxes: Mapping[str, Sequence[ChunkStorageMetadata]]) -> Metadata:
    """Return the ``metadata`` of the tensors in ``boxes``, with the chunks that overlap with their boxes there.

    Chunks of other places may be among them.
    """
    entries: dict[str, Entry] = {}
    for key in boxes:
        entry = metadata.state_dict_metadata[key]
        if isinstance(entry, TensorStorageMetadata) and isinstance(entry.chunks, _Regions):
            entry = TensorStorageMetadata(entry.properties, entry.size, entry.chunks.overlapping(boxes[key]))
        entries[key] = entry
    return Metadata(entries, None, metadata.storage_data)
