"""A plan as text: tables of the bytes and of the traffic, the mode to take, and what the figures rest on."""

from __future__ import annotations

import io
from collections.abc import Sequence
from textwrap import wrap

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from .choice import binary
from .planner import Plan, PlanRow
from .traffic import Transfer

WIDTH = 120


def text_of(plan: Plan) -> str:
    """The whole text, without control characters and without a newline at its end."""
    place = f"{plan.ranks:,} rank{'' if plan.ranks == 1 else 's'}, {plan.ranks_per_node} on a node, {plan.backend}"
    if plan.mesh is not None:
        place += f", mesh {plan.mesh[0]} replicas x {plan.mesh[1]} shards"
    if plan.gpu_memory is not None:
        place += f", {binary(plan.gpu_memory)} each"
    parts = [
        f"{plan.model}: {plan.num_elements:,} elements in {plan.num_params:,} parameters\n{place}",
        f"Bytes on a rank, {plan.rows[0].precision}\n{_bytes_table(plan)}",
    ]
    if any(row.traffic for row in plan.rows):
        parts.append(f"Sent by a rank in a step\n{_traffic_table(plan)}")
    if plan.links is not None:
        parts.append(f"Time of a step, estimated for {_links_text(plan)}\n{_time_table(plan)}")
    if plan.others:
        parts.append(f"Bytes on a rank in other precisions\n{_precisions_table(plan)}")
    parts.append(_folded(f"Take {plan.recommended} (*): {plan.why}" if plan.recommended else plan.why))
    notes = [f"{row.mode}: {note}." for row in plan.rows for note in row.notes]
    parts.append("\n".join(_folded(f"- {text}", "  ") for text in (*notes, *plan.assumptions)))
    return "\n\n".join(parts)


def _folded(text: str, indent: str = "") -> str:
    return "\n".join(wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False))


def _rendered(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose cells are never cut or folded; the first ``left`` columns are aligned to the left."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Names come from files: they are printed as they are, without colours, links or markup.
    console = Console(file=io.StringIO(), width=10_000, color_system=None, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def _bytes_table(plan: Plan) -> str:
    names = ("parameters", "unmanaged", "gradients", "average", "masters", "buffers", "passing")
    # A column of zeros says nothing, but for those that every reader looks for.
    shown = [n for n in names if n not in ("unmanaged", "masters") or any(getattr(r.bytes, n) for r in plan.rows)]
    on_host = any(row.bytes.host for row in plan.rows)
    headers = ["mode", "shards", *("frozen+buffers" if name == "unmanaged" else name for name in shown)]
    activations = plan.rows[0].activations_bytes
    headers += (["activations"] if activations else []) + ["total"] + (["fits"] if plan.gpu_memory is not None else [])
    headers += ["on the host"] if on_host else []
    rows = []
    for row in plan.rows:
        cells = [_marked(row, plan), f"{row.shards:,}", *(binary(getattr(row.bytes, name)) for name in shown)]
        cells += ([binary(activations)] if activations else []) + [binary(row.total_bytes)]
        cells += [] if row.fits is None else ["tight" if row.is_tight else "yes" if row.fits else "no"]
        rows.append(cells + ([binary(row.bytes.host)] if on_host else []))
    return _rendered(headers, rows)


def _marked(row: PlanRow, plan: Plan) -> str:
    return f"{row.mode} *" if row.mode == plan.recommended else row.mode


def _traffic_table(plan: Plan) -> str:
    rows = []
    for row in plan.rows:
        for position, sent in enumerate(row.traffic):
            cells = [
                _marked(row, plan) if position == 0 else "",
                sent.kind,
                sent.by,
                f"{sent.ranks:,}",
                f"{sent.calls:,}",
            ]
            rows.append([*cells, _messages(sent), binary(sent.piece_bytes), decimal(sent.sent_bytes), _left(sent)])
        if len(row.traffic) > 1:
            across = decimal(row.across_bytes) if row.across_bytes else "-"
            rows.append(["", "all", "", "", "", "", "", decimal(row.sent_bytes), across])
    headers = ["mode", "kind", "by", "among ranks", "calls", "messages", "a piece", "sent", "leaves the node"]
    if plan.ranks <= plan.ranks_per_node:
        headers, rows = headers[:-1], [row[:-1] for row in rows]
    return _rendered(headers, rows, left=3)


def _messages(sent: Transfer) -> str:
    return "-" if sent.messages is None else f"{sent.messages:,}"


def _left(sent: Transfer) -> str:
    return decimal(sent.across_bytes) if sent.across_bytes else "-"


def _links_text(plan: Plan) -> str:
    """The links that times are estimated for, in words."""
    links = plan.links
    assert links is not None
    parts = []
    if plan.ranks > plan.ranks_per_node:
        parts.append(f"{links.link_gbit:g} Gbit/s a node, {links.latency_us:g} us")
    if plan.ranks_per_node > 1:
        parts.append(f"{links.node_gbit:g} Gbit/s a rank inside, {links.node_latency_us:g} us")
    if links.host_gbit is not None:
        parts.append(f"{links.host_gbit:g} Gbit/s of the processor")
    return "; ".join(parts)


def _time_table(plan: Plan) -> str:
    headers, rows = ["mode", "communication"], []
    computes = any(row.time is not None and row.time.compute for row in plan.rows)
    if computes:
        headers += ["compute", "exposed", "step", "exposed, overlap_forward"]
    for row in plan.rows:
        time = row.time
        assert time is not None
        cells = [_marked(row, plan), _seconds(time.communication)]
        if computes:
            overlapped = "-" if time.exposed_overlapped is None else _seconds(time.exposed_overlapped)
            cells += [_seconds(time.compute), _seconds(time.exposed), _seconds(time.step), overlapped]
        rows.append(cells)
    return _rendered(headers, rows)


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _precisions_table(plan: Plan) -> str:
    precisions = list(dict.fromkeys(row.precision for row in plan.others))
    totals = {(row.mode, row.precision): row for row in plan.others}
    rows = []
    for row in plan.rows:
        found = [totals.get((row.mode, precision)) for precision in precisions]
        rows.append([row.mode, *("-" if other is None else _total(other) for other in found)])
    return _rendered(["mode", *precisions], rows)


def _total(row: PlanRow) -> str:
    return binary(row.total_bytes) + ("" if row.fits is not False else " (too much)")
