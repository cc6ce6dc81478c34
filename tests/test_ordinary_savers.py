"""Trainers that save what ``state_dict()`` returns on rank 0: ZeroRedundancyOptimizer's protocol, and the guard."""

import io
import logging
import pickle
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dist_asgd import ShardedASGD, load_checkpoint, save_checkpoint
from dist_asgd.placements.shard_tensor import shard_tensor_of
from tests.harness.bits import same_tree
from tests.harness.ranks import run, run_errors

both = pytest.mark.parametrize("stage", [1, 2])
worlds = pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])


def trained(stage: int, placement: str = "plain", world_size: int = 1) -> tuple[nn.Module, ShardedASGD]:
    """A model and its optimizer after two steps."""
    model = nn.Linear(16, 16)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(float(p.numel())).view_as(p))
    if placement == "dtensor":
        mesh = init_device_mesh("cpu", (world_size,))
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
    optimizer = ShardedASGD(model.parameters(), lr=0.1, t0=0, stage=stage)
    for _ in range(2):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: ShardedASGD) -> None:
    """One step with gradients of ones."""
    optimizer.zero_grad()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def lightnings_protocol(rank: int, world_size: int, stage: int, placement: str, to: int) -> None:
    """Job: consolidate on all ranks, then ``state_dict()`` on the one that saves; what is saved loads into torch's."""
    model, optimizer = trained(stage, placement, world_size)
    wanted = optimizer.consolidated_state_dict(to=None)
    optimizer.consolidate_state_dict(to) if to else optimizer.consolidate_state_dict()
    if rank == to:
        whole = optimizer.state_dict()
        assert same_tree(whole, wanted)
        file = io.BytesIO()
        torch.save(whole, file)
        file.seek(0)
        plain = torch.optim.ASGD([nn.Parameter(torch.zeros(p.shape)) for p in model.parameters()])
        plain.load_state_dict(torch.load(file))
    elif placement == "plain":
        assert shard_tensor_of(optimizer.state_dict()["state"][0]["ax"]) is not None
    # Only the next one.
    assert (shard_tensor_of(optimizer.state_dict()["state"][1]["ax"]) is not None) == (world_size > 1)
    # A step in between: no rank gets an old state.
    optimizer.consolidate_state_dict(to)
    step(model, optimizer)
    assert optimizer.state_dict()["state"][0]["step"] == 3
    optimizer.consolidate_state_dict(to)
    optimizer.load_state_dict(wanted)
    assert optimizer.state_dict()["state"][0]["step"] == 2


@both
@worlds
def test_zero_redundancy_optimizers_protocol(backend: str, world_size: int, stage: int) -> None:
    """As Lightning and Fabric use it."""
    for to in range(world_size):
        run(backend, world_size, lightnings_protocol, stage, "plain", to)


@both
def test_the_protocol_with_dtensors(stage: int) -> None:
    """Whole tensors in the place of DTensors."""
    run("gloo", 2, lightnings_protocol, stage, "dtensor", 0)


def guarded(rank: int, world_size: int, stage: int, path: Path) -> None:
    """Job: ``state_dict()`` is the whole on rank 0 and nothing elsewhere; checkpoints are as before."""
    model, optimizer = trained(stage)
    optimizer.whole_state_dicts_only = True
    wanted = optimizer.consolidated_state_dict(to=None)
    optimizer.consolidate_state_dict()
    save_checkpoint(path / "saved", model, optimizer, step=2)
    assert same_tree(optimizer.state_dict(), wanted if rank == 0 else {})
    load_checkpoint(path / "saved", model, optimizer)
    if world_size == 1:
        assert same_tree(optimizer.state_dict()["state"], wanted["state"])


@both
@worlds
def test_whole_state_dicts_only(tmp_path: Path, backend: str, world_size: int, stage: int) -> None:
    """One rank has the whole anyway."""
    run(backend, world_size, guarded, stage, tmp_path)


def unconsolidated(_rank: int, _world_size: int, again: bool) -> Any:
    """Job: a part, which would be written without a word."""
    _, optimizer = trained(1)
    optimizer.whole_state_dicts_only = True
    if again:
        optimizer.consolidate_state_dict()
        optimizer.state_dict()
    return optimizer.state_dict()


@pytest.mark.parametrize("again", [False, True])
def test_a_part_is_refused(again: bool) -> None:
    """On every rank, with the remedy."""
    for error in run_errors("gloo", 2, unconsolidated, again):
        assert "Call consolidate_state_dict(to=0) on every rank" in error.message


def test_the_target_is_checked() -> None:
    """On all ranks."""
    for error in run_errors("gloo", 2, _bad_target):
        assert "wanted a rank of the process group, 0 to 1" in error.message


def _bad_target(_rank: int, _world_size: int) -> None:
    trained(1)[1].consolidate_state_dict(7)


SAVER = """
import torch

def save(value, file):
    torch.save(value, file)
"""


def saved_by(_rank: int, _world_size: int, module: str, whole: bool) -> list[str]:
    """Job: let a function of ``module`` save the state dict; returns what was logged."""
    _, optimizer = trained(1)
    saver = types.ModuleType(module)
    exec(SAVER, vars(saver))
    if whole:
        optimizer.consolidate_state_dict()
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("dist_asgd")
    logger.addHandler(handler)
    try:
        if _rank == 0 or not whole:
            for _ in range(2 - whole):
                saver.save(optimizer.state_dict(), io.BytesIO())
    finally:
        logger.removeHandler(handler)
    return [record.getMessage() for record in records]


@pytest.mark.parametrize("module", ["transformers.trainer", "accelerate.utils.other", "lightning_fabric.utilities"])
def test_trainers_that_save_on_one_rank_are_refused(module: str) -> None:
    """The error names the trainer, and what makes its file whole; then the file is whole."""
    for error in run_errors("gloo", 2, saved_by, module, False):
        assert f"{module.partition('.')[0]} would save one rank's part" in error.message
    assert run("gloo", 2, saved_by, module, True) == [[], []]


def test_others_that_save_a_part_are_told_so_once() -> None:
    """Each rank may save its own part; whoever meant the whole sees it in the log."""
    for messages in run("gloo", 2, saved_by, "somebodys_script", False):
        assert len(messages) == 1
        assert messages[0].startswith("somebodys_script saves this rank's part of state_dict()")


def test_a_queue_takes_parts_without_a_word() -> None:
    """Processes of one rank may hand them on."""
    assert run("gloo", 2, _pickled) == [[], []]


def _pickled(_rank: int, _world_size: int) -> list[str]:
    pickle.loads(pickle.dumps(trained(1)[1].state_dict()))
    return []
