"""The settings in which ``benchmarks.step`` measures all peers, and how its minutes are divided among them.

Vocabulary
    setting  a model, a number of ranks, and the link between them: None is one host, else Gbit/s between two hosts
    group    the settings that the same processes measure in turn: they differ in the link alone
    pace     what ends a group: its deadline, between the fewest and the most rounds
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.hosts import NUM_HOSTS
from benchmarks.model import MODELS

# What the time of the default allows on 2 cores, from the most important on; ALL takes about half an hour.
DEFAULT = ("gpt/2/host", "gpt/4/host", "wide/2/host", "gpt/2/1", "gpt/2/10")
ALL = (*DEFAULT, "wide/4/host", "gpt/4/1", "gpt/4/10", "wide/2/1", "wide/2/10")
# What a step takes beside the first setting's, roughly.
_MODEL_WEIGHT = {"gpt": 1.0, "wide": 2.0}


@dataclass(frozen=True)
class Setting:
    """One model on a number of ranks. ``link`` is None on one host, else the Gbit/s between two hosts."""

    model: str
    ranks: int
    link: float | None = None

    @property
    def key(self) -> str:
        """The name in the JSON file, as gpt/2/host or gpt/4/1."""
        return f"{self.model}/{self.ranks}/{'host' if self.link is None else f'{self.link:g}'}"

    @staticmethod
    def parse(key: str) -> Setting:
        """The setting with this key. Raises ValueError for another text."""
        try:
            model, ranks, link = key.split("/")
            setting = Setting(model, int(ranks), None if link == "host" else float(link))
        except ValueError:
            raise ValueError(f"wanted MODEL/RANKS/LINK, as gpt/2/host or gpt/2/10, got {key!r}") from None
        if model not in MODELS:
            raise ValueError(f"wanted a model of {list(MODELS)}, got {key!r}")
        if setting.ranks < 1 or (setting.link is not None and (setting.ranks % NUM_HOSTS or setting.link <= 0)):
            raise ValueError(f"wanted a number of ranks that {NUM_HOSTS} hosts share, and a rate, got {key!r}")
        return setting

    @property
    def weight(self) -> float:
        """About how long a step takes, beside one of the GPT on 2 ranks of one host."""
        link = 0.5 if self.link is None else 1 / self.link
        return _MODEL_WEIGHT[self.model] * self.ranks * (0.5 + link)


@dataclass(frozen=True)
class Pace:
    """How many rounds are measured: until the deadline (of ``time.monotonic()``), but within ``least`` and ``most``."""

    warmup: int
    least: int
    most: int
    deadline: float

    def rounds(self) -> Iterator[int]:
        """Yield numbers of rounds; negative ones warm up."""
        yield from range(-self.warmup, 0)
        begin = time.monotonic()
        for number in range(self.most):
            now = time.monotonic()
            if number >= self.least and now + (now - begin) / number > self.deadline:
                return
            yield number


def groups_of(settings: Sequence[Setting]) -> list[list[Setting]]:
    """The groups, in the order of their first settings."""
    groups: dict[tuple[str, int, bool], list[Setting]] = {}
    for setting in settings:
        groups.setdefault((setting.model, setting.ranks, setting.link is None), []).append(setting)
    return list(groups.values())


class Budget:
    """Divides the seconds that are left among the groups that are left, by their weights."""

    def __init__(self, seconds: float, groups: Sequence[Sequence[Setting]]) -> None:
        self._deadline = time.monotonic() + seconds
        self._weights = [sum(setting.weight for setting in group) for group in groups]

    def next_deadline(self) -> float:
        """The deadline of the next group's share, on the clock of Pace."""
        now = time.monotonic()
        return now + max(0.0, self._deadline - now) * self._weights[0] / sum(self._weights)

    def end_group(self) -> None:
        """Go on to the next group."""
        del self._weights[0]
