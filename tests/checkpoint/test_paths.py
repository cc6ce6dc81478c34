"""Paths as users give them, on file systems: what each kind means. Those of stores have tests of their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from typer.testing import CliRunner

from dist_asgd import (
    CheckpointManager,
    async_save_checkpoint,
    export_averaged,
    load_checkpoint,
    read_extra,
    save_checkpoint,
)
from dist_asgd.checkpoint.reader import CheckedReader
from dist_asgd.cli import app
from tests.harness.ranks import run
from tests.harness.topologies import Run, assert_same_state, build, whole_state


class Somewhere:
    """An os.PathLike that is no Path."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return self.path


def take(path: Any, live: Run, call: str) -> Any:
    """Pass ``path`` to one of the functions that take one."""
    calls: dict[str, Callable[[], Any]] = {
        "save": lambda: save_checkpoint(path, live.model, live.optimizer, step=1),
        "async": lambda: async_save_checkpoint(path, live.model, live.optimizer, step=1).wait(),
        "load": lambda: load_checkpoint(path, live.model, live.optimizer),
        "extra": lambda: read_extra(path),
        "reader": lambda: CheckedReader(path),
        "manager": lambda: CheckpointManager(path),
        "export": lambda: export_averaged(path, live.model, live.optimizer),
    }
    return calls[call]()


@pytest.mark.parametrize("path", ["file://host/new", "FILE://host/new"])
def test_files_of_other_machines_are_refused_everywhere(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No function and no command takes one, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    live = build("single").train(1)
    save_checkpoint("good", live.model, live.optimizer, step=1)
    for call in ("save", "async", "load", "extra", "reader", "manager", "export"):
        with pytest.raises(ValueError, match="names the host"):
            take(path, live, call)
    commands = [["inspect", path], ["verify", path], ["export", path, "a.safetensors"], ["consolidate", path, "a.pt"]]
    commands += [["export", "good", f"{path}.safetensors"], ["consolidate", "good", f"{path}.pt"]]
    commands += [["diff", path, "good"], ["diff", "good", path]]
    for command in commands:
        result = CliRunner().invoke(app, command)
        assert result.exit_code == (2 if command[0] == "diff" else 1), command
        assert "names the host" in result.stderr
    assert os.listdir(tmp_path) == ["good"]


def goes_round(_rank: int, _world_size: int, home: str, form: str) -> None:
    """Job: save, load, export and manage by one form of a path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", home)
        patch.chdir(home)
        use_everywhere(home, form)


def use_everywhere(home: str, form: str) -> None:
    """Pass paths in ``home``, the working directory, to every function. Collective."""
    live = build("stage1").train(3)

    def path(name: str) -> Any:
        forms = {
            "tilde": f"~/{name}",
            "file": f"file://{home}/{name}".replace(" ", "%20"),
            "localhost": f"file://localhost{home}/{name}".replace(" ", "%20"),
            "PathLike": Somewhere(f"{home}/{name}"),
            "tilde in a Path": Path("~") / name,
            "relative": f"./{name}",
        }
        return forms[form]

    save_checkpoint(path("a"), live.model, live.optimizer, step=3, extra="mine")
    pending = async_save_checkpoint(path("b"), live.model, live.optimizer, step=3)
    pending.wait()
    assert pending.path == Path(home, "b")
    export_averaged(path("c.safetensors"), live.model, live.optimizer)
    with CheckpointManager(path("d")) as manager:
        manager.save(live.model, live.optimizer, step=3)
        assert manager.latest() == Path(home, "d", "step-00000003")
    for name in ("a", "b", "d/latest"):
        other = build("stage2", seed=7)
        load_checkpoint(path(name), other.model, other.optimizer)
        assert_same_state(other, whole_state(live))
    assert read_extra(path("a")) == "mine"
    assert CheckedReader(path("a")).read_metadata().state_dict_metadata


FORMS = ["tilde", "file", "localhost", "PathLike", "tilde in a Path", "relative"]


@pytest.mark.parametrize("form", FORMS)
def test_local_paths_mean_what_people_mean(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``~`` is the home, ``file://`` the file, on two ranks, and everything lands in that one place."""
    home = tmp_path / "the home"
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    run("gloo", 2, goes_round, str(home), form)
    assert sorted(os.listdir(home)) == ["a", "b", "c.safetensors", "d"]
    assert os.listdir(tmp_path) == ["the home"]


@pytest.mark.parametrize("form", ["~", "file://{0}", "file://localhost{0}"])
def test_the_commands_take_them_too(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command follows ``~``, which a shell leaves in quotes, and ``file://``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    live = build("single").train(3)
    save_checkpoint(tmp_path / "a", live.model, live.optimizer, step=3)
    base = form.format(tmp_path)
    for command in (["inspect"], ["verify"], ["export", "x.safetensors"], ["consolidate", "x.pt"], ["diff", "a"]):
        result = CliRunner().invoke(app, [command[0], f"{base}/a", *(f"{base}/{name}" for name in command[1:])])
        assert result.exit_code == 0, result.output
    assert sorted(os.listdir(tmp_path)) == ["a", "x.pt", "x.safetensors"]


@pytest.mark.parametrize("path", [3.5, None, ["a"], "a\0b", "~nobody-of-this-name/a"])
def test_what_is_no_path_is_said_to_be_none(path: Any) -> None:
    """A wrong type, a null character and an unknown home are errors of this package, and not of Python's."""
    live = build("single").train(1)
    for call in ("save", "async", "load", "extra", "manager", "export"):
        with pytest.raises((ValueError, TypeError), match="dist_asgd"):
            take(path, live, call)


def test_dcp_load_takes_them_through_the_reader(tmp_path: Path) -> None:
    """``CheckedReader`` follows the same paths, and forgets the open checkpoint only for another one."""
    live = build("single").train(1)
    save_checkpoint(tmp_path / "a", live.model, live.optimizer, step=1)
    reader = CheckedReader(f"file://{tmp_path}/a")
    state = {"model": {"seen": live.model.seen.clone().zero_()}}
    dcp.load(state, storage_reader=reader, checkpoint_id=f"file://{tmp_path}/a", no_dist=True)
    assert state["model"]["seen"].equal(live.model.seen)
