"""The short ways of the stack machine do what its opcodes do one after the other."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dist_asgd.checkpoint.format.chunk_table import ChunkTable
from dist_asgd.checkpoint.format.manifest import CheckpointError
from dist_asgd.checkpoint.format.metadata import METADATA_NAME, parse
from dist_asgd.checkpoint.format.metadata_writer import metadata_bytes
from dist_asgd.checkpoint.format.pickles import Machine

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1" / "checkpoints"


def outcome(data: bytes) -> Any:
    """Return the metadata in ``data``, or the text of the error."""
    try:
        metadata = parse(data, "here")
    except CheckpointError as error:
        return str(error)
    # Equal values, and pickled to equal bytes: the same objects are shared.
    return metadata, list(metadata.storage_data), [index.index for index in metadata.storage_data]


def step_by_step(data: bytes) -> Any:
    """Return the same, with every opcode executed alone."""
    with (
        patch.object(Machine, "_record", lambda *_: 0),
        patch.object(Machine, "_short_call", lambda *_: 0),
        patch("dist_asgd.checkpoint.format.pickles.MEMOIZE_TUPLE2", b"\xff\xff"),
    ):
        return outcome(data)


def shapes(rank_count: int, dims: int) -> Metadata:
    """Return metadata of tensors of some dimensions on some ranks, of objects, and of numbers of all lengths."""
    metadata = Metadata({}, {}, {}, version="1.0.0")
    for number in range(3 + 1000 * (dims == 1)):
        key, size = f"model.{'long' * 80 * (number == 1)}{number}", torch.Size([2 * rank_count] + [3] * (dims - 1))
        size = size if dims else torch.Size([])
        chunks = []
        for rank in range(rank_count if dims else 1):
            offsets = torch.Size([2 * rank] + [0] * (dims - 1)) if dims else torch.Size([])
            sizes = torch.Size([2] + [3] * (dims - 1)) if dims else torch.Size([])
            chunks.append(ChunkStorageMetadata(offsets, sizes))
            place = _StorageInfo(f"__{rank}_0.distcp", [0, 255, 256, 65536, 1 << 31, 1 << 40][number % 6], number)
            metadata.storage_data[MetadataIndex(key, offsets, rank if number else None)] = place
        metadata.state_dict_metadata[key] = TensorStorageMetadata(TensorProperties(torch.float32), size, chunks)
        metadata.planner_data[key] = ("model", key) if number else ("model", 3, key)
        metadata.state_dict_metadata[f"{key}.lr"] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(f"{key}.lr")] = _StorageInfo("__0_0.distcp", 1 << 33, 7, ["stream.zstd/1"])
    return metadata


def written(ranks: int, dims: int) -> bytes:
    """Return what this package writes of ``shapes``, which has calls in the place of records."""
    metadata = shapes(ranks, dims)
    for info in metadata.storage_data.values():
        info.transform_descriptors = None
    metadata.storage_meta = StorageMeta("here", "id")
    return metadata_bytes(ChunkTable.of(metadata, None, None, None))


SAMPLES: dict[str, Callable[[], bytes]] = {
    **{
        f"{ranks} ranks, {dims} dimensions": (lambda ranks=ranks, dims=dims: pickle.dumps(shapes(ranks, dims)))
        for ranks, dims in ((1, 0), (1, 1), (2, 1), (3, 2), (1, 3), (2, 4), (1, 7))
    },
    **{
        f"{ranks} ranks, {dims} dimensions, by us": (lambda ranks=ranks, dims=dims: written(ranks, dims))
        for ranks, dims in ((1, 0), (2, 1), (3, 2), (2, 4))
    },
    **{path.parent.name: path.read_bytes for path in sorted(FIXTURES.glob(f"*/{METADATA_NAME}"))[:2]},
}


@pytest.mark.parametrize("name", SAMPLES)
def test_whole_files_are_read_alike(name: str) -> None:
    """And as ``pickle`` reads them."""
    data = SAMPLES[name]()
    found, wanted = outcome(data), pickle.loads(data)
    assert not isinstance(found, str), found
    assert found == step_by_step(data)
    assert found[0].state_dict_metadata == wanted.state_dict_metadata
    assert found[0].planner_data == wanted.planner_data
    for index, info in wanted.storage_data.items():
        mine = found[0].storage_data[index]
        assert (mine.relative_path, mine.offset, mine.length) == (info.relative_path, info.offset, info.length)


@pytest.mark.parametrize("name", [name for name in SAMPLES if "1 dim" not in name])
def test_damaged_files_are_read_alike(name: str) -> None:
    """Whatever is changed, both ways give the same values or the same error."""
    whole = SAMPLES[name]()
    draw = random.Random(name)
    opcodes = b"1\x94hj)(.}]Nt\x85\x86\x87\x8cXKMJaesu\x93\x81Rb\x88\x89"
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 3))):
            at = draw.randrange(2, len(data))
            kind = draw.randrange(4)
            if kind == 0:
                data[at] = draw.randrange(256)
            elif kind == 1:
                data[at] = draw.choice(opcodes)
            elif kind == 2:
                del data[at : at + draw.randrange(1, 12)]
            else:
                begin = draw.randrange(2, len(data))
                data[at:at] = data[begin : begin + draw.randrange(1, 80)]
        assert outcome(bytes(data)) == step_by_step(bytes(data))
