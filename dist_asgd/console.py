"""How commands print: tables, JSON and progress on standard output and standard error, and errors with an exit status.

``cli.py`` and the commands in other rooms use it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from textwrap import wrap
from typing import Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from .checkpoint.format.paths import AnyPath


@contextmanager
def reported(status: int = 1) -> Iterator[None]:
    """Report errors of files, memory and checkpoints in one line, with exit status ``status``.

    Errors that are no fault of the user or the files keep their traceback.
    """
    try:
        yield
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), status)
    except MemoryError:
        fail("not enough memory.", status)
    except (RuntimeError, ValueError) as error:
        if not str(error).startswith("dist_asgd: "):
            raise
        fail(str(error).removeprefix("dist_asgd: "), status)


def fail(message: str, status: int) -> None:
    typer.echo(f"error: {plain(message)}", err=True)
    raise typer.Exit(status)


def plain(text: str) -> str:
    """``text`` with escapes in place of control characters.

    Names come from files that are not trusted, and must not move the cursor or change colours.
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def encodable(text: str) -> str:
    """``text`` with ASCII in place of what standard output cannot encode (``PYTHONIOENCODING=ascii``)."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("×", "x").encode(encoding, "backslashreplace").decode(encoding)
    return text


@contextmanager
def printing(status: int = 1) -> Iterator[None]:
    """Report a standard output that cannot be written (a full disk, a closed pipe), with exit status ``status``."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        abandon_output()
        fail(no_output(error), status)


def no_output(error: OSError) -> str:
    return f"cannot write to standard output: {error.strerror or error}. The output is not complete."


def abandon_output() -> None:
    """Lead standard output nowhere: the interpreter writes what is left of it at its end, and would fail once more."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> None:
    """Print rows in columns, those in ``right`` aligned to the right; names are never cut or folded.

    In a terminal that is too narrow each row becomes a block: the first column on a line, and below it the others.
    """
    cells = [[encodable(plain(cell)) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(headers, *cells, strict=True)]
    console = Console()
    if console.is_terminal and sum(widths) + 2 * (len(widths) - 1) > console.width:
        for first, *others in cells:
            named = [f"{header} {cell}" for header, cell in zip(headers[1:], others, strict=True) if cell]
            typer.echo(first)
            for line in wrap(", ".join(named), max(console.width - 4, 20), break_on_hyphens=False):
                typer.echo(f"    {line}")
        return
    for row in (headers, *cells):
        padded = []
        for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - cell_len(cell))
            padded.append(space + cell if index in right else cell + space)
        typer.echo("  ".join(padded).rstrip())


@contextmanager
def progress_bar(label: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Draw a progress bar on standard error if that is a terminal; yields the function that advances it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)


def print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2))


def print_written(paths: Sequence[AnyPath], as_json: bool, counts: Mapping[str, int], **facts: Any) -> None:
    """Report the files that a command has written, their size, ``counts`` by name, and in JSON also ``facts``."""
    total = sum(path.stat().st_size for path in paths)
    if as_json:
        print_json({"files": [str(path) for path in paths], "bytes": total, **counts, **facts})
        return
    counted = ", ".join(f"{number} {name}" for name, number in counts.items())
    for path in paths:
        typer.echo(encodable(plain(f"wrote {path}")))
    typer.echo(f"{decimal(total)}: {counted}")
