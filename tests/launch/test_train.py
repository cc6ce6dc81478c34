"""The main job on two ranks: what it leaves, what it refuses, and how it ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch.ranks import run_ranks
from tests.launch.runs import TINY, TORCHRUN, losses, read_lines, started

Train = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class FinishedRun:
    """A run of 12 steps on two ranks, with a checkpoint after step 8, in the background, and one at the end."""

    out: Path
    output: str


@pytest.fixture(scope="module")
def finished(train: Train, torchrun: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[int, FinishedRun]:
    """One run of each stage; that of stage 2 through torchrun."""
    runs = {}
    for stage, start in ((1, train), (2, torchrun)):
        out = tmp_path_factory.mktemp(f"stage-{stage}")
        run = start("--stage", str(stage), "--steps", "12", "--checkpoint-every", "8", "--out", str(out))
        assert run.returncode == 0, run.stdout
        runs[stage] = FinishedRun(out, run.stdout)
    return runs


@pytest.mark.parametrize("stage", [1, 2])
def test_run_leaves_metrics_picture_table_and_checkpoint(finished: dict[int, FinishedRun], stage: int) -> None:
    out, output = finished[stage].out, finished[stage].output
    curves = losses(out)
    assert list(curves["train_loss"]) == list(range(1, 13))
    assert list(curves["held_out_last"]) == [3, 6, 9, 12]
    # There is an average from step t0 + 2 on, with t0 = 3; of one iterate or more.
    assert list(curves["held_out_average"]) == [6, 9, 12]
    assert curves["held_out_average"][12] != curves["held_out_last"][12]
    assert [line["averaged_steps"] for line in read_lines(out) if "averaged_steps" in line] == [0, 2, 5, 8]
    assert curves["train_loss"][12] < curves["train_loss"][1]

    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").glob("events.*"))
    assert (out / "checkpoint" / "latest" / "manifest.json").is_file()
    steps = sorted(entry.name for entry in (out / "checkpoint").glob("step-*"))
    assert steps == ["step-00000008", "step-00000012"]
    for expected in ("last iterate", "average (float32)", "tokens per second", "rank 1", "losses.png"):
        assert expected in output
    assert "12 steps, lr 0.3 (constant), t0 3" in output
    assert "averaging begins after step 3" in output
    assert re.search(r"held-out loss [0-9.]+, of the average [0-9.]+ \(8 iterates\)", output)
    assert re.search(r"iterates in the average +│ +8 ", output)
    is_worse = curves["held_out_average"][12] > curves["held_out_last"][12]
    assert ("the average is worse than the last iterate" in output) == is_worse


@pytest.mark.parametrize("stage", [1, 2])
def test_summary_shows_what_sharding_saves(finished: dict[int, FinishedRun], stage: int) -> None:
    summary = json.loads((finished[stage].out / "summary.json").read_text())
    unsharded = summary["unsharded"]
    gradient_share = 0.5 if stage == 2 else 1.0
    assert len(summary["memory_by_rank"]) == 2
    assert len(summary["stats_by_rank"]) == 2
    for stats in summary["stats_by_rank"]:
        assert stats["steps"] == summary["step"]
        assert stats["sent_parameter_bytes"] > 0
        assert (stats["sent_gradient_bytes"] > 0) == (stage == 2)
    for held in summary["memory_by_rank"]:
        assert held["state_bytes"] <= 0.5 * unsharded["state_bytes"] + held["padding_bytes"]
        assert held["gradient_bytes"] <= gradient_share * unsharded["gradient_bytes"] + held["padding_bytes"]


def test_stages_agree(finished: dict[int, FinishedRun]) -> None:
    one, two = (losses(finished[stage].out)["train_loss"] for stage in (1, 2))
    # Not to the bit: the stages add up accumulated gradients and ranks in another order.
    assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize(("stage", "latest"), [(1, False), (2, True)], ids=["--resume-from", "--resume"])
def test_resumed_run_equals_uninterrupted_run(
    finished: dict[int, FinishedRun], train: Train, tmp_path: Path, stage: int, latest: bool
) -> None:
    """Bit for bit, from a checkpoint that was written while the first run went on."""
    out = tmp_path / "out"
    shutil.copytree(finished[stage].out, out, symlinks=True)
    shutil.rmtree(out / "checkpoint" / "step-00000012")
    if not latest:
        (out / "checkpoint" / "step-00000008").rename(tmp_path / "kept")
    resume = ("--resume",) if latest else ("--resume-from", str(tmp_path / "kept"))
    run = train("--stage", str(stage), "--out", str(out), "--steps", "12", *resume)
    assert run.returncode == 0, run.stdout
    assert "resumed after step 8 with the run's t0 of 3: the average holds 4 iterates" in run.stdout
    assert losses(out) == losses(finished[stage].out)


@pytest.mark.parametrize(("ranks", "stage"), [(2, 2), (3, 1)])
def test_resume_in_another_mode_or_on_another_number_of_ranks(
    finished: dict[int, FinishedRun], train: Train, tmp_path: Path, ranks: int, stage: int
) -> None:
    """Stage 1 on two ranks goes on as stage 2, and on three ranks, which see other data."""
    kept = finished[1].out / "checkpoint" / "step-00000008"
    options = ("--stage", str(stage), "--out", str(tmp_path), "--steps", "12", "--resume-from", str(kept))
    run = train(*options, ranks=ranks)
    assert run.returncode == 0, run.stdout
    expected = losses(finished[1].out)["held_out_last"][12]
    assert losses(tmp_path)["held_out_last"][12] == pytest.approx(expected, rel=1e-4 if ranks == 2 else 0.05)


@pytest.mark.parametrize("receiver", ["launcher", "one rank"])
def test_sigterm_ends_with_a_checkpoint_and_status_0(
    tmp_path: Path, text: Path, environment: dict[str, str], receiver: str
) -> None:
    out = tmp_path / "out"
    options = (*TINY, "--stage", "2", "--steps", "100000", "--data", str(text), "--out", str(out))

    def end_last(processes: list[int]) -> None:
        wait_for_step(out, 5)
        os.kill(processes[-1], signal.SIGTERM)

    if receiver == "one rank":
        run = run_ranks(2, [*options], environment, meanwhile=end_last)
        status, output = run.returncode, run.stdout
    else:
        with started([str(TORCHRUN), "--nproc", "2", "--", *options], environment) as process:
            end_last([process.pid])
            output, _ = process.communicate(timeout=60)
        status = process.returncode
    assert status == 0, output
    assert "stopped by SIGTERM" in output
    assert "bytes held" in output
    assert (out / "checkpoint" / "latest" / "manifest.json").is_file()
    assert not list((out / "checkpoint").glob(".*"))
    assert json.loads((out / "summary.json").read_text())["step"] == read_lines(out)[-1]["step"]


def wait_for_step(out: Path, step: int) -> None:
    """Wait until a run has logged so many steps."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and len(read_lines(out)) >= step:
            return
        time.sleep(0.05)
    pytest.fail(f"step {step} was not reached")


def test_resume_needs_a_checkpoint(train: Train, tmp_path: Path) -> None:
    run = train("--out", str(tmp_path), "--resume")
    assert_fails_everywhere(run, "no checkpoint to resume from")


def test_resume_refuses_a_torn_checkpoint(finished: dict[int, FinishedRun], train: Train, tmp_path: Path) -> None:
    shutil.copytree(finished[2].out / "checkpoint", tmp_path / "checkpoint", symlinks=True)
    torn = next((tmp_path / "checkpoint" / "latest").glob("__1_*.distcp"))
    torn.write_bytes(torn.read_bytes()[:-1000])
    run = train("--out", str(tmp_path / "out"), "--checkpoint", str(tmp_path / "checkpoint"), "--resume")
    assert_fails_everywhere(run, "it is truncated")


def test_a_new_run_does_not_hide_behind_an_old_one(
    finished: dict[int, FinishedRun], train: Train, tmp_path: Path
) -> None:
    shutil.copytree(finished[2].out / "checkpoint", tmp_path / "checkpoint", symlinks=True)
    options = ("--steps", "3", "--stage", "2", "--out", str(tmp_path))
    assert_fails_everywhere(train(*options), "has a checkpoint of step 12")
    run = train(*options, "--overwrite")
    assert run.returncode == 0, run.stdout
    assert [entry.name for entry in (tmp_path / "checkpoint").glob("step-*")] == ["step-00000003"]


def test_resume_refuses_another_model(finished: dict[int, FinishedRun], train: Train, tmp_path: Path) -> None:
    saved = str(finished[2].out / "checkpoint")
    options = ("--resume", "--d-model", "32", "--lr", "0.01")
    run = train("--out", str(tmp_path), "--checkpoint", saved, *options)
    assert_fails_everywhere(run, "--d-model is 32, was 16, --lr is 0.01, was 0.3")


def test_resume_keeps_t0(finished: dict[int, FinishedRun], train: Train, tmp_path: Path) -> None:
    """It says so once; an option for another t0 is refused."""
    saved = str(finished[1].out / "checkpoint")
    shutil.copytree(saved, tmp_path / "checkpoint", symlinks=True)
    common = ("--out", str(tmp_path), "--resume", "--steps", "14")
    assert_fails_everywhere(train(*common, "--t0", "9"), "--t0 asks for averaging after step 9, but the run that goes")
    run = train(*common, "--t0", "3")
    assert run.returncode == 0, run.stdout
    (line,) = (line for line in run.stdout.splitlines() if "resumed" in line)
    assert "with the run's t0 of 3: the average holds 8 iterates" in line
    assert "--t0" not in line
    assert "iterates in the average" in run.stdout
    assert json.loads((tmp_path / "summary.json").read_text())["averaged_steps"] == 10


def test_missing_text_is_an_error_on_every_rank(train: Train, tmp_path: Path) -> None:
    run = train("--data", str(tmp_path / "absent"), "--out", str(tmp_path / "out"))
    assert_fails_everywhere(run, "no such file or folder")


def assert_fails_everywhere(run: subprocess.CompletedProcess[str], message: str) -> None:
    assert run.returncode != 0
    for rank in (0, 1):
        assert any(f"error on rank {rank}:" in line and message in line for line in run.stdout.splitlines()), run.stdout


def test_single_process_needs_no_torchrun(tmp_path: Path, text: Path, environment: dict[str, str]) -> None:
    options = (*TINY, "--data", str(text), "--steps", "4", "--out", str(tmp_path))
    run = run_ranks(1, [*options], environment, under_torchrun=False)
    assert run.returncode == 0, run.stdout
    assert list(losses(tmp_path)["train_loss"]) == [1, 2, 3, 4]
