"""Lightning with nothing but the class name: the bits of ``torch.optim.ASGD`` in the same Trainer, resumed as well."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pl = pytest.importorskip("lightning.pytorch")

# ruff: noqa: E402  (the rest needs Lightning)
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy

from dist_asgd import GradScaler
from dist_asgd.integrations.lightning import AveragedWeights, Stage2Strategy
from tests.harness.bits import same_tree
from tests.harness.ranks import run, run_errors
from tests.integrations.lightning_runs import (
    Manual,
    Regression,
    Two,
    fit,
    launched,
    loader,
    plain,
    sharded,
    stage2,
    state_of,
    trainer,
)

RANKS = pytest.mark.parametrize(("backend", "ranks"), [("none", 1), ("gloo", 2)], ids=["1", "2"])
scenario = pytest.mark.scenario


def same_as_plain(rank: int, ranks: int, kind: Any, module_options: dict[str, Any], options: dict[str, Any]) -> None:
    """Job: the sharded optimizer gives what torch's gives."""
    with launched(rank, ranks):
        expected = fit(ranks, kind, plain, module_options, **options)
        assert same_tree(fit(ranks, kind, sharded, module_options, **options), expected)


# By what the tables call them.
AUTOMATIC = {
    "training as documented": {},
    "accumulation": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
    "clipping by norm": {"gradient_clip_val": 0.1},
    "clipping by value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    "bf16": {"precision": "bf16-mixed", "gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
}
MANUAL, TWO = "manual optimization, gradients accumulated by hand", "two optimizers, `toggle_optimizer`"


@scenario("{name}")
@RANKS
@pytest.mark.parametrize("name", AUTOMATIC)
def test_automatic_optimization(name: str, backend: str, ranks: int) -> None:
    """With and without a scheduler."""
    for scheduler in (False, True):
        run(backend, ranks, same_as_plain, Regression, {"scheduler": scheduler}, AUTOMATIC[name])


@scenario("a frozen layer")
@RANKS
def test_frozen(backend: str, ranks: int) -> None:
    """Its parameters are passed to the optimizer, too."""
    run(backend, ranks, same_as_plain, Regression, {"frozen": True}, {})


@RANKS
@pytest.mark.parametrize(
    ("kind", "options", "trainer_options"),
    [
        pytest.param(Manual, {"scheduler": True}, {}, marks=scenario(MANUAL)),
        pytest.param(Two, {}, {"strategy": "ddp_find_unused_parameters_true"}, marks=scenario(TWO)),
    ],
)
def test_manual_optimization(kind: Any, options: Any, trainer_options: Any, backend: str, ranks: int) -> None:
    """With accumulation by hand, and with two optimizers that take turns."""
    run(backend, ranks, same_as_plain, kind, options, trainer_options)


def average_of_lightning(rank: int, ranks: int) -> None:
    """Job: Lightning's own average validates and ends with the same weights."""
    with launched(rank, ranks):
        found, expected = (fit(ranks, Regression, make, {}, callbacks=[WeightAveraging()]) for make in (sharded, plain))
        assert same_tree(found, expected)


@scenario("`WeightAveraging` of Lightning")
@RANKS
def test_weight_averaging_of_lightning(backend: str, ranks: int) -> None:
    """It copies into the parameters and back between steps."""
    run(backend, ranks, average_of_lightning)


def whole(module: Regression) -> dict[str, torch.Tensor]:
    """The whole weights of FSDP2, which stay gathered after an evaluation."""
    module.net.reshard()
    return {name: p.full_tensor() for name, p in module.named_parameters()}


def fit_fsdp2(make: Any, ranks: int, whole_files: bool, path: Path | None = None, **options: Any) -> Any:
    """A module and its Trainer, after training in bfloat16 with accumulation and clipping."""
    strategy = ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=not whole_files)
    mixed = {"precision": "bf16-mixed", "gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    module, fitting = Regression(make, fsdp2=True), trainer(ranks, strategy=strategy, **mixed, **options)
    fitting.fit(module, loader(), loader(1), ckpt_path=path)
    return module, fitting


def fsdp2(rank: int, ranks: int, folder: str, whole_files: bool) -> None:
    """Job: FSDP2 by ModelParallelStrategy, clipped, saved in the middle and resumed."""
    with launched(rank, ranks):
        ends = []
        for make in (plain, sharded):
            path = Path(folder, make.__name__)
            module, fitting = fit_fsdp2(make, ranks, whole_files, max_epochs=1)
            fitting.save_checkpoint(path)
            module, fitting = fit_fsdp2(make, ranks, whole_files, path)
            weights = whole(module)
            averages = [fitting.optimizers[0].state[p]["ax"].full_tensor() for p in module.parameters()]
            module, fitting = fit_fsdp2(make, ranks, whole_files)
            assert same_tree(weights, whole(module))
            ends.append((weights, averages))
        assert same_tree(*ends)


@scenario("FSDP2: clipping by norm", ranks=2)
@scenario("FSDP2: bf16", ranks=2)
@scenario("FSDP2: 2-rank checkpoint resumed", ranks=2)
@pytest.mark.parametrize("whole_files", [False, True], ids=["distributed", "whole"])
def test_fsdp2(tmp_path: Path, whole_files: bool) -> None:
    """ModelParallelStrategy with its two kinds of checkpoints."""
    run("gloo", 2, fsdp2, str(tmp_path), whole_files)


def saved(rank: int, ranks: int, folder: str, make: Any, options: dict[str, Any]) -> Any:
    """Job: an epoch, with a checkpoint after it, and a second one. Returns how it ends."""
    with launched(rank, ranks):
        saver = ModelCheckpoint(folder, monitor="held_out", save_top_k=-1, filename="{epoch}")
        options = {"callbacks": [saver], "enable_checkpointing": True} | options
        return fit(ranks, Regression, make, {"scheduler": True}, **options)


def resumed(rank: int, ranks: int, path: str, make: Any, options: dict[str, Any]) -> Any:
    """Job: the second epoch."""
    with launched(rank, ranks):
        options = options | {"strategy": Stage2Strategy()} if make is stage2 else options
        module, fitting = Regression(make, scheduler=True), trainer(ranks, **options)
        fitting.fit(module, loader(), loader(1), ckpt_path=path)
        return state_of(module, fitting)


@scenario("checkpoint of `torch.optim.ASGD` resumed, and the reverse")
@scenario("{ranks}-rank checkpoint resumed", ranks=1)
@scenario("{ranks}-rank checkpoint resumed", ranks=2)
@scenario("stage 2: {ranks}-rank checkpoint resumed", "with `Stage2Strategy`", ranks=2)
@pytest.mark.parametrize(("backend", "ranks", "other"), [("none", 1, ("gloo", 2)), ("gloo", 2, ("none", 1))])
def test_resume(tmp_path: Path, backend: str, ranks: int, other: tuple[str, int]) -> None:
    """A checkpoint is whole: it resumes to the bit, on another number of ranks and by torch's own optimizer, too."""
    run(backend, ranks, saved, str(tmp_path / "plain"), plain, {})
    from_plain = run(backend, ranks, resumed, str(tmp_path / "plain" / "epoch=0.ckpt"), sharded, {})[0]
    end = run(backend, ranks, saved, str(tmp_path), sharded, {})[0]
    path = str(tmp_path / "epoch=0.ckpt")
    again = run(backend, ranks, resumed, path, sharded, {})[0]
    assert same_tree(again[:2], end[:2])
    assert same_tree(from_plain, again)
    assert same_tree(run(backend, ranks, resumed, path, plain, {})[0], again)
    elsewhere = run(*other, resumed, path, plain, {})[0]
    assert same_tree(run(*other, resumed, path, sharded, {})[0], elsewhere)
    assert same_tree(run("gloo", 2, resumed, path, stage2, {})[0], elsewhere if ranks == 1 else again)


@contextmanager
def averages_of(optimizers: list[Any]) -> Iterator[None]:
    """The averages of torch's optimizer by hand: ``ax`` is copied into the parameters, and the parameters back."""
    params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in params]
    axs = [optimizer.state[p]["ax"] for optimizer in optimizers for p in optimizer.state]
    for p, ax in zip(params, axs, strict=False):
        p.data.copy_(ax)
    yield
    for p, value in zip(params, kept, strict=True):
        p.data.copy_(value)


class ByHand(pl.Callback):
    """What ``AveragedWeights`` does in validations, with torch's own optimizer."""

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.swap = averages_of(trainer.optimizers)
        self.swap.__enter__()

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.swap.__exit__(None, None, None)


def averaged(rank: int, ranks: int, folder: str, make: Any) -> None:
    """Job: AveragedWeights against the same by hand; its checkpoints hold the average, resume, and test it."""

    def by_hand(**options: Any) -> Any:
        module, fitting = Regression(plain, scheduler=True), trainer(ranks, callbacks=[ByHand()], **options)
        fitting.fit(module, loader(), loader(1))
        last = {name: value.clone() for name, value in module.state_dict().items()}
        with averages_of(fitting.optimizers):
            return {name: value.clone() for name, value in module.state_dict().items()}, last, module.validated

    def by_callback(path: Any = None, **options: Any) -> Any:
        saver = ModelCheckpoint(folder, monitor="held_out", save_top_k=-1, save_last=True, filename="{epoch}")
        options |= {"strategy": Stage2Strategy()} if make is stage2 else {}
        module = Regression(make, scheduler=True)
        fitting = trainer(ranks, callbacks=[AveragedWeights(), saver], enable_checkpointing=True, **options)
        fitting.fit(module, loader(), loader(1), ckpt_path=path)
        return module, fitting

    with launched(rank, ranks):
        average, last, validated = by_hand()
        module, fitting = by_callback()
        fitting.save_checkpoint(Path(folder, "later.ckpt"))
        assert same_tree(module.validated, validated)
        assert same_tree(dict(module.state_dict()), average)
        for name in ("epoch=1.ckpt", "last.ckpt", "later.ckpt"):
            content = torch.load(Path(folder, name), weights_only=True)
            assert same_tree(dict(content["state_dict"]), average), name
            assert same_tree(dict(content["current_model_state"]), last), name
        # Resumed, also from a checkpoint that was saved when the model had the averages already.
        average, _, validated = by_hand(max_epochs=3)
        module, fitting = by_callback(Path(folder, "later.ckpt"), max_epochs=3)
        assert same_tree(dict(module.state_dict()), average)
        assert same_tree(module.validated, validated[-len(module.validated) :])
        # A test after training: with the averages of the checkpoint that is named.
        module.validated.clear()
        fitting.test(module, loader(1), ckpt_path=Path(folder, "epoch=0.ckpt"))
        assert same_tree(module.validated, validated[: len(module.validated)])


AVERAGED = "average evaluated, saved, and picked as the best"


@scenario(AVERAGED, "with `AveragedWeights`")
@RANKS
def test_averaged_weights(tmp_path: Path, backend: str, ranks: int) -> None:
    """They validate, are in checkpoints and stay in the model at the end, and training goes on from the iterates."""
    run(backend, ranks, averaged, str(tmp_path), sharded)


@scenario(f"stage 2: {AVERAGED}", "with `Stage2Strategy`, `AveragedWeights`", ranks=2)
def test_averaged_weights_in_stage_2(tmp_path: Path) -> None:
    """The same, with Stage2Strategy."""
    run("gloo", 2, averaged, str(tmp_path), stage2)


def averaged_fsdp2(rank: int, ranks: int, folder: str) -> None:
    """Job: AveragedWeights with whole files of FSDP2, against the same file of stage 1 but for the gradients."""
    with launched(rank, ranks):
        ends = []
        for epochs, path in ((1, None), (2, "file"), (2, None)):
            strategy = ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=False)
            module = Regression(sharded, fsdp2=True)
            fitting = trainer(ranks, strategy=strategy, callbacks=[AveragedWeights()], max_epochs=epochs)
            fitting.fit(module, loader(), loader(1), ckpt_path=path and Path(folder, path))
            fitting.save_checkpoint(Path(folder, "file"))
            module.net.reshard()
            averages = {
                f"net.{n}": fitting.optimizers[0].state[p]["ax"].full_tensor() for n, p in module.net.named_parameters()
            }
            assert same_tree(whole(module), averages)
            assert same_tree(dict(torch.load(Path(folder, "file"))["state_dict"]), averages)
            ends.append(averages)
        assert same_tree(ends[1], ends[2])


@scenario(f"FSDP2: {AVERAGED}", "with `AveragedWeights`, `save_distributed_checkpoint=False`", ranks=2)
def test_averaged_weights_of_fsdp2(tmp_path: Path) -> None:
    """Whole files have the averages whole, and resume."""
    run("gloo", 2, averaged_fsdp2, str(tmp_path))


def stage2_as_ddp(rank: int, ranks: int, kind: Any, module_options: dict[str, Any], options: dict[str, Any]) -> None:
    """Job: stage 2 by the strategy against torch's optimizer under DDP; ranks begin with other weights."""

    class Other(kind):  # type: ignore[misc]
        def setup(self, stage: str) -> None:
            if rank == 1:
                torch.nn.init.zeros_(self.net[0].weight)

    with launched(rank, ranks):
        ddp = {"strategy": "ddp_find_unused_parameters_true"} if kind is Two else {}
        expected = fit(ranks, Other, plain, module_options, **options | ddp)
        found = fit(ranks, Other, stage2, module_options, **options, strategy=Stage2Strategy())
        assert same_tree(found, expected)


def distributed(rank: int, ranks: int, folder: str) -> None:
    """Job: a distributed checkpoint with the average."""
    with launched(rank, ranks):
        module, strategy = Regression(sharded, fsdp2=True), ModelParallelStrategy(ranks, 1)
        fitting = trainer(ranks, strategy=strategy, callbacks=[AveragedWeights()], max_epochs=1)
        fitting.fit(module, loader(), loader(1))
        fitting.save_checkpoint(Path(folder, "file"))


@scenario(
    f"FSDP2: {AVERAGED}, distributed checkpoints",
    "refused: AveragedWeights cannot save distributed checkpoints",
    ranks=2,
)
def test_distributed_checkpoints_cannot_have_the_average(tmp_path: Path, refusal: str) -> None:
    """They would hold only one of the two."""
    for error in run_errors("gloo", 2, distributed, str(tmp_path)):
        assert refusal in error.message


@scenario("stage 2: {name}", "with `Stage2Strategy`", ranks=2)
@pytest.mark.parametrize("name", [*AUTOMATIC, MANUAL, TWO])
def test_stage_2(name: str) -> None:
    """Stage2Strategy does what DDP does, in automatic and manual optimization."""
    kind = {MANUAL: Manual, TWO: Two}.get(name, Regression)
    run("gloo", 2, stage2_as_ddp, kind, {"scheduler": kind is Regression}, AUTOMATIC.get(name, {}))


def half(rank: int, ranks: int, make: Any, scaler: Any, options: dict[str, Any]) -> Any:
    """Job: float16 with a scaler."""
    with launched(rank, ranks):
        ddp, own = (
            MixedPrecision("16-mixed", "cpu", kind("cpu", init_scale=2.0**20))
            for kind in (torch.amp.GradScaler, scaler)
        )
        expected = fit(ranks, Regression, plain, {}, plugins=[ddp], **options)
        more = {"strategy": Stage2Strategy()} if make is stage2 else {}
        assert same_tree(fit(ranks, Regression, make, {}, plugins=[own], **more, **options), expected)


SCALERS = {"fp16 with a scaler": torch.amp.GradScaler, "fp16 with `dist_asgd.GradScaler`": GradScaler}


@pytest.mark.parametrize("name", SCALERS)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(sharded, marks=scenario("{name}", ranks=2)),
        pytest.param(stage2, marks=scenario("stage 2: {name}", "with `Stage2Strategy`", ranks=2)),
    ],
)
def test_float16(make: Any, name: str) -> None:
    """Steps that overflow are skipped on all ranks; gradients are unscaled before they are clipped."""
    run("gloo", 2, half, make, SCALERS[name], {})
    run("gloo", 2, half, make, SCALERS[name], {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"})


class Failing(Regression):
    """Raises in its second validation; then the parameters must be the last iterate again."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.current_epoch == 1:
            self.in_validation = [p.detach().clone() for p in self.parameters()]
            raise KeyError("in validation")

    def on_validation_start(self) -> None:
        self.trained = [p.detach().clone() for p in self.parameters()]


def failing(rank: int, ranks: int) -> None:
    """Job: an exception leaves a validation with averages."""
    with launched(rank, ranks):
        module = Failing(sharded)
        with pytest.raises(KeyError):
            trainer(ranks, callbacks=[AveragedWeights()]).fit(module, loader(), loader(1))
        assert not same_tree(module.in_validation, module.trained)
        assert same_tree([p.detach() for p in module.parameters()], module.trained)


@scenario("exception in an evaluation of the average", "with `AveragedWeights`")
@RANKS
def test_an_exception_in_a_validation(backend: str, ranks: int) -> None:
    """The averages do not stay in the model."""
    run(backend, ranks, failing)


def refused(rank: int, ranks: int, make: Any, options: dict[str, Any]) -> None:
    """Job: a Trainer that raises."""
    options = {name: value() if callable(value) else value for name, value in options.items()}
    with launched(rank, ranks):
        module = Regression(make)
        fitting = trainer(ranks, **options)
        fitting.fit(module, loader(), loader(1))


def weights_only() -> list[Any]:
    """Callbacks that contradict each other."""
    return [AveragedWeights(), ModelCheckpoint("nowhere", save_weights_only=True)]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(make, options, marks=scenario(text, f"refused: {message}", ranks=2))
        for text, make, options, message in (
            (
                "stage 2 without the adapter",
                *(stage2, {"strategy": "ddp"}, "With stage=2 do not wrap the model in DDP"),
            ),
            (
                "stage 1 with the adapter for stage 2",
                *(sharded, {"strategy": Stage2Strategy}, "Return ShardedASGD(..., stage=2) in configure_optimizers()"),
            ),
            (
                "`torch.optim.ASGD` with the adapter for stage 2",
                *(plain, {"strategy": Stage2Strategy}, "Stage2Strategy with a ASGD that does not reduce gradients"),
            ),
            (
                "`AveragedWeights` with `torch.optim.ASGD`",
                *(plain, {"callbacks": AveragedWeights}, "AveragedWeights without a ShardedASGD"),
            ),
            (
                "`AveragedWeights` with `save_weights_only=True`",
                *(sharded, {"callbacks": weights_only, "enable_checkpointing": True}, "Leave save_weights_only out"),
            ),
        )
    ],
)
def test_refusals(make: Any, options: dict[str, Any], refusal: str) -> None:
    """On every rank, with what to do."""
    for error in run_errors("gloo", 2, refused, make, options):
        assert refusal in error.message


@scenario("`launch/examples`, by torchrun", "with `AveragedWeights`", ranks=2)
def test_the_example_runs(tmp_path: Path) -> None:
    """Under torchrun, with few steps: it trains, resumes, validates both weights, and exports the average."""
    code = "import pathlib, sys, launch.examples.lightning as example; example.STEPS_PER_EPOCH = 3; "
    code += "example.main(1, pathlib.Path(sys.argv[1]))"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    ran = subprocess.run(
        [*torchrun, sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert "by the average" in ran.stdout
    assert (tmp_path / "averaged.safetensors").exists()


def test_the_page_shows_the_example() -> None:
    """Lines of code that need Lightning are those of the example, which runs."""
    root = Path(__file__).parent.parent.parent
    blocks = re.findall(r"```py\n(.*?)```", (root / "docs" / "trainers" / "lightning.md").read_text(), re.DOTALL)
    example = (root / "launch" / "examples" / "lightning.py").read_text()
    lines = {line.strip() for line in example.splitlines()}
    assert blocks
    assert [line for block in blocks for line in block.splitlines() if line.strip() not in lines] == []
