"""The scripts that start the trainer: help, launches that fail, and what Slurm is asked for."""

import json
import os
import shutil
import subprocess
from pathlib import Path

from tests.launch.ranks import run_ranks
from tests.launch.runs import REPOSITORY, TORCHRUN


def test_help_of_the_trainer_is_quiet_if_nobody_reads_all_of_it(environment: dict[str, str]) -> None:
    """It is printed without torchrun, which would report a rank that failed."""
    command = f"set -o pipefail; {TORCHRUN} --train-help | head -n 3"
    run = subprocess.run(
        ["bash", "-c", command], env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "Usage: train.py" in run.stdout


def test_a_launch_that_fails_ends_with_its_cause(tmp_path: Path, environment: dict[str, str]) -> None:
    """On the last line, without a traceback of the launcher, and with the status of the rank."""
    command = [str(TORCHRUN), "--nproc", "2", "--", "--out", str(tmp_path), "--stage", "3"]
    run = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    last = run.stderr.splitlines()[-1]
    assert last.startswith("error: rank ")
    assert "Invalid value for '--stage'" in last


def test_a_rank_that_fails_tells_the_launcher(tmp_path: Path, environment: dict[str, str]) -> None:
    """Of an error in training, too, in the file that torchrun names."""
    error = tmp_path / "error.json"
    options = ["--out", str(tmp_path), "--data", "/nowhere"]
    run = run_ranks(1, options, {**environment, "TORCHELASTIC_ERROR_FILE": str(error)})
    assert run.returncode == 1
    assert "no such file or folder: /nowhere" in json.loads(error.read_text())["message"]["message"]


def test_slurm_gives_the_ranks_the_cpus_of_the_job(tmp_path: Path) -> None:
    """The number that the job asked for is passed on to srun, which does not take it by itself."""
    for name, code in (("srun", 'echo "srun $*"'), ("scontrol", "echo node0")):
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n{code}\n")
        file.chmod(0o755)
    script = REPOSITORY / "launch" / "slurm.sbatch"
    assert "\n#SBATCH --cpus-per-task=" in script.read_text()
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node0"}
    job |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "5", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    bash = shutil.which("bash")
    assert bash is not None
    run = subprocess.run([bash, str(script), "--steps", "9"], env=job, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("srun --cpus-per-task=5 ")
    assert run.stdout.endswith("--out runs/slurm-7 --steps 9\n")
