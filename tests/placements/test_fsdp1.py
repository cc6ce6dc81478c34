"""Parameters of FullyShardedDataParallel (FSDP1) get the bits of torch.optim.ASGD on a twin of the module."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy

from dist_asgd import ShardedASGD, export_averaged, save_checkpoint
from tests.harness.bits import assert_same_bits, same_tree
from tests.harness.cases import every_pair
from tests.harness.meshes import Net, batch
from tests.harness.ranks import run, run_errors

OPTIONS: dict[str, Any] = {"lr": 0.1, "lambd": 0.01, "t0": 2, "weight_decay": 0.02}


def wrapped(orig: bool, **options: Any) -> Fsdp:
    """Make a ``Net`` with an FSDP1 module for each block. Collective."""
    model = Net()
    options = {"use_orig_params": orig, "device_id": torch.device("cpu"), **options}
    for position, block in enumerate(model.blocks):
        model.blocks[position] = Fsdp(block, **options)
    return Fsdp(model, **options)


def train(model: Fsdp, optimizer: Any, rank: int, steps: range) -> None:
    """Train on data of each rank's own; one step is clipped by the module, and one has no gradients of blocks."""
    for step in steps:
        optimizer.zero_grad()
        model(batch(step, rank)).square().mean().backward()
        if step == 1:
            model.clip_grad_norm_(0.5)
        if step == 3:
            for name, param in model.named_parameters():
                if "blocks" in name:
                    param.grad = None
        if step == 4:
            optimizer.param_groups[0]["lr"] = 0.03
        optimizer.step()


def states(model: Fsdp, optimizer: Any) -> dict[str, Any]:
    """The whole state by parameter name. Collective."""
    with warnings.catch_warnings(), Fsdp.state_dict_type(model, torch.distributed.fsdp.StateDictType.FULL_STATE_DICT):
        warnings.simplefilter("ignore")
        return Fsdp.optim_state_dict(model, optimizer)["state"]


def beside_torch(rank: int, _world_size: int, orig: bool, options: dict[str, Any], strategy: str) -> None:
    """Job: train both, compare, go on in a fresh optimizer from what FSDP made of the state."""
    model, twin = (wrapped(orig, sharding_strategy=ShardingStrategy[strategy]) for _ in range(2))
    foreach = bool(options.get("foreach"))
    subject = ShardedASGD(model.parameters(), **OPTIONS, **options)
    oracle = torch.optim.ASGD(twin.parameters(), **OPTIONS, foreach=foreach)
    train(model, subject, rank, range(5))
    train(twin, oracle, rank, range(5))
    found, expected = states(model, subject), states(twin, oracle)
    if rank == 0:
        assert found
    assert same_tree(found, expected)

    whole = Fsdp.optim_state_dict(model, subject)
    subject = ShardedASGD(model.parameters(), **{**OPTIONS, "lr": 7.0}, **options)
    subject.load_state_dict(Fsdp.optim_state_dict_to_load(model, subject, whole))
    train(model, subject, rank, range(5, 8))
    train(twin, oracle, rank, range(5, 8))
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_same_bits(p, q, name)
    assert same_tree(states(model, subject), states(twin, oracle))


@pytest.mark.filterwarnings("ignore")
@every_pair(
    options=[{"foreach": False, "fused": False}, {"foreach": True}, {"fused": True}, {"fused": True, "stage": 2}],
    use_orig_params=[True, False],
    world=[(2, "FULL_SHARD"), (3, "SHARD_GRAD_OP")],
)
def test_trains_saves_and_loads_as_torch(
    options: dict[str, Any], use_orig_params: bool, world: tuple[int, str]
) -> None:
    """The history has skipped modules, clipping by the module, a changed lr and a reload."""
    world_size, strategy = world
    run("gloo", world_size, beside_torch, use_orig_params, options, strategy)


def narrow(rank: int, _world_size: int) -> None:
    """Job: float32 parameters whose module computes in bfloat16."""
    policy = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, twin = (wrapped(True, mixed_precision=policy) for _ in range(2))
    subject, oracle = ShardedASGD(model.parameters(), **OPTIONS), torch.optim.ASGD(twin.parameters(), **OPTIONS)
    oracle.param_groups[0]["foreach"] = False
    train(model, subject, rank, range(5))
    train(twin, oracle, rank, range(5))
    assert same_tree(states(model, subject), states(twin, oracle))


@pytest.mark.filterwarnings("ignore")
def test_mixed_precision() -> None:
    """Between steps parameters and gradients have the parameters' own dtype."""
    run("gloo", 2, narrow)


def misused(rank: int, _world_size: int, how: str, path: str) -> None:
    """Job: make the call named ``how``, which is refused."""
    model = wrapped(True)
    if how == "differentiable":
        ShardedASGD(
            model.parameters(), process_group=[dist.new_group([r]) for r in range(2)][rank], differentiable=True
        )
    if how == "rounding":
        ShardedASGD(model.bfloat16().parameters(), stochastic_rounding=3)
    optimizer = ShardedASGD(model.named_parameters(), **OPTIONS)
    model(batch(0, rank)).square().mean().backward()
    if how == "clip":
        optimizer.clip_grad_norm_(1.0)
    elif how == "average":
        with optimizer.averaged_parameters():
            pass
    elif how == "consolidate":
        optimizer.consolidated_state_dict()
    elif how == "save":
        save_checkpoint(path, model, optimizer, step=1)
    elif how == "export":
        export_averaged(path, model, optimizer)
    elif how == "one rank's gradients":
        if rank == 1:
            for param in model.parameters():
                param.grad = None
        optimizer.step()
    elif how == "summoned":
        with Fsdp.summon_full_params(model):
            optimizer.step()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("differentiable", "differentiable=True with sharded parameters"),
        ("rounding", "Pass master_weights=True"),
        ("clip", "Call clip_grad_norm_() of that module"),
        ("average", "averaged_parameters() with parameters of FullyShardedDataParallel"),
        ("consolidate", "Call FSDP.optim_state_dict(model, optimizer)"),
        ("save", "get_state_dict(model, optimizer)"),
        ("export", "export_averaged() with parameters of FullyShardedDataParallel"),
        ("one rank's gradients", "which hold parts of it too"),
        ("summoned", "outside of summon_full_params()"),
    ],
)
def test_what_only_the_module_could_do_is_refused(how: str, says: str, tmp_path: Path) -> None:
    """On every rank, with the remedy."""
    for error in run_errors("gloo", 2, misused, how, str(tmp_path / "saved")):
        assert says in error.message, error.message


def plain_beside(rank: int, _world_size: int) -> nn.Module:
    """Job: FSDP1 ignores one layer, whose parameters are plain ones, in stage 2."""
    model = Net()
    root = Fsdp(model, use_orig_params=True, device_id=torch.device("cpu"), ignored_states=[model.last])
    optimizer = ShardedASGD(root.parameters(), **OPTIONS, stage=2)
    for step in range(3):
        optimizer.zero_grad()
        root(batch(step, rank)).square().mean().backward()
        optimizer.step()
    return model.last.weight.detach().clone(), optimizer.state[model.last.weight]["ax"].numel()


@pytest.mark.filterwarnings("ignore")
def test_plain_parameters_beside_it_are_sharded_as_ever() -> None:
    """Ranks with different data end with the same weights."""
    (first, mine), (second, other) = run("gloo", 2, plain_beside)
    assert_same_bits(first, second, "weight")
    assert mine + other == first.numel()
