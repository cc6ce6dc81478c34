"""What the host knows of scalars that a device advances: never that averages are copies while they are not."""

import random
from typing import Any

import pytest

from dist_asgd.update.scalars import HostBound
from dist_asgd.update.schedule import Implementation, StepHyperparameters


def hyper_of(t0: float, **options: Any) -> StepHyperparameters:
    """Those of a fused step."""
    return StepHyperparameters(0.1, 1e-4, 0.75, t0, 0.0, False, Implementation.FUSED, **options)


@pytest.mark.parametrize("seed", range(50))
def test_it_never_promises_too_much(seed: int) -> None:
    """Whatever is skipped, and however t0 changes, mu is 1 before and after a step that only copies."""
    draw = random.Random(seed)
    step, mu, t0 = 0, 1.0, 3.0
    bound = HostBound(0, True)
    num_copies = 0
    for _ in range(60):
        if draw.random() < 0.15:
            t0 = float(draw.choice([0, step, step + 4, 100]))
        hyper, may_skip = hyper_of(t0), draw.random() < 0.5
        copies = bound.only_copies(hyper)
        num_copies += copies
        before = mu
        bound.advance(hyper, may_skip)
        if not (may_skip and draw.random() < 0.5):
            step += 1
            mu = 1 / max(1, step - t0)
        assert not copies or before == mu == 1
    assert num_copies, "it promises something"


def test_it_knows_all_without_skips() -> None:
    """Every step of which it can be known is one that only copies."""
    bound, hyper = HostBound(0, True), hyper_of(3)
    found = []
    for _ in range(8):
        found.append(bound.only_copies(hyper))
        bound.advance(hyper, may_skip=False)
    # In the fifth step mu is 1, and 1/2 after it.
    assert found == [True] * 4 + [False] * 4


def test_replays_are_unknown() -> None:
    """A graph that was captured may have stepped any number of times, also once steps are not captured any more."""
    bound = HostBound(0, True)
    assert not bound.only_copies(hyper_of(1e6, capturable=True))
    bound.advance(hyper_of(1e6, capturable=True), may_skip=False)
    assert not bound.only_copies(hyper_of(1e6))
    bound.advance(hyper_of(1e6), may_skip=False)
    assert not bound.only_copies(hyper_of(1e6))


def test_whoever_has_the_scalars_may_write_them() -> None:
    """From then on nothing is known."""
    bound = HostBound(0, True)
    assert bound.only_copies(hyper_of(1e6))
    bound.is_shown = True
    bound.advance(hyper_of(1e6), may_skip=False)
    assert not bound.only_copies(hyper_of(1e6))
