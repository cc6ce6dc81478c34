"""Reports a run that has ended: a table, a summary as JSON, and a picture of its losses."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from dist_asgd import Stats
from metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BYTES_CAPTION = (
    "state: this rank's shard of the average. in flight: buffers for buckets that travel between ranks, and scratch "
    "memory of the update, which are kept between steps; they take a few buckets at most (--bucket-cap-mb), however "
    "large the model is. padding: bytes of parameters that belong to none."
)


@dataclass(frozen=True)
class Facts:
    """What a reader has to know of a run to judge its losses."""

    model: str  # its kind
    num_parameters: int
    unit: str  # what losses are the mean over: "byte", say
    parallel: str  # the mode, with its options, for people
    num_ranks: int
    device: str
    steps: int  # that the run has in all
    lr: float
    schedule: str
    first_average_step: int | None  # t0; None while nobody knows when averaging begins

    def model_text(self) -> str:
        """The model and the ranks, in a line."""
        ranks = f"{self.num_ranks} rank{'' if self.num_ranks == 1 else 's'}"
        return f"{self.model} of {self.num_parameters:,} parameters, {self.parallel} on {ranks} ({self.device})"

    def steps_text(self) -> str:
        """The steps and the optimizer, in a line."""
        t0 = "" if self.first_average_step is None else f", t0 {self.first_average_step:,}"
        return f"{self.steps:,} steps, lr {self.lr:g} ({self.schedule}){t0}"


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
    """The held-out losses after `step` steps, in nats per unit.

    `average` is that of the average over `averaged_steps` iterates; None before averaging has begun.
    """

    step: int
    last: float
    average: float | None
    averaged_steps: int

    @property
    def gap(self) -> float | None:
        """The loss of the average minus that of the last iterate; negative if the average is the better one."""
        return None if self.average is None else self.average - self.last


@dataclass(frozen=True)
class Summary:
    """The outcome of a run."""

    facts: Facts
    step: int
    stopped_by: str | None
    train_loss: float | None
    evaluation: Evaluation | None
    tokens_per_second: float
    averaged_steps: int  # how many iterates the average holds; 0 before averaging has begun
    average_dtype: str
    memory_by_rank: list[Memory]
    unsharded: Memory  # with torch.optim.ASGD, on every rank
    stats_by_rank: list[Stats]  # what the optimizer has sent and waited for in this run


def averaging_text(first_average_step: int | None, averaged_steps: int) -> str:
    """What has become of the average so far, as part of a sentence."""
    if averaged_steps:
        return f"the average holds {iterates_text(averaged_steps)}"
    if first_average_step is None:
        return "averaging has not begun"
    return f"averaging begins after step {first_average_step:,}"


def iterates_text(count: int) -> str:
    """So many iterates, for people."""
    return f"{count:,} iterate{'' if count == 1 else 's'}"


def write_summary(folder: Path, summary: Summary) -> Path:
    """Write summary.json and return its path."""
    file = folder / "summary.json"
    file.write_text(json.dumps(asdict(summary), indent=1) + "\n", encoding="utf-8")
    return file


def draw_losses(folder: Path, facts: Facts) -> Path | None:
    """Draw the training loss and both held-out losses to losses.png; returns its path, or None without any metrics.

    The left panel has the whole run, the right one its tail: from t0 on, but at most the second half.
    """
    import matplotlib  # imported late, as only rank 0 draws
    from matplotlib.figure import Figure

    lines = read_metrics(folder)
    if not lines:
        return None
    matplotlib.use("Agg")  # no display on a training machine
    figure = Figure(figsize=(11, 5), dpi=120, layout="constrained")
    figure.suptitle(f"{facts.model_text()}\n{facts.steps_text()}", fontsize="medium")
    whole, tail = figure.subplots(1, 2, width_ratios=(3, 2))
    for axes in (whole, tail):
        _draw_curves(axes, lines, facts.first_average_step)
    # Single batches are noisier than the tail is high.
    whole.plot(*_curve(lines, "train_loss"), color="0.75", linewidth=0.8, zorder=1, label="training batch")
    whole.set_xlim(left=0, right=lines[-1]["step"])
    whole.set_yscale("log")
    whole.yaxis.set_minor_formatter("{x:.1f}")
    whole.yaxis.set_major_formatter("{x:.1f}")
    whole.set_ylabel(f"loss, nats per {facts.unit}")
    whole.legend()
    _zoom(tail, lines, facts.first_average_step)
    file = folder / "losses.png"
    figure.savefig(file)
    return file


def _draw_curves(axes: "Axes", lines: list[dict[str, Any]], first_average_step: int | None) -> None:
    axes.plot(*_curve(lines, "held_out_last"), color="C0", marker=".", zorder=3, label="held out, last iterate")
    steps, losses = _curve(lines, "held_out_average")
    axes.plot(steps, losses, color="C3", marker=".", zorder=3, label="held out, average" if steps else None)
    if first_average_step is not None and first_average_step < lines[-1]["step"]:
        label = f"t0 = {first_average_step:,}: averaging begins"
        axes.axvline(first_average_step, color="0.4", linestyle=":", linewidth=1, label=label)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3, which="both")


def _zoom(axes: "Axes", lines: list[dict[str, Any]], first_average_step: int | None) -> None:
    """Show the tail of the held-out losses, with their values at the end."""
    last_step = lines[-1]["step"]
    curves = {"last iterate": _curve(lines, "held_out_last"), "average": _curve(lines, "held_out_average")}
    evaluated = curves["last iterate"][0]
    if not evaluated:
        axes.set_visible(False)
        return
    t0 = last_step if first_average_step is None else first_average_step
    begin = t0 if last_step / 2 < t0 < last_step else last_step / 2
    begin = min(begin, evaluated[-2:][0])
    shown = [
        loss for steps, losses in curves.values() for step, loss in zip(steps, losses, strict=True) if step >= begin
    ]
    # A curve of one point has no height.
    margin = 0.1 * (max(shown) - min(shown)) or 0.01 * max(shown)
    axes.set_xlim(begin, last_step + 0.02 * (last_step - begin))
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_title(_ending(lines), fontsize="medium")
    ends = [(steps[-1], losses[-1], name) for name, (steps, losses) in curves.items() if steps]
    # The higher value stands above its point and the lower one below, so that they never lie on each other.
    for index, (step, loss, name) in enumerate(sorted(ends, key=lambda end: -end[1])):
        axes.annotate(
            f"{name} {loss:.4f}",
            (step, loss),
            xytext=(-4, 8 if index == 0 else -14),
            textcoords="offset points",
            ha="right",
            color="C3" if name == "average" else "C0",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )


def _ending(lines: list[dict[str, Any]]) -> str:
    """The title of the tail: what the average has gained at the last evaluation."""
    last = next(line for line in reversed(lines) if "held_out_last" in line)
    if "held_out_average" not in last:
        return "the tail: averaging has not begun"
    gap = last["held_out_average"] - last["held_out_last"]
    iterates, compared = iterates_text(last["averaged_steps"]), "worse" if gap > 0 else "better"
    return f"the tail: the average of {iterates} is {compared} by {abs(gap):.4f}"


def _curve(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in points], [loss for _, loss in points]


def print_summary(console: Console, summary: Summary) -> None:
    """Print the losses, the speed, and what each rank holds, has sent and has waited for, as tables."""
    console.print(summary.facts.model_text(), summary.facts.steps_text(), sep="\n", soft_wrap=True)
    console.print(_outcome_table(summary))
    gap = None if summary.evaluation is None else summary.evaluation.gap
    if gap is not None and gap > 0:
        console.print(
            "note: the average is worse than the last iterate. It gains where the loss has stopped falling and the "
            "last iterate is noisy: a later t0, a longer run or a larger constant --lr helps; a learning rate that "
            "falls to zero leaves it nothing to gain."
        )
    console.print(_memory_table(summary))
    if len(summary.stats_by_rank) > 1:
        console.print(_stats_table(summary))


def _outcome_table(summary: Summary) -> Table:
    evaluation = summary.evaluation
    table = Table(title=f"after step {summary.step:,}", title_justify="left")
    table.add_column("")
    table.add_column(f"nats per {summary.facts.unit}", justify="right")
    table.add_column(f"bits per {summary.facts.unit}", justify="right")
    table.add_row("training, latest batch", *_loss_cells(summary.train_loss))
    at_step = "" if evaluation is None else f" at step {evaluation.step:,}"
    table.add_row(f"held out{at_step}, last iterate", *_loss_cells(None if evaluation is None else evaluation.last))
    if evaluation is None or evaluation.average is None:
        table.add_row(f"held out{at_step}, average", "not begun", "not begun")
    else:
        table.add_row(f"held out{at_step}, average ({summary.average_dtype})", *_loss_cells(evaluation.average))
        table.add_row("average - last iterate", *_loss_cells(evaluation.gap), style="bold")
    table.add_section()
    if summary.averaged_steps:
        table.add_row("iterates in the average", f"{summary.averaged_steps:,}", "")
    elif summary.facts.first_average_step is not None:
        table.add_row("averaging begins after step (t0)", f"{summary.facts.first_average_step:,}", "")
    table.add_row("tokens per second, all ranks", f"{summary.tokens_per_second:,.0f}", "")
    return table


def _memory_table(summary: Summary) -> Table:
    table = Table(
        title="bytes held", title_justify="left", caption=_BYTES_CAPTION, caption_justify="left", caption_style="none"
    )
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
