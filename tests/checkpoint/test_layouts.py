"""DCP directories that other programs have laid out: loaded with a prefix, and errors that say which one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import fully_shard
from typer.testing import CliRunner

from dist_asgd import ShardedASGD, load_checkpoint, save_checkpoint
from dist_asgd.cli import app
from tests.harness.bits import same_tree
from tests.harness.ranks import run, run_errors

FLAT, NESTED = StateDictOptions(flatten_optimizer_state_dict=True), StateDictOptions()


class Extra(nn.Linear):
    """A layer with a dict beside its weights."""

    kept: Any = None

    def get_extra_state(self) -> Any:
        """Return the dict."""
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        """Keep it."""
        self.kept = state


def made(fill: float | None = None, sharded: bool = False) -> nn.Sequential:
    """Return a model, the same each time unless ``fill`` gives its values."""
    torch.manual_seed(0)
    model = nn.Sequential(Extra(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    if fill is not None:
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(fill)
    if sharded:
        fully_shard(model)
    return model


def trained(sharded: bool = False) -> tuple[nn.Sequential, torch.optim.ASGD]:
    """Return a model that torch's own optimizer has trained."""
    model = made(sharded=sharded)
    model[0].kept = {"scale": 2.0, "amax": [torch.ones(2)]}
    optimizer = torch.optim.ASGD(model.parameters(), lr=0.1, t0=0)
    for seed in range(3):
        torch.manual_seed(seed)
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


# How a program saves, and the prefix that reads it.
LAYOUTS: dict[str, tuple[Callable[[Any, Any], dict[str, Any]], StateDictOptions, Any]] = {
    "app": (lambda model, optim: {"app": {"model": model, "optim": optim}}, FLAT, "app"),
    "app nested": (lambda model, optim: {"app": {"model": model, "optim": optim}}, NESTED, "app"),
    "deeper": (lambda model, optim: {"a": {"b.c": {"model": model, "optim": optim}}, "epoch": 3}, FLAT, "a.b.c"),
    "flat": (
        lambda model, optim: {**model, "optimizer": optim, "epoch": 3},
        FLAT,
        {"model": "", "optim": "optimizer"},
    ),
    "tutorial": (lambda model, optim: {"model": model, "optimizer": optim}, NESTED, {"optim": "optimizer"}),
    "Lightning": (
        lambda model, optim: {"state_dict": model, "optimizer_0": optim, "global_step": 3, "loops": {"fit": {}}},
        NESTED,
        {"model": "state_dict", "optim": "optimizer_0"},
    ),
}


def written(name: str, folder: Path, sharded: bool = False) -> tuple[nn.Sequential, torch.optim.ASGD]:
    """Save in this layout. Collective if ``sharded``."""
    lay_out, options, _ = LAYOUTS[name]
    model, optimizer = trained(sharded)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save(lay_out(weights, state), checkpoint_id=folder, no_dist=not sharded)
    return model, optimizer


def whole(values: list[Any]) -> list[Tensor]:
    """Return whole copies of tensors and DTensors."""
    return [(v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for v in values]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_prefix_loads_it_and_the_error_says_so(name: str, tmp_path: Path) -> None:
    """In one process: parameters, averages, extra states and hyperparameters."""
    model, optimizer = written(name, tmp_path / "c")
    prefix = LAYOUTS[name][2]
    other = made(7.0)
    loaded = ShardedASGD(other.named_parameters(), lr=0.5)
    for strict in (True, False) if name not in ("tutorial",) else (True,):
        with pytest.raises(ValueError, match="prefix=") as error:
            load_checkpoint(tmp_path / "c", other, loaded, strict=strict, verify=False)
        assert "The checkpoint has " in str(error.value)
        full = prefix if isinstance(prefix, str) else {"model": "model", "optim": "optim"} | prefix
        assert f"with prefix={full!r} (--prefix " in str(error.value)
    assert all(bool((param == 7).all()) for param in other.parameters())

    load_checkpoint(tmp_path / "c", other, loaded, verify=False, prefix=prefix)
    assert same_tree(whole(list(other.parameters())), whole(list(model.parameters())))
    states = [entry["ax"] for entry in loaded.consolidated_state_dict()["state"].values()]
    assert same_tree(whole(states), whole([optimizer.state[p]["ax"] for p in model.parameters()]))
    assert same_tree(other[0].kept, model[0].kept)
    assert same_tree(list(other.buffers()), list(model.buffers()))
    assert loaded.param_groups[0]["lr"] == 0.1


def loads_sharded(_rank: int, _world_size: int, name: str, stage: int, folder: str) -> list[list[Tensor]]:
    """Job: what FSDP2 and torch.optim.ASGD wrote, loaded in stage 1 or 2, and by FSDP2."""
    model, _ = written(name, Path(folder), sharded=True)
    found = [whole(list(model.parameters()))]
    for sharded in (False, True):
        other = made(7.0, sharded)
        loaded = ShardedASGD(other.named_parameters(), stage=1 if sharded else stage)
        load_checkpoint(folder, other, loaded, verify=False, prefix=LAYOUTS[name][2])
        found.append(whole(list(other.parameters())))
    return found


@pytest.mark.parametrize(("name", "stage"), [("app", 1), ("flat", 2), ("Lightning", 2)])
def test_a_prefix_loads_what_fsdp2_wrote(name: str, stage: int, tmp_path: Path) -> None:
    """On two ranks."""
    for wanted, *found in run("gloo", 2, loads_sharded, name, stage, str(tmp_path / "c")):
        assert all(same_tree(values, wanted) for values in found)


def test_the_two_folders_of_accelerate_load_one_after_the_other(tmp_path: Path) -> None:
    """The error about each says so."""
    model, optimizer = trained()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0", no_dist=True)
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path / "optimizer_0", no_dist=True)
    other = made(7.0)
    loaded = ShardedASGD(other.named_parameters())
    with pytest.raises(ValueError, match="load each folder with strict=False"):
        load_checkpoint(tmp_path / "pytorch_model_fsdp_0", other, loaded, verify=False)
    with pytest.raises(ValueError, match=r"with prefix=.'optim': 'optimizer'."):
        load_checkpoint(tmp_path / "optimizer_0", other, loaded, verify=False)
    options: dict[str, Any] = {"strict": False, "verify": False, "prefix": {"optim": "optimizer"}}
    for folder in ("pytorch_model_fsdp_0", "optimizer_0"):
        load_checkpoint(tmp_path / folder, other, loaded, **options)
    assert same_tree(whole(list(other.parameters())), whole(list(model.parameters())))
    states = [entry["ax"] for entry in loaded.consolidated_state_dict()["state"].values()]
    assert same_tree(whole(states), whole([optimizer.state[p]["ax"] for p in model.parameters()]))


def test_numbers_in_place_of_names_are_explained(tmp_path: Path) -> None:
    """As ``optimizer.state_dict()`` gives them."""
    model, optimizer = trained()
    dcp.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, checkpoint_id=tmp_path / "c", no_dist=True)
    other = made()
    with pytest.raises(ValueError, match="has numbers in place of names"):
        load_checkpoint(tmp_path / "c", other, ShardedASGD(other.named_parameters()), verify=False)


def matches_nothing(_rank: int, _world_size: int, path: str) -> None:
    """Job: nothing of the checkpoint is in this model, and ranks load with other prefixes."""
    model = nn.Sequential(nn.Linear(5, 3))
    save_checkpoint(path, model, ShardedASGD(model.named_parameters()), step=1)
    other = nn.ModuleDict({"another": nn.Linear(5, 3)})
    load_checkpoint(path, other, ShardedASGD(other.named_parameters()), strict=False)


def other_prefixes(rank: int, _world_size: int, path: str) -> None:
    """Job: each rank passes a prefix of its own."""
    model = nn.Linear(5, 3)
    optimizer = ShardedASGD(model.named_parameters())
    save_checkpoint(path, model, optimizer, step=1)
    load_checkpoint(path, model, optimizer, prefix={"model": "model"} if rank else "")


def test_no_match_at_all_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    """Also with ``strict=False``; and a prefix that nothing has, or that is none."""
    for error in run_errors("gloo", 2, matches_nothing, str(tmp_path / "c")):
        assert "nothing in" in error.message
        assert "The checkpoint has model.0 (2 tensors)" in error.message
    for error in run_errors("gloo", 2, other_prefixes, str(tmp_path / "d")):
        assert "prefix" in error.message
    model = nn.Sequential(nn.Linear(5, 3))
    optimizer = ShardedASGD(model.named_parameters())
    with pytest.raises(ValueError, match=r"no key of .* has the prefix 'app'. The checkpoint has"):
        load_checkpoint(tmp_path / "c", model, optimizer, prefix="app")
    for prefix in ({"modell": "a"}, 3, {"model": None}):
        with pytest.raises(ValueError, match="prefix must be"):
            load_checkpoint(tmp_path / "c", model, optimizer, prefix=prefix)  # type: ignore[arg-type]


def test_the_command_line_lists_exports_and_consolidates_other_layouts(tmp_path: Path) -> None:
    """Also the state of another optimizer that torch's helpers have written, by parameter."""
    from safetensors.torch import load_file

    def called(*args: str) -> str:
        result = CliRunner().invoke(app, list(args))
        assert result.exit_code == 0, result.output
        return result.output

    model, optimizer = written("flat", tmp_path / "c")
    options = ["--no-verify", "--prefix", "model=,optim=optimizer"]
    listed = called("inspect", str(tmp_path / "c"), "--no-verify")
    assert "optimizer." in listed
    assert "average of" in called("inspect", str(tmp_path / "c"), *options)
    called("export", str(tmp_path / "c"), str(tmp_path / "m.safetensors"), *options)
    exported = load_file(tmp_path / "m.safetensors")
    for name, param in model.named_parameters():
        assert torch.equal(exported[name], optimizer.state[param]["ax"])
    called("consolidate", str(tmp_path / "c"), str(tmp_path / "c.pt"), *options)
    consolidated = torch.load(tmp_path / "c.pt", weights_only=True)
    made().load_state_dict(consolidated["model"])

    adam = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 5)).sum().backward()
    adam.step()
    weights, state = get_state_dict(model, adam, options=FLAT)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=tmp_path / "adam", no_dist=True)
    assert "step 1, state exp_avg, exp_avg_sq\n" in called("inspect", str(tmp_path / "adam"), "--no-verify")
    dcp.save({"anything": torch.ones(2), "at": {"all": 3}}, checkpoint_id=tmp_path / "any", no_dist=True)
    assert "anything (1 tensor), at (1 value)" in called("inspect", str(tmp_path / "any"), "--no-verify")
