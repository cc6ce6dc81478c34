"""Writing a checkpoint in the format of ``torch.distributed.checkpoint`` (DCP), hashed, on disk before it counts.

Each rank writes one file, and rank 0 then says in DCP's ``.metadata`` what lies where. Equal small values (the
hyperparameters that DCP's layout repeats for every parameter) are written once and pointed to from each place.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ..chunks import ChunkToWrite, KeyPath
from .archives import Archives, Frames, elements_of
from .manifest import Chunk, FileEntry, Manifest, write_manifest
from .metadata import METADATA_NAME

# torch.save writes in crumbs of some bytes, which are gathered, and large tensors at once, which pass the buffer by.
_BUFFER_BYTES = 1 << 18
# Written and hashed while it is in the processor's cache.
_BLOCK_BYTES = 1 << 20
# The disk is told to begin whenever that much is there, so that little is left to wait for at the end.
_WRITEBACK_BYTES = 1 << 22
# Under this many bytes values are compared, so that equal ones are written once.
_SMALL_BYTES = 1 << 20


class Serialized(bytes):
    """An object that is already in the form of ``torch.save``."""


class HashedFile(io.RawIOBase):
    """A new file that hashes what is written to it, as a whole and chunk by chunk."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.failure: OSError | None = None
        self._file = path.open("xb", buffering=0)
        self._crumbs = bytearray()
        self._whole = xxhash.xxh3_128()
        self._chunk = xxhash.xxh3_128()
        self._offset = 0
        self._chunk_offset = 0
        self._handed_over = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error what is buffered may fail again, and nobody wants it.
        with contextlib.nullcontext() if error is None else contextlib.suppress(OSError):
            self._file.close()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """All of ``data``; the first failure is kept, for callers between here and there that lose it."""
        view = memoryview(data).cast("B")
        try:
            if len(self._crumbs) + len(view) > _BUFFER_BYTES:
                self._spill()
            if len(view) < _BUFFER_BYTES:
                self._crumbs += view
            else:
                self._put(view)
        except OSError as error:
            self.failure = self.failure or error
            raise
        return len(view)

    def _spill(self) -> None:
        crumbs, self._crumbs = self._crumbs, bytearray()
        self._put(memoryview(crumbs))

    def _put(self, view: memoryview) -> None:
        for start in range(0, len(view), _BLOCK_BYTES):
            block = view[start : start + _BLOCK_BYTES]
            self._whole.update(block)
            self._chunk.update(block)
            self._offset += len(block)
            while block:
                block = block[self._file.write(block) :]
            if self._offset - self._handed_over >= _WRITEBACK_BYTES:
                self._start_writeback()

    def _start_writeback(self) -> None:
        """Let the disk begin. Where the system has no way to say so, all is left to ``sync``."""
        if hasattr(os, "posix_fadvise"):
            length = self._offset - self._handed_over
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._file.fileno(), self._handed_over, length, os.POSIX_FADV_DONTNEED)
        self._handed_over = self._offset

    def end_chunk(self) -> Chunk:
        """What was written since the last chunk ended."""
        self._spill()
        chunk = Chunk(self._chunk_offset, self._offset - self._chunk_offset, self._chunk.hexdigest())
        self._chunk, self._chunk_offset = xxhash.xxh3_128(), self._offset
        return chunk

    def end(self) -> FileEntry:
        """Size and hash of all that was written; the disk goes on with it."""
        self._spill()
        self._start_writeback()
        return FileEntry(self._offset, self._whole.hexdigest())

    def sync(self) -> None:
        """Wait until what was written is on disk."""
        os.fsync(self._file.fileno())


class Row(NamedTuple):
    """One piece, and the number of the chunk that holds it; ``dtype`` and all after it are None for an object."""

    key: str
    chunk: int
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What one rank has written: a file, None where it had nothing to write, its chunks, and what they hold.

    ``paths``: of everything that its state names, in order.
    """

    paths: Mapping[str, KeyPath]
    name: str
    file: FileEntry | None = None
    chunks: Sequence[Chunk] = ()
    rows: Sequence[Row] = ()


class PartFile:
    """This rank's file, as a context: first ``write``, then ``sync``. ``frames`` are those of earlier ones.

    Not collective.
    """

    def __init__(self, directory: Path, rank: int, frames: Frames) -> None:
        self._directory = directory
        self._frames = frames
        self._name = f"__{rank}_0{DEFAULT_SUFFIX}"
        self._file: HashedFile | None = None

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._file is not None:
            self._file.__exit__(*raised)

    def write(self, pieces: Sequence[ChunkToWrite], paths: Mapping[str, KeyPath]) -> WrittenFile:
        """Write all pieces, in this order; OSError where the system refuses."""
        if not pieces:
            return WrittenFile(paths, self._name)
        self._file = file = HashedFile(self._directory / self._name)
        contents = ChunkWriter(file, self._frames)
        try:
            rows = [contents.add(piece) for piece in pieces]
            return WrittenFile(paths, self._name, file.end(), contents.chunks, rows)
        except Exception as error:
            raise file.failure or error from error

    def sync(self) -> None:
        """Wait until it is on disk; OSError where it does not get there."""
        if self._file is not None:
            self._file.sync()


class ChunkWriter:
    """What is in one file."""

    def __init__(self, file: HashedFile, frames: Frames) -> None:
        self._file = file
        self._archives = Archives(file, frames)
        self._known: dict[Any, int] = {}
        # Found by what they are before they are serialized; the state holds on to the lists meanwhile.
        self._objects: dict[tuple[type, object], int] = {}
        self.chunks: list[Chunk] = []

    def add(self, piece: ChunkToWrite) -> Row:
        """Write it, unless it is small and there already."""
        if piece.shape is None:
            return Row(piece.key, self._add_object(piece.data))
        data: Tensor = piece.data.detach().cpu()
        sizes = tuple(data.shape)
        return Row(piece.key, self._add_tensor(data), data.dtype, piece.shape, piece.offsets or (), sizes)

    def _end(self) -> int:
        self.chunks.append(self._file.end_chunk())
        return len(self.chunks) - 1

    def _add_tensor(self, tensor: Tensor) -> int:
        if tensor.dim():
            self._archives.write(tensor)
            return self._end()
        key = (tensor.dtype, bytes(elements_of(tensor.resolve_conj().resolve_neg())))
        if key not in self._known:
            self._archives.write(tensor)
            self._known[key] = self._end()
        return self._known[key]

    def _add_object(self, value: Any) -> int:
        key: tuple[type, object] | None = None
        if isinstance(value, list):
            key = (list, id(value))
        elif isinstance(value, bool | int | float | str | None):
            key = (type(value), repr(value))
        if key is None or key not in self._objects:
            number = self._add_bytes(value if isinstance(value, Serialized) else _serialized(value))
            if key is None:
                return number
            self._objects[key] = number
        return self._objects[key]

    def _add_bytes(self, content: bytes) -> int:
        if content not in self._known or len(content) >= _SMALL_BYTES:
            self._file.write(content)
            self._known[content] = self._end()
        return self._known[content]


def _serialized(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def metadata_of(path: Path, parts: Sequence[WrittenFile]) -> bytes:
    """``.metadata`` of the checkpoint that will be at ``path``."""
    metadata = _metadata_of(parts)
    metadata.storage_meta = StorageMeta(checkpoint_id=str(path), save_id=str(uuid.uuid4()))
    return pickle.dumps(metadata)


def finish(directory: Path, step: int, parts: Sequence[WrittenFile], metadata: bytes) -> None:
    """On rank 0, when all parts are on disk in ``directory``: add what makes it a checkpoint."""
    files = {part.name: part.file for part in parts if part.file is not None}
    _check_visible(directory, files)
    with HashedFile(directory / METADATA_NAME) as file:
        file.write(metadata)
        files[METADATA_NAME] = file.end()
        file.sync()
    chunks = {part.name: part.chunks for part in parts if part.file is not None}
    write_manifest(directory, Manifest(step, len(parts), files, chunks))


def _check_visible(directory: Path, files: dict[str, FileEntry]) -> None:
    for name, entry in files.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != entry.bytes:
            raise RuntimeError(
                f"dist_asgd: rank 0 does not see {path} as it was written. The folder has vanished, or not all "
                f"ranks share it: save to one that they share."
            )


def _metadata_of(parts: Sequence[WrittenFile]) -> Metadata:
    """Keys in rank 0's order, then what others add. Equal entries are one object, pickled once."""
    entries: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    an_object = BytesStorageMetadata()
    properties: dict[torch.dtype, TensorProperties] = {}
    size_of = cache(torch.Size)
    for part in parts:
        paths.update(part.paths)
        places = [_StorageInfo(part.name, chunk.offset, chunk.length) for chunk in part.chunks]
        for key, chunk, dtype, shape, offsets, sizes in part.rows:
            if dtype is None:
                entries[key] = an_object
                storage[MetadataIndex(key)] = places[chunk]
                continue
            entry = entries.get(key)
            if entry is None:
                known = properties.setdefault(dtype, TensorProperties(dtype))
                entry = entries[key] = TensorStorageMetadata(known, size_of(shape), [])
            index = MetadataIndex(key, size_of(offsets), len(entry.chunks))
            # Ranks that have nothing of a tensor all have the same nothing.
            if index not in storage:
                entry.chunks.append(ChunkStorageMetadata(size_of(offsets), size_of(sizes)))
                storage[index] = places[chunk]
    return Metadata(entries, paths, storage, version=CURRENT_DCP_VERSION)
