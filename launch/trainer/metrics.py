"""Writes a run's metrics as JSON lines and as TensorBoard events, and reads them back."""

import json
from pathlib import Path
from typing import Any

_FILE_NAME = "metrics.jsonl"


def metrics_file(folder: Path) -> Path:
    """The file with the JSON lines of a run: one object per line, each with its `step`."""
    return folder / _FILE_NAME


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read every line of a run so far, oldest first."""
    with metrics_file(folder).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


class MetricsLog:
    """The metrics of a run, which rank 0 alone writes. A resumed run drops lines that are later than its checkpoint."""

    def __init__(self, folder: Path, resumed_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imported late, as only rank 0 writes

        folder.mkdir(parents=True, exist_ok=True)
        kept = []
        if resumed_step is not None and metrics_file(folder).exists():
            kept = [line for line in read_metrics(folder) if line["step"] <= resumed_step]
        self._file = metrics_file(folder).open("w", encoding="utf-8")
        for line in kept:
            self._write_line(line)
        purged = None if resumed_step is None else resumed_step + 1
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=purged)

    def write(self, step: int, **values: float) -> None:
        """Add one line. It is flushed at once, so that one can follow the file and a crash does not lose it."""
        self._write_line({"step": step, **values})
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Write buffered events and close both files."""
        self._file.close()
        self._events.close()

    def _write_line(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
