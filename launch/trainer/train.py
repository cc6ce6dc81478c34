"""Trains a byte-level language model with ShardedASGD, under torchrun or as `python launch/trainer/train.py`.

This is an example of every mode: `options.py` has the command line, `parallel.py` distributes the model, and
`training.py` has the training loop. `launch/torchrun.sh` and `launch/demo.sh` start it.
"""

import functools
import os
import sys
from datetime import timedelta
from typing import Any, cast

import typer
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import record

from corpus import Corpus, read_corpus
from metrics import MetricsLog
from options import TrainOptions
from processes import Processes, TrainingError
from report import Summary, draw_losses, print_summary, write_summary
from stopping import StopRequest
from training import Training

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# What typer raises for every command line that it refuses. It has a public name for this subclass only.
_UsageError = cast(type[typer.BadParameter], typer.BadParameter.__bases__[0])


class CommandLineError(Exception):
    """The command line has an option or a value that the trainer does not take."""


@app.command()
@functools.wraps(TrainOptions, updated=())
def main(**values: Any) -> None:
    """Run the command line. `wraps` gives it the options and the help text of TrainOptions."""
    options = TrainOptions(**values)
    stop = StopRequest()
    processes = Processes(timedelta(seconds=options.timeout))
    try:
        train(options, processes, stop)
    except TrainingError as failure:
        sys.stderr.write(f"error on rank {processes.rank}: {failure}\n")  # one write: ranks share the stream
        processes.close()  # every rank raised it, so every rank comes here
        raise
    processes.close()


def train(options: TrainOptions, processes: Processes, stop: StopRequest) -> None:
    """Train from the beginning or from a checkpoint, and report the outcome. Collective."""
    console = Console() if processes.is_first else None
    corpus = processes.together(lambda: read_corpus(options.data, options.context))
    _check_same_corpus(corpus, processes)
    training = Training(options, processes, corpus, console)
    resumed_step = training.start()
    log = processes.on_first(lambda: MetricsLog(options.out, resumed_step))
    if console is not None:
        console.print(
            f"{training.num_parameters:,} parameters, {training.description}, {processes.world_size} ranks on "
            f"{processes.device.type}; {len(corpus.train) / 1e6:.1f} MB to train on and "
            f"{len(corpus.held_out) / 1e6:.1f} MB held out of {corpus.num_files} files",
            highlight=False,
            soft_wrap=True,
        )
    summary = training.run(log, stop)
    if log is not None:
        log.close()
    processes.on_first(lambda: _report(options, summary, training.checkpoint))


def _check_same_corpus(corpus: Corpus, processes: Processes) -> None:
    """Raise TrainingError on every rank if the ranks have read different text. Collective."""
    fingerprints = processes.gather(corpus.fingerprint)
    differing = [rank for rank, fingerprint in enumerate(fingerprints) if fingerprint != fingerprints[0]]
    if differing:
        raise TrainingError(
            f"ranks {differing} read another text than rank 0: give every node the same files with --data"
        )


def _report(options: TrainOptions, summary: Summary, checkpoint: str) -> None:
    """Write the picture and the summary, and print them. Rank 0 calls it."""
    picture = draw_losses(options.out, summary.facts)
    write_summary(options.out, summary)
    console = Console(highlight=False)
    print_summary(console, summary)
    if summary.stopped_by is not None:
        console.print(f"stopped by {summary.stopped_by} after step {summary.step}; --resume goes on from there")
    console.print(f"checkpoint: {checkpoint}", soft_wrap=True)
    if picture is not None:
        console.print(f"picture:    {picture.resolve()}", soft_wrap=True)


@record
def run() -> int:
    """Run the command line and return its status. `@record` hands what is raised here to the launcher."""
    try:
        return app(standalone_mode=False) or 0
    except _UsageError as failure:
        raise CommandLineError(failure.format_message()) from None


def start() -> None:
    """Exit with the status of `run`. Failures that have a message for the user end without a traceback."""
    try:
        sys.exit(run())
    except CommandLineError as failure:
        if os.environ.get("RANK", "0") == "0":  # the ranks have the same command line
            sys.stderr.write(f"error: {failure}; --help lists the options\n")
        sys.exit(2)
    except TrainingError:
        sys.exit(1)


if __name__ == "__main__":
    start()
