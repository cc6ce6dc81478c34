"""``python -m benchmarks.trace``: a picture of one stage 2 step, drawn from what ``torch.profiler`` records of it.

Two ranks take steps, with Gloo's messages and with shared memory, under the profiler. Of each way the step that took
least is drawn: what the host of each rank does in each moment, and which messages are in flight meanwhile. The program
writes ``trace.md``, ``trace.json`` and ``trace.png`` into ``--folder``.

Vocabulary
    span    a phase: its label, and the milliseconds from the begin of the step to its begin and end
    stretch a time in which the innermost span stays the same: what the host does then
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import progress
from benchmarks.model import Shape, build_model, parameter_bytes
from benchmarks.peers import peer_of
from benchmarks.ranks import Team
from benchmarks.report import markdown_table, surroundings
from benchmarks.trainer import Trainer
from dist_asgd.labels import Label

RESULTS = Path(__file__).parent / "results"
MESSAGES = "messages"
WAYS = {MESSAGES: "0", "shared memory": "1"}  # by what DIST_ASGD_SHARED_MEMORY is then
WARMUP = 3
FORWARD, BACKWARD, STEP = OUTER = ("forward", "backward", "step()")
PREFIX = "dist_asgd::"
# What is drawn in which colour; the names of other phases are drawn in grey.
COLOURS = {
    FORWARD: "#e3e7ec",
    BACKWARD: "#cdd4dc",
    STEP: "#b4bdc8",
    Label.PACK: "#8c6bb1",
    Label.REDUCE_SCATTER: "#6baed6",
    Label.MEAN: "#2171b5",
    Label.REDUCE_SCATTER_WAIT: "#cb181d",
    Label.UPDATE: "#238b45",
    Label.ALL_GATHER: "#fdae6b",
    Label.ALL_GATHER_WAIT: "#d94801",
    Label.EXCHANGE: "#525252",
    Label.EXCHANGE_WAIT: "#000000",
}
# Launches, by the waits that end what they start.
IN_FLIGHT = {Label.REDUCE_SCATTER_WAIT: Label.REDUCE_SCATTER, Label.ALL_GATHER_WAIT: Label.ALL_GATHER}


class Span(NamedTuple):
    """A phase of one rank."""

    label: str
    begin: float
    end: float


class Recorder(Trainer):
    """A ``Trainer`` whose steps are recorded."""

    def record(self) -> tuple[list[Span], dict[str, float]]:
        """Take one step under the profiler; returns its spans, in microseconds of the host's clock, and its stats."""
        tokens = self._next_batch()
        self.optimizer.stats(reset=True)  # type: ignore[attr-defined]
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            with record_function(FORWARD):
                loss = self.wrapped(tokens)
            with record_function(BACKWARD):
                loss.backward()
            with record_function(STEP):
                self.optimizer.step()
        self.optimizer.zero_grad()
        with tempfile.TemporaryDirectory() as folder:
            recorded.export_chrome_trace(f"{folder}/trace.json")
            spans = spans_of(json.loads(Path(folder, "trace.json").read_text()))
        return spans, asdict(self.optimizer.stats())  # type: ignore[attr-defined]


def spans_of(trace: Mapping[str, Any]) -> list[Span]:
    """The labelled phases of a Chrome trace, in microseconds that are the same for all processes of a host."""
    base = int(trace.get("baseTimeNanoseconds", 0)) / 1e3
    found = []
    for event in trace["traceEvents"]:
        name = str(event.get("name", ""))
        if event.get("ph") == "X" and (name in OUTER or name.startswith(PREFIX)):
            begin = base + float(event["ts"])
            found.append(Span(name, begin, begin + float(event["dur"])))
    # An outer span comes before those that begin with it.
    return sorted(found, key=lambda span: (span.begin, -span.end))


def stretches(spans: Iterable[Span]) -> list[Span]:
    """What the host does in each moment: the innermost of nested spans, which are sorted by their begins."""
    found: list[Span] = []
    open_spans: list[Span] = []
    now = 0.0

    def until(time: float) -> None:
        nonlocal now
        if open_spans and time > now:
            found.append(Span(open_spans[-1].label, now, time))
        now = max(now, time)

    for span in spans:
        while open_spans and open_spans[-1].end <= span.begin:
            until(open_spans[-1].end)
            open_spans.pop()
        until(span.begin)
        open_spans.append(span)
    while open_spans:
        until(open_spans[-1].end)
        open_spans.pop()
    return found


def in_flight(spans: Iterable[Span]) -> list[Span]:
    """What travels when: from the end of each launch to the end of its wait. Waits come in the order of launches."""
    launched: dict[str, deque[Span]] = defaultdict(deque)
    found = []
    for span in sorted(spans, key=lambda span: span.end):
        launch = IN_FLIGHT.get(span.label)
        if launch is None:
            launched[span.label].append(span)
        elif launched[launch]:
            found.append(Span(launch, launched[launch].popleft().end, span.end))
    return sorted(found, key=lambda span: span.begin)


def measure(shape: Shape, num_steps: int) -> dict[str, Any]:
    """Record steps in each way; returns, for each, the spans and stats of all ranks in the step that took least."""
    runs = {}
    for way, environment in WAYS.items():
        steps = []
        with Team(Recorder, 2, peer_of("stage2"), shape, environment={"DIST_ASGD_SHARED_MEMORY": environment}) as team:
            team.wait_ready()
            for number in range(WARMUP + num_steps):
                progress(f"{way}: step {number + 1} of {WARMUP + num_steps}")
                steps.append(team.call("record"))
        runs[way] = min(map(_from_zero, steps[WARMUP:]), key=_duration)
    progress("")
    return runs


def _from_zero(ranks: Sequence[tuple[list[Span], dict[str, float]]]) -> dict[str, Any]:
    """The spans of all ranks in milliseconds from the first begin, and their stats."""
    first = min(spans[0].begin for spans, _ in ranks)
    return {
        "spans": [[Span(s.label, (s.begin - first) / 1e3, (s.end - first) / 1e3) for s in spans] for spans, _ in ranks],
        "stats": [stats for _, stats in ranks],
    }


def _duration(run: Mapping[str, Any]) -> float:
    return max(float(end) for spans in run["spans"] for _, _, end in spans)


def draw(runs: Mapping[str, Any], file: Path) -> None:
    """Draw all runs below each other, on one scale of time."""
    import matplotlib  # imported late, as the ranks do not draw
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    matplotlib.use("Agg")
    figure = Figure(figsize=(11, 2.2 * len(runs) + 1.2), layout="constrained", dpi=150)
    every = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    drawn: set[str] = set()
    for axes, (way, run) in zip(every, runs.items(), strict=True):
        names: dict[float, str] = {}
        for rank, spans in enumerate(run["spans"]):
            top = 2.0 * rank
            names[top] = f"rank {rank}"
            bars: dict[tuple[str, float, float], list[tuple[float, float]]] = defaultdict(list)
            for label, begin, end in stretches(spans):
                bars[label, top, 1.0].append((begin, end - begin))
            # Nothing travels by itself in memory that ranks share: they copy and sum in the waits.
            for i, (label, begin, end) in enumerate(in_flight(spans) if way == MESSAGES else ()):
                names[top + 0.85] = "in flight"
                # Two reduce-scatters are in flight at a time: they take turns in two lines.
                bars[label, top + 0.7 + 0.2 * (i % 2), 0.16].append((begin, end - begin))
            for (label, at, height), ranges in bars.items():
                drawn.add(label)
                axes.broken_barh(ranges, (at - height / 2, height), color=COLOURS.get(label, "#999999"), linewidth=0)
        axes.set_yticks(list(names), list(names.values()))
        axes.invert_yaxis()
        axes.set_title(f"{way}: {_duration(run):.0f} ms", loc="left", fontsize=10)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    every[-1].set_xlabel("milliseconds from the begin of the forward")
    handles = [Patch(color=c, label=name.removeprefix(PREFIX)) for name, c in COLOURS.items() if name in drawn]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(file)


def _sums(found: Sequence[Span]) -> dict[str, float]:
    """The milliseconds of each label."""
    return {label: sum(span.end - span.begin for span in found if span.label == label) for label in COLOURS}


def table(runs: Mapping[str, Any]) -> str:
    """How long the hosts were in each phase: milliseconds of rank 0 and rank 1, and how often, in each way."""
    sums = {
        way: [_sums(stretches(Span(*span) for span in spans)) for spans in run["spans"]] for way, run in runs.items()
    }
    rows = []
    for label in COLOURS:
        if not any(rank[label] for ranks in sums.values() for rank in ranks):
            continue
        row = [f"`{label}`" if label.startswith(PREFIX) else f"{label}, less all below"]
        for way, ranks in sums.items():
            count = sum(span[0] == label for span in runs[way]["spans"][0])
            row += [" / ".join(f"{rank[label]:.1f}" for rank in ranks), str(count)]
        rows.append(row)
    return markdown_table(["", *(title for way in sums for title in (f"{way}: ms", "times"))], rows)


def as_markdown(report: Mapping[str, Any]) -> str:
    """The report: hardware, picture, phases, and what ``stats()`` counted."""
    runs = report["runs"]
    stats = [[f"`{name}`"] for name in runs[MESSAGES]["stats"][0]]
    for row, name in zip(stats, runs[MESSAGES]["stats"][0], strict=True):
        for run in runs.values():
            values = [rank[name] for rank in run["stats"]]
            row.append(" / ".join(f"{value:.4f}" if name.endswith("_s") else f"{value:,}" for value in values))
    sections = [
        "# One step in a trace",
        "\n".join(f"- {name}: {value}" for name, value in {**report["surroundings"], **report["workload"]}.items()),
        "![Both ranks in a step of stage 2, with messages and with shared memory](trace.png)",
        "## What the hosts did",
        "Milliseconds of rank 0 / rank 1, and how often rank 0 was in the phase.",
        table(runs),
        "## What `stats()` counted",
        "Rank 0 / rank 1, in the same step.",
        markdown_table(["", *runs], stats),
    ]
    return "\n\n".join(sections) + "\n"


def main() -> None:
    """Record, and write the three files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trace", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="recorded steps of each way (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the model")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the files go (benchmarks/results)")
    options = parser.parse_args()
    shape = Shape().tiny() if options.quick else Shape()
    fields = surroundings("benchmarks.trace")
    model = build_model(shape)
    workload = {
        "model": f"GPT, {parameter_bytes(model) / 4e6:.1f}M fp32 parameters in {len(list(model.parameters()))} tensors",
        "per rank and step": f"{shape.batch} x {shape.context} tokens",
        "drawn": f"of {options.steps} steps the one that took least, as the profiler slows all of them down",
    }
    report = {"surroundings": fields, "workload": workload, "runs": measure(shape, options.steps)}
    (options.folder / "trace.json").write_text(json.dumps(report, separators=(",", ":")) + "\n")
    (options.folder / "trace.md").write_text(as_markdown(report))
    draw(report["runs"], options.folder / "trace.png")


if __name__ == "__main__":
    main()
