"""Where the figures of ``benchmarks.step`` go: files, a picture, and the tables of the README and of the docs.

A page has its copy of the table at a glance between two comments, ``<!-- benchmarks.step: KEYS -->`` and
``<!-- end -->``, with the keys of the settings that it shows, or without keys all of them. Nobody edits the copy by
hand, and a test compares it with the figures in ``benchmarks/results/step.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import step_report
from benchmarks.peers import peer_of
from benchmarks.settings import Setting

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
_COPY = re.compile(r"(<!-- benchmarks\.step(?:: ([^>]+))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)
OURS, THEIRS = "#2458a6", "#b9bec6"
COLUMNS = 3


def write(report: Mapping[str, Any], markdown: Path | None, figures: Path | None, picture: Path | None) -> None:
    """Write the report, its figures and its picture to the paths that are not None."""
    if markdown:
        markdown.write_text(step_report.as_markdown(report))
    if figures:
        figures.write_text(json.dumps(report, indent=1) + "\n")
    if picture:
        draw(report, picture)


def publish(report: Mapping[str, Any]) -> None:
    """Write all of it to ``benchmarks/results``, and the table at a glance to the pages that show it.

    Raises ValueError, before anything is written, if a page shows a setting that was not measured.
    """
    texts = [with_copy(page.read_text(), report) for page in PAGES]
    write(report, RESULTS / "step.md", RESULTS / "step.json", RESULTS / "step.svg")
    for page, text in zip(PAGES, texts, strict=True):
        page.write_text(text)


def with_copy(page: str, report: Mapping[str, Any]) -> str:
    """A page's text with the table at a glance of this report.

    Raises ValueError if the page has no place for it, or shows a setting that the report does not have.
    """
    places = list(_COPY.finditer(page))
    if len(places) != 1:
        raise ValueError(
            f"wanted one place between <!-- benchmarks.step --> and <!-- end --> in the page, got {len(places)}; "
            "put both comments where the table belongs"
        )
    (place,) = places
    keys = (place[2] or "").split()
    if missing := [key for key in keys if not report["settings"].get(key, {}).get("time")]:
        raise ValueError(f"the page shows the settings {keys}, the report has no times for {missing}: measure these")
    return (
        page[: place.start()] + place[1] + f"\n{step_report.glance(report, keys)}\n\n" + place[4] + page[place.end() :]
    )


def rounded(value: Any) -> Any:
    """The same with six significant digits: more are noise, and make a file of twice the size."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw a panel of bars for each setting's times, and one for the peak memory of the first. Needs matplotlib."""
    import matplotlib  # of the extra [train]; a measurement without a picture does without it
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    # The same figures make the same file.
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks.step"
    matplotlib.rcParams["svg.fonttype"] = "none"
    keys = step_report.keys_of(report)
    settings = report["settings"]
    panels: list[tuple[str, dict[str, float], dict[str, float]]] = []
    for name, figures in settings.items():
        ratios = {key: t["whole_ratio"] for key, t in figures["time"].items()}
        spreads = {key: t["whole_spread"] * t["whole_ratio"] / 2 for key, t in figures["time"].items()}
        if ratios:
            panels.append((step_report.title(Setting.parse(name)).replace(", ", "\n", 1), ratios, spreads))
    name, first = next(iter(settings.items()))
    peaks = {key: value for key in keys if (value := step_report.peak(first, key)) is not None}
    if peaks:
        subject = step_report.title(Setting.parse(name)).replace(", one host", "")
        panels.append((f"peak memory beside the model, in P\n{subject}", peaks, {}))
    num_columns = min(COLUMNS, max(1, len(panels)))
    num_rows = max(1, -(-len(panels) // num_columns))
    figure = Figure(figsize=(3.2 + 2.3 * num_columns, 0.9 + (0.8 + 0.23 * len(keys)) * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flatten()
    for axis, (title, values, spreads) in zip(axes, panels, strict=False):
        _bars(axis, keys, values, spreads)
        axis.set_title(title, fontsize=8, loc="left")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    axes[0].set_yticks(range(len(keys)), [peer_of(key).label for key in keys])
    axes[0].invert_yaxis()
    subject = f"Time of a step over {peer_of(keys[0]).label}, with half of the interquartile range to each side"
    figure.suptitle(f"{subject}; less is better", fontsize=9, x=0.01, ha="left")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


def _bars(axis: Any, keys: list[str], values: Mapping[str, float], spreads: Mapping[str, float]) -> None:
    """One panel: a bar and its number for each peer that has a value."""
    limit = 1.25 * max(values.values())
    # A spread beyond the panel is cut off, and leaves room for the number.
    room = 0.86 * limit
    for position, key in enumerate(keys):
        if key not in values:
            axis.text(0.02 * limit, position, step_report.NOTHING, va="center", fontsize=7, color="#888888")
            continue
        value, spread = values[key], spreads.get(key, 0.0)
        colour = OURS if peer_of(key).ours else THEIRS
        axis.barh(position, value, height=0.72, color=colour)
        if spread:
            ends = max(0.0, value - spread), min(value + spread, room)
            axis.plot(ends, (position, position), color="black", lw=0.8, alpha=0.6)
        axis.text(min(value + spread, room) + 0.02 * limit, position, f"{value:.2f}", va="center", fontsize=7)
    axis.set_xlim(0, limit)
    axis.tick_params(labelsize=7)
    axis.axvline(values.get(keys[0], 1.0), color="#666666", lw=0.8, ls=":")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
