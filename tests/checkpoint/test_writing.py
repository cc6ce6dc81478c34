"""The files that a save writes: DCP's own format, each value written once, and hashed."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.serialization import config

from dist_asgd import ShardedASGD, save_checkpoint
from dist_asgd.checkpoint.entries import state_to_save
from dist_asgd.checkpoint.format import writer
from dist_asgd.checkpoint.format.manifest import Chunk
from dist_asgd.checkpoint.format.reader import OpenCheckpoint
from dist_asgd.checkpoint.format.writer import ArchiveWriter
from dist_asgd.checkpoint.rows import FragmentCache
from dist_asgd.checkpoint.staging import StagingArea
from dist_asgd.placements.shard_tensor import ShardTensor
from tests.harness.bits import assert_same_bits
from tests.harness.checkpoints import read_metadata
from tests.harness.meshes import Net, set_gradients, sharded
from tests.harness.ranks import run
from tests.harness.topologies import build

# --- as DCP would have written it -----------------------------------------------------------------------------


class Memory(nn.Module):
    """A module whose state dict has nested values beside tensors."""

    def get_extra_state(self) -> Any:
        """Return tensors, numbers and containers of them."""
        return {"seen": [torch.arange(3), {"at": 4}], "names": ["a", "b"], "none": None}

    def set_extra_state(self, state: Any) -> None:
        """Accept any state."""


def trained(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model and its optimizer, sharded as ``kind`` says. Collective."""
    if kind in ("single", "stage1", "stage2", "fsdp2", "hybrid"):
        live = build(kind, "odd" if kind != "fsdp2" else "mlp").train(2)
        return live.model, live.optimizer
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if kind == "tp in ddp":
        # Two unrelated meshes, each of which holds everything.
        meshes = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
        model: nn.Module = Net()
        for block in model.blocks:
            parallelize_module(block, meshes[rank // 2], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        empty = distribute_tensor(torch.zeros(0, 5), meshes[rank // 2], ColwiseParallel().output_layouts)
        model.register_buffer("empty", empty)
    else:
        model = sharded(kind, world_size)
    optimizer = ShardedASGD(model.parameters(), lr=0.1)
    set_gradients(model, 0)
    optimizer.step()
    return model, optimizer


def saved_both_ways(rank: int, _world_size: int, kind: str, folder: str) -> list[str]:
    """Job: one state, saved by this package and by DCP; the names of the model's tensors, in their order."""
    model, optimizer = trained(kind)
    model.add_module("memory", Memory())
    save_checkpoint(f"{folder}/ours", model, optimizer, step=2, extra=(rank, "mine"))
    state: dict[str, Any] = dict(state_to_save(model, optimizer, (rank, "mine"), rank))  # DCP finds the copies itself
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    dcp.save(state, checkpoint_id=f"{folder}/theirs", planner=planner, no_dist=not dist.is_initialized())
    return [name for name, value in model.state_dict().items() if isinstance(value, Tensor)]


def outline(metadata: Metadata) -> dict[str, Any]:
    """Return, by key, None for an object, else dtype, shape and regions; regions without elements count once."""
    found: dict[str, Any] = {}
    for key, entry in metadata.state_dict_metadata.items():
        found[key] = None
        if isinstance(entry, TensorStorageMetadata):
            boxes = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)
            found[key] = entry.properties.dtype, tuple(entry.size), boxes
    return found


PLACES = [
    ("single", 1),
    ("stage1", 2),
    ("stage2", 3),
    ("fsdp2", 4),
    ("hsdp", 4),
    ("fsdp2_tp", 4),
    ("tp in ddp", 4),
    ("hybrid", 4),
]


@pytest.mark.parametrize(("kind", "world_size"), PLACES)
def test_the_metadata_is_that_of_dcp(kind: str, world_size: int, tmp_path: Path) -> None:
    """The files have DCP's keys, in its order, with its regions, each written by one rank, and nothing else."""
    names = run("none" if world_size == 1 else "gloo", world_size, saved_both_ways, kind, str(tmp_path))
    opened = OpenCheckpoint(tmp_path / "ours")
    # By the index and by ``.metadata``.
    same, ours, theirs = (
        one.metadata
        for one in (opened, *(OpenCheckpoint(tmp_path / name, verify=False) for name in ("ours", "theirs")))
    )
    assert outline(same) == outline(ours)
    assert (same.storage_data, same.planner_data, same.storage_meta, same.version) == (
        ours.storage_data,
        ours.planner_data,
        ours.storage_meta,
        ours.version,
    )
    # torch's own unpickler makes the same of it.
    assert read_metadata(tmp_path / "ours") == ours
    # DCP does not keep which keys of a dict were no strings, and what was empty.
    skeleton = "containers.model.memory._extra_state"
    assert ours.planner_data.pop(skeleton)
    assert ours.storage_data.pop(MetadataIndex(skeleton))
    assert isinstance(ours.state_dict_metadata.pop(skeleton), BytesStorageMetadata)
    assert outline(ours) == outline(theirs)
    assert ours.planner_data == theirs.planner_data
    # Readers take the order of keys from there; it is the order of rank 0, whose state has all keys.
    model = [key for key in ours.planner_data if key.startswith("model.") and "_extra_state" not in key]
    assert model == [f"model.{name}" for name in names[0]]
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    assert ours.version == theirs.version
    written = {(name, chunk.offset) for name, chunks in opened.table().chunks().items() for chunk in chunks}
    assert written >= {(info.relative_path, info.offset) for info in ours.storage_data.values()}


# --- archives ---------------------------------------------------------------------------------------------------


LAYOUTS = {
    "1-D": lambda dtype: torch.randn(7).to(dtype),
    "matrix": lambda dtype: torch.randn(3, 50).to(dtype),
    "permuted": lambda dtype: torch.randn(2, 3, 4, 5).to(dtype).permute(0, 3, 1, 2),
    "a view of more": lambda dtype: torch.randn(40).to(dtype)[4:16].view(3, 4),
    "with gaps": lambda dtype: torch.randn(8, 8).to(dtype)[::2, ::3],
    "0-dim": lambda dtype: torch.randn(()).to(dtype),
    "empty": lambda dtype: torch.randn(0, 3).to(dtype),
    "large": lambda dtype: torch.randn(700, 900).to(dtype),
}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_frame_around_elements_is_an_archive(layout: str, dtype: torch.dtype) -> None:
    """Archives are byte for byte what ``torch.save`` writes, the first of a shape and those that reuse its frame."""
    stream = io.BytesIO()
    archives = ArchiveWriter(stream, {})
    for _ in range(3):
        tensor: Tensor = LAYOUTS[layout](dtype)
        start = stream.tell()
        archives.write(tensor)
        expected = io.BytesIO()
        alone = tensor.clone()
        with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            torch.save(alone, expected)
        assert stream.getvalue()[start:] == expected.getvalue()
        loaded = torch.load(io.BytesIO(stream.getvalue()[start:]), weights_only=True)
        assert torch.equal(loaded, tensor)


def test_frames_are_told_apart() -> None:
    """Frames are kept by dtype, shape and strides."""
    tensors = [
        torch.randn(4, 3),
        torch.randn(3, 4).t(),
        torch.randn(3, 4),
        torch.randn(4, 3).int(),
        torch.randn(12),
        torch.randn(4, 3, 1),
    ]
    stream = io.BytesIO()
    archives = ArchiveWriter(stream, {})
    for tensor in tensors * 2:
        start = stream.tell()
        archives.write(tensor)
        loaded = torch.load(io.BytesIO(stream.getvalue()[start:]), weights_only=True)
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor)


def test_elements_that_look_like_the_frame_are_found() -> None:
    """A tensor whose bytes also stand elsewhere in its archive has no frame, and is right all the same."""
    stream = io.BytesIO()
    archives = ArchiveWriter(stream, {})
    for text in (b"3\n", b"ab", b"3\n"):
        start = stream.tell()
        archives.write(torch.tensor(list(text), dtype=torch.uint8))
        assert bytes(torch.load(io.BytesIO(stream.getvalue()[start:])).tolist()) == text


def describes_what_is_live(rank: int, _world_size: int) -> int:
    """Job: collect the state repeatedly, as saves do, while averages move to wider memory, and parameters move, too."""
    torch.manual_seed(0)
    model = Net()
    optimizer = ShardedASGD(model.parameters(), lr=0.1)
    set_gradients(model, 0)
    optimizer.step()
    # From now on averages have values of their own.
    optimizer.state_dict()
    shapes = {param: param.shape for param in model.parameters()}
    known = FragmentCache()
    num_parts = 0
    for change in ("nothing", "averages", "parameters", "strides", "parameters", "shape"):
        if change == "averages":
            wider = optimizer.state_dict()
            for entry in wider["state"].values():
                entry["ax"] = entry["ax"].like(entry["ax"].to_local().double())
            optimizer.load_state_dict(wider)
        for param in model.parameters():
            if change == "parameters":
                param.data = torch.empty(shapes[param]).normal_()
            elif change == "strides" and param.dim() == 2:
                param.data = param.data.as_strided(param.shape, (1, param.shape[0]))
            elif change == "shape":
                param.data = param.data[:-1]
        state = state_to_save(model, optimizer, None, rank, 0, known)
        for name, param in model.named_parameters():
            average = state["optim"][f"state.{name}.ax"]
            assert average.shares_memory_with(optimizer.state[param]["ax"]), (change, name)
            own = state["model"].get(name)
            if isinstance(own, ShardTensor):
                num_parts += 1
                assert own.extent == average.extent
                assert own.shares_memory_with(average.fragment_view(param)), (change, name)
            else:
                # A parameter whose strides differ from its average's is written whole, by rank 0.
                assert change in ("strides", "shape")
                assert (own is None) == (rank > 0)
    return num_parts


def test_what_is_known_from_the_last_save_is_not_taken_where_it_has_moved() -> None:
    """Fragments that are kept between saves follow averages that a load moves, and parameters that anyone moves."""
    assert all(num_parts > 10 for num_parts in run("gloo", 2, describes_what_is_live))


# --- staging ----------------------------------------------------------------------------------------------------


def test_a_stage_takes_whatever_comes() -> None:
    """A tensor of the same layout is staged into the same memory, one of another layout into other memory."""
    stage = StagingArea()
    parts = [
        ShardTensor(torch.randn(4), (2, 4), (4, 1), 0),
        ShardTensor(torch.randn(4), (2, 4), (4, 1), 0),
        ShardTensor(torch.randn(4), (2, 4), (4, 1), 4),
        ShardTensor(torch.randn(3), (2, 4), (4, 1), 4),
        ShardTensor(torch.randn(3).double(), (2, 4), (4, 1), 4),
    ]
    kept = []
    for part in parts:
        staged = stage.copy({"optim": {"ax": part}})["optim"]["ax"]
        assert staged.extent == part.extent
        assert staged.dtype == part.dtype
        assert torch.equal(staged.to_local(), part.to_local())
        kept.append(staged.to_local().data_ptr())
    assert kept[0] == kept[1]


def neighbours(shift: int) -> dict[str, Tensor]:
    """Return tensors of several dtypes side by side, far apart, overlapping, empty, and with storages of their own."""
    storage = (torch.arange(40_000) + shift).to(torch.uint8)

    def at(first: int, numel: int, dtype: torch.dtype, *shape: int) -> Tensor:
        return storage[first : first + numel * dtype.itemsize].view(dtype).view(shape or (numel,))

    return {
        "first": at(16, 6, torch.float32, 2, 3),
        "long": at(16, 2000, torch.float32),
        "in its end": at(8000, 4, torch.uint8),
        "beside it": at(40, 5, torch.float16),
        "on both": at(32, 12, torch.int8),
        "far": at(20_000, 3, torch.complex128, 3, 1),
        "last": at(39_998, 2, torch.uint8),
        "none": at(100, 0, torch.float32),
        "across": at(64, 12, torch.float32, 3, 4).t(),
        "conjugate": at(160, 4, torch.complex64).conj(),
        "own": torch.arange(5.0) + shift,
        "own empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.5) + shift,
        "counter": torch.tensor(7) + shift,
    }


def test_what_shares_memory_is_staged_at_once_and_lies_as_it_did() -> None:
    """Staged tensors are right in every round, wherever the originals are by then, in inference mode too."""
    stage = StagingArea()
    addresses = set()
    for shift in range(2):
        live = neighbours(shift)
        # Nothing moves in one round, and everything in the next.
        for step in range(2):
            wanted = {key: value.clone() for key, value in live.items()}
            with torch.inference_mode(step == 0):
                copied = stage.copy({"model": {**live, "name": "a"}, "optim": {"again": live["first"]}})
            assert copied["model"].pop("name") == "a"
            assert torch.equal(copied["optim"]["again"], wanted["first"])
            for key, value in live.items():
                value.zero_()
                assert_same_bits(copied["model"][key].resolve_conj(), wanted[key], key)
                assert copied["model"][key].stride() == value.stride()
            if step:
                assert addresses == {value.data_ptr() for value in copied["model"].values() if value.dim()}
            addresses = {value.data_ptr() for value in copied["model"].values() if value.dim()}
    # The storage has 40,000 bytes, most of which are not copied.
    assert sum(copy_range.buffer.numel() for copy_range in stage._ranges) < 8300


def test_a_stage_notices_that_a_tensor_has_moved() -> None:
    """A tensor that has moved is staged anew, although another tensor may be at its old address."""
    stage = StagingArea()
    both = torch.arange(8.0)
    live = {"a": both[:4], "b": both[4:]}
    stage.copy({"model": live})
    live["b"] = torch.arange(20.0)[10:14]
    both.fill_(-1)
    copied = stage.copy({"model": live})["model"]
    assert copied["a"].tolist() == [-1] * 4
    assert copied["b"].tolist() == [10, 11, 12, 13]
    alone = torch.full((4,), 3.0)
    copied = stage.copy({"model": {"a": alone, "b": live["b"]}})["model"]
    assert copied["a"].tolist() == [3] * 4


def test_a_stage_notices_that_a_tensor_reads_otherwise() -> None:
    """A tensor whose bytes are now read as conjugated or negated is staged anew."""
    stage = StagingArea()
    base = torch.randn(10, dtype=torch.complex64)
    live = {"a": base[:4], "b": base[4:8], "real": torch.view_as_real(base)[:, 1]}
    stage.copy({"model": live})
    live |= {"a": live["a"].conj(), "real": live["a"].conj().imag}
    copied = stage.copy({"model": live})["model"]
    for key, value in live.items():
        assert torch.equal(copied[key], value), key


def test_what_stays_keeps_its_room_when_another_tensor_moves() -> None:
    """Staging reuses its memory, because touching new memory takes longer than copying to it."""
    stage = StagingArea()
    base, ring = torch.arange(100.0), torch.arange(12.0)
    live = {"a": base[:40], "b": base[40:], "own": torch.ones(5), "moving": ring[:3]}
    first = stage.copy({"model": live})["model"]
    for step in range(1, 4):
        live["moving"] = ring[3 * step :][:3]
        live["new"] = torch.full((step,), float(step))
        copied = stage.copy({"model": live})["model"]
        assert all(torch.equal(copied[key], live[key]) for key in live)
        assert all(copied[key].data_ptr() == first[key].data_ptr() for key in ("a", "b", "own"))
    del live["b"], live["new"]
    copied = stage.copy({"model": live})["model"]
    assert copied.keys() == live.keys()
    assert all(torch.equal(copied[key], live[key]) for key in live)
    # The memory of tensors that are gone was freed.
    assert sum(copy_range.buffer.numel() for copy_range in stage._ranges) < 300


def test_a_stage_notices_that_storage_is_another() -> None:
    """A storage at the same address that is smaller, so that a neighbour lies outside of it, is noticed."""
    stage = StagingArea()
    memory = np.arange(8, dtype=np.float32)
    whole, cut = torch.from_numpy(memory), torch.from_numpy(memory[:4])
    live = {"a": whole[:4], "b": whole[4:]}
    stage.copy({"model": live})
    live["a"] = cut
    memory += 1
    copied = stage.copy({"model": live})["model"]
    assert torch.cat((copied["a"], copied["b"])).tolist() == memory.tolist()
    assert len(cut.untyped_storage()) == 16


# --- files ------------------------------------------------------------------------------------------------------


def test_what_is_hashed_is_what_is_written(tmp_path: Path) -> None:
    """Writes of any size, from a few bytes to several blocks, give the right file and hashes, in any order."""
    sizes = [1, 30, 4096, writer._BUFFER_BYTES - 1, writer._BUFFER_BYTES, writer._BLOCK_BYTES + 1, 5 << 20, 0]
    draw = random.Random(0)
    contents: list[bytes] = []
    found: list[Chunk] = []
    with writer.HashedFile(tmp_path / "file") as file:
        for _ in range(12):
            parts = [draw.randbytes(draw.choice(sizes)) for _ in range(draw.randrange(5))]
            for part in parts:
                assert file.write(memoryview(part)) == len(part)
            contents.append(b"".join(parts))
            found.append(file.end_chunk())
        entry = file.end()
        file.sync()
    whole = b"".join(contents)
    assert (tmp_path / "file").read_bytes() == whole
    assert (entry.bytes, entry.xxh3_128) == (len(whole), xxhash.xxh3_128_hexdigest(whole))
    offset = 0
    for chunk, content in zip(found, contents, strict=True):
        assert chunk == Chunk(offset, len(content), xxhash.xxh3_128_hexdigest(content))
        offset += len(content)
