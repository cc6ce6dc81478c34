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
from .checkpoint.offline.diff import compare
from .checkpoint.offline.inspect import Summary, finite, summarize
from .checkpoint.offline.verify import total_bytes
from .checkpoint.offline.verify import verify as verify_bytes
from .console import (
    abandon_output,
    encodable,
    no_output,
    plain,
    print_json,
    print_table,
    print_written,
    printing,
    progress_bar,
    reported,
)
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
    parameter's updates, *eta* is its present learning rate, and *mu* is the weight of the next iterate in the average.
    Averaging has begun if mu is not 1.
    """
    with reported():
        path = as_path(directory)
        summary = summarize(CheckpointContents(path, verify=verify, prefix=prefix_of_text(prefix)))
    with printing():
        if as_json:
            print_json(summary.as_dict())
        else:
            _print_summary(summary)


def _print_summary(summary: Summary) -> None:
    typer.secho(encodable(plain(summary.path)), bold=True)
    step = "step unknown (no manifest)" if summary.step is None else f"step {summary.step}"
    writer = "" if summary.written_by is None else f" with dist_asgd {summary.written_by}"
    typer.echo(
        f"{step}, written by {summary.num_ranks} rank{'' if summary.num_ranks == 1 else 's'}{plain(writer)}; "
        f"{summary.num_files} files, {decimal(summary.file_bytes)}, "
        + ("sizes and metadata match the manifest" if summary.verified else "not verified")
    )
    rows = []
    for p in summary.parameters:
        scalars = [f"{p.step:g}", f"{p.eta:.6g}", f"{p.mu:.6g}"] if p.step is not None else ["", "", ""]
        averaging = "no state" if p.step is None else "begun" if p.averaging else "not begun"
        rows.append([p.name, _shape(p.shape), p.dtype or "-", decimal(p.bytes), p.ax_dtype or "-", *scalars, averaging])
    headers = ("parameter", "shape", "dtype", "size", "ax", "step", "eta", "mu", "averaging")
    print_table(headers, rows, right=(3, 5, 6, 7))
    for title, entries in (("also in the model", summary.others), ("extra", summary.extra)):
        if entries:
            shown = ", ".join(f"{e.name} {_shape(e.shape)} {e.dtype}" if e.dtype else e.name for e in entries[:20])
            more = f", and {len(entries) - 20} more" if len(entries) > 20 else ""
            typer.echo(encodable(plain(f"{title}: {shown}{more}")))
    for entry in summary.averages:
        size = f"{entry.num_parameters} parameters, {decimal(entry.bytes)}"
        typer.echo(encodable(plain(f"average {entry}, {size}")))
    if summary.optimizer:
        typer.echo(encodable(plain(f"optimizer: {summary.optimizer}")))
    if summary.other_keys:
        typer.echo(encodable(plain(f"other keys: {summary.other_keys}")))
    typer.echo(
        f"{len(summary.parameters)} parameters, {summary.num_elements:,} elements; "
        f"model {decimal(summary.model_bytes)}, optimizer state {decimal(summary.state_bytes)}"
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) if shape else "scalar"


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
        print_written(paths, as_json, {"tensors": len(contents.model) + sum(map(len, contents.state.values()))})


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
        typer.echo("note: averaging has not begun for any parameter: these are the last iterates.", err=True)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A checkpoint.", show_default=False)],
    second: Annotated[str, typer.Argument(metavar="B", help="Another checkpoint.", show_default=False)],
    verify: Verify = True,
    as_json: AsJson = False,
) -> None:
    """List the differences of two checkpoints. Exit status 0 if there are none, 1 if there are some, 2 on errors.

    The command compares names, shapes, dtypes, and every value to the bit. Different numbers of ranks may have written
    the two checkpoints.
    """
    with reported(2):
        a, b = (CheckpointContents(as_path(path), verify=verify) for path in (first, second))
        with progress_bar("comparing", sum(entry.bytes for entry in a.tensors.values())) as progress:
            differences = list(compare(a, b, progress))
    with printing(2):
        if as_json:
            entries = [
                {"key": d.key, "what": d.description, "num_different": d.num_different, "max_abs": finite(d.max_abs)}
                for d in differences
            ]
            print_json({"same": not differences, "differences": entries})
        else:
            rows = [[d.key, d.description, "" if d.max_abs is None else f"{d.max_abs:.3g}"] for d in differences]
            if differences:
                print_table(("key", "difference", "largest"), rows)
            typer.echo(f"{len(differences)} of {len({*a.tensors, *a.objects, *b.tensors, *b.objects})} keys differ")
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
