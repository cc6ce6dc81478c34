"""``PendingSave``: a save that a thread of its own makes, while training goes on."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable

from ..comm.tracebacks import release_frames
from .format.paths import AnyPath


class PendingSave:
    """A save in the background. ``wait()`` raises the save's error, the same one on every rank."""

    def __init__(self, path: AnyPath, step: int, work: Callable[[], None]) -> None:
        self.path = path
        self.step = step
        self._work: Callable[[], None] | None = work
        self._failure: BaseException | None = None
        self._may_begin = threading.Event()
        # Not a daemon: the interpreter does not end before the checkpoint is whole.
        self._thread = threading.Thread(target=self._run, name=f"dist_asgd save of {path.name}")
        atexit.register(self._wait_at_exit)
        try:
            self._thread.start()
        finally:
            # Also if a signal interrupts start(): the interpreter waits for this thread at exit.
            self._may_begin.set()

    def _run(self) -> None:
        # A new thread would keep the interpreter lock for 5 ms; waiting gives it back to the training loop at once.
        self._may_begin.wait()
        # The work refers to the state: drop it when the thread ends, although the caller may keep this object longer.
        work, self._work = self._work, None
        assert work is not None
        try:
            work()
        except BaseException as error:
            release_frames(error)
            self._failure = error
        finally:
            del work

    def done(self) -> bool:
        """Whether this rank's work has ended, with or without an error."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the checkpoint is whole, on disk. Its error is raised once: here, in the next save or at exit."""
        self._thread.join()
        atexit.unregister(self._wait_at_exit)
        failure, self._failure = self._failure, None
        try:
            if failure is not None:
                raise failure
        finally:
            # The traceback of the error refers to this frame.
            del failure

    def _wait_at_exit(self) -> None:
        """Raise the error of a save that nobody has waited for, so that it is at least printed."""
        self.wait()
