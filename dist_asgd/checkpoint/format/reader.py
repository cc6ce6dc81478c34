"""Reading a checkpoint that may be damaged or hostile, through ``dcp.load`` or without it. Nothing here is collective.

``OpenCheckpoint`` gives the commands and ``load_checkpoint`` the chunks of one directory; ``CheckedReader`` offers the
same to ``torch.distributed.checkpoint`` (DCP). A chunk is one region of a tensor, or one object, serialized. The bytes
that are hashed are the bytes that are deserialized: each chunk is read once, into memory of the size that the checked
metadata gives it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list
from torch.futures import Future

from .archives import FrameCache, dump_object, load_object, load_tensor
from .chunk_table import ChunkTable, SavedBy, TableChunks, near
from .compression import MAX_FRAME_BYTES, MAX_OBJECT_BYTES, check_extensions, decompressed
from .descriptions import description_names, read_description
from .extents import check_extents
from .garbage import collections_paused
from .identity import needs_manifest
from .index import INDEX_NAME, MAX_INDEX_BYTES, decode
from .layouts import Prefix, check_prefix, renamed
from .manifest import (
    MANIFEST_NAME,
    CheckpointError,
    Manifest,
    check_files,
    check_name,
    hash_of,
    names_in,
    open_confined,
    read_manifest,
    read_range,
    read_whole,
)
from .metadata import METADATA_NAME
from .paths import AnyPath, UserPath, as_path
from .raw_tensors import RawRange, raw_tensor
from .table_extents import check_table


class OpenCheckpoint:
    """One checkpoint directory: its metadata and manifest are read and checked here, every chunk as it is read.

    With ``verify`` every byte that is read must have the hash that the manifest gives it, and the directory must hold
    the manifest's files. Others are never opened. Without it the manifest may be missing and no hash is compared; all
    other checks are the same. CheckpointError, a RuntimeError, names the file and what is wrong with it.
    """

    def __init__(self, path: UserPath, *, verify: bool = True, prefix: Prefix = "") -> None:
        check_prefix(prefix)
        self.path = as_path(path)
        self.manifest: Manifest | None = None
        self.saved_by: SavedBy | None = None
        self._table: ChunkTable | None = None
        self._places: list[_StorageInfo] | None = None
        with collections_paused():
            self._open(verify, prefix)
        self._begin_reading()

    def _begin_reading(self) -> None:
        self._frames = FrameCache()
        # Values of chunks that were read before, as long as nobody can change them.
        self._constants: dict[object, Any] = {}
        self._sizes_by_key: dict[str, Mapping[torch.Size | None, torch.Size]] = {}

    def table(self) -> ChunkTable:
        """Return all that was read and checked here, for ``of_table`` on other ranks."""
        if self._table is not None:
            return self._table
        with collections_paused():
            return ChunkTable.of(self.metadata, self._places, self._hashes, self.saved_by)

    @classmethod
    def of_table(cls, path: UserPath, table: ChunkTable) -> OpenCheckpoint:
        """Return the checkpoint at ``path``, of which another rank, or this one, has made the ``table``.

        Neither metadata nor manifest are read again: only data files are opened, and whatever is read of them is
        checked as usual.
        """
        opened = cls.__new__(cls)
        opened.path = as_path(path)
        opened.manifest = None
        opened._descriptions, opened.sizes = [], {}
        opened._take(table)
        opened._begin_reading()
        return opened

    def _take(self, table: ChunkTable) -> None:
        with collections_paused():
            chunks = TableChunks(table)
        self.metadata, self._hashes = chunks.metadata, chunks.hashes
        self._table, self.saved_by = table, table.saved_by

    def _open(self, verify: bool, prefix: Prefix) -> None:
        # Raises if there is no such directory.
        names = names_in(self.path)
        if verify:
            manifest = self.manifest = self._checked_manifest()
            self.saved_by = SavedBy(manifest.step, manifest.world_size)
        index = None
        if self.manifest is not None and self.manifest.chunks is None:
            index = self._checked_index(self.manifest)
            if not prefix:
                self._descriptions = [INDEX_NAME]
                self._take(index)
                return
        self._descriptions = [METADATA_NAME] if verify else description_names(names)
        self.metadata, where = read_description(self.path, self._descriptions, self.read_file, has_manifest=verify)
        check_extensions(self.metadata, where)
        self.sizes = self._sizes()
        places = check_extents(self.metadata, self.sizes, where)
        self._hashes = self._chunk_hashes(index)
        self._places = None if prefix else places
        self.metadata = renamed(self.metadata, prefix, where)

    def _checked_manifest(self) -> Manifest:
        # Names and sizes are compared before anything is parsed: a truncated file is reported as such.
        manifest = read_manifest(self.path)
        if manifest is None:
            raise needs_manifest(self.path)
        problems = check_files(self.path, manifest)
        if problems:
            raise CheckpointError("dist_asgd: " + "\n".join(problems))
        return manifest

    def _checked_index(self, manifest: Manifest) -> ChunkTable:
        """Return the table in the index, and set ``sizes``."""
        where = str(self.path / INDEX_NAME)
        table = decode(self.read_file(INDEX_NAME, MAX_INDEX_BYTES), where, manifest.files, self.saved_by)
        # As long as the manifest says: ``check_files`` has found them so.
        self.sizes = {source.relative_path: manifest.files[source.relative_path].bytes for source in table.sources}
        check_table(table, self.sizes, where)
        return table

    def read_file(self, name: str, max_bytes: int) -> bytes:
        """Return the bytes of a small file of the checkpoint; their hash is checked if there is a manifest."""
        data = read_whole(self.path, check_name(name), max_bytes)
        if self.manifest is not None and (
            name not in self.manifest.files or hash_of(data) != self.manifest.files[name].xxh3_128
        ):
            raise CheckpointError(_changed(self.path / name, "it"))
        return data

    def _sizes(self) -> dict[str, int]:
        sizes = {}
        for name in {info.relative_path for info in self.metadata.storage_data.values()}:
            # By opening: a link or a device must be refused before its size is believed.
            file, sizes[name] = open_confined(self.path, name)
            file.close()
        return sizes

    def file_sizes(self) -> dict[str, int]:
        """Return the bytes of every file of the checkpoint by name, the metadata and the manifest included."""
        sizes = dict(self.sizes)
        for name in (*self._descriptions, *(() if self.manifest is None else (MANIFEST_NAME, *self.manifest.files))):
            if name not in sizes:
                file, sizes[name] = open_confined(self.path, name)
                file.close()
        return sizes

    def _chunk_hashes(self, table: ChunkTable | None) -> dict[tuple[str, int, int], str] | None:
        if self.manifest is None:
            return None
        by_name = self.manifest.chunks if table is None else table.chunks()
        owner = self.path / (MANIFEST_NAME if table is None else INDEX_NAME)
        assert by_name is not None
        hashes = {(name, c.offset, c.length): c.xxh3_128 for name, chunks in by_name.items() for c in chunks}
        # Checked for all chunks now, so that a missing hash is never a chunk that is read without one.
        for index, info in self.metadata.storage_data.items():
            if (info.relative_path, info.offset, info.length) not in hashes:
                raise CheckpointError(
                    f"dist_asgd: {owner} has no hash for {index.fqn}, at {info.offset} in "
                    f"{info.relative_path}: it belongs to another checkpoint than {METADATA_NAME}."
                )
        return hashes

    def chunks(self, wanted: list[MetadataIndex]) -> Iterator[tuple[MetadataIndex, bytes]]:
        """Yield the bytes of these chunks, each read once, file by file in order of offset: one chunk is in memory."""
        ordered = sorted(((self.storage_info(index), index) for index in wanted), key=lambda pair: _order(pair[0]))
        at = 0
        while at < len(ordered):
            name = ordered[at][0].relative_path
            path = self.path / name
            file, size = open_confined(self.path, name)
            with file:
                while at < len(ordered) and ordered[at][0].relative_path == name:
                    info, index = ordered[at]
                    at += 1
                    if info.offset + info.length > size:
                        raise CheckpointError(f"dist_asgd: {path} was truncated while it was read.")
                    data = read_range(file, path, info.offset, info.length)
                    if self._hashes is not None and hash_of(data) != self._hashes[name, info.offset, info.length]:
                        raise CheckpointError(
                            _changed(path, f"{index.fqn}, at {info.offset} to {info.offset + len(data)},")
                        )
                    yield index, data

    def storage_info(self, index: MetadataIndex) -> _StorageInfo:
        """Return the file and the byte range of a chunk; raises CheckpointError if there is no such chunk."""
        found = self.metadata.storage_data.get(index)
        if found is None:
            raise CheckpointError(f"dist_asgd: {self.path} has no chunk of {index.fqn} at {index.offset}.")
        return found  # type: ignore[no-any-return]

    def tensor(self, index: MetadataIndex, data: bytes) -> Tensor:
        """Return the region of a tensor in the bytes of a chunk, on the CPU, of the region's shape."""
        shape = self._region_sizes(index.fqn)[index.offset]
        properties, info, what = self._entry(index.fqn).properties, self.storage_info(index), self._what(index)
        if isinstance(info, RawRange):
            return raw_tensor(data, shape, properties.dtype)
        most = math.prod(shape) * properties.dtype.itemsize + MAX_FRAME_BYTES
        plain = decompressed(data, info.transform_descriptors, most, what)
        return load_tensor(plain, shape, properties, what, self._frames)

    def _region_sizes(self, key: str) -> Mapping[torch.Size | None, torch.Size]:
        """Return the sizes of a tensor's regions by offset."""
        known = self._sizes_by_key.get(key)
        if known is None:
            # Of regions with one offset all but one are empty, and the first is the one that is read.
            known = {region.offsets: region.sizes for region in reversed(self.regions(key))}
            if len(known) > 1:
                self._sizes_by_key[key] = known
        return known

    def regions(self, key: str) -> list[ChunkStorageMetadata]:
        """Return the regions of a tensor, which are its chunks: offsets and sizes of each."""
        return self._entry(key).chunks

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self.metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"dist_asgd: {key} is no tensor in {self.path}.")
        return entry

    def value(self, index: MetadataIndex, data: bytes) -> Any:
        """Return the object in the bytes of a chunk."""
        what = self._what(index)
        plain = decompressed(data, self.storage_info(index).transform_descriptors, MAX_OBJECT_BYTES, what)
        return load_object(plain, what)

    def whole_tensor(self, key: str) -> Tensor:
        """Read one whole tensor, on the CPU, and assemble it from its chunks."""
        entry = self._entry(key)
        sizes = {MetadataIndex(key, chunk.offsets): chunk.sizes for chunk in entry.chunks}
        whole: Tensor | None = None
        for index, data in self.chunks(list(sizes)):
            chunk = self.tensor(index, data)
            # The serialized bytes are freed before memory for the whole tensor is allocated.
            del data
            if chunk.shape == entry.size:
                return chunk
            if whole is None:
                whole = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
            target = whole
            for dim, (offset, size) in enumerate(zip(index.offset or (), sizes[index], strict=True)):
                target = target.narrow(dim, offset, size)
            target.copy_(chunk)
        return torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu") if whole is None else whole

    def _what(self, index: MetadataIndex) -> str:
        return f"{index.fqn} in {self.path / self.storage_info(index).relative_path}"

    def values(self, keys: Sequence[str]) -> dict[str, Any]:
        """Return the objects and 0-dim tensors at ``keys``; a chunk that several keys share is read once.

        Raises CheckpointError if one of the keys is a tensor of more than one element.
        """
        found: dict[str, Any] = {}
        keys_of: dict[object, list[str]] = {}
        wanted: dict[MetadataIndex, object] = {}
        entries, constants = self.metadata.state_dict_metadata, self._constants
        for key in keys:
            entry = entries[key]
            offsets = None
            if isinstance(entry, TensorStorageMetadata):
                if len(entry.chunks) != 1 or entry.size.numel() != 1:
                    raise CheckpointError(f"dist_asgd: {key} in {self.path} is no single value.")
                offsets = entry.chunks[0].offsets
            index = MetadataIndex(key, offsets)
            info = self.storage_info(index)
            # With the type, because hostile metadata may give one chunk to an object and to a tensor.
            location = (type(entry), info.relative_path, info.offset, info.length)
            if location in constants:
                found[key] = constants[location]
                continue
            if location not in keys_of:
                wanted[index] = location
            keys_of.setdefault(location, []).append(key)
        for index, data in self.chunks(list(wanted)):
            is_object = isinstance(self.metadata.state_dict_metadata[index.fqn], BytesStorageMetadata)
            value = self.value(index, data) if is_object else self.tensor(index, data)
            found.update(dict.fromkeys(keys_of[wanted[index]], value))
            if isinstance(value, bool | int | float | str | None):
                self._constants[wanted[index]] = value
        return found


def _order(info: _StorageInfo) -> tuple[str, int]:
    return info.relative_path, info.offset


def _changed(path: AnyPath, what: str) -> str:
    return (
        f"dist_asgd: {path} is damaged: {what} does not have the hash that the manifest gives. The file was changed, "
        f"or belongs to another checkpoint."
    )


class CheckedReader(FileSystemReader):
    """For ``dcp.load(state, storage_reader=CheckedReader(path))``: reads DCP directories, and runs nothing in them.

    ``verify=True`` needs ``manifest.json`` and checks every byte that it reads against it; ``verify=False`` reads
    checkpoints that have none. ``.metadata`` is not unpickled, tensors and objects are loaded with ``weights_only``,
    and no file outside the directory is opened. RuntimeError (CheckpointError) says which file is wrong and how.
    With ``prefix`` the keys are those of ``load_checkpoint``, whatever layout the file has; see there.
    ``dcp.load`` wraps that error: call ``read_metadata()`` first to get it unwrapped.
    """

    def __init__(self, path: UserPath, *, verify: bool = True, prefix: Prefix = "") -> None:
        super().__init__("")
        # DCP's readers have a path of the file system; nothing but this class reads this one.
        self.path: Any = as_path(path)
        self._verify = verify
        self._prefix = prefix
        self._opened: OpenCheckpoint | None = None

    @classmethod
    def of(cls, opened: OpenCheckpoint) -> CheckedReader:
        """Return a reader of a checkpoint that is open."""
        reader = cls(opened.path)
        reader._opened = opened
        return reader

    @property
    def opened(self) -> OpenCheckpoint:
        """The checkpoint, read and checked on first use."""
        if self._opened is None:
            self._opened = OpenCheckpoint(self.path, verify=self._verify, prefix=self._prefix)
        return self._opened

    def reset(self, checkpoint_id: UserPath | None = None) -> None:
        """Called by DCP before a load; forgets the open checkpoint if ``checkpoint_id`` is another path."""
        super().reset(None)
        if checkpoint_id is not None and as_path(checkpoint_id) != self.path:
            self.path = as_path(checkpoint_id)
            self._opened = None

    # Not named kwargs: DCP takes that name as an offer to read one rank's own metadata, and then hides errors of this
    # call.
    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Return the checkpoint's metadata, read and checked once."""
        return self.opened.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Called by DCP to fill the planner's tensors and objects; a chunk is read once, however many items want it."""
        requests: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            requests.setdefault(item.storage_index, []).append(item)
        for index, data in self.opened.chunks(list(requests)):
            items = requests[index]
            if items[0].type == LoadItemType.BYTE_IO:
                # Planners unpickle whatever they are given, so they get the safely loaded object, serialized anew.
                value = self.opened.value(index, data)
                for item in items:
                    planner.load_bytes(item, dump_object(value))
            else:
                tensor = self.opened.tensor(index, data)
                for item in items:
                    _fill(tensor, item, planner)
        # DCP's interface is asynchronous; here everything is read when the future is made.
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors by key, in place: plain tensors, DTensors and ``ShardTensor``; each rank reads its regions.

        Not collective: this is ``dcp.load`` without the exchange of plans, which every rank could make alone.
        """
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.read_data(self.plan(targets, planner), planner).wait()

    def plan(self, targets: Mapping[str, Tensor], planner: LoadPlanner) -> LoadPlan:
        """Set ``planner`` up for ``targets``, and return which regions of which chunks go where; nothing is read."""
        # The planner looks at every chunk that it is given.
        metadata = near(self.opened.metadata, {key: _boxes_of(target) for key, target in targets.items()})
        planner.set_up_planner(dict(targets), metadata, is_coordinator=True)
        self.set_up_storage_reader(metadata, is_coordinator=True)
        return planner.finish_plan(self.prepare_local_plan(planner.create_local_plan()))


def _boxes_of(target: Tensor) -> list[ChunkStorageMetadata]:
    """Return the regions that this rank has of ``target``; none of a DTensor on a mesh that it is not in."""
    mesh = getattr(target, "device_mesh", None)
    return [] if mesh is not None and mesh.get_coordinate() is None else _create_chunk_list(target)


def _fill(source: Tensor, item: ReadItem, planner: LoadPlanner) -> None:
    """Copy the item's region of ``source``, one chunk, to where the planner wants it."""
    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        source = source.narrow(dim, start, length)
    # detach(): a parameter that requires gradients could not be written in place.
    target = planner.resolve_tensor(item).detach()
    if target.shape != source.shape:
        raise CheckpointError(
            f"dist_asgd: {item.storage_index.fqn} is {list(target.shape)} here and {list(source.shape)} in the "
            f"checkpoint."
        )
    with torch.no_grad():
        target.copy_(source)
    planner.commit_tensor(item, target)
