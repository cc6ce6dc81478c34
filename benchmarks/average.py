"""``python -m benchmarks.average``: what an average gains, and what it costs.

It writes ``average.md``, ``average.json`` and ``average.svg``. ``average_experiments.py`` has the experiments, the
expected errors and the bounds of the slopes; a slope out of bounds ends the run with an error, after the files are
written. ``average_speed.py`` measures updates on 2 ranks.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import average_speed
from benchmarks.average_experiments import SHARES, Size, floors, quadratic_curves, regression_curves
from benchmarks.average_experiments import starts as measure_starts
from benchmarks.average_problems import Regression
from benchmarks.average_speed import BOUND, NUM_RANKS, NUM_SMALL, SMALL_NUMEL, WAYS, WIDE
from benchmarks.measure import progress
from benchmarks.report import markdown_table, surroundings
from benchmarks.step_pages import rounded
from benchmarks.training import BUCKET_BYTES

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
NOTHING = "–"
MIB = 2**20
LEAST_SHARE = 0.9
COLOURS = {"last iterate": "#8c8c8c", "average": "#1f6fb4", "cosine": "#d1781e"}


def measure(quick: bool, rounds: int) -> dict[str, Any]:
    """Run everything; the result is plain values."""
    report: dict[str, Any] = {"surroundings": surroundings("benchmarks.average"), "quick": quick}
    size = Size.quick() if quick else Size()
    report["speed"] = average_speed.measure(quick, rounds)
    # The ranks of the part above have one thread each, too; small tensors gain nothing by more.
    torch.set_num_threads(1)
    report["size"] = asdict(size)
    for name, run in (("quadratic", quadratic_curves), ("regression", regression_curves)):
        progress(f"errors: {name}")
        report.setdefault("curves", []).extend(curve.as_dict() for curve in run(size))
    progress("errors by the begin of averaging")
    report["starts"] = [asdict(start) for start in measure_starts(size)]
    progress("errors by lambd")
    report["floors"] = [asdict(floor) for floor in floors(size)]
    progress("")
    return report


def out_of_bounds(report: Mapping[str, Any]) -> list[str]:
    """A sentence for each slope that lies further from the expected one than its bound."""
    return [
        f"{curve['problem']}, {curve['name']}: the slope is {curve['slope']:.3f}, and {curve['expected_slope']:.3f} +- "
        f"{curve['bound']:.3f} was expected"
        for curve in report["curves"]
        if not abs(curve["slope"] - curve["expected_slope"]) <= curve["bound"]
    ]


# --- the report ----------------------------------------------------------------------------------------------------


def as_markdown(report: Mapping[str, Any]) -> str:
    """The report."""
    size = report["size"]
    sections = [
        "# Benchmark: the average",
        markdown_table(["field", "value"], [[key, value] for key, value in report["surroundings"].items()]),
        *(["`--quick` shows that the benchmark runs; its figures say little."] if report["quick"] else []),
        "## What it gains",
        "![Errors of the last iterate and of the average over the number of steps, on log-log axes](average.svg)",
        _CURVES_NOTE.format(**size),
        slopes(report),
        _DERIVATION,
        "## When to begin",
        _STARTS_NOTE.format(lr=Regression.lr, **size),
        starts(report["starts"]),
        "## What lambd does",
        _FLOORS_NOTE.format(lr=Regression.lr, **size),
        lambds(report["floors"]),
        "## What it costs",
        _speed_note(report["speed"]),
        speeds(report["speed"]),
        _MEMORY_NOTE,
        *([] if report["quick"] else [goals(report["speed"])]),
    ]
    return "\n\n".join(sections) + "\n"


_CURVES_NOTE = """The excess loss, a mean over {replicates} independent runs. *quadratic*: 16 coordinates with
curvatures from 0.2 to 1, gradient noise of variance 1, learning rate 0.5. *regression*: logistic regression of
whether a cell of a map lies above the median elevation (the sample of the Jacksboro fault that matplotlib ships,
8,686 cells, 6 features), batches of 64, learning rate 0.125. The optimizer is `ShardedASGD` with lambd=0 and alpha=0.
Errors go like n^slope. The expected slope is that of the exact expectations at the same n, and the law is the slope
for large n. A slope that is out of its bound ends the benchmark with an error."""

_DERIVATION = """The slope is `sum_k c_k log(error_k)`, with the weights c of least squares. An error is a mean over R
runs of a quadratic form in Gaussian variables with covariance M. Its logarithm has a standard deviation of about `d =
sqrt(2 tr(M M) / (R tr(M)^2))`, so that of the slope is at most `d sum |c_k|` (Minkowski's inequality), however errors
at different n depend on each other. The bound is four times that. The average of the regression converges to a point
beside the minimum, because the loss is no quadratic: the expected errors have the leading term of that bias, and the
bound as much again. The docstring of `benchmarks/average_problems.py` has the whole derivation."""

_STARTS_NOTE = """The regression from zero weights, with a constant learning rate of {lr}: the excess loss at the end,
by the share of the run at which averaging begins. All averages of a column have the same iterates: they are
`ShardedAverage`s with different `start` beside one `torch.optim.SGD`. The cosine begins at the same learning rate,
and ends at 0."""

_FLOORS_NOTE = """The regression from its minimum, with `ShardedASGD` and a learning rate of {lr}: the excess loss of
the average of {regression_steps:,} iterates. lambd acts as a penalty of lambd / 2 times the square of the weights,
and the average converges to the minimum of the penalised loss. The floor is the excess loss there, computed by
Newton's method. With alpha=0.75, torch's default, the learning rate falls as (1 + lambd lr t)^-0.75."""

_MEMORY_NOTE = """*Of the bound* is the processor time of the plain loop, by that of the update in the same round (a
median): those that move all parameters on each of 2 ranks cannot have more than 0.50. Memory is that of the rank that
has most, above the model: *held* after an update, *peak* while the average is made and updated three times, and
*evaluating* the peak above *held* while the averages come in place and go again. `AveragedModel` is evaluated where it
is, and asserts on FSDP2. By hand, the parameters are set aside meanwhile. What keeps the update
of many tensors from the bound is the host, which makes sure that each parameter and its average lie where they did:
what that needs has left the caches between two updates."""


def slopes(report: Mapping[str, Any]) -> str:
    """A line for each curve."""
    rows = []
    for curve in report["curves"]:
        first, last = curve["n"][0], curve["n"][-1]
        rows.append(
            [
                f"{curve['problem']}: {curve['name']}",
                f"{first:,} to {last:,}",
                f"{curve['measured'][0]:.2g}",
                f"{curve['measured'][-1]:.2g}",
                f"{curve['slope']:.2f}",
                f"{curve['expected_slope']:.2f} ± {curve['bound']:.2f}",
                f"{curve['law']:.2f}",
            ]
        )
    return markdown_table(["", "n", "error at first", "at last", "slope", "expected", "law"], rows)


def starts(found: Sequence[Mapping[str, Any]]) -> str:
    """A line for each share, and a column for each length of the run."""
    rows = [
        [f"average from {float(share):.0%} on", *(f"{of['averaged'][share]:.2g}" for of in found)]
        for share in (f"{share:g}" for share in SHARES)
    ]
    rows.append(["last iterate", *(f"{of['last']:.2g}" for of in found)])
    rows.append(["cosine, last iterate", *(f"{of['cosine']:.2g}" for of in found)])
    return markdown_table(["", *(f"{of['num_steps']:,} steps" for of in found)], rows)


def lambds(found: Sequence[Mapping[str, Any]]) -> str:
    """A line for each lambd."""
    return markdown_table(
        ["lambd", "floor", "average, alpha=0", "average, alpha=0.75"],
        [
            [f"{of['lambd']:g}", *(f"{of[key]:.2g}" for key in ("floor", "averaged", "averaged_with_alpha"))]
            for of in found
        ],
    )


def _speed_note(speed: Mapping[str, Any]) -> str:
    shard = speed["parameter_bytes"] / NUM_RANKS
    seconds = speed["processor_seconds"][BOUND]
    return (
        f"{speed['parameter_bytes'] / 4e6:.1f}M fp32 parameters in {speed['num_parameters']} tensors, P = "
        f"{speed['parameter_bytes'] / 1e6:.1f} MB, on {NUM_RANKS} ranks of one host; medians of {speed['rounds']} "
        f"interleaved rounds.\nThe bound is a plain C loop with two reads and one write of each element of a shard "
        f"({shard / 1e6:.1f} MB), on both ranks at once:\n{seconds * 1e3:.1f} ms, {3 * shard / seconds / 1e9:.1f} GB/s "
        f"a rank, by processor time, which leaves out what other programs take. *Many* is the processor time with\n"
        f"{NUM_SMALL:,} parameters of {SMALL_NUMEL} elements."
    )


def speeds(speed: Mapping[str, Any]) -> str:
    """A line for each way to keep an average."""
    rows = []
    for way in WAYS:
        memory, small = speed["bytes"][way.key], speed["small_seconds"].get(way.key)
        rows.append(
            [
                way.label,
                f"{speed['seconds'][way.key] * 1e3:.1f}",
                f"{speed['processor_seconds'][way.key] * 1e3:.1f}",
                f"{speed['of_bound'][way.key]:.2f}",
                NOTHING if small is None else f"{small * 1e3:.2f}",
                f"{memory['held'] / speed['parameter_bytes']:.2f} P",
                f"{memory['peak'] / speed['parameter_bytes']:.2f} P",
                f"{memory['evaluating'] / MIB:.0f} MiB",
            ]
        )
    times = f"{speed['seconds'][WIDE] * 1e3:.1f}", f"{speed['processor_seconds'][WIDE] * 1e3:.1f}"
    label = f"ShardedAverage, EMA, {speed['wide_bytes'] / 4e6:.0f}M in two layers"
    rows.append([label, *times, f"{speed['of_bound'][WIDE]:.2f}", *[NOTHING] * 4])
    return markdown_table(["", "ms", "processor, ms", "of the bound", "many, ms", "held", "peak", "evaluating"], rows)


def goals(speed: Mapping[str, Any]) -> str:
    """What updates and evaluations with ``ShardedAverage`` are to reach, on plain parameters and under FSDP2."""
    ours = [way.key for way in WAYS if way.label.startswith("ShardedAverage")]
    of_bound = speed["of_bound"]
    share = " / ".join(f"{value:.2f}" for value in (of_bound[WIDE], of_bound["ema"], of_bound["fsdp2-ema"]))
    extra = max(speed["bytes"][key]["evaluating"] for key in ours)
    rows = [
        ["update: share of the bound; two layers / many tensors / FSDP2", f">= {LEAST_SHARE:.2f}", share],
        [
            "evaluating: memory above what is held",
            f"<= {BUCKET_BYTES / MIB:.0f} MiB, a bucket",
            f"{extra / MIB:.0f} MiB",
        ],
    ]
    return markdown_table(["goal", "wanted", "measured"], rows)


# --- the pages ------------------------------------------------------------------------------------------------------

PAGES = (DOCS / "averages.md", DOCS / "benchmarks.md")
_PLACE = re.compile(r"(<!-- benchmarks\.average: (\w+) -->\n\n)(?:\|.*?\n\n)?(<!-- end -->)", re.DOTALL)


def tables(report: Mapping[str, Any]) -> dict[str, str]:
    """The tables that pages have copies of, by name."""
    return {
        "starts": starts(report["starts"]),
        "lambds": lambds(report["floors"]),
        "speeds": speeds(report["speed"]),
        "slopes": slopes(report),
    }


def with_copies(text: str, report: Mapping[str, Any]) -> str:
    """The text of a page, with each table between ``<!-- benchmarks.average: NAME -->`` and ``<!-- end -->``."""
    return _PLACE.sub(lambda place: f"{place[1]}{tables(report)[place[2]]}\n\n{place[3]}", text)


# --- the picture ---------------------------------------------------------------------------------------------------


def draw(report: Mapping[str, Any], file: Path) -> None:
    """Draw the errors of both problems: points as measured, lines as expected."""
    import matplotlib  # imported late, as the ranks do not draw
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    # The same figures make the same file.
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks.average"
    matplotlib.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    problems = list(dict.fromkeys(curve["problem"] for curve in report["curves"]))
    for axes, problem in zip(figure.subplots(1, len(problems)), problems, strict=True):
        for curve in (curve for curve in report["curves"] if curve["problem"] == problem):
            kind = next(kind for kind in ("cosine", "average", "last iterate") if kind in curve["name"])
            colour, n = COLOURS[kind], curve["n"]
            label = f"{curve['name']}: slope {curve['slope']:.2f}"
            axes.plot(n, curve["expected"], color=colour, linewidth=1.2)
            axes.plot(n, curve["measured"], "o", color=colour, markersize=4, label=label)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(n, [f"{k:,}" for k in n])
        axes.legend(loc="lower left", frameon=False, labelcolor="linecolor", handletextpad=0.2, fontsize=9)
        axes.set_title({"quadratic": "noisy quadratic", "regression": "logistic regression"}[problem], loc="left")
        axes.set_xlabel("n: iterates in the average, or steps of the cosine")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("excess loss")
    figure.savefig(file, metadata={"Date": None})
    # matplotlib ends lines of paths with blanks.
    file.write_text("\n".join(line.rstrip() for line in file.read_text().splitlines()) + "\n")


def main() -> None:
    """Measure, and write the three files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.average", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less of everything, of which the figures say little")
    parser.add_argument("--rounds", type=int, default=31, help="timed rounds of the updates (%(default)s)")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the files go (benchmarks/results)")
    parser.add_argument("--again", action="store_true", help="make the files again from average.json, measure nothing")
    parser.add_argument("--publish", action="store_true", help="also write the tables into the pages of docs")
    options = parser.parse_args()
    figures = options.folder / "average.json"
    if options.again:
        report = json.loads(figures.read_text())
    else:
        report = measure(options.quick, min(options.rounds, 7) if options.quick else options.rounds)
        options.folder.mkdir(parents=True, exist_ok=True)
        report = rounded(report)
        figures.write_text(json.dumps(report, indent=1) + "\n")
    text = as_markdown(report)
    (options.folder / "average.md").write_text(text)
    draw(report, options.folder / "average.svg")
    for page in PAGES if options.publish else ():
        page.write_text(with_copies(page.read_text(), report))
    sys.stdout.write(text)
    wrong = out_of_bounds(report)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
