"""Checkpoints of 16-bit parameters with float32 masters: on any number of ranks, and from float32 parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_asgd import ShardedASGD, export_averaged, load_checkpoint, save_checkpoint
from dist_asgd.checkpoint.offline import convert
from dist_asgd.checkpoint.offline.contents import CheckpointContents
from tests.harness.bits import assert_same_bits, same_tree
from tests.harness.ranks import run

OPTIONS: dict[str, Any] = {"lr": 0.1, "t0": 2, "weight_decay": 0.01}
DTYPES = [torch.bfloat16, torch.float16]


class Net(nn.Module):
    """Return parameters of odd shapes, among them an empty one and one of a single element."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("a", (33, 7)), ("b", (5,)), ("c", ()), ("d", (0, 3)), ("e", (130,))):
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))


def train(model: nn.Module, optimizer: ShardedASGD, first: int, last: int) -> None:
    """Set the same gradients on every rank."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = (torch.randint(-8, 9, p.shape, generator=generator) / 16).to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()


def state_of(model: nn.Module, optimizer: ShardedASGD) -> list[Any]:
    """Return the whole state and the parameters."""
    return [[p.detach().clone() for p in model.parameters()], optimizer.consolidated_state_dict(to=None)["state"]]


def saves(_rank: int, _world_size: int, dtype: torch.dtype, stage: int, path: str) -> list[Any]:
    """Job: save after three steps, and return the state after three more."""
    model = Net(dtype)
    optimizer = ShardedASGD(model.named_parameters(), **OPTIONS, stage=stage, master_weights=True)
    train(model, optimizer, 0, 3)
    save_checkpoint(path, model, optimizer, step=3)
    train(model, optimizer, 3, 6)
    return state_of(model, optimizer)


def loads(_rank: int, _world_size: int, dtype: torch.dtype, stage: int, path: str) -> list[Any]:
    """Job: load into parameters of other values, and train on."""
    model = Net(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(3)
    optimizer = ShardedASGD(model.named_parameters(), **OPTIONS, stage=stage, master_weights=True)
    load_checkpoint(path, model, optimizer)
    train(model, optimizer, 3, 6)
    return state_of(model, optimizer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("saved_by", "loaded_by"), [((1, 1), (3, 2)), ((2, 2), (4, 1)), ((3, 1), (1, 2))])
def test_masters_go_on_on_any_number_of_ranks(
    saved_by: tuple[int, int], loaded_by: tuple[int, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    """A checkpoint loads to the bit under another number of ranks and stage, also with more ranks than elements."""
    path = str(tmp_path / "checkpoint")
    backends = {1: "none"}
    expected = run(backends.get(saved_by[0], "gloo"), saved_by[0], saves, dtype, saved_by[1], path)[0]
    for found in run(backends.get(loaded_by[0], "gloo"), loaded_by[0], loads, dtype, loaded_by[1], path):
        assert same_tree(found, expected)


def loads_float32(_rank: int, _world_size: int, dtype: torch.dtype, path: str) -> list[Tensor]:
    """Job: masters from a checkpoint of float32 parameters."""
    model = Net(dtype)
    optimizer = ShardedASGD(model.named_parameters(), **OPTIONS, master_weights=True)
    load_checkpoint(path, model, optimizer)
    state = optimizer.consolidated_state_dict(to=None)["state"]
    return [state[index]["master"] for index in range(5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
def test_masters_are_the_float32_parameters_of_a_checkpoint(
    backend: str, world_size: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Masters have every bit of the float32 parameters, also of values half-way between two 16-bit numbers."""
    model = Net(torch.float32)
    optimizer = ShardedASGD(model.named_parameters(), **OPTIONS)
    train(model, optimizer, 0, 3)
    with torch.no_grad():
        model.a.fill_(1 + 2**-8)  # half-way for bfloat16, and 1 is even
        model.e.fill_(1 + 2**-11)  # and for float16
    path = str(tmp_path / "checkpoint")
    save_checkpoint(path, model, optimizer, step=3)
    for found in run(backend, world_size, loads_float32, dtype, path):
        for master, p in zip(found, model.parameters(), strict=True):
            assert_same_bits(master, p.detach(), "master")


WIDER = [torch.float32, torch.float64]


def trained_with_masters(dtype: torch.dtype, stage: int, t0: int = 10) -> tuple[Net, ShardedASGD]:
    """Return a model of a 16-bit dtype whose masters are not its values. Collective."""
    model = Net(dtype)
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=t0, stage=stage, master_weights=True)
    train(model, optimizer, 0, 3)
    return model, optimizer


def masters_elsewhere(
    _rank: int, _world_size: int, dtype: torch.dtype, stage: int, folder: str
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Job: the masters, and the parameters of other dtypes that load them; exports of the masters, from the job."""
    model, optimizer = trained_with_masters(dtype, stage)
    save_checkpoint(f"{folder}/c", model, optimizer, step=3)
    export_averaged(f"{folder}/job.safetensors", model, optimizer, torch.float32)
    export_averaged(f"{folder}/same.safetensors", model, optimizer)
    state = optimizer.consolidated_state_dict(to=None)["state"]
    found = {}
    for wider in (*WIDER, *DTYPES):
        other = Net(wider)
        load_checkpoint(f"{folder}/c", other, ShardedASGD(other.named_parameters(), stage=stage))
        found[str(wider)] = [p.detach().clone() for p in other.parameters()]
    other = Net(torch.float32)
    load_checkpoint(f"{folder}/c", other, torch.optim.ASGD(other.parameters()))
    found["torch.optim.ASGD"] = [p.detach().clone() for p in other.parameters()]
    return [state[index]["master"] for index in range(5)], found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "world_size", "stage"), [("none", 1, 1), ("gloo", 2, 1), ("gloo", 2, 2)])
def test_masters_are_what_other_dtypes_load_and_export(
    backend: str, world_size: int, stage: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Parameters of another dtype are the master, rounded at most once; so are exports before the averaging begins."""
    for masters, found in run(backend, world_size, masters_elsewhere, dtype, stage, str(tmp_path)):
        assert not all(torch.equal(master, master.to(dtype).float()) for master in masters)
        for wider in (*WIDER, *DTYPES):
            assert same_tree(found[str(wider)], [master.to(wider) for master in masters])
        assert same_tree(found["torch.optim.ASGD"], masters)
    contents = CheckpointContents(tmp_path / "c")
    for last in (False, True):
        convert.export(contents, tmp_path / f"{last}.safetensors", convert.plan_export(contents, last, torch.float32))
    for name in ("job", "False", "True"):
        exported = load_file(tmp_path / f"{name}.safetensors")
        assert same_tree([exported[key] for key in "abcde"], masters)
    same = load_file(tmp_path / "same.safetensors")
    assert same_tree([same[key] for key in "abcde"], [master.to(dtype) for master in masters])


def test_masters_that_are_dropped_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """16-bit parameters go on from their own values, and one line says so; wider ones lose nothing."""
    model, optimizer = trained_with_masters(torch.bfloat16, 1)
    save_checkpoint(tmp_path / "c", model, optimizer, step=3)
    for dtype, lines in ((torch.bfloat16, 1), (torch.float16, 1), (torch.float32, 0)):
        caplog.clear()
        other = Net(dtype)
        load_checkpoint(tmp_path / "c", other, ShardedASGD(other.named_parameters()))
        said = [r.getMessage() for r in caplog.records if "master_weights=True" in r.getMessage()]
        assert len(said) == lines
        assert all("of 5 parameters (a, b, c, d, e)" in line for line in said)
