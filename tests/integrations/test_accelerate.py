"""Accelerate: ``prepare`` in its documented order, ``save_state`` and ``load_state``, and stage 2."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("accelerate")

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType, ProjectConfiguration
from safetensors.torch import load_file

from dist_asgd import ShardedASGD, export_averaged
from dist_asgd.integrations.accelerate import prepare_stage2, save_whole_state
from dist_asgd.integrations.wrappers import sharded_asgd
from tests.harness.bits import assert_same_bits, same_tree
from tests.harness.ranks import run, run_errors
from tests.integrations.launched import launched

Make = Callable[[nn.Module], torch.optim.Optimizer]
Bits = dict[str, Tensor]

worlds = pytest.mark.parametrize(("backend", "ranks"), [("none", 1), ("gloo", 2)])
scenario = pytest.mark.scenario
SETTINGS = {"lr": 0.1, "t0": 4, "weight_decay": 0.01}


@dataclass(frozen=True)
class Case:
    """How a script of the user's calls Accelerate."""

    accumulate: int = 1
    clip: str = ""
    precision: str = "no"
    scaler: bool = False
    fsdp: bool = False
    stage: int = 1
    lora: bool = False


# By what the tables call them.
CASES = {
    "training as documented": Case(),
    "accumulation": Case(accumulate=3),
    "clipping by norm": Case(clip="norm", accumulate=2),
    "clipping by value": Case(clip="value"),
    "bf16": Case(precision="bf16", clip="norm"),
    "fp16 with a scaler": Case(scaler=True, clip="norm", accumulate=2),
    "LoRA by peft": Case(lora=True),
}


def torchs(model: nn.Module) -> torch.optim.Optimizer:
    """The reference."""
    return torch.optim.ASGD(model.parameters(), foreach=False, **SETTINGS)  # type: ignore[arg-type]


def ours(model: nn.Module, stage: int = 1) -> torch.optim.Optimizer:
    """The changed line."""
    return ShardedASGD(model.named_parameters(), stage=stage, **SETTINGS)  # type: ignore[arg-type]


@contextmanager
def accelerated(rank: int, world_size: int, case: Case) -> Iterator[Accelerator]:
    """An Accelerator of these ranks, which a launcher would have started."""
    with launched(rank, world_size):
        plugin = None
        if case.fsdp:  # Accelerate takes the plugin on accelerators only, but all that it does then runs on a CPU, too.
            PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10
            )
        accelerator = Accelerator(
            mixed_precision=case.precision,
            gradient_accumulation_steps=case.accumulate,
            fsdp_plugin=plugin,
            cpu=not case.fsdp,
        )
        if case.scaler:  # On a CPU Accelerate ignores fp16: this is what it makes on accelerators.
            accelerator.state._mixed_precision = "fp16"
            accelerator.native_amp = True
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=3)
        yield accelerator


@dataclass
class Run:
    """One training run of a user's script."""

    accelerator: Accelerator
    model: Any
    optimizer: Any
    loader: Any
    scheduler: Any
    skipped: int = 0

    @classmethod
    def of(cls, accelerator: Accelerator, make: Make, case: Case | None = None) -> Run:
        """All that the script prepares, in the documented order."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 1))
        if case and case.lora:
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "2"]))
        optimizer = make(model)
        loader = DataLoader(TensorDataset(torch.randn(48, 6)), batch_size=2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        staged = isinstance(optimizer, ShardedASGD) and optimizer.reduces_gradients
        prepare = partial(prepare_stage2, accelerator) if staged else accelerator.prepare
        return cls(accelerator, *prepare(model, optimizer, loader, scheduler))

    def train(self, case: Case, first: int = 0, stop: int = 12) -> Run:
        """The documented loop over some batches of one epoch."""
        for index, (x,) in enumerate(self.loader):
            if not first <= index < stop:
                continue
            with self.accelerator.accumulate(self.model):
                loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and case.clip == "norm":
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                if self.accelerator.sync_gradients and case.clip == "value":
                    self.accelerator.clip_grad_value_(self.model.parameters(), 0.05)
                self.optimizer.step()
                self.skipped += self.optimizer.step_was_skipped
                self.scheduler.step()
                self.optimizer.zero_grad()
        return self

    def bits(self) -> Bits:
        """Parameters and averages, whole."""
        if isinstance(self.optimizer.optimizer, ShardedASGD):
            state = self.optimizer.optimizer.consolidated_state_dict(to=None)["state"]
        else:
            state = self.optimizer.state_dict()["state"]
        params = {f"p{i}": whole(p) for i, p in enumerate(self.model.parameters())}
        scalars = {f"{key}{i}": torch.as_tensor(state[i][key]) for i in state for key in ("eta", "mu", "step")}
        return params | scalars | {f"ax{i}": whole(state[i]["ax"]) for i in state}


def whole(tensor: Tensor) -> Tensor:
    """A plain copy."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def assert_same(got: Bits, wanted: Bits) -> None:
    """Bit for bit."""
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert_same_bits(got[key], value.to(got[key].dtype), key)


def documented(rank: int, world_size: int, case: Case) -> int:
    """Job: one script with either optimizer."""
    wanted = None
    for make in (torchs, partial(ours, stage=case.stage)):
        with accelerated(rank, world_size, case) as accelerator:
            script = Run.of(accelerator, make, case).train(case)
            wanted, got = wanted or script.bits(), script.bits()
    if case.stage == 2 and case.clip == "norm":
        # The global norm adds up the squares in another order.
        for key, value in wanted.items():
            torch.testing.assert_close(got[key], value, check_dtype=False, rtol=1e-5, atol=1e-6)
    else:
        assert_same(got, wanted)
    return script.skipped


@scenario("{name}")
@worlds
@pytest.mark.parametrize("name", CASES)
def test_prepare_as_documented(name: str, backend: str, ranks: int) -> None:
    """No adapter; the same bits."""
    skipped = run(backend, ranks, documented, CASES[name])
    assert all(skipped) == CASES[name].scaler


@scenario("stage 2: {name}", "with `prepare_stage2`")
@worlds
@pytest.mark.parametrize("name", CASES)
def test_prepare_stage2(name: str, backend: str, ranks: int) -> None:
    """Beside DDP and torch.optim.ASGD."""
    skipped = run(backend, ranks, documented, replace(CASES[name], stage=2))
    assert all(skipped) == CASES[name].scaler


@pytest.mark.parametrize(
    "clip",
    [
        pytest.param("", marks=scenario("FSDP2: training as documented", ranks=2)),
        pytest.param("norm", marks=scenario("FSDP2: clipping by norm", ranks=2)),
    ],
)
def test_fsdp2_plugin(clip: str) -> None:
    """Accelerate puts other parameters into ``param_groups``."""
    run("gloo", 2, documented, Case(fsdp=True, clip=clip))


def overflows(rank: int, world_size: int) -> int:
    """Job: with FSDP2 one rank overflows in every other step; Accelerate leaves its scheduler where it is."""
    case, wanted = Case(fsdp=True, scaler=True), None
    for make in (torchs, ours):
        with accelerated(rank, world_size, case) as accelerator:
            script = Run.of(accelerator, make)
            parameter = next(script.model.parameters())
            for index, (x,) in enumerate(script.loader):
                accelerator.backward(script.model(x).square().mean())
                if index % 2 and rank == 1:
                    parameter.grad.to_local().fill_(torch.inf)
                script.optimizer.step()
                script.skipped += script.optimizer.step_was_skipped
                script.scheduler.step()
                script.optimizer.zero_grad()
            wanted, got = wanted or script.bits(), script.bits()
    assert_same(got, wanted)
    return script.skipped


@scenario("FSDP2: fp16 with a scaler", ranks=2)
def test_skipped_steps_with_fsdp2() -> None:
    """On all ranks, as with torch.optim.ASGD."""
    assert run("gloo", 2, overflows) == [6, 6]


# --- save_state and load_state ------------------------------------------------------------------------------


def saves(_rank: int, _world_size: int, case: Case, folder: Path) -> None:
    """Job: both scripts save in the middle and at the end of an epoch; the bits of the end are kept beside."""
    for name, make in (("torch", torchs), ("ours", partial(ours, stage=case.stage))):
        with accelerated(_rank, _world_size, case) as accelerator:
            script = Run.of(accelerator, make)
            if name == "ours":
                save_whole_state(accelerator, script.optimizer)
            script.train(case, 0, 6)
            accelerator.save_state(str(folder / name))
            bits = script.train(case, 6).bits()
            if accelerator.is_main_process:
                torch.save(bits, folder / f"{name}.pt")
            accelerator.wait_for_everyone()


def resumes(rank: int, world_size: int, case: Case, folder: Path, same: bool) -> None:
    """Job: new scripts load what both have saved, and also what the other has, and go on."""
    found = {}
    for name, make, source in (
        ("torch", torchs, "torch"),
        ("ours", partial(ours, stage=case.stage), "ours"),
        ("ours from torch", partial(ours, stage=case.stage), "torch"),
        ("torch from ours", torchs, "ours"),
    ):
        if case.fsdp and " from " in name:
            continue
        with accelerated(rank, world_size, case) as accelerator:
            script = Run.of(accelerator, make)
            accelerator.load_state(str(folder / source))
            found[name] = script.train(case, 6).bits()
    wanted = torch.load(folder / "torch.pt") if same else found["torch"]
    for bits in found.values():
        assert_same(bits, wanted)


SAVED = {
    "plain": Case(),
    "clipped": Case(clip="norm", accumulate=2, precision="bf16"),
    "scaler": Case(scaler=True),
}
moves = pytest.mark.parametrize(("before", "ranks"), [(1, 1), (2, 2), (2, 1), (1, 2)])


def saves_and_resumes(case: Case, folder: Path, before: int, after: int) -> None:
    """On the same number of ranks as if nothing had happened; on another as with torch.optim.ASGD."""
    for world_size, job, args in ((before, saves, ()), (after, resumes, (before == after,))):
        run("gloo" if world_size > 1 else "none", world_size, job, case, folder, *args)


@scenario("checkpoint of `torch.optim.ASGD` resumed, and the reverse", "with `save_whole_state`")
@scenario("{before}-rank checkpoint resumed", "with `save_whole_state`")
@moves
@pytest.mark.parametrize("name", SAVED)
def test_save_state_and_load_state(tmp_path: Path, name: str, before: int, ranks: int) -> None:
    """``save_state`` is whole, and ``load_state`` goes on from it."""
    saves_and_resumes(SAVED[name], tmp_path, before, ranks)


@scenario("stage 2: {before}-rank checkpoint resumed", "with `prepare_stage2`, `save_whole_state`")
@moves
def test_save_state_and_load_state_in_stage2(tmp_path: Path, before: int, ranks: int) -> None:
    """The same."""
    saves_and_resumes(Case(stage=2), tmp_path, before, ranks)


@scenario("FSDP2: 2-rank checkpoint resumed", ranks=2)
def test_save_state_with_fsdp2(tmp_path: Path) -> None:
    """Accelerate saves by torch.distributed.checkpoint there."""
    case = Case(fsdp=True)
    run("gloo", 2, saves, case, tmp_path)
    run("gloo", 2, resumes, case, tmp_path, True)


def saves_alone(rank: int, world_size: int) -> None:
    """Job: ``save_whole_state`` was called, and somebody saves the state without Accelerate."""
    with accelerated(rank, world_size, Case()) as accelerator:
        script = Run.of(accelerator, ours)
        save_whole_state(accelerator, script.optimizer)
        script.optimizer.state_dict()


@scenario(
    "`state_dict()` by hand after `save_whole_state`",
    "refused: Call consolidate_state_dict(to=0) on every rank",
    ranks=2,
)
def test_a_part_is_refused(refusal: str) -> None:
    """On every rank, with the remedy."""
    for error in run_errors("gloo", 2, saves_alone):
        assert refusal in error.message


def saves_a_part(rank: int, world_size: int, folder: Path, message: str) -> None:
    """Job: ``save_state`` without ``save_whole_state``. The rank that writes raises."""
    with error_of(rank, message), accelerated(rank, world_size, Case()) as accelerator:
        Run.of(accelerator, ours)
        accelerator.save_state(str(folder))


def error_of(rank: int, message: str) -> AbstractContextManager[object]:
    """What the first rank raises as it saves a part, with the line that makes it whole."""
    line = "accelerate.save_whole_state(accelerator, optimizer)"
    pattern = f"{re.escape(message)}.*{re.escape(line)}"
    return pytest.raises(RuntimeError, match=pattern) if rank == 0 else nullcontext()


@scenario("checkpoint without the adapter", ranks=1)
@scenario(
    "checkpoint without the adapter",
    "refused: accelerate would save one rank's part of the optimizer's state as if it were the whole",
    ranks=2,
)
def test_save_state_of_a_part_is_an_error(tmp_path: Path, refusal: str) -> None:
    """One rank has the whole."""
    run("gloo", 2, saves_a_part, tmp_path, refusal)
    with accelerated(0, 1, Case()) as accelerator:
        Run.of(accelerator, ours)
        accelerator.save_state(str(tmp_path / "whole"))


def saves_on_each_node(rank: int, world_size: int) -> None:
    """Job: the whole state would be on the first node only."""
    with accelerated(rank, world_size, Case()) as accelerator:
        accelerator.project_configuration = ProjectConfiguration(save_on_each_node=True)
        save_whole_state(accelerator, Run.of(accelerator, ours).optimizer)


@scenario("`save_on_each_node=True`", ranks=1)
@scenario("`save_on_each_node=True`", "refused: Save to a folder that all nodes share", ranks=2)
def test_saving_on_each_node_is_refused(refusal: str) -> None:
    """The other nodes would get an empty file."""
    run("none", 1, saves_on_each_node)
    for error in run_errors("gloo", 2, saves_on_each_node):
        assert refusal in error.message


# --- models ----------------------------------------------------------------------------------------------------


def saves_models(rank: int, world_size: int, stage: int, folder: Path) -> None:
    """Job: the files of ``save_model`` and of ``export_averaged``; then everything is freed."""
    case = Case(stage=stage)
    with accelerated(rank, world_size, case) as accelerator:
        script = Run.of(accelerator, partial(ours, stage=stage)).train(case)
        accelerator.save_model(script.model, str(folder / "last"))
        inner = sharded_asgd(script.optimizer)
        export_averaged(folder / "averaged.safetensors", script.model, inner)
        accelerator.wait_for_everyone()
        model = accelerator.unwrap_model(script.model)
        assert type(model) is nn.Sequential
        assert same_tree(load_file(folder / "last" / "model.safetensors"), dict(model.state_dict()))
        with inner.averaged_parameters():
            assert same_tree(load_file(folder / "averaged.safetensors"), dict(model.state_dict()))
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with accelerator.no_sync(copied):
                pass
        buffers = weakref.ref(inner.shards.state_buffers[0])
        del inner
        script.model, script.optimizer, script.loader, script.scheduler = accelerator.free_memory(
            script.model, script.optimizer, script.loader, script.scheduler
        )
        del model, copied
        gc.collect()
        assert buffers() is None


MODELS, AVERAGE = "`save_model`, `unwrap_model`, `free_memory`", "average in the model, and exported"


@worlds
@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(1, marks=[scenario(text) for text in (MODELS, AVERAGE)]),
        pytest.param(2, marks=[scenario(f"stage 2: {text}", "with `prepare_stage2`") for text in (MODELS, AVERAGE)]),
    ],
)
def test_save_model_unwrap_model_and_free_memory(tmp_path: Path, stage: int, backend: str, ranks: int) -> None:
    """The last iterate is what Accelerate saves, and the average is exported."""
    run(backend, ranks, saves_models, stage, tmp_path)


# --- launchers ---------------------------------------------------------------------------------------------------

LAUNCHERS = {
    "`launch/examples`, by torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    # With --cpu it starts one process, whatever it is asked for.
    "`accelerate launch --num_processes 2`": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
}


@scenario("{name}", "with `save_whole_state`", ranks=2)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_example_runs(tmp_path: Path, name: str) -> None:
    """With few steps: it trains, resumes, evaluates both weights, and exports the average."""
    script = tmp_path / "short.py"
    script.write_text(
        "import pathlib, launch.examples.accelerate as example\n"
        "example.STEPS, example.BATCH = 4, 2\n"
        f"example.main(1, pathlib.Path({str(tmp_path)!r}))\n"
    )
    command = [sys.executable, "-m", *LAUNCHERS[name], str(script)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "step 4: training loss" in ran.stdout
    assert ran.stdout.count(", average ") == 1, "each process was alone"
    assert (tmp_path / "averaged.safetensors").exists()


# --- what cannot work -------------------------------------------------------------------------------------------


def stage2_by_prepare(rank: int, world_size: int) -> None:
    """Job: stage 2 in the order of stage 1: Accelerate wraps the model in DDP."""
    with accelerated(rank, world_size, Case()) as accelerator:
        model = nn.Linear(6, 1)
        model, optimizer = accelerator.prepare(model, ShardedASGD(model.parameters(), stage=2))
        accelerator.backward(model(torch.randn(2, 6)).sum())
        optimizer.step()


@scenario("stage 2 without the adapter", ranks=1)
@scenario("stage 2 without the adapter", "refused: With stage=2 do not wrap the model in DDP", ranks=2)
def test_stage2_by_prepare_is_an_error(refusal: str) -> None:
    """On every rank; one rank has no DDP."""
    run("none", 1, stage2_by_prepare)
    for error in run_errors("gloo", 2, stage2_by_prepare):
        assert refusal in error.message


def prepares(_rank: int, _world_size: int, what: str) -> None:
    """Job: calls of ``prepare_stage2`` that it does not know how to serve."""
    case = Case(fsdp=what == "fsdp")
    with accelerated(_rank, _world_size, case) as accelerator:
        model = nn.Linear(6, 1)
        optimizer = ShardedASGD(model.parameters(), stage=1 if what == "stage 1" else 2)
        prepare_stage2(accelerator, *([model, model] if what == "models" else [model]), optimizer)


ONE = "refused: prepare_stage2() takes one model and one ShardedASGD(stage=2) at a time"
NO_FSDP = "refused: Use stage=1, and do not call prepare_stage2()"


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("stage 1", marks=scenario("stage 1 with the adapter for stage 2", ONE, ranks=2)),
        pytest.param("models", marks=scenario("`prepare_stage2` of two models", ONE, ranks=2)),
        pytest.param("fsdp", marks=scenario("FSDP2: stage 2", NO_FSDP, ranks=2)),
    ],
)
def test_what_prepare_stage2_does_not_take(what: str, refusal: str) -> None:
    """Named on every rank."""
    for error in run_errors("gloo", 2, prepares, what):
        assert error.type_name == "ValueError"
        assert refusal in error.message
