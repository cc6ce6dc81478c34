"""A thread that waits for other ranks, and does what they wait for, while the training loop goes on.

It runs the tasks of collectives in the order of their launches. Waiting happens below Python, without its lock.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import torch
import torch.distributed as dist

# The smallest double above 0. A processor that takes such numbers for 0 (torch.set_flush_denormal) does so by thread.
_DENORMAL = 5e-324
# So often whoever waits for a task looks for other reasons to stop, in seconds.
CHECK_S = 0.05


class Task(ABC):
    """What this rank waits for, or owes to other ranks, in one collective."""

    def __init__(self) -> None:
        self._has_ended = threading.Event()
        self._error: Exception | None = None

    @abstractmethod
    def run(self) -> None:
        """Do it. RuntimeError if another rank ends, fails, or does not come in time."""

    @abstractmethod
    def cancel(self) -> None:
        """Let the ranks fail that wait for this task; called if ``run`` has failed, or if a task before it has."""

    @property
    def has_ended(self) -> bool:
        """Whether ``wait`` would return, or raise, at once."""
        return self._has_ended.is_set()

    def wait(self, check: Callable[[], None] | None = None) -> None:
        """Wait until the task has ended. RuntimeError if it, or one before it, has failed.

        ``check`` is called now and then meanwhile, and raises if nobody should wait any longer.
        """
        while not self._has_ended.wait(None if check is None else CHECK_S):
            assert check is not None
            check()
        if self._error is not None:
            raise RuntimeError(str(self._error)) from self._error

    def complete(self, failure: Exception | None) -> Exception | None:
        """Run the task, or cancel it if there was a ``failure`` before; returns the failure so far. Thread only."""
        try:
            if failure is None:
                self.run()
        # Whatever it is: the loop that waits for the task gets it.
        except Exception as error:
            # Without its traceback, which refers to the task and its memory.
            failure = error.with_traceback(None)
        if failure is not None:
            # Nothing may end the thread: whoever waits for a later task would do so for ever.
            with contextlib.suppress(Exception):
                self.cancel()
        self._error = failure
        self._has_ended.set()
        return failure


class Messages(Task):
    """The wait for messages of Gloo, which tells nobody whether they have arrived."""

    def __init__(self, works: Sequence[dist.Work]) -> None:
        super().__init__()
        self._works = works

    def run(self) -> None:
        for work in self._works:
            work.wait()

    def cancel(self) -> None:
        """No other rank waits for this task: what this one sends was posted when it was launched."""


class ProgressThread:
    """Runs tasks one after the other, from the first on; it ends once this object is gone and all tasks are done.

    After a task that has failed all later ones fail: the ranks no longer agree on what has been read.
    """

    def __init__(self) -> None:
        """Start nothing yet."""
        self._tasks: SimpleQueue[tuple[Task, bool] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        weakref.finalize(self, self._tasks.put, None).atexit = False

    def submit(self, task: Task) -> None:
        """Let the thread run ``task`` after all others. Nobody waits."""
        if self._thread is None:
            # A daemon: a process that ends does not wait for ranks that may never come.
            self._thread = threading.Thread(target=_run, args=(self._tasks,), name="dist_asgd progress", daemon=True)
            self._thread.start()
        self._tasks.put((task, _DENORMAL * 1.0 == 0))


@torch.no_grad()
def _run(tasks: SimpleQueue[tuple[Task, bool] | None]) -> None:
    """The thread. Not a method, which would keep its object."""
    failure: Exception | None = None
    flushes = False
    while (submitted := tasks.get()) is not None:
        if submitted[1] != flushes:
            # Sums have the bits that they would have in the training loop.
            flushes = submitted[1]
            torch.set_flush_denormal(flushes)
        failure = submitted[0].complete(failure)
        # While the thread waits for the next one, nobody else may need the memory of this one.
        del submitted
