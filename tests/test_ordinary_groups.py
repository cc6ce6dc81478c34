"""``param_groups``, parameters and process groups that change after the optimizer was constructed."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_asgd import ShardedASGD

both = pytest.mark.parametrize("stage", [1, 2])

# --- a process group that came later ------------------------------------------------------------------------


@both
@pytest.mark.parametrize("call", ["step", "clip_grad_norm_", "consolidated_state_dict"])
def test_a_default_group_that_was_made_after_the_optimizer(stage: int, call: str) -> None:
    """The first use raises: each rank would go on by itself."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = ShardedASGD([weight], stage=stage)
    weight.grad = torch.ones(3)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(RuntimeError, match="before init_process_group"):
            getattr(optimizer, call)(*([1.0] if call == "clip_grad_norm_" else []))
        assert weight.tolist() == [1.0] * 3
    finally:
        dist.destroy_process_group()


def test_a_default_group_of_one_rank_that_was_made_after_the_optimizer() -> None:
    """It changes nothing."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = ShardedASGD([weight], stage=2)
    weight.grad = torch.ones(3)
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        optimizer.step()
    finally:
        dist.destroy_process_group()
    assert weight[0] < 1.0
