"""``dist-asgd plan``: reads the command line, calls ``plan`` and prints what it returns."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import torch
import typer

from ..console import encodable, plain, print_json, printing, reported
from .planner import plan as make_plan


class Dtype(StrEnum):
    """A dtype of parameters, averages or messages."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Backend(StrEnum):
    """The backend of the process group."""

    NCCL = "nccl"
    GLOO = "gloo"


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A number of parameters (7B), a *.safetensors file, a model.safetensors.index.json, a config.json, or "
            "a folder with one of them.",
            show_default=False,
        ),
    ],
    ranks: Annotated[
        int,
        typer.Option(
            "--ranks", "-n", help="The number of ranks: of GPUs, or with Gloo of processes.", show_default=False
        ),
    ],
    ranks_per_node: Annotated[
        int | None, typer.Option(help="How many of them share a node. Default: at most 8.", show_default=False)
    ] = None,
    mesh: Annotated[
        str,
        typer.Option(
            metavar="RxS",
            help="Replicas x shards of the modes on a mesh. Default: a replica on each of several nodes.",
            show_default=False,
        ),
    ] = "",
    gpu_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="The memory of a GPU: 80GiB, 40GB.", show_default=False)
    ] = "",
    activations: Annotated[
        str, typer.Option(metavar="SIZE", help="What else lies there, such as activations.", show_default=False)
    ] = "0",
    dtype: Annotated[
        Dtype | None, typer.Option(help="The parameters' dtype. Default: that of MODEL.", show_default=False)
    ] = None,
    average_dtype: Annotated[
        Dtype | None,
        typer.Option(help="The dtype of ax. Default: the parameters', but float32 for 16 bits.", show_default=False),
    ] = None,
    master_weights: Annotated[bool, typer.Option("--master-weights", help="Keep float32 masters.")] = False,
    reduce_dtype: Annotated[
        Dtype | None, typer.Option(help="The dtype in which stage 2 sends gradients.", show_default=False)
    ] = None,
    bucket_cap_mb: Annotated[float, typer.Option(help="The largest bucket, in MiB.")] = 25.0,
    gradient_as_bucket_view: Annotated[
        bool, typer.Option(help="Whether DDP's gradients are views of its buckets.")
    ] = True,
    fused: Annotated[bool, typer.Option("--fused", help="Update with fused=True.")] = False,
    step_in_backward: Annotated[
        bool, typer.Option("--step-in-backward", help="Stage 2 updates each bucket during backward (Gloo).")
    ] = False,
    averages: Annotated[int, typer.Option(help="How many ShardedAverage there are beside the optimizer.")] = 0,
    average_device: Annotated[
        str, typer.Option(metavar="DEVICE", help="cpu: those lie in host memory.", show_default=False)
    ] = "",
    backend: Annotated[Backend, typer.Option(help="nccl for GPUs, gloo for CPUs.")] = Backend.NCCL,
    link_gbit: Annotated[
        float | None,
        typer.Option(help="Gbit/s that a node sends to others, for all of its GPUs: adds times.", show_default=False),
    ] = None,
    latency_us: Annotated[
        float | None,
        typer.Option(help="Microseconds of a message between nodes. Default: 14, gloo 100.", show_default=False),
    ] = None,
    node_gbit: Annotated[
        float | None,
        typer.Option(help="Gbit/s of a GPU to others of its node. Default: 2400, gloo 16.", show_default=False),
    ] = None,
    node_latency_us: Annotated[
        float | None,
        typer.Option(help="Microseconds of a message inside a node. Default: 3.4, gloo 50.", show_default=False),
    ] = None,
    host_gbit: Annotated[
        float | None,
        typer.Option(
            help="Gbit/s that the computing processor passes on, if it does. Default: gloo 12.", show_default=False
        ),
    ] = None,
    compute_ms: Annotated[
        float | None,
        typer.Option(
            help="Milliseconds of forward and backward alone: shows what communication adds.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Show what each mode holds on a rank and sends in a step for MODEL, what fits, and which mode to take.

    Nothing is built: the command needs no GPU and no process group, and of files it reads headers only. For models in
    Python call `dist_asgd.plan(module, ranks=...)`, also with a module on the meta device.

    Exit status 0 also if no mode fits: the text says so, and `recommended` is null in the JSON document.
    """
    with reported():
        found = make_plan(
            model,
            ranks=ranks,
            ranks_per_node=ranks_per_node,
            mesh=_mesh(mesh),
            gpu_memory=gpu_memory or None,
            activations=activations,
            dtype=_dtype(dtype),
            average_dtype=_dtype(average_dtype),
            master_weights=master_weights,
            reduce_dtype=_dtype(reduce_dtype),
            bucket_cap_mb=bucket_cap_mb,
            gradient_as_bucket_view=gradient_as_bucket_view,
            fused=fused,
            step_in_backward=step_in_backward,
            averages=averages,
            average_device=average_device or None,
            backend=backend.value,
            link_gbit=link_gbit,
            latency_us=latency_us,
            node_gbit=node_gbit,
            node_latency_us=node_latency_us,
            host_gbit=host_gbit,
            compute_ms=compute_ms,
        )
    with printing():
        if as_json:
            print_json(found.as_dict())
        else:
            typer.echo(encodable(plain(found.table())))


def _dtype(name: Dtype | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name.value)


def _mesh(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    replicas, _, shards = text.lower().partition("x")
    if not (replicas.strip().isdecimal() and shards.strip().isdecimal()):
        raise ValueError(f"dist_asgd: --mesh must be replicas x shards, such as 4x8, got {text!r}.")
    return int(replicas), int(shards)
