"""``torch.compile`` around the optimizer: a graph break, and the bits of a run without it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_asgd import ShardedASGD
from tests.harness.bits import assert_same_bits
from tests.harness.native import native_collectives
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


# --- parameters that travel during the forward ---------------------------------------------------------------


class Net(nn.Module):
    """Two blocks, and a weight that is read past its module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2))
        self.uncalled = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 4)`` to ``(batch, 4)``."""
        return self.second(self.first(x)) + nn.functional.linear(x, self.uncalled.weight)


def overlapped(compiled: str, overlaps: bool) -> list[Tensor]:
    """The outputs of four steps; gathers are late, and what they write is not a number before."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with native_collectives(late=True):
        model = Net()
        call: Callable[[Tensor], Tensor] = model
        given: nn.Module = model
        if compiled == "blocks":
            model.first = torch.compile(model.first, backend="eager")
            model.second.compile(backend="eager")
        if compiled == "before":
            call = given = torch.compile(model, backend="eager")
        optimizer = ShardedASGD(model.parameters(), lr=0.01, t0=0, bucket_cap_mb=1e-4)
        if overlaps:
            optimizer.overlap_forward(given)
        if compiled == "after":
            call = torch.compile(model, backend="eager")
        if compiled == "function":
            inner = model.uncalled
            call = torch.compile(lambda x: nn.functional.linear(x, inner.weight, inner.bias), backend="eager")
        found: list[Tensor] = []
        for step in range(4):
            found.append(call(torch.full((2, 4), 1.0 + step)))
            found[-1].square().mean().backward()
            optimizer.step()
            assert bool(optimizer.gatherer.arrivals.keys) is overlaps
            optimizer.zero_grad()
        if compiled == "before":
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    return found


def overlap_in_compiled_code(_: int, __: int) -> None:
    """Job: every way to compile, with and without the overlap."""
    wanted = {overlaps: overlapped("nothing", overlaps) for overlaps in (False, True)}
    for compiled in ("blocks", "before", "after"):
        for got, want in zip(overlapped(compiled, True), wanted[False], strict=True):
            assert_same_bits(got, want, compiled)
    for got, want in zip(wanted[True], wanted[False], strict=True):
        assert_same_bits(got, want, "not compiled")
    for got, want in zip(overlapped("function", True), overlapped("function", False), strict=True):
        assert_same_bits(got, want, "a function that calls no module")
    torch._dynamo.reset()


def test_compiled_modules_wait_for_parameters() -> None:
    """Before the compiled code begins; it is not broken into pieces if it was compiled before ``overlap_forward()``."""
    run("gloo", 2, overlap_in_compiled_code)
