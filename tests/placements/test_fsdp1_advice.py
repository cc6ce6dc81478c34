"""FSDP1 beside plain parameters: what errors advise works, errors come on all ranks, and state moves elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp
from torch.distributed.fsdp import fully_shard

from dist_asgd import ShardedASGD, export_averaged, save_checkpoint
from tests.harness.bits import assert_same_bits, same_tree
from tests.harness.fsdp1 import OPTIONS, Model, full, full_config, ours, torchs, train, wrapped
from tests.harness.ranks import run, run_errors

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(kind: str = "one", **options: Any) -> tuple[nn.Module, ShardedASGD]:
    model = wrapped(kind, True)
    optimizer = ours(model, kind, **options)
    train(model, optimizer, range(5))
    return model, optimizer


def alone(steps: range) -> tuple[nn.Module, torch.optim.ASGD]:
    """Train without FSDP and without ranks."""
    model = Model()
    optimizer = torchs(model, "one")
    train(model, optimizer, steps)
    return model, optimizer


# --- to other ranks and wrappings --------------------------------------------------------------------------


def saved_full(_rank: int, _world_size: int, path: str) -> None:
    """Job: save the full state on rank 0, by torch.save."""
    model, optimizer = trained()
    with full_config(model, rank0_only=True):
        weights = model.state_dict()
    state = full(model, optimizer, rank0_only=True)
    if state:
        torch.save((weights, state), path)


def loaded_full(_rank: int, _world_size: int, path: str, kind: str, orig: bool) -> list[torch.Tensor]:
    """Job: load it into another wrapping, train on, and return the parameters."""
    weights, state = torch.load(path)
    model = wrapped(kind, orig)
    model.load_state_dict(weights)
    optimizer = ours(model, kind, lr=7.0)
    optimizer.load_state_dict(Fsdp.optim_state_dict_to_load(model, optimizer, state))
    train(model, optimizer, range(5, 8))
    return list(model.state_dict().values())


@pytest.mark.parametrize(("kind", "orig", "world_size"), [("nested", False, 3), ("one", True, 1)])
def test_a_full_state_dict_loads_anywhere(kind: str, orig: bool, world_size: int, tmp_path: Path) -> None:
    """At another world size, in another wrapping, with flat parameters or not: bits of torch on one process."""
    path = str(tmp_path / "full.pt")
    run("gloo", 2, saved_full, path)
    expected, _ = alone(range(8))
    for found in run("gloo", world_size, loaded_full, path, kind, orig):
        for p, q in zip(found, expected.state_dict().values(), strict=True):
            assert_same_bits(p, q.detach(), "parameter")


# --- what errors advise -------------------------------------------------------------------------------------


def saved_by_dcp(_rank: int, _world_size: int, path: str) -> dict[str, Any]:
    """Job: save_checkpoint() says: get_state_dict(model, optimizer) with torch.distributed.checkpoint."""
    model, optimizer = trained()
    with pytest.raises(RuntimeError, match=r"get_state_dict\(model, optimizer\) with torch.distributed.checkpoint"):
        save_checkpoint(path + "-ours", model, optimizer, step=5)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)
    return full(model, optimizer)


def loaded_by_dcp(_rank: int, _world_size: int, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Job: load it; return the full state, and the parameters after some steps."""
    model = wrapped("one", True)
    optimizer = ours(model, "one", lr=7.0)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    loaded = full(model, optimizer)
    train(model, optimizer, range(5, 8))
    return loaded, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_checkpoint_as_save_checkpoint_advises(world_size: int, tmp_path: Path) -> None:
    """It loads at the same and at another world size."""
    expected = run("gloo", 2, saved_by_dcp, str(tmp_path / "dcp"))[0]
    model, _ = alone(range(8))
    for loaded, params in run("gloo", world_size, loaded_by_dcp, str(tmp_path / "dcp")):
        assert same_tree(loaded["state"], expected["state"])
        assert same_tree(params, {name: value.detach() for name, value in model.state_dict().items()})


def averages(_rank: int, _world_size: int, path: str) -> dict[str, Any]:
    """Job: averaged_parameters(), export_averaged() and consolidated_state_dict() say: FSDP.optim_state_dict()."""
    model, optimizer = trained()
    advice = r"FSDP.optim_state_dict\(model, optimizer\)"
    with pytest.raises(RuntimeError, match=advice), optimizer.averaged_parameters():
        pass
    with pytest.raises(RuntimeError, match=advice):
        export_averaged(path, model, optimizer)
    with pytest.raises(RuntimeError, match=advice):
        optimizer.consolidated_state_dict()
    return Fsdp.optim_state_dict(model, optimizer)


def test_averages_as_errors_advise(tmp_path: Path) -> None:
    """ax by parameter name where step is above 0, on all ranks; a parameter that never stepped stays."""
    model, oracle = alone(range(5))
    for state in run("gloo", 2, averages, str(tmp_path / "averages.safetensors")):
        found = {name: entry["ax"] for name, entry in state["state"].items() if entry["step"] > 0}
        expected = {name: oracle.state[p]["ax"] for name, p in model.named_parameters() if p in oracle.state}
        assert same_tree(found, {name: expected[name] for name in found})
        assert found.keys() == expected.keys()
        assert model.load_state_dict(found, strict=False).missing_keys == ["unused"]


def whole_only(_rank: int, _world_size: int) -> None:
    """Job: a trainer has set whole_state_dicts_only."""
    model, optimizer = trained()
    optimizer.whole_state_dicts_only = True
    with pytest.raises(RuntimeError, match=r"Call FSDP.optim_state_dict\(model, optimizer\) on all ranks"):
        optimizer.state_dict()
    assert same_tree(Fsdp.optim_state_dict(model, optimizer)["state"], full(model, optimizer)["state"])
    get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # What was gathered for a trainer does not stand in for what FSDP1 asks for.
    model, optimizer = trained("backbone")
    optimizer.consolidate_state_dict()
    assert all(type(entry["ax"]) is torch.Tensor for entry in full(model, optimizer)["state"].values())


def test_whole_state_dicts_only() -> None:
    """The error does not send users to a call that refuses too."""
    run("gloo", 2, whole_only)


def loaded_as_it_is(_rank: int, _world_size: int, orig: bool) -> None:
    """Job: load a full state dict without FSDP1's help, and then as the error says."""
    model = wrapped("one", orig)
    optimizer = ours(model, "one")
    train(model, optimizer, range(5))
    state = full(model, optimizer)
    with pytest.raises(ValueError, match=r"FSDP.optim_state_dict_to_load\(model, optimizer, state_dict\)"):
        optimizer.load_state_dict(state)
    optimizer.load_state_dict(Fsdp.optim_state_dict_to_load(model, optimizer, state))
    assert same_tree(full(model, optimizer), state)


@pytest.mark.parametrize("orig", [True, False])
def test_a_full_state_dict_that_is_loaded_as_it_is(orig: bool) -> None:
    """The error had advised consolidated_state_dict(), which refuses, or other groups."""
    run("gloo", 2, loaded_as_it_is, orig)


# --- errors -------------------------------------------------------------------------------------------------


def failing(rank: int, _world_size: int, how: str) -> None:
    """Job: something is wrong on one rank, or with the state dict that FSDP1 was given."""
    model, optimizer = trained("backbone" if how.startswith("own dict") else "one")
    if how == "hook":
        if rank == 1:
            optimizer.register_state_dict_pre_hook(lambda _optimizer: {}["missing"])
        full(model, optimizer, rank0_only=True)
    elif how == "frozen":
        optimizer = ours(model, "one")
        model.head.weight.requires_grad_(rank == 0)
        full(model, optimizer, rank0_only=True)
    elif how == "one rank alone":
        optimizer.state_dict() if rank == 0 else optimizer.step()
    elif how == "fragment":
        entry = optimizer.state[model.blocks[0].weight]
        entry["mine"] = torch.zeros_like(entry["ax"])
        full(model, optimizer, rank0_only=True)
    elif how == "own dict":
        with full_config(model, rank0_only=False, offload=False):
            Fsdp.optim_state_dict(model, optimizer, optimizer.state_dict())
    elif how == "own dict, offloaded":
        with full_config(model, rank0_only=False):
            Fsdp.optim_state_dict(model, optimizer, optimizer.state_dict())


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("hook", "missing"),
        ("frozen", "Freeze the same parameters on every rank"),
        ("one rank alone", "rank 0 has state_dict(); rank 1 has step()"),
        ("fragment", "is as large as this rank's fragment"),
        ("own dict", "without a state dict of your own"),
        ("own dict, offloaded", "consolidated_state_dict()"),
    ],
)
def test_errors_come_on_all_ranks(how: str, says: str) -> None:
    """Also where only rank 0 would keep the state."""
    for error in run_errors("gloo", 2, failing, how):
        assert says in error.message, error.message


# --- other members -------------------------------------------------------------------------------------------


def in_wider_state(_rank: int, _world_size: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Job: the state is wider than the parameters; one of two optimizers goes on from the full state dict."""
    models = [wrapped("one", True).to(dtype) for _ in range(2)]
    first, second = (ours(model, "one", **options) for model in models)

    def steps(model: nn.Module, optimizer: Any, numbers: range) -> None:
        for step in numbers:
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(4, 5, dtype=dtype)).square().mean().backward()
            optimizer.step()

    steps(models[0], first, range(4))
    state = full(models[0], first)
    assert state["state"]["head.weight"].keys() == state["state"]["first.weight"].keys()
    models[1].load_state_dict(copy.deepcopy(models[0].state_dict()))
    second.load_state_dict(Fsdp.optim_state_dict_to_load(models[1], second, state))
    steps(models[0], first, range(4, 6))
    steps(models[1], second, range(4, 6))
    assert same_tree(full(models[0], first), full(models[1], second))


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({"master_weights": True}, torch.bfloat16), ({"average_dtype": torch.float64}, torch.float32)],
)
def test_masters_and_wider_averages(options: dict[str, Any], dtype: torch.dtype) -> None:
    """They are whole too, and keep their dtypes."""
    run("gloo", 2, in_wider_state, options, dtype)


def others(rank: int, world_size: int) -> None:
    """Job: entries of users, DTensors beside FSDP1, and a model that FSDP1 holds alone."""
    model, optimizer = trained()
    twin = wrapped("one", True)
    oracle = torchs(twin, "one")
    train(twin, oracle, range(5))
    for module, some in ((model, optimizer), (twin, oracle)):
        some.state[module.norm.weight]["mine"] = torch.arange(7.0)
        some.state["seen"] = 17
        some.load_state_dict(Fsdp.optim_state_dict_to_load(module, some, full(module, some)))
    found, expected = full(model, optimizer)["state"], full(twin, oracle)["state"]
    assert same_tree(found["norm.weight"], expected["norm.weight"])
    assert found["seen"] == expected["seen"] == 17

    model = wrapped("one", True)
    fully_shard(model.blocks, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = ours(model, "one")
    train(model, optimizer, range(5))
    for rank0_only in (False, True):
        for name, entry in full(model, optimizer, rank0_only).get("state", {}).items():
            assert type(entry["ax"]) is torch.Tensor, name
            assert name == "unused" or same_tree(entry["ax"], expected[name]["ax"]), name
    optimizer.load_state_dict(Fsdp.optim_state_dict_to_load(model, optimizer, full(model, optimizer)))
    train(model, optimizer, range(5, 6))

    model = Fsdp(Model(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = ShardedASGD(model.parameters(), **OPTIONS)
    if rank == 0:
        # Without plain parameters there is nothing to gather, and this is no collective call.
        optimizer.state_dict()
    dist.barrier()


def test_other_state_and_other_parameters_beside_fsdp1() -> None:
    """All of it is whole, and loads."""
    run("gloo", 2, others)
