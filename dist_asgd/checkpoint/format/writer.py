"""Writing one rank's data file of a checkpoint, in the format of ``torch.distributed.checkpoint`` (DCP), hashed.

``Saver`` opens a ``RankFile`` on every rank; rank 0 then writes from what all ranks return which bytes of which file
hold what (see ``file_report``). Equal small values, such as the hyperparameters that DCP's layout repeats for every
parameter, are written once.

chunk     one region of a tensor, or one object: what ``torch.save`` makes of it is one byte range of the file
archive   the bytes that ``torch.save`` writes for a tensor
frame     the bytes of an archive before and after the tensor's elements. ``torch.save`` takes longer over a small
          tensor than writing it does, and frames are equal for all tensors of one dtype, shape and strides: the first
          archive is made by ``torch.save``, the others are its frame around their own elements
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.utils.serialization import config

from .manifest import Chunk, FileEntry
from .paths import AnyPath, is_store
from .stores import StoreFile

# torch.save writes many times a few bytes, which are gathered, and large tensors at once, which bypass the buffer.
_BUFFER_BYTES = 1 << 18
# A block is hashed and written while it is in the processor's cache.
_BLOCK_BYTES = 1 << 20
# The disk is asked to begin whenever this many bytes are there, so that sync() finds little left to wait for.
_WRITEBACK_BYTES = 1 << 22
# Below this size contents are compared, so that equal ones are written once.
_SMALL_BYTES = 1 << 20
# The bytes by which the elements of a tensor are recognised among everything that torch.save writes.
_ENDS = slice(0, 64), slice(-64, None)

KeyPath = tuple[str | int, ...]
"""The keys and indices that lead to a value in nested dicts and lists; joined by dots they are its key."""
Frame = tuple[bytes, bytes]
Frames = dict[tuple[torch.dtype, torch.Size, tuple[int, ...]], Frame | None]
"""The frame of each dtype, shape and strides; None if it could not be told from the elements."""


class ChunkToWrite(NamedTuple):
    """One region of a tensor, or one object, which has no ``shape`` and no ``offsets``.

    Attributes:
        key: the key of the whole tensor, or of the object.
        data: the region's elements, with the region's sizes as shape, on any device; or the object.
        shape: the shape of the whole tensor.
        offsets: where the region begins in the whole tensor, one offset per dimension.
        may_be_copied: another device mesh may hold the same region.
    """

    key: str
    data: Any
    shape: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None
    may_be_copied: bool = False


class Serialized(bytes):
    """An object that is already in the form of ``torch.save``."""


# --- a file that hashes itself ---------------------------------------------------------------------------


class HashedFile(io.RawIOBase):
    """A new file, or a new object in a store, that hashes everything that is written, as a whole and by chunk."""

    def __init__(self, path: AnyPath) -> None:
        super().__init__()
        self.failure: OSError | None = None
        self._file = StoreFile(path, "wb") if is_store(path) else path.open("xb", buffering=0)
        self._buffer = bytearray()
        self._file_hash = xxhash.xxh3_128()
        self._chunk_hash = xxhash.xxh3_128()
        self._offset = 0
        self._chunk_offset = 0
        self._writeback_offset = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and isinstance(self._file, StoreFile):
            self._file.abort()
            return
        # After an error closing may fail again, and must not replace the error.
        with contextlib.nullcontext() if error is None else contextlib.suppress(OSError):
            self._file.close()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Write all of ``data``; returns its length in bytes.

        The first OSError is kept in ``failure``, because ``torch.save`` raises another error in its place.
        """
        view = memoryview(data).cast("B")
        try:
            if len(self._buffer) + len(view) > _BUFFER_BYTES:
                self._flush_buffer()
            if len(view) < _BUFFER_BYTES:
                self._buffer += view
            else:
                self._write_blocks(view)
        except OSError as error:
            self.failure = self.failure or error
            raise
        return len(view)

    def _flush_buffer(self) -> None:
        buffer, self._buffer = self._buffer, bytearray()
        self._write_blocks(memoryview(buffer))

    def _write_blocks(self, view: memoryview) -> None:
        for start in range(0, len(view), _BLOCK_BYTES):
            block = view[start : start + _BLOCK_BYTES]
            self._file_hash.update(block)
            self._chunk_hash.update(block)
            self._offset += len(block)
            # An unbuffered file may write less than it is given.
            while block:
                block = block[self._file.write(block) :]
            if self._offset - self._writeback_offset >= _WRITEBACK_BYTES:
                self._start_writeback()

    def _start_writeback(self) -> None:
        """Ask the disk to begin with what was written; systems without such a call leave everything to ``sync``."""
        if hasattr(os, "posix_fadvise") and not isinstance(self._file, StoreFile):
            length = self._offset - self._writeback_offset
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._file.fileno(), self._writeback_offset, length, os.POSIX_FADV_DONTNEED)
        self._writeback_offset = self._offset

    def end_chunk(self) -> Chunk:
        """End a chunk: everything that was written since the last one ended."""
        self._flush_buffer()
        chunk = Chunk(self._chunk_offset, self._offset - self._chunk_offset, self._chunk_hash.hexdigest())
        self._chunk_hash, self._chunk_offset = xxhash.xxh3_128(), self._offset
        return chunk

    def end(self) -> FileEntry:
        """Return size and hash of the whole file. The disk goes on writing it until ``sync`` returns."""
        self._flush_buffer()
        self._start_writeback()
        return FileEntry(self._offset, self._file_hash.hexdigest())

    def sync(self) -> None:
        """Wait until everything that was written is on disk, or in the store."""
        if isinstance(self._file, StoreFile):
            self._file.close()
        else:
            os.fsync(self._file.fileno())


# --- one rank's file -------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One chunk that was written, by its number in the file; ``dtype`` and everything after it are empty for objects.

    ``shape`` is the whole tensor's, ``offsets`` and ``sizes`` are the region's. Equal values share a chunk.
    """

    key: str
    chunk: int
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What one rank reports to rank 0: its file (None if it had nothing to write), the chunks, and what they hold.

    ``paths`` has the keys of rank 0's state, in order, also of tensors of which another rank writes all regions. Other
    ranks leave out those that ``path_of_key`` gives: nearly all, and of hundreds of ranks they are the same.
    """

    paths: Mapping[str, KeyPath]
    name: str
    file: FileEntry | None = None
    chunks: Sequence[Chunk] = ()
    rows: Sequence[Row] = ()


def path_of_key(key: str) -> KeyPath:
    """Return the path of an entry of a section, which is no container: the section, and the rest of the key."""
    section, _, rest = key.partition(".")
    return section, rest


class RankFile:
    """This rank's data file, a context: first ``write`` is called, then ``sync``. Not collective.

    ``frames`` are kept by the caller from one save to the next. ``tag`` is a part of the file's name.
    """

    def __init__(self, directory: AnyPath, rank: int, frames: Frames, tag: str = "") -> None:
        self._directory = directory
        self._frames = frames
        self._is_first = not rank
        self._name = f"__{rank}_0{tag}{DEFAULT_SUFFIX}"
        self._file: HashedFile | None = None

    def __enter__(self) -> RankFile:
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._file is not None:
            self._file.__exit__(*raised)

    def write(self, chunks: Sequence[ChunkToWrite], paths: Mapping[str, KeyPath]) -> WrittenFile:
        """Write all chunks in this order; raises OSError if the system refuses. No chunks, no file."""
        if not self._is_first:
            paths = {key: path for key, path in paths.items() if path != path_of_key(key)}
        if not chunks:
            return WrittenFile(paths, self._name)
        self._file = file = HashedFile(self._directory / self._name)
        writer = ChunkWriter(file, self._frames)
        try:
            rows = [writer.add(chunk) for chunk in chunks]
            return WrittenFile(paths, self._name, file.end(), writer.chunks, rows)
        except Exception as error:
            raise file.failure or error from error

    def sync(self) -> None:
        """Wait until the file is on disk; raises OSError if it does not get there."""
        if self._file is not None:
            self._file.sync()


class ChunkWriter:
    """Writes chunks to one file and numbers them; small contents that are there already are not written again."""

    def __init__(self, file: HashedFile, frames: Frames) -> None:
        self._file = file
        self._archives = ArchiveWriter(file, frames)
        self._small: dict[Any, int] = {}
        # Plain values are recognised before they are serialized; others by identity, as the state keeps them alive.
        self._objects: dict[tuple[type, object], int] = {}
        self.chunks: list[Chunk] = []

    def add(self, chunk: ChunkToWrite) -> Row:
        """Write ``chunk`` and return its row."""
        if chunk.shape is None:
            return Row(chunk.key, self._add_object(chunk.data))
        data: Tensor = chunk.data.detach().cpu()
        sizes = tuple(data.shape)
        return Row(chunk.key, self._add_tensor(data), data.dtype, chunk.shape, chunk.offsets or (), sizes)

    def _end(self) -> int:
        self.chunks.append(self._file.end_chunk())
        return len(self.chunks) - 1

    def _add_tensor(self, tensor: Tensor) -> int:
        if tensor.dim():
            self._archives.write(tensor)
            return self._end()
        key = (tensor.dtype, bytes(elements_of(tensor.resolve_conj().resolve_neg())))
        if key not in self._small:
            self._archives.write(tensor)
            self._small[key] = self._end()
        return self._small[key]

    def _add_object(self, value: Any) -> int:
        key: tuple[type, object] | None = None
        if isinstance(value, list | Serialized):
            key = (type(value), id(value))
        elif isinstance(value, bool | int | float | str | None):
            key = (type(value), repr(value))
        if key is None or key not in self._objects:
            number = self._add_bytes(value if isinstance(value, Serialized) else _serialized(value))
            if key is None:
                return number
            self._objects[key] = number
        return self._objects[key]

    def _add_bytes(self, content: bytes) -> int:
        if content not in self._small or len(content) >= _SMALL_BYTES:
            self._file.write(content)
            self._small[content] = self._end()
        return self._small[content]


def _serialized(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


# --- archives --------------------------------------------------------------------------------------------


class Sink(Protocol):
    """A file, as far as archives need one."""

    def write(self, data: Any) -> int: ...


class ArchiveWriter:
    """Writes tensors to ``sink``, each as ``torch.save`` would; new frames are added to ``frames``."""

    def __init__(self, sink: Sink, frames: Frames) -> None:
        self._sink = sink
        self._frames = frames

    def write(self, tensor: Tensor) -> None:
        """Write the archive of a tensor on the CPU; copies it only if it is not dense in memory."""
        tensor = _dense(tensor)
        key = (tensor.dtype, tensor.shape, tensor.stride())
        frame = self._frames.get(key)
        if frame is not None:
            for data in (frame[0], elements_of(tensor), frame[1]):
                self._sink.write(data)
            return
        recorder = _FrameRecorder(self._sink, tensor)
        # The manifest's hash finds the same damage as the archive's checksum would, at a tenth of the time.
        with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            torch.save(tensor, cast(BinaryIO, recorder))
        self._frames[key] = recorder.frame


def elements_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a dense tensor, in memory order; shares memory."""
    return memoryview(cast(Any, _flat_bytes(tensor).numpy()))


def _flat_bytes(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _dense(tensor: Tensor) -> Tensor:
    """Return ``tensor`` on a storage of its own size, without a copy if it is dense in memory.

    ``torch.save`` writes whole storages, and fragments of a bucket have a storage that is much larger than they are.
    """
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0 or extent != tensor.numel() or tensor.is_conj() or tensor.is_neg():
        return tensor.clone()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    flat = torch.from_numpy(_flat_bytes(tensor).numpy())
    return flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


class _FrameRecorder(io.RawIOBase):
    """Passes on everything that is written, and keeps the bytes before and after the elements of ``tensor``."""

    def __init__(self, sink: Sink, tensor: Tensor) -> None:
        super().__init__()
        self._sink = sink
        self._elements = elements_of(tensor)
        self._around = [bytearray()]

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) == len(self._elements) and all(view[end] == self._elements[end] for end in _ENDS):
            self._around.append(bytearray())
        else:
            self._around[-1] += view
        return self._sink.write(view)

    @property
    def frame(self) -> Frame | None:
        """The bytes before and after the elements; None unless exactly one write looked like the elements."""
        return (bytes(self._around[0]), bytes(self._around[1])) if len(self._around) == 2 else None
