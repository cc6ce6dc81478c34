"""Loss scaling and clipping as factors of the update: the bits of torch, skips on all ranks, errors on all ranks."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_asgd import GradScaler, ShardedASGD
from tests.harness.bits import assert_same_bits, same_bits, same_tree
from tests.harness.cases import every_pair
from tests.harness.ranks import run, run_errors

F16, F32 = torch.float16, torch.float32
SHAPES = ((100, 33), (7,), (), (65,), (4099,))
OPTIONS: dict[str, Any] = {"lr": 0.1, "t0": 3, "weight_decay": 0.01}
STEPS = 8

forms = pytest.mark.parametrize("form", ["forloop", "foreach", "fused"])
stages = pytest.mark.parametrize("stage", [1, 2], ids=["stage1", "stage2"])
WORLDS = [("none", 1), ("threads", 2), ("gloo", 3), ("gloo", 4)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)


def make(dtype: torch.dtype = F32) -> list[torch.nn.Parameter]:
    """Parameters of awkward shapes."""
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradient(param: Tensor, step: int, index: int) -> Tensor:
    """Few bits, so that the mean of equal ones is exact on any number of ranks."""
    generator = torch.Generator().manual_seed(100 * step + index)
    return (torch.randint(-8, 9, param.shape, generator=generator) / 16).to(param.dtype)


def backward(params: list[torch.nn.Parameter], scaler: torch.amp.GradScaler, step: int, overflows: bool) -> None:
    """Scaled gradients on every parameter; infinity in one of them."""
    terms = [(p * gradient(p, step, i)).sum().float() for i, p in enumerate(params)]
    scaler.scale(torch.stack(terms).sum()).backward()
    if overflows:
        params[1].grad = torch.full_like(params[1], torch.inf)


def scaler_of(ours: bool) -> torch.amp.GradScaler:
    """One that grows and halves within the few steps of a test."""
    return (GradScaler if ours else torch.amp.GradScaler)("cpu", init_scale=2.0**10, growth_interval=2)


def train(
    params: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    rank: int,
    way: str,
) -> list[float]:
    """Some steps, two of which overflow (in stage 2 on the last rank to arrive only); the scales."""
    scales = []
    ours = isinstance(optimizer, ShardedASGD)
    by_shards = ours and optimizer.reduces_gradients
    for step in range(STEPS):
        optimizer.zero_grad()
        overflows = step in (2, 5) and (not by_shards or rank == 0)
        if by_shards and overflows:
            terms = [(p * gradient(p, step, i)).sum() for i, p in enumerate(params)]
            (scaler.scale(torch.stack(terms).sum()) + params[1].sum() * torch.inf).backward()
        else:
            backward(params, scaler, step, overflows)
        if way != "step":
            scaler.unscale_(optimizer)
        if way == "clip":
            stock = type(scaler) is torch.amp.GradScaler
            clip = lambda norm: torch.nn.utils.clip_grad_norm_(params, norm)  # noqa: E731
            (clip if stock else optimizer.clip_grad_norm_)(2.0**-3)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def scaled(rank: int, _world_size: int, stage: int, form: str, way: str, stock: bool) -> dict[str, Any]:
    """Job: train under a scaler."""
    params = make()
    optimizer = ShardedASGD(
        params, **OPTIONS, stage=stage, foreach=form == "foreach", fused=form == "fused", bucket_cap_mb=0.01
    )
    scales = train(params, optimizer, scaler_of(not stock), rank, way)
    state = optimizer.consolidated_state_dict(to=None)["state"]
    return {"params": [p.detach().clone() for p in params], "state": state, "scales": scales}


@every_pair(
    world=WORLDS,
    scaler=[(1, True), (1, False), (2, False), (2, True)],
    way=["step", "unscale", "clip"],
    form=["forloop", "foreach", "fused"],
)
def test_scaled_training_is_torch_to_the_bit(
    world: tuple[str, int], scaler: tuple[int, bool], way: str, form: str
) -> None:
    """Skipped steps included: neither parameters nor state nor step counts move, on any rank."""
    stage, stock = scaler
    theirs = make()
    oracle = torch.optim.ASGD(theirs, **OPTIONS, foreach=form == "foreach")
    scales = train(theirs, oracle, scaler_of(False), 0, way)
    expected = oracle.state_dict()["state"]
    assert expected[0]["step"].item() == STEPS - 2
    for found in run(*world, scaled, stage, form, way, stock):
        assert found["scales"] == scales
        for index, (p, q) in enumerate(zip(found["params"], theirs, strict=True)):
            if way == "clip" and stage == 2:
                # The norm is summed in double precision here, so the factor may differ in its last place.
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
            else:
                assert_same_bits(p, q, f"parameter {index}")
        if way != "clip" or stage == 1:
            assert same_tree(found["state"], expected)


def skips(_rank: int, _world_size: int, stage: int, dtype: torch.dtype, ours: bool = True) -> tuple[bool, int]:
    """Job: whether the optimizer says that it skips by itself, and how often ``step()`` was called in two steps."""
    params = make(dtype)
    optimizer = ShardedASGD(params, **OPTIONS, stage=stage)
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    scaler = scaler_of(ours)
    for step in range(2):
        optimizer.zero_grad()
        if stage == 2:
            scaler.scale(sum(p.sum() for p in params) * (torch.inf if step == 1 else 1.0)).backward()
        else:
            backward(params, scaler, step, overflows=step == 1)
        scaler.step(optimizer)
        scaler.update()
    assert all(state["step"] == 1 for state in optimizer.state.values())
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)), len(calls)


@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
def test_a_skipped_step_of_stage_1_is_no_call(backend: str, world_size: int) -> None:
    """As with torch.optim.ASGD: trainers and schedulers watch the calls. float16 is what torch's scaler refuses."""
    assert run(backend, world_size, skips, 1, F32) == [(False, 1)] * world_size
    assert run(backend, world_size, skips, 1, torch.bfloat16) == [(False, 1)] * world_size
    assert run(backend, world_size, skips, 1, F16) == [(True, 2)] * world_size


@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
def test_a_step_of_stage_2_that_torchs_scaler_skips_is_no_call(backend: str, world_size: int) -> None:
    """So trainers leave their schedulers where they are. The scaler of this package leaves it to ``step()``."""
    assert run(backend, world_size, skips, 2, F32, False) == [(False, 1)] * world_size
    assert run(backend, world_size, skips, 2, F32, True) == [(False, 2)] * world_size


def half_with_masters(_rank: int, _world_size: int, stage: int, form: str) -> list[Tensor]:
    """Job: float16 gradients that only the scale keeps from underflowing; the masters."""
    params = make(F16)
    forms_of = {"foreach": form == "foreach", "fused": form == "fused"}
    optimizer = ShardedASGD(params, lr=2.0**10, lambd=0.0, stage=stage, master_weights=True, **forms_of)
    start = [p.detach().float() for p in params]
    scaler = GradScaler("cpu", init_scale=2.0**16)
    for _ in range(2):
        optimizer.zero_grad()
        for p in params:
            # 2^-26 cannot be told from 0 in float16.
            p.grad = torch.full_like(p, 2.0**-10)
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
    state = optimizer.consolidated_state_dict(to=None)["state"]
    return [start[i] - state[i]["master"] for i in range(len(params))]


@forms
@stages
@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
def test_float16_gradients_are_unscaled_in_float32_beside_masters(
    backend: str, world_size: int, stage: int, form: str
) -> None:
    """Unscaled in 16 bits they would be zero."""
    for moved in run(backend, world_size, half_with_masters, stage, form):
        for difference in moved:
            torch.testing.assert_close(difference, torch.full_like(difference, 2.0**-15), rtol=0.1, atol=0.0)


def stock_without_backward(rank: int, _world_size: int) -> None:
    """Job: torch's scaler on a rank that has run no backward, where it finds no gradient to look at."""
    params = make()
    optimizer = ShardedASGD(params, stage=2)
    scaler = scaler_of(False)
    scaler.scale(torch.ones(()))
    if rank:
        backward(params, scaler, 0, False)
    scaler.step(optimizer)


@pytest.mark.parametrize(("backend", "world_size"), [("threads", 2), ("gloo", 3)])
def test_torchs_scaler_without_gradients_is_an_error_on_all_ranks(backend: str, world_size: int) -> None:
    """It looks at gradients rank by rank, and ranks may look at different ones."""
    for error in run_errors(backend, world_size, stock_without_backward):
        assert "GradScaler" in error.message or "an operator on p.grad" in error.message


def only_some_scale(rank: int, _world_size: int, stage: int) -> None:
    """Job: rank 0 steps without the scaler."""
    params = make()
    optimizer = ShardedASGD(params, stage=stage)
    scaler = scaler_of(True)
    backward(params, scaler, 0, False)
    if rank == 0:
        optimizer.step()
    else:
        scaler.step(optimizer)


@stages
def test_ranks_that_scale_and_ranks_that_do_not_all_raise(stage: int) -> None:
    """Instead of waiting for each other."""
    for error in run_errors("gloo", 2, only_some_scale, stage):
        # In stage 1 torch's scaler has unscaled the gradients of one rank before the step.
        named = ("GradScaler", "unscale()") if stage == 2 else ("differs between ranks",)
        assert any(name in error.message for name in named)


def test_unscale_of_plain_float16_gradients_is_refused() -> None:
    """As torch refuses it; step() unscales."""
    params = make(F16)
    optimizer = ShardedASGD(params, stage=2)
    scaler = scaler_of(True)
    backward(params, scaler, 0, False)
    with pytest.raises(ValueError, match="float16"):
        scaler.unscale_(optimizer)


def test_differentiable_optimizers_leave_scaling_to_torch() -> None:
    """Nothing is unscaled twice, or not at all."""
    leaves = make()
    theirs, ours = ([p.clone() for p in leaves] for _ in range(2))
    for params, optimizer in (
        (theirs, torch.optim.ASGD(theirs, **OPTIONS, differentiable=True)),
        (ours, ShardedASGD(ours, **OPTIONS, differentiable=True)),
    ):
        scaler = scaler_of(True)
        for step in range(3):
            scale = scaler.scale(torch.ones(()))
            for index, p in enumerate(params):
                p.grad = gradient(p, step, index) * scale
            if step == 1:
                params[1].grad = torch.full_like(params[1], torch.inf)
            scaler.step(optimizer)
            scaler.update()
    assert all(map(same_bits, ours, theirs))
    assert not same_bits(ours[0], leaves[0])


def clipped(_rank: int, _world_size: int, form: str, way: str) -> list[Tensor]:
    """Job: stage 2 and torch side by side; gradients are clipped once, twice, or before more are added."""
    ours = make()
    theirs = copy.deepcopy(ours)
    optimizer = ShardedASGD(ours, **OPTIONS, stage=2, foreach=form == "foreach", fused=form == "fused")
    oracle = torch.optim.ASGD(theirs, **OPTIONS, foreach=form == "foreach")
    for step in range(3):
        norms: list[list[float]] = []
        for params, opt in ((ours, optimizer), (theirs, oracle)):
            opt.zero_grad()
            norms.append([])

            def clip(norm: float, params: list[Any] = params, found: list[float] = norms[-1]) -> None:
                if params is ours:
                    found.append(optimizer.clip_grad_norm_(norm).item())
                else:
                    found.append(torch.nn.utils.clip_grad_norm_(params, norm).item())

            def add(part: int, params: list[Any] = params, step: int = step) -> None:
                terms = [(p * gradient(p, 10 * step + part, i)).sum() for i, p in enumerate(params)]
                torch.stack(terms).sum().backward()

            add(0)
            clip(1.5)
            if way == "twice":
                clip(0.25)
            elif way == "added":
                add(1)
            elif way == "zeroed":
                opt.zero_grad(set_to_none=False)
                add(1)
            opt.step()
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    return [p.detach().clone() for p in ours]


@forms
@pytest.mark.parametrize("way", ["once", "twice", "added", "zeroed"])
@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 3)])
def test_clipping_waits_for_the_update_without_being_lost(backend: str, world_size: int, way: str, form: str) -> None:
    """Or counted twice: a factor that waits is applied before gradients are added or measured again."""
    run(backend, world_size, clipped, form, way)


def test_clipping_writes_no_gradient() -> None:
    """One reading pass for the norm, and none besides."""
    params = make()
    optimizer = ShardedASGD(params, stage=2)
    torch.stack([p.sum() for p in params]).sum().backward()
    optimizer.clip_grad_norm_(1.0)
    shards = [bucket.gradient for bucket in optimizer.gradients.buckets]
    assert all(shard is None or shard.max() == 1 for shard in shards)
