"""Stage 1: gradients that are not averaged are an error of the first step, with whole checksums and all causes."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_asgd import ShardedASGD
from tests.harness.models import mlp, mlp_loss
from tests.harness.ranks import run_errors
from tests.test_errors import assert_all_say

CAUSES = ("wrap the model in DDP or pass stage=2", "no_sync()", "call the wrapped module")


def equal_low_halves(rank: int, _world_size: int, at_start: bool) -> None:
    """Job: values on the ranks whose checksums have equal low halves, zero: as parameters, or as gradients."""
    weight = nn.Parameter(torch.full((1024,), float(1 + rank) if at_start else 1.0))
    optimizer = ShardedASGD([("weight", weight)])
    weight.grad = torch.full((1024,), float(1 + rank))
    optimizer.step()


@pytest.mark.parametrize("at_start", [False, True], ids=["gradients", "parameters"])
def test_errors_show_whole_checksums(at_start: bool) -> None:
    """Ranks whose values differ are never said to have the same checksum."""
    errors = run_errors("threads", 2, equal_low_halves, at_start)
    assert_all_say(errors, "RuntimeError", "parameter weight", "rank 0 has checksum", "; rank 1 has checksum")
    if not at_start:
        assert_all_say(errors, "RuntimeError", *CAUSES)


def not_averaged(rank: int, _world_size: int, cause: str) -> None:
    """Job: a model in DDP, whose gradients DDP does not average."""
    ddp = DistributedDataParallel(mlp())
    optimizer = ShardedASGD(ddp.module.named_parameters(), lr=0.1)
    model = ddp.module if cause == "inner module" else ddp
    with ddp.no_sync() if cause == "no_sync" else contextlib.nullcontext():
        mlp_loss(model, rank).backward()
    if cause == "missing" and rank == 1:
        next(ddp.parameters()).grad = None
    optimizer.step()


@pytest.mark.parametrize("cause", ["no_sync", "inner module", "missing"])
def test_a_wrapped_model_whose_gradients_are_not_averaged(cause: str) -> None:
    """The error does not only ask for the wrapper that is there."""
    assert_all_say(run_errors("gloo", 2, not_averaged, cause), "RuntimeError", "0.weight", *CAUSES)
