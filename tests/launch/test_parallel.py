"""Every `--parallel` of the trainer: the same losses, from one start, each goes on from another's checkpoint."""

import importlib
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.launch.runs import REPOSITORY, losses

Train = Callable[..., subprocess.CompletedProcess[str]]
OTHERS = ("ddp", "zero2", "fsdp2", "hsdp", "hybrid")


def memory_of(out: Path) -> list[dict[str, int]]:
    """What each rank held in a run."""
    return json.loads((out / "summary.json").read_text())["memory_by_rank"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def zero1(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of 8 steps in zero1 on two ranks left its losses, and checkpoints of steps 4 and 8."""
    out = tmp_path_factory.mktemp("zero1")
    options = ("--parallel", "zero1", "--clip", "0", "--steps", "8", "--checkpoint-every", "4", "--eval-windows", "7")
    run = train(*options, "--out", str(out))
    assert run.returncode == 0, run.stdout
    return out


@pytest.mark.parametrize("mode", OTHERS)
def test_losses_are_those_of_zero1_to_the_bit(zero1: Path, train: Train, tmp_path: Path, mode: str) -> None:
    """On two ranks, where there is one order of summing; also over a number of windows that ranks do not divide."""
    options = ("--parallel", mode, "--clip", "0", "--steps", "8", "--eval-windows", "7", "--overlap-forward")
    run = train(*options, "--out", str(tmp_path))
    assert run.returncode == 0, run.stdout
    assert f" parameters, {mode}" in run.stdout
    assert losses(tmp_path) == losses(zero1)


def test_steps_in_backward_have_the_losses_of_zero1_to_the_bit(zero1: Path, train: Train, tmp_path: Path) -> None:
    """And keep no gradients."""
    options = ("--stage", "2", "--step-in-backward", "--clip", "0", "--steps", "8", "--eval-windows", "7")
    run = train(*options, "--out", str(tmp_path))
    assert run.returncode == 0, run.stdout
    assert losses(tmp_path) == losses(zero1)
    assert [memory["gradient_bytes"] for memory in memory_of(tmp_path)] == [0, 0]
    assert "zero2, step in backward on 2 ranks" in run.stdout


@pytest.mark.parametrize(
    ("ranks", "options", "tolerance"),
    [
        (2, ("--parallel", "fsdp2"), 0.0),
        (4, ("--parallel", "fsdp2", "--tensor-parallel", "2"), 1e-5),
        (4, ("--parallel", "hsdp", "--tensor-parallel", "2", "--replicas", "2"), 1e-5),
        (4, ("--parallel", "hybrid"), 0.1),
    ],
    ids=str,
)
def test_each_goes_on_from_a_checkpoint_of_another(
    zero1: Path, train: Train, tmp_path: Path, ranks: int, options: tuple[str, ...], tolerance: float
) -> None:
    """To the bit on two ranks that see different data, or nearly where layers are split; on more with other data."""
    kept = str(zero1 / "checkpoint" / "step-00000004")
    common = ("--clip", "0", "--steps", "6", "--eval-windows", "7", "--resume-from", kept, "--out", str(tmp_path))
    run = train(*common, *options, ranks=ranks)
    assert run.returncode == 0, run.stdout
    found, expected = losses(tmp_path), losses(zero1)
    assert list(found["train_loss"]) == [5, 6]
    assert list(found["held_out_average"]) == [6]
    for name in ("train_loss", "held_out_last", "held_out_average"):
        for step, value in found[name].items():
            assert value == pytest.approx(expected[name][step], rel=tolerance, abs=0)


def test_split_layers_give_the_losses_of_whole_ones(train: Train, tmp_path: Path) -> None:
    """Two ranks that share every layer of a block see the data of one; sums are rounded in another order."""
    for name, ranks, options in (("one", 1, ()), ("split", 2, ("--parallel", "fsdp2", "--tensor-parallel", "2"))):
        run = train(*options, "--steps", "6", "--out", str(tmp_path / name), ranks=ranks)
        assert run.returncode == 0, run.stdout
    one, split = (losses(tmp_path / name) for name in ("one", "split"))
    for name in ("train_loss", "held_out_last", "held_out_average"):
        assert one[name] == pytest.approx(split[name], rel=1e-5)
    whole, *halves = (memory["parameter_bytes"] for name in ("one", "split") for memory in memory_of(tmp_path / name))
    # In each of 2 blocks, 16 wide: 12 matrices of the width, and the biases of 7 of them. All else is whole.
    assert halves == [whole - 2 * (12 * 16 * 16 + 7 * 16) // 2 * 4] * 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stage": 2, "parallel": "fsdp2"}, "--stage and --parallel"),
        ({"parallel": "zero2", "replicas": 2}, "--replicas is for --parallel hsdp and hybrid, not zero2"),
        (
            {"parallel": "hybrid", "tensor_parallel": 2},
            "--tensor-parallel is for --parallel fsdp2 and hsdp, not hybrid",
        ),
        ({"parallel": "zero1", "step_in_backward": True, "clip": 0.0}, "with zero1 DDP does: pass --stage 2"),
        ({"parallel": "hsdp", "step_in_backward": True, "clip": 0.0}, "with hsdp FSDP2 does: pass --stage 2"),
        ({"parallel": "hybrid", "step_in_backward": True}, "cannot be clipped to --clip 1: pass --clip 0"),
        (
            {"parallel": "zero2", "step_in_backward": True, "clip": 0.0, "overlap_forward": True},
            "--step-in-backward gathers parameters during backward",
        ),
        ({"parallel": "fsdp2", "tensor_parallel": 3}, "--tensor-parallel 3 does not divide --heads 4"),
    ],
)
def test_options_that_do_not_go_together(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], says: str) -> None:
    """Said before anything starts."""
    monkeypatch.syspath_prepend(REPOSITORY / "launch" / "trainer")
    options_of = importlib.import_module("options").TrainOptions
    mode = importlib.import_module("parallel").Mode
    with pytest.raises(typer.BadParameter, match=re.escape(says)):
        options_of(**{**options, "parallel": mode(options["parallel"])})


def test_ranks_that_cannot_be_cut_so(train: Train, tmp_path: Path) -> None:
    """Said on every rank."""
    run = train("--parallel", "hybrid", "--replicas", "3", "--steps", "2", "--out", str(tmp_path))
    assert run.returncode != 0
    assert run.stdout.count("2 ranks cannot be cut into 3 replicas") == 2
