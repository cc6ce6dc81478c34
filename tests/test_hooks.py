"""The face of ``torch.optim.Optimizer``: hooks, groups, names, what pickles and what must not."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import profile

from dist_asgd import ShardedASGD
from tests.harness.bits import assert_same_bits
from tests.harness.ranks import run

WORLDS = [("none", 1), ("threads", 2), ("gloo", 2)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)
both = pytest.mark.parametrize("stage", [1, 2])


def weights(count: int = 3) -> list[nn.Parameter]:
    """Parameters with gradients."""
    made = [nn.Parameter(torch.arange(4.0) + i) for i in range(count)]
    for p in made:
        p.grad = torch.ones_like(p)
    return made


def step_hooks(_rank: int, _world_size: int, stage: int) -> None:
    """Job: pre hooks may change the closure, post hooks see the result; global hooks run too."""
    params = weights()
    optimizer = ShardedASGD(params, stage=stage, lr=0.1)
    seen: list[str] = []

    def pre(opt: Any, args: Any, kwargs: Any) -> Any:
        assert opt is optimizer
        seen.append("pre")
        return ((opt, lambda: 2.0) if len(args) == 2 else args), kwargs

    def post(opt: Any, args: Any, _kwargs: Any) -> None:
        assert opt is optimizer
        assert args[1]() == 2.0
        assert params[0][1] != 1.0
        seen.append("post")

    handles = [optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)]
    assert optimizer.step(lambda: 1.0) == 2.0
    assert seen == ["pre", "post"]
    for handle in handles:
        handle.remove()
    assert optimizer.step() is None
    assert seen == ["pre", "post"]


@both
@worlds
def test_step_hooks_see_and_change_arguments(backend: str, world_size: int, stage: int) -> None:
    """As on every torch optimizer."""
    run(backend, world_size, step_hooks, stage)


def test_global_step_hooks_run() -> None:
    """``register_optimizer_step_pre_hook`` and its twin."""
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("post")),
    ]
    ShardedASGD(weights()).step()
    for handle in handles:
        handle.remove()
    assert seen == ["pre", "post"]


def test_the_profiler_names_the_step_and_zero_grad() -> None:
    """torch's own labels, with this class in them."""
    optimizer = ShardedASGD(weights())
    with profile() as recorded:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.key for event in recorded.key_averages()}
    assert "Optimizer.step#ShardedASGD.step" in names
    assert "Optimizer.zero_grad#ShardedASGD.zero_grad" in names


def state_hooks(_rank: int, _world_size: int) -> None:
    """Job: hooks around ``state_dict`` and ``load_state_dict``, each of which may replace the dict."""
    optimizer = ShardedASGD(weights(), lr=0.1)
    optimizer.step()
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _opt: seen.append("before save"))
    optimizer.register_state_dict_post_hook(lambda _opt, saved: {**saved, "note": 1})
    assert optimizer.state_dict()["note"] == 1
    assert optimizer.consolidated_state_dict(to=None)["note"] == 1
    assert seen == ["before save"] * 2

    def before_load(_opt: Any, saved: dict[str, Any]) -> dict[str, Any]:
        seen.append("before load")
        groups = [{**group, "lr": 0.5} for group in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(before_load)
    optimizer.register_load_state_dict_post_hook(lambda _opt: seen.append("after load"))
    saved = optimizer.consolidated_state_dict(to=None)
    optimizer.load_state_dict(saved)
    assert seen[-2:] == ["before load", "after load"]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert saved["param_groups"][0]["lr"] == 0.1


@worlds
def test_state_dict_hooks(backend: str, world_size: int) -> None:
    """Before and after, saving and loading."""
    run(backend, world_size, state_hooks)


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_copies_of_the_optimizer_are_refused(copier: Any) -> None:
    """A copy would update the same buckets; the message says what to save instead."""
    optimizer = ShardedASGD(weights())
    with pytest.raises(TypeError, match="consolidated_state_dict"):
        copier(optimizer)


def test_groups_keep_their_hyperparameters_and_names() -> None:
    """Defaults fill what a group leaves out; names survive in the state dicts."""
    first, second = weights(2)
    optimizer = ShardedASGD([{"params": [("a", first)], "lr": 0.5}], weight_decay=0.1)
    optimizer.add_param_group({"params": [("b", second)], "maximize": True, "t0": 3})
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 1e-2]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1]
    assert optimizer.param_groups[1]["t0"] == 3
    for saved in (optimizer.state_dict(), optimizer.consolidated_state_dict()):
        assert [g["param_names"] for g in saved["param_groups"]] == [["a"], ["b"]]
        assert [g["params"] for g in saved["param_groups"]] == [[0], [1]]


def test_zero_grad_is_torchs() -> None:
    """None or zeros."""
    params = weights()
    optimizer = ShardedASGD(params)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_no_sync_is_for_stage_2() -> None:
    """Stage 1 accumulates in DDP."""
    with pytest.raises(RuntimeError, match="DistributedDataParallel"), ShardedASGD(weights()).no_sync():
        pass


def test_an_empty_group_can_be_added_to() -> None:
    """Groups without parameters are groups."""
    optimizer = ShardedASGD([{"params": []}, {"params": weights(1)}])
    optimizer.step()
    assert len(optimizer.param_groups) == 2


def test_repr_names_the_class_and_its_groups() -> None:
    """For logs."""
    text = repr(ShardedASGD(weights(), lr=0.25))
    assert text.startswith("ShardedASGD")
    assert "lr: 0.25" in text


def differentiates(optimizer_class: type[torch.optim.Optimizer], options: dict[str, Any]) -> torch.Tensor:
    """The derivative of the loss after three steps with respect to the weights before them."""
    start = torch.tensor([1.0, 2.0], requires_grad=True)
    param = start * 1.0
    optimizer = optimizer_class([param], lr=0.1, differentiable=True, **options)  # type: ignore[call-arg]
    for step in range(1, 4):
        param.grad = start**2 / step
        optimizer.step()
    average = optimizer.state[param]["ax"]
    (derivative,) = torch.autograd.grad((param**2).sum() + average.sum(), start)
    return derivative


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "maximize": True, "t0": 1}])
def test_differentiable_in_one_process_is_torchs(options: dict[str, Any]) -> None:
    """Autograd sees through the step."""
    found = differentiates(ShardedASGD, options)
    assert_same_bits(found, differentiates(torch.optim.ASGD, options), "derivative")
    assert found.any()
