"""Checks that a checkpoint is whole. Every byte is read once, and hashed both for its file and for its chunk.

The command ``verify`` calls it, and ``CheckpointManager``, to find a checkpoint to load instead of a damaged one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import xxhash

from ..format.chunk_table import ChunkTable
from ..format.compression import check_extensions
from ..format.descriptions import read_description
from ..format.extents import check_extents
from ..format.identity import needs_manifest
from ..format.index import INDEX_NAME, MAX_INDEX_BYTES, decode
from ..format.manifest import (
    CheckpointError,
    Chunk,
    FileEntry,
    Manifest,
    check_files,
    hash_of,
    open_confined,
    read_manifest,
    read_whole,
    superfluous,
)
from ..format.metadata import METADATA_NAME
from ..format.paths import AnyPath
from ..format.reader import OpenCheckpoint
from ..format.table_extents import check_table
from .contents import Progress, no_progress

_BLOCK_BYTES = 1 << 22
# How long newest_whole() may read, while other ranks wait for it.
_MAX_READING_S = 30.0


@dataclass(slots=True)
class Verdict:
    """The result of ``verify``: what was read, and one line for each problem. A whole checkpoint has no problems.

    ``ignored`` are the names in the directory that the manifest does not have; nothing reads them.
    """

    num_files: int = 0
    num_chunks: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def total_bytes(path: AnyPath) -> int:
    """The number of bytes that ``verify`` will read; 0 without a manifest that can be read."""
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return 0
    return 0 if manifest is None else sum(entry.bytes for entry in manifest.files.values())


def verify(path: AnyPath, progress: Progress = no_progress) -> Verdict:
    """Read and check everything. Damage is reported in the result and never raised. Not collective."""
    verdict = Verdict()
    try:
        manifest = read_manifest(path)
        if manifest is None:
            raise needs_manifest(path)
    except CheckpointError as error:
        verdict.problems.append(_line(error))
        return verdict
    verdict.problems += check_files(path, manifest)
    verdict.ignored += superfluous(path, manifest)
    complete = not verdict.problems
    chunks = _chunks_of(path, manifest)
    for name in manifest.files:
        try:
            _read_file(path, name, manifest.files[name], chunks.get(name, ()), verdict, progress)
        except CheckpointError as error:
            # If check_files found problems, they name the files that are missing or of another size already.
            if complete:
                verdict.problems.append(_line(error))
    if not verdict.problems:
        try:
            opened = OpenCheckpoint(path)
            if manifest.chunks is None:
                _check_metadata(opened)
        except CheckpointError as error:
            verdict.problems.append(_line(error))
    return verdict


def _chunks_of(path: AnyPath, manifest: Manifest) -> Mapping[str, Sequence[Chunk]]:
    """Return the chunks of each file by its name; none if the index cannot be read, which is noticed afterwards."""
    if manifest.chunks is not None:
        return manifest.chunks
    with suppress(CheckpointError):
        data, where = read_whole(path, INDEX_NAME, MAX_INDEX_BYTES), str(path / INDEX_NAME)
        if INDEX_NAME in manifest.files and hash_of(data) == manifest.files[INDEX_NAME].xxh3_128:
            table = decode(data, where, manifest.files, None)
            check_table(table, {name: entry.bytes for name, entry in manifest.files.items()}, where)
            return table.chunks()
    return {}


def _check_metadata(opened: OpenCheckpoint) -> None:
    """Raise CheckpointError, which names a key, unless ``.metadata`` says the same as the index.

    This package reads the index and DCP's readers read ``.metadata``: both are to find the same tensors.
    """
    table = opened.table()
    where = str(opened.path / METADATA_NAME)
    metadata, _ = read_description(opened.path, [METADATA_NAME], opened.read_file, has_manifest=True)
    check_extensions(metadata, where)
    other = ChunkTable.of(metadata, check_extents(metadata, opened.sizes, where), None, None)
    for key in (*table.kinds, *other.kinds):
        if key not in table.kinds or key not in other.kinds or not table.is_alike(key, other):
            raise CheckpointError(
                f"dist_asgd: {where} and {INDEX_NAME} say different things of {key}: one of them belongs to another "
                f"checkpoint. This package loads what {INDEX_NAME} says, and DCP what {METADATA_NAME} says."
            )
    rest = [(one.planner_data, one.storage_meta, one.version) for one in (table, other)]
    if rest[0] != rest[1]:
        raise CheckpointError(f"dist_asgd: {where} and {INDEX_NAME} belong to different checkpoints.")


def _line(error: CheckpointError) -> str:
    return str(error).removeprefix("dist_asgd: ")


def _read_file(
    path: AnyPath, name: str, entry: FileEntry, chunks: Sequence[Chunk], verdict: Verdict, progress: Progress
) -> None:
    """Read one file, and add its counts and problems to ``verdict``."""
    file, size = open_confined(path, name)
    with file:
        if size != entry.bytes:
            # Which ``check_files`` has said; it may be sparse, and of any size.
            return
        file_digest = xxhash.xxh3_128()

        def read(count: int, *digests: xxhash.xxh3_128) -> None:
            while count:
                block = file.read(min(count, _BLOCK_BYTES))
                if not block:
                    return
                for digest in (file_digest, *digests):
                    digest.update(block)
                count -= len(block)
                progress(len(block))

        for chunk in chunks:
            chunk_digest = xxhash.xxh3_128()
            # Bytes between chunks count for the hash of the file only.
            read(chunk.offset - file.tell())
            read(chunk.length, chunk_digest)
            verdict.num_chunks += 1
            if chunk_digest.hexdigest() != chunk.xxh3_128:
                verdict.problems.append(
                    f"{path / name} is damaged between bytes {chunk.offset} and {chunk.offset + chunk.length}."
                )
        read(size - file.tell())
        verdict.num_files += 1
        verdict.bytes += size
        if file_digest.hexdigest() != entry.xxh3_128:
            verdict.problems.append(f"{path / name} is damaged: it does not have the hash that the manifest gives.")


class _OutOfTimeError(Exception):
    """Reading has taken too long."""


def newest_whole(paths: Sequence[AnyPath]) -> tuple[AnyPath | None, bool]:
    """Return the first of ``paths`` that is whole, None if none is, and whether every byte of it was read.

    After half a minute only names, sizes and metadata are checked. Not collective.
    """
    deadline = time.monotonic() + _MAX_READING_S

    def check_time(_num_bytes: int) -> None:
        if time.monotonic() > deadline:
            raise _OutOfTimeError

    for path in paths:
        try:
            if not verify(path, check_time).problems:
                return path, True
        except _OutOfTimeError:
            try:
                OpenCheckpoint(path)
            except CheckpointError:
                continue
            return path, False
    return None, True
