"""What the command lines of all runs share: they start, report and fail in one way."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import typer
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import record

from metrics import MetricsLog
from processes import Processes, TrainingError
from report import Summary, draw_losses, print_summary, write_summary
from run import Run
from run_options import OptionsT, app_of
from stopping import StopRequest

# What typer raises for every command line that it refuses. It has a public name for this subclass only.
_UsageError = cast(type[typer.BadParameter], typer.BadParameter.__bases__[0])


class CommandLineError(Exception):
    """The command line has an option or a value that the trainer does not take."""


def start(options: type[OptionsT], train: Callable[[OptionsT, Processes, StopRequest], None]) -> None:
    """Run the command line with the options of `options`, and exit with its status.

    `train` is called on every rank. Failures that have a message for the user end without a traceback.
    """
    try:
        sys.exit(_run(app_of(options, lambda values: _main(values, train))))
    except CommandLineError as failure:
        if os.environ.get("RANK", "0") == "0":  # the ranks have the same command line
            sys.stderr.write(f"error: {failure}; --help lists the options\n")
        sys.exit(2)
    except TrainingError:
        sys.exit(1)


def _main(options: OptionsT, train: Callable[[OptionsT, Processes, StopRequest], None]) -> None:
    stop = StopRequest()
    processes = Processes(timedelta(seconds=options.timeout))
    try:
        train(options, processes, stop)
    except TrainingError as failure:
        sys.stderr.write(f"error on rank {processes.rank}: {failure}\n")  # one write: ranks share the stream
        processes.close()  # every rank raised it, so every rank comes here
        raise
    processes.close()


@record
def _run(app: typer.Typer) -> int:
    """Run the command line and return its status. `@record` hands what is raised here to the launcher."""
    try:
        return app(standalone_mode=False) or 0
    except _UsageError as failure:
        raise CommandLineError(failure.format_message()) from None


def check_same_text(fingerprint: int, processes: Processes) -> None:
    """Raise TrainingError on every rank if the ranks have read different text. Collective."""
    fingerprints = processes.gather(fingerprint)
    differing = [rank for rank, other in enumerate(fingerprints) if other != fingerprints[0]]
    if differing:
        raise TrainingError(
            f"ranks {differing} read another text than rank 0: give every node the same files with --data"
        )


def carry_out(run: Run[Any], options: OptionsT, processes: Processes, stop: StopRequest, text: str) -> None:
    """Train from the beginning or from a checkpoint, and report the outcome. Collective.

    `text` says what the run trains on, for the first line that it prints.
    """
    resumed_step = run.start()
    log = processes.on_first(lambda: MetricsLog(options.out, resumed_step))
    if processes.is_first:
        Console().print(
            f"{run.num_parameters:,} parameters, {run.description}, {processes.world_size} ranks on "
            f"{processes.device.type}; {text}",
            highlight=False,
            soft_wrap=True,
        )
    summary = run.run(log, stop)
    if log is not None:
        log.close()
    processes.on_first(lambda: _report(options, summary, run.checkpoint))


def _report(options: OptionsT, summary: Summary, checkpoint: str) -> None:
    """Write the picture and the summary, and print them. Rank 0 calls it."""
    picture = draw_losses(options.out, summary.first_average_step, summary.unit)
    write_summary(options.out, summary)
    console = Console(highlight=False)
    print_summary(console, summary)
    if summary.stopped_by is not None:
        console.print(f"stopped by {summary.stopped_by} after step {summary.step}; --resume goes on from there")
    console.print(f"checkpoint: {checkpoint}", soft_wrap=True)
    if picture is not None:
        console.print(f"picture:    {picture.resolve()}", soft_wrap=True)
