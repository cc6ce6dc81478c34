"""The arguments of ``plan``: sizes, ranks on nodes, and links, checked and completed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import fields, replace

import torch

from .links import DEFAULTS, Links
from .setup import Setup

RANKS_PER_NODE = 8
# The most ranks of a plan, of which also those are tried that a model would fit on.
MOST_RANKS = 1 << 20
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(B|[KMGTP]i?B)?\s*", re.IGNORECASE)
_POWERS = {letter: power for power, letter in enumerate("BKMGTP")}


def bytes_of(value: int | str, what: str, least: int = 0) -> int:
    """A number of bytes, or a text with a unit such as "80GiB"; ValueError names ``what``."""
    found: float | None = None
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        # A bare "80" would be 80 bytes, which nobody means.
        if match and (match[2] or float(match[1]) == 0):
            unit = (match[2] or "B").upper()
            found = float(match[1]) * (1024 if "I" in unit else 1000) ** _POWERS[unit[0]]
    elif not isinstance(value, bool) and isinstance(value, int):
        found = value
    if found is None or found < least:
        raise ValueError(
            f"dist_asgd: {what} must be a number of bytes, or a text with a unit such as 80GiB or 80GB, got {value!r}."
        )
    return int(found)


def check_dtype(dtype: torch.dtype | None) -> None:
    if dtype not in (None, torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(f"dist_asgd: dtype must be None, float32, float64, bfloat16 or float16, got {dtype!r}.")


def _check_count(value: object, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"dist_asgd: {what} must be a whole number of at least 1, got {value!r}.")


def topology(
    ranks: int, ranks_per_node: int | None, mesh: tuple[int, int] | None
) -> tuple[int, tuple[int, int] | None, tuple[str, ...]]:
    """The ranks on a node, the mesh, and what was assumed for them."""
    _check_count(ranks, "ranks (the number of GPUs)")
    if ranks > MOST_RANKS:
        raise ValueError(
            f"dist_asgd: ranks={ranks:,}: a plan is for at most {MOST_RANKS:,} ranks. Is the number right?"
        )
    per_node = min(RANKS_PER_NODE, ranks)
    if ranks_per_node is not None:
        _check_count(ranks_per_node, "ranks_per_node")
        if ranks > ranks_per_node and ranks % ranks_per_node:
            divisors = [n for n in range(1, min(ranks, 64) + 1) if ranks % n == 0]
            raise ValueError(
                f"dist_asgd: ranks_per_node={ranks_per_node} does not divide {ranks} ranks. Nodes have equally many "
                f"ranks: take one of {', '.join(map(str, divisors))}, or another number of ranks."
            )
        per_node = min(ranks_per_node, ranks)
    if mesh is not None:
        if not isinstance(mesh, (tuple, list)) or len(mesh) != 2:
            raise ValueError(f"dist_asgd: mesh must be two numbers, (replicas, shards), got {mesh!r}.")
        for value, what in zip(mesh, ("replicas", "shards"), strict=True):
            _check_count(value, f"mesh: the number of {what}")
        if math.prod(mesh) != ranks:
            raise ValueError(
                f"dist_asgd: mesh={mesh[0]}x{mesh[1]} has {math.prod(mesh)} ranks, and there are {ranks}. The product "
                f"of replicas and shards is the number of ranks."
            )
        return per_node, (mesh[0], mesh[1]), ()
    if ranks <= per_node:
        return per_node, None, ()
    if ranks % per_node:
        note = (
            f"{per_node} ranks on a node, which is assumed, do not divide {ranks} ranks: modes on a mesh are left out. "
            f"Give --ranks-per-node (ranks_per_node=) or --mesh (mesh=)."
        )
        return per_node, None, (note,)
    return per_node, (ranks // per_node, per_node), ()


def links_of(setup: Setup, given: Mapping[str, float | None]) -> Links | None:
    """The links of the arguments ``given`` by name, ``compute_ms`` among them; None if no time is asked for."""
    known = {name: value for name, value in given.items() if value is not None}
    for name, value in known.items():
        # A rate of nothing, or a negative latency, would make times of any sign.
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or value < 0 or (value == 0 and name.endswith("gbit")):
            raise ValueError(f"dist_asgd: {name} must be a positive number, got {value!r}.")
    if not known:
        return None
    if setup.nodes == 1 and {"link_gbit", "latency_us"} & known.keys():
        raise ValueError(
            f"dist_asgd: link_gbit and latency_us are of links between nodes, and all {setup.ranks} ranks are on one. "
            f"Give node_gbit (--node-gbit) for that node, or ranks_per_node (--ranks-per-node)."
        )
    decisive, where = ("link_gbit", "between nodes") if setup.nodes > 1 else ("node_gbit", "inside the node")
    if decisive not in known:
        raise ValueError(
            f"dist_asgd: {', '.join(known)} without {decisive}: no time can be estimated. Give {decisive} "
            f"(--{decisive.replace('_', '-')}), the bandwidth {where}."
        )
    return replace(
        DEFAULTS[setup.backend], **{entry.name: known[entry.name] for entry in fields(Links) if entry.name in known}
    )
