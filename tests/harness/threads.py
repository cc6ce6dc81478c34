"""Runs ranks as threads of this process, on torch's threaded process group. A job takes about 0.01 s.

This is the only file that uses ``torch.testing._internal``. Peer-to-peer operations and ``DistributedDataParallel`` do
not work here; use ``processes``. Backward on CPU tensors runs in the thread that called it, so autograd hooks run in
the thread of their rank.

A rank that raises does not end the others at once, as in torch's own harness. The others get ``GRACE_S`` seconds to
raise too, so that tests can distinguish an error on every rank from an error on one while the others hang.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

from tests.harness.outcome import Outcome, RankError

GRACE_S = 3.0


def outcomes_of_threads(world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Outcome]:
    """Run ``fn(rank, world_size, *args)`` on every rank and return every outcome, in rank order."""
    started = time.monotonic()
    found: list[Outcome | None] = [None] * world_size
    store = dist.HashStore()

    def work(rank: int) -> None:
        value, error = None, None
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
            value = fn(rank, world_size, *args)
        except SystemExit:
            error = RankError(rank, "RankHung", "still waiting in a collective when the job was ended", "")
        except BaseException as raised:
            error = RankError.of(rank, raised)
        found[rank] = Outcome(rank, value, error, time.monotonic() - started)
        dist.destroy_process_group()

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    _install_threaded_pg()
    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(world_size)]
    try:
        for thread in threads:
            thread.start()
        _wait(threads, found, started + timeout_s)
    finally:
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    stuck = RankError(-1, "RankHung", f"did not end within {timeout_s} s, nor when told to", "")
    return [o if o is not None else Outcome(r, None, stuck, timeout_s) for r, o in enumerate(found)]


def _wait(threads: list[threading.Thread], found: list[Outcome | None], deadline: float) -> None:
    """Join all threads. Once a rank has failed, the others have ``GRACE_S``; then their collective calls are ended."""
    while any(t.is_alive() for t in threads):
        for thread in threads:
            thread.join(0.002)
        if any(o is not None and o.error is not None for o in found):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline:
            ProcessLocalGroup.exception_handle(TimeoutError())
            for thread in threads:
                thread.join(2.0)
            return
