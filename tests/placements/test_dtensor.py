"""DTensors of FSDP2 and tensor parallelism get the bits of torch.optim.ASGD on whole parameters."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel, parallelize_module

from dist_asgd import ShardedASGD
from dist_asgd.placements import dtensor
from tests.harness.bits import assert_same_bits
from tests.harness.cases import every_value
from tests.harness.meshes import (
    KINDS,
    Net,
    assert_same_params,
    assert_same_state,
    dtensors,
    gradient,
    placed,
    set_gradients,
    sharded,
    whole,
)
from tests.harness.ranks import run, run_errors

FORMS: dict[str, dict[str, Any]] = {
    "forloop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True, "fused": False},
    "fused": {"foreach": False, "fused": True},
}
OPTIONS: dict[str, Any] = {"lr": 0.1, "lambd": 0.01, "t0": 3, "weight_decay": 0.02}


def _lives_as_torch(_: int, world_size: int, kind: str, form: str) -> int:
    options = FORMS[form]
    model, plain = sharded(kind, world_size), Net()
    optimizer = ShardedASGD(model.named_parameters(), **OPTIONS, **options)
    oracle = torch.optim.ASGD(plain.parameters(), **OPTIONS, foreach=form == "foreach")
    for step in range(7):
        skipped = ("unused", "blocks.0.up.weight") if step % 3 == 1 else ("unused",)
        set_gradients(model, step, skipped)
        set_gradients(plain, step, skipped)
        if step == 4:
            optimizer.param_groups[0]["lr"] = oracle.param_groups[0]["lr"] = 0.03
        optimizer.step()
        oracle.step()
        if step == 5:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = ShardedASGD(model.named_parameters(), **{**OPTIONS, "lr": 7.0}, **options)
            optimizer.load_state_dict(saved)
        if step in (2, 6):
            assert_same_params(model, plain, f"after step {step} of {form}")
            assert_same_state(optimizer, oracle, model, plain, f"after step {step} of {form}")
    return sum(1 for _ in dtensors(model))


@every_value(kind=KINDS, world_size=(4, 2, 3, 4), form=FORMS)
def test_lives_as_torch_on_the_whole_model(kind: str, world_size: int, form: str) -> None:
    """Every implementation takes skipped gradients, a changed lr, averaging from the middle on, and a reload."""
    assert min(run("gloo", world_size, _lives_as_torch, kind, form)) >= 8


# --- dtypes and precision, on a list of parameters ------------------------------------------------------------

SHAPES = ((7, 5), (33,), (1,), (2, 3, 4), (0, 3), (64, 2))


def _values(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for shape in SHAPES]


def _list_of(
    world_size: int, dtype: torch.dtype, placements: tuple[Placement, ...] = (Shard(0),)
) -> list[nn.Parameter]:
    """Make parameters of odd shapes on a mesh of all ranks."""
    mesh = init_device_mesh("cpu", (world_size,))
    return [nn.Parameter(distribute_tensor(v, mesh, placements, src_data_rank=None)) for v in _values(dtype)]


def _run_both(params: list[Any], others: list[Any], optimizers: tuple[Any, Any], num_steps: int = 6) -> None:
    """Step both optimizers with the same gradients."""
    for step in range(num_steps):
        for index, (param, other) in enumerate(zip(params, others, strict=True)):
            full = gradient(f"p{index}", step, other)
            param.grad, other.grad = placed(full, param), full.to(other.dtype)
        for optimizer in optimizers:
            optimizer.step()


def _dtypes(_: int, world_size: int) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.complex64):
        for form, options in FORMS.items():
            params, plain = _list_of(world_size, dtype), [nn.Parameter(v) for v in _values(dtype)]
            average_dtype = dtype if dtype.itemsize == 2 else None
            optimizer = ShardedASGD(params, **OPTIONS, **options, average_dtype=average_dtype)
            # torch rounds 16-bit elements by their place in the tensor, so the oracle works on local tensors.
            locals_ = [nn.Parameter(p.to_local().detach().clone()) for p in params]
            local = dtype.itemsize == 2
            oracle = torch.optim.ASGD(locals_ if local else plain, **OPTIONS, foreach=form == "foreach")
            for step in range(6):
                for index, (param, local_param, other) in enumerate(zip(params, locals_, plain, strict=True)):
                    other.grad = gradient(f"p{index}", step, other)
                    param.grad = placed(other.grad, param)
                    local_param.grad = param.grad.to_local().clone()
                optimizer.step()
                oracle.step()
            for param, local_param, other in zip(params, locals_, plain, strict=True):
                what = f"{dtype} {form} {tuple(param.shape)}"
                average = optimizer.state[param]["ax"]
                if local:
                    assert_same_bits(param.to_local(), local_param, what)
                    assert_same_bits(average.to_local(), oracle.state[local_param]["ax"], f"ax of {what}")
                else:
                    assert_same_bits(whole(param), other, what)
                    assert_same_bits(whole(average), oracle.state[other]["ax"], f"ax of {what}")


def test_every_dtype_has_torchs_bits() -> None:
    """The dtypes are float64, 16-bit with averages of the same dtype, and complex; one shape has no elements."""
    run("gloo", 2, _dtypes)


PRECISIONS: list[dict[str, Any]] = [
    {"master_weights": True, "average_dtype": torch.float64},
    {"master_weights": True},
    {"stochastic_rounding": 11},
]


def _precision(_: int, world_size: int, options: dict[str, Any]) -> list[Tensor]:
    """Compare DTensors with the same parameters in buckets, bit by bit."""
    for form in ({"foreach": False, "fused": False}, {"foreach": False, "fused": True}):
        params, plain = _list_of(world_size, torch.bfloat16), [nn.Parameter(v) for v in _values(torch.bfloat16)]
        optimizer = ShardedASGD(params, **OPTIONS, **form, **options)
        flat = ShardedASGD(plain, **OPTIONS, **form, **options)
        _run_both(params, plain, (optimizer, flat))
        mine = optimizer.consolidated_state_dict(to=None)["state"]
        theirs = flat.consolidated_state_dict(to=None)["state"]
        for index, (param, other) in enumerate(zip(params, plain, strict=True)):
            assert_same_bits(whole(param), other, f"parameter {index}")
            assert mine[index].keys() == theirs[index].keys()
            for key, value in theirs[index].items():
                assert_same_bits(mine[index][key], value, f"{key} of {index}")
    return [whole(param) for param in params]


@pytest.mark.parametrize("options", PRECISIONS, ids=str)
@pytest.mark.parametrize("world_size", [2, 3])
def test_precision_options_give_the_bits_of_flat_shards(world_size: int, options: dict[str, Any]) -> None:
    """float32 averages, masters and random numbers do not depend on which rank holds an element."""
    ranks = run("gloo", world_size, _precision, options)
    for params in ranks[1:]:
        for mine, theirs in zip(ranks[0], params, strict=True):
            assert_same_bits(theirs, mine, "on another rank")


# --- gradients --------------------------------------------------------------------------------------------------


def _sequence_parallel(_: int, world_size: int, stage: int) -> list[bool]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    plain = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (world_size,))
    parallelize_module(model, mesh, {"0": SequenceParallel(), "1": ColwiseParallel(input_layouts=Shard(1))})
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1, foreach=False, stage=stage)
    oracle = torch.optim.ASGD(plain.parameters(), lr=0.1, foreach=False)
    inputs = torch.randn(2, 4 * world_size, 8, generator=torch.Generator().manual_seed(1))
    model(distribute_tensor(inputs, mesh, [Shard(1)], src_data_rank=None)).sum().backward()
    partial = [any(p.is_partial() for p in param.grad.placements) for param in model.parameters()]
    for param, other in zip(model.parameters(), plain.parameters(), strict=True):
        other.grad = whole(param.grad)
    optimizer.step()
    oracle.step()
    assert_same_params(model, plain, "after a step")
    return partial


@pytest.mark.parametrize("stage", [1, 2])
def test_partial_gradients_are_summed_as_torch_does(stage: int) -> None:
    """Sequence parallelism leaves partial sums as the gradients of replicated parameters."""
    assert run("gloo", 2, _sequence_parallel, stage) == [[True, True, False, False]] * 2


def _step_with(rank: int, world_size: int, what: str, stage: int) -> None:
    params = _list_of(world_size, torch.float32)
    optimizer = ShardedASGD(params, lr=0.1, stage=stage)
    for index, param in enumerate(params):
        param.grad = placed(gradient(f"p{index}", 0, param), param)
    if what == "missing" and rank == 1:
        params[1].grad = None
    if what == "otherwise" and rank == 1:
        params[1].grad = DTensor.from_local(torch.zeros(33), params[1].device_mesh, [Replicate()], run_check=False)
    if what == "plain":
        plain = nn.Parameter(torch.zeros(3))
        optimizer.add_param_group({"params": [plain]})
        plain.grad = distribute_tensor(torch.zeros(3), params[0].device_mesh, [Replicate()], src_data_rank=None)
    if what == "mesh":
        other = init_device_mesh("cpu", (world_size, 1))
        params[1].grad = distribute_tensor(torch.zeros(33), other, [Shard(0), Replicate()], src_data_rank=None)
    optimizer.step()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("missing", "has a gradient on rank 0 of 2 only. Gradients of DTensors arrive reduced"),
        ("otherwise", "is placed as the parameter is, but not on rank 1 of 2"),
        ("plain", "is a DTensor, the parameter is a plain tensor"),
        ("mesh", "lies on"),
    ],
)
@pytest.mark.parametrize("stage", [1, 2])
def test_wrong_gradients_raise_on_every_rank(stage: int, what: str, said: str) -> None:
    """The errors are about gradients that differ between ranks, and tensors that are no gradient of their parameter."""
    for error in run_errors("gloo", 2, _step_with, what, stage, within_s=20.0):
        assert said in error.message, error.message


# --- construction -----------------------------------------------------------------------------------------------


def _construct(rank: int, world_size: int, what: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    options: dict[str, Any] = {}
    dtype = torch.float32
    if what == "partial":
        params = [nn.Parameter(DTensor.from_local(torch.zeros(3), mesh, [Partial()], run_check=False))]
    elif what in ("placements", "rounding"):
        placements = [Shard(1)] if what == "rounding" or rank == 0 else [Shard(0)]
        dtype = torch.bfloat16 if what == "rounding" else dtype
        params = [nn.Parameter(distribute_tensor(torch.zeros(4, 4, dtype=dtype), mesh, placements, src_data_rank=None))]
        options = {"stochastic_rounding": 3} if what == "rounding" else {}
    elif what == "dense":
        params = [nn.Parameter(DTensor.from_local(torch.zeros(4, 6)[:, ::2], mesh, [Shard(0)], run_check=False))]
    else:
        groups = [dist.new_group([r]) for r in range(world_size)]
        options = {"process_group": groups[rank]}
        params = [nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)], src_data_rank=None))]
    ShardedASGD(params, **options)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("partial", "redistribute() it to Shard or Replicate"),
        ("placements", "Shard(dim=1)"),
        ("rounding", "is not one stretch of it. Pass master_weights=True"),
        ("dense", "not dense in memory"),
        ("group", "Pass a process_group with all ranks of its mesh"),
    ],
)
def test_what_cannot_be_updated_is_refused(what: str, said: str) -> None:
    """On every rank, with the remedy."""
    for error in run_errors("gloo", 2, _construct, what, within_s=20.0):
        assert said in error.message, error.message


def _moves(_: int, world_size: int) -> None:
    params, plain = _list_of(world_size, torch.float32), [nn.Parameter(v) for v in _values(torch.float32)]
    optimizer = ShardedASGD(params, **OPTIONS)
    oracle = torch.optim.ASGD(plain, **OPTIONS, foreach=False)
    _run_both(params, plain, (optimizer, oracle), 2)
    for param in params:
        param._local_tensor = param._local_tensor.clone()  # FSDP2 does so to pad and to pin
    _run_both(params, plain, (optimizer, oracle), 2)
    for param, other in zip(params, plain, strict=True):
        assert_same_bits(whole(param), other, "after moving")
    for form in FORMS.values():
        optimizer.param_groups[0].update(form)
        oracle.param_groups[0]["foreach"] = form["foreach"]
        _run_both(params, plain, (optimizer, oracle), 1)
        # No local tensor is followed while another one is refused, whichever comes first.
        for moved, cast in ((0, 1), (1, 0)):
            params[moved]._local_tensor = params[moved]._local_tensor.clone()
            held = params[cast]._local_tensor
            params[cast]._local_tensor = held.double()
            with pytest.raises(RuntimeError, match="was moved, re-cast or re-bound"):
                optimizer.step()
            params[cast]._local_tensor = held
            _run_both(params, plain, (optimizer, oracle), 1)
        for param, other in zip(params, plain, strict=True):
            assert_same_bits(whole(param), other, f"after an error, {form}")


def test_a_local_tensor_that_moves_is_followed() -> None:
    """A local tensor of another dtype is refused; once the old one is back, training goes on."""
    run("gloo", 2, _moves)


def _looks(_: int, world_size: int, stage: int) -> None:
    params = _list_of(world_size, torch.float32)
    optimizer = ShardedASGD(params, lr=0.1, stage=stage)
    for step in range(3):
        for param in params:
            # FSDP2 makes gradients with the spec of the parameter.
            param.grad = DTensor(torch.ones_like(param.to_local()), param._spec, requires_grad=False)
        kinds = mock.patch.object(dtensor, "is_dtensor", side_effect=dtensor.is_dtensor)
        locals_ = mock.patch.object(dtensor, "local_tensor", side_effect=dtensor.local_tensor)
        with kinds as asked, locals_ as read:
            optimizer.step()
        if step:
            assert asked.call_count == 0
            # One read is of the parameter; the check and the update read the gradient once each.
            assert read.call_count <= 3 * len(params)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_looks_at_each_dtensor_once(stage: int) -> None:
    """A step reads each local tensor and each gradient once, and never asks whether a tensor is a DTensor."""
    run("gloo", 2, _looks, stage)
