"""Runs ranks as processes on Gloo, in one pool per world size and test session. A job takes about 0.02 s.

Processes come from a ``forkserver`` that has torch and DTensors loaded. They rendezvous by a ``FileStore``, without
ports, and have one thread each. A job is a picklable module-level function. A job that raised an error may leave the
process group in any state, so the processes then make a new group. A job in which a rank hung or died ends the whole
pool; the next job starts a new one.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_asgd.comm import shared_pages
from tests.harness.outcome import Outcome, RankError

GROUP_TIMEOUT_S = 20.0
JOB_TIMEOUT_S = 60.0
# Groups that jobs have made (for meshes and checkpoints) keep threads and connections, and fill the store. Beyond this
# number of groups the ranks destroy all of them and make a new default group.
MAX_GROUPS = 16
# What FSDP1 and device meshes leave behind keeps threads of Gloo, each of which wakes a hundred times a second. Beyond
# this number of threads a rank had better be a new process.
MAX_THREADS = 40
_STOP, _REGROUP, _JOB = "stop", "regroup", "job"
# Modules that jobs would otherwise load in every rank. torch's optimizers load the compiler in their first step, typer
# loads pydantic to parse, and the trainer draws and logs on its first rank. Modules that are missing are left out.
_PRELOADED = ["torch.distributed.tensor", "torch._dynamo", "pytest", "hypothesis", "dist_asgd.checkpoint.manager"]
_PRELOADED += ["typer.rich_utils", "pydantic.types", "pydantic.type_adapter", "rich.progress"]
_PRELOADED += ["matplotlib.figure", "matplotlib.backends.backend_agg", "torch.utils.tensorboard"]

_pools: dict[int, ProcessPool] = {}


def outcomes_of_processes(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = JOB_TIMEOUT_S
) -> list[Outcome]:
    """Run ``fn(rank, world_size, *args)`` on every rank of a pool, and return the outcomes in rank order."""
    pool = _pools.get(world_size)
    if pool is None:
        pool = _pools[world_size] = ProcessPool(world_size)
    outcomes = pool.run(fn, args, timeout_s)
    if pool.broken:
        del _pools[world_size]
    return outcomes


@atexit.register
def close_pools() -> None:
    """End the processes of every pool of this session."""
    while _pools:
        _pools.popitem()[1].close()


class ProcessPool:
    """``world_size`` processes with one Gloo group, which run one job after the other."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.broken = False
        self._folder = Path(tempfile.mkdtemp(prefix="dist_asgd_ranks_"))
        self._num_groups = 0
        self._open_groups = 0
        self._num_threads = 0
        self._next_names: set[tuple[int, int]] = set()
        context = loaded_context()
        self._connections: list[Connection] = []
        self._processes = []
        with no_main_module():
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(theirs, rank, world_size, str(self._folder)), daemon=True
                )
                process.start()
                theirs.close()
                self._connections.append(ours)
                self._processes.append(process)
        self._command(_REGROUP, self._next_group_path())

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout_s: float) -> list[Outcome]:
        """Run one job on every rank. On return the pool is ready for the next job, or ``broken``."""
        self._next_names.clear()
        outcomes = self._command(_JOB, (fn, args), timeout_s)
        if self.broken:
            self._kill()
        elif (
            self._open_groups > MAX_GROUPS
            # Ranks on which the next group would have different names would never find each other.
            or len(self._next_names) > 1
            or any(o.error is not None for o in outcomes)
        ):
            self._command(_REGROUP, self._next_group_path())
            if self._num_threads > MAX_THREADS:
                self.close()
                self.broken = True
        return outcomes

    def close(self) -> None:
        """Make every rank destroy its group and exit; kill processes that do not."""
        with contextlib.suppress(OSError):
            for connection in self._connections:
                connection.send_bytes(pickle.dumps((_STOP, None)))
        for process in self._processes:
            process.join(5.0)
        self._kill()

    def _command(self, kind: str, payload: Any, timeout_s: float = JOB_TIMEOUT_S) -> list[Outcome]:
        """Send a command to every rank and collect one reply from each; a rank that hangs or dies gets an error."""
        started = time.monotonic()
        message = pickle.dumps((kind, payload))
        for connection in self._connections:
            connection.send_bytes(message)
        outcomes: dict[int, Outcome] = {}
        while len(outcomes) < self.world_size:
            missing = {self._connections[r]: r for r in range(self.world_size) if r not in outcomes}
            ready = wait(list(missing), timeout=max(0.0, started + timeout_s - time.monotonic()))
            if not ready:
                self.broken = True
                for rank in missing.values():
                    stack = self._stack_of(rank)
                    error = RankError(rank, "RankHung", f"no answer within {timeout_s} s", stack)
                    outcomes[rank] = Outcome(rank, None, error, time.monotonic() - started)
            for connection in ready:
                rank = missing[connection]
                seconds = time.monotonic() - started
                try:
                    value, error, *counts = pickle.loads(connection.recv_bytes())
                    self._open_groups, next_name, self._num_threads = counts
                    self._next_names.add(next_name)
                except (EOFError, ConnectionError):
                    self.broken = True
                    self._processes[rank].join(5.0)
                    error = RankError(rank, "RankDied", f"exit code {self._processes[rank].exitcode}", "")
                    value = None
                outcomes[rank] = Outcome(rank, value, error, seconds)
        return [outcomes[rank] for rank in range(self.world_size)]

    def _next_group_path(self) -> str:
        self._num_groups += 1
        return str(self._folder / f"group{self._num_groups}")

    def _stack_of(self, rank: int) -> str:
        """The stack of a hung rank, as its own faulthandler writes it."""
        path = _stack_path(self._folder, rank)
        pid = self._processes[rank].pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline and not path.stat().st_size:
            time.sleep(0.05)
        return path.read_text()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join(5.0)
        for connection in self._connections:
            connection.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def loaded_context() -> ForkServerContext:
    """A context that starts processes which have loaded the modules that jobs use."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


@contextlib.contextmanager
def no_main_module() -> Iterator[None]:
    """Keep ``multiprocessing`` from importing pytest's command line again in every rank."""
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    for name in kept:
        setattr(main, name, None)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(main, name, value)


def _stack_path(folder: Path, rank: int) -> Path:
    return folder / f"stack{rank}.txt"


# With three ranks tests run on messages. With four they run as on two hosts: in memory inside of each, and on messages
# between them. With other numbers they share the memory of one host. So all three are tested.
MESSAGES_ONLY, TWO_HOSTS = 3, 4


def _serve(connection: Connection, rank: int, world_size: int, folder: str) -> None:
    """The main function of a rank: read commands, run them and reply, until a stop command or the parent's end."""
    host = f"host{rank // 2}" if world_size == TWO_HOSTS else str(int(world_size != MESSAGES_ONLY))
    os.environ[shared_pages.ENVIRONMENT] = host
    torch.set_num_threads(1)
    gc.freeze()
    with _stack_path(Path(folder), rank).open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
        while True:
            try:
                command = connection.recv_bytes()
            except EOFError:
                return
            value, error = None, None
            try:
                kind, payload = pickle.loads(command)
                if kind == _JOB:
                    fn, args = payload
                    value = fn(rank, world_size, *args)
                elif kind == _REGROUP:
                    _regroup(rank, world_size, payload)
                else:
                    dist.barrier()
                    dist.destroy_process_group()
                    return
                # torch names a group by the number of those that this rank has made before, or is in.
                world = dist.distributed_c10d._world
                next_name = (world.group_count, len(world.pg_names))
                answer = pickle.dumps((value, None, len(world.pg_names), next_name, _count_threads()))
            except BaseException as raised:
                error = RankError.of(rank, raised)
                answer = pickle.dumps((None, error, 0, (0, 0), 0))
            connection.send_bytes(answer)


def _count_threads() -> int:
    """The threads of this process, those of Gloo included; 0 if the system does not tell."""
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0


def _regroup(rank: int, world_size: int, path: str) -> None:
    """Make a new default group. No rank is in a collective call of the old one any more."""
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()
        # Imported here because the ranks need it and the parent does not. DTensors cache facts about a mesh for equal
        # meshes, including the names of its groups, which do not exist any more.
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(path, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=GROUP_TIMEOUT_S),
    )
