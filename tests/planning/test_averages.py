"""The planner counts averages beside the optimizer, as ``memory_report()`` of a ``ShardedAverage`` does."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from dist_asgd import ShardedAverage, plan
from tests.harness.late_streams import offloaded_on_cpus
from tests.harness.models import mlp
from tests.harness.ranks import run


def holds(rank: int, world_size: int, sharded: bool) -> tuple[int, int]:
    """Job: the bytes of an average on rank 0, and those that two of them add to the plan."""
    model = mlp().to(torch.bfloat16)
    plain = mlp().to(torch.bfloat16)
    if sharded:
        fully_shard(model)
    average = ShardedAverage(model.named_parameters(), bucket_cap_mb=0.001)
    rows = [
        {
            row.mode: row.bytes.average
            for row in plan(plain, ranks=world_size, backend="gloo", averages=n, bucket_cap_mb=0.001).rows
        }
        for n in (0, 2)
    ]
    mode = "FSDP2" if sharded else "stage 2"
    assert rank or rows[1][mode] > rows[0][mode]
    return average.memory_report().state_bytes, rows[1][mode] - rows[0][mode]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_averages_beside_the_optimizer(world_size: int, sharded: bool) -> None:
    """To the byte, for plain parameters and those of FSDP2."""
    held, planned = run("gloo", world_size, holds, sharded)[0]
    assert planned == 2 * held


def test_averages_beside_torch_are_whole() -> None:
    """As ``AveragedModel`` is; and a number that is none is refused."""
    numel = sum(p.numel() for p in mlp().parameters())
    unsharded = plan(mlp(), ranks=4, averages=1).rows[0]
    assert unsharded.bytes.average == 2 * 4 * numel
    with pytest.raises(ValueError, match="averages must be a whole number from 0 on, got -1"):
        plan(mlp(), ranks=4, averages=-1)


def holds_on_the_host(rank: int, world_size: int, sharded: bool) -> tuple[int, ...]:
    """Job: what an average in host memory holds there and on the device, on rank 0, and what the plan says."""
    model, plain = (mlp().to(torch.bfloat16) for _ in range(2))
    if sharded:
        fully_shard(model)
    with offloaded_on_cpus():
        beside, host = (
            ShardedAverage(model.named_parameters(), bucket_cap_mb=0.001, average_device=place).memory_report()
            for place in (None, "cpu")
        )
        options = {"ranks": world_size, "bucket_cap_mb": 0.001}
        none, two = (
            {row.mode: row.bytes for row in plan(plain, **options, **averages).rows}
            for averages in ({}, {"averages": 2, "average_device": "cpu"})
        )
    mode = "FSDP2" if sharded else "stage 2"
    assert rank or two[mode].average == none[mode].average
    scratch = two[mode].buffers - none[mode].buffers
    return host.host_state_bytes, host.in_flight_bytes - beside.in_flight_bytes, two[mode].host, scratch


@pytest.mark.parametrize("sharded", [False, True])
def test_averages_in_host_memory(sharded: bool) -> None:
    """What lies there is no part of the total; the scratch memory on the device is."""
    held, scratch, planned, planned_scratch = run("gloo", 2, holds_on_the_host, sharded)[0]
    assert (planned, planned_scratch) == (2 * held, 2 * scratch)
    found = plan(mlp(), ranks=2, averages=1, average_device="cpu")
    assert "on the host" in str(found)
    with pytest.raises(ValueError, match="it is None, or 'cpu' for averages beside an optimizer on GPUs"):
        plan(mlp(), ranks=2, average_device="cpu")
