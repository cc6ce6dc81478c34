"""Wrappers anywhere in a model, and inside each other: no trace of them in names, and what one saves others load."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from typer.testing import CliRunner

from dist_asgd import ShardedASGD, export_averaged, load_checkpoint, save_checkpoint
from dist_asgd.cli import app
from tests.harness.bits import assert_same_bits
from tests.harness.ranks import run

Wrapper = Callable[[nn.Module], nn.Module]


class Holder(nn.Module):
    """A module of the user's own whose child is called ``module``: that is no part of a wrapper."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def plain_net() -> nn.Sequential:
    """Modules in modules, with a buffer in the middle."""
    torch.manual_seed(1)
    inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Holder(nn.Linear(3, 2)))
    return nn.Sequential(nn.Linear(2, 3), inner, Holder(nn.Sequential(nn.Linear(2, 2, bias=False))))


def wrapped(module: nn.Module, wrappers: list[Wrapper], draw: random.Random) -> nn.Module:
    """``module`` with up to three wrappers around it and around every module in it, as ``draw`` says."""
    for name, child in list(module.named_children()):
        setattr(module, name, wrapped(child, wrappers, draw))
    chosen = draw.choices(wrappers, k=draw.choice((0, 0, 1, 2, 3)))
    for number, wrapper in enumerate(chosen):
        # torch does not compile what was compiled before.
        if wrapper is not torch.compile or torch.compile not in chosen[:number]:
            module = wrapper(module)
    return module


def ddp(module: nn.Module) -> nn.Module:
    """The module in DDP, unless it has no parameters."""
    return DistributedDataParallel(module) if any(p.requires_grad for p in module.parameters()) else module


def build(seed: int, mode: str, named: bool) -> tuple[nn.Module, ShardedASGD]:
    """A network in wrappers, and its optimizer after no step. Collective."""
    wrappers: list[Wrapper] = [checkpoint_wrapper, torch.compile, offload_wrapper]  # type: ignore[list-item]
    wrappers += [ddp] if dist.is_initialized() and mode != "fsdp2" else []
    net: nn.Module = plain_net()
    if mode == "fsdp2":
        fully_shard(net[1])  # type: ignore[index]
        fully_shard(net)
    net = wrapped(net, wrappers, random.Random(seed))
    params = net.named_parameters() if named else net.parameters()
    return net, ShardedASGD(params, lr=0.2, t0=0, stage=2 if mode == "stage2" else 1, bucket_cap_mb=0.0001)


def train(model: nn.Module, optimizer: ShardedASGD) -> None:
    """Take three steps with gradients that are the same on every rank. Collective."""
    for step in range(3):
        for number, p in enumerate(model.parameters()):
            drawn = torch.randint(-64, 65, p.shape, generator=torch.Generator().manual_seed(100 * step + number)) / 256
            is_sharded = isinstance(p, DTensor)
            p.grad = distribute_tensor(drawn, p.device_mesh, p.placements, src_data_rank=None) if is_sharded else drawn
        optimizer.step()
        optimizer.zero_grad()


def whole(value: Tensor) -> Tensor:
    """The whole tensor. Collective."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def nested(rank: int, _world_size: int, mode: str, other_mode: str, seed: int, folder: str) -> None:
    """Job: save, export and load between two nestings of wrappers."""
    warnings.simplefilter("ignore")
    model, optimizer = build(seed, mode, True)
    train(model, optimizer)
    save_checkpoint(f"{folder}/c", model, optimizer, step=3)
    export_averaged(f"{folder}/live.safetensors", model, optimizer)
    state = optimizer.consolidated_state_dict(to=None)
    entries = state["state"]
    names = [name for name, _ in plain_net().named_parameters()]
    live = load_file(f"{folder}/live.safetensors")
    assert live.keys() == plain_net().state_dict().keys()
    for index, name in enumerate(names):
        assert_same_bits(live[name], entries[index]["ax"].contiguous(), name)
    if rank == 0:
        result = CliRunner().invoke(app, ["export", f"{folder}/c", f"{folder}/offline.safetensors"])
        assert result.exit_code == 0, result.output
        offline = load_file(f"{folder}/offline.safetensors")
        assert offline.keys() == live.keys()
        for name, value in live.items():
            assert_same_bits(offline[name], value, name)
    other, loaded = build(seed + 1000, other_mode, seed % 2 == 0)
    load_checkpoint(f"{folder}/c", other, loaded)
    _, of_dict = build(seed + 2000, other_mode, True)
    of_dict.load_state_dict(state)
    torch.optim.ASGD(plain_net().named_parameters()).load_state_dict(state)
    for found in (loaded, of_dict):
        after = found.consolidated_state_dict(to=None)["state"]
        assert after.keys() == entries.keys()
        for index, entry in entries.items():
            assert_same_bits(after[index]["ax"].contiguous(), entry["ax"].contiguous(), names[index])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(whole(q.detach()), whole(p.detach()), "parameter")


RUNS = [
    ("none", 1, "stage1", "stage1"),
    ("gloo", 2, "stage1", "stage2"),
    ("gloo", 2, "stage2", "fsdp2"),
    ("gloo", 2, "fsdp2", "stage1"),
]


@pytest.mark.parametrize(("backend", "world_size", "mode", "other"), RUNS)
@pytest.mark.parametrize("seed", range(5))
def test_random_nestings(backend: str, world_size: int, mode: str, other: str, seed: int, tmp_path: Path) -> None:
    """Names are those of the model without wrappers, and checkpoints, exports and state dicts are exchanged."""
    run(backend, world_size, nested, mode, other, seed, str(tmp_path))


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("wrapper", [lambda module: module, checkpoint_wrapper])
def test_parts_that_torchs_recipe_leaves(flatten: bool, wrapper: Wrapper, tmp_path: Path) -> None:
    """torch names parameters of a compiled module in activation checkpointing with a part of the wrapper."""
    warnings.simplefilter("ignore")
    model = nn.Sequential(nn.Linear(2, 3), checkpoint_wrapper(torch.compile(nn.Linear(3, 2))))  # type: ignore[arg-type]
    optimizer = torch.optim.ASGD(model.named_parameters(), lr=0.2, t0=0)
    for _ in range(3):
        sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
        optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    weights, state = get_state_dict(model, optimizer, options=options)
    assert "1._orig_mod.weight" in weights
    dcp.save({"model": weights, "optim": state}, checkpoint_id=tmp_path / "c", no_dist=True)
    other = nn.Sequential(nn.Linear(2, 3), wrapper(nn.Linear(3, 2)))
    loaded = ShardedASGD(other.named_parameters(), lr=0.1)
    load_checkpoint(tmp_path / "c", other, loaded, verify=False)
    assert loaded.param_groups[0]["lr"] == 0.2
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(q.detach(), p.detach(), "parameter")
        assert_same_bits(loaded.state[q]["ax"].view(q.shape), optimizer.state[p]["ax"], "average")
    result = CliRunner().invoke(app, ["export", f"{tmp_path}/c", f"{tmp_path}/e.safetensors", "--no-verify"])
    assert result.exit_code == 0, result.output
    found = load_file(tmp_path / "e.safetensors")
    for name, p in zip(("0.weight", "0.bias", "1.weight", "1.bias"), model.parameters(), strict=True):
        assert_same_bits(found[name], optimizer.state[p]["ax"], name)
