"""Averages on CPUs that have no memory before they are written, so that what happens on GPUs is tested without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

from dist_asgd.storage.average import AverageMemory


@contextmanager
def deferred_averages() -> Iterator[None]:
    """Inside, every new state buffer has a placeholder in the place of its average, and memory only when it needs it.

    Called before ranks that are threads begin, and by each rank that is a process.
    """
    with mock.patch.object(AverageMemory, "defers_average", True):
        yield


def as_device(rank: int, world_size: int, job: Callable[..., Any], *args: Any) -> Any:
    """Job: another job inside of ``deferred_averages``; for ranks that are processes."""
    with deferred_averages():
        return job(rank, world_size, *args)


def maybe_deferred(deferred: bool) -> Any:
    """``deferred_averages`` or nothing."""
    return deferred_averages() if deferred else nullcontext()
