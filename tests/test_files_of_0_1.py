"""Files that version 0.1 wrote load for ever, to the bit: what users saved with ``torch.save``, and checkpoints.

``torch.save`` writes functions and classes of this package by module and name, so ``dist_asgd.parts`` and
``dist_asgd.portions`` stay importable, wherever the code lives now. ``fixtures/write.py`` wrote the files.
"""

from __future__ import annotations

import importlib
import json
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
from typer.testing import CliRunner

from dist_asgd import CheckpointManager, load_checkpoint, read_extra
from dist_asgd.cli import app
from tests.fixtures.write import NUM_RANKS, NUM_STEPS, OPTIONS, TWO_RANK_CHECKPOINTS, Net, build, train, whole_state
from tests.harness.bits import assert_same_bits, same_tree
from tests.harness.ranks import run

FILES = Path(__file__).parent / "fixtures" / "v0_1"
CHECKPOINTS = FILES / "checkpoints"
FORMAT_1 = FILES.with_name("format_1")
MANAGED = Path("managed", f"step-{NUM_STEPS:08}")
CHECKPOINT_NAMES = (*TWO_RANK_CHECKPOINTS, str(MANAGED))
# What pickles of 0.1 name of this package, by the file in which it is.
PICKLED = {
    "stage2": {"dist_asgd.parts rebuild_shard"},
    "masters": {"dist_asgd.parts rebuild_shard"},
    "named": {"dist_asgd.parts rebuild_shard"},
    "hsdp": {"dist_asgd.portions rebuild_portion", "dist_asgd.parts rebuild_shard"},
    "beside": {"dist_asgd.portions rebuild_portion", "dist_asgd.parts rebuild_shard"},
    "local": {"dist_asgd.portions _Taker", "dist_asgd.parts rebuild_shard"},
}


def expected(name: str) -> dict[str, Any]:
    """The whole state that a file of this name has a part of."""
    both: dict[str, dict[str, Any]] = torch.load(FILES / "expected.pt", weights_only=True)
    return both["masters" if name == "masters" else "float32"]


def assert_whole_state(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Model and consolidated state, to the bit."""
    assert found["model"].keys() == wanted["model"].keys()
    for key, value in wanted["model"].items():
        assert_same_bits(found["model"][key], value, key)
    assert_optim(found["optim"], wanted["optim"])


def assert_optim(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """A consolidated state, to the bit; options of groups that 0.1 did not have may be there too."""
    assert found["state"].keys() == wanted["state"].keys()
    for index, entry in wanted["state"].items():
        assert found["state"][index].keys() == entry.keys()
        for key, value in entry.items():
            assert_same_bits(found["state"][index][key], value, f"{key} of parameter {index}")
    for mine, theirs in zip(found["param_groups"], wanted["param_groups"], strict=True):
        for key, value in theirs.items():
            assert same_tree(mine[key], value), key


# --- torch.save ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PICKLED)
@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_the_fixtures_name_the_old_modules(name: str, rank: int) -> None:
    """Otherwise they would prove nothing."""
    with zipfile.ZipFile(FILES / f"{name}-rank{rank}.pt") as archive:
        pickled = next(archive.read(entry) for entry in archive.namelist() if entry.endswith("data.pkl"))
    found = {str(argument) for opcode, argument, _ in pickletools.genops(pickled) if opcode.name == "GLOBAL"}
    assert {entry for entry in found if entry.startswith("dist_asgd")} == PICKLED[name]


def test_the_old_names_are_importable_and_allowed() -> None:
    """``torch.load`` looks up allowed functions by their module and name: the old pair has to be listed."""
    for module, name in (("dist_asgd.parts", "rebuild_shard"), ("dist_asgd.portions", "rebuild_portion")):
        function = getattr(importlib.import_module(module), name)
        listed = {
            entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__name__}": entry
            for entry in torch.serialization.get_safe_globals()
        }
        assert f"{module}.{name}" in listed
        entry = listed[f"{module}.{name}"]
        assert (entry[0] if isinstance(entry, tuple) else entry) is function
    assert hasattr(importlib.import_module("dist_asgd.portions"), "_Taker")


@pytest.mark.parametrize("name", ["stage2", "masters", "named"])
def test_shards_load_where_only_the_package_was_imported(name: str) -> None:
    """In a fresh process, without a process group: the allow-list is filled by ``import dist_asgd``."""
    script = "import sys, torch, dist_asgd; torch.load(sys.argv[1], weights_only=True)"
    command = [sys.executable, "-c", script, str(FILES / f"{name}-rank1.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FILES.parents[2])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["stage2", "masters", "named"])
def test_shards_of_all_ranks_are_the_whole(name: str) -> None:
    """Elements in memory order, rank after rank."""
    wanted = expected(name)["optim"]["state"]
    saved = [torch.load(FILES / f"{name}-rank{rank}.pt", weights_only=True)["state"] for rank in range(NUM_RANKS)]
    if name == "named":
        saved = [dict(enumerate(state.values())) for state in saved]
    for index, entry in wanted.items():
        for key, whole in entry.items():
            parts = [state[index][key] for state in saved]
            if key in ("ax", "master"):
                assert all(part.shape == whole.shape for part in parts)
                assert_same_bits(torch.cat([part.to_local() for part in parts]), whole.reshape(-1), f"{key} of {index}")
            else:
                for part in parts:
                    assert_same_bits(part, whole, f"{key} of {index}")


def load_own_file(rank: int, _world_size: int, name: str) -> dict[str, Any]:
    """Job: this rank's file, into an optimizer that never stepped and has other values; the whole state."""
    kind = "stage2" if name == "named" else name
    model, optimizer = build(kind, seed=1)
    saved = torch.load(FILES / f"{name}-rank{rank}.pt", weights_only=True)
    if name == "named":
        set_optimizer_state_dict(model, optimizer, saved)
    else:
        optimizer.load_state_dict(saved)
    found: dict[str, Any] = whole_state(model, optimizer)["optim"]
    return found


@pytest.mark.parametrize("name", ["stage2", "masters", "named", "hsdp", "beside"])
def test_parts_load_into_the_optimizer_that_saved_them(name: str) -> None:
    """Every rank its own file, as users load them."""
    for found in run("gloo", NUM_RANKS, load_own_file, name):
        assert_optim(found, expected(name)["optim"])


def load_locals(rank: int, _world_size: int) -> list[Tensor]:
    """Job: the averages of this rank's file, as plain tensors."""
    saved = torch.load(FILES / f"local-rank{rank}.pt", weights_only=False)
    return [local.detach().as_subclass(torch.Tensor) for local in saved]


def test_local_tensors_of_shared_averages_load() -> None:
    """``to_local()`` of such a DTensor is of a class of ours, which 0.1 wrote by name; no allow-list ever had it."""
    saved = run("gloo", NUM_RANKS, load_locals)
    for index, entry in expected("hsdp")["optim"]["state"].items():
        parts = [of_rank[index] for of_rank in saved]
        assert_same_bits(torch.cat(parts), entry["ax"].reshape(-1), f"ax of parameter {index}")


def load_whole_file(_rank: int, world_size: int, name: str) -> dict[str, Any]:
    """Job: a file with the whole state, into an optimizer of this topology."""
    model, optimizer = build("single" if world_size == 1 else "stage2", seed=1)
    optimizer.load_state_dict(torch.load(FILES / f"{name}.pt", weights_only=True))
    found: dict[str, Any] = whole_state(model, optimizer)["optim"]
    return found


@pytest.mark.parametrize("name", ["single", "consolidated"])
@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
def test_whole_state_loads_at_any_world_size(name: str, backend: str, world_size: int) -> None:
    """What one process saved, and what two collected."""
    for found in run(backend, world_size, load_whole_file, name):
        assert_optim(found, expected(name)["optim"])


def test_consolidated_state_loads_into_torchs_optimizer() -> None:
    """It is in torch's own layout."""
    model = Net(1)
    optimizer = torch.optim.ASGD(model.named_parameters(), **OPTIONS)
    optimizer.load_state_dict(torch.load(FILES / "consolidated.pt", weights_only=True))
    for index, entry in expected("consolidated")["optim"]["state"].items():
        assert same_tree(optimizer.state_dict()["state"][index], entry)


# --- checkpoints ---------------------------------------------------------------------------------------------


def load_and_go_on(_rank: int, _world_size: int, name: str, kind: str) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Job: a checkpoint into a fresh model; the whole state, the same after more steps, and ``extra``."""
    model, optimizer = build(kind, seed=1)
    extra = load_checkpoint(CHECKPOINTS / name, model, optimizer)
    loaded = whole_state(model, optimizer)
    train(model, optimizer)
    return loaded, whole_state(model, optimizer), extra


def loads(name: str, world_size: int, kind: str) -> list[tuple[dict[str, Any], dict[str, Any], Any]]:
    """What every rank finds."""
    return run("none" if world_size == 1 else "gloo", world_size, load_and_go_on, name, kind)


@pytest.mark.parametrize("name", [name for name in CHECKPOINT_NAMES if name != "masters"])
@pytest.mark.parametrize(("world_size", "kind"), [(1, "single"), (2, "stage1"), (2, "stage2"), (2, "fsdp2")])
def test_checkpoints_load_under_any_topology(name: str, world_size: int, kind: str) -> None:
    """On one and on two ranks; training goes on as from any other of them."""
    wanted_extra = {"epoch": 7}
    for rank, (loaded, later, extra) in enumerate(loads(name, world_size, kind)):
        assert_whole_state(loaded, expected(name))
        assert later["optim"]["state"][1]["step"] == 2 * NUM_STEPS
        saved_by_two = name in TWO_RANK_CHECKPOINTS
        saved_by = rank if saved_by_two and world_size == NUM_RANKS else 0
        assert extra == (wanted_extra | {"rank": saved_by} if saved_by_two else wanted_extra)


def test_masters_in_checkpoints_load() -> None:
    """Into an optimizer with masters, on the ranks that saved them."""
    for loaded, _, extra in loads("masters", NUM_RANKS, "masters"):
        assert_whole_state(loaded, expected("masters"))
        assert extra["epoch"] == 7


@pytest.mark.parametrize(("name", "kind"), [("stage2", "fsdp2"), ("masters", "masters")])
def test_the_last_checkpoints_of_format_1_load(name: str, kind: str) -> None:
    """Those of 0.1 have the manifest of format 1 too; these also have the order of ``.metadata`` of its last days."""
    path = str(FORMAT_1 / name)
    for rank, (loaded, _, extra) in enumerate(loads(path, NUM_RANKS, kind)):
        assert_whole_state(loaded, expected(name))
        assert extra == {"epoch": 7, "rank": rank}
    assert invoke("verify", path) == 0
    assert invoke("diff", path, str(CHECKPOINTS / name)) == 0
    assert json.loads((FORMAT_1 / name / "manifest.json").read_text())["format"] == 1


def test_a_folder_of_checkpoints_is_managed_on() -> None:
    """The manager finds the latest through its link."""
    model, optimizer = build("single", seed=1)
    manager = CheckpointManager(CHECKPOINTS / "managed")
    restored = manager.restore(model, optimizer)
    assert restored is not None
    assert (restored.step, restored.extra) == (NUM_STEPS, {"epoch": 7})
    assert_whole_state(whole_state(model, optimizer), expected("managed"))


@pytest.mark.parametrize("name", CHECKPOINT_NAMES)
def test_the_commands_read_checkpoints(name: str, tmp_path: Path) -> None:
    """inspect, verify, and consolidate, whose file has the state to the bit."""
    path = str(CHECKPOINTS / name)
    assert invoke("verify", path) == 0
    inspected = json.loads(output("inspect", path, "--json"))
    assert inspected["step"] == NUM_STEPS
    assert len(inspected["parameters"]) == len(list(Net(0).parameters()))
    assert invoke("consolidate", path, str(tmp_path / "whole.pt")) == 0
    found = torch.load(tmp_path / "whole.pt", weights_only=True)
    wanted = expected(name)
    assert found["model"].keys() == wanted["model"].keys()
    for key, value in wanted["model"].items():
        assert_same_bits(found["model"][key], value, key)
    for index, entry in wanted["optim"]["state"].items():
        for key, value in entry.items():
            assert_same_bits(found["optim"]["state"][index][key], value, f"{key} of parameter {index}")


def test_diff_compares_checkpoints() -> None:
    """The same state from several topologies is the same checkpoint; with masters it is another one."""
    assert invoke("diff", str(CHECKPOINTS / "stage1"), str(CHECKPOINTS / "stage2")) == 0
    assert invoke("diff", str(CHECKPOINTS / "stage1"), str(CHECKPOINTS / "masters")) == 1


def test_extra_is_read_by_itself() -> None:
    """As before the model is built."""
    assert read_extra(CHECKPOINTS / "stage2", rank=1) == {"epoch": 7, "rank": 1}


def invoke(*arguments: str) -> int:
    """The exit status of a command."""
    return CliRunner().invoke(app, list(arguments)).exit_code


def output(*arguments: str) -> str:
    """What a command printed."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout
