"""Checkpoints of any optimizer of ``torch.optim``, plain or on DTensors: its whole state loads, or it is refused."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from typer.testing import CliRunner

from dist_asgd import CheckpointError, ShardedASGD, ShardedAverage, load_checkpoint, save_checkpoint
from dist_asgd.checkpoint.offline.contents import CheckpointContents
from dist_asgd.checkpoint.offline.convert import consolidate
from dist_asgd.cli import app
from tests.harness.bits import assert_same_bits
from tests.harness.models import mlp
from tests.harness.ranks import run, run_errors

optim = torch.optim
OPTIMIZERS: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (optim.AdamW, {"lr": 0.02}),
    "AdamW, fused": (optim.AdamW, {"lr": 0.02, "fused": True}),
    "AdamW, lr is a tensor": (optim.AdamW, {"lr": torch.tensor(0.02), "foreach": False}),
    "SGD, momentum": (optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}),
    "SGD": (optim.SGD, {"lr": 0.02}),
    "Adagrad": (optim.Adagrad, {"lr": 0.02}),
    "RMSprop": (optim.RMSprop, {"lr": 0.02, "momentum": 0.5, "centered": True}),
    "NAdam": (optim.NAdam, {"lr": 0.02}),
    "Rprop": (optim.Rprop, {"lr": 0.02}),
    "Muon": (optim.Muon, {"lr": 0.02}),
    "ASGD": (optim.ASGD, {"lr": 0.02, "t0": 1}),
}
PLACES = [("plain", 1), ("plain", 3), ("fsdp2", 2), ("fsdp2", 4), ("plain", 2), ("fsdp2", 3)]
# Each optimizer is saved and loaded at other places than the one before it. Rprop does not step on DTensors.
CASES = [
    (which, PLACES[i % 6], PLACES[(i + 1 + i // 6) % 6]) if which != "Rprop" else (which, PLACES[1], PLACES[0])
    for i, which in enumerate(OPTIMIZERS)
]
# What these compute depends on the layout: whole matrices, and vectors of the processor.
DEPEND_ON_LAYOUT = ("Muon", "AdamW, fused")


def build(kind: str, which: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """A model, on FSDP2 or plain on every rank, and an optimizer in two groups. Collective."""
    model = mlp(width=8, depth=1, seed=seed).to(dtype)
    if kind == "fsdp2":
        fully_shard(model)
    kind_of, options = OPTIMIZERS[which]
    params = [p for p in model.parameters() if which != "Muon" or p.dim() == 2]
    groups = [{"params": params[:2], "weight_decay": 0.125}, {"params": params[2:]}]
    return model, kind_of(groups, **options)


def train(model: nn.Module, optimizer: optim.Optimizer, steps: range) -> None:
    """Take steps with gradients by name and step; the last parameter never has one."""
    for step in steps:
        for name, param in itertools.islice(model.named_parameters(), len(list(model.parameters())) - 1):
            draw = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
            whole = torch.randint(-64, 65, param.shape, generator=draw).to(param.dtype) / 256
            param.grad = placed(whole, param)
        optimizer.step()


def placed(whole: Tensor, param: Tensor) -> Tensor:
    """``whole`` as ``param`` is placed. Nothing is sent."""
    if not hasattr(param, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None)


def whole(value: Any) -> Any:
    """A copy of ``value``, all of it if it is a DTensor. Collective."""
    if not isinstance(value, Tensor):
        return value
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


def everything(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Any]:
    """Parameters, and all that ``state_dict()`` of the optimizer has, by name. Collective."""
    found = {name: whole(param) for name, param in model.named_parameters()}
    state = optimizer.state_dict()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    name_of = {id(param): name for name, param in model.named_parameters()}
    for index, param in enumerate(params):
        for key, value in state["state"].get(index, {}).items():
            found[f"{key} of {name_of[id(param)]}"] = whole(value)
    for number, group in enumerate(state["param_groups"]):
        for key, value in group.items():
            if key not in ("params", "fused"):
                found[f"{key} of group {number}"] = whole(value)
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Tensors to the bit, dtypes and all, and other values."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert found[name].dtype == value.dtype, name
            assert_same_bits(found[name], value, name)
        else:
            assert found[name] == value, name


def saves(_rank: int, _world_size: int, kind: str, which: str, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Job: save after three steps, and before any; what was saved after three, and what two more make of it."""
    model, optimizer = build(kind, which)
    save_checkpoint(f"{path}-fresh", model, optimizer, step=0)
    train(model, optimizer, range(3))
    save_checkpoint(path, model, optimizer, step=3)
    saved = everything(model, optimizer)
    train(model, optimizer, range(3, 5))
    return saved, everything(model, optimizer)


def loads(_rank: int, _world_size: int, kind: str, which: str, path: str, expected: Any, goes_on: bool) -> None:
    """Job: load into an optimizer without state, and into one with another state; also what has no state."""
    for steps in (0, 2):
        model, optimizer = build(kind, which, seed=7)
        train(model, optimizer, range(5, 5 + steps))
        load_checkpoint(path, model, optimizer)
        assert_same(everything(model, optimizer), expected[0])
        if goes_on:
            train(model, optimizer, range(3, 5))
            assert_same(everything(model, optimizer), expected[1])
        load_checkpoint(f"{path}-fresh", model, optimizer)
        fresh, unused = build(kind, which)
        assert_same(everything(model, optimizer), everything(fresh, unused))


def at(place: tuple[str, int], fn: Any, *args: Any) -> Any:
    """Run a job at a place; the value of rank 0."""
    return run("none" if place == ("plain", 1) else "gloo", place[1], fn, place[0], *args)[0]


@pytest.mark.parametrize(("which", "source", "target"), CASES, ids=str)
def test_the_whole_state_loads_anywhere(
    which: str, source: tuple[str, int], target: tuple[str, int], tmp_path: Path
) -> None:
    """What one process has, any layout saves, and any other loads to the bit, and goes on from there."""
    expected = at(("plain", 1), saves, which, str(tmp_path / "oracle"))
    saved = at(source, saves, which, str(tmp_path / "c"))
    if which not in DEPEND_ON_LAYOUT:
        assert_same(saved[0], expected[0])
    at(target, loads, which, str(tmp_path / "c"), saved, which not in DEPEND_ON_LAYOUT)


# --- torch's own helpers -----------------------------------------------------------------------------------


def exchanges_with_torch(_rank: int, _world_size: int, path: str) -> None:
    """Job: ``dcp.load`` reads AdamW from ``save_checkpoint``, and ``load_checkpoint`` what ``dcp.save`` has written."""
    import torch.distributed.checkpoint as dcp

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = build("fsdp2", "AdamW")
    train(model, optimizer, range(3))
    save_checkpoint(f"{path}-ours", model, optimizer, step=3)
    expected = everything(model, optimizer)
    theirs, their_optimizer = build("fsdp2", "AdamW", seed=7)
    train(theirs, their_optimizer, range(4))
    states = dict(zip(("model", "optim"), get_state_dict(theirs, their_optimizer, options=options), strict=True))
    dcp.load(states, checkpoint_id=f"{path}-ours")
    set_state_dict(
        theirs, their_optimizer, model_state_dict=states["model"], optim_state_dict=states["optim"], options=options
    )
    assert_same(everything(theirs, their_optimizer), expected)
    for flat in (True, False):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        states = dict(zip(("model", "optim"), get_state_dict(model, optimizer, options=options), strict=True))
        dcp.save(states, checkpoint_id=f"{path}-{flat}")
        again, its_optimizer = build("fsdp2", "AdamW", seed=7)
        load_checkpoint(f"{path}-{flat}", again, its_optimizer, verify=False)
        assert_same(everything(again, its_optimizer), expected)


def test_torchs_helpers_read_and_write_the_same(tmp_path: Path) -> None:
    """On two ranks of FSDP2."""
    run("gloo", 2, exchanges_with_torch, str(tmp_path / "c"))


def test_commands_know_the_state_of_another_optimizer(tmp_path: Path) -> None:
    """``inspect`` lists it by parameter, ``diff`` in a table, and nobody promises an average."""
    model, optimizer = build("plain", "AdamW", dtype=torch.bfloat16)
    for step in (1, 2):
        train(model, optimizer, range(step, step + 1))
        save_checkpoint(tmp_path / str(step), model, optimizer, step=step)
    first, second = str(tmp_path / "1"), str(tmp_path / "2")
    shown = cli("inspect", second)
    rows = {line.split()[0]: line.split() for line in shown.splitlines()}
    assert rows["parameter"] == ["parameter", "shape", "size", "step", "state", "state", "size"]
    assert rows["0.weight"] == ["0.weight", "8×12", "192", "bytes", "2", "exp_avg,", "exp_avg_sq", "388", "bytes"]
    assert rows["2.bias"] == ["2.bias", "4", "8", "bytes", "none"]
    assert "also in the model" not in shown
    assert "optimizer: AdamW" in shown
    assert "10 parameters, 436 elements; model 872 bytes, optimizer state 1.8 kB" in shown
    found = json.loads(cli("inspect", second, "--json"))["parameters"][0]
    assert (found["step"], found["state_bytes"], found["averaging"]) == (2.0, 388, False)
    assert [entry["name"] for entry in found["own_state"]] == ["step", "exp_avg", "exp_avg_sq"]
    compared = cli("diff", first, second, status=1)
    assert "state of the optimizer: 18 of 18 differ, relative up to" in compared
    assert re.search(r"^  0.weight.exp_avg_sq +94 of 96 elements +\S+ +\S+$", compared, re.MULTILINE)
    assert "37 tensors" in cli("consolidate", second, str(tmp_path / "whole.safetensors"))
    exported = cli("export", second, str(tmp_path / "out.safetensors"))
    assert "the checkpoint has no averages (AdamW keeps none): these are the last iterates." in exported
    refused = cli("export", second, str(tmp_path / "ema.safetensors"), "--average", "ema", status=1)
    assert "has no average 'ema', and no other" in refused


def cli(*args: str, status: int = 0) -> str:
    """Run a command in this process; returns all that it prints."""
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == status, result.output
    return result.output


def test_consolidated_state_loads_in_torch(tmp_path: Path) -> None:
    """The file has ``state_dict()`` of AdamW; values that are no tensors are refused for safetensors."""
    expected = at(("fsdp2", 2), saves, "AdamW", str(tmp_path / "c"))
    consolidate(CheckpointContents(tmp_path / "c"), tmp_path / "whole.pt")
    model, optimizer = build("plain", "AdamW", seed=7)
    found = torch.load(tmp_path / "whole.pt")
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optim"])
    mine = everything(model, optimizer)
    assert_same({key: mine[key] for key in expected[0]}, expected[0])

    counting, counter = build("plain", "SGD, momentum")
    train(counting, counter, range(2))
    counter.state[next(iter(counter.state))]["count"] = 3
    save_checkpoint(tmp_path / "n", counting, counter, step=2)
    with pytest.raises(ValueError, match=r"no tensors, and a .safetensors file would lose them"):
        consolidate(CheckpointContents(tmp_path / "n"), tmp_path / "whole.safetensors")


# --- state of other kinds ----------------------------------------------------------------------------------


class WideMomentum(optim.Optimizer):
    """An optimizer of somebody: float32 state of 16-bit parameters, a number, and an entry of its own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.state["seen"] = {"steps": 0}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Keep a momentum in float32, under names that an ASGD has as well."""
        self.state["seen"]["steps"] += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    entry = self.state[p]
                    entry["step"] = entry.get("step", 0) + 1
                    entry["master"] = p.grad.float() * 0.3 + entry.get("master", torch.zeros_like(p.grad.float()))
                    p.add_(entry["master"].to(p.dtype), alpha=-group["lr"])


OPTIMIZERS["wide"] = (WideMomentum, {})


def saves_wide(_rank: int, _world_size: int, kind: str, path: str) -> None:
    """Job: the state is as wide after the load as before, also in a model of another dtype, where torch casts it."""
    model, optimizer = build(kind, "wide", dtype=torch.bfloat16)
    train(model, optimizer, range(3))
    save_checkpoint(path, model, optimizer, step=3)
    again, loaded = build(kind, "wide", seed=7, dtype=torch.bfloat16)
    load_checkpoint(path, again, loaded)
    assert_same(everything(again, loaded), everything(model, optimizer))
    first = next(iter(again.parameters()))
    assert loaded.state[first]["master"].dtype == torch.float32
    assert loaded.state["seen"] == {"steps": 3}
    other, cast = build(kind, "wide", seed=7, dtype=torch.float64)
    load_checkpoint(path, other, cast)
    assert cast.state[next(iter(other.parameters()))]["master"].dtype == torch.float64
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(whole(q.detach()), whole(p.detach()).double(), "the parameter, and not the master")


@pytest.mark.parametrize("place", [("plain", 1), ("fsdp2", 2)], ids=str)
def test_wide_state_keeps_its_bits(place: tuple[str, int], tmp_path: Path) -> None:
    """Under names of ASGD's state too: ``step`` may be a number, and ``master`` something else than a master."""
    at(place, saves_wide, str(tmp_path / "c"))


def refused(optimizer: Any, model: nn.Module, path: Path, message: str) -> None:
    """Assert that a save is refused, and leaves nothing."""
    with pytest.raises(ValueError, match=message):
        save_checkpoint(path, model, optimizer, step=1)
    assert not path.exists()


def test_what_cannot_be_saved_is_refused_by_name(tmp_path: Path) -> None:
    """A save does not lose anything silently."""
    model, optimizer = build("plain", "AdamW")
    refused(optim.LBFGS(model.parameters()), model, tmp_path / "c", "state of LBFGS: .* Pass its state_dict.. in extra")
    train(model, optimizer, range(1))
    entry = optimizer.state[next(iter(model.parameters()))]
    entry["history"] = object()
    refused(optimizer, model, tmp_path / "c", r"state\[p\]\['history'\] of parameter 0.weight .object. cannot be saved")
    del entry["history"]
    entry["ax"] = torch.zeros(3)
    refused(optimizer, model, tmp_path / "c", r"0.weight in AdamW has 'ax' without \['eta', 'mu'\]")
    del entry["ax"]
    hook = optimizer.register_state_dict_post_hook(lambda _optimizer, state: {**state, "scale": 3})
    refused(optimizer, model, tmp_path / "c", r"state_dict\(\) of AdamW has \['scale'\] beside")
    hook.remove()
    save_checkpoint(tmp_path / "c", model, optimizer, step=1)
    lbfgs = optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match="cannot hold the state of LBFGS"):
        load_checkpoint(tmp_path / "c", model, lbfgs)


def zero(_rank: int, _world_size: int, path: str) -> None:
    """Job: each rank of a ZeroRedundancyOptimizer has another part of the state."""
    model = mlp()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optim.AdamW, lr=0.1)
    save_checkpoint(path, model, optimizer, step=1)


def shards_factors(_rank: int, _world_size: int, path: str) -> None:
    """Job: on DTensors nothing says how state of another shape than its parameter is to be placed."""
    kind, options = optim.Adafactor, {"lr": 0.1}
    OPTIMIZERS["Adafactor"] = (kind, options)
    model, optimizer = build("fsdp2", "Adafactor", seed=7)
    before = everything(model, optimizer)
    try:
        load_checkpoint(path, model, optimizer)
    finally:
        assert_same(everything(model, optimizer), before)


def test_shards_that_nothing_describes_are_refused(tmp_path: Path) -> None:
    """On all ranks, with the name of the key or of the optimizer."""
    for error in run_errors("gloo", 2, zero, str(tmp_path / "z")):
        assert "cannot hold the state of ZeroRedundancyOptimizer" in error.message
    OPTIMIZERS["Adafactor"] = (optim.Adafactor, {"lr": 0.1})
    model, optimizer = build("plain", "Adafactor")
    train(model, optimizer, range(2))
    save_checkpoint(tmp_path / "c", model, optimizer, step=2)
    again, loaded = build("plain", "Adafactor", seed=7)
    load_checkpoint(tmp_path / "c", again, loaded)
    assert_same(everything(again, loaded), everything(model, optimizer))
    for error in run_errors("gloo", 2, shards_factors, str(tmp_path / "c")):
        assert "optim.state.0.weight.row_var is (8, 1) in the checkpoint" in error.message


# --- another optimizer -------------------------------------------------------------------------------------


def test_state_of_another_optimizer_is_an_error(tmp_path: Path) -> None:
    """With ``strict=False`` the model is loaded, and the optimizer stays as it is."""
    model, optimizer = build("plain", "AdamW")
    train(model, optimizer, range(2))
    save_checkpoint(tmp_path / "c", model, optimizer, step=2)
    asgd, its_optimizer = build("plain", "ASGD")
    train(asgd, its_optimizer, range(2))
    save_checkpoint(tmp_path / "asgd", asgd, its_optimizer, step=2)

    for which in ("SGD, momentum", "ASGD"):
        other, its = build("plain", which, seed=7)
        train(other, its, range(1))
        before = everything(other, its)
        with pytest.raises(ValueError, match=f"has the state of AdamW, and the optimizer is {which.split(',')[0]}"):
            load_checkpoint(tmp_path / "c", other, its)
        assert_same(everything(other, its), before)
        load_checkpoint(tmp_path / "c", other, its, strict=False)
        wanted = everything(model, optimizer)
        names = {name for name, _ in model.named_parameters()}
        assert_same(everything(other, its), {key: (wanted if key in names else before)[key] for key in before})
    with pytest.raises(ValueError, match="has the state of ASGD, and the optimizer is AdamW"):
        load_checkpoint(tmp_path / "asgd", model, optimizer)
    for kind in (ShardedASGD, ShardedAverage):
        with pytest.raises(ValueError, match="has the state of AdamW, and the optimizer is ASGD"):
            load_checkpoint(tmp_path / "c", asgd, kind(asgd.parameters()))

    class Mine(optim.AdamW):
        """A class that has the state of AdamW."""

    again, _ = build("plain", "AdamW", seed=7)
    params = list(again.parameters())
    mine = Mine([{"params": params[:2]}, {"params": params[2:]}])
    load_checkpoint(tmp_path / "c", again, mine)
    assert_same(everything(again, mine), everything(model, optimizer))


def test_parameters_that_were_added_are_named(tmp_path: Path) -> None:
    """The state of AdamW by parameter is compared as that of ASGD is."""
    model, optimizer = build("plain", "AdamW")
    train(model, optimizer, range(2))
    save_checkpoint(tmp_path / "c", model, optimizer, step=2)
    params = list(model.parameters())
    fewer = optim.AdamW([{"params": params[1:2]}, {"params": params[2:]}])
    with pytest.raises(ValueError, match=r"in the checkpoint only: optim.state.0.weight"):
        load_checkpoint(tmp_path / "c", model, fewer)
    load_checkpoint(tmp_path / "c", model, fewer, strict=False)
    assert len(fewer.state) == len(list(model.parameters())) - 2


def test_a_damaged_asgd_is_still_an_error(tmp_path: Path) -> None:
    """State with ``ax`` alone, which another program wrote, is not taken for that of another optimizer."""
    import torch.distributed.checkpoint as dcp

    model = mlp(width=8, depth=1)
    state = {"model": model.state_dict(), "optim": {"state.0.weight.ax": torch.zeros(8, 12)}}
    dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    with pytest.raises(CheckpointError, match="this is no state of ASGD"):
        load_checkpoint(tmp_path / "c", model, ShardedASGD(model.parameters()), verify=False)
