"""A checkpoint that code of the user refuses while it is applied changes nothing, and raises on every rank."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from dist_asgd import ShardedASGD, load_checkpoint, save_checkpoint
from dist_asgd.state_dict.backup import find_unequal
from tests.harness.bits import assert_same_bits, same_tree
from tests.harness.cases import every_pair
from tests.harness.ranks import run, run_errors
from tests.harness.topologies import Run, build

Refusal = Callable[[Run], Any]


class Counter(nn.Module):
    """A module with extra state, which it keeps in a list that is changed in place."""

    def __init__(self, items: list[int]) -> None:
        super().__init__()
        self.items = items
        self.loads = 0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.items)

    def set_extra_state(self, state: Tensor) -> None:
        self.items[:] = state.tolist()
        self.loads += 1


def refuse(*_: Any, **__: Any) -> None:
    """A hook, or a method."""
    raise LookupError("no room for it")


@contextmanager
def hook(register: Callable[[Any], Any]) -> Iterator[None]:
    """Register ``refuse`` inside the block."""
    handle = register(refuse)
    try:
        yield
    finally:
        handle.remove()


def scale_and_refuse(_module: nn.Module, *_: Any) -> None:
    """Change parameters and a buffer, also those of other ranks' fragments, and raise."""
    with torch.no_grad():
        for tensor in (*_module.parameters(), *_module.buffers()):
            tensor.mul_(3)
    raise ValueError("no room for it")


@contextmanager
def scaling(run: Run) -> Iterator[None]:
    """Register ``scale_and_refuse`` inside the block."""
    handle = run.model.register_load_state_dict_post_hook(scale_and_refuse)
    try:
        yield
    finally:
        handle.remove()


def loads_and_refuses(run: Run) -> Any:
    """The optimizer's own method, as a subclass may have it, that raises after the loading."""
    load = run.optimizer.load_state_dict
    return patch.object(run.optimizer, "load_state_dict", lambda state: refuse(load(state)))


REFUSALS: dict[str, Refusal] = {
    "set_extra_state": lambda r: patch.object(r.model.counter, "set_extra_state", refuse),
    "load_state_dict": lambda r: patch.object(r.model, "load_state_dict", refuse),
    "pre-hook": lambda r: hook(r.model[-1].register_load_state_dict_pre_hook),
    "post-hook": lambda r: hook(r.model.register_load_state_dict_post_hook),
    "writing post-hook": scaling,
    "optimizer's method": lambda r: patch.object(r.optimizer, "load_state_dict", refuse),
    "optimizer's method, late": loads_and_refuses,
    "optimizer's pre-hook": lambda r: hook(r.optimizer.register_load_state_dict_pre_hook),
    "optimizer's post-hook": lambda r: hook(r.optimizer.register_load_state_dict_post_hook),
}


def made(topology: str, kind: str, seed: int, steps: int) -> Run:
    """A model with a counter and an own entry, after ``steps``."""
    made = build(topology, kind, seed=seed)
    made.model.counter = Counter([seed])
    made.train(steps)
    made.optimizer.state["seen"] = seed
    return made


def everything(live: Run) -> dict[str, Any]:
    """All that a load changes on this rank, copied."""
    state = live.optimizer.state
    by_name = {name: state.get(param, {}) for name, param in live.model.named_parameters()}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in live.optimizer.param_groups]
    model = dict([*live.model.named_parameters(), *live.model.named_buffers()])
    found = {"model": model, "state": by_name, "seen": state["seen"], "groups": groups}
    counter = (live.model.counter.items, live.model.counter.loads)
    return {**copy.deepcopy(_local(found)), "counter": copy.deepcopy(counter)}


def _local(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _local(one) for key, one in value.items()}
    if isinstance(value, Tensor):
        return (value.to_local() if hasattr(value, "to_local") else value).detach().clone()
    return value


def refused(rank: int, world_size: int, topology: str, kind: str, path: str) -> None:
    """Job: each refusal, on the first rank, the last one, and all."""
    live = made(topology, kind, 0, 4)
    save_checkpoint(path, live.model, live.optimizer, step=4)
    live = made(topology, kind, 7, 3)
    live.optimizer.param_groups[0]["lr"] = 0.5
    before = everything(live)
    for name, refusal in REFUSALS.items():
        for refusing in ((0,), (world_size - 1,), tuple(range(world_size))):
            error: Exception | None = None
            try:
                if rank in refusing:
                    with refusal(live):
                        load_checkpoint(path, live.model, live.optimizer)
                else:
                    load_checkpoint(path, live.model, live.optimizer)
            except (ValueError, RuntimeError) as raised:
                error = raised
            what = f"{name} on {refusing}"
            assert error is not None, what
            assert re.search("no room for it", str(error)), (what, error)
            if world_size > 1:
                assert str(error).count("[on ") == 1, (what, error)
                assert world_size == len(refusing) or re.search(rf"\[on rank {refusing[0]} of", str(error)), error
            assert same_tree(everything(live), before), what
    live.train(1)
    load_checkpoint(path, live.model, live.optimizer)
    expected = everything(made(topology, kind, 0, 4))
    expected["counter"] = ([0], live.model.counter.loads)
    assert same_tree(everything(live), expected)


@every_pair(
    place=[("none", "single", 1), ("gloo", "stage1", 2), ("gloo", "stage2", 3), ("gloo", "hybrid", 4)],
    kind=["mlp", "bfloat16"],
)
def test_all_or_nothing(place: tuple[str, str, int], kind: str, tmp_path: Path) -> None:
    """Whatever refuses, on whichever rank."""
    backend, topology, world_size = place
    run(backend, world_size, refused, topology, kind, str(tmp_path / "saved"))


@pytest.mark.parametrize("place", [("fsdp2", 2), ("fsdp2-sharded", 2), ("hsdp-sharded", 2)], ids=str)
def test_dtensors_all_or_nothing(place: tuple[str, int], tmp_path: Path) -> None:
    """The same with FSDP2 and HSDP, and with torch's optimizer."""
    run("gloo", place[1], refused, place[0], "mlp", str(tmp_path / "saved"))


def fresh(rank: int, _world_size: int, path: str) -> None:
    """Job: parameters that differ between ranks, as nothing has compared them yet, come back as each rank's own."""
    live = made("stage1", "mlp", 0, 2)
    save_checkpoint(path, live.model, live.optimizer, step=2)
    live = made("stage1", "mlp", 5 + rank, 0)
    before = everything(live)
    assert find_unequal(live.optimizer.shards.buckets, live.optimizer.communicators)
    with pytest.raises(RuntimeError, match="no room for it"), hook(live.model.register_load_state_dict_post_hook):
        load_checkpoint(path, live.model, live.optimizer)
    assert same_tree(everything(live), before)


def test_fresh_models_that_differ_come_back(tmp_path: Path) -> None:
    """As every rank had them."""
    run("gloo", 2, fresh, str(tmp_path / "saved"))


def refused_state_dict(rank: int, world_size: int, master: bool) -> None:
    """Job: a hook after ``load_state_dict()`` raises on one rank."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(301, dtype=torch.bfloat16 if master else torch.float32))
    optimizer = ShardedASGD([weight], lr=0.1, t0=0, master_weights=master)
    dicts = []
    for step in range(3):
        weight.grad = torch.full_like(weight, step + 0.3)
        optimizer.step()
        dicts.append(copy.deepcopy(optimizer.consolidated_state_dict(to=None)))
    before = weight.detach().clone()
    if rank == world_size - 1:
        optimizer.register_load_state_dict_post_hook(refuse)
    with pytest.raises((LookupError, RuntimeError), match="no room for it"):
        optimizer.load_state_dict(dicts[0])
    assert_same_bits(weight, before, "parameter")
    assert same_tree(optimizer.consolidated_state_dict(to=None), dicts[2])


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_hook_refuses_a_state_dict(world_size: int, master: bool) -> None:
    """Then the optimizer is what it was, on every rank."""
    run("gloo" if world_size > 1 else "none", world_size, refused_state_dict, master)


def test_a_large_buffer_that_is_the_same_is_not_copied(tmp_path: Path) -> None:
    """And one that is changed comes back."""
    model = nn.Linear(3, 2)
    model.register_buffer("table", torch.arange(1 << 15, dtype=torch.float32))
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1)
    save_checkpoint(tmp_path / "saved", model, optimizer, step=0)
    before = model.table.clone()
    handle = model.register_load_state_dict_post_hook(scale_and_refuse)
    for _ in range(2):
        with pytest.raises(ValueError, match="no room for it"):
            load_checkpoint(tmp_path / "saved", model, optimizer)
        assert_same_bits(model.table, before, "table")
        before = model.table.add_(1).clone()
    handle.remove()
    load_checkpoint(tmp_path / "saved", model, optimizer)
    assert_same_bits(model.table, torch.arange(1 << 15, dtype=torch.float32), "table")


class Unprintable(Exception):
    """An error whose text cannot be made."""

    def __str__(self) -> str:
        raise TypeError("no text")


def raises_unprintable(rank: int, _world_size: int, call: str, path: str) -> None:
    """Job: the last rank's model raises it while it is saved, or while a checkpoint is applied."""
    live = build("stage1").train(1)
    save_checkpoint(path, live.model, live.optimizer, step=1)

    def refuse(*_: Any, **__: Any) -> None:
        raise Unprintable

    if rank:
        register = "register_state_dict_pre_hook" if call == "save" else "register_load_state_dict_post_hook"
        getattr(live.model, register)(refuse)
    if call == "save":
        save_checkpoint(f"{path}-2", live.model, live.optimizer, step=2)
    else:
        load_checkpoint(path, live.model, live.optimizer)


@pytest.mark.parametrize("call", ["save", "load"])
def test_an_error_without_a_text_is_raised_on_all_ranks(call: str, tmp_path: Path) -> None:
    """The other ranks do not wait for it until the timeout."""
    for error in run_errors("gloo", 2, raises_unprintable, call, str(tmp_path / "c")):
        assert "Unprintable" in error.message
        assert "[on rank 1 of 2]" in error.message
