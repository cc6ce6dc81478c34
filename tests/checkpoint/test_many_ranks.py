"""What grows with the number of ranks: rank 0 reads it once, saves refuse what no load takes, gathers go by bucket."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dist_asgd import ShardedASGD, export_averaged, load_checkpoint, save_checkpoint
from dist_asgd.checkpoint.format import identity, manifest, reader, room, writer
from dist_asgd.checkpoint.format.chunk_table import ChunkTable
from dist_asgd.checkpoint.format.file_report import FileReport, described
from dist_asgd.checkpoint.format.reader import CheckedReader, OpenCheckpoint
from dist_asgd.checkpoint.format.writer import ChunkToWrite, RankFile
from dist_asgd.placements.shard_tensor import ShardTensor
from dist_asgd.state_dict import whole_tensors
from tests.harness.bits import assert_same_bits
from tests.harness.ranks import run, run_errors


def values_of(shape: Sequence[int]) -> Tensor:
    """A tensor of different values: ranks that are threads draw from one generator."""
    return torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).view(*shape)


def trained(seed: int = 0, stage: int = 1, width: int = 13) -> tuple[nn.Module, ShardedASGD]:
    """A model of several buckets whose matrices are cut inside their rows, after two steps."""
    model = nn.Sequential(nn.Linear(width, 7), nn.Linear(7, 11), nn.Linear(11, 5, dtype=torch.float64))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(values_of(param.shape) + seed)
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=0, stage=stage, bucket_cap_mb=1e-4)
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.full_like(param, 0.1 + seed)
        optimizer.step()
    return model, optimizer


def save(_rank: int, _world_size: int, path: str, seed: int = 0) -> None:
    """Job: save ``trained``."""
    save_checkpoint(path, *trained(seed), step=2, extra={"seed": seed})


# --- loading ---------------------------------------------------------------------------------------------


def reads(_rank: int, _world_size: int, path: str, verify: bool) -> Counter[str]:
    """Job: load; how often this rank has opened which file."""
    found: Counter[str] = Counter()
    open_confined, read_whole = reader.open_confined, reader.read_whole

    def counted(directory: Any, name: str) -> Any:
        found[name] += 1
        return open_confined(directory, name)

    def counted_whole(directory: Any, name: str, most: int) -> bytes:
        found[f"whole {name}"] += 1
        return read_whole(directory, name, most)

    model, optimizer = trained(seed=1)
    with (
        patch.object(reader, "open_confined", counted),
        patch.object(identity, "open_confined", counted),
        patch.object(reader, "read_whole", counted_whole),
    ):
        assert load_checkpoint(path, model, optimizer, verify=verify) == {"seed": 0}
    for param, expected in zip(model.parameters(), trained()[0].parameters(), strict=True):
        assert_same_bits(param, expected, "parameter")
    return found


@pytest.mark.parametrize("verify", [True, False])
def test_only_the_first_rank_reads_the_metadata(verify: bool, tmp_path: Path) -> None:
    """The others open data files, and for its last bytes the file that tells the checkpoint from another."""
    path = str(tmp_path / "saved")
    run("gloo", 3, save, path)
    first, *others = run("gloo", 3, reads, path, verify)
    assert first["whole chunks.index" if verify else "whole .metadata"] == 1
    assert not verify or not first["whole .metadata"]
    for found in others:
        assert found.pop("manifest.json" if verify else ".metadata") == 1
        assert found
        assert all(name.endswith(".distcp") for name in found), found


def load_own(rank: int, _world_size: int, folder: str, verify: bool) -> None:
    """Job: each rank loads from a path of its own."""
    model, optimizer = trained(seed=1)
    load_checkpoint(f"{folder}/{rank}", model, optimizer, verify=verify)
    for param, expected in zip(model.parameters(), trained()[0].parameters(), strict=True):
        assert_same_bits(param, expected, "parameter")


@pytest.mark.parametrize("verify", [True, False])
def test_ranks_with_copies_of_their_own(verify: bool, tmp_path: Path) -> None:
    """Each rank may have the checkpoint on a disk of its own; another checkpoint there is an error on all ranks."""
    run("gloo", 2, save, str(tmp_path / "0"))
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    run("gloo", 2, load_own, str(tmp_path), verify)
    shutil.rmtree(tmp_path / "1")
    run("gloo", 2, save, str(tmp_path / "1"))
    for error in run_errors("gloo", 2, load_own, str(tmp_path), verify):
        assert (error.type_name, "checkpoints to load differ" in error.message) == ("ValueError", True), error.message
    shutil.rmtree(tmp_path / "1")
    for error in run_errors("gloo", 2, load_own, str(tmp_path), verify):
        assert f"there is no checkpoint at {tmp_path}/1" in error.message


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four ranks, with several regions of each matrix on each of them."""
    path = tmp_path_factory.mktemp("pieces") / "saved"
    run("gloo", 4, save, str(path))
    return path


@pytest.mark.parametrize(("verify", "prefix"), [(True, ""), (False, ""), (True, {"model": "model"})])
def test_a_table_is_the_checkpoint(pieces: Path, verify: bool, prefix: Any) -> None:
    """It has all that was read, after it was sent too; chunks are checked as before."""
    opened = OpenCheckpoint(pieces, verify=verify, prefix=prefix)
    sent = OpenCheckpoint.of_table(pieces, ChunkTable.unpack(opened.table().pack()))
    entries = opened.metadata.state_dict_metadata
    assert list(sent.metadata.state_dict_metadata) == list(entries)
    for key, entry in entries.items():
        found = sent.metadata.state_dict_metadata[key]
        if hasattr(entry, "chunks"):
            assert (found.size, found.properties) == (entry.size, entry.properties)
            assert list(found.chunks) == list(entry.chunks)
            assert_same_bits(sent.whole_tensor(key), opened.whole_tensor(key), key)
        else:
            assert (type(found), sent.values([key])) == (type(entry), opened.values([key]))
    assert sent.metadata.storage_data == opened.metadata.storage_data
    assert (sent.metadata.planner_data, sent.saved_by) == (opened.metadata.planner_data, opened.saved_by)
    assert sent.metadata.storage_meta == opened.metadata.storage_meta
    damaged = pieces.with_name("damaged")
    shutil.copytree(pieces, damaged, dirs_exist_ok=True)
    for file in damaged.glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(RuntimeError, match=r"dist_asgd: .* is damaged"):
        OpenCheckpoint.of_table(damaged, OpenCheckpoint(pieces).table()).whole_tensor("model.0.weight")


def test_a_rank_plans_with_the_chunks_that_it_needs(pieces: Path) -> None:
    """The plan is the one that DCP makes of all chunks, and no others are made into objects."""
    opened = OpenCheckpoint(pieces)
    for start in (0, 5, 40):
        for numel in (1, 13, 30):
            target = {"model.0.weight": ShardTensor(torch.empty(numel), (7, 13), (13, 1), start)}
            sent = OpenCheckpoint.of_table(pieces, opened.table())
            planners = [DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False) for _ in range(2)]
            plans = [
                CheckedReader.of(one).plan(target, planner).items
                for one, planner in zip((opened, sent), planners, strict=True)
            ]
            wanted, found = (
                {(i.dest_index, i.dest_offsets, i.storage_index, i.storage_offsets, i.lengths) for i in plan}
                for plan in plans
            )
            assert found == wanted
            indices = {item[2] for item in found}
            assert {i for i in sent.metadata.storage_data if i.fqn == "model.0.weight"} == indices
            assert len(indices) < len(opened.regions("model.0.weight"))


# --- saving ----------------------------------------------------------------------------------------------


def save_too_much(_rank: int, _world_size: int, path: str, module: str, name: str, most: int) -> None:
    """Job: save with another limit; with one of ``room`` no data file may be opened."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(manifest if module == "manifest" else room, name, most))
        if module == "room":
            stack.enter_context(patch.object(writer, "HashedFile", side_effect=AssertionError("written")))
        save(0, 0, path)


@pytest.mark.parametrize("name", ["MAX_INDEX_BYTES", "MAX_METADATA_BYTES"])
def test_what_no_load_would_take_is_not_written(name: str, tmp_path: Path) -> None:
    """All ranks raise, before a rank opens its file."""
    path, file = str(tmp_path / "saved"), {"MAX_INDEX_BYTES": "chunks.index"}.get(name, ".metadata")
    for error in run_errors("gloo", 2, save_too_much, path, "room", name, 400):
        assert error.type_name == "ValueError"
        assert f"its {file} would need" in error.message
        assert "larger bucket_cap_mb" in error.message
    assert not os.listdir(tmp_path)


def test_what_is_just_too_long_is_not_put_in_place(tmp_path: Path) -> None:
    """The sum before is the least; manifest and index themselves are measured too."""
    run("gloo", 2, save, str(tmp_path / "whole"))
    most = (tmp_path / "whole" / "manifest.json").stat().st_size - 1
    for error in run_errors("gloo", 2, save_too_much, str(tmp_path / "saved"), "manifest", "MAX_MANIFEST_BYTES", most):
        assert f"manifest.json would have {most + 1:,} bytes" in error.message
    # The path is in it: of the same length.
    most = (tmp_path / "whole" / "chunks.index").stat().st_size - 1
    for error in run_errors("gloo", 2, save_too_much, str(tmp_path / "saved"), "index", "MAX_INDEX_BYTES", most):
        assert f"its chunks.index would need {most + 1:,} bytes" in error.message, error.message
    assert os.listdir(tmp_path) == ["whole"]


def test_the_least_is_no_more_than_what_is_written(tmp_path: Path) -> None:
    """And not much less: what is refused late has cost the time of a save."""
    chunks = [ChunkToWrite("w", torch.zeros(1, 2), (4000, 2), (row, 0)) for row in range(4000)]
    with RankFile(tmp_path, 0, {}) as file:
        written = file.write(chunks, {"w": ("w",)})
    made = described(tmp_path, [FileReport.of(written)])
    count, index_bytes, metadata_bytes = room.least_bytes(chunks)
    assert count == 4000
    assert len(made.metadata) / 5 < metadata_bytes <= len(made.metadata)
    assert len(made.index) / 2 < index_bytes <= len(made.index)


# --- gathering -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted_collectives(found: Counter[str]) -> Iterator[None]:
    """Count the collectives of ``torch.distributed`` that gather; on threads, those of all ranks."""
    with contextlib.ExitStack() as stack:
        for name in ("gather", "broadcast"):
            call = getattr(dist, name)

            def counted(*args: Any, _name: str = name, _call: Any = call, **options: Any) -> Any:
                found[_name] += 1
                return _call(*args, **options)

            stack.enter_context(patch.object(dist, name, counted))
        yield


def export(rank: int, _world_size: int, path: str) -> dict[str, Tensor] | None:
    """Job: export the averages; the averages of rank 0, whole."""
    model, optimizer = trained()
    export_averaged(path, model, optimizer)
    assert len(optimizer.shards.buckets) > 3
    whole = optimizer.consolidated_state_dict()
    if rank:
        return None
    names = [name for name, _ in model.named_parameters()]
    return {name: entry["ax"] for name, entry in zip(names, whole["state"].values(), strict=True)}


@pytest.mark.parametrize("room_bytes", [whole_tensors.MAX_STAGING_BYTES, 64])
def test_a_bucket_is_gathered_by_one_collective(room_bytes: int, tmp_path: Path) -> None:
    """By backends without messages between two ranks, and by several if it does not fit into the staging."""
    from safetensors.torch import load_file

    found: Counter[str] = Counter()
    path = str(tmp_path / "model.safetensors")
    with counted_collectives(found), patch.object(whole_tensors, "MAX_STAGING_BYTES", room_bytes):
        averages, *_ = run("threads", 4, export, path)
    exported = load_file(path)
    assert exported.keys() == averages.keys()
    for name, average in averages.items():
        assert_same_bits(exported[name], average, name)
    num_buckets = len(trained()[1].shards.buckets)
    assert found["broadcast"] == 0
    # An export and a consolidated state dict, by four ranks.
    assert found["gather"] == 4 * 2 * num_buckets if room_bytes > 64 else found["gather"] > 4 * 2 * num_buckets


def whole_dtensors(rank: int, world_size: int, shapes: list[tuple[int, ...]]) -> None:
    """Job: gather DTensors whose parts have several sizes, on rank 1."""
    mesh = init_device_mesh("cpu", (world_size,))
    model = nn.ParameterList(nn.Parameter(distribute_tensor(values_of(shape), mesh, [Shard(0)])) for shape in shapes)
    optimizer = ShardedASGD(model.parameters(), lr=0.1, lambd=0)
    for param in model:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    state = optimizer.consolidated_state_dict(to=1)
    for number, shape in enumerate(shapes if rank == 1 else ()):
        assert_same_bits(state["state"][number]["ax"], values_of(shape), f"ax {number}")


@pytest.mark.parametrize(("shapes", "broadcasts"), [([(9, 3), (4, 2), (7,)], 0), ([(1, 3)], 4)])
def test_dtensors_of_uneven_parts_are_padded(shapes: list[tuple[int, ...]], broadcasts: int) -> None:
    """By backends without messages between two ranks, unless nearly all would be padding."""
    found: Counter[str] = Counter()
    with counted_collectives(found):
        run("threads", 4, whole_dtensors, shapes)
    assert found["broadcast"] == broadcasts
