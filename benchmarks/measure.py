"""Runs the teams of all peers, measures them in turn, and combines the figures of the ranks.

Vocabulary
    round      one whole step of every peer, and in some rounds one split step, in an order that rotates
    batch      the peers whose teams are alive at the same time, the baseline among them: as many as memory holds
    rank time  the time of the slowest rank, step by step, which is the time that a step takes
    failure    why a peer has no figures: the last line of the error that one of its ranks raised
    P          the bytes of all parameters
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.hosts import ENVIRONMENT, NUM_HOSTS, Hosts
from benchmarks.model import AnyShape
from benchmarks.peers import Peer
from benchmarks.ranks import Team
from benchmarks.settings import Pace, Setting
from benchmarks.trainer import MemoryTrainer, Trainer, follow_memory

# Allocations of 64 KiB and more are mapped and unmapped one by one, so that resident memory follows what is
# in use; by default glibc keeps freed memory in its heap and the peak shows the heap's history.
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

NUM_MEMORY_STEPS, FEWER_MEMORY_STEPS = 5, 3
# The peers whose peaks are also measured above what torch loads at first use, which takes processes without it.
COLD = ("ddp", "ddp-views", "zero", "stage1-views", "stage2")
# A rank beside its model, and what is left to the system: code that leaves the page cache is read again in a step.
RANK_BYTES, RESERVED_BYTES = 200e6, 4e9
_BEGIN = time.monotonic()

Failures = dict[str, str]


def reason(error: BaseException) -> str:
    """The last line of an error's text: of a rank's traceback, the exception and its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class Timer:
    """The teams of one batch and what they measured, by the setting's key. A context manager, which ends the teams.

    A peer whose rank fails leaves the batch; ``failures`` says why.
    """

    def __init__(
        self, peers: Sequence[Peer], group: Sequence[Setting], shape: AnyShape, hosts: Hosts | None, failures: Failures
    ) -> None:
        self._stack = contextlib.ExitStack()
        self._peers, self._group, self._hosts = peers, group, hosts
        self.failures = failures
        self.raw: dict[str, dict[str, Any]] = {
            setting.key: {"seconds": {}, "digests": {}, "bytes": {}} for setting in group
        }
        self._teams: dict[str, Team] = {}
        ranks = group[0].ranks
        network: dict[str, Any] = {}
        if hosts is not None:
            hosts.set_rate(10.0)
            network = {"environment": ENVIRONMENT, "entrance": hosts.entrance(ranks // NUM_HOSTS)}
        try:
            for peer in peers:
                team = Team(Trainer, ranks, peer, shape, start="forkserver", **network)
                self._teams[peer.key] = self._stack.enter_context(team)
            for peer in peers:
                progress(f"{_name(group[0])}: start of {peer.label}")
                with self._may_fail(peer.key):
                    self._teams[peer.key].wait_ready()
        except BaseException:
            self._stack.close()
            raise

    @contextlib.contextmanager
    def _may_fail(self, key: str) -> Iterator[None]:
        """Note the failure of a peer in the block. The baseline may not fail."""
        try:
            yield
        except RuntimeError as error:
            self._teams.pop(key, None)
            if key == self._peers[0].key:
                raise
            self.failures[key] = reason(error)

    def _each(self, number: int, call: Callable[[str, Team], None]) -> None:
        """Call with each team that is left, beginning with another one in each round."""
        for key in rotated(list(self._teams), number):
            with self._may_fail(key):
                call(key, self._teams[key])

    def run(self, pace: Pace, split_every: int) -> None:
        """Measure rounds; every ``split_every``-th has split steps, too."""
        for number in pace.rounds():
            for setting in self._group:
                progress(f"{_name(setting)}: round {number + 1} (at most {pace.most}), {len(self._teams)} peers")
                if self._hosts is not None and setting.link is not None:
                    self._hosts.set_rate(setting.link)
                self._round(self.raw[setting.key]["seconds"], number, number >= 0 and number % split_every == 0)
        for setting in self._group:
            self._each(0, self._ending(self.raw[setting.key]))

    def _round(self, seconds: dict[str, dict[str, list[float]]], number: int, split: bool) -> None:
        def call(key: str, team: Team) -> None:
            whole = team.call("whole_step")
            step = team.call("split_step") if split else []
            if number < 0:
                return
            times = seconds.setdefault(key, {"whole": [], "processor": [], "step": []})
            times["whole"].append(max(clock for clock, _ in whole))
            times["processor"].append(max(processor for _, processor in whole))
            if split:
                times["step"].append(max(step))

        self._each(number, call)

    def _ending(self, raw: dict[str, Any]) -> Callable[[str, Team], None]:
        """What is called with each team after the rounds of a setting."""

        def call(key: str, team: Team) -> None:
            raw["digests"][key] = team.call("parameters_digest")[0]
            raw["bytes"][key] = team.call("held_bytes")

        return call

    def consolidation(self, scratch: str) -> dict[str, Any]:
        """The seconds of ``torch.save`` of the baseline's state, and of consolidating where state is sharded."""
        saving: list[float] = []
        gathering: dict[str, list[float]] = {}
        consolidating = [peer.key for peer in self._peers if peer.consolidates and peer.key in self._teams]
        for number in range(4):
            progress(f"consolidation {number + 1} of 4")
            save = self._teams[self._peers[0].key].call("save_seconds", scratch)[0]
            times = {key: max(self._teams[key].call("consolidation_seconds")) for key in consolidating}
            if number > 0:
                saving.append(save)
                for key, value in times.items():
                    gathering.setdefault(key, []).append(value)
        return {"save_seconds": saving, "consolidation_seconds": gathering}

    def __enter__(self) -> Timer:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def _name(setting: Setting) -> str:
    where = "one host" if setting.link is None else f"{setting.link:g} Gbit/s"
    return f"{setting.model}, {setting.ranks} ranks, {where}"


def measure_memory(
    peers: Sequence[Peer], setting: Setting, shape: AnyShape, thorough: bool, failures: Failures
) -> dict[str, dict[str, list[Any]]]:
    """Peaks in bytes by peer, kind and rank. Peers run one after the other, each in processes of its own.

    ``thorough`` takes more steps, consolidates, and has peers of COLD also above the floor without what torch loads at
    first use.
    """
    peaks: dict[str, dict[str, list[Any]]] = {}
    for peer in peers:
        progress(f"{_name(setting)}: memory of {peer.label}")
        # A fork shares code that torch has loaded: the floor before the miniature says nothing.
        cold = thorough and peer.key in COLD
        start = "spawn" if cold else "forkserver"
        num_steps = NUM_MEMORY_STEPS if thorough else FEWER_MEMORY_STEPS
        try:
            with Team(MemoryTrainer, setting.ranks, peer, shape, entrance=follow_memory, start=start) as team:
                team.wait_ready()
                found = {"wrap": team.call("wrap_peak"), "steps": team.call("steps_peak", num_steps)}
                if not cold:
                    found = {kind: [{"warm": rank["warm"]} for rank in ranks] for kind, ranks in found.items()}
                if peer.consolidates and thorough:
                    found["consolidation"] = team.call("consolidation_peak")
        except RuntimeError as error:
            failures[peer.key] = reason(error)
            continue
        peaks[peer.key] = found
    return peaks


def batches(peers: Sequence[Peer], team_bytes: Mapping[str, float], available: float) -> list[list[Peer]]:
    """Divide peers into batches whose teams fit in memory together. The first peer is in each of them."""
    baseline, *others = peers
    found: list[list[Peer]] = []
    free = 0.0
    for peer in others:
        if not found or team_bytes[peer.key] > free:
            found.append([baseline])
            free = available - team_bytes[baseline.key]
        found[-1].append(peer)
        free -= team_bytes[peer.key]
    return found or [[baseline]]


def team_bytes(
    peers: Sequence[Peer], ranks: int, unit: int, memory: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """What the team of each peer holds: by its peaks, or without them 4.5 P a rank."""

    def rank_bytes(key: str) -> float:
        peaks = memory.get(key, {}).get("steps")
        return unit + (max(rank["warm"] for rank in peaks) if peaks else 3.5 * unit) + RANK_BYTES

    return {peer.key: ranks * rank_bytes(peer.key) for peer in peers}


def available_bytes() -> float:
    """The memory that teams may take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 - RESERVED_BYTES
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def summarize(raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each peer of a batch: medians in seconds, their ratios to the first one, spread, and bytes of a rank."""
    summary: dict[str, dict[str, Any]] = {}
    baseline = next(iter(raw["bytes"]))
    base = raw["seconds"][baseline]
    for key in raw["bytes"]:
        summary[key] = {"same_bits": raw["digests"][key] == raw["digests"][baseline], "baseline": baseline}
        for kind, times in raw["seconds"][key].items():
            if not times:
                continue
            low, _, high = quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
            summary[key] |= {
                f"{kind}_seconds": median(times),
                f"{kind}_ratio": median(times) / median(base[kind]),
                f"{kind}_round_ratio": median(a / b for a, b in zip(times, base[kind], strict=True)),
                f"{kind}_least_ratio": min(times) / min(base[kind]),
                f"{kind}_spread": (high - low) / median(times),
                f"{kind}_rounds": len(times),
            }
        for kind in ("state", "gradients"):
            ranks = [held[kind] for held in raw["bytes"][key]]
            summary[key] |= {f"{kind}_bytes": max(ranks), f"{kind}_imbalance": imbalance(ranks)}
    return summary


def summarize_consolidation(result: Mapping[str, Any]) -> dict[str, Any]:
    """The medians in seconds of saving, and of consolidating by peer with their ratios to it."""
    save = median(result["save_seconds"])
    seconds = {key: median(times) for key, times in result["consolidation_seconds"].items()}
    return {"save_seconds": save, "seconds": seconds, "ratios": {key: value / save for key, value in seconds.items()}}


def imbalance(values: Sequence[int]) -> float:
    """The maximum of ``values`` divided by their mean."""
    return max(values) * len(values) / sum(values) if sum(values) else 1.0


def rotated(keys: list[str], number: int) -> list[str]:
    """``keys`` in the same cyclic order, beginning with another one in each round ``number``."""
    first = number % len(keys)
    return keys[first:] + keys[:first]


def progress(message: str) -> None:
    """Print one line on stderr that the next one overwrites."""
    elapsed = f"[{int(time.monotonic() - _BEGIN) // 60}:{int(time.monotonic() - _BEGIN) % 60:02}] " if message else ""
    print(f"\r\x1b[K{elapsed}{message}", end="", file=sys.stderr, flush=True)
