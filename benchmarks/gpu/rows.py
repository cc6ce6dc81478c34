"""The rows of the report: what a part has found, one line of JSON each, so that a part that dies loses none of them."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

PASS, FAIL, NOTE = "PASS", "FAIL", "NOTE"
# The implementations by name, with the arguments that choose them.
FORMS: dict[str, dict[str, Any]] = {
    "foreach": {"foreach": True},
    "forloop": {"foreach": False, "fused": False},
    "fused": {"fused": True},
}
# What marks a row on the output of a part, among other things that are printed there.
_MARK = "row of the report: "


@dataclass(frozen=True)
class Row:
    """One line of the report: ``result`` is PASS, FAIL, NOTE or a number with its unit; ``details`` may be empty."""

    part: str
    what: str
    result: str
    details: str = ""


class Part:
    """One part of the session at work: prints its rows as soon as it has them. ``cpu``: only try the part out."""

    def __init__(self, name: str, cpu: bool) -> None:
        self.name = name
        self.cpu = cpu
        self.device = torch.device("cpu") if cpu else torch.device("cuda", 0)

    def add(self, what: str, result: str, details: str = "") -> None:
        """Add a row."""
        row = Row(self.name, what, result, details)
        print(_MARK + json.dumps(asdict(row)), flush=True)

    def check(self, what: str, holds: bool, details: str = "") -> None:
        """Add a row that says whether something holds; ``details`` are for when it does not."""
        self.add(what, PASS if holds else FAIL, "" if holds else details)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Add a row for an exception, and go on after it."""
        try:
            yield
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            self.add(what, FAIL, f"{type(error).__name__}: {error} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})")

    def wait(self) -> None:
        """Wait until the device is idle."""
        if not self.cpu:
            torch.cuda.synchronize()


def rows_in(output: str) -> list[Row]:
    """The rows that a part has printed."""
    lines = (line.removeprefix(_MARK) for line in output.splitlines() if line.startswith(_MARK))
    return [Row(**json.loads(line)) for line in lines]


def one_line(text: str) -> str:
    """``text`` as a cell of a table."""
    return " ".join(text.replace("|", "\\|").split())[:400]


def median(values: Iterable[float]) -> float:
    """The median of some seconds."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
