"""Runs a job on ranks that are threads or Gloo processes: ``run`` returns values, ``run_errors`` errors.

A world size of 1 with backend ``"none"`` runs in the calling process without a process group.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tests.harness.outcome import Outcome, RankError, errors, values
from tests.harness.processes import outcomes_of_processes
from tests.harness.threads import outcomes_of_threads


def outcomes(
    backend: str, world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 60.0
) -> list[Outcome]:
    """Run ``fn(rank, world_size, *args)`` on every rank and return the outcomes in rank order."""
    if backend == "threads":
        return outcomes_of_threads(world_size, fn, *args, timeout_s=timeout_s)
    if backend == "gloo":
        return outcomes_of_processes(world_size, fn, *args, timeout_s=timeout_s)
    assert backend == "none", f"no such backend: {backend}"
    assert world_size == 1, "several ranks need a process group"
    started = time.monotonic()
    try:
        return [Outcome(0, fn(0, 1, *args), None, time.monotonic() - started)]
    except Exception as raised:
        return [Outcome(0, None, RankError.of(0, raised), time.monotonic() - started)]


def run(backend: str, world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Run a job and return every rank's value; fails with every traceback if a rank raised, hung or died."""
    return values(outcomes(backend, world_size, fn, *args, timeout_s=timeout_s))


def run_errors(
    backend: str, world_size: int, fn: Callable[..., Any], *args: Any, within_s: float = 10.0
) -> list[RankError]:
    """Run a job and return every rank's error; fails unless every rank raised within ``within_s`` seconds."""
    return errors(outcomes(backend, world_size, fn, *args), within_s)
