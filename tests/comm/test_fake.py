"""Thousands of ranks, one process: torch's ``fake`` group moves no data, so tests compare layouts and keys only."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_asgd import ShardedASGD
from dist_asgd.checkpoint.staging import StagingArea
from tests.harness.bits import assert_same_bits

SHAPES = [(700, 300), (300,), (1,), (64, 64, 3), (), (129,)] * 3


@pytest.fixture
def fake_group(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """A fake default group with the (rank, world size) that the test asks for."""
    rank, world_size = request.param
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    yield rank, world_size
    dist.destroy_process_group()


def params() -> list[nn.Parameter]:
    """A model of odd shapes, large against 1,024 ranks, small against 16,384 times 64 bytes."""
    return [nn.Parameter(torch.ones(shape)) for shape in SHAPES]


RANKS = [(0, 1024), (511, 1024), (1023, 1024), (0, 16384), (16383, 16384)]


@pytest.mark.parametrize("fake_group", RANKS, indirect=True, ids=str)
@pytest.mark.parametrize("stage", [1, 2])
def test_construction_and_state_at_thousands_of_ranks(fake_group: tuple[int, int], stage: int) -> None:
    """Every rank has every key of every parameter, and no more bytes than its shard and the padding."""
    _, world_size = fake_group
    model = params()
    optimizer = ShardedASGD(model, stage=stage)
    for p in model:
        assert set(optimizer.state[p]) == {"step", "eta", "mu", "ax"}
        assert optimizer.state[p]["ax"].dim() == 1
        assert optimizer.state[p]["ax"].numel() <= p.numel()
    report = optimizer.memory_report()
    total = sum(p.nbytes for p in model)
    num_buckets = 16
    assert report.full_state_bytes == total
    assert report.state_bytes <= total / world_size + 64 * (len(model) / world_size + num_buckets)


def shard_bytes(rank: int, world_size: int) -> int:
    """The bytes of ``ax`` on one rank."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        return ShardedASGD(params()).memory_report().state_bytes
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [8, 64, 1024])
def test_no_rank_holds_more_than_another(world_size: int) -> None:
    """Imbalance (max / mean) is 1, where ``ZeroRedundancyOptimizer`` has 1.02 to 103."""
    found = {shard_bytes(rank, world_size) for rank in (0, 1, world_size // 2, world_size - 1)}
    assert len(found) == 1


def test_the_slices_of_all_ranks_are_the_parameters() -> None:
    """Every element is in exactly one rank's state."""
    world_size = 96
    counts = [0] * len(SHAPES)
    for rank in range(world_size):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        model = params()
        optimizer = ShardedASGD(model)
        for index, p in enumerate(model):
            counts[index] += optimizer.state[p]["ax"].numel()
        dist.destroy_process_group()
    assert counts == [p.numel() for p in params()]


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize("fake_group", [(0, 2)], indirect=True, ids=str)
@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
def test_what_is_offloaded_stays_on_the_host(placement: Placement) -> None:
    """DTensors on a mesh of GPUs with their elements on the host, as FSDP2's CPUOffloadPolicy leaves them."""
    mesh = DeviceMesh("cuda", torch.arange(2), _init_backend=False, _rank=0)

    def offloaded(local: Tensor) -> DTensor:
        shape = torch.Size((4, 3)) if placement.is_shard() else local.shape
        return DTensor(
            local, DTensorSpec(mesh, (placement,), TensorMeta(shape, (3, 1), local.dtype)), requires_grad=False
        )

    param, plain = nn.Parameter(offloaded(torch.ones(2, 3))), nn.Parameter(torch.ones(2, 3))
    options = {"lr": 0.1, "t0": 0, "foreach": False}
    optimizer, oracle = ShardedASGD([param], **options), torch.optim.ASGD([plain], **options)
    for step in range(4):
        plain.grad = torch.full((2, 3), 1.0 + step)
        param.grad = offloaded(plain.grad.clone())
        optimizer.step()
        oracle.step()
        if step == 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    average = oracle.state[plain]["ax"]
    assert_same_bits(param.to_local(), plain, "parameter")
    for shown in (optimizer.state[param]["ax"], optimizer.state_dict()["state"][0]["ax"]):
        # A replica has its part, the fake group brings no other.
        assert_same_bits(shown.to_local().flatten(), average.flatten()[: shown.to_local().numel()], "average")
    stage = StagingArea()
    saved = stage.copy({"model": {"param": param}})["model"]["param"].to_local()
    with torch.no_grad():
        param.to_local().zero_()
    assert_same_bits(saved, plain, "staged parameter, while training goes on")
    again = stage.copy({"model": {"param": param}})["model"]["param"].to_local()
    assert again.data_ptr() == saved.data_ptr()
    assert not again.any()
