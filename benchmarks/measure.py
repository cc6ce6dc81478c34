"""Runs the teams of all peers, measures them in turn, and combines the figures of the ranks.

Vocabulary
    round      one whole step and one split step of every peer, in an order that rotates from round to round
    rank time  the time of the slowest rank, step by step, which is the time that a step takes
    P          the bytes of all parameters
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any

from benchmarks.model import Shape
from benchmarks.peers import Peer
from benchmarks.ranks import Team
from benchmarks.trainer import MemoryTrainer, Trainer

# Allocations of 64 KiB and more are mapped and unmapped one by one, so that resident memory follows what is
# in use; by default glibc keeps freed memory in its heap and the peak shows the heap's history.
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

NUM_MEMORY_STEPS = 5


def measure_time(
    peers: Sequence[Peer], shape: Shape, world_size: int, num_rounds: int, num_warmup: int, scratch: str
) -> dict[str, Any]:
    """Time steps of all peers in turn, then consolidation of all peers in turn; returns the figures of each round."""
    with contextlib.ExitStack() as stack:
        teams = {peer.key: stack.enter_context(Team(Trainer, world_size, peer, shape)) for peer in peers}
        for team in teams.values():
            team.wait_ready()
        seconds: dict[str, dict[str, list[float]]] = {key: {"whole": [], "processor": [], "step": []} for key in teams}
        for number in range(num_warmup + num_rounds):
            progress(f"round {number + 1} of {num_warmup + num_rounds}")
            for key in rotated(list(teams), number):
                whole = teams[key].call("whole_step")
                step = teams[key].call("split_step")
                if number >= num_warmup:
                    seconds[key]["whole"].append(max(clock for clock, _ in whole))
                    seconds[key]["processor"].append(max(processor for _, processor in whole))
                    seconds[key]["step"].append(max(step))
        digests = {key: team.call("parameters_digest")[0] for key, team in teams.items()}
        held = {key: team.call("held_bytes") for key, team in teams.items()}
        consolidating = [peer.key for peer in peers if peer.consolidates]
        saving: list[float] = []
        gathering: dict[str, list[float]] = {key: [] for key in consolidating}
        for number in range(4):
            progress(f"consolidation {number + 1} of 4")
            save = teams[peers[0].key].call("save_seconds", scratch)[0]
            times = {key: max(teams[key].call("consolidation_seconds")) for key in consolidating}
            if number > 0:
                saving.append(save)
                for key, value in times.items():
                    gathering[key].append(value)
    return {
        "seconds": seconds,
        "digests": digests,
        "bytes": held,
        "save_seconds": saving,
        "consolidation_seconds": gathering,
    }


def measure_memory(peers: Sequence[Peer], shape: Shape, world_size: int) -> dict[str, dict[str, list[int]]]:
    """Peaks in bytes by peer, kind and rank. Peers run one after the other, each in processes of its own."""
    peaks: dict[str, dict[str, list[int]]] = {}
    for peer in peers:
        progress(f"memory of {peer.label}")
        with Team(MemoryTrainer, world_size, peer, shape, environment=MEMORY_ENVIRONMENT) as team:
            team.wait_ready()
            peaks[peer.key] = {
                "wrap": team.call("wrap_peak"),
                "steps": team.call("steps_peak", NUM_MEMORY_STEPS),
            }
            if peer.consolidates:
                peaks[peer.key]["consolidation"] = team.call("consolidation_peak")
    return peaks


def summarize_time(result: dict[str, Any]) -> dict[str, Any]:
    """For each peer, medians in seconds, their ratios to the baseline, and bytes of a rank; also the time of a save."""
    save_seconds = median(result["save_seconds"])
    summary: dict[str, dict[str, Any]] = {}
    baseline = next(iter(result["seconds"]))
    base = result["seconds"][baseline]
    for key, kinds in result["seconds"].items():
        summary[key] = {"same_bits": result["digests"][key] == result["digests"][baseline]}
        for kind, times in kinds.items():
            low, _, high = quantiles(times, n=4)
            summary[key] |= {
                f"{kind}_seconds": median(times),
                f"{kind}_ratio": median(times) / median(base[kind]),
                f"{kind}_round_ratio": median(a / b for a, b in zip(times, base[kind], strict=True)),
                f"{kind}_least_ratio": min(times) / min(base[kind]),
                f"{kind}_spread": (high - low) / median(times),
            }
        for kind in ("state", "gradients"):
            ranks = [held[kind] for held in result["bytes"][key]]
            summary[key] |= {f"{kind}_bytes": max(ranks), f"{kind}_imbalance": imbalance(ranks)}
        if key in result["consolidation_seconds"]:
            seconds = median(result["consolidation_seconds"][key])
            summary[key] |= {
                "consolidation_seconds": seconds,
                "consolidation_ratio": seconds / save_seconds,
            }
    return {"time": summary, "save_seconds": save_seconds}


def imbalance(values: Sequence[int]) -> float:
    """The maximum of ``values`` divided by their mean."""
    return max(values) * len(values) / sum(values) if sum(values) else 1.0


def rotated(keys: list[str], number: int) -> list[str]:
    """``keys`` in the same cyclic order, beginning with another one in each round ``number``."""
    first = number % len(keys)
    return keys[first:] + keys[:first]


def progress(message: str) -> None:
    """Print one line on stderr that the next one overwrites."""
    print(f"\r\x1b[K{message}", end="", file=sys.stderr, flush=True)
