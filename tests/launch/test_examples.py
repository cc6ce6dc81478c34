"""The examples run as their first lines say, go on where they stopped, and agree with each other."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.ranks import run_ranks
from tests.launch.runs import REPOSITORY

EXAMPLES = REPOSITORY / "launch" / "examples"
NAMES = ("plain_ddp", "stage2", "fsdp2")


def losses(output: str) -> list[float]:
    """The loss of the last iterate and that of the average, from the line that an example ends with."""
    return [float(number) for number in re.findall(r"\d+\.\d{4}", output.splitlines()[-1])]


def start(script: Path, steps: int, out: Path, environment: dict[str, str]) -> str:
    """Run an example on 2 ranks without torchrun, which takes seconds to load; returns what it printed."""
    run = run_ranks(2, ["--steps", str(steps), "--out", str(out)], environment, script)
    assert run.returncode == 0, run.stdout
    return run.stdout


def torchrun(arguments: list[str], out: Path, environment: dict[str, str]) -> str:
    """Run 3 steps as a user does; returns what the ranks printed."""
    command = [sys.executable, "-m", "torch.distributed.run", *arguments, "--steps", "3", "--out", str(out)]
    run = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> list[float]:
    """The losses of the plain example after 6 steps."""
    out = tmp_path_factory.mktemp("uninterrupted")
    return losses(start(EXAMPLES / "plain_ddp.py", 6, out, environment))


@pytest.mark.parametrize("name", NAMES)
def test_an_example_trains_resumes_and_exports(
    tmp_path: Path, environment: dict[str, str], uninterrupted: list[float], name: str
) -> None:
    """First with the command of its docstring, then once more: losses as of the plain example without a stop."""
    script = EXAMPLES / f"{name}.py"
    found = re.search(rf"^ +torchrun (.* launch/examples/{name}\.py) --steps \d+$", script.read_text(), re.MULTILINE)
    assert found is not None, "the docstring has no command"
    # Loading torchrun takes seconds, and does the same for all of them.
    assert found[1] == f"--standalone --nproc-per-node 2 launch/examples/{name}.py"
    if name == "stage2":
        first = torchrun(shlex.split(found[1]), tmp_path, environment)
    else:
        first = start(script, 3, tmp_path, environment)
    assert "steps 1 to 3: " in first
    second = start(script, 6, tmp_path, environment)
    assert "steps 4 to 6: " in second
    assert losses(second) == pytest.approx(uninterrupted, abs=2e-4)
    assert (tmp_path / "averaged.safetensors").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short(name: str) -> None:
    """A reader takes it in at a glance."""
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 80


def test_an_example_that_fails_tells_the_launcher_the_cause(tmp_path: Path, environment: dict[str, str]) -> None:
    """``@record`` writes the error to the file that torchrun names, and torchrun shows it last."""
    (tmp_path / "checkpoints").write_text("no folder")
    error = tmp_path / "error.json"
    options = ["--steps", "1", "--out", str(tmp_path)]
    run = run_ranks(1, options, {**environment, "TORCHELASTIC_ERROR_FILE": str(error)}, EXAMPLES / "stage2.py")
    assert run.returncode != 0
    cause = json.loads(error.read_text())["message"]["message"]
    assert "checkpoints" in cause
    assert "Error" in cause
