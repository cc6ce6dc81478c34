"""Rules of averaging: their weights against the mean that they stand for, their options, and what they refuse."""

import math
import random
from typing import Any

import pytest

from dist_asgd import AverageRule, ExponentialMean, HalfLife, PowerMean, UniformMean
from dist_asgd.update.weights import AverageSchedule, CustomMean, rule_of

# A rule, and how much iterate k of the first n counts in its average; the weights are divided by their sum.
SHARES: list[tuple[AverageRule, Any]] = [
    (UniformMean(), lambda *_: 1.0),
    (ExponentialMean(0.8), lambda k, n: (0.2 if k > 1 else 1.0) * 0.8 ** (n - k)),
    (HalfLife(3), lambda k, n: (1 - 2 ** (-1 / 3)) * 2 ** (-(n - k) / 3) if k > 4 else 2 ** (-max(n - 4, 0) / 3) / 4),
    (PowerMean(2), lambda k, n: (k / n) ** 3 - ((k - 1) / n) ** 3),
    (CustomMean(lambda n: 2 / (n + 1)), lambda k, _: float(k)),
]


@pytest.mark.parametrize(("rule", "share"), SHARES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 60])
def test_a_recurrence_is_the_mean_that_it_stands_for(rule: AverageRule, share: Any, n: int) -> None:
    """In float64, for random iterates: HalfLife(3) is uniform for the 4 iterates in which 1/n is the larger weight."""
    draw = random.Random(n)
    iterates = [draw.gauss(0, 1) for _ in range(n)]
    average = iterates[0]
    for k, x in enumerate(iterates[1:], 2):
        average += (x - average) * rule.weight(k)
    weights = [share(k, n) for k in range(1, n + 1)]
    expected = math.fsum(w * x for w, x in zip(weights, iterates, strict=True)) / math.fsum(weights)
    assert average == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_a_warm_up_forgets_the_start() -> None:
    """The decay grows as n / (warmup + n), up to its limit."""
    rule = ExponentialMean(0.99, warmup=10)
    assert [rule.decay_of(n) for n in (1, 10, 90)] == [1 / 11, 1 / 2, 9 / 10]
    assert rule.decay_of(10**6) == 0.99
    assert ExponentialMean(0.99).decay_of(1) == 0.99


@pytest.mark.parametrize("rule", [UniformMean(), ExponentialMean(0.9, warmup=3), HalfLife(2.5), PowerMean(1)])
def test_options_make_the_rule_again(rule: AverageRule) -> None:
    """They are what state dicts carry."""
    options = rule.options()
    assert all(isinstance(value, str | int | float) for value in options.values())
    assert rule_of(options, None) == rule


def test_a_function_is_taken_from_the_constructor() -> None:
    """A state dict has none."""
    own = CustomMean(lambda _: 0.5, every=2)
    again = rule_of({"rule": "custom", "every": 3}, own)
    assert isinstance(again, CustomMean)
    assert (again.function, again.every) == (own.function, 3)
    with pytest.raises(ValueError, match="averages by a function, which state dicts do not hold"):
        rule_of(own.options(), UniformMean())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"rule": "median"}, "unknown rule of averaging 'median'. Known are uniform, exponential"),
        ({"rule": "exponential", "every": 1}, "is no rule of averaging"),
        ({"rule": "exponential", "decay": 2.0, "every": 1}, "decay must be a number > 0 and < 1, got 2.0"),
        ("exponential", "must be the options of a rule"),
    ],
)
def test_options_of_no_rule_are_refused(options: Any, problem: str) -> None:
    """A damaged or newer state dict."""
    with pytest.raises(ValueError, match=problem):
        rule_of(options, None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ExponentialMean(0.0),
        lambda: ExponentialMean(1.0),
        lambda: ExponentialMean(True),
        lambda: ExponentialMean(0.9, warmup=-1),
        lambda: ExponentialMean(math.nan),
        lambda: HalfLife(0),
        lambda: PowerMean(-0.5),
        lambda: PowerMean(math.inf),
        lambda: UniformMean(every=0),
        lambda: UniformMean(every=1.5),  # type: ignore[arg-type]
        lambda: CustomMean(0.5),  # type: ignore[arg-type]
        lambda: CustomMean(lambda _: 1.0).weight(2),
        lambda: CustomMean(lambda _: math.nan).weight(2),
        lambda: CustomMean(lambda _: "x").weight(2),  # type: ignore[arg-type,return-value]
    ],
)
def test_arguments_out_of_range_are_refused(make: Any) -> None:
    """At construction, or when a function first says so."""
    with pytest.raises(ValueError, match="dist_asgd: "):
        make()


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("t0", [-1, 0, 4, 7.5, math.inf])
def test_a_schedule_counts_each_iterate_once(every: int, t0: float) -> None:
    """Counted step by step, from step t0 + 2 on: ``num_iterates``, ``counts`` and ``next_mu`` say the same."""
    rule = PowerMean(1, every=every)
    schedule = AverageSchedule(rule)
    n = 0
    for step in range(1, 40):
        mu = schedule.next_mu(step - 1, t0)
        place = step - t0 - 1
        if schedule.counts(step, t0):
            assert math.ceil(place) % every == 1 % every
            n += 1
            assert mu == (1 if n == 1 else rule.weight(n))
        else:
            assert mu == (1 if n == 0 else 0)
        assert schedule.num_iterates(step, t0) == n
    assert n == (0 if t0 == math.inf else math.ceil((39 - math.floor(t0) - 1) / every))


def test_the_schedule_without_a_rule_is_that_of_torch() -> None:
    """``mu`` of torch/optim/asgd.py, also for a t0 that is no whole number."""
    for t0 in (0, 3, 2.25, 1e6):
        for step in range(1, 30):
            assert AverageSchedule().next_mu(step, t0) == 1 / max(1, step - t0)
