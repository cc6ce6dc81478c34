"""The migration: a DDP script in which only the optimizer's class name changes.

Losses and parameters are those of the same script with ``torch.optim.ASGD``, bit for bit (``foreach=None``
means the for-loop form on CPU, in both). Processes, because DDP does not run on threads.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, ReduceLROnPlateau, StepLR

from dist_asgd import ShardedASGD
from tests.harness.bits import same_bits
from tests.harness.cases import every_pair
from tests.harness.models import mlp, mlp_loss
from tests.harness.ranks import run

NUM_STEPS = 8
Schedule = Callable[[Optimizer], LRScheduler]


def one_cycle(optimizer: Optimizer) -> LRScheduler:
    """Changes lr at its construction, before the first step."""
    return OneCycleLR(optimizer, max_lr=0.3, total_steps=NUM_STEPS, cycle_momentum=False)


def cosine(optimizer: Optimizer) -> LRScheduler:
    """Annealed to zero."""
    return CosineAnnealingLR(optimizer, T_max=NUM_STEPS)


def stepped(optimizer: Optimizer) -> LRScheduler:
    """Halved every third step."""
    return StepLR(optimizer, step_size=3, gamma=0.5)


def script(
    optimizer_class: type[Optimizer],
    rank: int,
    options: dict[str, Any],
    views: bool,
    clip: bool,
    schedule: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """An ordinary DDP training script; returns its losses and final parameters."""
    model = DistributedDataParallel(mlp(), gradient_as_bucket_view=views, bucket_cap_mb=0.01)
    optimizer = optimizer_class(model.parameters(), **options)
    scheduler = schedule(optimizer) if schedule else None
    losses = []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = mlp_loss(model, 100 * step + rank)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.detach())
    return losses, [p.detach().clone() for p in model.parameters()]


def compare_scripts(
    rank: int, _world_size: int, options: dict[str, Any], views: bool, clip: bool, schedule: Schedule | None
) -> None:
    """Job: the script with both classes."""
    found = script(ShardedASGD, rank, options, views, clip, schedule)
    expected = script(torch.optim.ASGD, rank, options, views, clip, schedule)
    assert all(map(same_bits, found[0], expected[0])), (found[0], expected[0])
    assert all(map(same_bits, found[1], expected[1]))
    assert not torch.equal(expected[0][0], expected[0][-1])


@every_pair(
    options=[{}, {"lr": 0.1, "t0": 3, "weight_decay": 0.01}, {"lr": 0.1, "t0": 0, "foreach": True}],
    world_size=[2, 3],
    views=[False, True],
)
def test_only_the_class_name_changes(world_size: int, views: bool, options: dict[str, Any]) -> None:
    """Also with gradients that are views of DDP's buckets."""
    run("gloo", world_size, compare_scripts, options, views, False, None)


@pytest.mark.parametrize("schedule", [one_cycle, cosine, stepped], ids=lambda s: s.__name__)
@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
def test_schedulers_and_clipping_need_no_change(schedule: Schedule, clip: bool) -> None:
    """torch's schedulers and ``clip_grad_norm_``, in stage 1."""
    run("gloo", 2, compare_scripts, {"lr": 0.1, "t0": 2}, True, clip, schedule)


def plateau(rank: int, _world_size: int) -> list[float]:
    """A scheduler that is driven by the loss."""
    model = DistributedDataParallel(mlp())
    optimizer = ShardedASGD(model.parameters(), lr=0.1)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for loss in (1.0, 2.0, 3.0):
        optimizer.zero_grad()
        mlp_loss(model, rank).backward()
        optimizer.step()
        scheduler.step(loss)
    return scheduler.get_last_lr()


def test_reduce_lr_on_plateau() -> None:
    """Halved after each loss that is no better."""
    assert run("gloo", 2, plateau) == [[0.025]] * 2


def stage2_beside_ddp(rank: int, world_size: int) -> None:
    """Job: stage 2 beside DDP with ``torch.optim.ASGD``; two ranks, so both means are exact."""
    options = {"lr": 0.1, "t0": 2}
    expected = script(torch.optim.ASGD, rank, options, False, False, one_cycle)
    model = mlp()
    optimizer = ShardedASGD(model.parameters(), stage=2, bucket_cap_mb=0.01, **options)
    scheduler = one_cycle(optimizer)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = mlp_loss(model, 100 * step + rank)
        loss.backward()
        optimizer.step()
        scheduler.step()
        assert same_bits(loss.detach(), expected[0][step]), f"step {step} on rank {rank} of {world_size}"
    assert all(map(same_bits, model.parameters(), expected[1]))


def test_stage_2_replaces_ddp_bit_for_bit_on_two_ranks() -> None:
    """A sum of two terms has one rounding, whoever does it, and halving is exact."""
    run("gloo", 2, stage2_beside_ddp)
