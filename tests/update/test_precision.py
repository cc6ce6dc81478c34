"""Masters, stochastic rounding and ``reduce_dtype``: what they give, at any sharding, and where they are refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_asgd import ShardedASGD
from dist_asgd.update import rounding
from tests.harness.bits import assert_same_bits, same_bits, same_tree
from tests.harness.ranks import run, run_errors

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = ((1000, 33), (7,), (), (0,), (65,), (4099,))
WORLDS = [("none", 1), ("threads", 2), ("gloo", 3), ("gloo", 4)]
SEED = 2**63 + 5
OPTIONS: dict[str, Any] = {"lr": 0.1, "t0": 2, "weight_decay": 0.01, "lambd": 0.01}

stages = pytest.mark.parametrize("stage", [1, 2], ids=["stage1", "stage2"])
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)


def make(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Parameters of awkward shapes."""
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradient(param: Tensor, step: int, index: int) -> Tensor:
    """The mean gradient of one step; the second parameter sometimes has none of its own and is skipped."""
    generator = torch.Generator().manual_seed(100 * step + index)
    return torch.randn(param.shape, generator=generator).to(param.dtype)


def skipped(step: int, index: int) -> bool:
    """Parameter 1 does not take step 3, so that its scalars are its own from then on."""
    return (step, index) == (3, 1)


def forms_of(form: str) -> dict[str, bool]:
    """The constructor's arguments."""
    return {"foreach": form == "foreach", "fused": form == "fused"}


# --- stochastic rounding -----------------------------------------------------------------------------------------


def trained_stochastically(_rank: int, _world_size: int, stage: int, form: str, cap_mb: float) -> dict[str, Any]:
    """Job: six steps, reloaded in the middle; parameters and state."""
    params = make(BF16)

    def optimizer_of(params: list[torch.nn.Parameter]) -> ShardedASGD:
        return ShardedASGD(
            params, **OPTIONS, **forms_of(form), stage=stage, bucket_cap_mb=cap_mb, stochastic_rounding=SEED
        )

    optimizer = optimizer_of(params)
    for step in range(1, 7):
        for index, param in enumerate(params):
            param.grad = None if skipped(step, index) else gradient(param, step, index)
        optimizer.step()
        optimizer.zero_grad()
        if step == 4:
            saved = optimizer.consolidated_state_dict(to=None)
            params = [torch.nn.Parameter(p.detach().clone()) for p in params]
            optimizer = optimizer_of(params)
            optimizer.load_state_dict(saved)
    state = optimizer.consolidated_state_dict(to=None)["state"]
    return {"params": [p.detach().clone() for p in params], "state": state}


def stochastic_oracle() -> dict[str, Any]:
    """``torch.optim.ASGD`` on float32 copies that are made anew before every step, and rounded after it."""
    params = make(BF16)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    averages = [torch.zeros(p.shape) for p in params]
    optimizer = torch.optim.ASGD(wide, **OPTIONS, foreach=False)
    for step in range(1, 7):
        for index, (param, exact) in enumerate(zip(params, wide, strict=True)):
            exact.data.copy_(param.detach())
            exact.grad = None if skipped(step, index) else gradient(param, step, index).float()
        mus = [optimizer.state[p]["mu"].clone() if p in optimizer.state else torch.ones(()) for p in wide]
        optimizer.step()
        for index, (param, exact) in enumerate(zip(params, wide, strict=True)):
            if exact.grad is None:
                continue
            key = rounding.parameter_key(SEED, index)
            taken = int(optimizer.state[exact]["step"])
            random = rounding.random_16(key, taken, 0, param.numel(), param.device)
            rounded = torch.empty(param.numel(), dtype=BF16)
            rounding.round_stochastically(exact.detach().reshape(-1), rounded, random)
            param.data.copy_(rounded.view(param.shape))
            now = param.detach().float()
            averages[index] = now if mus[index] == 1 else averages[index] + (now - averages[index]) * mus[index]
    return {"params": [p.detach() for p in params], "averages": averages}


@pytest.mark.parametrize("form", ["forloop", "fused"])
@stages
@worlds
def test_stochastic_rounding_is_the_same_for_every_sharding(
    backend: str, world_size: int, stage: int, form: str
) -> None:
    """From the seed, the parameter, the step and the place: whatever the ranks, buckets and form, to the bit."""
    expected = stochastic_oracle()
    for cap_mb in (0.001, 25.0):
        for found in run(backend, world_size, trained_stochastically, stage, form, cap_mb):
            for index, (p, q) in enumerate(zip(found["params"], expected["params"], strict=True)):
                assert_same_bits(p, q, f"parameter {index}")
                assert_same_bits(found["state"][index]["ax"], expected["averages"][index], f"average {index}")


def test_stochastic_rounding_moves_where_rounding_to_nearest_stands_still() -> None:
    """An update below half a unit in the last place: lost 100 times to the nearest, kept on average at random."""
    nearest, random = (torch.nn.Parameter(torch.ones(10_000, dtype=BF16)) for _ in range(2))
    optimizers = ShardedASGD([nearest], lr=2**-12), ShardedASGD([random], lr=2**-12, stochastic_rounding=0)
    for _ in range(100):
        for param, optimizer in zip((nearest, random), optimizers, strict=True):
            param.grad = torch.ones_like(param)
            optimizer.step()
    assert nearest.eq(1).all()
    moved = 1 - random.detach().double().mean().item()
    assert moved == pytest.approx(100 * 2**-12, rel=0.02)
    seeds = [torch.nn.Parameter(torch.ones(1000, dtype=BF16)) for _ in range(2)]
    for seed, param in enumerate(seeds):
        optimizer = ShardedASGD([param], lr=2**-9, stochastic_rounding=seed)
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert not same_bits(*seeds)


# --- reduce_dtype ------------------------------------------------------------------------------------------------


def share(param: Tensor, step: int, index: int, rank: int, part: int, spread: int) -> Tensor:
    """What one rank contributes in one backward: ranks are ``spread`` binades apart, so that sums need more bits."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * index + rank + 5 * part)
    drawn = torch.randint(-128, 129, param.shape, generator=generator)
    return (drawn * 2.0 ** (-spread * rank)).to(param.dtype)


def reduced_in(
    rank: int, world_size: int, dtype: torch.dtype, reduce_dtype: torch.dtype, master: bool, form: str
) -> list[Tensor]:
    """Job: three steps of two backwards each in stage 2, beside torch on the exact mean."""
    params = make(dtype)
    wide = [torch.nn.Parameter(p.detach().to(F32 if master else dtype)) for p in params]
    average_dtype = None if master or dtype == F32 else dtype
    spread = 10 if reduce_dtype == torch.float64 else 4  # exact in float64 only, or in float32, but not in 16 bits
    optimizer = ShardedASGD(
        params,
        **OPTIONS,
        **forms_of(form),
        stage=2,
        reduce_dtype=reduce_dtype,
        master_weights=master,
        average_dtype=average_dtype,
    )
    oracle = torch.optim.ASGD(wide, **OPTIONS, foreach=form == "foreach")
    for step in range(3):
        optimizer.zero_grad()
        for part in range(2):
            terms = [(p * share(p, step, i, rank, part, spread)).sum().float() for i, p in enumerate(params)]
            torch.stack(terms).sum().backward()
        optimizer.step()
        for i, (p, q) in enumerate(zip(params, wide, strict=True)):
            sent = [
                sum(share(p, step, i, r, part, spread).to(reduce_dtype).double() for r in range(world_size))
                / world_size
                for part in range(2)
            ]
            mean = sent[0].float() + sent[1].float()
            q.grad = mean.to(q.dtype)
        oracle.step()
    state = optimizer.consolidated_state_dict(to=None)["state"]
    for i, (p, q) in enumerate(zip(params, wide, strict=True)):
        assert_same_bits(state[i]["master"] if master else p, q, f"parameter {i}")
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("form", ["forloop", "foreach", "fused"])
@pytest.mark.parametrize(
    ("dtype", "reduce_dtype", "master"),
    [(BF16, F32, True), (BF16, F32, False), (F16, F32, True), (F32, BF16, False), (F32, torch.float64, False)],
    ids=str,
)
@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2), ("gloo", 4)])
def test_gradients_are_sent_in_reduce_dtype(
    backend: str, world_size: int, dtype: torch.dtype, reduce_dtype: torch.dtype, master: bool, form: str
) -> None:
    """Each contribution rounded to it, the sum not rounded below float32; plain 16-bit updates round it once."""
    run(backend, world_size, reduced_in, dtype, reduce_dtype, master, form)


def traffic(_rank: int, _world_size: int, reduce_dtype: torch.dtype | None) -> int:
    """Job: bytes in flight of a stage 2 optimizer after a step."""
    param = torch.nn.Parameter(torch.ones(1 << 16))
    optimizer = ShardedASGD([param], stage=2, reduce_dtype=reduce_dtype, fused=True, shared_memory=False)
    param.square().sum().backward()
    optimizer.step()
    return optimizer.memory_report().in_flight_bytes


def test_a_narrower_reduce_dtype_needs_less_in_flight() -> None:
    """Send buffers are of it."""
    narrow, wide = (run("gloo", 3, traffic, dtype)[0] for dtype in (BF16, torch.float64))
    assert narrow < wide / 2


# --- masters -----------------------------------------------------------------------------------------------------


def test_small_updates_are_kept_by_masters() -> None:
    """And the average is theirs."""
    for dtype in (BF16, F16):
        param = torch.nn.Parameter(torch.ones(100, dtype=dtype))
        optimizer = ShardedASGD([param], lr=2**-14, lambd=0.0, t0=0, master_weights=True)
        for _ in range(256):
            param.grad = torch.ones_like(param)
            optimizer.step()
        entry = optimizer.consolidated_state_dict()["state"][0]
        assert entry["master"].eq(1 - 256 * 2**-14).all()
        assert param.detach().eq(1 - 2**-6).all()
        assert entry["ax"].sub(1 - (2 + 256) / 2 * 2**-14).abs().max() < 1e-6


def with_masters(_rank: int, _world_size: int, dtype: torch.dtype, stage: int) -> list[Tensor]:
    """Job: what is loaded where, and that parameters follow on all ranks."""
    params = make(dtype)
    optimizer = ShardedASGD(params, **OPTIONS, stage=stage, master_weights=True)
    for step in range(3):
        for index, param in enumerate(params):
            param.grad = gradient(param, step, index)
        optimizer.step()
        optimizer.zero_grad()
    with optimizer.averaged_parameters():
        pass
    saved = copy.deepcopy(optimizer.consolidated_state_dict(to=None))
    own = copy.deepcopy(optimizer.state_dict())
    for state in (saved, own):
        # Into parameters that hold something else: they are the masters' roundings on every rank afterwards.
        others = [torch.nn.Parameter(torch.full_like(p, 3)) for p in params]
        other = ShardedASGD(others, **OPTIONS, stage=stage, master_weights=True)
        other.load_state_dict(state)
        for index, (p, q) in enumerate(zip(others, params, strict=True)):
            assert_same_bits(p, q, f"parameter {index}")
        assert same_tree(other.consolidated_state_dict(to=None)["state"], saved["state"])
    # Without masters in the dict, the parameters are their own.
    for entry in saved["state"].values():
        del entry["master"]
    optimizer.load_state_dict(saved)
    for entry, param in zip(optimizer.consolidated_state_dict(to=None)["state"].values(), params, strict=True):
        assert_same_bits(entry["master"], param.detach().float(), "master")
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@stages
@worlds
def test_masters_are_saved_and_loaded(backend: str, world_size: int, stage: int, dtype: torch.dtype) -> None:
    """Exactly, in both layouts of state dicts."""
    results = run(backend, world_size, with_masters, dtype, stage)
    assert all(same_tree(found, results[0]) for found in results)


def loads_masters_into_none(_rank: int, _world_size: int) -> None:
    """Job: a dict with masters, an optimizer without."""
    params = make(BF16)
    optimizer = ShardedASGD(params, master_weights=True)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    saved = optimizer.consolidated_state_dict(to=None)
    ShardedASGD(make(BF16)).load_state_dict(saved)


@pytest.mark.parametrize(("backend", "world_size"), [("threads", 2), ("gloo", 2)])
def test_masters_are_not_dropped_silently(backend: str, world_size: int) -> None:
    """The error says how to drop them."""
    for error in run_errors(backend, world_size, loads_masters_into_none):
        assert "master_weights=True" in error.message
        assert "delete" in error.message


def test_parameters_that_are_set_between_steps_go_on_from_there() -> None:
    """float16 exactly; bfloat16 to within half a unit, as its remainder stays."""
    for dtype in (BF16, F16):
        param = torch.nn.Parameter(torch.linspace(-2, 2, 101).to(dtype))
        optimizer = ShardedASGD([param], lr=0.01, master_weights=True)
        param.grad = torch.ones_like(param)
        optimizer.step()
        with torch.no_grad():
            param.copy_(torch.full_like(param, 5))
        master = optimizer.consolidated_state_dict()["state"][0]["master"]
        assert master.sub(5).abs().max() <= (0 if dtype == F16 else 2**-6)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtypes", "options", "message"),
    [
        ((F32,), {"master_weights": True}, "no parameter is bfloat16 or float16"),
        ((BF16,), {"master_weights": 1}, "master_weights must be True or False"),
        ((BF16,), {"master_weights": True, "stochastic_rounding": 1}, "Pass one of them"),
        ((F32,), {"stochastic_rounding": 1}, "no parameter is bfloat16"),
        ((BF16, F16), {"stochastic_rounding": 1}, "is float16"),
        ((BF16,), {"stochastic_rounding": True}, "stochastic_rounding must be None or a seed"),
        ((BF16,), {"stochastic_rounding": -1}, "stochastic_rounding must be None or a seed"),
        ((BF16,), {"stochastic_rounding": 2**64}, "stochastic_rounding must be None or a seed"),
        ((F32,), {"reduce_dtype": BF16}, "Pass stage=2"),
        ((F32,), {"reduce_dtype": torch.int32, "stage": 2}, "reduce_dtype must be None"),
        ((F32,), {"reduce_dtype": torch.complex64, "stage": 2}, "reduce_dtype must be None"),
        ((BF16,), {"master_weights": True, "differentiable": True}, "master_weights with differentiable=True"),
        ((BF16,), {"stochastic_rounding": 0, "differentiable": True}, "stochastic_rounding with differentiable=True"),
    ],
)
def test_what_does_not_fit_is_refused_at_construction(
    dtypes: tuple[torch.dtype, ...], options: dict[str, Any], message: str
) -> None:
    """With what to do instead."""
    with pytest.raises(ValueError, match=message):
        ShardedASGD([torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes], **options)


def test_a_float16_group_cannot_join_stochastic_rounding() -> None:
    """And the optimizer is as before."""
    optimizer = ShardedASGD([torch.nn.Parameter(torch.ones(3, dtype=BF16))], stochastic_rounding=1)
    with pytest.raises(ValueError, match="is float16"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, dtype=F16))]})
    assert len(optimizer.param_groups) == 1


def differs(rank: int, _world_size: int, option: str, values: list[object]) -> None:
    """Job: every rank has a value of its own."""
    ShardedASGD([torch.nn.Parameter(torch.ones(3, dtype=BF16))], stage=2, **{option: values[rank]})


@pytest.mark.parametrize(
    ("option", "values"),
    [("master_weights", [True, False]), ("stochastic_rounding", [1, 2]), ("reduce_dtype", [None, F32])],
)
def test_ranks_that_differ_all_raise(option: str, values: list[object]) -> None:
    """Naming the option."""
    for error in run_errors("gloo", 2, differs, option, values):
        assert option in error.message
