"""The command line: look at, check, convert and compare checkpoints. One process; results on standard output,
progress and errors on standard error.

Exit status: 0 done, or all well; 1 damaged, different, or an error; ``diff`` has 2 for errors, as diff(1); 2 also for
a wrong command line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from .checkpoint.format.safetensors import DEFAULT_MAX_BYTES
from .checkpoint.offline import convert
from .checkpoint.offline.contents import CheckpointContents, Progress
from .checkpoint.offline.diff import compare
from .checkpoint.offline.inspect import Summary, finite, summarize
from .checkpoint.offline.verify import total_bytes
from .checkpoint.offline.verify import verify as verify_bytes
from .version import __version__

app = typer.Typer(
    name="dist-asgd",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_GIGABYTE = 1_000_000_000
_PLAIN_WIDTH = 160


class Dtype(StrEnum):
    """What an export can be converted to."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="A checkpoint: a directory with .metadata in it.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at OUT.")]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Check every byte that is read against manifest.json. --no-verify reads checkpoints that have none, such "
        "as those of FSDP2 and dcp.save; damage to their data is not seen.",
    ),
]


@contextmanager
def _reported(status: int = 1) -> Iterator[None]:
    """Errors that are not this program's own as one line, and an exit status; the others keep their traceback."""
    try:
        yield
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), status)
    except MemoryError:
        _fail("not enough memory.", status)
    except (RuntimeError, ValueError) as error:
        if not str(error).startswith("dist_asgd: "):
            raise
        _fail(str(error).removeprefix("dist_asgd: "), status)


def _fail(message: str, status: int) -> None:
    typer.echo(f"error: {_plain(message)}", err=True)
    raise typer.Exit(status)


def _plain(text: str) -> str:
    """Names come from files: nothing in them may move the cursor or change colours."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _cell(text: str) -> Text:
    return Text(_plain(text), overflow="fold")


@contextmanager
def _progress(label: str, total_bytes: int) -> Iterator[Progress]:
    """A bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2))


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
    """Checkpoints of sharded ASGD: look at them, check them, turn them into other files.

    A checkpoint is a **directory** that `save_checkpoint` wrote, or FSDP2 with `torch.optim.ASGD` and
    `torch.distributed.checkpoint` (then add `--no-verify`). Any number of ranks may have written it; every command
    runs in one process, without GPUs, and holds one tensor at a time.

    Nothing in a checkpoint is executed: pickles in it may hold tensors and plain values only.

    The usual course: `dist-asgd verify DIR`, then `dist-asgd export DIR model.safetensors` for the averaged weights.
    """


@app.command()
def inspect(directory: Directory, verify: Verify = True, as_json: AsJson = False) -> None:
    """What is in DIR: parameters, shapes, dtypes, sizes, and how far the averaging is.

    Reads `.metadata`, and of the data only the scalars: quick at any size. *step* counts a parameter's updates, *eta*
    is its present learning rate, and *mu* the weight of the next iterate in the average; averaging has begun where mu
    is not 1.
    """
    with _reported():
        found = summarize(CheckpointContents(directory, verify=verify))
    if as_json:
        _print_json(found.as_dict())
    else:
        _show(found)


def _show(found: Summary) -> None:
    console = _console()
    console.print(Text(_plain(found.path), style="bold"), soft_wrap=True)
    step = "step unknown (no manifest)" if found.step is None else f"step {found.step}"
    writer = "" if found.written_by is None else f" with dist_asgd {found.written_by}"
    console.print(
        f"{step}, written by {found.num_ranks} rank{'' if found.num_ranks == 1 else 's'}{_plain(writer)}; "
        f"{found.num_files} files, {decimal(found.file_bytes)}, "
        + ("sizes and metadata match the manifest" if found.verified else "not verified"),
        soft_wrap=True,
    )
    table = Table("parameter", "shape", "dtype", "size", "ax", "step", "eta", "mu", "averaging", box=None)
    for column in (3, 5, 6, 7):
        table.columns[column].justify = "right"
    for p in found.parameters:
        scalars = [f"{p.step:g}", f"{p.eta:.6g}", f"{p.mu:.6g}"] if p.step is not None else ["", "", ""]
        averaging = "no state" if p.step is None else "begun" if p.averaging else "not begun"
        table.add_row(
            _cell(p.name), _shape(p.shape), p.dtype or "-", decimal(p.bytes), p.ax_dtype or "-", *scalars, averaging
        )
    console.print(table)
    for title, entries in (("also in the model", found.others), ("extra", found.extra)):
        if entries:
            shown = ", ".join(f"{e.name} {_shape(e.shape)} {e.dtype}" if e.dtype else e.name for e in entries[:20])
            more = f", and {len(entries) - 20} more" if len(entries) > 20 else ""
            console.print(_cell(f"{title}: {shown}{more}"), soft_wrap=True)
    console.print(
        f"{len(found.parameters)} parameters, {found.num_elements:,} elements; model {decimal(found.model_bytes)}, "
        f"optimizer state {decimal(found.state_bytes)}",
        soft_wrap=True,
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) if shape else "scalar"


@app.command()
def verify(directory: Directory, as_json: AsJson = False) -> None:
    """Is DIR whole and undamaged? Exit status 0 if it is, 1 if not.

    Reads every byte of every file once and compares with the hashes in `manifest.json`; checks that nothing is missing
    or too many, and that the metadata and the data fit each other. Says all that is wrong, not only the first.
    """
    with _reported(), _progress("verifying", total_bytes(directory)) as progress:
        verdict = verify_bytes(directory, progress)
    if as_json:
        _print_json(
            {
                "ok": not verdict.problems,
                "files": verdict.num_files,
                "chunks": verdict.num_chunks,
                "bytes": verdict.bytes,
                "problems": verdict.problems,
            }
        )
    elif not verdict.problems:
        typer.echo(
            f"{directory}: good ({verdict.num_files} files, {verdict.num_chunks} chunks, {decimal(verdict.bytes)})"
        )
    for problem in verdict.problems if not as_json else ():
        typer.echo(f"error: {_plain(problem)}", err=True)
    if verdict.problems:
        raise typer.Exit(1)


@app.command()
def consolidate(
    directory: Directory,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="FILE.pt or FILE.safetensors.", show_default=False)],
    verify: Verify = True,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Model and optimizer state in one file, for one process.

    **OUT.pt** is for `torch.load(OUT)`: a dict with `model`, for `load_state_dict` of the module, and `optim`, for
    that of `torch.optim.ASGD` or `ShardedASGD`. It needs as much memory as it holds. Checkpoints do not say how
    parameters were grouped: those with equal hyperparameters make one group, in the optimizer's order, and are named
    in `param_names`.

    **OUT.safetensors** has the same tensors under the checkpoint's keys (`model.…`, `optim.state.….ax`), written one at
    a time, and the parameter groups as JSON in its metadata (`param_groups`).
    """
    with _reported():
        contents = CheckpointContents(directory, verify=verify)
        with _progress("consolidating", sum(stored.bytes for stored in contents.tensors.values())) as progress:
            paths = convert.consolidate(contents, out, overwrite=force, progress=progress)
    _wrote(paths, as_json, {"tensors": len(contents.model) + sum(map(len, contents.state.values()))})


@app.command()
def export(
    directory: Directory,
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="Where to.", show_default=False)],
    last: Annotated[bool, typer.Option("--last", help="The last iterate instead of the average.")] = False,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Convert what the optimizer holds. Default: each parameter's own dtype.", show_default=False),
    ] = None,
    max_shard_gb: Annotated[
        float, typer.Option(help="Above this many gigabytes: several files and an index.", min=1e-6)
    ] = DEFAULT_MAX_BYTES / _GIGABYTE,
    verify: Verify = True,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """The averaged weights as safetensors, ready for inference.

    For each parameter the average `ax` where averaging has begun, else the parameter as it is. Whatever else the
    model has (buffers, parameters that the optimizer does not have) goes along unchanged. Statistics of BatchNorm
    belong to the last iterate: recompute them for the average.

    Large models become `OUT-00001-of-0000N.safetensors` with `OUT.safetensors.index.json`, as transformers loads them.
    """
    with _reported():
        contents = CheckpointContents(directory, verify=verify)
        plan = convert.plan_export(contents, last, None if dtype is None else getattr(torch, dtype.value))
        total = sum(weight.spec.bytes for weight in plan.values())
        with _progress("exporting", total) as progress:
            max_bytes = int(max_shard_gb * _GIGABYTE)
            paths = convert.export(contents, out, plan, max_bytes=max_bytes, overwrite=force, progress=progress)
    averaged = sum(weight.averaged for weight in plan.values())
    _wrote(paths, as_json, {"tensors": len(plan), "averaged": averaged})
    if not last and not averaged:
        typer.echo("note: averaging has not begun for any parameter: these are the last iterates.", err=True)


def _wrote(paths: list[Path], as_json: bool, facts: dict[str, int]) -> None:
    total = sum(path.stat().st_size for path in paths)
    if as_json:
        _print_json({"files": [str(path) for path in paths], "bytes": total, **facts})
        return
    counted = ", ".join(f"{number} {what}" for what, number in facts.items())
    for path in paths:
        typer.echo(f"wrote {path}")
    typer.echo(f"{decimal(total)}: {counted}")


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another.", show_default=False)],
    verify: Verify = True,
    as_json: AsJson = False,
) -> None:
    """What differs between two checkpoints. Exit status 0 if nothing does, 1 if something does, 2 on errors.

    Compares names, shapes, dtypes and every value to the bit, whatever the numbers of ranks that wrote them.
    """
    with _reported(2):
        a, b = CheckpointContents(first, verify=verify), CheckpointContents(second, verify=verify)
        with _progress("comparing", sum(stored.bytes for stored in a.tensors.values())) as progress:
            found = list(compare(a, b, progress))
    if as_json:
        entries = [
            {"key": d.key, "what": d.what, "num_different": d.num_different, "max_abs": finite(d.max_abs)}
            for d in found
        ]
        _print_json({"same": not found, "differences": entries})
    else:
        table = Table("key", "difference", "largest", box=None)
        for d in found:
            table.add_row(_cell(d.key), _cell(d.what), "" if d.max_abs is None else f"{d.max_abs:.3g}")
        if found:
            _console().print(table)
        typer.echo(f"{len(found)} of {len({*a.tensors, *a.objects, *b.tensors, *b.objects})} keys differ")
    if found:
        raise typer.Exit(1)


def run() -> None:
    """The console script."""
    app(prog_name="dist-asgd" if sys.argv[0].endswith("dist-asgd") else "python -m dist_asgd")
