"""Small checkpoints on disk, and ways to damage them or to make them hostile.

``sign`` writes a manifest that fits whatever lies in the directory, as an attacker would.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from dist_asgd.checkpoint.format.chunk_table import ChunkTable
from dist_asgd.checkpoint.format.index import INDEX_NAME
from dist_asgd.checkpoint.format.index import encode as encode_index
from dist_asgd.checkpoint.format.manifest import (
    MANIFEST_NAME,
    Chunk,
    Manifest,
    hash_file,
    hash_of,
    read_manifest,
    write_manifest,
)
from dist_asgd.checkpoint.format.metadata import METADATA_NAME
from dist_asgd.checkpoint.format.reader import CheckedReader, OpenCheckpoint


def sample_state(seed: int = 0) -> dict[str, Any]:
    """One value of each kind that a checkpoint holds: dtypes, 0-dim and empty tensors, plain values, user state."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 5, generator=draw)
    return {
        "model": {
            "weight": weight,
            "half": weight.bfloat16(),
            "complex": torch.complex(weight, -weight),
            "empty": torch.zeros(0, 4),
            "count": torch.tensor(7 + seed),
        },
        "optim": {
            "state.weight.step": torch.tensor(4.0),
            "state.weight.ax": torch.randn(3, 5, generator=draw),
            "param_groups.weight.lr": 0.1,
            "param_groups.weight.foreach": None,
        },
        "extra": {"epoch": 3 + seed, "rng": torch.arange(16, dtype=torch.uint8), "order": (1, "two")},
    }


def write_sample(directory: Path, seed: int = 0) -> Path:
    """Save ``sample_state`` in one process, with a manifest; returns ``directory``."""
    dcp.save(sample_state(seed), checkpoint_id=directory, no_dist=True)
    sign(directory, step=4 + seed)
    return directory


def sign(directory: Path, step: int = 4, world_size: int = 1) -> None:
    """Write a manifest that fits the files in ``directory``, with the chunks that the metadata lists."""
    names = [name for name in os.listdir(directory) if name != MANIFEST_NAME]
    chunks: dict[str, list[Chunk]] = {}
    # Equal values may share one chunk.
    places = {(i.relative_path, i.offset, i.length) for i in read_metadata(directory).storage_data.values()}
    for name, offset, length in sorted(places):
        if name in names:
            data = (directory / name).read_bytes()[offset : offset + length]
            chunks.setdefault(name, []).append(Chunk(offset, length, hash_of(data)))
    files = {name: hash_file(directory, name) for name in names}
    write_manifest(directory, Manifest(step, world_size, files, chunks))


def resign(directory: Path) -> None:
    """Write a manifest with new hashes of files and the old chunks, for a ``.metadata`` that cannot be unpickled."""
    old = read_manifest(directory)
    assert old is not None
    write_manifest(directory, replace(old, files={name: hash_file(directory, name) for name in old.files}))


def read_metadata(directory: Path) -> Metadata:
    """Unpickle ``.metadata``, which is safe only for checkpoints that these tests wrote."""
    return pickle.loads((directory / METADATA_NAME).read_bytes())  # type: ignore[no-any-return]


@contextmanager
def edited_metadata(directory: Path) -> Iterator[Metadata]:
    """Yield the metadata to be changed in place; it is written back at the end of the block, without a new manifest."""
    metadata = read_metadata(directory)
    yield metadata
    (directory / METADATA_NAME).write_bytes(pickle.dumps(metadata))


def index_of(metadata: Metadata, key: str) -> MetadataIndex:
    """The index of the first chunk of ``key``."""
    return next(index for index in metadata.storage_data if index.fqn == key)


def put_chunk(directory: Path, key: str, data: bytes) -> None:
    """Make ``data`` the bytes of ``key``: append it to the file, point the metadata to it, and sign the checkpoint."""
    with edited_metadata(directory) as metadata:
        index = index_of(metadata, key)
        path = directory / metadata.storage_data[index].relative_path
        offset = path.stat().st_size
        with path.open("ab") as file:
            file.write(data)
        metadata.storage_data[index] = _StorageInfo(path.name, offset, len(data))
    sign(directory)


def archive(data_pkl: bytes, records: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A ``torch.save`` archive with the pickle ``data_pkl`` and the storages ``records``."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("archive/data.pkl", data_pkl)
        file.writestr("archive/byteorder", b"little")
        for name, record in (records or {}).items():
            file.writestr(f"archive/data/{name}", record, compression)
        file.writestr("archive/version", b"3\n")
    return stream.getvalue()


def saved(value: Any) -> bytes:
    """The bytes that ``torch.save`` writes for ``value``."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def blank() -> dict[str, Any]:
    """A state with zeros and None, into which ``sample_state`` can be loaded."""
    return {
        group: {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None for k, v in values.items()}
        for group, values in sample_state().items()
    }


def load(directory: Path, **options: Any) -> dict[str, Any]:
    """Load a whole checkpoint with ``dcp.load`` and a CheckedReader."""
    reader = CheckedReader(directory, **options)
    reader.read_metadata()
    state = blank()
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def read_all(directory: Path, *, verify: bool = True) -> None:
    """Read every chunk, without a process group."""
    opened = OpenCheckpoint(directory, verify=verify)
    for entry in opened.metadata.state_dict_metadata.values():
        # The places of chunks in an index are found as the chunks are looked at.
        list(getattr(entry, "chunks", ()))
    for index, data in opened.chunks(list(opened.metadata.storage_data)):
        if isinstance(opened.metadata.state_dict_metadata[index.fqn], TensorStorageMetadata):
            opened.tensor(index, data)
        else:
            opened.value(index, data)


class Payload:
    """An object whose unpickling creates the directory ``canary``."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.canary),)


def write_table(directory: Path, table: ChunkTable) -> None:
    """Make ``table`` the index of a checkpoint, and sign it: what it says need not be true."""
    write_index(directory, encode_index(table))


def write_index(directory: Path, data: bytes) -> None:
    """Make ``data`` the bytes of the index, and sign them."""
    (directory / INDEX_NAME).write_bytes(data)
    resign(directory)
