"""Whether the chunks of a ``ChunkTable`` lie inside their tensors and files, and cover them: all rows at once.

The same is checked of DCP's metadata by ``extents``, one object at a time. ``OpenCheckpoint`` calls ``check_table``
before it reads any data, and a save before it writes the index.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NoReturn

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

from .chunk_table import ChunkTable, Column
from .extents import check_regions
from .manifest import CheckpointError


def check_table(table: ChunkTable, sizes: Mapping[str, int], where: str) -> None:
    """Check that chunks lie inside their tensor and file, that none overlap, and that each tensor is covered.

    ``sizes`` are the bytes of each file. Equal objects and 0-dim tensors may share one byte range. A table that passes
    cannot ask for more memory than the files have bytes. Raises CheckpointError, which names the key.
    """
    total_bytes = sum(sizes[source.relative_path] for source in table.sources)
    numels_of: dict[tuple[int, torch.Size], Column] = {}
    for (key, kind), number, first in zip(table.kinds.items(), table.cut_of.tolist(), table.first_rows(), strict=False):
        if kind is None:
            continue
        properties, size = kind
        itemsize = properties.dtype.itemsize
        # With this all products of sizes below fit into 64 bits.
        if math.prod(size) * itemsize > total_bytes:
            raise CheckpointError(
                f"dist_asgd: {where}: {key} needs {math.prod(size) * itemsize} bytes, and the files have {total_bytes}."
            )
        numels = numels_of.get((number, size))
        if numels is None:
            numels = numels_of[number, size] = _check_cut(key, properties, size, table.cuts[number], where)
        lengths = table.ranges[first : first + len(numels), 2]
        short = np.flatnonzero(lengths < numels * itemsize)
        if len(short):
            row = int(short[0])
            name = table.sources[int(table.ranges[first + row, 0])].relative_path
            raise CheckpointError(
                f"dist_asgd: {where}: a chunk of {key} needs {int(numels[row]) * itemsize} bytes, but {name} has "
                f"{int(lengths[row])} for it."
            )
    _check_ranges(table, sizes, where)


def _check_cut(key: str, properties: TensorProperties, size: torch.Size, cut: Column, where: str) -> Column:
    """Check that the regions of one cut cover ``size``, each element once; returns the elements of each region."""

    def refuse() -> NoReturn:
        # One object at a time, for an error that names the region.
        regions = [ChunkStorageMetadata(*map(torch.Size, region)) for region in cut.tolist()]
        check_regions(key, TensorStorageMetadata(properties, size, regions), where)
        raise CheckpointError(f"dist_asgd: {where}: two chunks of {key} begin at one place.")

    shape, starts, sizes = np.array(size, np.int64), cut[:, 0], cut[:, 1]
    if (starts + sizes > shape).any():
        refuse()
    numels: Column = sizes.prod(axis=1, dtype=np.int64)
    is_empty = numels == 0
    # What has one offset is one chunk for DCP. A sum of Python's numbers, because it may be longer than 64 bits.
    is_double = len(cut) > 1 and bool(is_empty.any()) and len(np.unique(starts, axis=0)) < len(cut)
    if not len(cut) or is_double or sum(numels.tolist()) != math.prod(size):
        refuse()
    if len(cut) > 1 and not _is_chain(shape, *(column[~is_empty] for column in (starts, sizes, numels))):
        _check_apart(key, properties, size, cut, where)
    return numels


def _is_chain(shape: Column, starts: Column, sizes: Column, numels: Column) -> bool:
    """Whether each region is a row-major range, and these follow each other from the first element on.

    So do nearly all: the fragments of a bucket do.
    """
    is_after = np.cumsum(sizes != 1, axis=1) - (sizes != 1) > 0
    if (is_after & (sizes != shape)).any():
        return False
    inner = np.append(np.cumprod(shape[:0:-1])[::-1], 1)
    first = (starts * inner).sum(axis=1)
    order = np.argsort(first, kind="stable")
    stops = (first + numels)[order]
    return bool((first[order] == np.append(0, stops)[:-1]).all())


def _check_apart(key: str, properties: TensorProperties, size: torch.Size, cut: Column, where: str) -> None:
    regions = [ChunkStorageMetadata(*map(torch.Size, region)) for region in cut.tolist()]
    check_regions(key, TensorStorageMetadata(properties, size, regions), where)


def _check_ranges(table: ChunkTable, sizes: Mapping[str, int], where: str) -> None:
    """Check the byte ranges: sorted by file and offset, each begins where the last one has ended, or later."""
    if not len(table.ranges):
        return
    firsts = np.array(table.first_rows(), np.int64)
    may_share = np.repeat([kind is None or not kind[1] for kind in table.kinds.values()], np.diff(firsts))
    order = np.lexsort((table.ranges[:, 2], table.ranges[:, 1], table.ranges[:, 0]))
    ranges, may_share = table.ranges[order], may_share[order]
    is_same = (ranges[1:] == ranges[:-1]).all(axis=1) & may_share[1:] & may_share[:-1]

    def key_of(row: int) -> str:
        return list(table.kinds)[int(np.searchsorted(firsts, order[row], "right")) - 1]

    if table.hashes is not None:
        hashes = table.hashes[order]
        torn = np.flatnonzero(is_same & (hashes[1:] != hashes[:-1]).any(axis=1))
        if len(torn):
            row = int(torn[0])
            raise CheckpointError(
                f"dist_asgd: {where}: {key_of(row)} and {key_of(row + 1)} have the same bytes and different hashes."
            )
    kept = np.append(True, ~is_same)
    order, ranges = order[kept], ranges[kept]
    stops = ranges[:, 1] + ranges[:, 2]

    overlapping = np.flatnonzero((ranges[1:, 0] == ranges[:-1, 0]) & (ranges[1:, 1] < stops[:-1]))
    if len(overlapping):
        row = int(overlapping[0])
        raise CheckpointError(
            f"dist_asgd: {where}: the data of {key_of(row + 1)} and of {key_of(row)} overlap in "
            f"{table.sources[int(ranges[row, 0])].relative_path}."
        )
    limits = np.array([sizes[source.relative_path] for source in table.sources], np.int64)[ranges[:, 0]]
    outside = np.flatnonzero(stops > limits)
    if len(outside):
        row = int(outside[0])
        name = table.sources[int(ranges[row, 0])].relative_path
        raise CheckpointError(
            f"dist_asgd: {name} has {sizes[name]} bytes, but by {where} {key_of(row)} lies at {int(ranges[row, 1])} to "
            f"{int(stops[row])} in it: a file is truncated or damaged, or belongs to another checkpoint."
        )
