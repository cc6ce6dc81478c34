"""Runs of the trainer as a user starts them: through launch/torchrun.sh, in processes of their own."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
TORCHRUN = REPOSITORY / "launch" / "torchrun.sh"

# A small run that still has everything: warm-up, accumulation, evaluations before and after averaging begins.
TINY = (
    *("--d-model", "16", "--layers", "2", "--heads", "2", "--context", "16", "--batch", "2"),
    *("--accumulation", "2", "--warmup", "4", "--t0", "3"),
    *("--eval-windows", "8", "--eval-every", "3", "--log-every", "1"),
)


@contextmanager
def started(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, of which nothing is left behind whatever happens to the test."""
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            end(process)


def end(process: subprocess.Popen[str]) -> None:
    """Asks the command to end, then makes it."""
    process.terminate()
    try:
        process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        # torchrun and its ranks live in process groups of their own.
        for left in (process.pid, *descendants(process.pid)):
            with suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        process.communicate(timeout=10)


def descendants(parent: int) -> list[int]:
    """Every process below one, parents before children."""
    below = []
    for child in children(parent):
        below += [child, *descendants(child)]
    return below


def children(parent: int) -> list[int]:
    """The processes that one has started and that still run."""
    listed = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def read_lines(out: Path) -> list[dict[str, Any]]:
    """The metrics of a run."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> dict[str, dict[int, float]]:
    """Each curve of a run, by step."""
    names = ("train_loss", "held_out_last", "held_out_average")
    return {name: {line["step"]: line[name] for line in read_lines(out) if name in line} for name in names}
