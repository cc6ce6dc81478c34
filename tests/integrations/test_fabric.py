"""Lightning's Fabric with nothing but the class name: the bits of ``torch.optim.ASGD`` in the same loop."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning.fabric")

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.harness.bits import same_tree
from tests.harness.ranks import run
from tests.integrations.lightning_runs import launched, loader, plain, sharded, stage2

RANKS = pytest.mark.parametrize(("backend", "ranks"), [("none", 1), ("gloo", 2)], ids=["1", "2"])
scenario = pytest.mark.scenario


def fully(model: torch.nn.Module, mesh: Any) -> torch.nn.Module:
    """What ModelParallelStrategy calls to place the model."""
    return fully_shard(model, mesh=mesh["data_parallel"])


class Loop:
    """A loop of Fabric: ``epoch`` trains, ``save`` and ``load`` do what Fabric's pages show."""

    def __init__(self, ranks: int, make: Any, precision: str = "32-true", fsdp2: bool = False) -> None:
        strategy = ModelParallelStrategy(fully, ranks, 1) if fsdp2 else "ddp" if ranks > 1 else "auto"
        plugins = [TorchElasticEnvironment()] if ranks > 1 else []
        self.fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy, plugins=plugins, precision=precision)
        self.fabric.launch()
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2))
        self.stage_2 = make is stage2
        if fsdp2:
            self.model: Any = self.fabric.setup_module(model)
            self.optimizer: Any = self.fabric.setup_optimizers(make(self.model.named_parameters()))
        elif self.stage_2:
            self.model, self.optimizer = model, self.fabric.setup_optimizers(make(model.named_parameters()))
        else:
            self.model, self.optimizer = self.fabric.setup(model, make(model.named_parameters()))
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.7)
        self.data = self.fabric.setup_dataloaders(loader())

    @property
    def objects(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "epoch": 1}

    def epoch(self, **clip: Any) -> None:
        """One pass over the data; gradients of two batches are accumulated."""
        for index, (x, y) in enumerate(self.data):
            last = index % 2 == 1
            accumulating = self.optimizer.no_sync() if self.stage_2 and not last else self.fabric.autocast()
            if not self.stage_2:
                accumulating = self.fabric.no_backward_sync(self.model, enabled=not last)
            with accumulating:
                self.fabric.backward(torch.nn.functional.mse_loss(self.model(x), y))
            if last:
                if clip:
                    self.fabric.clip_gradients(self.model, self.optimizer, **clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.scheduler.step()

    def state(self) -> Any:
        """Whole weights, averages and, in DDP and stage 2, all that the optimizer saves."""
        params = list(self.model.parameters())
        found = [[whole(p), whole(self.optimizer.optimizer.state[p]["ax"])] for p in params if isinstance(p, DTensor)]
        if found:
            return found
        consolidated = getattr(self.optimizer, "consolidated_state_dict", None)
        state_dict = consolidated(to=None) if consolidated else self.optimizer.state_dict()
        return [p.detach() for p in params], state_dict["state"]


def whole(tensor: Any) -> torch.Tensor:
    """The whole DTensor."""
    return tensor.full_tensor().detach()


def moved(rank: int, ranks: int, path: str, make: Any) -> Any:
    """Job: the second epoch, from a file that another number of ranks has written."""
    with launched(rank, ranks):
        loop = Loop(ranks, make)
        loop.fabric.load(path, loop.objects)
        loop.epoch()
        return loop.state()


def loops(rank: int, ranks: int, make: Any, options: dict[str, Any], clip: dict[str, Any], folder: str) -> None:
    """Job: two epochs against torch's optimizer; and the second one resumed from a file."""
    with launched(rank, ranks):
        ends = []
        for optimizer in (plain, make):
            path = Path(folder, optimizer.__name__)
            loop = Loop(ranks, optimizer, **options)
            loop.epoch(**clip)
            loop.fabric.save(path, loop.objects)
            loop.epoch(**clip)
            again = Loop(ranks, optimizer, **options)
            again.fabric.load(path, again.objects)
            again.epoch(**clip)
            ends += [loop.state(), again.state()]
            with getattr(loop.optimizer, "averaged_parameters", nullcontext)():
                averages = [p.detach().clone() for p in loop.model.parameters()]
        if make is not plain and not options.get("fsdp2"):
            assert same_tree(averages, [entry["ax"] for entry in ends[0][1].values()])
        assert same_tree(ends[1], ends[0])
        assert same_tree(ends[2], ends[0])
        assert same_tree(ends[3], ends[0])


# By what the tables call them: options of Fabric, and of clip_gradients().
CASES: dict[str, Any] = {
    "training as documented": ({}, {}),
    "clipping by norm": ({}, {"max_norm": 0.1}),
    "clipping by value": ({}, {"clip_val": 0.05}),
    "bf16": ({"precision": "bf16-mixed"}, {"max_norm": 0.1}),
}
ALONE = "with `setup_optimizers` alone"


@scenario("{name}")
@scenario("accumulation")
@scenario("{ranks}-rank checkpoint resumed")
@RANKS
@pytest.mark.parametrize("name", CASES)
def test_setup_backward_clip_save_and_load(tmp_path: Path, name: str, backend: str, ranks: int) -> None:
    """Gradients of two batches are accumulated in each case."""
    run(backend, ranks, loops, sharded, *CASES[name], str(tmp_path))


@scenario("FSDP2: {name}", ranks=2)
@scenario("FSDP2: 2-rank checkpoint resumed", ranks=2)
@pytest.mark.parametrize("name", ["clipping by norm", "clipping by value"])
def test_fsdp2(tmp_path: Path, name: str) -> None:
    """ModelParallelStrategy."""
    run("gloo", 2, loops, sharded, {"fsdp2": True}, CASES[name][1], str(tmp_path))


@scenario("stage 2: {name}", ALONE, ranks=2)
@scenario("stage 2: accumulation", ALONE, ranks=2)
@scenario("stage 2: 2-rank checkpoint resumed", ALONE, ranks=2)
@pytest.mark.parametrize("name", ["training as documented", "clipping by norm", "clipping by value"])
def test_stage_2(tmp_path: Path, name: str) -> None:
    """The model is not set up; the optimizer is."""
    run("gloo", 2, loops, stage2, *CASES[name], str(tmp_path))


@scenario("checkpoint of `torch.optim.ASGD` resumed, and the reverse")
@scenario("{before}-rank checkpoint resumed")
@pytest.mark.parametrize(("before", "backend", "ranks"), [(2, "none", 1), (1, "gloo", 2)])
def test_files_load_on_another_number_of_ranks(tmp_path: Path, before: int, backend: str, ranks: int) -> None:
    """As with torch's own optimizer; either loads the other's."""
    run("gloo" if before == 2 else "none", before, loops, sharded, {}, {}, str(tmp_path))
    ours, torchs = str(tmp_path / "sharded"), str(tmp_path / "plain")
    expected = run(backend, ranks, moved, torchs, plain)
    for path, make in ((ours, sharded), (ours, plain), (torchs, sharded)):
        assert same_tree(run(backend, ranks, moved, path, make), expected)
