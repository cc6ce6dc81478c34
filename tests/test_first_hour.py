"""What goes wrong in the first hour is an error or a line in the log that says how to mend it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_asgd import ShardedASGD, save_checkpoint
from dist_asgd.update import cpu
from tests.harness.ranks import run


@pytest.mark.parametrize("differentiable", [False, True])
def test_several_processes_without_a_group(differentiable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun has started two, and nobody called init_process_group()."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2, and there is no process group.*init_process_group\(\)"):
        ShardedASGD(nn.Linear(2, 2).parameters(), lr=0.1, differentiable=differentiable, foreach=False)


def test_a_save_of_several_processes_without_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would write to one path, each the whole."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.ASGD(model.parameters())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, and there is no process group"):
        save_checkpoint(tmp_path / "a", model, optimizer, step=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["1", "", "many"])
def test_one_process_needs_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a variable that no launcher has set."""
    monkeypatch.setenv("WORLD_SIZE", value)
    ShardedASGD(nn.Linear(2, 2).parameters(), lr=0.1).step()


def groups_of_one(rank: int, _world_size: int) -> None:
    """Job: each rank trains alone in a group of its own, on purpose."""
    groups = [dist.new_group([other]) for other in range(2)]
    os.environ["WORLD_SIZE"] = "2"
    try:
        optimizer: Any = ShardedASGD(nn.Linear(2, 2).parameters(), lr=0.1, process_group=groups[rank])
        optimizer.step()
    finally:
        del os.environ["WORLD_SIZE"]


def test_a_group_of_one_is_no_mistake() -> None:
    """It was asked for."""
    run("gloo", 2, groups_of_one)


def test_a_missing_kernel_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler then, a compiler now, or a source tree that hides the installed package."""
    source, installed = (tmp_path / name / "dist_asgd" / "update" for name in ("source", "installed"))
    source.mkdir(parents=True)
    installed.mkdir(parents=True)
    monkeypatch.setattr(cpu, "__file__", str(source / "cpu.py"))
    monkeypatch.setattr("sys.path", [str(tmp_path / "installed")])
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    load = cpu._load.__wrapped__
    assert "there was no C compiler" in str(load())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "There is a C compiler now: install dist_asgd again" in str(load())
    (installed / "_kernel.so").touch()
    assert f"hides the installed package in {tmp_path / 'installed'}" in str(load())
