"""Published state that a user moves to other memory is followed, or refused by name; no step uses a stale address."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.multiprocessing.reductions import reduce_storage

from dist_asgd import ShardedASGD
from tests.harness.bits import assert_same_bits
from tests.harness.ranks import run, run_errors

WORLDS = [("none", 1), ("gloo", 2)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)
both = pytest.mark.parametrize("stage", [1, 2])
FORMS: dict[str, dict[str, Any]] = {"fused": {"fused": True}, "foreach": {"foreach": True}, "forloop": {"fused": False}}


def cloned(tensor: Tensor) -> None:
    """Point a tensor at a copy, as old code for moving optimizers does."""
    tensor.data = tensor.data.clone()


def strided(tensor: Tensor) -> None:
    """Point a tensor at every second element of other memory."""
    tensor.data = tensor.data.repeat_interleave(2)[::2]


MOVES: dict[str, Callable[[Tensor], object]] = {
    "share_memory_": Tensor.share_memory_,
    "a queue": lambda tensor: reduce_storage(tensor.untyped_storage()),
    "data": cloned,
    "strides": strided,
}


def take_step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], seed: int) -> None:
    """Step with gradients that do not depend on the rank."""
    optimizer.zero_grad()
    for index, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(31 * seed + index)).to(p.dtype)
    optimizer.step()


def parameters() -> list[nn.Parameter]:
    """Parameters of two buckets, and a complex one."""
    dtypes = (torch.float32, torch.float32, torch.float64, torch.complex64)
    shapes = ((6, 5), (4,), (9,), (3,))
    return [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape, dtype in zip(shapes, dtypes, strict=True)]


def moved(_rank: int, _world_size: int, stage: int, form: str, move: str) -> None:
    """Job: state moves between steps, before a save, and inside of averages; all bits stay those of a still twin."""
    params, still = parameters(), parameters()
    optimizer, twin = (ShardedASGD(ps, lr=0.1, t0=0, stage=stage, **FORMS[form]) for ps in (params, still))
    held = [optimizer.state[p] for p in params]
    objects = [entries["ax"] for entries in held]

    def move_all() -> None:
        for entries in held:
            for value in entries.values():
                if value.dim() or move != "strides":
                    MOVES[move](value)

    for seed in range(3):
        take_step(optimizer, params, seed)
        take_step(twin, still, seed)
        move_all()
    saved, wanted = optimizer.state_dict()["state"], twin.state_dict()["state"]
    for index, entry in wanted.items():
        for key, value in entry.items():
            got = saved[index][key]
            if key == "ax" and hasattr(value, "to_local"):
                got, value = got.to_local(), value.to_local()
            assert_same_bits(got, value, key)
    with optimizer.averaged_parameters(), twin.averaged_parameters():
        for p, q in zip(params, still, strict=True):
            assert_same_bits(p, q, "average")
        move_all()
    take_step(optimizer, params, 4)
    take_step(twin, still, 4)
    for p, q, shown in zip(params, still, objects, strict=True):
        assert_same_bits(p, q, "parameter")
        assert optimizer.state[p]["ax"] is shown
        assert_same_bits(shown, twin.state[q]["ax"], "ax")


@worlds
@both
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("move", MOVES)
def test_moved_state_is_followed(backend: str, world_size: int, stage: int, form: str, move: str) -> None:
    """The user's object goes on showing the state."""
    run(backend, world_size, moved, stage, form, move)


def changes(_rank: int, _world_size: int) -> None:
    """Job: values that come with other memory are taken, as they are from a write in place."""
    params = [nn.Parameter(torch.zeros(8))]
    optimizer = ShardedASGD(params, lr=0.1, lambd=0.0, t0=0)
    for seed in range(3):
        take_step(optimizer, params, seed)
    average = optimizer.state[params[0]]["ax"]
    average.data = torch.full_like(average, 7.0)
    with optimizer.averaged_parameters():
        assert params[0].tolist() == [7.0] * 8
    average.data = torch.full_like(average, 3.0)
    assert set(optimizer.consolidated_state_dict(to=None)["state"][0]["ax"].tolist()) == {3.0}


@worlds
def test_new_values_in_new_memory_are_taken(backend: str, world_size: int) -> None:
    """By swaps and saves too."""
    run(backend, world_size, changes)


def test_averages_that_change_places() -> None:
    """Each takes the other's values: none is overwritten before it was read."""
    params = [nn.Parameter(torch.zeros(8)) for _ in range(2)]
    optimizer = ShardedASGD(params, lr=0.1)
    first, second = (optimizer.state[p]["ax"] for p in params)
    first.fill_(1.0)
    second.fill_(2.0)
    first.data, second.data = second.data, first.data
    saved = optimizer.state_dict()["state"]
    assert [set(saved[index]["ax"].tolist()) for index in range(2)] == [{2.0}, {1.0}]


REPLACED: dict[str, Callable[[Tensor], Tensor]] = {
    "ax": Tensor.double,
    "ax shape": lambda ax: ax.new_zeros(ax.numel() + 1),
    "eta": lambda eta: eta.new_zeros(3),
    "mu": Tensor.long,
}


def replaces(rank: int, world_size: int, what: str) -> None:
    """Job: one rank replaces state by something else of another kind."""
    params = [nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))]
    optimizer = ShardedASGD([("first", params[0]), ("second", params[1])], lr=0.1)
    take_step(optimizer, params, 0)
    if rank == world_size - 1:
        value = optimizer.state[params[1]][what.split()[0]]
        value.data = REPLACED[what](value)
    take_step(optimizer, params, 1)


@worlds
@pytest.mark.parametrize("what", REPLACED)
def test_state_of_another_kind_is_an_error_on_all_ranks(backend: str, world_size: int, what: str) -> None:
    """With the name of a parameter and the remedy."""
    for error in run_errors(backend, world_size, replaces, what):
        assert error.type_name == "RuntimeError"
        assert "replaced in place" in error.message
        assert "load_state_dict()" in error.message
        assert ("second" if what.startswith("ax") else "first") in error.message


def sharded(_rank: int, world_size: int, replicated: bool) -> None:
    """Job: the averages of DTensors move; with replicas each rank holds a fragment of them."""
    placement = Replicate() if replicated else Shard(0)
    mesh = init_device_mesh("cpu", (world_size,))
    params = [nn.Parameter(distribute_tensor(torch.ones(6, 2), mesh, [placement])) for _ in range(2)]
    optimizers = [ShardedASGD([p], lr=0.1, t0=0) for p in params]
    for seed in range(4):
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = distribute_tensor(torch.full((6, 2), 1.0 + seed), mesh, [placement])
            optimizer.step()
        optimizers[0].state[params[0]]["ax"].to_local().share_memory_()
    ours, twin = (o.state[p]["ax"].to_local() for p, o in zip(params, optimizers, strict=True))
    assert_same_bits(torch.Tensor(ours), torch.Tensor(twin), "ax")


@pytest.mark.parametrize("replicated", [False, True])
def test_averages_of_dtensors_are_followed(replicated: bool) -> None:
    """Through their local tensors."""
    run("gloo", 2, sharded, replicated)


def resets(rank: int, world_size: int, stage: int) -> None:
    """Job: the usual reset, on the last rank at least: the state is another dict."""
    param = nn.Parameter(torch.ones(3))
    optimizer = ShardedASGD([("weight", param)], lr=0.1, stage=stage)
    param.grad = torch.ones(3)
    optimizer.step()
    if rank == world_size - 1:
        optimizer.state = defaultdict(dict)
    param.grad = torch.ones(3)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()


@worlds
@both
def test_state_that_was_reset_is_an_error_on_all_ranks(backend: str, world_size: int, stage: int) -> None:
    """It had been ignored: the next step counted on."""
    for error in run_errors(backend, world_size, resets, stage):
        assert "optimizer.state was replaced" in error.message
