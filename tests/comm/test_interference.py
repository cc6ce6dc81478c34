"""Events beside an optimizer: other optimizers, the user's own messages, skipped steps, changed parameters."""

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from dist_asgd import ShardedASGD, async_save_checkpoint, export_averaged, load_checkpoint, save_checkpoint
from tests.harness.bits import assert_same_bits
from tests.harness.meshes import Net
from tests.harness.ranks import run, run_errors

RULE = {"lr": 1.0, "lambd": 0.0}


def scalar() -> torch.nn.Parameter:
    """Return a parameter; its gradient is the factor that it is multiplied by."""
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
    """The hooks of a dropped optimizer are removed."""
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
    """Each optimizer's messages have their own tags."""
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
    """The user's collective may run on the group that the optimizer uses."""
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
    """zero_grad() finishes a round that only one rank has opened."""
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
    """Both ranks raise, and go on after zero_grad()."""
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
    """The unused parameter is the one registered last, whose bucket is launched first."""
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
    """The other ranks raise too, and the error says why."""
    for back, said in run("gloo", 2, fail_inside_average):
        assert back
        assert "zero_grad" in said


def rebind(rank: int, _world_size: int) -> None:
    """Job: a parameter transposed in its own memory, on one rank."""
    param = torch.nn.Parameter(torch.arange(9.0).view(3, 3))
    optimizer = ShardedASGD([("weight", param)], **RULE)
    if rank == 1:
        param.data = param.data.t()
    param.grad = torch.ones_like(param)
    optimizer.step()


def test_a_parameter_with_other_strides_is_named() -> None:
    """The change is found although the address stays the same."""
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
    """Its gradient is reduced in the next collective call, because the parameter has no hook."""
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
    """Only parameters that never stepped, and whose state was not loaded, follow the lr."""
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
    """A wider average widens all averages of its group and dtype, in every bucket."""
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
    """As in torch, a step without parameters does nothing."""
    assert run("gloo", 2, step_empty) == [-1.0, -1.0]


# --- torch's defaults -------------------------------------------------------------------------------------------


def lives_under(_rank: int, world_size: int, options: dict[str, Any], device: str, folder: str) -> list[Tensor]:
    """Job: all that an optimizer does, with this default device; parameters, and averages that were loaded again."""
    folder = f"{folder}/{device}"
    model = Net().to(torch.bfloat16 if options.get("master_weights") else torch.float32)
    if options.get("mesh"):
        options = {**options, "mesh": init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("replicate", "shard"))}
    x = torch.ones(4, 5, dtype=next(model.parameters()).dtype)
    first, second = list(model.parameters())[:-1], list(model.parameters())[-1:]
    torch.set_default_device(device)
    try:
        optimizer = ShardedASGD(first, lr=0.1, t0=1, **options)
        optimizer.add_param_group({"params": second, "lr": 0.2})
        pending = None
        for step in range(4):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            if step == 1:
                optimizer.load_state_dict(optimizer.state_dict())
                optimizer.load_state_dict(optimizer.consolidated_state_dict(to=None))
            elif step == 2:
                pending = async_save_checkpoint(f"{folder}-2", model, optimizer, step=2, extra={"seen": [1, "a"]})
                save_checkpoint(f"{folder}-3", model, optimizer, step=3)
        assert pending is not None
        with optimizer.averaged_parameters():
            found = [param.detach().clone() for param in model.parameters()]
        export_averaged(f"{folder}.safetensors", model, optimizer)
        found += [param.detach().clone() for param in model.parameters()]
        assert load_checkpoint(f"{folder}-2", model, optimizer) == {"seen": [1, "a"]}
        state = optimizer.consolidated_state_dict(to=None)["state"]
        return found + [value for entry in state.values() for value in entry.values()]
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    "options",
    [
        {"stage": 1},
        {"stage": 2, "foreach": True},
        {"stage": 2, "master_weights": True},
        {"stage": 2, "mesh": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_tensors_of_its_own_are_where_they_belong(tmp_path: Path, options: dict[str, Any], world_size: int) -> None:
    """The results do not depend on torch's default device; the one here has no memory to compute in."""
    backend = "gloo" if world_size > 1 or "mesh" in options else "none"
    wanted, found = (run(backend, world_size, lives_under, options, d, str(tmp_path)) for d in ("cpu", "meta"))
    for ours, theirs in zip(found, wanted, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert_same_bits(one, other, "parameter or state")


def reduces_under(rank: int, _world_size: int, dtype: torch.dtype) -> Tensor:
    """Job: 16-bit gradients of three ranks, with this default dtype."""
    param = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    values = torch.randn(1000, generator=torch.Generator().manual_seed(rank)).bfloat16()
    torch.set_default_dtype(dtype)
    try:
        optimizer = ShardedASGD([param], stage=2, master_weights=True, lambd=0.0, lr=0.3)
        assert optimizer.state_dict()["state"][0]["eta"] == torch.tensor(0.3, dtype=torch.float32)
        # Later ones torch rounds to the default dtype.
        optimizer.param_groups[0]["lr"] = 1.0
        for _ in range(2):
            (param * values).sum().backward()
            optimizer.step()
        return optimizer.consolidated_state_dict(to=None)["state"][0]["master"]
    finally:
        torch.set_default_dtype(torch.float32)


def test_sums_of_gradients_are_float32_whatever_the_default() -> None:
    """The mean is rounded to 16 bits once, whatever the default dtype."""
    wanted, found = (run("gloo", 3, reduces_under, dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    assert_same_bits(found, wanted, "masters")
