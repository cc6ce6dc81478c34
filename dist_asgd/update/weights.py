"""Rules of averaging: with which weight the n-th iterate enters an average.

All of them are one recurrence, ``ax <- ax + (x - ax) * weight(n)`` for the iterates x numbered n = 1, 2, ..., and
``weight(1)`` is 1: the first iterate is copied. ``ShardedAverage`` and ``ShardedASGD(average=...)`` take a rule, and
``param_groups`` have it under ``average``, and state dicts and checkpoints its ``options``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any, ClassVar

from torch import Tensor

# The key in ``param_groups``. Groups without it average as torch.optim.ASGD does.
AVERAGE_KEY = "average"
# The key in ``param_groups`` of a ``ShardedAverage``, where it is True: what has it trains nothing.
ONLY_AVERAGE_KEY = "only_average"
# The largest number below 1 that float32 has.
BELOW_ONE = 1 - 2.0**-24


@dataclass(frozen=True, kw_only=True)
class AverageRule(ABC):
    """A rule of averaging. ``every``: only each ``every``-th iterate is counted, the first one included."""

    every: int = 1

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Raise ValueError if an argument is out of range."""
        _check_whole("every", self.every, least=1)

    @abstractmethod
    def weight(self, n: int) -> float:
        """Return the weight of iterate ``n`` >= 2 in the average of the first ``n``; it is 1 for n = 1 in any rule."""

    def options(self) -> dict[str, Any]:
        """Return the rule as plain values, of which ``rule_of`` makes it again."""
        return {"rule": self.name, **asdict(self)}


@dataclass(frozen=True)
class UniformMean(AverageRule):
    """The mean of all iterates: ``weight(n) = 1 / n``, that of ASGD (Polyak & Juditsky 1992) and SWA."""

    name: ClassVar[str] = "uniform"

    def weight(self, n: int) -> float:
        """Return the weight of iterate ``n`` >= 2, see the class."""
        return 1 / n


@dataclass(frozen=True)
class ExponentialMean(AverageRule):
    """The exponential moving average: ``ax <- decay * ax + (1 - decay) * x``, so ``weight(n) = 1 - decay``.

    With ``warmup`` the decay of iterate n is ``min(decay, n / (warmup + n))``: early iterates are forgotten faster, so
    that the start of the run does not stay in the average for 1 / (1 - decay) iterates.
    """

    decay: float
    warmup: float = 0.0

    name: ClassVar[str] = "exponential"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_between("decay", self.decay, 1)
        if not _is_number(self.warmup) or not 0 <= self.warmup < math.inf:
            raise ValueError(f"dist_asgd: warmup must be a number of iterates >= 0, got {self.warmup!r}.")

    def decay_of(self, n: int) -> float:
        """Return the factor of the average when iterate ``n`` is taken."""
        return min(self.decay, n / (self.warmup + n)) if self.warmup else self.decay

    def weight(self, n: int) -> float:
        """Return the weight of iterate ``n`` >= 2, see the class."""
        return 1 - self.decay_of(n)


@dataclass(frozen=True)
class HalfLife(AverageRule):
    """A tail: the uniform mean at first, then an exponential one, in which a weight halves after ``iterates`` more.

    ``weight(n) = max(1 / n, 1 - 2^(-1 / iterates))``.
    """

    iterates: float

    name: ClassVar[str] = "half-life"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_between("iterates", self.iterates, math.inf)

    def weight(self, n: int) -> float:
        """Return the weight of iterate ``n`` >= 2, see the class."""
        return max(1 / n, -math.expm1(-math.log(2) / self.iterates))


@dataclass(frozen=True)
class PowerMean(AverageRule):
    """The power-function average: iterate k counts about k^gamma (Karras et al., EDM2, arXiv 2312.02696, section 3).

    ``weight(n) = 1 - (1 - 1 / n)^(gamma + 1)``. It forgets the start at any length of the run; 0 is the uniform mean.
    """

    gamma: float

    name: ClassVar[str] = "power"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _is_number(self.gamma) or not 0 <= self.gamma < math.inf:
            raise ValueError(f"dist_asgd: gamma must be a number >= 0, got {self.gamma!r}.")

    def weight(self, n: int) -> float:
        """Return the weight of iterate ``n`` >= 2, see the class."""
        return -math.expm1((self.gamma + 1) * math.log1p(-1 / n))


@dataclass(frozen=True)
class CustomMean(AverageRule):
    """A rule of the user's own: ``function(n)`` is the weight of iterate ``n`` >= 2, at least 0 and below 1.

    A state dict has no functions: whoever loads one passes the same function to the constructor.
    """

    function: Callable[[int], float]

    name: ClassVar[str] = "custom"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.function):
            raise ValueError(f"dist_asgd: wanted a rule of averaging or a function of n, got {self.function!r}.")

    def weight(self, n: int) -> float:
        weight = self.function(n)
        if not _is_number(weight) or not 0 <= weight < 1:
            raise ValueError(
                f"dist_asgd: the function of weights returned {weight!r} for iterate {n}: wanted a number >= 0 and "
                f"below 1, the same on every rank."
            )
        return float(weight)

    def options(self) -> dict[str, Any]:
        return {"rule": self.name, "every": self.every}


RULES: tuple[type[AverageRule], ...] = (UniformMean, ExponentialMean, HalfLife, PowerMean)


def as_rule(rule: AverageRule | Callable[[int], float]) -> AverageRule:
    """Return ``rule``, or the rule of a function of n."""
    return rule if isinstance(rule, AverageRule) else CustomMean(rule)


def with_every(rule: AverageRule, every: int) -> AverageRule:
    """Return ``rule`` with ``every``; ValueError if it has another one already."""
    if every != 1 and rule.every not in (1, every):
        raise ValueError(f"dist_asgd: every={every}, and the rule has every={rule.every}. Pass one of them.")
    return replace(rule, every=every) if every != 1 else rule


def rule_of(options: Any, own: AverageRule | None) -> AverageRule:
    """Return the rule that ``options`` of a parameter group describe; ``own`` is that of the constructor.

    Raises:
        ValueError: they describe none, or a function, and the constructor got no function.
    """
    if not isinstance(options, Mapping) or not isinstance(options.get("rule"), str):
        raise ValueError(f"dist_asgd: {AVERAGE_KEY} of a group must be the options of a rule, got {options!r}.")
    values = {key: value for key, value in options.items() if key != "rule"}
    if options["rule"] == CustomMean.name:
        if not isinstance(own, CustomMean):
            raise ValueError(
                "dist_asgd: the parameter group averages by a function, which state dicts do not hold. Pass the same "
                "function to the constructor before you load it."
            )
        return replace(own, **values)
    for kind in RULES:
        if kind.name == options["rule"]:
            try:
                return kind(**values)
            except TypeError as error:
                raise ValueError(f"dist_asgd: {dict(options)} is no rule of averaging: {error}.") from None
    names = ", ".join([*(kind.name for kind in RULES), CustomMean.name])
    raise ValueError(f"dist_asgd: unknown rule of averaging {options['rule']!r}. Known are {names}.")


def check_rule(group: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if a parameter group, which ``where`` names, has something else in the place of its rule."""
    if AVERAGE_KEY in group and not isinstance(group[AVERAGE_KEY], AverageRule):
        raise ValueError(
            f"dist_asgd: {where}: {AVERAGE_KEY} must be a rule of averaging, such as dist_asgd.ExponentialMean(0.999), "
            f"got {group[AVERAGE_KEY]!r}."
        )


@dataclass(frozen=True, slots=True)
class AverageSchedule:
    """Which steps of one parameter group enter its average, and with which weight.

    The first one is step t0 + 2, as in torch.optim.ASGD, which stores ``mu`` for the next step. ``ShardedAverage``
    counts its updates as steps and sets t0 to start - 1. ``rule`` None is the mean of torch.optim.ASGD, to the bit.
    """

    rule: AverageRule | None = None

    def next_mu(self, step: float, t0: float) -> float:
        """Return ``mu`` after ``step`` steps: the weight of the iterate of step + 1.

        It is 1 up to the first one that is counted, so that ``ax`` is a copy, and 0 for one that ``every`` leaves out.
        """
        if self.rule is None:
            return 1 / max(1, step - t0)
        if _place(step + 1, t0) <= 1:
            return 1.0
        # Also as float32 it stays below 1, which says that there is no average yet.
        number = self.num_iterates(step, t0) + 1
        return min(self.rule.weight(number), BELOW_ONE) if self.counts(step + 1, t0) else 0.0

    def check(self, step: Tensor, t0: float) -> None:
        """Call a function of the user's for the weights of the step after ``step``, 0-dim, and of the next one.

        It may raise, and does so before anything is written.
        """
        if isinstance(self.rule, CustomMean):
            for number in (step.item(), step.item() + 1):
                self.next_mu(number, t0)

    def counts(self, step: float, t0: float) -> bool:
        """Whether the iterate of ``step`` = 1, 2, ... enters the average."""
        place = _place(step, t0)
        return place >= 1 and (place - 1) % self._every == 0

    def num_iterates(self, step: float, t0: float) -> int:
        """Return how many iterates the average holds after ``step`` steps."""
        return max(0, -(-_place(step, t0) // self._every))

    @property
    def _every(self) -> int:
        return 1 if self.rule is None else self.rule.every


def _place(step: float, t0: float) -> int:
    """Return the number of ``step`` among those that may enter the average, from 1 on; 0 or less before them."""
    return math.ceil(step - t0 - 1) if math.isfinite(t0) else 0


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_between(name: str, value: Any, stop: float) -> None:
    if not _is_number(value) or not 0 < value < stop:
        upper = "" if stop == math.inf else f" and < {stop}"
        raise ValueError(f"dist_asgd: {name} must be a number > 0{upper}, got {value!r}.")


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"dist_asgd: {name} must be a whole number from {least} on, got {value!r}.")
