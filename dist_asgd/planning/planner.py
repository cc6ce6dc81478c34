"""``dist_asgd.plan``: the bytes, the traffic and the mode to take, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..precision_checks import check_precision_fits
from ..storage.precision import Precision
from ..validation import check_options
from . import choice, modes, traffic
from .arguments import MOST_RANKS, bytes_of, check_dtype, links_of, topology
from .choice import FSDP2, HSDP, HYBRID1, HYBRID2, STAGE1, STAGE2, UNSHARDED
from .links import Links
from .modes import Layout, RankBytes
from .setup import BACKENDS, Setup
from .shapes import ModelShapes
from .sources import Source, shapes_of
from .timing import StepTime, StepTimer
from .traffic import Transfer

# The share of a GPU's memory that should be left for what a plan does not count: 3.2 GiB of 80 GiB.
RESERVE = 0.04

ASSUMPTIONS = (
    "A rank's bytes are an upper bound: all kinds are added, although not all are there at one time.",
    "Activations are counted only as --activations (activations=) gives them. Not counted are the CUDA context, "
    "buffers of NCCL, fragments of the allocator and buffers of torch.compile: a mode that leaves less than 4% for "
    "them is tight, and is taken only if no other one fits.",
    "Passing bytes are gradients of a bucket that were not sent yet (if backward follows registration order), DDP's "
    "buckets without gradient_as_bucket_view, intermediate results of torch.optim.ASGD's foreach form, and what FSDP2 "
    "gathers if each block and then the model is given to fully_shard; the last is an estimate.",
    "A step has one backward, and neither clips nor scales: each of these adds an exchange. Bytes of DDP, FSDP2 and "
    "NCCL are those of rings.",
)
GLOO_ASSUMPTION = (
    "With Gloo, buffers and messages are those of shared_memory=False. Ranks of one node that share memory send each "
    "other none of these messages, nor one for each rank to other nodes, and have outboxes in place of Gloo's buffers: "
    "up to 8 MiB each, or 24 MiB if shards lie on several nodes."
)
IN_BACKWARD_ASSUMPTION = (
    "Stage 2 is planned with step_in_backward=True, with which gradients can be neither clipped nor scaled."
)
TIME_ASSUMPTIONS = (
    "Times take every link for itself: no contention in switches, no slow rank, no jitter. A call takes its bytes over "
    "the slowest link on its way, and a latency for each message that waits for another: of NCCL in rings once around, "
    "and for sums between nodes in trees. Left out are the update, launches of kernels, the input of data, and what "
    "NCCL's kernels take from the computation, which is spread evenly over the elements, a third of it in forward.",
)


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One mode in one precision.

    Attributes:
        mode: "torch.optim.ASGD", "stage 1", "stage 2", "FSDP2", or one of the last three on a mesh of (replicas,
            shards): "stage 1, mesh", "stage 2, mesh", "FSDP2, mesh".
        precision: The dtypes of parameters, masters and averages, as a text.
        shards: Over how many ranks the state is cut; with FSDP2 the parameters. On a mesh its second dimension.
        bytes: The bytes on a rank, by kind.
        activations_bytes: What the caller of ``plan`` has added.
        gpu_memory: The bytes of memory that a rank has; None if the plan was given none.
        traffic: What a rank sends in a step, by kind; empty for a single rank.
        notes: What has to be known of this mode.
        time: The estimated time of a step; None if the plan was given no link, and in other precisions.
    """

    mode: str
    precision: str
    shards: int
    bytes: RankBytes
    activations_bytes: int
    gpu_memory: int | None
    traffic: tuple[Transfer, ...]
    notes: tuple[str, ...]
    time: StepTime | None = None

    @property
    def total_bytes(self) -> int:
        """The bytes on a rank, activations included."""
        return self.bytes.total + self.activations_bytes

    @property
    def fits(self) -> bool | None:
        """Whether all of it fits the GPU; None if the plan was given no memory."""
        return None if self.gpu_memory is None else self.total_bytes <= self.gpu_memory

    @property
    def is_tight(self) -> bool:
        """Whether it fits, but leaves too little for what a plan does not count."""
        return bool(self.fits) and self.gpu_memory is not None and self.total_bytes > (1 - RESERVE) * self.gpu_memory

    @property
    def sent_bytes(self) -> int:
        """The bytes that a rank sends in a step."""
        return sum(transfer.sent_bytes for transfer in self.traffic)

    @property
    def across_bytes(self) -> int:
        """Those of ``sent_bytes`` that leave the node."""
        return sum(transfer.across_bytes for transfer in self.traffic)


@dataclass(frozen=True, slots=True)
class Plan:
    """What ``dist_asgd.plan`` returns; printed, it is a table.

    Attributes:
        model: What was planned.
        num_params: The number of parameters (tensors), frozen ones included.
        num_elements: The number of their elements.
        ranks: The number of ranks.
        ranks_per_node: How many of them share a node.
        mesh: The mesh of the modes on one, (replicas, shards); None without such modes.
        backend: "nccl" or "gloo".
        gpu_memory: The bytes of memory that a rank has, or None.
        links: The links that times are estimated for; None without them.
        rows: The modes in the precision that was asked for.
        others: The same modes in other precisions, to compare: float32, bfloat16, and bfloat16 with masters.
        recommended: The mode to take; None if no mode fits.
        why: The reason.
        assumptions: What the figures rest on, a sentence each.
    """

    model: str
    num_params: int
    num_elements: int
    ranks: int
    ranks_per_node: int
    mesh: tuple[int, int] | None
    backend: str
    gpu_memory: int | None
    links: Links | None
    rows: tuple[PlanRow, ...]
    others: tuple[PlanRow, ...]
    recommended: str | None
    why: str
    assumptions: tuple[str, ...]

    def row(self, mode: str) -> PlanRow:
        """The row of ``mode`` in the precision that was asked for; KeyError if the plan has none."""
        found = {row.mode: row for row in self.rows}
        if mode not in found:
            raise KeyError(f"dist_asgd: this plan has no mode {mode!r}; it has {', '.join(found)}.")
        return found[mode]

    def table(self) -> str:
        """The plan as text: bytes by mode, traffic by mode, other precisions, the mode to take, and assumptions."""
        from .table import text_of

        return text_of(self)

    def __str__(self) -> str:
        return self.table()

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, as ``dist-asgd plan --json`` prints it."""
        found = asdict(self)
        for key, rows in (("rows", self.rows), ("others", self.others)):
            for entry, row in zip(found[key], rows, strict=True):
                for name in ("total_bytes", "fits", "is_tight", "sent_bytes", "across_bytes"):
                    entry[name] = getattr(row, name)
                if row.time is not None:
                    entry["time"]["step"] = row.time.step
        return found


def plan(
    model: Source,
    *,
    ranks: int,
    ranks_per_node: int | None = None,
    mesh: tuple[int, int] | None = None,
    gpu_memory: int | str | None = None,
    activations: int | str = 0,
    dtype: torch.dtype | None = None,
    average_dtype: torch.dtype | None = None,
    master_weights: bool = False,
    reduce_dtype: torch.dtype | None = None,
    bucket_cap_mb: float = 25.0,
    gradient_as_bucket_view: bool = True,
    fused: bool = False,
    step_in_backward: bool = False,
    averages: int = 0,
    average_device: str | None = None,
    backend: str = "nccl",
    link_gbit: float | None = None,
    latency_us: float | None = None,
    node_gbit: float | None = None,
    node_latency_us: float | None = None,
    host_gbit: float | None = None,
    compute_ms: float | None = None,
) -> Plan:
    """Count the bytes on a rank and the traffic of a step in each mode, and name the mode to take. Not collective.

    It needs no process group, no GPU and no memory of the model's size. For the same model and options the bytes are
    those of ``ShardedASGD.memory_report()``, and what others hold beside the optimizer is added.

    Args:
        model: A module (also on the meta device); what optimizers take (parameters, named ones, groups); a
            configuration as ``transformers`` has it, as a dict; a number of parameters, also as "7B"; or a path: a
            safetensors file or index, a ``config.json``, or a folder with one of them.
        ranks: The number of ranks.
        ranks_per_node: How many of them share a node; by default at most 8.
        mesh: (replicas, shards) for the modes on a mesh; by default one replica on each of several nodes.
        gpu_memory: The memory of a GPU, in bytes or as "80GiB".
        activations: What else lies there: bytes of activations, or a text such as "12GiB".
        dtype: The dtype of the parameters; by default the model's own. A number of parameters is in float32.
        average_dtype, master_weights, reduce_dtype, bucket_cap_mb, fused: As in ``ShardedASGD``.
        step_in_backward: As in ``ShardedASGD``, for the modes of stage 2; with ``backend="gloo"``. Times are those of
            stage 2 without it.
        averages: How many ``ShardedAverage`` of all trained parameters there are beside the optimizer; beside
            ``torch.optim.ASGD`` each is a whole copy, as torch's ``AveragedModel`` is.
        average_device: Where those lie, as in ``ShardedAverage``: None, or ``"cpu"`` for host memory.
        gradient_as_bucket_view: As in ``DistributedDataParallel``; False adds the bytes of its buckets.
        backend: "nccl" for GPUs, "gloo" for CPUs.
        link_gbit: What a node sends to the others for all of its ranks, in Gbit/s, while it receives as much. With it
            (on a single node: with ``node_gbit``) the plan estimates times.
        latency_us: The latency of a message between nodes, in microseconds; by default 14, with Gloo 100.
        node_gbit: What a rank sends to the others of its node; by default 2400, which is NVLink, with Gloo 16.
        node_latency_us: The latency of a message inside a node; by default 3.4, with Gloo 50.
        host_gbit: The rate at which the processor that computes passes messages on, if it does; by default with Gloo
            12, and with NCCL not at all.
        compute_ms: Forward and backward of a step without communication, in milliseconds. With it the plan says how
            much of the communication is exposed.

    Raises:
        ValueError: An argument is not supported, or the model has no shapes that can be read.
        OSError: A file cannot be read.
    """
    shapes = shapes_of(model)
    check_dtype(dtype)
    asked = shapes if dtype is None else shapes.as_dtype(dtype)
    precision = Precision(average_dtype, master_weights, None, reduce_dtype)
    check_options(2, bucket_cap_mb, {}, precision, False)
    check_precision_fits(precision, [{"params": [param.on_meta() for param in asked.trained]}])
    per_node, grid, notes = topology(ranks, ranks_per_node, mesh)
    if backend not in BACKENDS:
        raise ValueError(f"dist_asgd: backend must be {' or '.join(BACKENDS)}, got {backend!r}.")
    if isinstance(averages, bool) or not isinstance(averages, int) or averages < 0:
        raise ValueError(f"dist_asgd: averages must be a whole number from 0 on, got {averages!r}.")
    if average_device not in (None, "cpu") or (average_device == "cpu" and (not averages or backend != "nccl")):
        raise ValueError(
            f"dist_asgd: average_device={average_device!r} with averages={averages} and backend={backend!r}: it is "
            f"None, or 'cpu' for averages beside an optimizer on GPUs. Pass averages=1 (--averages 1) or more and "
            f"backend='nccl', or leave average_device out."
        )
    if step_in_backward and backend != "gloo":
        raise ValueError(
            f"dist_asgd: step_in_backward with backend={backend!r}: so far only parameters on CPUs are updated in "
            f"backward. Pass backend='gloo' (--backend gloo), or leave step_in_backward out."
        )
    setup = Setup(
        ranks,
        per_node,
        grid,
        precision,
        bucket_cap_mb,
        backend,
        gradient_as_bucket_view,
        fused,
        step_in_backward,
        averages,
        average_device is not None,
    )
    memory = None if gpu_memory is None else bytes_of(gpu_memory, "gpu_memory", least=1)
    extra = bytes_of(activations, "activations")
    given = {
        "link_gbit": link_gbit,
        "latency_us": latency_us,
        "node_gbit": node_gbit,
        "node_latency_us": node_latency_us,
        "host_gbit": host_gbit,
        "compute_ms": compute_ms,
    }
    links = links_of(setup, given)
    timer = None if links is None else StepTimer(asked, setup, links, (compute_ms or 0.0) * 1e-3)
    rows = tuple(_rows(asked, setup, memory, extra, timer))
    recommended, why = choice.choose(rows, ranks, memory)
    if recommended is None and memory is not None:
        why += _enough_ranks(asked, setup, memory - extra)
    return Plan(
        model=shapes.source,
        num_params=sum(1 for _ in shapes.params),
        num_elements=sum(param.numel for param in shapes.params),
        ranks=ranks,
        ranks_per_node=per_node,
        mesh=grid,
        backend=backend,
        gpu_memory=memory,
        links=links,
        rows=rows,
        others=tuple(_other_precisions(asked, setup, memory, extra)),
        recommended=recommended,
        why=why,
        assumptions=(
            *shapes.assumptions,
            *notes,
            *ASSUMPTIONS,
            *((IN_BACKWARD_ASSUMPTION,) if step_in_backward else ()),
            *((GLOO_ASSUMPTION,) if backend == "gloo" and per_node > 1 else ()),
            *(() if links is None else TIME_ASSUMPTIONS),
        ),
    )


# --- rows --------------------------------------------------------------------------------------------------------


def _layouts(
    model: ModelShapes, setup: Setup, timer: StepTimer | None
) -> Iterator[tuple[str, int, Layout, tuple[Transfer, ...], StepTime | None]]:
    """Each mode with its number of shards, its layout, its traffic and the time of its step."""
    ranks = setup.ranks
    time = timer.unsharded() if timer else None
    yield UNSHARDED, 1, modes.unsharded(model, setup), traffic.of_unsharded(model, setup), time
    for stage1, stage2, shards in ((STAGE1, STAGE2, ranks), (HYBRID1, HYBRID2, setup.mesh and setup.mesh[1])):
        if shards is None:
            continue
        layout = modes.stage1(model, setup, shards)
        time = timer.stage1(layout, shards) if timer else None
        yield stage1, shards, layout, traffic.of_stage1(model, layout, shards, setup), time
        layout = modes.stage2(model, setup, shards)
        time = timer.stage2(layout, shards) if timer else None
        yield stage2, shards, layout, traffic.of_stage2(model, layout, shards, setup), time
    for mode, replicas, shards in ((FSDP2, 1, ranks), (HSDP, *(setup.mesh or (1, None)))):
        if shards is None:
            continue
        layout = modes.dtensors(model, setup, replicas, shards)
        time = timer.dtensors(layout, shards) if timer else None
        yield mode, shards, layout, traffic.of_dtensors(model, layout, shards, setup), time


def _enough_ranks(model: ModelShapes, setup: Setup, memory: int) -> str:
    """From how many ranks on FSDP2 fits, in powers of two times the ranks that there are; empty if it never does."""
    for doublings in range(1, MOST_RANKS.bit_length()):
        ranks = setup.ranks << doublings
        if ranks > MOST_RANKS:
            break
        if modes.dtensors(model, replace(setup, ranks=ranks), 1, ranks).bytes.total <= memory:
            return f" FSDP2 fits on {ranks:,} ranks, and on fewer than {ranks // 2:,} it does not."
    return " FSDP2 fits on no number of ranks: what it gathers, and activations, are too large."


def _rows(
    model: ModelShapes, setup: Setup, memory: int | None, activations: int, timer: StepTimer | None = None
) -> Iterator[PlanRow]:
    text = precision_text(model, setup.precision)
    for mode, shards, layout, transfers, time in _layouts(model, setup, timer):
        yield PlanRow(mode, text, shards, layout.bytes, activations, memory, transfers, layout.notes, time)


def _other_precisions(model: ModelShapes, setup: Setup, memory: int | None, activations: int) -> Iterator[PlanRow]:
    """The rows of float32, of bfloat16, and of bfloat16 with masters, but for the precision that was asked for."""
    asked = precision_text(model, setup.precision)
    for dtype, masters in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        other = model.as_dtype(dtype)
        precision = replace(setup.precision, master_weights=masters)
        if precision_text(other, precision) != asked and any(p.dtype == dtype for p in other.trained):
            yield from _rows(other, replace(setup, precision=precision), memory, activations)


def precision_text(model: ModelShapes, precision: Precision) -> str:
    """The dtypes of parameters, masters, averages and messages as a text."""
    dtypes = sorted({_name(param.dtype) for param in model.trained})
    text = "+".join(dtypes)
    if precision.master_weights:
        text += ", masters"
    if precision.average_dtype is not None:
        text += f", ax {_name(precision.average_dtype)}"
    if precision.reduce_dtype is not None:
        text += f", sent in {_name(precision.reduce_dtype)}"
    return text


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
