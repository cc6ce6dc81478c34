"""A write to parameters counts in their versions, so that autograd refuses a backward that needs the old values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dist_asgd import ShardedASGD
from tests.harness.ranks import run

WORLDS = [("none", 1), ("gloo", 2)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)
both = pytest.mark.parametrize("stage", [1, 2])
FORMS: dict[str, dict[str, Any]] = {"fused": {"fused": True}, "foreach": {"foreach": True}, "forloop": {"fused": False}}
MODIFIED = "modified by an inplace operation"


def two_layers(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Tensor]:
    """A model whose first layer's gradient needs the second one's weight, and its input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, dtype=dtype), nn.Linear(4, 2, dtype=dtype))
    return model, torch.ones(5, 3, dtype=dtype)


def train(model: nn.Module, optimizer: ShardedASGD, inputs: Tensor, steps: int) -> None:
    """Take some steps."""
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def between(_rank: int, _world_size: int, stage: int, form: str) -> None:
    """Job: a step, and a swap, come between a forward and its backward."""
    model, inputs = two_layers()
    optimizer = ShardedASGD(model.parameters(), lr=0.1, t0=0, stage=stage, **FORMS[form])
    train(model, optimizer, inputs, 3)
    loss = model(inputs).square().mean()
    optimizer.zero_grad()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match=MODIFIED):
        torch.autograd.grad(loss, model[0].weight, retain_graph=True)
    loss = model(inputs).square().mean()
    with optimizer.averaged_parameters():
        with pytest.raises(RuntimeError, match=MODIFIED):
            torch.autograd.grad(loss, model[0].weight, retain_graph=True)
        loss = model(inputs).square().mean()
    with pytest.raises(RuntimeError, match=MODIFIED):
        torch.autograd.grad(loss, model[0].weight)


@worlds
@both
@pytest.mark.parametrize("form", FORMS)
def test_a_backward_that_needs_overwritten_parameters_raises(
    backend: str, world_size: int, stage: int, form: str
) -> None:
    """As with ``torch.optim.ASGD``, by torch's own error."""
    run(backend, world_size, between, stage, form)


def versions(_rank: int, _world_size: int, stage: int) -> None:
    """Job: the versions of parameters that are written change, and of no others."""
    params = [nn.Parameter(torch.ones(9)) for _ in range(3)] + [nn.Parameter(torch.ones(9), requires_grad=False)]
    optimizer = ShardedASGD(params, lr=0.1, t0=0, stage=stage)

    def written(act: Any) -> list[bool]:
        before = [p._version for p in params]
        act()
        return [p._version > version for p, version in zip(params, before, strict=True)]

    def step(*indices: int) -> None:
        optimizer.zero_grad()
        for index in indices:
            params[index].grad = torch.ones(9)
        optimizer.step()

    assert written(lambda: step(0, 2)) == [True, False, True, False]
    assert written(lambda: step(0)) == [True, False, False, False]
    assert written(lambda: step(0)) == [True, False, False, False]
    assert written(step) == [False] * 4
    # Parameter 1 has not begun: its average is not put in its place.
    block = optimizer.averaged_parameters()
    assert written(block.__enter__) == [True, False, False, False]
    assert written(lambda: block.__exit__(None, None, None)) == [True, False, False, False]
    assert written(optimizer.state_dict) == [False] * 4
    assert written(lambda: optimizer.load_state_dict(optimizer.state_dict())) == [False] * 4


@worlds
@both
def test_only_written_parameters_count(backend: str, world_size: int, stage: int) -> None:
    """A parameter without a gradient, or whose averaging has not begun, keeps its version: its graphs stay valid."""
    run(backend, world_size, versions, stage)


def masters(_rank: int, _world_size: int) -> None:
    """Job: loaded masters change the parameters."""
    model, inputs = two_layers(torch.bfloat16)
    optimizer = ShardedASGD(model.parameters(), lr=0.1, master_weights=True)
    train(model, optimizer, inputs, 1)
    saved = optimizer.state_dict()
    loss = model(inputs).square().mean()
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=MODIFIED):
        torch.autograd.grad(loss, model[0].weight)


@worlds
def test_loading_masters_counts(backend: str, world_size: int) -> None:
    """As it writes the parameters that they round to."""
    run(backend, world_size, masters)


def sharded(_rank: int, world_size: int) -> None:
    """Job: the version of a DTensor counts its steps and swaps, as torch's operators would count them."""
    mesh = init_device_mesh("cpu", (world_size,))
    param = nn.Parameter(distribute_tensor(torch.ones(6, 2), mesh, [Shard(0)]))
    optimizer = ShardedASGD([param], lr=0.1, t0=0)
    for _ in range(3):
        version = param._version
        param.grad = distribute_tensor(torch.ones(6, 2), mesh, [Shard(0)])
        optimizer.step()
        assert param._version > version
    version = param._version
    with optimizer.averaged_parameters():
        assert param._version > version
        version = param._version
    assert param._version > version


def test_dtensors_count_too() -> None:
    """Their wrapper has a version of its own, beside that of the local tensor."""
    run("gloo", 2, sharded)
