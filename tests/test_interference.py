"""What goes on beside an optimizer: other optimizers, the user's own messages, skipped steps, changed parameters."""

import copy
import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_asgd import ShardedASGD
from tests.harness.ranks import run, run_errors

RULE = {"lr": 1.0, "lambd": 0.0}


def scalar() -> torch.nn.Parameter:
    """A parameter whose gradient is whatever it is multiplied with."""
    return torch.nn.Parameter(torch.zeros(1))


def replace_optimizer(_rank: int, _world_size: int, stage: int) -> tuple[float, float]:
    """Job: a stage 2 optimizer is dropped, and another takes over its parameter."""
    param = scalar()
    old = ShardedASGD([param], stage=2, **RULE)
    param.sum().backward()
    old.step()
    del old
    gc.collect()
    new = ShardedASGD([param], stage=stage, **RULE)
    before = param.item()
    param.sum().backward()
    new.step()
    return before - param.item(), new.state[param]["step"].item()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_dropped_optimizer_takes_no_gradients(stage: int) -> None:
    """Its hooks go with it."""
    assert run("gloo", 2, replace_optimizer, stage) == [(1.0, 1.0)] * 2


def interleave(rank: int, _world_size: int, reverse_on: int) -> tuple[float, float]:
    """Job: two optimizers; rank 1 does not use the second's parameter, or takes the losses in another order."""
    a, b = scalar(), scalar()
    first, second = ShardedASGD([a], stage=2, **RULE), ShardedASGD([b], stage=2, **RULE)
    for _ in range(2):
        losses = [(a * 10).sum(), (b * 2).sum()]
        if rank == reverse_on:
            losses.reverse()
        for loss in losses:
            loss.backward()
        first.step(), second.step()
        first.zero_grad(), second.zero_grad()
    ((a * 10).sum() + ((b * 2).sum() if rank == 0 else 0)).backward()
    first.step(), second.step()
    return a.item(), b.item()


@pytest.mark.parametrize("reverse_on", [-1, 1])
def test_optimizers_on_one_group_keep_their_gradients(reverse_on: int) -> None:
    """Their messages have tags of their own."""
    assert run("gloo", 2, interleave, reverse_on) == [(-30.0, -5.0)] * 2


def reduce_between(rank: int, _world_size: int) -> tuple[float, float, float]:
    """Job: the user's own collective between backward and step, while a round is open on one rank only."""
    a, b = scalar(), scalar()
    optimizer = ShardedASGD([a, b], stage=2, **RULE)
    (a * 10 + (b * 2 if rank == 0 else 0)).sum().backward()
    logged = torch.tensor([float(rank + 1)])
    dist.all_reduce(logged)
    optimizer.step()
    return logged.item(), a.item(), b.item()


def test_the_users_collectives_are_not_met() -> None:
    """On the very group that the optimizer uses."""
    assert run("gloo", 2, reduce_between) == [(3.0, -10.0, -1.0)] * 2


def skip_step(rank: int, _world_size: int) -> list[float]:
    """Job: a backward that uses other parameters on each rank, skipped by all; then an ordinary step."""
    a, b = scalar(), scalar()
    optimizer = ShardedASGD([a, b], stage=2, **RULE)
    a.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    (a if rank == 0 else b).mul(100).sum().backward()
    optimizer.zero_grad()
    a.sum().backward()
    optimizer.step()
    return [a.item(), b.item()]


def test_a_step_that_all_ranks_skip_leaves_nothing_behind() -> None:
    """zero_grad() settles the round that only one rank opened."""
    assert run("gloo", 2, skip_step) == [[-2.0, 0.0]] * 2


def skip_backward(rank: int, _world_size: int) -> None:
    """Job: one rank ran a backward that the other did not, and both go on after zero_grad()."""
    a = scalar()
    optimizer = ShardedASGD([a], stage=2, **RULE)
    if rank == 1:
        (a * 100).sum().backward()
    optimizer.zero_grad()
    a.sum().backward()
    optimizer.step()


def test_gradients_of_different_steps_are_never_mixed() -> None:
    """An error on both ranks."""
    errors = run_errors("gloo", 2, skip_backward)
    assert all("zero_grad" in error.message for error in errors)


def count_launches(_rank: int, _world_size: int) -> int:
    """Job: reduce-scatters of a step in which a parameter is unused on all ranks."""
    params = [scalar() for _ in range(4)]
    optimizer = ShardedASGD(params, stage=2, bucket_cap_mb=1e-6, **RULE)
    for _ in range(2):
        sum(p.sum() for p in params[:3]).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    with torch.profiler.profile() as profile:
        sum(p.sum() for p in params[:3]).backward()  # type: ignore[union-attr]
        optimizer.step()
    return sum(event.name == "dist_asgd::reduce_scatter" for event in profile.events() or ())


def test_an_unused_parameter_costs_no_second_round() -> None:
    """The last registered one, whose bucket comes first."""
    assert run("gloo", 2, count_launches) == [4, 4]


def fail_inside_average(rank: int, _world_size: int) -> tuple[bool, str]:
    """Job: one rank calls zero_grad() inside averaged_parameters()."""
    a = scalar()
    optimizer = ShardedASGD([a], stage=2, t0=0, **RULE)
    for _ in range(4):
        a.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = a.detach().clone()
    said = ""
    try:
        with optimizer.averaged_parameters():
            assert not torch.equal(a, before)
            if rank == 0:
                optimizer.zero_grad()
    except RuntimeError as error:
        said = str(error)
    return torch.equal(a, before), said


def test_the_parameters_come_back_where_ranks_disagree_at_the_end() -> None:
    """And every rank hears why."""
    for back, said in run("gloo", 2, fail_inside_average):
        assert back
        assert "zero_grad" in said


def rebind(rank: int, _world_size: int) -> None:
    """Job: a parameter transposed in its own memory, on one rank."""
    param = torch.nn.Parameter(torch.zeros(3, 3))
    optimizer = ShardedASGD([("weight", param)], **RULE)
    if rank == 1:
        param.data = param.data.t()
    param.grad = torch.ones_like(param)
    optimizer.step()


def test_a_parameter_with_other_strides_is_named() -> None:
    """Its address is the same."""
    assert all("weight" in error.message and "rank 1" in error.message for error in run_errors("gloo", 2, rebind))


def unfreeze(_rank: int, _world_size: int) -> tuple[float, float]:
    """Job: a parameter frozen at construction is unfrozen, and accumulates over a collective call."""
    a, b = scalar(), scalar().requires_grad_(False)
    optimizer = ShardedASGD([a, b], stage=2, **RULE)
    b.requires_grad_(True)
    (a + b).sum().backward()
    optimizer.consolidated_state_dict()
    (a + b).sum().backward()
    optimizer.step()
    return a.item(), b.item()


def test_a_parameter_unfrozen_later_accumulates() -> None:
    """Reduced when ranks settle, as it has no hook."""
    assert run("gloo", 2, unfreeze) == [(-2.0, -2.0)] * 2


def reload_unstepped(_rank: int, _world_size: int) -> tuple[float, float]:
    """Job: state with step 0 and an eta of its own survives a round trip through this rank's shard."""
    param = scalar()
    optimizer = ShardedASGD([param], **RULE)
    state = {"step": torch.tensor(0.0), "eta": torch.tensor(0.25), "mu": torch.tensor(1.0), "ax": torch.zeros(1)}
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    optimizer.load_state_dict({"state": {0: state}, "param_groups": [{**group, "params": [0]}]})
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    param.grad = torch.ones(1)
    optimizer.step()
    return param.item(), optimizer.state[param]["step"].item()


def test_loaded_eta_of_step_zero_survives_a_shard() -> None:
    """Only parameters that never had state follow the lr."""
    assert run("gloo", 2, reload_unstepped) == [(-0.25, 1.0)] * 2


def load_wide(_rank: int, _world_size: int, bucket_cap_mb: float) -> list[Any]:
    """Job: one of two averages is loaded in float64."""
    params = [torch.nn.Parameter(torch.ones(40)) for _ in range(2)]
    optimizer = ShardedASGD(params, t0=0, bucket_cap_mb=bucket_cap_mb, **RULE)
    plain = torch.optim.ASGD(params, t0=0, **RULE)
    for param in params:
        param.grad = torch.full_like(param, 0.1)
    plain.step()
    saved = plain.state_dict()
    saved["state"][0]["ax"] = saved["state"][0]["ax"].double()
    optimizer.load_state_dict(saved)
    for _ in range(3):
        optimizer.step()
    state: dict[int, dict[str, Tensor]] = optimizer.consolidated_state_dict(to=None)["state"]
    return [(state[i]["ax"].dtype, state[i]["ax"].tolist()) for i in range(2)]


def test_a_wider_average_does_not_make_bucket_size_matter() -> None:
    """It widens the averages of its group and dtype, whichever bucket they are in."""
    small, large = run("gloo", 2, load_wide, 1e-6), run("gloo", 2, load_wide, 25.0)
    assert small == large
    assert small[0][0][0] == torch.float64


def step_empty(_rank: int, _world_size: int) -> float:
    """Job: an optimizer without parameters, then with one."""
    optimizer = ShardedASGD([{"params": []}], stage=2, **RULE)
    optimizer.step()
    param = scalar()
    optimizer.add_param_group({"params": [param]})
    param.sum().backward()
    optimizer.step()
    return param.item()


def test_a_group_without_parameters_steps() -> None:
    """As in torch, it does nothing."""
    assert run("gloo", 2, step_empty) == [-1.0, -1.0]
