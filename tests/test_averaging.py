"""The average, usable: swapped in on every rank, gathered, swapped back bit for bit."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_asgd import ShardedASGD, ShardedAverage
from tests.harness.bits import assert_same_bits
from tests.harness.meshes import dtensors, set_gradients, sharded, whole
from tests.harness.models import odd_loss, odd_net
from tests.harness.ranks import run

WORLDS = [("none", 1), ("threads", 3), ("gloo", 2), ("gloo", 4)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)
both = pytest.mark.parametrize("stage", [1, 2])
OPTIONS: dict[str, Any] = {"lr": 0.2, "bucket_cap_mb": 0.0005}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """The same batch on every rank: averaged gradients are the local ones."""
    for seed in range(steps):
        optimizer.zero_grad()
        odd_loss(model, seed).backward()
        optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: whole(p).clone() for name, p in model.named_parameters()}


def assert_same_values(found: dict[str, Tensor], expected: dict[str, Tensor], when: str) -> None:
    """To the bit."""
    for name, value in expected.items():
        assert_same_bits(found[name], value, f"{name} {when}")


def swaps(_rank: int, _world_size: int, stage: int, wide: bool, fail: bool) -> None:
    """Job: the values inside are the consolidated averages; those after are those before."""
    model = odd_net()
    optimizer = ShardedASGD(model.parameters(), t0=1, stage=stage, **OPTIONS)
    train(model, optimizer, 5)
    saved = optimizer.consolidated_state_dict(to=None)
    if wide:
        for entry in saved["state"].values():
            entry["ax"] = entry["ax"].double() + 1e-12
        optimizer.load_state_dict(saved)
    before = values(model)
    expected = dict(before)
    for index, (name, p) in enumerate(model.named_parameters()):
        if index in saved["state"]:
            expected[name] = saved["state"][index]["ax"].to(p.dtype)
    last_loss = odd_loss(model, 0).detach()
    for _ in range(2):
        try:
            with optimizer.averaged_parameters():
                assert_same_values(values(model), expected, "inside")
                averaged_loss = odd_loss(model, 0).detach()
                if fail:
                    raise KeyError("told to")
        except KeyError:
            assert fail
        assert_same_values(values(model), before, "afterwards")
    assert averaged_loss != last_loss
    assert_same_bits(odd_loss(model, 0).detach(), last_loss, "loss afterwards")
    after = optimizer.consolidated_state_dict(to=None)
    for index, entry in saved["state"].items():
        assert_same_bits(after["state"][index]["ax"], entry["ax"], "ax afterwards")


@both
@worlds
@pytest.mark.parametrize("fail", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("wide", [False, True], ids=["same dtype", "wider"])
def test_the_averages_come_in_and_go_out_to_the_bit(
    backend: str, world_size: int, wide: bool, fail: bool, stage: int
) -> None:
    """Twice, also when left by an exception, and with averages wider than the parameters."""
    run(backend, world_size, swaps, stage, wide, fail)


def goes_on(_rank: int, _world_size: int, stage: int) -> None:
    """Job: a run with evaluations in between is the run without them."""
    model, other = odd_net(), odd_net()
    optimizer = ShardedASGD(model.parameters(), t0=1, stage=stage, **OPTIONS)
    undisturbed = ShardedASGD(other.parameters(), t0=1, stage=stage, **OPTIONS)
    for _ in range(3):
        train(model, optimizer, 2)
        with optimizer.averaged_parameters(), torch.no_grad():
            odd_loss(model, 9)
        train(other, undisturbed, 2)
    assert_same_values(values(model), values(other), "at the end")


@both
@worlds
def test_evaluating_does_not_disturb_training(backend: str, world_size: int, stage: int) -> None:
    """Bit for bit."""
    run(backend, world_size, goes_on, stage)


def not_begun(_rank: int, _world_size: int) -> None:
    """Job: a no-op before there is an average."""
    model = odd_net()
    optimizer = ShardedASGD(model.parameters(), t0=1e6, **OPTIONS)
    for steps in (0, 3):
        train(model, optimizer, steps)
        before = values(model)
        with optimizer.averaged_parameters():
            assert_same_values(values(model), before, "inside")
        assert_same_values(values(model), before, "afterwards")


@worlds
def test_before_averaging_has_begun_nothing_changes(backend: str, world_size: int) -> None:
    """Neither without a step nor before t0."""
    run(backend, world_size, not_begun)


INSIDE = {
    "averaged_parameters": lambda o: o.averaged_parameters().__enter__(),
    "step": lambda o: o.step(),
    "state_dict": lambda o: o.state_dict(),
    "consolidated_state_dict": lambda o: o.consolidated_state_dict(),
    "load_state_dict": lambda o: o.load_state_dict({"state": {}, "param_groups": []}),
    "add_param_group": lambda o: o.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
    "start_averaging": lambda o: o.start_averaging(),
}


def refuses(_rank: int, _world_size: int, call: str, stage: int) -> None:
    """Job: what would mix up parameters and averages is refused, and the swap back still works."""
    model = odd_net()
    optimizer = ShardedASGD(model.parameters(), t0=0, stage=stage, **OPTIONS)
    train(model, optimizer, 3)
    before = values(model)
    with optimizer.averaged_parameters(), pytest.raises(RuntimeError, match="inside averaged_parameters"):
        INSIDE[call](optimizer)
    assert_same_values(values(model), before, "afterwards")
    train(model, optimizer, 1)


@both
@worlds
@pytest.mark.parametrize("call", INSIDE)
def test_calls_that_are_refused_inside(backend: str, world_size: int, call: str, stage: int) -> None:
    """With a message that says where to make them."""
    run(backend, world_size, refuses, call, stage)


def starts(_rank: int, _world_size: int) -> None:
    """Job: ``start_averaging`` is ``t0 = step``; from step t0 + 2 on ``ax`` is the mean of the iterates."""
    model = odd_net().double()
    optimizer = ShardedASGD(model.parameters(), **OPTIONS)
    params = [p for p in model.parameters() if p.requires_grad]
    iterates: list[list[Tensor]] = []
    for step in range(8):
        if step == 3:
            optimizer.start_averaging()
            assert all(group["t0"] == 3 for group in optimizer.param_groups)
        for index, p in enumerate(params):
            generator = torch.Generator().manual_seed(31 * step + index)
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
        iterates.append([p.detach().clone() for p in params])
    with optimizer.averaged_parameters():
        for index, p in enumerate(params):
            stacked = torch.stack([iterate[index] for iterate in iterates[4:]])
            # mu is kept in float32: each of four terms is off by 2^-24 of its weight at most.
            bound = 4 * 2.0**-24 * float((stacked.amax(0) - stacked.amin(0)).max()) if p.numel() else 0.0
            torch.testing.assert_close(p.detach(), stacked.mean(0), rtol=0, atol=bound + 1e-15)


@worlds
def test_start_averaging_begins_the_mean_at_the_next_steps(backend: str, world_size: int) -> None:
    """In every group."""
    run(backend, world_size, starts)


def many_small(_rank: int, _world_size: int) -> None:
    """Job: parameters of one group that begin at different times are swapped one by one."""
    early, late = (nn.Parameter(torch.ones(70)) for _ in range(2))
    optimizer = ShardedASGD([early, late], lr=0.1, t0=1)
    for step in range(6):
        early.grad = torch.full_like(early, 1.0 + step)
        late.grad = torch.full_like(late, 2.0 + step) if step == 5 else None
        optimizer.step()
    kept = copy.deepcopy([early.detach(), late.detach()])
    with optimizer.averaged_parameters():
        assert not torch.equal(early, kept[0])
        assert_same_bits(late, kept[1], "a parameter whose averaging has not begun")
    assert_same_bits(early, kept[0], "early")


@worlds
def test_parameters_of_one_bucket_may_begin_at_different_times(backend: str, world_size: int) -> None:
    """Each by its own step."""
    run(backend, world_size, many_small)


def copied(model: nn.Module) -> None:
    """Each parameter gets a copy of its own."""
    for p in model.parameters():
        p.data = p.data.clone()


def into_one_chunk(model: nn.Module) -> None:
    """Contiguous parameters get views of one buffer, as ``flatten_parameters()`` binds weights for cuDNN."""
    params = [p for p in model.parameters() if p.numel() and p.is_contiguous()]
    chunk = torch.cat([p.data.flatten() for p in params])
    for p, values_of_p in zip(params, chunk.split([p.numel() for p in params]), strict=True):
        p.data = values_of_p.view_as(p)


def local_tensors(model: nn.Module) -> None:
    """DTensors get copies of their local tensors, as FSDP2 makes them in the first forward."""
    for _, p in dtensors(model):
        p._local_tensor = p._local_tensor.clone()


def moves(rank: int, world_size: int, move: Any, stage: int, wide: bool) -> None:
    """Job: parameters that are rebound inside the block are back afterwards, and training goes on undisturbed."""
    pair = []
    for _ in range(2):
        model = sharded("fsdp2", world_size) if move is local_tensors else odd_net()
        model.to(torch.bfloat16 if wide else torch.float32)
        pair.append((model, ShardedASGD(model.parameters(), t0=1, stage=stage, **OPTIONS)))
    for number in range(3):
        for model, optimizer in pair:
            for seed in range(2 * number, 2 * number + 2):
                set_gradients(model, seed)
                optimizer.step()
        model, optimizer = pair[0]
        before, ax = values(model), optimizer.consolidated_state_dict(to=None)["state"]
        with optimizer.averaged_parameters():
            averaged = values(model)
            if rank != 1:
                move(model)
            assert_same_values(values(model), averaged, "inside")
        assert_same_values(values(model), before, "afterwards")
        for index, entry in optimizer.consolidated_state_dict(to=None)["state"].items():
            assert_same_bits(entry["ax"], ax[index]["ax"], "ax afterwards")
    assert_same_values(values(pair[0][0]), values(pair[1][0]), "at the end")


@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
@pytest.mark.parametrize("wide", [False, True], ids=["same dtype", "wider"])
@pytest.mark.parametrize(("move", "stage"), [(copied, 2), (into_one_chunk, 1), (into_one_chunk, 2), (local_tensors, 1)])
def test_parameters_that_are_rebound_inside_come_back(
    backend: str, world_size: int, move: Any, stage: int, wide: bool
) -> None:
    """On all ranks, whichever of them rebinds; none of them takes the averages for parameters."""
    if move is local_tensors and world_size == 1:
        pytest.skip("FSDP2 has several ranks")
    run(backend, world_size, moves, move, stage, wide)


def moves_beside(rank: int, _world_size: int, move: Any) -> None:
    """Job: the same of a ``ShardedAverage``, whose parameters another optimizer trains."""
    pair = []
    for _ in range(2):
        model = odd_net()
        pair.append((model, torch.optim.SGD(model.parameters(), lr=0.1), ShardedAverage(model.named_parameters())))
    for seed in range(4):
        for model, optimizer, average in pair:
            set_gradients(model, seed)
            optimizer.step()
            average.update()
        model, _, average = pair[0]
        before = values(model)
        with average.averaged_parameters():
            if rank != 1:
                move(model)
        assert_same_values(values(model), before, "afterwards")
    with pair[0][2].averaged_parameters(), pair[1][2].averaged_parameters():
        assert_same_values(values(pair[0][0]), values(pair[1][0]), "the averages at the end")


@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
@pytest.mark.parametrize("move", [copied, into_one_chunk])
def test_parameters_of_another_optimizer_that_are_rebound_inside_come_back(
    backend: str, world_size: int, move: Any
) -> None:
    """They stay where they were moved, with the values from before."""
    run(backend, world_size, moves_beside, move)
