"""The command line, which inspects, verifies, converts and compares checkpoints in one process, and plans jobs.

Results go to standard output, progress and errors to standard error. The exit status is 0 if a command succeeded, and
1 on an error, for a damaged checkpoint and for checkpoints that differ. As with diff(1), ``diff`` reports an error as
2. A wrong command line is also 2. The work is done in ``checkpoint/offline``; this file parses and prints. ``plan`` is
in ``planning/command.py``, and ``average`` in ``average_command.py``.
"""

from __future__ import annotations

import gc
import io
import sys
from typing import Annotated

import torch
import typer
from rich.filesize import decimal

from .arguments import (
    GIGABYTE,
    AsJson,
    AverageName,
    ExportDtype,
    Force,
    MaxShardGb,
    OutSafetensors,
    Prefix,
    TiesByValue,
    Verify,
    torch_dtype,
)
from .average_command import average
from .checkpoint.format.layouts import prefix_of_text
from .checkpoint.format.paths import as_path
from .checkpoint.format.safetensors import DEFAULT_MAX_BYTES
from .checkpoint.offline import convert
from .checkpoint.offline.contents import CheckpointContents
from .checkpoint.offline.diff import Comparison
from .checkpoint.offline.inspect import finite, summarize
from .checkpoint.offline.verify import total_bytes
from .checkpoint.offline.verify import verify as verify_bytes
from .console import (
    abandon_output,
    encodable,
    no_output,
    plain,
    print_json,
    print_written,
    printing,
    progress_bar,
    reported,
)
from .listings import print_differences, print_summary
from .planning.command import plan as plan_job
from .version import __version__

app = typer.Typer(
    name="dist-asgd",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Directory = Annotated[
    str, typer.Argument(metavar="DIR", help="A checkpoint: the directory that a save has written.", show_default=False)
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"dist-asgd {__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print versions and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Plan jobs with sharded ASGD, and inspect, verify, compare and convert their checkpoints.

    A checkpoint is a **directory** that `save_checkpoint` wrote, or FSDP2 with `torch.optim.ASGD` and
    `torch.distributed.checkpoint` (then add `--no-verify`). Any number of ranks may have written it. Every command
    runs in one process, needs no GPU, and holds one tensor at a time.

    Nothing in a checkpoint is executed: its pickles may contain tensors and plain values only.

    Usually one runs `dist-asgd verify DIR`, and then `dist-asgd export DIR model.safetensors` for the averaged weights.
    """


app.command("plan")(plan_job)
app.command("average")(average)


@app.command()
def inspect(directory: Directory, verify: Verify = True, prefix: Prefix = "", as_json: AsJson = False) -> None:
    """List the parameters in DIR with their shapes, dtypes and sizes, and with the progress of their averages.

    The command reads `.metadata`, and of the data only scalars, so it is quick at any size. *step* counts a
    parameter's updates, *eta* is its present learning rate, and averaging begins after step *t0*. What is equal for
    all parameters is on the line that begins with *all*. Of other optimizers than ASGD, *state* lists the tensors of
    the state, with dtypes and shapes that are not the parameter's. `--json` also has *mu*, the weight of the next
    iterate in the average: averaging has begun if it is not 1.
    """
    with reported():
        path = as_path(directory)
        summary = summarize(CheckpointContents(path, verify=verify, prefix=prefix_of_text(prefix)))
    with printing():
        if as_json:
            print_json(summary.as_dict())
        else:
            print_summary(summary)


@app.command()
def verify(directory: Directory, as_json: AsJson = False) -> None:
    """Check that DIR is whole and undamaged. Exit status 0 if it is, 1 if not.

    The command reads every byte of every file once and compares it with the hashes in `manifest.json`. It checks that
    no file is missing, and that the metadata fits the data. It reports every problem, not only the first. Files that
    the manifest does not list are ignored, by this command and by all others.
    """
    with reported():
        path = as_path(directory)
        with progress_bar("verifying", total_bytes(path)) as progress:
            verdict = verify_bytes(path, progress)
    with printing():
        if as_json:
            print_json(
                {
                    "ok": not verdict.problems,
                    "files": verdict.num_files,
                    "chunks": verdict.num_chunks,
                    "bytes": verdict.bytes,
                    "problems": verdict.problems,
                    "ignored": verdict.ignored,
                }
            )
        elif not verdict.problems:
            size = f"{verdict.num_files} files, {verdict.num_chunks} chunks, {decimal(verdict.bytes)}"
            typer.echo(f"{encodable(plain(directory))}: good ({size})")
    if verdict.ignored and not as_json:
        names = ", ".join(verdict.ignored[:20]) + (", ..." if len(verdict.ignored) > 20 else "")
        typer.echo(f"note: not in the manifest, and ignored: {encodable(plain(names))}", err=True)
    for problem in verdict.problems if not as_json else ():
        typer.echo(f"error: {plain(problem)}", err=True)
    if verdict.problems:
        raise typer.Exit(1)


@app.command()
def consolidate(
    directory: Directory,
    out: Annotated[str, typer.Argument(metavar="OUT", help="FILE.pt or FILE.safetensors.", show_default=False)],
    verify: Verify = True,
    prefix: Prefix = "",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write model, optimizer state and averages to one file, for use in one process.

    **OUT.pt** is for `torch.load(OUT)`: a dict with `model`, for `load_state_dict` of the module, and `optim`, for
    `load_state_dict` of `torch.optim.ASGD` or `ShardedASGD`, or of the class that was saved. If averages were saved
    beside the optimizer, `averages` has them by name, for `load_state_dict` of a `ShardedAverage`. Writing it needs as
    much memory as the file holds. If the checkpoint does not record parameter groups, parameters with equal
    hyperparameters make one group, in the optimizer's order, and are named in `param_names`.

    **OUT.safetensors** has the same tensors under the checkpoint's keys (`model.…`, `optim.state.….ax`), written one at
    a time, and the parameter groups as JSON in its metadata (`param_groups`).
    """
    with reported():
        contents = CheckpointContents(as_path(directory), verify=verify, prefix=prefix_of_text(prefix))
        with progress_bar("consolidating", sum(entry.bytes for entry in contents.tensors.values())) as progress:
            paths = convert.consolidate(contents, as_path(out), overwrite=force, progress=progress)
    with printing():
        print_written(paths, as_json, {"tensors": convert.num_consolidated(contents)})


@app.command()
def export(
    directory: Directory,
    out: OutSafetensors,
    last: Annotated[bool, typer.Option("--last", help="Export the last iterate instead of the average.")] = False,
    name: AverageName = None,
    dtype: ExportDtype = None,
    max_shard_gb: MaxShardGb = DEFAULT_MAX_BYTES / GIGABYTE,
    ties_by_value: TiesByValue = True,
    verify: Verify = True,
    prefix: Prefix = "",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the averaged weights as safetensors, ready for inference.

    A parameter whose averaging has begun is exported as its average `ax`, and any other parameter as it is. Other
    tensors of the model (buffers, and parameters that the optimizer does not have) are exported unchanged. Statistics
    of BatchNorm belong to the last iterate, so recompute them for the average.

    Large models become `OUT-00001-of-0000N.safetensors` with `OUT.safetensors.index.json`, as transformers loads them.
    """
    with reported():
        contents = CheckpointContents(as_path(directory), verify=verify, prefix=prefix_of_text(prefix))
        if not last or name is not None:
            contents = convert.with_average(contents, name)
        plan = convert.plan_export(contents, last, torch_dtype(dtype), ties_by_value=ties_by_value)
        total = sum(weight.spec.bytes for weight in plan.values())
        with progress_bar("exporting", total) as progress:
            max_bytes = int(max_shard_gb * GIGABYTE)
            to = as_path(out)
            paths = convert.export(contents, to, plan, max_bytes=max_bytes, overwrite=force, progress=progress)
    note = convert.note_of_ties(contents, ties_by_value) if not last or dtype is not None else ""
    if note:
        typer.echo(plain(f"note: {note}"), err=True)
    averaged = sum(weight.averaged for weight in plan.values())
    with printing():
        print_written(paths, as_json, {"tensors": len(plan), "averaged": averaged})
    if not last and not averaged:
        typer.echo(plain(f"note: {convert.note_of_last_iterates(contents)}"), err=True)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A checkpoint.", show_default=False)],
    second: Annotated[str, typer.Argument(metavar="B", help="Another checkpoint.", show_default=False)],
    brief: Annotated[bool, typer.Option("--brief", help="One line for each kind of difference.")] = False,
    verify: Verify = True,
    as_json: AsJson = False,
) -> None:
    """List the differences of two checkpoints. Exit status 0 if there are none, 1 if there are some, 2 on errors.

    The command compares names, shapes, dtypes, and every value to the bit. Different numbers of ranks may have written
    the two checkpoints, and wrappers may have added parts to names (`module.`, `_orig_mod.`). Differences are listed by
    kind: entries that are missing, shapes and dtypes, parameters, averages (*ax*), state of other optimizers, scalars,
    hyperparameters, and the rest. Of tensors the *largest* difference of two elements is listed, and the *relative*
    one: the norm of the difference, divided by the norm of the larger tensor.
    """
    with reported(2):
        a, b = (CheckpointContents(as_path(path), verify=verify) for path in (first, second))
        comparison = Comparison(a, b)
        with progress_bar("comparing", sum(entry.bytes for entry in a.tensors.values())) as progress:
            differences = list(comparison.differences(progress))
    with printing(2):
        if as_json:
            entries = [
                {
                    "kind": d.kind.value,
                    "key": d.key,
                    "what": d.description,
                    "num_different": d.num_different,
                    "max_abs": finite(d.max_abs),
                    "relative": finite(d.relative),
                }
                for d in differences
            ]
            print_json({"same": not differences, "differences": entries})
        else:
            print_differences(comparison, differences, brief)
    if differences:
        raise typer.Exit(1)


def run() -> None:
    """Run the command line: the console script ``dist-asgd`` and ``python -m dist_asgd`` call this."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names in messages, and the progress bar, may have what the stream cannot encode.
            stream.reconfigure(errors="backslashreplace")
    # A checkpoint makes millions of objects that stay, and a search for cycles looks at all. No cycle holds tensors.
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    try:
        try:
            app(prog_name="dist-asgd" if sys.argv[0].endswith("dist-asgd") else "python -m dist_asgd")
        finally:
            # Here, as an error at the interpreter's end would have no exit status of its own.
            sys.stdout.flush()
    except OSError as error:
        # Help, which is not printed by a command.
        abandon_output()
        typer.echo(f"error: {no_output(error)}", err=True)
        raise SystemExit(1) from None
