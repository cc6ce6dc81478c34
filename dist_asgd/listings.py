"""Prints what ``inspect`` and ``diff`` have found: facts that all parameters share on one line, the others in tables.

``cli.py`` calls it, inside ``printing()``. Lines of text are at most 80 columns wide, unless a name is longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from textwrap import wrap

import typer
from rich.filesize import decimal

from .checkpoint.offline.diff import Comparison, Difference, Kind
from .checkpoint.offline.inspect import OtherEntry, ParameterEntry, Summary
from .console import encodable, plain, print_table

_WIDTH = 80
_MAX_ENTRIES = 20
# Kinds whose differences are the same for many parameters, and are listed once for all of these.
_SHARED = (Kind.SCALARS, Kind.HYPERPARAMETERS)
_TENSORS = (Kind.PARAMETERS, Kind.AVERAGES, Kind.MASTERS, Kind.OPTIMIZER, Kind.BUFFERS)

_DEFAULTS = (("every", 1), ("warmup", 0))

# The columns of ``inspect`` beside the parameter's name: a header, whether it is aligned to the right, the cell, and
# the words for the line of what all parameters share. None: it is never on that line.
_Column = tuple[str, bool, Callable[[ParameterEntry], str], str | None]
_COLUMNS: tuple[_Column, ...] = (
    ("shape", False, lambda p: shape_text(p.shape), None),
    ("dtype", False, lambda p: _dtypes(p), "{}"),
    ("size", True, lambda p: decimal(p.bytes), None),
    ("step", True, lambda p: _number(p.step), "step {}"),
    ("eta", True, lambda p: "" if p.eta is None else f"{p.eta:.6g}", "eta {}"),
    ("t0", True, lambda p: _number(p.t0), "t0 {}"),
    ("average", False, lambda p: _average(p), "{}"),
)
# Beside the shape and the step, what optimizers that are no ASGD have, and own entries of users.
_OWN_COLUMNS: tuple[_Column, ...] = (
    ("state", False, lambda p: _own_state(p), "state {}"),
    ("state size", True, lambda p: decimal(p.state_bytes) if p.state_bytes else "", None),
)


def print_summary(summary: Summary) -> None:
    """Print what ``inspect`` has found, on standard output."""
    typer.secho(encodable(plain(summary.path)), bold=True)
    step = "step unknown (no manifest)" if summary.step is None else f"step {summary.step}"
    writer = "" if summary.written_by is None else f" with dist_asgd {summary.written_by}"
    _print(f"{step}, written by {summary.num_ranks} rank{'' if summary.num_ranks == 1 else 's'}{writer}")
    checked = "sizes and metadata match the manifest" if summary.verified else "not verified"
    _print(f"{summary.num_files} files, {decimal(summary.file_bytes)}, {checked}")
    _print_parameters(summary.parameters)
    by_rank = " (by rank)" if all(entry.name.isdecimal() for entry in summary.extra) else ""
    for title, entries in (("also in the model", summary.others), (f"extra{by_rank}", summary.extra)):
        if entries:
            more = f", and {len(entries) - _MAX_ENTRIES} more" if len(entries) > _MAX_ENTRIES else ""
            _print(f"{title}: {', '.join(map(_entry, entries[:_MAX_ENTRIES]))}{more}")
    for entry in summary.averages:
        _print(f"average {entry}, {entry.num_parameters} parameters, {decimal(entry.bytes)}")
    if summary.optimizer:
        _print(f"optimizer: {summary.optimizer}")
    if summary.other_keys:
        _print(f"other keys: {summary.other_keys}")
    _print(
        f"{len(summary.parameters)} parameters, {summary.num_elements:,} elements; "
        f"model {decimal(summary.model_bytes)}, optimizer state {decimal(summary.state_bytes)}"
    )


def _print_parameters(parameters: Sequence[ParameterEntry]) -> None:
    """Print a row for each parameter, without the columns that are equal in every row: those are on a line above."""
    shared: list[str] = []
    columns: list[_Column] = []
    has_averages = any(p.ax_dtype is not None for p in parameters)
    listed = _COLUMNS if has_averages else (*_COLUMNS[:-1], *_OWN_COLUMNS)
    if has_averages and any(p.own_state for p in parameters):
        listed += _OWN_COLUMNS[:1]
    for column in listed:
        cells = {column[2](p) for p in parameters}
        if len(parameters) > 1 and len(cells) == 1 and column[3] is not None:
            shared += [column[3].format(cell) for cell in cells if cell]
        elif any(cells):
            columns.append(column)
    if shared:
        _print(f"all: {', '.join(shared)}")
    if not parameters:
        return
    rows = [[p.name, *(cell(p) for _, _, cell, _ in columns)] for p in parameters]
    right = [index for index, column in enumerate(columns, 1) if column[1]]
    print_table(("parameter", *(column[0] for column in columns)), rows, right=right)


def _dtypes(entry: ParameterEntry) -> str:
    if entry.ax_dtype in (None, entry.dtype):
        return entry.dtype or "-"
    return f"{entry.dtype or '-'} (ax {entry.ax_dtype})"


def _average(entry: ParameterEntry) -> str:
    if entry.step is None:
        return "no state"
    if not entry.averaging:
        return "averaging not begun"
    if entry.averaged_steps is None:
        return f"averaging begun, mu {entry.mu:.6g}"
    # Options that change nothing are left out.
    options = {key: value for key, value in (entry.average_rule or {}).items() if (key, value) not in _DEFAULTS}
    kind = options.pop("rule", "uniform")
    shown = f" ({', '.join(f'{key} {value}' for key, value in options.items())})" if options else ""
    iterates = f"average of {entry.averaged_steps} iterate{'' if entry.averaged_steps == 1 else 's'}"
    return f"{'' if kind == 'uniform' else f'{kind} '}{iterates}{shown}"


def _own_state(entry: ParameterEntry) -> str:
    """The tensors of the state, but for the step, with dtypes and shapes that are not the parameter's."""
    if entry.ax_dtype is None and not entry.own_state:
        return "none"
    words = []
    for tensor in entry.own_state:
        if tensor.name == "step":
            continue
        shape = f" {shape_text(tensor.shape)}" if tensor.shape not in (entry.shape, ()) else ""
        words.append(f"{tensor.name}{shape}{f' {tensor.dtype}' if tensor.dtype != entry.dtype else ''}")
    return ", ".join(words)


def _number(value: float | None) -> str:
    """A count, which is written in full if it is whole."""
    if value is None:
        return ""
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:g}"


def shape_text(shape: tuple[int, ...]) -> str:
    """The shape for people: ``256×64``, or ``scalar``."""
    return "×".join(map(str, shape)) if shape else "scalar"


def _entry(entry: OtherEntry) -> str:
    return f"{entry.name} {shape_text(entry.shape)} {entry.dtype}" if entry.dtype else entry.name


def print_differences(comparison: Comparison, differences: Sequence[Difference], brief: bool) -> None:
    """Print the differences of two checkpoints by kind, on standard output; with ``brief`` one line for each kind."""
    for kind in Kind:
        of_kind = [difference for difference in differences if difference.kind is kind]
        if of_kind:
            _print(f"{kind}: {_counted(comparison, kind, of_kind)}{_largest(kind, of_kind)}")
            if not brief:
                _print_kind(kind, of_kind)
    _print(f"{len(differences)} of {comparison.num_keys.total()} keys differ")


def _counted(comparison: Comparison, kind: Kind, differences: Sequence[Difference]) -> str:
    if kind in (Kind.FIRST_ONLY, Kind.SECOND_ONLY, Kind.FORM):
        return f"{len(differences)} key{'' if len(differences) == 1 else 's'}"
    entries = dict.fromkeys(difference.entry for difference in differences) if kind in _SHARED else ()
    listed = f" ({', '.join(entries)})" if entries else ""
    return f"{len(differences)} of {comparison.num_keys[kind]} differ{listed}"


def _largest(kind: Kind, differences: Sequence[Difference]) -> str:
    """The largest relative difference of tensors, and whose it is."""
    if kind not in _TENSORS:
        return ""
    worst = max(differences, key=lambda difference: _order(difference.relative))
    entry = f".{worst.entry}" if kind is Kind.OPTIMIZER else ""
    return f", relative up to {_short(worst.relative)} ({worst.name}{entry})"


def _print_kind(kind: Kind, differences: Sequence[Difference]) -> None:
    if kind in _SHARED:
        # The same values in many parameters make one row.
        of_values: dict[tuple[str, str], list[str]] = {}
        for difference in differences:
            of_values.setdefault((difference.entry, difference.description), []).append(difference.name)
        rows = [
            [f"  {entry}", description, names[0] if len(names) == 1 else f"{len(names)} parameters"]
            for (entry, description), names in of_values.items()
        ]
        print_table(("  entry", "first and second", "of"), rows)
    elif kind in _TENSORS:
        entries = [f".{d.entry}" if kind is Kind.OPTIMIZER else "" for d in differences]
        rows = [
            [f"  {d.name}{entry}", d.description, _short(d.max_abs), _short(d.relative)]
            for d, entry in zip(differences, entries, strict=True)
        ]
        print_table(("  name", "differing", "largest", "relative"), rows, right=(2, 3))
    elif kind is Kind.FORM:
        print_table(("  key", "first and second"), [[f"  {d.key}", d.description] for d in differences])
    elif kind in (Kind.FIRST_ONLY, Kind.SECOND_ONLY):
        for difference in differences:
            _print(f"  {difference.key}")
    else:
        for difference in differences:
            relative = "" if difference.relative is None else f", relative {_short(difference.relative)}"
            _print(f"  {difference.key}: {difference.description}{relative}")


def _order(value: float | None) -> float:
    """``value`` for finding the largest: NaN, a difference of infinite numbers, comes above all."""
    return -1.0 if value is None else math.inf if math.isnan(value) else value


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _print(text: str) -> None:
    """Print one sentence or list, wrapped; names stay whole."""
    indent = " " * (len(text) - len(text.lstrip()) + 4)
    for line in wrap(
        encodable(plain(text)), _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [""]:
        typer.echo(line)
