"""Where a checkpoint describes its keys, and DCP's metadata from there.

``.metadata``          what DCP writes, for all ranks together
``__N.metadata``       what each rank N writes for itself with ``dcp.save(..., use_collectives=False)``
``*.safetensors``      the headers of files that ``HuggingFaceStorageWriter`` or others have written
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from .manifest import CheckpointError
from .metadata import MAX_METADATA_BYTES, METADATA_NAME, parse
from .paths import AnyPath
from .raw_tensors import located, metadata_of_files, tensor_files

_OF_RANK = re.compile(r"__(0|[1-9]\d{0,6})\.metadata")


def description_names(names: Sequence[str]) -> list[str]:
    """Return which of the ``names`` in a directory describe its keys, in the order of the ranks; [] if none does."""
    if METADATA_NAME in names:
        return [METADATA_NAME]
    of_ranks = sorted((int(match[1]), name) for name in names if (match := _OF_RANK.fullmatch(name)))
    return [name for _, name in of_ranks] or tensor_files(list(names))


def read_description(
    directory: AnyPath, names: Sequence[str], read: Callable[[str, int], bytes], *, has_manifest: bool
) -> tuple[Metadata, str]:
    """Return DCP's metadata, and the path that errors about it name.

    ``names`` are from ``description_names``, and ``read`` gives the bytes of a small file. Not collective. Raises
    CheckpointError.
    """
    if not names or names[0] == METADATA_NAME:
        where = str(directory / METADATA_NAME)
        metadata = parse(read(METADATA_NAME, MAX_METADATA_BYTES), where)
        # With a manifest it is this package's own, which never writes such files.
        return (metadata if has_manifest else located(metadata, directory)), where
    if _OF_RANK.fullmatch(names[0]) is None:
        return metadata_of_files(directory, list(names)), str(directory)
    for rank, name in enumerate(names):
        if name != f"__{rank}.metadata":
            raise CheckpointError(
                f"dist_asgd: {directory / f'__{rank}.metadata'} is missing, and {name} is there: each rank has written "
                f"metadata of its own (use_collectives=False), and the checkpoint is not whole."
            )
    parts = [parse(read(name, MAX_METADATA_BYTES), str(directory / name)) for name in names]
    metadata = merged(parts, directory)
    return (metadata if has_manifest else located(metadata, directory)), str(directory / names[0])


def merged(parts: Sequence[Metadata], directory: AnyPath) -> Metadata:
    """Return the metadata of all ranks in one: all regions, and of equal keys and regions those of the lowest rank.

    Raises CheckpointError, which names the key and the ranks, if two ranks have tensors of another dtype or shape.
    """
    entries = {key: _copied(entry) for key, entry in parts[0].state_dict_metadata.items()}
    paths, storage = dict(parts[0].planner_data or {}), dict(parts[0].storage_data)
    first = dict.fromkeys(entries, 0)
    for rank, part in enumerate(parts[1:], 1):
        for key, entry in part.state_dict_metadata.items():
            known = entries.get(key)
            if known is None:
                entries[key], first[key] = _copied(entry), rank
                storage.update((i, part.storage_data[i]) for i in _indices(key, entry) if i in part.storage_data)
            elif _kind(known) != _kind(entry):
                raise CheckpointError(
                    f"dist_asgd: {directory}: {key} is {_kind(known)} for rank {first[key]} and {_kind(entry)} for "
                    f"rank {rank}. Each rank has written metadata of its own (use_collectives=False), and this key is "
                    f"nothing that they share: load it on that many ranks with torch.distributed.checkpoint."
                )
            elif isinstance(known, TensorStorageMetadata) and isinstance(entry, TensorStorageMetadata):
                for chunk in entry.chunks:
                    index = MetadataIndex(key, chunk.offsets)
                    if index not in storage and index in part.storage_data:
                        known.chunks.append(chunk)
                        storage[index] = part.storage_data[index]
        for key, path in (part.planner_data or {}).items():
            paths.setdefault(key, path)
    return Metadata(entries, paths or None, storage, parts[0].storage_meta, parts[0].version)


def _copied(entry: TensorStorageMetadata | BytesStorageMetadata) -> TensorStorageMetadata | BytesStorageMetadata:
    """Return ``entry`` with a list of chunks of its own."""
    if isinstance(entry, BytesStorageMetadata):
        return entry
    return TensorStorageMetadata(entry.properties, entry.size, list(entry.chunks))


def _indices(key: str, entry: TensorStorageMetadata | BytesStorageMetadata) -> list[MetadataIndex]:
    if isinstance(entry, BytesStorageMetadata):
        return [MetadataIndex(key)]
    return [MetadataIndex(key, chunk.offsets) for chunk in entry.chunks]


def _kind(entry: TensorStorageMetadata | BytesStorageMetadata) -> str:
    if isinstance(entry, BytesStorageMetadata):
        return "an object"
    return f"a tensor {list(entry.size)} {entry.properties.dtype}"
