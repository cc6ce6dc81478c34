"""Starts the ranks of a benchmark as processes on this machine, which stay alive and run one call after another.

Vocabulary
    team   the ranks of one process group: fresh Python processes, one compute thread each, joined by Gloo
    actor  the object that lives in every rank of a team, built by ``factory(rank, world_size, *args)``

Peers are interleaved step by step although each has a team, and therefore processes and heaps, of its own: a rank that
is not called waits in a read and takes no processor time.

Ranks are fresh processes (``start="spawn"``), or forks of a process that has imported torch and waits
(``start="forkserver"``), which start in a tenth of the time. Code that was imported before a fork counts for the memory
of a fork only when the fork touches it, so memory above a process without it needs fresh ones.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANK_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
TIMEOUT = timedelta(seconds=120)
# Longer than the group's timeout: an error of the group tells more than this one does.
ANSWER_SECONDS = 600.0
PRELOADED = ["torch._dynamo", "torch.distributed.fsdp", "benchmarks.trainer", "dist_asgd"]


class Team:
    """``world_size`` rank processes, each with one actor. A team is a context manager, which ends its processes.

    ``environment`` is set before the processes start, since glibc reads its ``MALLOC_*`` variables only then; a fork
    sets it itself, which is too late for those. Each process first calls ``entrance`` with its rank, before it joins
    the group. ``start`` is "spawn" or "forkserver".
    """

    def __init__(
        self,
        factory: Callable[..., Any],
        world_size: int,
        *args: Any,
        environment: Mapping[str, str] | None = None,
        entrance: Callable[[int], None] | None = None,
        start: str = "spawn",
    ) -> None:
        context: Any = mp.get_context(start)
        if start == "forkserver":
            context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.TemporaryDirectory(prefix="dist_asgd_bench_")
        self._connections: list[Connection] = []
        self._processes = []
        variables = {**RANK_ENVIRONMENT, **(environment or {})}
        with _environment(variables):
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_rank_main,
                    args=(theirs, self._folder.name, factory, rank, world_size, args, entrance, variables),
                    daemon=True,
                )
                process.start()
                theirs.close()
                self._connections.append(ours)
                self._processes.append(process)

    def wait_ready(self) -> None:
        """Return once every actor is built. Raises RuntimeError if building one of them failed."""
        self._receive()

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every rank's actor at once, and return the results in the order of the ranks.

        If a rank fails, the team is ended and RuntimeError is raised with the rank's traceback.
        """
        for connection in self._connections:
            connection.send((method, args))
        return self._receive()

    def _receive(self) -> list[Any]:
        """Receive one result from every rank; the first failure ends the team."""
        results = []
        for rank, connection in enumerate(self._connections):
            try:
                if connection.poll(ANSWER_SECONDS):
                    result, error = connection.recv()
                else:
                    result, error = None, f"no answer within {ANSWER_SECONDS:.0f} s"
            except (EOFError, ConnectionResetError):
                result, error = None, "the process ended without an answer"
            if error is not None:
                self.kill()
                raise RuntimeError(f"rank {rank}: {error}")
            results.append(result)
        return results

    def kill(self) -> None:
        """End the processes of this team at once."""
        for process in self._processes:
            process.kill()

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process in self._processes:
            process.join(30)
        self.kill()
        self._folder.cleanup()


def _rank_main(
    connection: Connection,
    folder: str,
    factory: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    entrance: Callable[[int], None] | None,
    variables: Mapping[str, str],
) -> None:
    """The main function of a rank: join the group, build the actor, run calls, and leave with the other ranks."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        if entrance is not None:
            entrance(rank)
        store = dist.FileStore(str(Path(folder, "store")), world_size)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
        actor = factory(rank, world_size, *args)
        connection.send((None, None))
        while (call := connection.recv()) is not None:
            method, arguments = call
            connection.send((getattr(actor, method)(*arguments), None))
    except (EOFError, KeyboardInterrupt):
        return
    except BaseException:
        # The team raises it: a traceback on this process's stderr would tear the progress line.
        connection.send((None, traceback.format_exc()))
        return
    dist.barrier()  # a rank that leaves early can abort the others
    dist.destroy_process_group()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for processes that are started in the block, then restore the old ones."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
