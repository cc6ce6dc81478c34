"""FSDP2 keeps gathered parameters after an evaluation; whatever is saved, loaded and exported works then, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dist_asgd import CheckpointManager, ShardedASGD, export_averaged, load_checkpoint, save_checkpoint
from tests.harness.bits import assert_same_bits
from tests.harness.ranks import run


def build(kind: type[torch.optim.Optimizer], compiled: bool, **options: Any) -> tuple[nn.Module, Any]:
    """A model of two levels of FSDP2 after three steps, and its optimizer. Collective."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1))
    fully_shard(model[0], **options)  # type: ignore[index]
    fully_shard(model, **options)
    optimizer = kind(model.named_parameters(), lr=0.1, t0=0, foreach=False)  # type: ignore[call-arg]
    for step in range(3):
        model(torch.ones(2, 4) * step).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return (torch.compile(model) if compiled else model), optimizer  # type: ignore[return-value]


def evaluate(model: nn.Module, how: str) -> None:
    """Run a forward only. Collective."""
    inner = getattr(model, "_orig_mod", model)
    with torch.inference_mode() if how == "inference_mode" else torch.no_grad():
        inner(torch.ones(1, 4))
    if how != "reshards":
        assert not all(isinstance(p, DTensor) for p in model.parameters())


def whole(model: nn.Module) -> list[torch.Tensor]:
    """All parameters. Collective."""
    getattr(model, "_orig_mod", model).reshard()  # type: ignore[operator]
    return [p.detach().full_tensor() for p in model.parameters()]  # type: ignore[attr-defined]


def evaluated(
    rank: int, _world_size: int, kind: type[torch.optim.Optimizer], how: str, compiled: bool, folder: str
) -> None:
    """Job: an evaluation before every call."""
    model, optimizer = build(kind, compiled)
    before = whole(model)
    evaluate(model, how)
    save_checkpoint(f"{folder}/c", model, optimizer, step=3)
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().add_(1)  # type: ignore[attr-defined]
    evaluate(model, how)
    load_checkpoint(f"{folder}/c", model, optimizer)
    for found, wanted in zip(whole(model), before, strict=True):
        assert_same_bits(found, wanted, "loaded")
    with CheckpointManager(f"{folder}/steps") as checkpoints:
        evaluate(model, how)
        checkpoints.save(model, optimizer, step=3)
        evaluate(model, how)
        assert checkpoints.restore(model, optimizer) is not None
    evaluate(model, how)
    weights, state = get_state_dict(model, optimizer)
    assert set(state["state"]) == set(weights)
    if kind is ShardedASGD:
        evaluate(model, how)
        assert set(get_optimizer_state_dict(model, optimizer)["state"]) == set(weights)
        evaluate(model, how)
        export_averaged(f"{folder}/e.safetensors", model, optimizer)
        averages = optimizer.consolidated_state_dict(to=None)["state"]
        if rank == 0:
            for index, value in enumerate(load_file(f"{folder}/e.safetensors")[name] for name in weights):
                assert_same_bits(value, averages[index]["ax"], "average")
    getattr(model, "_orig_mod", model).reshard()  # type: ignore[operator]
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for found, wanted in zip(whole(model), before, strict=True):
        assert_same_bits(found, wanted, "set")


@pytest.mark.parametrize("kind", [torch.optim.ASGD, ShardedASGD])
@pytest.mark.parametrize(("how", "compiled"), [("no_grad", False), ("inference_mode", False), ("no_grad", True)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_after_an_evaluation(
    world_size: int, kind: type[torch.optim.Optimizer], how: str, compiled: bool, tmp_path: Path
) -> None:
    """The same as before it, for both optimizers."""
    run("gloo", world_size, evaluated, kind, how, compiled, str(tmp_path))
