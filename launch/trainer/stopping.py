"""Lets Ctrl-C and SIGTERM end a run after the step that is under way."""

import signal
from types import FrameType


class StopRequest:
    """Remembers the first signal that asked this process to end; later signals change nothing.

    A signal may reach one rank only. Therefore the ranks exchange `signal_name` after every step, and stop together.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
