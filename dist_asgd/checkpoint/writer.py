"""Writing a checkpoint with ``torch.distributed.checkpoint`` (DCP): hashed while written, on disk before it counts.

Each rank writes one file. Equal small values (the hyperparameters that DCP's layout repeats for every parameter) are
written once and pointed to from each place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    DEFAULT_SUFFIX,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils.serialization import config

from .manifest import Chunk, FileEntry, Manifest, write_manifest
from .metadata import METADATA_NAME

_BUFFER_BYTES = 1 << 18
# Under this many bytes values are compared, so that equal ones are written once.
_SMALL_BYTES = 1 << 20


class Serialized(bytes):
    """An object that is already in the form of ``torch.save``."""


class HashedFile(io.RawIOBase):
    """A new file that hashes what is written to it, as a whole and chunk by chunk."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.failure: OSError | None = None
        # torch.save writes in crumbs of some bytes, and large tensors at once, which pass the buffer by.
        self._file: BinaryIO = path.open("xb", buffering=_BUFFER_BYTES)
        self._whole = xxhash.xxh3_128()
        self._chunk = xxhash.xxh3_128()
        self._offset = 0
        self._chunk_offset = 0

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
            self._file.write(view)
        except OSError as error:
            self.failure = self.failure or error
            raise
        self._whole.update(view)
        self._chunk.update(view)
        self._offset += len(view)
        return len(view)

    def end_chunk(self) -> Chunk:
        """What was written since the last chunk ended."""
        chunk = Chunk(self._chunk_offset, self._offset - self._chunk_offset, self._chunk.hexdigest())
        self._chunk, self._chunk_offset = xxhash.xxh3_128(), self._offset
        return chunk

    def sync(self) -> FileEntry:
        """Wait until the file is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileEntry(self._offset, self._whole.hexdigest())


@dataclasses.dataclass(frozen=True)
class HashedResult(WriteResult):
    """Where an item lies, and the hash of its chunk and of its file."""

    chunk: Chunk | None = None
    file: FileEntry | None = None


class Planner(DefaultSavePlanner):
    """DCP's planner; equal values are serialized once, and what is replicated is rank 0's."""

    def __init__(self) -> None:
        super().__init__(dedup_save_to_lowest_rank=True)
        self._bytes: dict[tuple[type, object], bytes] = {}

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Called by DCP on rank 0, which has all keys: what is read later is in its order, not in that of parts."""
        plans, metadata = super().create_global_plan(all_plans)
        metadata.planner_data = {**all_plans[0].planner_data, **metadata.planner_data}
        return plans, metadata

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """Called with each object that is to be written."""
        if isinstance(object, Serialized):
            return io.BytesIO(object)
        if isinstance(object, list):
            # Groups repeat their lists (of names) for every parameter; the state holds on to them meanwhile.
            key: tuple[type, Any] = (list, id(object))
        elif isinstance(object, (bool, int, float, str, type(None))):
            key = (type(object), repr(object))
        else:
            return super().transform_object(write_item, object)
        if key not in self._bytes:
            self._bytes[key] = super().transform_object(write_item, object).getvalue()
        return io.BytesIO(self._bytes[key])


class CheckpointWriter(FileSystemWriter):
    """Writes to ``temporary``; when all files are on disk rank 0 adds metadata and manifest and calls ``commit``.

    An error on any rank is raised on all of them by DCP, as a ``CheckpointException``.
    """

    def __init__(self, temporary: Path, path: Path, step: int, world_size: int, commit: Callable[[], None]) -> None:
        super().__init__(temporary)
        self._directory = temporary
        self._final = path
        self._step = step
        self._world_size = world_size
        self._commit = commit

    def storage_meta(self) -> StorageMeta:
        """Called by DCP: what ``.metadata`` says of its own place."""
        return StorageMeta(checkpoint_id=str(self._final), save_id=self.save_id)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Called by DCP before planning; the directory is there already, or has vanished."""
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Called by DCP with what this rank has to write."""
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan, planner) if plan.items else [])
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        with HashedFile(self._directory / name) as file:
            try:
                # Our hash does what the archive's checksum would, at a tenth of the time.
                with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
                    chunks = _write_items(file, plan.items, planner)
            except Exception as error:
                raise file.failure or error from error
            entry = file.sync()
        return [
            HashedResult(item.index, c.length, _StorageInfo(name, c.offset, c.length), c, entry)
            for item, c in zip(plan.items, chunks, strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called by DCP on rank 0 when every rank has written."""
        written = [cast(HashedResult, result) for part in results for result in part]
        files: dict[str, FileEntry] = {}
        chunks: dict[str, dict[int, Chunk]] = {}
        for result in written:
            assert result.file is not None
            assert result.chunk is not None
            files[result.storage_data.relative_path] = result.file
            chunks.setdefault(result.storage_data.relative_path, {})[result.chunk.offset] = result.chunk
        self._check_visible(files)
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {result.index: result.storage_data for result in written}
        metadata.storage_meta = self.storage_meta()
        with HashedFile(self._directory / METADATA_NAME) as file:
            file.write(pickle.dumps(metadata))
            files[METADATA_NAME] = file.sync()
        ordered = {name: [found[offset] for offset in sorted(found)] for name, found in chunks.items()}
        write_manifest(self._directory, Manifest(self._step, self._world_size, files, ordered))
        self._commit()
        # DCP sends this to all ranks as what it returns, which nobody asks for.
        metadata.state_dict_metadata, metadata.storage_data, metadata.planner_data = {}, None, None

    def _check_visible(self, files: dict[str, FileEntry]) -> None:
        for name, entry in files.items():
            path = self._directory / name
            if not path.is_file() or path.stat().st_size != entry.bytes:
                raise RuntimeError(
                    f"dist_asgd: rank 0 does not see {path} as it was written by another rank. Save to a folder that "
                    f"all ranks share."
                )


def _write_items(file: HashedFile, items: Sequence[WriteItem], planner: SavePlanner) -> list[Chunk]:
    """Where each item lies, in their order; equal small ones lie in the same place."""
    chunks: list[Chunk] = []
    known: dict[Any, Chunk] = {}
    for item in items:
        data = planner.resolve_data(item)
        key: Any = None
        content: bytes | Tensor
        if isinstance(data, Tensor):
            content = data.detach().cpu()
            if content.dim() == 0:
                key = (content.dtype, bytes(content.clone().reshape(1).view(torch.uint8).tolist()))
        else:
            content = data.getvalue()
            key = content if len(content) < _SMALL_BYTES else None
        if key is None or key not in known:
            if isinstance(content, Tensor):
                torch.save(_alone(content), cast(BinaryIO, file))
            else:
                file.write(content)
            chunk = file.end_chunk()
            if key is not None:
                known[key] = chunk
            chunks.append(chunk)
        else:
            chunks.append(known[key])
    return chunks


def _alone(tensor: Tensor) -> Tensor:
    """``tensor`` on storage of its own size, as ``torch.save`` writes whole storages; no copy where it is dense."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0 or extent != tensor.numel() or tensor.is_conj() or tensor.is_neg():
        return tensor.clone()
    flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return torch.from_numpy(flat.numpy()).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
