"""Of parameters that are whole on every rank, ranks save whole rows: fewer regions, the same bytes, the same values."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from benchmarks.checkpoint_scale import Layout
from dist_asgd import CheckpointManager, ShardedASGD, load_checkpoint, save_checkpoint
from dist_asgd.checkpoint.format.reader import OpenCheckpoint
from dist_asgd.checkpoint.rows import row_range
from dist_asgd.placements.shard_tensor import row_major_regions
from dist_asgd.storage.layout import lay_out
from tests.harness.bits import assert_same_bits
from tests.harness.native import native_collectives
from tests.harness.ranks import run

SHAPES = [(97, 7), (64, 5), (33, 3, 3), (3, 50, 4), (2, 3, 400), (1000,), (1, 1000), (1000, 1), (5, 1), (0, 4), (4, 0)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_row_is_saved_by_one_rank(world_size: int, itemsize: int) -> None:
    """The ranges follow each other from the first element to the last, and none is longer by more than a row."""
    layout = lay_out([math.prod(shape) for shape in SHAPES], itemsize, world_size)
    shorter = 0
    for number, (shape, slot) in enumerate(zip(SHAPES, layout.slots, strict=True)):
        stop, rows = 0, math.prod(shape[1:])
        for rank in range(world_size):
            fragment = layout.fragment(slot, rank)
            if not fragment.numel:
                continue
            start = fragment.param_start
            first, end = row_range(start, start + fragment.numel, shape, layout.shard_numel, itemsize, number % 2 == 0)
            assert (first, end >= first) == (stop, True), (shape, rank)
            stop = end
            assert end - first < fragment.numel + max(layout.shard_numel // 4, 1), (shape, rank)
            parts = len(row_major_regions(first, end, shape))
            shorter += len(row_major_regions(start, start + fragment.numel, shape)) - parts
            if 1 < rows <= layout.shard_numel // 4:
                assert parts <= 1, (shape, rank)
        assert stop == math.prod(shape)
    assert shorter > 0 or world_size == 1


def test_of_long_shards_the_fragment_is_saved() -> None:
    """A load reads regions whole, and would read those of neighbours too for the sake of a few regions less."""
    shape = (1000, 100)
    assert row_range(150, 30_150, shape, 30_000, 4, by_middle=False) == (200, 30_200)
    assert row_range(150, 60_150, shape, 60_000, 4, by_middle=False) == (150, 60_150)


def test_ranks_save_nearly_as_much_as_each_other() -> None:
    """A model of 7B parameters on 1,024 ranks: within a few per cent, with half the regions."""
    layout = Layout.of(1024, 25.0)
    most, regions, total = 0, 0, 0
    # Every 16th rank: the pattern repeats long before.
    for rank in range(0, 1024, 16):
        rows = list(layout.saved_rows(rank))
        numel = sum(stop - start for _, start, stop in rows)
        most, total, regions = max(most, numel), total + numel, regions + len(rows)
    share = total / 64
    assert most / share < 1.05
    assert regions / 64 < 170


class Net(nn.Module):
    """Parameters whose rows do not fit into shards, in several memory orders and dtypes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.wide = nn.Parameter(torch.randn(64, 5, generator=draw))
        self.conv = nn.Parameter(torch.randn(16, 3, 3, 3, generator=draw).to(memory_format=torch.channels_last))
        self.waves = nn.Parameter(torch.randn(41, 3, dtype=torch.complex64, generator=draw))
        self.turned = nn.Parameter(torch.randn(7, 50, generator=draw).t())
        self.narrow = nn.Parameter(torch.randn(90, 3, generator=draw).bfloat16())
        self.long = nn.Parameter(torch.randn(3, 200, generator=draw))


def trained(seed: int, stage: int) -> tuple[Net, ShardedASGD]:
    """A model after two steps."""
    model = Net(seed)
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=0, stage=stage)
    for step in range(2):
        for param in model.parameters():
            param.grad = torch.full_like(param, 0.5 + step + seed)
        optimizer.step()
    return model, optimizer


def save_both(_rank: int, _world_size: int, folder: str, stage: int) -> None:
    """Job: save at once, and in the background, with parameters that change meanwhile."""
    model, optimizer = trained(0, stage)
    with CheckpointManager(folder) as manager:
        manager.save(model, optimizer, step=1)
        manager.async_save(model, optimizer, step=2)
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(7)
    # What was kept of the first save is not used where parameters have moved.
    with torch.no_grad():
        for param, whole in zip(model.parameters(), trained(0, stage)[0].parameters(), strict=True):
            param.data = whole.detach().clone(memory_format=torch.preserve_format)
    manager.save(model, optimizer, step=3)


def load_both(_rank: int, _world_size: int, folder: str, stage: int) -> None:
    """Job: load each, to the bit."""
    wanted_model, wanted = trained(0, stage)
    whole = wanted.consolidated_state_dict(to=None)
    for step in (1, 2, 3):
        model, optimizer = trained(1, stage)
        load_checkpoint(f"{folder}/step-{step:08}", model, optimizer)
        for (name, param), other in zip(model.named_parameters(), wanted_model.parameters(), strict=True):
            assert_same_bits(param.detach(), other.detach(), name)
        for index, entry in optimizer.consolidated_state_dict(to=None)["state"].items():
            assert_same_bits(entry["ax"], whole["state"][index]["ax"], f"ax {index}")


@pytest.mark.parametrize(("stage", "others"), [(1, 3), (2, 2)])
def test_rows_load_to_the_bit(stage: int, others: int, tmp_path: Path) -> None:
    """On as many ranks and on others, by this package and by DCP; saved at once, in the background, and again."""
    folder = str(tmp_path / "runs")
    run("gloo", 3, save_both, folder, stage)
    run("gloo", others, load_both, folder, stage)
    path = tmp_path / "runs" / "step-00000002"
    model = run("gloo", 3, whole_model, stage)[0]
    blank: dict[str, Any] = {"model": {name: torch.zeros_like(value) for name, value in model.items()}}
    dcp.load(blank, checkpoint_id=path, no_dist=True)
    entries = OpenCheckpoint(path).metadata.state_dict_metadata
    for name, value in model.items():
        assert_same_bits(blank["model"][name], value, name)
        weights, averages = entries[f"model.{name}"], entries[f"optim.state.{name}.ax"]
        assert isinstance(weights, TensorStorageMetadata)
        assert isinstance(averages, TensorStorageMetadata)
        assert len(weights.chunks) <= len(averages.chunks)
        assert name == "long" or len(weights.chunks) <= 3
    weights, averages = (
        sum(len(entry.chunks) for key, entry in entries.items() if key.startswith(begin) and key.endswith(end))
        for begin, end in (("model.", ""), ("optim.state.", ".ax"))
    )
    assert weights < averages


def save_in_flight(_rank: int, _world_size: int, folder: str) -> None:
    """Job: save right after a step, whose gathers run in the wait for them: until then there is no number."""
    with native_collectives(late=True):
        model, optimizer = trained(0, 1)
        optimizer.overlap_forward(model)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert optimizer.gatherer.arrivals.keys
        save_checkpoint(f"{folder}/saved", model, optimizer, step=3)
        assert not optimizer.gatherer.arrivals.keys
        found = {name: value.clone() for name, value in model.state_dict().items()}
        other, other_optimizer = trained(1, 1)
        load_checkpoint(f"{folder}/saved", other, other_optimizer)
        for name, value in other.state_dict().items():
            assert_same_bits(value, found[name], name)
            assert value.isfinite().all()


def test_rows_of_other_ranks_have_arrived_before_they_are_saved(tmp_path: Path) -> None:
    """With ``overlap_forward`` a step returns before them."""
    run("gloo", 2, save_in_flight, str(tmp_path))


def whole_model(_rank: int, _world_size: int, stage: int) -> dict[str, torch.Tensor]:
    """Job: the parameters of ``trained`` by name."""
    return {name: param.detach().clone() for name, param in trained(0, stage)[0].named_parameters()}
