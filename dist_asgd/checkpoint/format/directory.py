"""Checkpoint directories as a whole: a crash at any moment leaves every earlier checkpoint whole, and no partial one.

A save calls ``begin``, then every rank writes its file, then ``finish`` and ``put_in_place`` (or ``discard``). The
directory has a temporary name beside its own until all of it is on disk, and is then renamed; a checkpoint that is to
go is renamed before its files are removed. A *leftover* is a directory with such a temporary name after a crash: no
reader takes it for a checkpoint, and the next save removes it. All functions are local, and only rank 0 calls those
that change something.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from .manifest import MANIFEST_NAME, FileEntry, Manifest, write_manifest
from .metadata import MAX_METADATA_BYTES, METADATA_NAME
from .writer import HashedFile, WrittenFile

LATEST_NAME = "latest"
_STEP_NAME = re.compile(r"step-(\d{8,18})")
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(tmp|old)-[0-9a-f]{12}")


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{uuid.uuid4().hex[:12]}")


def sync_directory(folder: Path) -> None:
    """Wait until the names in ``folder`` are on disk: fsync of a file does not cover its name."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- one checkpoint --------------------------------------------------------------------------------------


def begin(path: Path) -> Path:
    """Make and return an empty directory beside ``path`` to write in; removes leftovers of earlier saves to ``path``.

    Raises ValueError if ``path`` is taken or has no parent directory.
    """
    if not path.parent.is_dir():
        raise ValueError(
            f"dist_asgd: cannot save a checkpoint at {path}: {path.parent} is not a folder. Make it first; it must be "
            f"one that all ranks share."
        )
    if path.is_symlink() or path.exists():
        what = "already exists" if path.is_dir() else "is a file"
        raise ValueError(
            f"dist_asgd: cannot save a checkpoint at {path}: it {what}. A checkpoint is a directory of its own, and "
            f"none is overwritten: choose another name, or remove it first."
        )
    # Of this path only: another job may be writing beside it.
    for leftover in leftovers(path.parent):
        if leftover_of(leftover) == path.name:
            shutil.rmtree(leftover)
    temporary = _beside(path, "tmp")
    temporary.mkdir()
    return temporary


def metadata_of(path: Path, files: Sequence[WrittenFile]) -> bytes:
    """Return the bytes of ``.metadata`` for the checkpoint that will be at ``path``; ``files`` are in rank order."""
    metadata = _metadata_of(files)
    metadata.storage_meta = StorageMeta(checkpoint_id=str(path), save_id=str(uuid.uuid4()))
    data = pickle.dumps(metadata)
    if len(data) > MAX_METADATA_BYTES:
        raise ValueError(
            f"dist_asgd: {path} cannot be saved: its {METADATA_NAME} would have {len(data)} bytes, more than the "
            f"{MAX_METADATA_BYTES} that can be loaded. Use fewer parameters, or fewer ranks."
        )
    return data


def _metadata_of(files: Sequence[WrittenFile]) -> Metadata:
    """Return DCP's metadata: the keys in rank 0's order, then those that other ranks add."""
    entries: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    # Equal values are one object, which pickle writes once: the file grows with the tensors, not with their chunks.
    an_object = BytesStorageMetadata()
    properties: dict[torch.dtype, TensorProperties] = {}
    size_of = cache(torch.Size)
    for file in files:
        paths.update(file.paths)
        ranges = [_StorageInfo(file.name, chunk.offset, chunk.length) for chunk in file.chunks]
        for key, chunk, dtype, shape, offsets, sizes in file.rows:
            if dtype is None:
                entries[key] = an_object
                storage[MetadataIndex(key)] = ranges[chunk]
                continue
            entry = entries.get(key)
            if entry is None:
                known = properties.setdefault(dtype, TensorProperties(dtype))
                entry = entries[key] = TensorStorageMetadata(known, size_of(shape), [])
            index = MetadataIndex(key, size_of(offsets), len(entry.chunks))
            # Of an empty tensor every rank writes the same empty region.
            if index not in storage:
                entry.chunks.append(ChunkStorageMetadata(size_of(offsets), size_of(sizes)))
                storage[index] = ranges[chunk]
    return Metadata(entries, paths, storage, version=CURRENT_DCP_VERSION)


def finish(directory: Path, step: int, written: Sequence[WrittenFile], metadata: bytes, here: str) -> None:
    """Add ``.metadata`` and the manifest; called when the files of all ranks are on disk in ``directory``.

    ``here`` names this rank in errors.
    """
    files = {file.name: file.file for file in written if file.file is not None}
    _check_visible(directory, files, here)
    chunks = {file.name: file.chunks for file in written if file.file is not None}
    with HashedFile(directory / METADATA_NAME) as metadata_file:
        metadata_file.write(metadata)
        files[METADATA_NAME] = metadata_file.end()
        metadata_file.sync()
    write_manifest(directory, Manifest(step, len(written), files, chunks))


def _check_visible(directory: Path, files: dict[str, FileEntry], here: str) -> None:
    """Raise RuntimeError unless this rank sees every file as its rank wrote it."""
    for name, entry in files.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != entry.bytes:
            raise RuntimeError(
                f"dist_asgd: {here} does not see {path} as it was written. The folder has vanished, or not all "
                f"ranks share it: save to one that they share."
            )


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a directory whose files are on disk to ``path``."""
    # The names of the files must be on disk before the rename is, and the rename before anyone relies on it.
    sync_directory(temporary)
    temporary.rename(path)
    sync_directory(path.parent)


def discard(temporary: Path) -> None:
    """Remove what a failed save wrote, as far as the system lets it be removed."""
    shutil.rmtree(temporary, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a checkpoint: first its name, in one step, then its files."""
    if path.is_symlink():
        path.unlink()
        return
    old = _beside(path, "old")
    path.rename(old)
    sync_directory(path.parent)
    shutil.rmtree(old)


# --- folders of checkpoints ------------------------------------------------------------------------------


def leftovers(folder: Path) -> list[Path]:
    """List what crashed saves and removals left in ``folder``."""
    return [entry for entry in sorted(folder.iterdir()) if _LEFTOVER.fullmatch(entry.name)]


def leftover_of(leftover: Path) -> str | None:
    """Return the name of the checkpoint that was being written or removed; None if the path is no leftover."""
    match = _LEFTOVER.fullmatch(leftover.name)
    return match["name"] if match else None


def point_latest(folder: Path, name: str) -> None:
    """Make ``folder/latest`` a link to ``name``; an earlier link is replaced in one step."""
    # symlink_to() does not replace, and rename() does: the link is made under another name first.
    beside = _beside(folder / LATEST_NAME, "tmp")
    beside.symlink_to(name, target_is_directory=True)
    try:
        beside.replace(folder / LATEST_NAME)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_directory(folder)


def step_name(step: int) -> str:
    """Return the directory's name of the checkpoint of ``step``: ``step-00000012``."""
    return f"step-{step:08d}"


def steps_in(folder: Path) -> Iterator[tuple[int, Path]]:
    """Return step and path of every whole checkpoint in ``folder``, oldest first."""
    entries = [(_STEP_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir()]
    steps = [(int(match[1]), entry) for match, entry in entries if match]
    # The manifest is written last, so a directory with a manifest is whole.
    return iter(sorted(pair for pair in steps if (pair[1] / MANIFEST_NAME).is_file()))
