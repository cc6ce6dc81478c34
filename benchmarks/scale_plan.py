"""What ``benchmarks.scale`` says without measuring: bytes, messages and times of large models, from ``dist_asgd.plan``.

The plan lays parameters out by the optimizer's own classes on the meta device; nothing of the model's size is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch

from benchmarks.report import markdown_table
from dist_asgd import plan
from dist_asgd.placements.dtensor import chunk_of
from dist_asgd.planning.choice import FSDP2, HYBRID2, binary
from dist_asgd.planning.planner import Plan
from dist_asgd.planning.shapes import ModelShapes
from dist_asgd.planning.sources import shapes_of
from dist_asgd.storage.layout import MIN_BUCKETS, bucket_cap_bytes, fill_buckets

STAGE1, STAGE2, HYBRID, DTENSOR = "stage 1", "stage 2", "hybrid", "DTensor"
MODES = (STAGE2, STAGE1, HYBRID, DTENSOR)
# As the plan calls them.
_ROWS = {STAGE1: "stage 1", STAGE2: "stage 2", HYBRID: HYBRID2, DTENSOR: FSDP2}
ONE_EACH, NUM_ONE_EACH = "291 buckets", 291
PER_NODE = 8

_LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_LLAMA_3 = {**_LLAMA, "num_key_value_heads": 8, "vocab_size": 128256}
# Llama 2 7B, Llama 3 70B and Llama 3.1 405B, by their published configurations.
MODELS: dict[str, dict[str, Any]] = {
    "7B": {**_LLAMA, "intermediate_size": 11008, "vocab_size": 32000},
    "70B": {
        **_LLAMA_3,
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "intermediate_size": 28672,
    },
    "405B": {
        **_LLAMA_3,
        "hidden_size": 16384,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "intermediate_size": 53248,
    },
}
DTYPE = torch.bfloat16
# What the times rest on: eight 400 Gbit/s cards a node, NVLink, and 8,192 tokens a rank at 400 Tflop/s.
LINK_GBIT, LATENCY_US, NODE_GBIT, NODE_LATENCY_US = 3200.0, 14.0, 2400.0, 3.4
TOKENS, FLOPS = 8192, 400e12
GPU_MEMORY = "80GiB"


def shards_of(mode: str, ranks: int) -> int:
    """Over how many ranks a mode shards: hybrid inside a node, of which there are two at least."""
    return min(PER_NODE, ranks // 2) if mode == HYBRID else ranks


@cache
def shapes(model: str) -> ModelShapes:
    """The parameters of one of ``MODELS``."""
    return shapes_of(MODELS[model]).as_dtype(DTYPE)


def groups_of(model: str, mode: str, ranks: int) -> list[list[int]]:
    """The positions of the parameters of each bucket, in reverse registration order."""
    if model == ONE_EACH:
        return [[position] for position in range(NUM_ONE_EACH)]
    numels = [param.numel for param in reversed(list(shapes(model).params))]
    stage = 1 if mode in (STAGE1, DTENSOR) else 2
    cap = bucket_cap_bytes(25.0, sum(numels) * DTYPE.itemsize, MIN_BUCKETS[stage], shards_of(mode, ranks))
    return fill_buckets(numels, DTYPE.itemsize, cap)


def planned(model: str, ranks: int, modes: Iterable[str]) -> list[dict[str, Any]]:
    """A row of figures for each of ``modes``."""
    numel = sum(param.numel for param in shapes(model).params)
    compute = 6 * numel * TOKENS / FLOPS
    shards = shards_of(HYBRID, ranks)
    found = plan(
        MODELS[model],
        ranks=ranks,
        ranks_per_node=shards,
        mesh=(ranks // shards, shards),
        dtype=DTYPE,
        gpu_memory=GPU_MEMORY,
        link_gbit=LINK_GBIT * shards / PER_NODE,
        latency_us=LATENCY_US,
        node_gbit=NODE_GBIT,
        node_latency_us=NODE_LATENCY_US,
        compute_ms=compute * 1e3,
    )
    return [_figures(found, model, mode, ranks, numel) for mode in modes]


def _figures(found: Plan, model: str, mode: str, ranks: int, numel: int) -> dict[str, Any]:
    row = found.row(_ROWS[mode])
    shards = shards_of(mode, ranks)
    share = numel * torch.float32.itemsize / shards
    # Every rank has a shard of one length; FSDP2 cuts dimension 0 into rows, of which the last ranks may have none.
    most = _most_local(model, ranks) * torch.float32.itemsize if mode == DTENSOR else row.bytes.average
    mean = share if mode == DTENSOR else row.bytes.average
    time = row.time
    assert time is not None
    return {
        "model": model,
        "mode": mode,
        "ranks": ranks,
        "buckets": len(groups_of(model, mode, ranks)) if mode != DTENSOR else None,
        "state": row.bytes.average,
        "imbalance": most / mean,
        "over_share": row.bytes.average / share,
        "padding": row.bytes.padding,
        "buffers": row.bytes.buffers,
        "passing": row.bytes.passing,
        "total": row.total_bytes,
        "fits": row.fits,
        "traffic": [
            {"kind": t.kind, "by": t.by, "calls": t.calls, "sent": t.sent_bytes, "piece": t.piece_bytes}
            for t in row.traffic
        ],
        "compute": time.compute,
        "communication": time.communication,
        "exposed": time.exposed,
        "exposed_overlapped": time.exposed_overlapped,
    }


def _most_local(model: str, ranks: int) -> int:
    """The elements of the first rank's local tensors, which are the longest."""
    params = shapes(model).params
    return sum(chunk_of(p.shape[0], ranks, 0)[1] * (p.numel // p.shape[0]) for p in params)


# --- text ------------------------------------------------------------------------------------------------------------


def sections(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The planned part of the report."""
    if not rows:
        return []
    return [
        "## Bytes and imbalance (planned)",
        "",
        "From `dist_asgd.plan`, without activations: parameters and messages in bfloat16, averages in float32, NCCL. "
        f"*Hybrid* shards over the {PER_NODE} ranks of a node (of 8 ranks: over 4), *DTensor* is FSDP2. *Imbalance* is "
        "the state of the rank with most over the mean; that of DTensors is FSDP2's own cut into rows, which this "
        "package leaves as it is. *Over an exact share* is what a rank holds over a share without padding. *Buffers* "
        "are kept between steps, *passing* is there for a part of one: their sum is the peak of buffers. Where the "
        f"total is above {GPU_MEMORY}, the mode is shown for its messages only.",
        "",
        markdown_table(
            [
                *("model", "mode", "ranks", "buckets", "state", "imbalance", "over an exact share", "padding"),
                *("buffers", "passing", "total"),
            ],
            [_bytes_row(row) for row in rows],
        ),
        "",
        "## Messages of a rank and step by kind (planned)",
        "",
        "Calls, and the bytes that one rank sends; in brackets what it sends to one other at a time. *Others'* are "
        "those of DDP and FSDP2.",
        "",
        markdown_table(
            ["model", "mode", "ranks", "others'", "reduce-scatter", "all-reduce", "all-gather", "control exchange"],
            [_messages_row(row) for row in rows],
        ),
        "",
        "## Time of a step (cost model)",
        "",
        f"Estimated for nodes of {PER_NODE} ranks with {LINK_GBIT:g} Gbit/s and {LATENCY_US:g} us between them, "
        f"{NODE_GBIT:g} Gbit/s and {NODE_LATENCY_US:g} us inside, and {TOKENS:,} tokens a rank at "
        f"{FLOPS / 1e12:g} Tflop/s, 6 operations a parameter and token. What the model leaves out is in "
        "`docs/nodes.md`, and how close it comes to real runs in "
        "`links.md`. Seconds.",
        "",
        markdown_table(
            ["model", "mode", "ranks", "compute", "communication", "exposed", "exposed, overlap_forward"],
            [_time_row(row) for row in rows],
        ),
        "",
    ]


def _named(row: dict[str, Any]) -> list[str]:
    return [row["model"], row["mode"], f"{row['ranks']:,}"]


def _bytes_row(row: dict[str, Any]) -> list[str]:
    return [
        *_named(row),
        "-" if row["buckets"] is None else f"{row['buckets']:,}",
        binary(row["state"]),
        f"{row['imbalance']:.4f}",
        f"{row['over_share']:.4f}",
        binary(row["padding"]),
        binary(row["buffers"]),
        binary(row["passing"]),
        binary(row["total"]) + ("" if row["fits"] else " (too much)"),
    ]


def _messages_row(row: dict[str, Any]) -> list[str]:
    own = {entry["kind"]: entry for entry in row["traffic"] if entry["by"] == "dist_asgd"}
    others = [entry for entry in row["traffic"] if entry["by"] != "dist_asgd"]
    cells = ["; ".join(f"{entry['kind']} {_sent(entry)}" for entry in others) or "-"]
    for kind in ("reduce-scatter", "all-reduce", "all-gather", "control exchange"):
        cells.append(_sent(own[kind]) if kind in own else "-")
    return [*_named(row), *cells]


def _sent(entry: dict[str, Any]) -> str:
    return f"{entry['calls']:,}: {binary(entry['sent'])} ({binary(entry['piece'])})"


def _time_row(row: dict[str, Any]) -> list[str]:
    overlapped = row["exposed_overlapped"]
    return [
        *_named(row),
        f"{row['compute']:.2f}",
        f"{row['communication']:.3f}",
        f"{row['exposed']:.3f}",
        "-" if overlapped is None else f"{overlapped:.3f}",
    ]
