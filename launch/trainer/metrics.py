"""What a run measures, kept as JSON lines and as TensorBoard events."""

import json
from pathlib import Path
from typing import Any

_FILE_NAME = "metrics.jsonl"


def metrics_file(folder: Path) -> Path:
    """Where the JSON lines of a run are: one object per line, each with its `step`."""
    return folder / _FILE_NAME


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Every line of a run so far, oldest first."""
    with metrics_file(folder).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


class MetricsLog:
    """Written by rank 0 alone; a resumed run goes on where its checkpoint was, later lines are dropped."""

    def __init__(self, folder: Path, resumed_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # by the one rank that writes

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
        """Adds one line, on disk at once: whoever follows the file sees it, and a crash keeps it."""
        self._write_line({"step": step, **values})
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is still buffered."""
        self._file.close()
        self._events.close()

    def _write_line(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
