"""``torch.compile`` around the optimizer: a graph break, and the bits of a run without it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_asgd import ShardedASGD
from tests.harness.bits import assert_same_bits
from tests.harness.ranks import run


def trained(stage: int, form: dict[str, Any], compiled: str) -> list[Tensor]:
    """The parameters and averages after three steps, of which ``compiled`` says what is compiled."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = ShardedASGD(model.parameters(), lr=0.1, t0=0, stage=stage, **form)
    steps: list[int] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    step: Callable[[], object] = optimizer.step
    if compiled == "step":
        step = torch.compile(step, backend="eager")

    def train(x: Tensor) -> None:
        model(x).square().mean().backward()
        optimizer.clip_grad_norm_(0.5)
        step()
        optimizer.zero_grad()

    whole = torch.compile(train, backend="eager") if compiled == "training step" else train
    for i in range(3):
        whole(torch.full((2, 4), 1.0 + i))
    assert len(steps) == 3
    torch._dynamo.reset()
    return [*model.parameters(), *(optimizer.state[p]["ax"] for p in model.parameters())]


def same_bits(_rank: int, _world_size: int, stage: int, form: dict[str, Any]) -> None:
    """Job: with and without the compiler."""
    wanted = trained(stage, form, "nothing")
    for compiled in ("step", "training step"):
        for got, want in zip(trained(stage, form, compiled), wanted, strict=True):
            assert_same_bits(got, want, compiled)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("form", [{}, {"foreach": True}, {"foreach": False}], ids=["fused", "foreach", "for-loop"])
def test_a_compiled_step_has_the_same_bits(stage: int, form: dict[str, Any]) -> None:
    """``torch.compile(optimizer.step)``, and a compiled function with backward, clipping and step in it."""
    run("none", 1, same_bits, stage, form)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_compiled_step_on_two_ranks(stage: int) -> None:
    """Reductions start in the hooks of a backward that is called from compiled code."""
    run("gloo", 2, same_bits, stage, {"foreach": True})
