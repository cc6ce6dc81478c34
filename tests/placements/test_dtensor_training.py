"""FSDP2 and tensor parallelism train with real backwards: losses, clipping, averages, stage 2, state dicts."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_asgd import GradScaler, ShardedASGD, export_averaged
from tests.harness.bits import assert_same_bits, same_bits
from tests.harness.cases import every_pair, every_value
from tests.harness.meshes import (
    KINDS,
    Net,
    assert_same_params,
    batch,
    dtensors,
    gradient,
    local,
    placed,
    set_gradients,
    sharded,
    whole,
)
from tests.harness.ranks import run, run_errors

EXACT = [kind for kind in KINDS if kind != "fsdp2_mixed"]
OPTIONS: dict[str, Any] = {"lr": 0.1, "t0": 2, "foreach": False}


def _trains(rank: int, world_size: int, kind: str, stage: int) -> tuple[list[float], list[float]]:
    model, plain = sharded(kind, world_size), Net()
    params = list(model.parameters())
    optimizer = ShardedASGD(model.named_parameters(), **OPTIONS, stage=stage)
    oracle = torch.optim.ASGD(plain.parameters(), **OPTIONS)
    losses: tuple[list[float], list[float]] = ([], [])
    for step in range(5):
        # In stage 2 each rank that is a replica of the data has data of its own.
        ranks = range(world_size) if stage == 2 else [0]
        mine = batch(step, rank if stage == 2 else 0)
        model(mine).square().mean().backward()
        torch.stack([plain(batch(step, r)).square().mean() for r in ranks]).mean().backward()
        norms = optimizer.clip_grad_norm_(0.5), torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for found, norm in zip(losses, norms, strict=True):
            found.append(float(norm))
        optimizer.step()
        oracle.step()
        optimizer.zero_grad()
        oracle.zero_grad()
    for param, other in zip(params, plain.parameters(), strict=True):
        tolerance = 2e-3 if kind == "fsdp2_mixed" else 2e-6
        torch.testing.assert_close(whole(param), other.detach(), rtol=tolerance, atol=tolerance)
    report = optimizer.memory_report()
    assert report.parameter_bytes >= sum(local(p).nbytes for p in params)
    assert report.state_bytes < report.full_state_bytes
    return losses


@pytest.mark.parametrize(
    ("kind", "stage", "world_size"),
    [*((kind, 1, 4) for kind in KINDS), ("tp", 1, 3), ("hsdp", 1, 2), ("fsdp2", 2, 2), ("fsdp2", 2, 3), ("hsdp", 2, 4)],
)
def test_trains_as_torch_does(kind: str, stage: int, world_size: int) -> None:
    """Norms and parameters are torch's up to the rounding of sums. In stage 2 each rank has data of its own."""
    ranks = run("gloo", world_size, _trains, kind, stage)
    for found, expected in ranks:
        assert found == ranks[0][0]
        assert found == pytest.approx(expected, rel=2e-2 if kind == "fsdp2_mixed" else 2e-5)


def _unaveraged(rank: int, world_size: int) -> None:
    model = sharded("fsdp2", world_size)
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1)
    model(batch(0, rank)).square().mean().backward()
    optimizer.step()


def test_gradients_that_fsdp2_does_not_reduce_are_not_taken_for_reduced() -> None:
    """Stage 1 with ``ignored_params`` and different data on each rank is an error with the remedy."""
    for error in run_errors("gloo", 2, _unaveraged, within_s=20.0):
        assert "gradient of parameter extra differs between ranks" in error.message
        assert "stage=2" in error.message


# --- clipping ---------------------------------------------------------------------------------------------------


def _clips(_: int, world_size: int, kind: str, stage: int, norm_types: tuple[float, ...]) -> None:
    for norm_type in norm_types:
        model, plain = sharded(kind, world_size), Net()
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, foreach=False, stage=stage)
        set_gradients(model, 0, ("unused",))
        set_gradients(plain, 0, ("unused",))
        for max_norm in (3.0, 0.5):
            found = optimizer.clip_grad_norm_(max_norm, norm_type)
            expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm, norm_type)
            assert not isinstance(found, DTensor)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0, msg=f"{norm_type}: {found}, {expected}")
        for (name, param), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            if stage == 1 or isinstance(param, DTensor):
                assert (param.grad is None) == (other.grad is None)
                if other.grad is not None:
                    torch.testing.assert_close(whole(param.grad), other.grad, rtol=1e-5, atol=0, msg=name)
        optimizer.step()
        torch.optim.ASGD(plain.parameters(), lr=0.1, foreach=False).step()
        for (name, param), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(whole(param), other, rtol=1e-5, atol=1e-6, msg=name)


@every_value(
    place=[("fsdp2", 3), ("fsdp2", 2), ("tp", 3), ("tp", 2), ("hsdp", 2), ("hsdp", 4), ("fsdp2_tp", 4)],
    stage=(1, 2),
    norm_types=[(2.0, 0.0, math.inf), (2.0, 3.0, -1.0), (1.0, -math.inf, 2.0)],
)
def test_one_norm_over_plain_and_sharded_parameters(
    place: tuple[str, int], stage: int, norm_types: tuple[float, ...]
) -> None:
    """Each norm type that torch accepts is taken twice in a row; replicas count once."""
    kind, world_size = place
    run("gloo", world_size, _clips, kind, stage, norm_types)


def _clips_infinite(rank: int, world_size: int) -> None:
    model = sharded("fsdp2", world_size)
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1)
    set_gradients(model, 0)
    if rank == 1:
        model.first.weight.grad.to_local().fill_(math.inf)
    optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)


def test_a_norm_that_is_not_finite_raises_on_every_rank() -> None:
    """A rank raises even if its own fragments are finite."""
    for error in run_errors("gloo", 2, _clips_infinite, within_s=20.0):
        assert "total norm of order 2.0 of the gradients is inf" in error.message


def _scales(rank: int, world_size: int, stage: int, explicitly: bool, overflows: bool) -> float:
    model, plain = sharded("fsdp2", world_size), Net()
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1, foreach=False, stage=stage)
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    set_gradients(model, 0)
    set_gradients(plain, 0)
    for param in model.parameters():
        param.grad = param.grad * 8
    if overflows and rank == 1:
        model.first.weight.grad.to_local().fill_(math.inf)
    if explicitly:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    if not overflows:
        torch.optim.ASGD(plain.parameters(), lr=0.1, foreach=False).step()
    assert_same_params(model, plain, "after a scaled step")
    return scaler.get_scale()


@pytest.mark.parametrize("overflows", [False, True])
@pytest.mark.parametrize("explicitly", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_are_unscaled_wherever_they_stand(stage: int, explicitly: bool, overflows: bool) -> None:
    """Reduced shards are unscaled at the update, DTensors at once; all ranks skip if one rank overflows."""
    assert run("gloo", 2, _scales, stage, explicitly, overflows) == [4.0 if overflows else 8.0] * 2


# --- averages ---------------------------------------------------------------------------------------------------


class _Sent(TorchDispatchMode):
    """Adds up the bytes of the arguments of collectives."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            flat = torch.utils._pytree.tree_leaves((args, kwargs))
            self.nbytes += sum(value.nbytes for value in flat if isinstance(value, Tensor))
        return func(*args, **(kwargs or {}))


def _averages(_: int, world_size: int, kind: str, dtype: torch.dtype) -> int:
    model, plain = sharded(kind, world_size, dtype=dtype), Net().to(dtype)
    named = dict(dtensors(model))
    others = dict(plain.named_parameters())
    optimizer = ShardedASGD(named.items(), **OPTIONS, shard_replicated=False)
    oracle = torch.optim.ASGD([others[name] for name in named], **OPTIONS)
    for step in range(5):
        for name, param in named.items():
            others[name].grad = gradient(name, step, others[name])
            param.grad = placed(others[name].grad, param)
        optimizer.step()
        oracle.step()
    before = {name: local(p).detach().clone() for name, p in named.items()}
    pointers = [p._local_tensor.data_ptr() for p in named.values()]
    inputs = batch(0).to(dtype)
    with torch.no_grad():
        first = whole(model(inputs))
        with _Sent() as sent, optimizer.averaged_parameters():
            nbytes = sent.nbytes
            for name, param in named.items():
                if dtype == torch.float32:
                    assert_same_bits(whole(param), oracle.state[others[name]]["ax"], name)
            inside = whole(model(inputs))
        again = whole(model(inputs))
    with torch.no_grad():
        for name in named:
            others[name].copy_(oracle.state[others[name]]["ax"])
        tolerance = 0.1 if dtype == torch.bfloat16 or kind == "fsdp2_mixed" else 1e-5
        torch.testing.assert_close(inside, plain(inputs), rtol=tolerance, atol=tolerance)
    assert not same_bits(first, inside)
    assert_same_bits(again, first, "outputs after the averages")
    assert pointers == [p._local_tensor.data_ptr() for p in named.values()]
    for name, param in named.items():
        assert_same_bits(local(param).detach(), before[name], name)
    return nbytes


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float32) for kind in KINDS), ("fsdp2", torch.bfloat16)], ids=str
)
def test_averages_are_swapped_where_they_lie(kind: str, dtype: torch.dtype) -> None:
    """Nothing is sent if replicas share nothing. Modules that FSDP2 left gathered after a forward see both swaps."""
    # The ranks only agree on the call.
    assert max(run("gloo", 4, _averages, kind, dtype)) < 1024


# --- state dicts ------------------------------------------------------------------------------------------------


def _as_torch_helpers_do(rank: int, world_size: int, kind: str, full: bool, offload: bool, mixed: bool) -> None:
    options = StateDictOptions(full_state_dict=full, cpu_offload=offload)
    model, other = sharded(kind, world_size), sharded(kind, world_size, seed=5)
    named, named_other = (dict(m.named_parameters() if mixed else dtensors(m)) for m in (model, other))
    assert mixed == any(not isinstance(param, DTensor) for param in named.values())
    optimizer = ShardedASGD(named.items(), lr=0.1, t0=1)
    fresh = copy.deepcopy(optimizer.state_dict())
    get_state_dict(model, optimizer, options=options)
    for param in named.values():
        state = optimizer.state[param]
        assert (float(state["step"]), float(state["mu"])) == (0, 1)
        assert_same_bits(state["eta"], torch.tensor(0.1), "eta of a fresh optimizer")
    assert same_keys(fresh, optimizer.state_dict())
    for step in range(4):
        set_gradients(model, step)
        optimizer.step()
    saved = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    if full and (rank == 0 or not offload):
        for entry in saved[1]["state"].values():
            assert all(type(value) is Tensor for value in entry.values())
            assert entry["ax"].shape
    second = ShardedASGD(named_other.items(), lr=0.5, t0=7)
    load = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True) if full and offload else options
    set_model_state_dict(other, saved[0], options=load)
    set_optimizer_state_dict(other, second, saved[1], options=load)
    for trained, its in ((model, optimizer), (other, second)):
        set_gradients(trained, 9)
        its.step()
    states = [its.consolidated_state_dict(to=None)["state"] for its in (optimizer, second)]
    for index, (name, param) in enumerate(named.items()):
        assert_same_bits(whole(named_other[name]), whole(param), name)
        for key, value in states[0][index].items():
            assert_same_bits(states[1][index][key], value, f"{key} of {name}")


def same_keys(a: Any, b: Any) -> bool:
    """Whether two state dicts have the same structure."""
    return {k: set(v) for k, v in a["state"].items()} == {k: set(v) for k, v in b["state"].items()}


# full_state_dict, cpu_offload
HELPER_FORMS = [(False, False), (True, False), (True, True)]


@every_value(place=[*((kind, 2) for kind in EXACT), ("fsdp2_tp", 4), ("fsdp2", 3)], form=HELPER_FORMS)
def test_torchs_state_dict_helpers(place: tuple[str, int], form: tuple[bool, bool]) -> None:
    """The helpers make sharded and full state dicts, of a fresh optimizer without changing it, and of a used one."""
    kind, world_size = place
    run("gloo", world_size, _as_torch_helpers_do, kind, *form, False)


@every_pair(place=[("tp", 2), ("fsdp2", 3)], form=HELPER_FORMS)
def test_torchs_state_dict_helpers_with_plain_parameters(place: tuple[str, int], form: tuple[bool, bool]) -> None:
    """The helpers also serve a model that has DTensors and plain parameters."""
    kind, world_size = place
    run("gloo", world_size, _as_torch_helpers_do, kind, *form, True)


def _loads(rank: int, world_size: int, kind: str) -> None:
    model, plain = sharded(kind, world_size), Net()
    optimizer = ShardedASGD(model.named_parameters(), **OPTIONS)
    oracle = torch.optim.ASGD(plain.parameters(), **OPTIONS)
    for step in range(4):
        for trained, its in ((model, optimizer), (plain, oracle)):
            set_gradients(trained, step, ("unused",))
            its.step()
    consolidated = optimizer.consolidated_state_dict(to=None)
    expected = oracle.state_dict()
    assert consolidated["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        for key, value in state.items():
            assert_same_bits(consolidated["state"][index][key], value, f"{key} of {index}")
    assert (optimizer.consolidated_state_dict(to=1) == {}) == (rank != 1)
    for saved in (consolidated, expected, copy.deepcopy(optimizer.state_dict())):
        again = ShardedASGD(model.named_parameters(), lr=3.0)
        again.load_state_dict(copy.deepcopy(saved))
        for param in model.parameters():
            assert_same_bits(local(again.state[param]["ax"]), local(optimizer.state[param]["ax"]), "ax")
            assert_same_bits(again.state[param]["eta"], optimizer.state[param]["eta"], "eta")
    set_gradients(model, 9)
    set_gradients(plain, 9)
    again.step()
    oracle.step()
    assert_same_params(model, plain, "after a load")


@pytest.mark.parametrize("kind", EXACT)
def test_loads_whole_and_sharded(kind: str) -> None:
    """The optimizer loads consolidated_state_dict(), torch.optim.ASGD's own state dict, and state_dict()."""
    run("gloo", 4, _loads, kind)


def _loads_misfits(_: int, world_size: int, what: str) -> None:
    model, plain = sharded("fsdp2", world_size), Net()
    named = dict(dtensors(model))
    optimizer = ShardedASGD(named.items(), **OPTIONS)
    other = ShardedASGD([entry for entry in plain.named_parameters() if entry[0] in named], **OPTIONS)
    set_gradients(model, 0)
    set_gradients(plain, 0)
    optimizer.step()
    other.step()
    if what == "dtensor":
        other.load_state_dict(optimizer.state_dict())
    elif what == "part":
        optimizer.load_state_dict(other.state_dict())
    else:
        mixed = sharded("fsdp2_tp", world_size)
        ShardedASGD(dict(dtensors(mixed)).items(), **OPTIONS).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("dtensor", "for a plain parameter of the optimizer. Load whole tensors"),
        ("part", "is one rank's part of a flat bucket, and the parameter is a DTensor"),
        ("mesh", "is a DTensor placed as"),
    ],
)
def test_fragments_that_do_not_fit_are_refused(what: str, said: str) -> None:
    """On every rank, with the remedy."""
    for error in run_errors("gloo", 2, _loads_misfits, what, within_s=20.0):
        assert said in error.message, error.message


def _exports(_: int, world_size: int, kind: str, path: str) -> None:
    model = sharded(kind, world_size)
    optimizer = ShardedASGD(model.named_parameters(), **OPTIONS)
    for step in range(5):
        set_gradients(model, step, ("unused",))
        optimizer.step()
    export_averaged(path, model, optimizer)
    weights = load_file(path)
    with optimizer.averaged_parameters():
        expected = {name: whole(param).clone() for name, param in model.named_parameters()}
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_bits(weights[name], value, name)


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2_tp", "hsdp"])
def test_averages_are_exported(kind: str, tmp_path: Path) -> None:
    """Averages are exported whole; parameters whose averaging has not begun are exported as they are."""
    run("gloo", 4, _exports, kind, str(tmp_path / "averaged.safetensors"))


def _starts_averaging(_: int, world_size: int) -> None:
    model, plain = sharded("fsdp2", world_size), Net()
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1, foreach=False)
    oracle = torch.optim.ASGD(plain.parameters(), lr=0.1, foreach=False)
    steps = []
    optimizer.register_step_post_hook(lambda *args: steps.append(args[0]))
    for step in range(6):
        if step == 3:
            optimizer.start_averaging()
            oracle.param_groups[0]["t0"] = 3.0
        set_gradients(model, step)
        set_gradients(plain, step)
        optimizer.step()
        oracle.step()
        optimizer.zero_grad()
    assert len(steps) == 6
    assert all(param.grad is None for param in model.parameters())
    for (name, param), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if isinstance(param, DTensor):
            assert_same_bits(whole(optimizer.state[param]["ax"]), oracle.state[other]["ax"], name)


def test_averaging_starts_on_request_and_hooks_run() -> None:
    """start_averaging() and hooks work as with plain parameters."""
    run("gloo", 2, _starts_averaging)
