"""Displays the progress of a run on rank 0: a bar on a terminal, and plain lines elsewhere."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_NUM_PLAIN_LINES = 20


class ProgressDisplay:
    """A progress bar or progress lines. It displays nothing if `console` is None, as on every rank but the first."""

    def __init__(self, console: Console | None, *, total: int, done: int) -> None:
        self._console = console
        self._total = total
        self._plain_every = max(1, total // _NUM_PLAIN_LINES)
        self._bar: Progress | None = None
        if console is not None and console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=console,
            )
            self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> "ProgressDisplay":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, step: int, *, text: str) -> None:
        """Display the latest figures as `text`; to be called after every step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif self._console is not None and (step % self._plain_every == 0 or step == self._total):
            self.note(f"step {step}/{self._total}  {text}")

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self._console is not None:
            self._console.print(text, highlight=False, soft_wrap=True)
