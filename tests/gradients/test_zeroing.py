"""Stage 2: a backward after a step starts from zero, however the user zeroes, unless gradients are to be kept."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dist_asgd import ShardedASGD
from tests.gradients.test_stage2 import OPTIONS, assert_same_models, integer_backward, twins
from tests.harness.ranks import run, run_errors
from tests.test_errors import assert_all_say

WORLDS = [("none", 1), ("threads", 2), ("gloo", 2), ("gloo", 4)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)


def to_none(model: nn.Module) -> None:
    """As trainers that keep no optimizer at hand do it."""
    for param in model.parameters():
        param.grad = None


ZEROING: dict[str, Callable[[nn.Module, Any], None]] = {
    "model": lambda model, _: model.zero_grad(),
    "model, to zeros": lambda model, _: model.zero_grad(set_to_none=False),
    "by hand": lambda model, _: to_none(model),
    "optimizer": lambda _, optimizer: optimizer.zero_grad(),
    "not at all": lambda *_: None,
}


def zeroes(_rank: int, _world_size: int, how: str, silent: bool) -> None:
    """Job: several backwards a step, the first of them under ``no_sync()`` or not; nothing warns."""
    ours, subject, theirs, oracle = twins()
    for step in range(3):
        ZEROING[how](ours, subject)
        oracle.zero_grad()
        for number in range(2):
            with subject.no_sync() if silent and number == 0 else contextlib.nullcontext():
                integer_backward(ours, 10 * step + number)
            integer_backward(theirs, 10 * step + number)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            subject.step()
        oracle.step()
        assert_same_models(ours, theirs, f"after step {step}")


@worlds
@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("how", ZEROING)
def test_a_backward_after_a_step_starts_from_zero(backend: str, world_size: int, how: str, silent: bool) -> None:
    """The optimizer need not know that gradients were zeroed."""
    run(backend, world_size, zeroes, how, silent)


def differs(rank: int, world_size: int) -> None:
    """Job: between steps, gradients come to other parameters each time, on one rank only, by hand or from backward."""
    weights = [nn.Parameter(torch.full((3,), 1.0 + i)) for i in range(4)]
    copies = [nn.Parameter(w.detach().clone()) for w in weights]
    subject = ShardedASGD(weights, stage=2, bucket_cap_mb=1e-6, **OPTIONS)
    oracle = torch.optim.ASGD(copies, **OPTIONS)
    for step, (used, by_hand, clipped) in enumerate(
        [
            ((0, 1, 2, 3), False, False),
            ((1,), False, True),
            ((2,), True, False),
            ((), False, False),
            ((3, 0), True, True),
        ]
    ):
        oracle.zero_grad() if used else None
        for i in used:
            copies[i].grad = torch.full((3,), 2.0 + i)
            if rank == i % world_size:
                if by_hand:
                    weights[i].grad = torch.full((3,), (2.0 + i) * world_size)
                else:
                    (weights[i] * (2.0 + i) * world_size).sum().backward()
        if clipped:
            subject.clip_grad_norm_(1e6)
        subject.step()
        oracle.step()
        assert all(map(torch.equal, weights, copies)), f"step {step}"


@worlds
def test_gradients_of_some_ranks_and_parameters(backend: str, world_size: int) -> None:
    """Ranks without gradients start over with the others; a step without any new gradient uses the last again."""
    run(backend, world_size, differs)


def keeps(_rank: int, _world_size: int, clipped: bool) -> None:
    """Job: gradients add up over steps on request, as in torch without zeroing."""
    ours, subject, theirs, oracle = twins()
    for step in range(4):
        for model in (ours, theirs):
            integer_backward(model, step)
        if clipped:
            subject.clip_grad_norm_(1e9)
        subject.step()
        oracle.step()
        assert_same_models(ours, theirs, f"after step {step}")
        subject.keep_gradients()


@worlds
@pytest.mark.parametrize("clipped", [False, True])
def test_gradients_are_kept_on_request(backend: str, world_size: int, clipped: bool) -> None:
    """A factor of clipping is not applied twice."""
    run(backend, world_size, keeps, clipped)


def keeps_on_one_rank(rank: int, _world_size: int) -> None:
    """Job: rank 1 asks for its gradients, the others do not."""
    ours, subject, _, _ = twins()
    integer_backward(ours, 0)
    subject.step()
    if rank == 1:
        subject.keep_gradients()
    integer_backward(ours, 1)
    subject.step()


def test_all_ranks_keep_gradients_or_none() -> None:
    """Otherwise shards would hold the gradients of different steps."""
    assert_all_say(
        run_errors("gloo", 2, keeps_on_one_rank), "RuntimeError", "keep_gradients()", "rank 0 has 0", "Every rank must"
    )
