"""Reading a checkpoint that may be damaged or hostile, for ``dcp.load`` and without process groups.

The bytes that are hashed are the bytes that are deserialised: each chunk is read once, into memory of the size that
the checked metadata gives it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from .archives import KnownFrames, dump_object, load_object, load_tensor
from .files import CheckpointError, check_name, names_in, open_confined, read_range, read_whole
from .manifest import MANIFEST_NAME, Manifest, check_files, hash_of, read_manifest
from .metadata import MAX_METADATA_BYTES, METADATA_NAME, check_extents, parse


class OpenCheckpoint:
    """One checkpoint directory, its metadata and manifest read and checked; every chunk is checked as it is read.

    ``verify``: every byte that is read must have the hash that the manifest gives it, and the directory must hold
    the manifest's files and no others. Without it there need be no manifest and no hash is looked at; all else holds.
    CheckpointError, a RuntimeError, names the file and what is wrong with it. Not collective.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.path = Path(path)
        self.manifest: Manifest | None = None
        if verify:
            self.manifest = self._checked_manifest()
        raw = self.read_file(METADATA_NAME, MAX_METADATA_BYTES)
        where = str(self.path / METADATA_NAME)
        self.metadata: Metadata = parse(raw, where)
        self.sizes = self._sizes()
        check_extents(self.metadata, self.sizes, where)
        self._hashes = self._chunk_hashes()
        self._frames = KnownFrames()

    def _checked_manifest(self) -> Manifest:
        manifest = read_manifest(self.path)
        if manifest is None:
            raise needs_manifest(self.path)
        problems = check_files(self.path, manifest)
        if problems:
            raise CheckpointError("dist_asgd: " + "\n".join(problems))
        return manifest

    def read_file(self, name: str, max_bytes: int) -> bytes:
        """The bytes of a small file of the checkpoint, hashed if there is a manifest."""
        data = read_whole(self.path, check_name(name), max_bytes)
        if self.manifest is not None and (
            name not in self.manifest.files or hash_of(data) != self.manifest.files[name].xxh3_128
        ):
            raise CheckpointError(_changed(self.path / name, "it"))
        return data

    def _sizes(self) -> dict[str, int]:
        sizes = {}
        for name in {info.relative_path for info in self.metadata.storage_data.values()}:
            file, sizes[name] = open_confined(self.path, name)
            file.close()
        return sizes

    def _chunk_hashes(self) -> dict[tuple[str, int, int], str] | None:
        if self.manifest is None:
            return None
        hashes = {(n, c.offset, c.length): c.xxh3_128 for n, chunks in self.manifest.chunks.items() for c in chunks}
        for index, info in self.metadata.storage_data.items():
            if (info.relative_path, info.offset, info.length) not in hashes:
                raise CheckpointError(
                    f"dist_asgd: {self.path / MANIFEST_NAME} has no hash for {index.fqn}, at {info.offset} in "
                    f"{info.relative_path}: it belongs to another checkpoint than {METADATA_NAME}."
                )
        return hashes

    def chunks(self, wanted: list[MetadataIndex]) -> Iterator[tuple[MetadataIndex, bytes]]:
        """The bytes of these chunks, each read once, file by file in order of offset."""
        places = sorted(((self.place(index), index) for index in wanted), key=lambda pair: _order(pair[0]))
        at = 0
        while at < len(places):
            name = places[at][0].relative_path
            path = self.path / name
            file, size = open_confined(self.path, name)
            with file:
                while at < len(places) and places[at][0].relative_path == name:
                    info, index = places[at]
                    at += 1
                    if info.offset + info.length > size:
                        raise CheckpointError(f"dist_asgd: {path} was truncated while it was read.")
                    data = read_range(file, path, info.offset, info.length)
                    hashed = self._hashes and self._hashes[name, info.offset, info.length]
                    if hashed and hash_of(data) != hashed:
                        raise CheckpointError(
                            _changed(path, f"{index.fqn}, at {info.offset} to {info.offset + len(data)},")
                        )
                    yield index, data

    def place(self, index: MetadataIndex) -> _StorageInfo:
        """Where a chunk lies; CheckpointError where the checkpoint has no such chunk."""
        found = self.metadata.storage_data.get(index)
        if found is None:
            raise CheckpointError(f"dist_asgd: {self.path} has no chunk of {index.fqn} at {index.offset}.")
        return found  # type: ignore[no-any-return]

    def tensor(self, index: MetadataIndex, data: bytes) -> Tensor:
        """The piece of a tensor in the bytes of a chunk."""
        shape = next(box.sizes for box in self.boxes(index.fqn) if box.offsets == index.offset)
        return load_tensor(data, shape, self._entry(index.fqn).properties, self._what(index), self._frames)

    def boxes(self, key: str) -> list[ChunkStorageMetadata]:
        """The chunks of a tensor: offsets and sizes of each in it."""
        return self._entry(key).chunks

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self.metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"dist_asgd: {key} is no tensor in {self.path}.")
        return entry

    def value(self, index: MetadataIndex, data: bytes) -> Any:
        """The object in the bytes of a chunk."""
        return load_object(data, self._what(index))

    def _what(self, index: MetadataIndex) -> str:
        return f"{index.fqn} in {self.path / self.place(index).relative_path}"


def needs_manifest(path: Path) -> CheckpointError:
    """The error for a directory without a manifest: another program's checkpoint, or none at all."""
    if METADATA_NAME not in names_in(path):
        return CheckpointError(
            f"dist_asgd: {path} is no checkpoint: it has neither {MANIFEST_NAME} nor {METADATA_NAME}."
        )
    return CheckpointError(
        f"dist_asgd: {path} has no {MANIFEST_NAME}, so there are no hashes to verify. If something else than dist_asgd "
        f"wrote it (FSDP2 with dcp.save, say), pass verify=False (--no-verify): then damage to the data is not seen."
    )


def _order(info: _StorageInfo) -> tuple[str, int]:
    return info.relative_path, info.offset


def _changed(path: Path, what: str) -> str:
    return (
        f"dist_asgd: {path} is damaged: {what} does not have the hash that the manifest gives. The file was changed, "
        f"or belongs to another checkpoint."
    )


class CheckedReader(FileSystemReader):
    """For ``dcp.load(state, storage_reader=CheckedReader(path))``: reads DCP directories, and runs nothing of them.

    ``verify=True`` needs ``manifest.json`` and checks every byte that it reads against it; ``verify=False`` reads what
    has none. ``.metadata`` is not unpickled, tensors and objects are loaded with ``weights_only``, and nothing outside
    the directory is opened. RuntimeError (CheckpointError) says which file is wrong and how; call ``read_metadata()``
    first to have it as it is: ``dcp.load`` wraps it.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        super().__init__(path)
        self._verify = verify
        self._opened: OpenCheckpoint | None = None

    @property
    def opened(self) -> OpenCheckpoint:
        """The checkpoint, read and checked on first use."""
        if self._opened is None:
            self._opened = OpenCheckpoint(self.path, verify=self._verify)
        return self._opened

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Called by DCP before a load; another path is opened anew."""
        if checkpoint_id is not None and Path(checkpoint_id) != Path(self.path):
            self._opened = None
        super().reset(checkpoint_id)

    # Not named kwargs: DCP takes that as an offer to read one rank's own metadata, and to hide errors of this one.
    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """The checkpoint's metadata, read and checked once."""
        return self.opened.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors and objects; each chunk is read once, however many pieces of it are wanted."""
        requests: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            requests.setdefault(item.storage_index, []).append(item)
        for index, data in self.opened.chunks(list(requests)):
            items = requests[index]
            if items[0].type == LoadItemType.BYTE_IO:
                # Planners unpickle whatever they are given: give them what was loaded safely, serialized anew.
                value = self.opened.value(index, data)
                for item in items:
                    planner.load_bytes(item, dump_object(value))
            else:
                tensor = self.opened.tensor(index, data)
                for item in items:
                    _fill(tensor, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _fill(source: Tensor, item: ReadItem, planner: LoadPlanner) -> None:
    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        source = source.narrow(dim, start, length)
    target = planner.resolve_tensor(item).detach()
    if target.shape != source.shape:
        raise CheckpointError(
            f"dist_asgd: {item.storage_index.fqn} is {list(target.shape)} here and {list(source.shape)} in the "
            f"checkpoint."
        )
    with torch.no_grad():
        target.copy_(source)
    planner.commit_tensor(item, target)
