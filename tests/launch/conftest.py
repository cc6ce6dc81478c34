"""Fixtures of the trainer's tests."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.ranks import run_ranks
from tests.launch.runs import TINY, TORCHRUN, started


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text with something to learn in it."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"{number} times {number} is {number * number}\n" for number in range(2000)))
    return file


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Runs with this Python, whatever torchrun.sh would choose, on CPUs."""
    return {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session")
def train(text: Path, environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the trainer to its end, on two ranks if nothing else is said, and returns its status and output."""

    def run(*arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
        return run_ranks(ranks, [*TINY, "--data", str(text), *arguments], environment)

    return run


@pytest.fixture(scope="session")
def torchrun(text: Path, environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same on two ranks as a user does it, through launch/torchrun.sh; most of that time is loading torch."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(TORCHRUN), "--nproc", "2", "--", *TINY, "--data", str(text), *arguments]
        with started(command, environment) as process:
            output, _ = process.communicate(timeout=120)
        return subprocess.CompletedProcess(command, process.returncode, output)

    return run
