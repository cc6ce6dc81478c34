"""torchtitan's optimizer container, schedulers, clipping and checkpoints: the bits of ``torch.optim.ASGD`` in them.

torchtitan's own Trainer runs on accelerators only, so a loop stands in for it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchtitan")

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed.utils import clip_grad_norm_

from dist_asgd import export_averaged, load_checkpoint
from launch.examples.torchtitan import ASGDContainer, build
from tests.harness.bits import same_tree
from tests.harness.ranks import run

RANKS = pytest.mark.parametrize(("backend", "ranks"), [("none", 1), ("gloo", 2)], ids=["1", "2"])
ROOT = Path(__file__).parent.parent.parent
scenario = pytest.mark.scenario
CONTAINER = "with `ASGDContainer`"


class Plain(OptimizersContainer):
    """The same with torch's own optimizer."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        lr: float
        t0: float

    def __init__(self, config: Config, *, model_parts: list[torch.nn.Module]) -> None:
        self.model_parts = model_parts
        options = {"lr": config.lr, "t0": config.t0, "foreach": False}
        self.optimizers = [torch.optim.ASGD(part.named_parameters(), **options) for part in model_parts]
        torch.optim.Optimizer.__init__(self, [p for part in model_parts for p in part.parameters()], {})


class Loop:
    """A model with what torchtitan builds for it."""

    def __init__(self, ranks: int, kind: Any, folder: Path) -> None:
        torch.manual_seed(3)
        self.model: Any = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2))
        if ranks > 1:
            fully_shard(self.model[0])
            fully_shard(self.model)
        self.container, self.schedulers, self.checkpointer = build(self.model, kind.Config(lr=0.1, t0=3), folder)

    def train(self, start: int, stop: int) -> None:
        """Steps with batches that are the same on all ranks."""
        for step in range(start, stop):
            batch = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
            torch.nn.functional.mse_loss(self.model(batch[:, :5]), batch[:, 5:]).backward()
            clip_grad_norm_(self.model.parameters(), 0.1)
            self.container.step()
            self.schedulers.step()
            self.container.zero_grad()

    def state(self) -> Any:
        """Parameters and averages, whole, and the step size."""
        entries = self.container.optimizers[0].state_dict()["state"].values()
        return [
            [whole(tensor) for tensor in (p, *map(entry.get, ("ax", "eta", "mu", "step")))]
            for p, entry in zip(self.model.parameters(), entries, strict=True)
        ]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, or of the whole DTensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained(rank: int, ranks: int, folder: str) -> Any:
    """Job: six steps with either optimizer, saved after the third; and from there on again."""
    ends = []
    for kind in (Plain, ASGDContainer):
        loop = Loop(ranks, kind, Path(folder, kind.__name__))
        loop.train(0, 3)
        loop.checkpointer.save(3, last_step=True)
        loop.train(3, 6)
        ends += [loop.state(), resumed(rank, ranks, folder, kind.__name__, kind)]
    assert all(same_tree(end, ends[0]) for end in ends)
    return ends[0]


def resumed(_rank: int, ranks: int, folder: str, name: str, kind: Any) -> Any:
    """Job: the last three steps, from a checkpoint."""
    loop = Loop(ranks, kind, Path(folder, name))
    assert loop.checkpointer.load()
    loop.train(3, 6)
    return loop.state()


@scenario("clipping by norm", CONTAINER)
@scenario("{ranks}-rank checkpoint resumed", CONTAINER)
@RANKS
def test_the_container(tmp_path: Path, backend: str, ranks: int) -> None:
    """With schedulers, clipping, and checkpoints that resume: one rank without, two with FSDP2."""
    run(backend, ranks, trained, str(tmp_path))


@scenario("checkpoint of `torch.optim.ASGD` resumed, and the reverse", CONTAINER)
@scenario("{before}-rank checkpoint resumed", CONTAINER)
@pytest.mark.parametrize(("before", "backend", "ranks"), [(2, "none", 1), (1, "gloo", 2)])
def test_checkpoints_of_another_number_of_ranks(tmp_path: Path, before: int, backend: str, ranks: int) -> None:
    """As with torch's optimizer; and either loads the other's."""
    run("gloo" if before == 2 else "none", before, trained, str(tmp_path))
    expected = run(backend, ranks, resumed, str(tmp_path), "Plain", Plain)
    for name, kind in (("ASGDContainer", ASGDContainer), ("Plain", ASGDContainer), ("ASGDContainer", Plain)):
        assert same_tree(run(backend, ranks, resumed, str(tmp_path), name, kind), expected), (name, kind)


def fresh(_rank: int, ranks: int, folder: str) -> None:
    """Job: a checkpoint before the first step, for which torchtitan steps optimizers without state, with lr=0."""
    loop, other = Loop(ranks, ASGDContainer, Path(folder)), Loop(ranks, ASGDContainer, Path(folder))
    loop.checkpointer.save(1, last_step=True)
    other.checkpointer.load()
    for one in (loop, other):
        one.train(0, 3)
    untouched = Loop(ranks, ASGDContainer, Path(folder))
    untouched.train(0, 3)
    assert same_tree(loop.state(), untouched.state())
    assert same_tree(other.state(), untouched.state())


@scenario("checkpoint before the first step", CONTAINER)
@RANKS
def test_a_save_before_the_first_step(tmp_path: Path, backend: str, ranks: int) -> None:
    """It changes nothing; ``torch.optim.ASGD`` keeps the step size of 0."""
    run(backend, ranks, fresh, str(tmp_path))


def own_tools(_rank: int, ranks: int, folder: str) -> None:
    """Job: load_checkpoint() on torchtitan's checkpoint, the averages and their export."""
    loop, other = Loop(ranks, ASGDContainer, Path(folder)), Loop(ranks, ASGDContainer, Path(folder))
    loop.train(0, 6)
    loop.checkpointer.save(6, last_step=True)
    optimizer = other.container.optimizers[0]
    prefix = {"model": "", "optim": "optimizer"}
    load_checkpoint(f"{folder}/checkpoint/step-6", other.model, optimizer, verify=False, prefix=prefix)
    assert same_tree(other.state(), loop.state())
    with optimizer.averaged_parameters():
        assert same_tree([whole(p) for p in other.model.parameters()], [entry[1] for entry in loop.state()])
    export_averaged(f"{folder}/averaged.safetensors", other.model, optimizer)


@scenario("average in the model, and exported", CONTAINER)
@scenario("checkpoint read by `dist_asgd.load_checkpoint`", CONTAINER)
@RANKS
def test_checkpoints_load_with_this_package(tmp_path: Path, backend: str, ranks: int) -> None:
    """``prefix`` says where torchtitan keeps model and optimizer."""
    run(backend, ranks, own_tools, str(tmp_path))


@scenario("`launch/examples`, by torchrun", CONTAINER, ranks=2)
def test_the_example_runs(tmp_path: Path) -> None:
    """Under torchrun, with few steps."""
    code = "import pathlib, sys, launch.examples.torchtitan as example; example.STEPS = 6; "
    code += "example.main(pathlib.Path(sys.argv[1]))"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*torchrun, sys.executable, "-c", code, str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "by the average" in ran.stdout
    assert (tmp_path / "averaged.safetensors").exists()


def test_the_page_shows_the_example() -> None:
    """Lines of code that need torchtitan are those of the example, which runs."""
    blocks = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "trainers" / "torchtitan.md").read_text(), re.DOTALL)
    lines = {line.strip() for line in (ROOT / "launch" / "examples" / "torchtitan.py").read_text().splitlines()}
    assert blocks
    assert [line for block in blocks for line in block.splitlines() if line.strip() not in lines] == []
