"""State that others move and copy."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dist_asgd import ShardedASGD
from tests.harness.bits import same_bits
from tests.harness.ranks import run, run_errors

both = pytest.mark.parametrize("stage", [1, 2])
forms = pytest.mark.parametrize("form", [{}, {"foreach": True}, {"foreach": False}], ids=["fused", "foreach", "loop"])
worlds = pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
Form = dict[str, Any]


def stepped(param: Tensor, steps: int, stage: int, form: Form) -> ShardedASGD:
    """An optimizer after some steps with gradients of ones."""
    optimizer = ShardedASGD([("w", param)], lr=0.1, t0=0, stage=stage, **form)
    for _ in range(steps):
        step(optimizer, param)
    return optimizer


def step(optimizer: ShardedASGD, param: Tensor) -> None:
    """One more step."""
    optimizer.zero_grad()
    param.grad = torch.ones_like(param)
    optimizer.step()


def param_of(world_size: int, placement: str) -> Tensor:
    """A parameter with a NaN in it."""
    whole = torch.arange(256.0)
    whole[3] = torch.nan
    if placement == "plain":
        return nn.Parameter(whole)
    mesh = init_device_mesh("cpu", (world_size,))
    return nn.Parameter(distribute_tensor(whole, mesh, [Shard(0) if placement == "shard" else Replicate()]))


def local(tensor: Tensor) -> Tensor:
    """This rank's elements."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def goes_on(_rank: int, world_size: int, stage: int, form: Form, placement: str) -> None:
    """Job: every tensor of the state is replaced by a copy, after which the bits are those without it."""
    plain, copied = param_of(world_size, placement), param_of(world_size, placement)
    first, second = stepped(plain, 2, stage, form), stepped(copied, 2, stage, form)
    for key, value in second.state[copied].items():
        second.state[copied][key] = copy.deepcopy(value) if key == "ax" else value.clone()
    step(first, plain)
    step(second, copied)
    assert same_bits(local(plain), local(copied))
    for key, value in first.state[plain].items():
        assert same_bits(local(value), local(second.state[copied][key])), key
    before = local(second.state[copied]["ax"]).clone()
    step(second, copied)
    assert not same_bits(before, local(second.state[copied]["ax"]))


@both
@forms
@worlds
def test_equal_copies_of_state_go_on(backend: str, world_size: int, stage: int, form: Form) -> None:
    """Trainers move state to the parameter's device, which copies it."""
    run(backend, world_size, goes_on, stage, form, "plain")


@both
@pytest.mark.parametrize("placement", ["shard", "replicate"])
def test_equal_copies_of_the_state_of_dtensors_go_on(stage: int, placement: str) -> None:
    """Each rank compares what it holds."""
    run("gloo", 2, goes_on, stage, {}, placement)


def other_values(rank: int, world_size: int, stage: int, key: str, placement: str) -> None:
    """Job: one rank replaces an entry by other values, another dtype or no tensor."""
    param = param_of(world_size, placement)
    optimizer = stepped(param, 2, stage, {})
    if rank == world_size - 1:
        value = optimizer.state[param]["ax" if placement == "plain" else "mu"]
        others: dict[str, Any] = {"values": value + 1, "dtype": value.double(), "shape": value[None], "float": 1.0}
        optimizer.state[param]["ax" if placement == "plain" else "mu"] = others[key]
    step(optimizer, param)


@both
@pytest.mark.parametrize("key", ["values", "dtype", "shape", "float"])
@pytest.mark.parametrize("placement", ["plain", "shard"])
def test_other_state_is_an_error_on_all_ranks(stage: int, key: str, placement: str) -> None:
    """That names the parameter, and the rank."""
    for error in run_errors("gloo", 2, other_values, stage, key, placement):
        assert "state of parameter w was replaced" in error.message
        assert "rank 1 of 2" in error.message


def moved(_rank: int, world_size: int, stage: int) -> None:
    """Job: what accelerate and Lightning do with state dicts before training."""
    param = nn.Parameter(torch.arange(256.0))
    optimizer = stepped(param, 2, stage, {})
    saved = optimizer.state_dict()
    part = saved["state"][0]["ax"]
    for there in (part.to("cpu"), part.to(torch.device("cpu"), non_blocking=True), part.to("cpu", copy=True)):
        assert same_bits(there.to_local(), part.to_local())
    assert part.to("meta").to_local().is_meta
    saved["state"][0] = {key: value.to("cpu") for key, value in saved["state"][0].items()}
    optimizer.load_state_dict(saved)
    for refused in (lambda: part.to(torch.float32), lambda: part.to("cpu", torch.float32), part.cpu):
        with pytest.raises(RuntimeError, match="one rank's part"):
            refused()
    assert part.to_local().numel() == 256 // world_size


@both
def test_parts_can_be_moved_and_loaded(stage: int) -> None:
    """By ``Tensor.to(device)``; conversions stay refused."""
    run("gloo", 2, moved, stage)
