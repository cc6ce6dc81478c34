"""``p.grad`` in stage 2: what trainers and torch do with it is right for the mean gradient, or an error."""

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_asgd import ShardedASGD
from dist_asgd.gradients.gradient_tensor import GradientTensor
from tests.gradients.test_stage2 import OPTIONS, SMALL_MB, assert_same_models, integer_backward, twins
from tests.harness.bits import assert_same_bits
from tests.harness.models import mlp, mlp_loss, odd_loss, odd_net
from tests.harness.ranks import run, run_errors

WORLDS = [("none", 1), ("threads", 2), ("gloo", 3)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)
Change = Callable[[list[nn.Parameter]], Any]


def clips(_rank: int, _world_size: int, norm_type: float, foreach: bool | None, form: str, odd: bool) -> None:
    """Job: torch's own clipping of all parameters or of some, after one or two backwards, beside torch's optimizer."""
    ours, loss = (odd_net(), odd_loss) if odd else (mlp(), mlp_loss)
    theirs = copy.deepcopy(ours)
    options = {**OPTIONS, "foreach": form == "foreach"}
    fused = form == "fused"
    subject = ShardedASGD(ours.parameters(), stage=2, bucket_cap_mb=SMALL_MB, **options, fused=fused)
    oracle = torch.optim.ASGD(theirs.parameters(), **options)
    for step in range(4):
        norms = []
        for model, optimizer in ((ours, subject), (theirs, oracle)):
            optimizer.zero_grad()
            for number in range(1 + step % 2):
                loss(model, 2 * step + number).backward()
            params = list(model.parameters())[step % 3 :]
            norms.append(torch.nn.utils.clip_grad_norm_(params, 0.05, norm_type, foreach=foreach))
            optimizer.step()
        torch.testing.assert_close(*norms, rtol=2e-6, atol=0)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@worlds
@pytest.mark.parametrize(
    ("norm_type", "foreach", "form", "odd"),
    [
        (2.0, None, "fused", False),
        (2.0, True, "foreach", True),
        (1.0, False, "forloop", True),
        (torch.inf, None, "fused", False),
        (0.5, None, "fused", False),
    ],
)
def test_torchs_own_clipping(
    backend: str, world_size: int, norm_type: float, foreach: bool | None, form: str, odd: bool
) -> None:
    """The norm is that of the mean gradient, and every rank's fragments are scaled by the same factor."""
    run(backend, world_size, clips, norm_type, foreach, form, odd)


def masks(params: list[nn.Parameter]) -> None:
    """Zeros in some places, by a tensor of the whole shape, one that is expanded, and a number."""
    for number, param in enumerate(params):
        assert param.grad is not None
        mask = torch.arange(param.numel()).reshape(param.shape) % 3 != 0
        param.grad.mul_(mask if number % 2 else mask[..., :1] if param.dim() else mask)
        param.grad *= 2
        param.grad.data.add_(param.detach(), alpha=0.5)


def zeroes_some(params: list[nn.Parameter]) -> None:
    """Some gradients are taken away, others set to zero, as for layers that are frozen for a while."""
    for number, param in enumerate(params):
        if number % 3 == 0:
            param.grad = None
        elif number % 3 == 1:
            assert param.grad is not None
            param.grad.zero_()


CHANGES: dict[str, Change] = {
    "values": lambda params: torch.nn.utils.clip_grad_value_(params, 0.5),
    "values, foreach": lambda params: torch.nn.utils.clip_grad_value_(params, 0.5, foreach=True),
    "masks": masks,
    "some": zeroes_some,
    "foreach": lambda params: torch._foreach_div_([p.grad for p in params], [float(2 + i) for i in range(len(params))]),
    "drop": lambda params: [setattr(p, "grad", None) for p in params],
}


def changes(_rank: int, _world_size: int, how: str, again: bool) -> None:
    """Job: gradients are changed between backward and step, or between two backwards; integers keep means exact."""
    ours, subject, theirs, oracle = twins()
    for step in range(4):
        for model, optimizer in ((ours, subject), (theirs, oracle)):
            optimizer.zero_grad()
            integer_backward(model, step)
            if step != 2:
                CHANGES[how](list(model.parameters()))
            if again:
                integer_backward(model, 10 + step)
            optimizer.step()
        assert_same_models(ours, theirs, f"after step {step}")
        assert [p.grad is None for p in ours.parameters()] == [p.grad is None for p in theirs.parameters()]


@worlds
@pytest.mark.parametrize("again", [False, True], ids=["step", "backward"])
@pytest.mark.parametrize("how", CHANGES)
def test_changes_of_gradients(backend: str, world_size: int, how: str, again: bool) -> None:
    """They act on the mean, as on what DDP leaves in p.grad, to the bit."""
    run(backend, world_size, changes, how, again)


def zeroes_model(_rank: int, _world_size: int, to_none: bool) -> None:
    """Job: a batch is skipped with ``model.zero_grad()``, before a step or before another backward."""
    ours, subject, theirs, oracle = twins()
    for step in range(4):
        for model, optimizer in ((ours, subject), (theirs, oracle)):
            integer_backward(model, step)
            model.zero_grad(set_to_none=to_none)
            if step % 2:
                integer_backward(model, 10 + step)
            optimizer.step()
            model.zero_grad(set_to_none=to_none)
        assert_same_models(ours, theirs, f"after step {step}")


@worlds
@pytest.mark.parametrize("to_none", [True, False])
def test_model_zero_grad_skips_a_batch(backend: str, world_size: int, to_none: bool) -> None:
    """The reduced gradients are forgotten, as the user has said."""
    run(backend, world_size, zeroes_model, to_none)


def clears_on_one_rank(rank: int, _world_size: int) -> None:
    """Job: the last rank takes a gradient away."""
    model = mlp()
    optimizer = ShardedASGD(model.named_parameters(), stage=2, bucket_cap_mb=SMALL_MB, **OPTIONS)
    mlp_loss(model, 0).backward()
    if rank == 1:
        next(model.parameters()).grad = None
    optimizer.step()


def test_clearing_on_one_rank_is_an_error_on_all() -> None:
    """Elements would be updated with different gradients."""
    for error in run_errors("gloo", 2, clears_on_one_rank):
        assert "taken away after its backward on rank 1 of 2 only" in error.message
        assert "0.weight" in error.message


def reads_on_one_rank(rank: int, _world_size: int) -> None:
    """Job: rank 0 logs a norm."""
    model = mlp()
    optimizer = ShardedASGD(model.parameters(), stage=2, **OPTIONS)
    mlp_loss(model, 0).backward()
    if rank == 0:
        next(p.grad for p in model.parameters() if p.grad is not None).norm()
    optimizer.step()


def test_a_norm_on_one_rank_is_an_error_on_all() -> None:
    """It is collective."""
    for error in run_errors("gloo", 2, reads_on_one_rank):
        assert "an operator on p.grad" in error.message
        assert "step()" in error.message


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda g: g.sum(),
    "isnan": lambda g: g.isnan().any(),
    "clone": lambda g: g.clone(),
    "add": lambda g: g + 1,
    "view": lambda g: g.view(-1),
    "of a norm along a dimension": lambda g: torch.linalg.vector_norm(g, dim=0),
    "copy_": lambda g: g.copy_(torch.zeros(g.shape)),
    "into": lambda g: torch.zeros(g.shape).add_(g),
    "two": lambda g: g.add_(g),
    "numpy": lambda g: g.numpy(),
    "data_ptr": lambda g: g.data_ptr(),
    "pickle": lambda g: pickle.dumps(g),
    "deepcopy": lambda g: copy.deepcopy(g),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_fragments_cannot_give_is_an_error(how: str) -> None:
    """It names what works; the step that follows is not disturbed."""
    ours, subject, theirs, oracle = twins()
    for model in (ours, theirs):
        integer_backward(model, 1)
    gradient = next(ours.parameters()).grad
    assert isinstance(gradient, GradientTensor)
    assert "GradientTensor" in repr(gradient)
    with pytest.raises((RuntimeError, TypeError), match=r"stage 2|subclass"):
        REFUSED[how](gradient)
    subject.step()
    oracle.step()
    assert_same_models(ours, theirs, "after the step")


def is_quiet(_rank: int, _world_size: int) -> None:
    """Job: what other code does with parameters and their gradients in passing leaves the step as it is."""
    ours, subject, theirs, oracle = twins()
    for step in range(3):
        for model, optimizer in ((ours, subject), (theirs, oracle)):
            model.zero_grad()
            integer_backward(model, step)
            torch.autograd.grad(mlp_loss(model, step), list(model.parameters()))
            model.to("cpu").float().eval().train()
            copy.deepcopy(model)
            for p in model.parameters():
                assert p.grad is not None
                assert (p.grad.shape, p.grad.dtype, p.grad.device, p.grad.is_sparse) == (
                    p.shape,
                    p.dtype,
                    p.device,
                    False,
                )
                assert not p.grad.requires_grad
            optimizer.step()
            if step == 1:
                # Gradients that a step has used are there to be used again.
                torch.nn.utils.clip_grad_value_(list(model.parameters()), 0.25)
                optimizer.step()
        assert_same_models(ours, theirs, f"after step {step}")


@worlds
def test_what_is_done_in_passing(backend: str, world_size: int) -> None:
    """autograd.grad(), module.to() of where it is, deepcopy(), and the properties of gradients."""
    run(backend, world_size, is_quiet)


def norm_of_all(rank: int, world_size: int, dtype: torch.dtype) -> None:
    """Job: every rank has gradients of its own, one parameter on some ranks only; the mean's norm, twice."""
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((5, 3), (7,), (), (2, 0))]
    ShardedASGD(params, stage=2, bucket_cap_mb=SMALL_MB)
    kept = ShardedASGD(params, stage=2, bucket_cap_mb=SMALL_MB)
    used = params if rank == 0 else [params[0], params[2], params[3]]
    torch.stack([(p * (1 + rank + i)).sum().abs() for i, p in enumerate(used)]).sum().backward()
    norms = [p.grad.norm() for p in params if p.grad is not None]
    assert len(norms) == 4
    fragments = [p.grad.to_local() for p in params if isinstance(p.grad, GradientTensor)]
    assert sum(f.numel() for f in fragments) <= sum(p.numel() for p in params)
    total = torch.stack(norms).norm()
    assert torch.equal(total, torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm())
    mean = sum(1 + r for r in range(world_size)) / world_size
    assert torch.isclose(norms[0].double(), torch.tensor(mean * 15**0.5, dtype=torch.float64), rtol=1e-2)
    assert torch.isclose(norms[1].double(), torch.tensor(2 / world_size * 7**0.5, dtype=torch.float64), rtol=1e-2)
    del kept


@worlds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_are_those_of_the_mean(backend: str, world_size: int, dtype: torch.dtype) -> None:
    """All ranks have the same list of gradients, also of parameters that some ranks have not used."""
    run(backend, world_size, norm_of_all, dtype)


def test_a_deleted_optimizer_leaves_no_gradient_of_its_own() -> None:
    """Parameters can be trained by another one."""
    ours, subject, theirs, oracle = twins()
    integer_backward(ours, 0)
    kept = next(ours.parameters()).grad
    assert isinstance(kept, GradientTensor)
    del subject, oracle
    gc.collect()
    assert all(not isinstance(p.grad, GradientTensor) for p in ours.parameters())
    with pytest.raises(RuntimeError, match="deleted"):
        kept.mul_(2)
    for model in (ours, theirs):
        model.zero_grad()
        integer_backward(model, 1)
        torch.optim.ASGD(model.parameters(), **OPTIONS).step()
    assert_same_models(ours, theirs, "after a step of torch's")


def test_two_optimizers_are_clipped_together() -> None:
    """Each changes its own fragments; ordinary gradients beside them, too."""
    models = [nn.Sequential(mlp(), mlp(), nn.Linear(3, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    kept = [ShardedASGD(models[0][i].parameters(), stage=2, bucket_cap_mb=SMALL_MB, **OPTIONS) for i in range(2)]
    for model in models:
        torch.stack([(p * 3).sum() for p in model.parameters()]).sum().backward()
    params = [list(model.parameters()) for model in models]
    norms = [torch.nn.utils.clip_grad_norm_(p, 0.5) for p in params]
    torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
    torch._foreach_mul_([p.grad for p in params[0]], 2.0)
    for p, q in zip(*params, strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(p.grad.norm(), 2 * q.grad.norm(), rtol=1e-6, atol=0)
    assert_same_bits(kept[0].clip_grad_norm_(1e9), kept[0].clip_grad_norm_(1e9), "a norm")


def test_a_norm_follows_what_is_written_to_a_fragment() -> None:
    """It is computed anew, and not remembered."""
    param = nn.Parameter(torch.ones(4))
    kept = ShardedASGD([param], stage=2)
    param.sum().backward()
    assert isinstance(param.grad, GradientTensor)
    fragment = param.grad.to_local()
    assert param.grad.norm() == 2
    fragment.mul_(3)
    assert param.grad.norm() == 6
    kept.clip_grad_norm_(3.0)
    torch.testing.assert_close(param.grad.norm(), torch.tensor(3.0))


def unfreezes_late(_rank: int, _world_size: int) -> None:
    """Job: a parameter is frozen after it has stepped, shards are built anew, and it is unfrozen; nothing is zeroed."""
    weights = [nn.Parameter(torch.full((3,), 1.0 + i)) for i in range(3)]
    copies = [nn.Parameter(w.detach().clone()) for w in weights]
    subject, oracle = ShardedASGD(weights, stage=2, **OPTIONS), torch.optim.ASGD(copies, **OPTIONS)
    for step in range(7):
        for params, optimizer in ((weights, subject), (copies, oracle)):
            params[0].requires_grad_(step not in (2, 3))
            if step == 2:
                params[0].grad = None
                optimizer.param_groups[0]["params"].reverse()
            if optimizer is oracle:
                optimizer.zero_grad()
            for number in range(2):
                used = [p * (1.0 + step + number + i) for i, p in enumerate(params) if p.requires_grad]
                torch.stack([u.sum() for u in used]).sum().backward()
            optimizer.step()
        assert all(map(torch.equal, weights, copies)), step


@worlds
def test_a_parameter_that_was_frozen_when_shards_were_built(backend: str, world_size: int) -> None:
    """Backward never adds to the gradient that a step has published."""
    run(backend, world_size, unfreezes_late)


def unscales_alone(rank: int, _world_size: int) -> None:
    """Job: after a norm, rank 0 unscales and the other rank steps."""
    param = nn.Parameter(torch.ones(4))
    optimizer = ShardedASGD([param], stage=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(param.sum()).backward()
    torch.nn.utils.clip_grad_norm_([param], 1.0)
    if rank == 0:
        scaler.unscale_(optimizer)
    optimizer.step()


def test_unscaling_on_one_rank_is_an_error_on_all() -> None:
    """It is announced before anything else is sent."""
    for error in run_errors("gloo", 2, unscales_alone):
        assert "an operator on p.grad" in error.message
