"""Reports a run that has ended: a table, a summary as JSON, and a picture of its losses."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_asgd import Stats
from metrics import read_metrics


@dataclass(frozen=True)
class Memory:
    """The bytes that one rank holds; see `dist_asgd.MemoryReport` for the fields."""

    parameter_bytes: int
    state_bytes: int
    gradient_bytes: int
    in_flight_bytes: int
    padding_bytes: int


@dataclass(frozen=True)
class Evaluation:
    """The held-out losses after `step` steps, in nats per unit, of the last iterate and of the average."""

    step: int
    last: float
    average: float


@dataclass(frozen=True)
class Summary:
    """The outcome of a run."""

    step: int
    stopped_by: str | None
    train_loss: float | None
    evaluation: Evaluation | None
    tokens_per_second: float
    unit: str  # what losses are the mean over: "byte", say
    first_average_step: int  # t0
    average_dtype: str
    memory_by_rank: list[Memory]
    unsharded: Memory  # with torch.optim.ASGD, on every rank
    stats_by_rank: list[Stats]  # what the optimizer has sent and waited for in this run


def write_summary(folder: Path, summary: Summary) -> Path:
    """Write summary.json and return its path."""
    file = folder / "summary.json"
    file.write_text(json.dumps(asdict(summary), indent=1) + "\n", encoding="utf-8")
    return file


def draw_losses(folder: Path, first_average_step: int, unit: str) -> Path | None:
    """Draw the training loss and both held-out losses to losses.png; returns its path, or None without any metrics.

    Losses are in nats per `unit`. A `first_average_step` beyond the last step is not drawn.
    """
    import matplotlib  # imported late, as only rank 0 draws
    from matplotlib.figure import Figure

    lines = read_metrics(folder)
    if not lines:
        return None
    matplotlib.use("Agg")  # no display on a training machine
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(*_curve(lines, "train_loss"), color="0.75", linewidth=0.8, label="training batch")
    axes.plot(*_curve(lines, "held_out_last"), color="C0", marker=".", zorder=3, label="held out, last iterate")
    axes.plot(*_curve(lines, "held_out_average"), color="C3", marker=".", label="held out, average")
    if first_average_step <= lines[-1]["step"]:
        axes.axvline(first_average_step, color="0.4", linestyle=":", linewidth=1, label="t0: averaging begins")
    axes.set_xlim(left=0, right=lines[-1]["step"])
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter("{x:.1f}")
    axes.yaxis.set_major_formatter("{x:.1f}")
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss, nats per {unit}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    file = folder / "losses.png"
    figure.savefig(file)
    return file


def _curve(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in points], [loss for _, loss in points]


def print_summary(console: Console, summary: Summary) -> None:
    """Print the losses, the speed, and what each rank holds, has sent and has waited for, as tables."""
    console.print(_outcome_table(summary))
    console.print(_memory_table(summary))
    if len(summary.stats_by_rank) > 1:
        console.print(_stats_table(summary))


def _outcome_table(summary: Summary) -> Table:
    table = Table(title=f"after step {summary.step}", title_justify="left")
    table.add_column("")
    table.add_column(f"nats per {summary.unit}", justify="right")
    table.add_column(f"bits per {summary.unit}", justify="right")
    table.add_row("training, latest batch", *_loss_cells(summary.train_loss))
    at_step = "" if summary.evaluation is None else f" at step {summary.evaluation.step}"
    last = None if summary.evaluation is None else summary.evaluation.last
    average = None if summary.evaluation is None else summary.evaluation.average
    table.add_row(f"held out{at_step}, last iterate", *_loss_cells(last))
    table.add_row(f"held out{at_step}, average ({summary.average_dtype})", *_loss_cells(average))
    if last is not None and average is not None:
        table.add_row("average - last iterate", *_loss_cells(average - last), style="bold")
    table.add_section()
    table.add_row("tokens per second, all ranks", f"{summary.tokens_per_second:,.0f}", "")
    return table


def _memory_table(summary: Summary) -> Table:
    table = Table(title="bytes held", title_justify="left")
    table.add_column("")
    for name in ("parameters", "state", "gradients", "in flight", "padding"):
        table.add_column(name, justify="right")
    for rank, memory in enumerate(summary.memory_by_rank):
        table.add_row(f"rank {rank}", *_memory_cells(memory))
    table.add_section()
    table.add_row("unsharded torch.optim.ASGD", *_memory_cells(summary.unsharded))
    return table


def _stats_table(summary: Summary) -> Table:
    table = Table(title="MB sent to other ranks, and seconds of waits for them", title_justify="left")
    table.add_column("")
    # Two lines each, so that all of them fit 80 columns.
    for name in ("sent:\ngrads", "\nparams", "\nall else", "waited:\ngrads", "\nparams", "\nagreement"):
        table.add_column(name, justify="right", no_wrap=True)
    for rank, stats in enumerate(summary.stats_by_rank):
        others = stats.sent_control_bytes + stats.sent_other_bytes
        sent = [stats.sent_gradient_bytes, stats.sent_parameter_bytes, others]
        waited = [stats.waited_gradient_s, stats.waited_parameter_s, stats.waited_control_s]
        table.add_row(f"rank {rank}", *(f"{n / 1e6:,.1f}" for n in sent), *(f"{s:.2f}" for s in waited))
    return table


def _loss_cells(nats: float | None) -> tuple[str, str]:
    return ("-", "-") if nats is None else (f"{nats:.4f}", f"{nats / math.log(2):.4f}")


def _memory_cells(memory: Memory) -> list[str]:
    held = (
        memory.parameter_bytes,
        memory.state_bytes,
        memory.gradient_bytes,
        memory.in_flight_bytes,
        memory.padding_bytes,
    )
    return [f"{num_bytes:,}" for num_bytes in held]
