"""Extents: whether the chunks of a checkpoint lie inside their tensors and files, and cover them.

``OpenCheckpoint`` calls ``check_extents`` before it reads any data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from .compression import MAX_RATIO, is_compressed
from .manifest import CheckpointError
from .metadata import index_of


def check_extents(metadata: Metadata, sizes: Mapping[str, int], where: str) -> list[_StorageInfo]:
    """Check that chunks lie inside their tensor and file, that none overlap, and that each tensor is covered.

    Equal objects and 0-dim tensors may share one byte range: every parameter has its group's hyperparameters.
    ``sizes`` are the bytes of each file. Metadata that passes cannot ask for more memory than the files have bytes, or,
    for compressed chunks, than these can expand to. Returns where each chunk lies, in the order of keys and chunks.
    Raises CheckpointError, which names the key.
    """
    storage, num_found, places = metadata.storage_data, 0, list[_StorageInfo]()
    # A parameter, its average and its master have the same regions, often as the same objects.
    covered: set[tuple[Any, ...]] = set()
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            places.append(_place_of(storage, index_of(key, None), where))
            num_found += 1
            continue
        same = (entry.size, *map(id, entry.chunks))
        if same not in covered:
            check_regions(key, entry, where)
            covered.add(same)
        itemsize = entry.properties.dtype.itemsize
        for chunk in entry.chunks:
            info = _place_of(storage, index_of(key, chunk.offsets), where)
            places.append(info)
            needed = math.prod(chunk.sizes) * itemsize
            if info.length * (MAX_RATIO if is_compressed(info) else 1) < needed:
                raise CheckpointError(
                    f"dist_asgd: {where}: a chunk of {key} needs {needed} bytes, but {info.relative_path} has "
                    f"{info.length} for it."
                )
        # Regions do not overlap, but empty ones of several ranks may have one offset.
        chunks = entry.chunks
        num_found += len({chunk.offsets for chunk in chunks}) if len(chunks) > 1 else len(chunks)
    if num_found != len(storage):
        _refuse_orphans(metadata, where)
    _check_ranges(metadata, sizes, where)
    return places


def _place_of(storage: Mapping[MetadataIndex, _StorageInfo], index: MetadataIndex, where: str) -> _StorageInfo:
    info = storage.get(index)
    if info is None:
        raise CheckpointError(f"dist_asgd: {where} does not say where {index.fqn} {index.offset} lies.")
    return info


def _refuse_orphans(metadata: Metadata, where: str) -> None:
    """Raise CheckpointError, which names a chunk that belongs to no key."""
    for index in metadata.storage_data:
        entry = metadata.state_dict_metadata.get(index.fqn)
        known = index.offset is None and isinstance(entry, BytesStorageMetadata)
        if isinstance(entry, TensorStorageMetadata):
            known = any(chunk.offsets == index.offset for chunk in entry.chunks)
        if not known:
            raise CheckpointError(f"dist_asgd: {where} has data of {index.fqn} {index.offset}, which no key has.")
    raise CheckpointError(f"dist_asgd: {where} has data that no key has.")


def _check_ranges(metadata: Metadata, sizes: Mapping[str, int], where: str) -> None:
    """Check the byte ranges: sorted by file and offset, each begins where the last one has ended, or later."""
    single = {
        key
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, BytesStorageMetadata) or not entry.size
    }
    by_name: dict[str, list[tuple[int, int, str]]] = {}
    for index, info in metadata.storage_data.items():
        by_name.setdefault(info.relative_path, []).append((info.offset, info.length, index.fqn))
    for name, ranges in sorted(by_name.items()):
        ranges.sort()
        if name not in sizes:
            raise CheckpointError(f"dist_asgd: {name}, which holds {ranges[0][2]}, is missing: {where} is not whole.")
        shared: tuple[int, int] | None = None
        stop, before = 0, ""
        for offset, length, fqn in ranges:
            if fqn in single:
                if shared == (offset, length):
                    continue
                shared = offset, length
            else:
                shared = None
            if offset < stop:
                raise CheckpointError(f"dist_asgd: {where}: the data of {fqn} and of {before} overlap in {name}.")
            stop, before = offset + length, fqn
            if stop > sizes[name]:
                raise CheckpointError(
                    f"dist_asgd: {name} has {sizes[name]} bytes, but by {where} {fqn} lies at {offset} to "
                    f"{stop} in it: a file is truncated or damaged, or belongs to another checkpoint."
                )


def check_regions(key: str, entry: TensorStorageMetadata, where: str) -> None:
    """Check that the regions of one tensor cover it, each element once."""
    size, regions = entry.size, list[tuple[tuple[int, ...], tuple[int, ...]]]()
    if len(entry.chunks) == 1 and entry.chunks[0].sizes == size and entry.chunks[0].offsets == (0,) * len(size):
        return
    for chunk in entry.chunks:
        ends = [o + s for o, s in zip(chunk.offsets, chunk.sizes, strict=True)]
        if len(ends) != len(size) or any(end > n for end, n in zip(ends, size, strict=True)):
            raise CheckpointError(
                f"dist_asgd: {where}: a chunk of {key} at {list(chunk.offsets)} of shape {list(chunk.sizes)} is not "
                f"inside {list(size)}."
            )
        if math.prod(chunk.sizes):
            regions.append((tuple(chunk.offsets), tuple(ends)))
    covered = sum(math.prod(e - s for s, e in zip(starts, ends, strict=True)) for starts, ends in regions)
    if covered != math.prod(size):
        raise CheckpointError(
            f"dist_asgd: {where}: the chunks of {key} hold {covered} elements, its shape {list(size)} has "
            f"{math.prod(size)}."
        )
    # As many elements as the tensor has and no overlap: every element is covered. Sorted along one dimension, a region
    # can only overlap with earlier ones that reach beyond its start.
    axis = max(range(len(size)), key=lambda d: len({starts[d] for starts, _ in regions}), default=0)
    active: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for region in sorted(regions, key=lambda r: r[0][axis]) if len(regions) > 1 else ():
        active = [other for other in active if other[1][axis] > region[0][axis]]
        for other in active:
            if all(a < d and c < b for a, b, c, d in zip(*region, *other, strict=True)):
                raise CheckpointError(
                    f"dist_asgd: {where}: chunks of {key} overlap, at {list(region[0])} and {list(other[0])}."
                )
        active.append(region)
