"""The main job on two ranks: what it leaves, what it refuses, and how it ends."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch.runs import TINY, TORCHRUN, children, losses, read_lines, started

Train = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class FinishedRun:
    """A run of 12 steps on two ranks."""

    out: Path
    output: str


@pytest.fixture(scope="module")
def finished(train: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[int, FinishedRun]:
    """One run of each stage."""
    runs = {}
    for stage in (1, 2):
        out = tmp_path_factory.mktemp(f"stage-{stage}")
        run = train("--stage", str(stage), "--steps", "12", "--out", str(out))
        assert run.returncode == 0, run.stdout
        runs[stage] = FinishedRun(out, run.stdout)
    return runs


@pytest.mark.parametrize("stage", [1, 2])
def test_run_leaves_metrics_picture_table_and_checkpoint(finished: dict[int, FinishedRun], stage: int) -> None:
    out, output = finished[stage].out, finished[stage].output
    curves = losses(out)
    assert list(curves["train_loss"]) == list(range(1, 13))
    assert list(curves["held_out_last"]) == [3, 6, 9, 12]
    # Up to step t0 + 2 the average is the last iterate, bit for bit; after it, another point.
    assert curves["held_out_average"][3] == curves["held_out_last"][3]
    assert curves["held_out_average"][12] != curves["held_out_last"][12]
    assert curves["train_loss"][12] < curves["train_loss"][1]

    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").glob("events.*"))
    assert (out / "checkpoint" / "checkpoint.pt").is_file()
    for expected in ("last iterate", "average (float32)", "tokens per second", "rank 1", "losses.png"):
        assert expected in output


@pytest.mark.parametrize("stage", [1, 2])
def test_summary_shows_what_sharding_saves(finished: dict[int, FinishedRun], stage: int) -> None:
    summary = json.loads((finished[stage].out / "summary.json").read_text())
    unsharded = summary["unsharded"]
    gradient_share = 0.5 if stage == 2 else 1.0
    assert len(summary["memory_by_rank"]) == 2
    for held in summary["memory_by_rank"]:
        assert held["state_bytes"] <= 0.5 * unsharded["state_bytes"] + held["padding_bytes"]
        assert held["gradient_bytes"] <= gradient_share * unsharded["gradient_bytes"] + held["padding_bytes"]


def test_stages_agree(finished: dict[int, FinishedRun]) -> None:
    one, two = (losses(finished[stage].out)["train_loss"] for stage in (1, 2))
    # Not to the bit: the stages add up accumulated gradients and ranks in another order.
    assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_resumed_run_equals_uninterrupted_run(
    finished: dict[int, FinishedRun], train: Train, tmp_path: Path, stage: int
) -> None:
    for options in (("--steps", "6"), ("--steps", "12", "--resume")):
        run = train("--stage", str(stage), "--out", str(tmp_path), *options)
        assert run.returncode == 0, run.stdout
    assert "resumed after step 6" in run.stdout
    assert losses(tmp_path) == losses(finished[stage].out)


@pytest.mark.parametrize("receiver", ["launcher", "one rank"])
def test_sigterm_ends_with_a_checkpoint_and_status_0(
    tmp_path: Path, text: Path, environment: dict[str, str], receiver: str
) -> None:
    out = tmp_path / "out"
    options = ("--stage", "2", "--steps", "100000", "--data", str(text), "--out", str(out))
    with started([str(TORCHRUN), "--nproc", "2", "--", *TINY, *options], environment) as process:
        wait_for_step(out, 5, process)
        target = process.pid if receiver == "launcher" else rank_process(process.pid)
        os.kill(target, signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "stopped by SIGTERM" in output
    assert "bytes held" in output
    assert (out / "checkpoint" / "checkpoint.pt").is_file()
    assert not list((out / "checkpoint").glob("*.unfinished"))
    assert json.loads((out / "summary.json").read_text())["step"] == read_lines(out)[-1]["step"]


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        if (out / "metrics.jsonl").exists() and len(read_lines(out)) >= step:
            return
        time.sleep(0.2)
    pytest.fail(f"step {step} was not reached")


def rank_process(launcher: int) -> int:
    """A rank below the launcher's torchrun."""
    return children(children(launcher)[0])[-1]


def test_resume_needs_a_checkpoint(train: Train, tmp_path: Path) -> None:
    run = train("--out", str(tmp_path), "--resume")
    assert_fails_everywhere(run, "no checkpoint to resume from")


def test_resume_refuses_a_torn_checkpoint(finished: dict[int, FinishedRun], train: Train, tmp_path: Path) -> None:
    whole = (finished[2].out / "checkpoint" / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[:-1000])
    run = train("--out", str(tmp_path / "out"), "--checkpoint", str(tmp_path), "--resume")
    assert_fails_everywhere(run, "the checkpoint is damaged")


def test_resume_refuses_another_model(finished: dict[int, FinishedRun], train: Train, tmp_path: Path) -> None:
    saved = str(finished[2].out / "checkpoint")
    options = ("--resume", "--d-model", "32", "--lr", "0.01")
    run = train("--out", str(tmp_path), "--checkpoint", saved, *options)
    assert_fails_everywhere(run, "--d-model is 32, was 16, --lr is 0.01, was 0.3")


def test_missing_text_is_an_error_on_every_rank(train: Train, tmp_path: Path) -> None:
    run = train("--data", str(tmp_path / "absent"), "--out", str(tmp_path / "out"))
    assert_fails_everywhere(run, "no such file or folder")


def assert_fails_everywhere(run: subprocess.CompletedProcess[str], message: str) -> None:
    assert run.returncode != 0
    for rank in (0, 1):
        assert any(f"error on rank {rank}:" in line and message in line for line in run.stdout.splitlines()), run.stdout


def test_single_process_needs_no_torchrun(tmp_path: Path, text: Path, environment: dict[str, str]) -> None:
    script = TORCHRUN.with_name("train.py")
    out = tmp_path / "out"
    command = [
        environment["PYTHON"],
        str(script),
        *TINY,
        "--data",
        str(text),
        "--steps",
        "4",
        "--out",
        str(out),
    ]
    with started(command, environment) as process:
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    assert list(losses(out)["train_loss"]) == [1, 2, 3, 4]
