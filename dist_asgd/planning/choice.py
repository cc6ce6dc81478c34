"""Which mode to take, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.filesize import decimal

if TYPE_CHECKING:
    from .planner import PlanRow

UNSHARDED, STAGE1, STAGE2 = "torch.optim.ASGD", "stage 1", "stage 2"
HYBRID1, HYBRID2 = "stage 1, mesh", "stage 2, mesh"
FSDP2, HSDP = "FSDP2", "FSDP2, mesh"
# Below this size a message costs its latency, and not its bytes. Buckets grow so that pieces have 64 KiB, if the model
# is large enough.
LEAST_PIECE_BYTES = 32 << 10


def binary(nbytes: int) -> str:
    """Bytes for people in binary units, as memory is sold: 1.5 GiB."""
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 1000 else f"{value:.3g} {unit}"


def choose(rows: Sequence[PlanRow], ranks: int, gpu_memory: int | None) -> tuple[str | None, str]:
    """The mode to take of ``rows``, which have one precision, and the reason; None if none fits."""
    by_mode = {row.mode: row for row in rows}
    fitting = {mode: row for mode, row in by_mode.items() if row.fits is not False and not row.is_tight}
    fitting = fitting or {mode: row for mode, row in by_mode.items() if row.fits}
    if ranks == 1:
        return _for_one_rank(by_mode[STAGE1], gpu_memory)
    if STAGE2 in fitting:
        return _with_whole_parameters(by_mode, fitting, gpu_memory)
    why_not = _too_much(by_mode[STAGE2], gpu_memory)
    if HYBRID2 in by_mode:
        why_not += ", and on a mesh more"
    if FSDP2 not in fitting:
        return None, (
            f"No mode fits. {why_not}; FSDP2, which shards the parameters too, needs "
            f"{_need(by_mode[FSDP2], gpu_memory)}. Take more ranks, bfloat16 parameters, or larger GPUs."
        )
    reason = f"{why_not}; FSDP2 shards the parameters too, and needs"
    mesh = fitting.get(HSDP)
    better = None if mesh is None else _for_mesh(fitting[FSDP2], mesh)
    if mesh is not None and better is not None:
        return HSDP, f"{reason} {_need(mesh, gpu_memory)}. {better}"
    return FSDP2, f"{reason} {_need(fitting[FSDP2], gpu_memory)}."


def _for_one_rank(row: PlanRow, gpu_memory: int | None) -> tuple[str | None, str]:
    if row.fits is False:
        return None, f"One rank shards nothing, and needs {_need(row, gpu_memory)}. Take more ranks: stage 2 shards."
    return STAGE1, f"One rank shards nothing and sends nothing: every mode holds the same, {_need(row, gpu_memory)}."


def _with_whole_parameters(
    by_mode: dict[str, PlanRow], fitting: dict[str, PlanRow], gpu_memory: int | None
) -> tuple[str, str]:
    flat, mesh = by_mode[STAGE2], fitting.get(HYBRID2)
    if mesh is not None:
        reason = _for_mesh(flat, mesh)
        if reason:
            return HYBRID2, f"{reason} It needs {_need(mesh, gpu_memory)}, plain stage 2 {binary(flat.total_bytes)}."
    stage1 = by_mode[STAGE1]
    share = flat.sent_bytes / stage1.sent_bytes if stage1.sent_bytes else 1
    reason = (
        f"It shards averages and gradients and needs {_need(flat, gpu_memory)}, where stage 1 needs "
        f"{binary(stage1.total_bytes)}; a rank sends {share:.0%} of stage 1's bytes, as DDP's all-reduce falls away."
    )
    if STAGE1 in fitting:
        reason += " Stage 1 changes less of a script: one class name, and DDP stays."
    return STAGE2, reason


def _for_mesh(flat: PlanRow, mesh: PlanRow) -> str | None:
    """Why shards inside a node, with replicas across nodes, are better than shards over all ranks; None if not."""
    across = _less_across(flat, mesh)
    if across is not None:
        return across
    pieces = {row.mode: [t.piece_bytes for t in row.traffic if t.kind == "all-gather"] for row in (flat, mesh)}
    smallest, larger = min(pieces[flat.mode], default=0), min(pieces[mesh.mode], default=0)
    if smallest < LEAST_PIECE_BYTES and smallest < larger:
        return (
            f"Cut over all ranks a message has pieces of {binary(smallest)}, which cost more latency than bytes; cut "
            f"inside a node they have {binary(larger)}."
        )
    return None


def _less_across(flat: PlanRow, mesh: PlanRow) -> str | None:
    """What a mesh saves between nodes, if that is half of it at least."""
    if 2 * mesh.across_bytes > flat.across_bytes:
        return None
    return (
        f"Shards inside a node send {decimal(mesh.across_bytes)} a rank and step across nodes, where shards over all "
        f"ranks send {decimal(flat.across_bytes)}."
    )


def _need(row: PlanRow, gpu_memory: int | None) -> str:
    return f"{binary(row.total_bytes)} a rank" + ("" if gpu_memory is None else f" of {binary(gpu_memory)}")


def _too_much(row: PlanRow, gpu_memory: int | None) -> str:
    return f"Stage 2 needs {_need(row, gpu_memory)}, as each rank has all parameters"
