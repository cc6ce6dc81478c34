"""Ties: one parameter under several names is exported as one, and equal values alone make no tie."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from typer.testing import CliRunner

from dist_asgd import ShardedASGD, export_averaged, save_checkpoint
from dist_asgd.cli import app
from tests.harness.bits import assert_same_bits, same_bits
from tests.harness.ranks import run

RUNS = [("none", 1, "stage1"), ("gloo", 2, "stage1"), ("gloo", 2, "stage2"), ("gloo", 2, "fsdp2")]


class Net(nn.Module):
    """An embedding whose weight is the head's too, and a twin of it that is synchronised by hand."""

    def __init__(self, twin: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 6, bias=False)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.other = nn.Linear(4, 6, bias=False)
        if twin == "buffer":
            self.register_buffer("target", torch.zeros(6, 4))
        else:
            self.target = nn.Parameter(torch.zeros(6, 4), requires_grad=False)

    def synchronise(self) -> None:
        """Give the twin the values of the trained parameter."""
        with torch.no_grad():
            weight = self.embed.weight
            self.target.copy_(weight.full_tensor() if isinstance(weight, DTensor) else weight)


def train(model: Net, optimizer: Any, steps: int = 4) -> None:
    """Take steps with gradients that are the same on all ranks, and synchronise the twin. Collective."""
    for step in range(steps):
        for p in (model.embed.weight, model.other.weight):
            drawn = torch.randint(-64, 65, p.shape, generator=torch.Generator().manual_seed(step)) / 256
            is_sharded = isinstance(p, DTensor)
            p.grad = distribute_tensor(drawn, p.device_mesh, p.placements, src_data_rank=None) if is_sharded else drawn
        optimizer.step()
        optimizer.zero_grad()
    model.synchronise()


def command(folder: str, *options: str) -> Any:
    """The result of ``dist-asgd export``."""
    arguments = ["export", f"{folder}/c", f"{folder}/offline.safetensors", "--force", *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result


def ties(rank: int, _world_size: int, mode: str, twin: str, t0: float, whose: str, folder: str) -> None:
    """Job: export live and from a checkpoint."""
    model = Net(twin)
    if mode == "fsdp2":
        ignored = {model.target} if twin == "parameter" else set()
        fully_shard(model, ignored_params=ignored)  # type: ignore[arg-type]
    params = [p for p in model.parameters() if p.requires_grad or whose == "all"]
    optimizer = ShardedASGD(params, lr=0.2, t0=t0, stage=2 if mode == "stage2" else 1)
    train(model, optimizer)
    save_checkpoint(f"{folder}/c", model, optimizer, step=4)
    for dtype in (None, torch.bfloat16):
        export_averaged(f"{folder}/live.safetensors", model, optimizer, dtype, overwrite=True)
        if rank == 0:
            live = load_file(f"{folder}/live.safetensors")
            result = command(folder, *(() if dtype is None else ("--dtype", "bfloat16")))
            assert "ties" not in result.stderr
            offline = load_file(f"{folder}/offline.safetensors")
            assert offline.keys() == live.keys()
            for name, value in live.items():
                assert_same_bits(offline[name], value, name)
            assert_same_bits(live["head.weight"], live["embed.weight"], "tie")
            assert live["head.weight"].dtype == (dtype or torch.float32)
            if t0 == 0:
                assert not same_bits(live["target"].float(), live["embed.weight"].float())
            target = model.target.to(live["target"].dtype)
            assert_same_bits(live["target"], target.detach(), "twin")
        if torch.distributed.is_initialized():
            torch.distributed.barrier()


@pytest.mark.parametrize(("backend", "world_size", "mode"), RUNS)
@pytest.mark.parametrize("twin", ["buffer", "parameter"])
@pytest.mark.parametrize(("t0", "whose"), [(0, "trained"), (1e6, "trained"), (0, "all")])
def test_ties_are_by_identity(
    backend: str, world_size: int, mode: str, twin: str, t0: float, whose: str, tmp_path: Path
) -> None:
    """A tied parameter has one value and one dtype under all names; a twin keeps its own."""
    run(backend, world_size, ties, mode, twin, t0, whose, str(tmp_path))


def test_checkpoints_without_a_record(tmp_path: Path) -> None:
    """torch's recipe records no ties: the command line goes by values, and says so."""
    model = Net("buffer")
    optimizer = torch.optim.ASGD(model.parameters(), lr=0.2, t0=0)
    train(model, optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    weights, state = get_state_dict(model, optimizer, options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": weights, "optim": state}, checkpoint_id=tmp_path / "c", no_dist=True)
    result = command(str(tmp_path), "--no-verify")
    assert "does not record ties" in result.stderr
    assert "target (" in result.stderr
    result = command(str(tmp_path), "--no-verify", "--no-ties-by-value")
    assert "does not record ties" in result.stderr
    found = load_file(tmp_path / "offline.safetensors")
    assert_same_bits(found["target"], model.target.detach(), "twin")


def test_plain_models_have_no_record(tmp_path: Path) -> None:
    """A checkpoint of a model without ties, twins and hooks is what it was before there were records."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1)
    save_checkpoint(tmp_path / "c", model, optimizer, step=0)
    assert b"sources" not in (tmp_path / "c" / ".metadata").read_bytes()
