"""The trainer's closing report: what its picture and its table say about the average."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from tests.launch.runs import REPOSITORY

# (loss of the last iterate, loss of the average or None, iterates in the average) at the end of a run with t0 = 60.
ENDS = {"better": (1.6, 1.5, 39), "worse": (1.5, 1.6, 39), "not begun": (1.6, None, 0)}
ends = pytest.mark.parametrize(("last", "average", "iterates"), list(ENDS.values()), ids=list(ENDS))


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The trainer's module."""
    monkeypatch.syspath_prepend(REPOSITORY / "launch" / "trainer")
    return importlib.import_module("report")


def facts_of(report: ModuleType) -> Any:
    """A run of 100 steps on two ranks."""
    return report.Facts("byte transformer", 186_944, "byte", "zero2", 2, "cpu", 100, 2.0, "constant", 60)


def drawn(report: ModuleType, folder: Path, lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The figure that is drawn of these metrics, instead of its file."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _file: figures.append(figure))
    assert report.draw_losses(folder, facts_of(report)) == folder / "losses.png"
    return figures[0]


@ends
def test_the_picture_has_facts_end_values_and_a_zoomed_tail(
    report: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    last: float,
    average: float | None,
    iterates: int,
) -> None:
    """The curve of the average begins where averaging does."""
    lines: list[dict[str, Any]] = [{"step": step, "train_loss": 5.0 - step / 40} for step in range(10, 101, 10)]
    for step in (20, 40, 60, 80, 100):
        begun = step >= 80 and average is not None
        line = {"step": step, "held_out_last": 4.0 if step < 60 else last + 0.2 * (100 - step) / 20}
        lines.append(line | ({"held_out_average": average} if begun else {}) | {"averaged_steps": iterates * begun})
    figure = drawn(report, tmp_path, lines, monkeypatch)
    title = figure.get_suptitle()
    for fact in ("186,944 parameters", "zero2 on 2 ranks (cpu)", "100 steps, lr 2 (constant), t0 60"):
        assert fact in title
    whole, tail = figure.axes
    begin, end = tail.get_xlim()
    assert (begin, end) == (60, pytest.approx(100, abs=1))
    lowest, _ = tail.get_ylim()
    if average is not None:
        assert 0.9 * min(last, average) < lowest < min(last, average)
    written = {text.get_text() for text in tail.texts}
    assert written == {f"last iterate {last:.4f}", *([f"average {average:.4f}"] if average is not None else [])}
    curves = {line.get_label(): list(line.get_xdata()) for line in whole.lines}
    assert curves["held out, last iterate"] == [20, 40, 60, 80, 100]
    assert curves.get("held out, average") == ([80, 100] if average is not None else None)
    gap = "averaging has not begun" if average is None else f"{'worse' if average > last else 'better'} by 0.1000"
    assert gap in tail.get_title()


@ends
def test_the_table_says_what_became_of_the_average(
    report: ModuleType, capsys: pytest.CaptureFixture[str], last: float, average: float | None, iterates: int
) -> None:
    """It has no loss of an average that has not begun, and a note if the average is the worse one."""
    memory = report.Memory(1000, 500, 500, 3000, 0)
    evaluation = report.Evaluation(100, last, average, iterates)
    summary = report.Summary(
        facts_of(report), 100, None, 1.7, evaluation, 1e4, iterates, "float32", [memory], memory, []
    )
    report.print_summary(Console(width=80), summary)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert ("not begun" in text) == (average is None)
    assert ("average - last iterate" in text) == (average is not None)
    assert ("the average is worse than the last iterate" in text) == (average is not None and average > last)
    assert ("iterates in the average" in text) == (average is not None)
    assert "0.0000" not in text
    assert "in flight: buffers for buckets that travel between ranks" in " ".join(text.split())
