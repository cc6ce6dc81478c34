"""Runs of scripts without torchrun: their ranks are started as torchrun does, but have torch loaded already."""

import gc
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.harness.processes import loaded_context, no_main_module
from tests.launch.runs import REPOSITORY

TRAIN = REPOSITORY / "launch" / "trainer" / "train.py"
TIMEOUT_S = 120.0
_kept: dict[str, Any] = {}


def run_ranks(
    world_size: int,
    arguments: list[str],
    common: dict[str, str],
    script: Path = TRAIN,
    cwd: Path | None = None,
    under_torchrun: bool = True,
    meanwhile: Callable[[list[int]], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """A script's command line on ``world_size`` ranks, to its end: the worst status, and what all ranks wrote.

    ``script``: the trainer unless given. ``common``: what the environment of each has besides its rank. ``cwd``: the
    folder to run in, if not this one. ``under_torchrun=False``: as ``python SCRIPT``, in one process without a rank.
    ``meanwhile``: is called with the ids of the processes, in rank order, while they run.
    """
    context = loaded_context()
    # Ranks meet at the launcher's store, as under torchrun: no port is looked for that another may take meanwhile.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    meeting |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    with tempfile.NamedTemporaryFile("r") as output:
        ranks = []
        with no_main_module():
            for rank in range(world_size):
                places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
                environment = {**common, **meeting, **{name: str(value) for name, value in places.items()}}
                command = [str(script), *arguments]
                started = (command, environment if under_torchrun else common, output.name, cwd)
                process = context.Process(target=_rank, args=started)
                process.start()
                ranks.append(process)
        try:
            if meanwhile is not None:
                meanwhile([process.pid or 0 for process in ranks])
        finally:
            _join(ranks, script.name)
        status = max((process.exitcode or 0 for process in ranks), key=abs)
        return subprocess.CompletedProcess([str(script), *arguments], status, output.read())


def _join(ranks: list[ForkServerProcess], name: str) -> None:
    """Wait for all of them; none is left behind."""
    deadline = time.monotonic() + TIMEOUT_S
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join()
    if hung:
        raise TimeoutError(f"ranks {hung} of {name} were still running after {TIMEOUT_S} s")


def _rank(command: list[str], environment: dict[str, str], output: str, cwd: Path | None) -> None:
    """``python SCRIPT ARGUMENT...`` in this process."""
    # What was loaded before stays: a search for cycles, as at the end of a run, need not look at it.
    gc.freeze()
    with open(output, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ |= environment
    os.chdir(cwd or ".")
    sys.argv = command
    # As for a script: it imports what lies beside it.
    sys.path.insert(0, str(Path(command[0]).parent))
    # The script's objects live until the process ends, as they do without this harness. If the last reference to a
    # process group went here, its destructor would wait, with the GIL, for a thread that needs the GIL.
    _kept.update(runpy.run_path(command[0], run_name="__main__"))
