"""A deleted optimizer is freed by reference counting, as torch's is: no object that it made waits for the collector."""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from dist_asgd import (
    CheckpointManager,
    ShardedASGD,
    async_save_checkpoint,
    export_averaged,
    load_checkpoint,
    save_checkpoint,
)
from tests.harness.ranks import run

Use = Callable[[nn.Module, ShardedASGD, Path], object]
both = pytest.mark.parametrize("stage", [1, 2])


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """No cyclic collector inside."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def train(model: nn.Module, optimizer: ShardedASGD) -> None:
    """One step, with gradients that are equal on all ranks."""
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()


def averages(_model: nn.Module, optimizer: ShardedASGD, _path: Path) -> None:
    """The parameters are averages for a while, and state dicts are made and loaded."""
    with optimizer.averaged_parameters():
        pass
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.consolidated_state_dict(to=None))


def saves(model: nn.Module, optimizer: ShardedASGD, path: Path) -> None:
    """Checkpoints, in the background too, and the export."""
    save_checkpoint(path / "one", model, optimizer, step=1)
    async_save_checkpoint(path / "two", model, optimizer, step=1).wait()
    with CheckpointManager(path / "managed") as manager:
        manager.async_save(model, optimizer, step=1)
    load_checkpoint(path / "one", model, optimizer)
    export_averaged(path / "weights.safetensors", model, optimizer)


def refused(call: Callable[[], object]) -> None:
    """``call`` raises an error of this package, which is dropped at once, as ``except`` clauses do."""
    text = ""
    try:
        call()
    except Exception as error:
        text = str(error)
    assert "dist_asgd" in text


def errors(model: nn.Module, optimizer: ShardedASGD, path: Path) -> None:
    """Errors of every kind of call."""
    refused(lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1).to(torch.float8_e4m3fn))]}))
    refused(lambda: optimizer.load_state_dict({"state": {}}))
    refused(lambda: optimizer.consolidated_state_dict(to=99))
    refused(lambda: save_checkpoint(path / "no" / "parent", model, optimizer, step=1))
    refused(lambda: load_checkpoint(path / "none", model, optimizer))
    refused(lambda: export_averaged(path / "no" / "x.safetensors", model, optimizer))
    with contextlib.suppress(ZeroDivisionError), optimizer.averaged_parameters():
        refused(optimizer.step)
        raise ZeroDivisionError
    optimizer.param_groups[0]["lr"] = -1.0
    refused(optimizer.step)
    optimizer.param_groups[0]["lr"] = 0.1
    param = next(model.parameters())
    param.grad = torch.ones_like(param).to_sparse()
    with contextlib.suppress(RuntimeError):
        optimizer.step()
    param.data = torch.ones(3, 3)
    refused(lambda: optimizer.averaged_parameters().__enter__())
    refused(optimizer.step)


def unfinished(model: nn.Module, _optimizer: ShardedASGD, _path: Path) -> None:
    """A backward whose gradients nobody uses: in stage 2 they are in flight."""
    model(torch.ones(2, 4)).square().mean().backward()


def dies(_rank: int, _world_size: int, stage: int, placed: str, use: Use, path: Path) -> None:
    """Job: the optimizer, its communicators and its memory are gone as soon as the last reference is."""
    for turn in range(2):  # The first use of some functions leaves cycles of torch's own, once for the process.
        torch.manual_seed(turn)  # processes are used again, and other tests may have drawn from one of them
        model = nn.Linear(4, 4)
        if placed == "dtensor":
            mesh = init_device_mesh("cpu", (_world_size,))
            for name, param in list(model.named_parameters()):
                setattr(model, name, nn.Parameter(distribute_tensor(param.detach(), mesh)))
        folder = path / f"turn{turn}"
        if _rank == 0:
            folder.mkdir(exist_ok=True)
        with no_collector():
            optimizer = ShardedASGD(model.parameters(), lr=0.1, stage=stage)
            if placed == "plain":
                train(model, optimizer)
            use(model, optimizer, folder)
            made: list[Any] = [optimizer, optimizer.communicators, optimizer.shards, optimizer.gradients]
            made += optimizer.shards.state_buffers
            left = [weakref.ref(one) for one in made]
            names = [type(one).__name__ for one in made]
            del made, optimizer
            alive = [name for name, ref in zip(names, left, strict=True) if ref() is not None]
        assert not alive or not turn, alive


@both
@pytest.mark.parametrize("use", [unfinished, averages, saves, errors])
def test_it_is_freed_at_once(tmp_path: Path, stage: int, use: Use) -> None:
    """On one process."""
    run("none", 1, dies, stage, "plain", use, tmp_path)


@both
@pytest.mark.parametrize("use", [averages, saves, errors])
def test_it_is_freed_at_once_on_two_ranks(tmp_path: Path, stage: int, use: Use) -> None:
    """With communicators."""
    run("gloo", 2, dies, stage, "plain", use, tmp_path)


@both
@pytest.mark.parametrize("use", [averages, saves])
def test_it_is_freed_at_once_with_dtensors(tmp_path: Path, stage: int, use: Use) -> None:
    """With parameters that stay where they are, and replica groups."""
    run("gloo", 2, dies, stage, "dtensor", use, tmp_path)


@both
def test_a_constructor_that_raises_leaves_nothing(stage: int) -> None:
    """An optimizer that never was."""
    made: list[weakref.ref[ShardedASGD]] = []

    class Noted(ShardedASGD):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(weakref.ref(self))
            super().__init__(*args, **kwargs)

    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn))]
    with no_collector():
        refused(lambda: Noted(params[:1], lr=-1.0, stage=stage))
        refused(lambda: Noted(params, stage=stage))
        assert [ref() for ref in made] == [None, None]


def test_other_frames_keep_their_variables() -> None:
    """A debugger still shows the frames of users, and those that hold no error."""

    def closure() -> float:
        mine = ValueError("held by the user's own frame")
        raise RuntimeError("from the closure") from mine

    param = nn.Parameter(torch.ones(2))
    optimizer = ShardedASGD([param])
    with pytest.raises(RuntimeError, match="from the closure") as info:
        optimizer.step(closure)
    assert isinstance(info.traceback[-1].frame.f_locals["mine"], ValueError)
    assert any(entry.frame.f_locals.get("self") is optimizer for entry in info.traceback)
