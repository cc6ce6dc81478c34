"""Memory: what a step allocates, and what consolidating holds on the ranks that get nothing."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.profiler import profile

from dist_asgd import ShardedASGD, load_checkpoint, save_checkpoint
from dist_asgd.comm.sums import SUM_NUMEL
from dist_asgd.state_dict.whole_tensors import MAX_BYTES
from tests.harness.cases import every_pair
from tests.harness.models import mlp
from tests.harness.ranks import run

WIDTH, DEPTH = 128, 8
BUCKET_MB = 0.25


def largest_allocation(call: Callable[[], Any]) -> int:
    """The bytes of the largest single tensor that ``call`` allocates on the host."""
    with profile(profile_memory=True) as recorded:
        call()
    sizes = [event.cpu_memory_usage for event in recorded.events() if event.name == "[memory]"]
    sizes += [event.self_cpu_memory_usage for event in recorded.events() if event.name != "[memory]"]
    return max([size for size in sizes if size > 0], default=0)


def make(
    stage: int, form: str, dtype: torch.dtype = torch.float32, bucket_mb: float = BUCKET_MB
) -> tuple[torch.nn.Module, ShardedASGD]:
    """A model of about 2 MB in about 50 tensors."""
    model = mlp(WIDTH, DEPTH).to(dtype)
    return model, ShardedASGD(
        model.parameters(),
        lr=0.1,
        t0=0,
        weight_decay=0.1,
        maximize=True,
        stage=stage,
        foreach=form == "foreach",
        fused=form == "fused",
        bucket_cap_mb=bucket_mb,
    )


def steps_allocate(_rank: int, _world_size: int, stage: int, form: str, dtype: torch.dtype) -> int:
    """Job: after two steps, the largest allocation of a third."""
    model, optimizer = make(stage, form, dtype)

    def step() -> None:
        for p in model.parameters():
            p.grad = gradients[p]
        optimizer.step()
        optimizer.zero_grad()

    gradients = {p: torch.ones_like(p) for p in model.parameters()}
    for _ in range(2):
        step()
    return largest_allocation(step)


@every_pair(
    world=[("none", 1), ("gloo", 2), ("gloo", 4)],
    form=["forloop", "foreach", "fused"],
    kind=itertools.product((1, 2), (torch.float32, torch.bfloat16)),
)
def test_a_step_allocates_no_buffers(world: tuple[str, int], form: str, kind: tuple[int, torch.dtype]) -> None:
    """Control words and scalars only: buckets, shards and scratch are kept."""
    stage, dtype = kind
    for found in run(*world, steps_allocate, stage, form, dtype):
        # Gloo's sum of 16-bit gradients: torch widens a stretch of each.
        summing = stage == 2 and world[1] > 1 and dtype.itemsize == 2
        assert found < (4 * SUM_NUMEL + 4096 if summing else 4096)


def consolidating_allocates(rank: int, _world_size: int) -> tuple[int, int]:
    """Job: the largest allocation while rank 0 gets the state, and the largest bucket's bytes."""
    model, optimizer = make(1, "forloop")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    largest_parameter = max(p.nbytes for p in model.parameters())
    found = largest_allocation(lambda: optimizer.consolidated_state_dict(to=0))
    assert rank >= 0
    return found, max(largest_parameter, int(BUCKET_MB * 2**20))


def test_consolidating_holds_at_most_a_bucket_beside_the_result() -> None:
    """On the other ranks nothing larger than a bucket either."""
    for found, bucket in run("gloo", 4, consolidating_allocates):
        assert found <= bucket + 64 * 64


def consolidating_dtensors_allocates(_rank: int, world_size: int) -> int:
    """Job: the largest allocation while rank 0 gets the state of rows and columns, 1 MB each."""
    mesh = init_device_mesh("cpu", (world_size,))
    whole = torch.zeros(512, 512)
    params = [
        torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(dim)], src_data_rank=None)) for dim in (0, 1) * 8
    ]
    optimizer = ShardedASGD(params, t0=0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return largest_allocation(lambda: optimizer.consolidated_state_dict(to=0))


def test_consolidating_dtensors_gives_the_whole_to_the_target_only() -> None:
    """The others hold what they send: a quarter of what is brought in one go."""
    target, *others = run("gloo", 4, consolidating_dtensors_allocates)
    assert target <= MAX_BYTES
    assert max(others) <= MAX_BYTES // 4


def loading_reads(_rank: int, _world_size: int, stage: int, path: str) -> tuple[int, int]:
    """Job: the bytes that this rank reads to load, and those of the parameters; in buckets of usual size."""
    model, optimizer = make(stage, "fused", bucket_mb=25)
    save_checkpoint(path, model, optimizer, step=0)
    before = bytes_read()
    load_checkpoint(path, model, optimizer)
    return bytes_read() - before, sum(p.nbytes for p in model.parameters())


def bytes_read() -> int:
    """By this process so far, as the system counts."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts what a process reads")
@pytest.mark.parametrize("stage", [1, 2])
def test_a_rank_reads_what_it_updates(stage: int, tmp_path: Path) -> None:
    """Of parameters and averages alike: 2 / 4 of the parameters' bytes, messages, and whatever chunks end elsewhere."""
    for found, whole in run("gloo", 4, loading_reads, stage, str(tmp_path / "saved")):
        assert found < 0.8 * whole
