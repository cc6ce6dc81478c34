"""``NonMonotonicTrigger``: the decision of a plain reference, on all ranks in the same call, also across a restart."""

import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, distribute_tensor

from dist_asgd import NonMonotonicTrigger, ShardedASGD, ShardedAverage, load_checkpoint, save_checkpoint
from tests.harness.bits import assert_same_bits
from tests.harness.meshes import mesh_of, sharded
from tests.harness.ranks import run, run_errors

WORLDS = [("none", 1), ("gloo", 2), ("threads", 3), ("gloo", 4)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)
SPECIAL = (math.nan, math.inf, -math.inf)


def mean_of(losses: Sequence[float]) -> float:
    """What one call logs of the losses of all ranks."""
    if all(map(math.isfinite, losses)):
        return float(sum(map(Fraction, losses)) / len(losses))
    mean = sum(losses) / len(losses)
    return math.inf if math.isnan(mean) else mean


def begins_at(losses: Sequence[float], patience: int) -> int | None:
    """The number, from 0, of the loss with which algorithm 1 sets T, if it does."""
    logs: list[float] = []
    for number, loss in enumerate(losses):
        if len(logs) > patience and any(loss > earlier for earlier in logs[: len(logs) - patience]):
            return number
        logs.append(loss)
    return None


def history(seed: int, world_size: int) -> tuple[int, list[list[float]]]:
    """A patience, and for each call the losses of all ranks; some are not finite."""
    draw = random.Random(seed)
    falls = draw.choice((0.0, 0.02, 0.1))
    calls = []
    for number in range(draw.randrange(3, 25)):
        common = 3.0 - falls * number + draw.gauss(0.0, 0.05)
        losses = [common + (draw.gauss(0.0, 0.2) if seed % 3 else 0.0) for _ in range(world_size)]
        if draw.random() < 0.03:
            losses[draw.randrange(world_size)] = draw.choice(SPECIAL)
        calls.append(losses)
    return draw.randrange(1, 7), calls


def made(stage: int = 1, **options: Any) -> tuple[nn.Module, ShardedASGD]:
    """A model and its optimizer, in two groups."""
    model = nn.Linear(5, 3)
    for p in model.parameters():
        nn.init.ones_(p)  # ranks that are threads share torch's random numbers
    groups = [{"params": [("weight", model.weight)]}, {"params": [("bias", model.bias)], "lr": 0.3}]
    return model, ShardedASGD(groups, lr=0.1, stage=stage, **options)


def step(model: nn.Module, optimizer: ShardedASGD, seed: int) -> None:
    """A step with gradients that do not depend on the rank."""
    for index, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(7 * seed + index))
    optimizer.step()


def decides(rank: int, world_size: int) -> list[tuple[float, ...]]:
    """Job: many random histories, with a step before each call."""
    model, optimizer = made()
    logged, steps, triggered = [], 0, 0
    for seed in range(30):
        patience, calls = history(seed, world_size)
        expected = [mean_of(losses) for losses in calls]
        begins = begins_at(expected, patience)
        trigger = NonMonotonicTrigger(optimizer, patience)
        for group in optimizer.param_groups:
            group["t0"] = 1e6
        for number, losses in enumerate(calls):
            step(model, optimizer, seed)
            steps += 1
            loss = losses[rank] if number % 2 else torch.tensor([losses[rank]], dtype=torch.float64)
            assert trigger.update(loss) is (number == begins), (seed, number)
            assert trigger.triggered is (begins is not None and number >= begins)
            if number == begins:
                assert [group["t0"] for group in optimizer.param_groups] == [steps, steps]
        if begins is None:
            assert optimizer.param_groups[0]["t0"] == 1e6
        assert trigger.losses == tuple(expected)
        triggered += begins is not None
        logged.append(trigger.losses)
    assert 8 < triggered < 28, "the histories do not test both outcomes"
    return logged


@worlds
def test_averaging_begins_in_the_call_of_the_reference(backend: str, world_size: int) -> None:
    """For random losses that differ between ranks; every rank logs the same ones."""
    first, *others = run(backend, world_size, decides)
    assert all(other == first for other in others)


# The second loss is the lowest; with a patience of 2 the sixth is the first above it that has two others in between.
LOSSES = (3.0, 2.0, 2.5, 2.2, 1.9, 2.1, 2.4, 1.0)
BEGINS = 5


def train(model: nn.Module, optimizer: ShardedASGD, trigger: NonMonotonicTrigger, rank: int, first: int) -> list[bool]:
    """Steps, and calls with losses of this rank from number ``first`` on."""
    decisions = []
    for number in range(first, len(LOSSES)):
        step(model, optimizer, number)
        decisions.append(trigger.update(LOSSES[number] + (0.5 if rank else -0.5)))
    return decisions


def resumes(rank: int, _world_size: int, folder: str) -> None:
    """Job: from a checkpoint after each call the run goes on as the one that was not interrupted."""
    model, optimizer = made(2)
    trigger = NonMonotonicTrigger(optimizer, 2)
    for number in range(len(LOSSES) + 1):
        extra = {"trigger": trigger.state_dict()}
        save_checkpoint(f"{folder}/{number}", model, optimizer, step=number, extra=extra)
        if number < len(LOSSES):
            step(model, optimizer, number)
            begins = trigger.update(LOSSES[number] + (0.5 if rank else -0.5))
            assert begins is (number == BEGINS)
    assert optimizer.param_groups[0]["t0"] == BEGINS + 1
    for number in range(len(LOSSES) + 1):
        again, resumed = made(2)
        after = NonMonotonicTrigger(resumed)
        after.load_state_dict(load_checkpoint(f"{folder}/{number}", again, resumed)["trigger"])
        assert (after.patience, after.losses) == (2, trigger.losses[:number])
        assert train(again, resumed, after, rank, number) == [n == BEGINS for n in range(number, len(LOSSES))]
        assert after.state_dict() == trigger.state_dict()
        assert resumed.param_groups[1]["t0"] == BEGINS + 1
        with optimizer.averaged_parameters(), resumed.averaged_parameters():
            for ours, first in zip(again.parameters(), model.parameters(), strict=True):
                assert_same_bits(ours.detach(), first.detach(), f"the average after a restart at {number}")


@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
def test_a_run_that_is_resumed_takes_the_same_decision(backend: str, world_size: int, tmp_path: Path) -> None:
    """At every point: before it, at it, and after it."""
    if world_size == 1:
        # Its losses are off by a constant, which changes no comparison.
        assert begins_at(LOSSES, 2) == BEGINS
    run(backend, world_size, resumes, str(tmp_path))


# --- ranks that disagree ------------------------------------------------------------------------------------


def goes_on_after(_rank: int, _world_size: int, losses: Sequence[Any], words: Sequence[str]) -> None:
    """Job: a loss that is none on one rank is an error on all; nothing is logged, and the next call works."""
    model, optimizer = made()
    trigger = NonMonotonicTrigger(optimizer, 1)
    for number, loss in enumerate((2.0, 1.0)):
        step(model, optimizer, number)
        assert not trigger.update(loss)
    with pytest.raises((TypeError, ValueError)) as raised:
        trigger.update(losses[_rank])
    for word in words:
        assert word in str(raised.value)
    assert trigger.losses == (2.0, 1.0)
    assert not trigger.update(1.5)
    assert trigger.update(3.0)
    assert optimizer.param_groups[0]["t0"] == 2


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((1.0, "low"), ("'low'", "real number", "rank 1")),
        ((torch.ones(2), 1.0), ("shape (2,)", "one element", "rank 0")),
        ((True, 1j), ("True", "1j")),
        ((None, torch.tensor(1j)), ("None", "1j")),
    ],
)
def test_a_loss_that_is_none_on_one_rank(losses: Sequence[Any], words: Sequence[str]) -> None:
    """All ranks raise, and name the rank."""
    run("gloo", 2, goes_on_after, losses, words)


def disagrees(rank: int, _world_size: int, how: str) -> None:
    """Job: ranks whose triggers differ, or one of which does not call."""
    model, optimizer = made()
    trigger = NonMonotonicTrigger(optimizer, 5 + (rank if how == "patience" else 0))
    trigger.update(1.0)
    if rank == 1 and how == "loads":
        trigger.load_state_dict({"patience": 5, "losses": [4.0], "triggered": False})
    if rank == 1 and how == "steps":
        step(model, optimizer, 0)
    trigger.update(1.0)


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("patience", "ValueError", ("patience", "5", "6")),
        ("loads", "ValueError", ("losses", "1.0", "4.0", "on every rank, or on none")),
        ("steps", "CallsDiffer", ("NonMonotonicTrigger.update()", "step()")),
    ],
)
def test_ranks_that_differ(how: str, kind: str, words: Sequence[str]) -> None:
    """Every rank raises."""
    for error in run_errors("gloo", 2, disagrees, how):
        assert error.type_name == kind
        assert all(word in error.message for word in words), error.message


# --- other modes, and refusals ------------------------------------------------------------------------------


def beside_another_optimizer(_rank: int, _world_size: int) -> None:
    """Job: a ``ShardedAverage`` begins with the update after the trigger."""
    weight = nn.Parameter(torch.zeros(5))
    average = ShardedAverage([("weight", weight)], start=10**9)
    trigger = NonMonotonicTrigger(average, 2)
    for number, loss in enumerate((*LOSSES, 3.0)):
        with torch.no_grad():
            weight.fill_(number)
        average.update()
        assert trigger.update(loss) is (number == BEGINS)
    with average.averaged_parameters():
        seen = range(BEGINS + 1, len(LOSSES) + 1)
        torch.testing.assert_close(weight.detach(), torch.full((5,), sum(seen) / len(seen)))


@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
def test_an_average_beside_another_optimizer(backend: str, world_size: int) -> None:
    """Its mean has the iterates after the trigger, and no others."""
    run(backend, world_size, beside_another_optimizer)


def other_modes(_rank: int, world_size: int, mode: str) -> None:
    """Job: the decision with other placements, and with the step in backward."""
    if mode == "fsdp2":
        model = sharded("fsdp2", world_size)
        trigger = NonMonotonicTrigger(ShardedASGD(model.parameters(), lr=0.1), 1)
        loss: Any = distribute_tensor(torch.tensor(1.0), mesh_of("fsdp2", world_size), [Replicate()])
        with pytest.raises(ValueError, match="full_tensor"):
            trigger.update(loss)
        losses = [loss.full_tensor(), 2.0, 0.5]
    else:
        options: dict[str, Any] = {"step_in_backward": True} if mode == "step_in_backward" else {"differentiable": True}
        model, optimizer = made(2 if mode == "step_in_backward" else 1, **options)
        trigger = NonMonotonicTrigger(optimizer, 1)
        losses = [1.0, 2.0, 0.5]
    assert [trigger.update(loss) for loss in (*losses, 1.5)] == [False, False, False, True]


@pytest.mark.parametrize(("mode", "world_size"), [("fsdp2", 2), ("step_in_backward", 2), ("differentiable", 1)])
def test_other_modes(mode: str, world_size: int) -> None:
    """The trigger needs nothing of the gradients."""
    run("gloo" if world_size > 1 else "none", world_size, other_modes, mode)


def test_update_inside_averaged_parameters_is_refused() -> None:
    """The loss there is that of the average, and ``start_averaging()`` is refused there too."""
    model, optimizer = made(t0=0)
    trigger = NonMonotonicTrigger(optimizer)
    for seed in range(3):
        step(model, optimizer, seed)
    with optimizer.averaged_parameters(), pytest.raises(RuntimeError, match=r"Trigger.update\(\) inside averaged"):
        trigger.update(1.0)
    assert trigger.losses == ()


@pytest.mark.parametrize(("patience", "kind"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)])
def test_patience_is_checked(patience: Any, kind: type[Exception]) -> None:
    """With an error that says what it counts."""
    with pytest.raises(kind, match="patience is"):
        NonMonotonicTrigger(made()[1], patience)


def test_other_optimizers_are_refused() -> None:
    """By name."""
    plain: Any = torch.optim.ASGD(nn.Linear(2, 2).parameters())
    with pytest.raises(TypeError, match=r"start_averaging\(\) of a ShardedASGD or ShardedAverage, and got ASGD"):
        NonMonotonicTrigger(plain)


GOOD = {"patience": 3, "losses": [1.0, math.inf], "triggered": True}
CHANGES: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("a key less", lambda state: state.pop("losses"), "has the keys"),
    ("a key more", lambda state: state.update(step=1), "has the keys"),
    ("patience", lambda state: state.update(patience=0), "patience is 0"),
    ("losses", lambda state: state.update(losses=["low"]), "'low'"),
    ("no losses", lambda state: state.update(losses=3), "not iterable"),
    ("NaN", lambda state: state.update(losses=[math.nan]), "nan"),
    ("triggered", lambda state: state.update(triggered=1), "triggered is 1"),
]


@pytest.mark.parametrize(("change", "text"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES])
def test_states_that_are_none_are_refused(change: Callable[[dict[str, Any]], Any], text: str) -> None:
    """And change nothing."""
    trigger = NonMonotonicTrigger(made()[1], 2)
    trigger.load_state_dict(GOOD)
    before = trigger.state_dict()
    assert before == GOOD
    state = {**GOOD, "losses": [2.0], "patience": 9}
    change(state)
    with pytest.raises(ValueError, match=text):
        trigger.load_state_dict(state)
    with pytest.raises(ValueError, match="has list"):
        trigger.load_state_dict([state])  # type: ignore[arg-type]
    assert trigger.state_dict() == before
