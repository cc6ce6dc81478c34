"""Stage 2 and the hooks of others: the same result whichever was registered first; buckets leave during backward."""

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from dist_asgd import ShardedASGD
from tests.gradients.test_stage2 import OPTIONS, SMALL_MB, assert_same_models, holds_no_gradient
from tests.harness.models import mlp, mlp_loss
from tests.harness.ranks import run

WORLDS = [("none", 1), ("threads", 2), ("gloo", 2)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)
Hook = Callable[[Tensor], None]


def halves(param: Tensor) -> None:
    """Changes the gradient in place."""
    assert param.grad is not None
    param.grad.mul_(0.5)


def replaces(param: Tensor) -> None:
    """Puts another tensor in place of the gradient."""
    assert param.grad is not None
    param.grad = param.grad.neg()


def on_parameter(hook: Hook, param: Tensor) -> Any:
    """As users mostly do it."""
    return param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def on_node(hook: Hook, param: Tensor) -> Any:
    """On autograd's node that accumulates the gradient, as DDP and FSDP1 do it; the node has to be kept."""
    node = get_gradient_edge(param).node
    node.register_hook(lambda _inputs, _outputs: hook(param))
    return node


class Reentrant(nn.Module):
    """A model whose middle layer is checkpointed: a backward inside the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        """As the model inside."""
        layers: Any = self.inner
        return layers[2:](checkpoint(layers[:2], x.requires_grad_(), use_reentrant=True))


def trains(_rank: int, _world_size: int, hook: Hook, place: Any, reentrant: bool) -> None:
    """Job: hooks before the optimizer, after it, and torch's own optimizer with them; the same data on every rank."""
    models = [Reentrant() if reentrant else mlp() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    kept, optimizers = [], []
    for number, model in enumerate(models):
        if number == 0:
            kept += [place(hook, p) for p in model.parameters()]
        if number == 2:
            optimizers.append(torch.optim.ASGD(model.parameters(), **OPTIONS))
        else:
            optimizers.append(ShardedASGD(model.parameters(), stage=2, bucket_cap_mb=SMALL_MB, **OPTIONS))
        if number != 0:
            kept += [place(hook, p) for p in model.parameters()]
    for seed in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            mlp_loss(model, seed).backward()
            optimizer.step()
        assert_same_models(models[0], models[2], f"after step {seed}, hooks first")
        assert_same_models(models[1], models[2], f"after step {seed}, optimizer first")


@worlds
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("place", [on_parameter, on_node])
@pytest.mark.parametrize("hook", [halves, replaces])
def test_hooks_of_users(backend: str, world_size: int, hook: Hook, place: Any, reentrant: bool) -> None:
    """They meet the gradient of every parameter, those that complete a bucket included."""
    run(backend, world_size, trains, hook, place, reentrant)


def unexpected(_rank: int, _world_size: int) -> None:
    """Job: a parameter that took no part in the last step gets a gradient, beside others of its bucket."""
    weights = [nn.Parameter(torch.full((4,), 1.0 + i)) for i in range(3)]
    copies = [nn.Parameter(w.detach().clone()) for w in weights]
    subject, oracle = ShardedASGD(weights, stage=2, **OPTIONS), torch.optim.ASGD(copies, **OPTIONS)
    kept = [on_parameter(halves, p) for p in (*weights, *copies)]
    for used in ((0, 2), (0, 1, 2), (1,), (2, 1, 0)):
        for params, optimizer in ((weights, subject), (copies, oracle)):
            optimizer.zero_grad()
            torch.stack([(params[i] * (1.0 + i)).sum() for i in used]).sum().backward()
            optimizer.step()
        assert all(map(torch.equal, weights, copies)), used
    assert len(kept) == 6


@worlds
def test_hooks_on_a_parameter_that_was_not_expected(backend: str, world_size: int) -> None:
    """Its bucket may leave before its hooks have run, and then without it."""
    run(backend, world_size, unexpected)


def leaves_early(_rank: int, _world_size: int) -> None:
    """Job: how many gradients are left in ``p.grad`` when backward comes to the first layer."""
    model = mlp(width=16, depth=6)
    params = list(model.parameters())
    optimizer = ShardedASGD(params, stage=2, bucket_cap_mb=SMALL_MB)
    left: list[int] = []
    on_parameter(lambda _: left.append(sum(type(p.grad) is Tensor for p in params)), params[0])
    for seed in range(3):
        mlp_loss(model, seed).backward()
        assert holds_no_gradient(model)
        optimizer.step()
        optimizer.zero_grad()
    assert len(left) == 3
    assert max(left) <= 6 < len(params)


@worlds
def test_buckets_leave_during_backward(backend: str, world_size: int) -> None:
    """They do not wait for the end of it."""
    run(backend, world_size, leaves_early)


def fails_once(_rank: int, _world_size: int) -> None:
    """Job: a hook raises in the middle of a backward, and the next backward is as if that had never been."""
    ours, failing = mlp(), [True]
    theirs = copy.deepcopy(ours)
    subject = ShardedASGD(ours.parameters(), stage=2, bucket_cap_mb=SMALL_MB, **OPTIONS)
    oracle = torch.optim.ASGD(theirs.parameters(), **OPTIONS)

    def fail(_: Tensor) -> None:
        if failing[0]:
            raise ArithmeticError

    for model in (ours, theirs):
        on_parameter(fail, list(model.parameters())[1])
    for seed in range(3):
        failing[0] = seed == 1
        for model, optimizer in ((ours, subject), (theirs, oracle)):
            optimizer.zero_grad()
            with pytest.raises(ArithmeticError) if failing[0] else contextlib.nullcontext():
                mlp_loss(model, seed).backward()
            if failing[0]:
                optimizer.zero_grad()
                failing[0] = False
                mlp_loss(model, 10).backward()
                failing[0] = model is ours
            optimizer.step()
        assert_same_models(ours, theirs, f"after step {seed}")


@worlds
def test_a_backward_that_fails(backend: str, world_size: int) -> None:
    """It leaves nothing behind that the next one would take for its own."""
    run(backend, world_size, fails_once)


def test_hooks_keep_no_optimizer_alive() -> None:
    """Parameters outlive it."""
    model = mlp()
    optimizer = ShardedASGD(model.parameters(), stage=2)
    mlp_loss(model, 0).backward()
    gone = weakref.ref(optimizer.gradients)
    del optimizer
    gc.collect()
    assert gone() is None
    mlp_loss(model, 0).backward()
    assert all(p.grad is not None for p in model.parameters())
