"""The CUDA and NCCL paths; skipped where there is no GPU."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dist_asgd import ShardedASGD

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
HYPERPARAMETERS = {"lr": 0.1, "t0": 3, "weight_decay": 0.01}


def train_both(device: torch.device, dtype: torch.dtype, foreach: bool, stage: int, scale: float = 1.0) -> None:
    """Ten steps of both optimizers on the same gradients; every rank's gradient is ``scale`` times the mean."""
    torch.manual_seed(0)
    shapes = [(), (3, 5), (257, 129), (1000,)]
    ours = [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    sharded = ShardedASGD(ours, **HYPERPARAMETERS, foreach=foreach, stage=stage, average_dtype=dtype)
    oracle = torch.optim.ASGD(theirs, **HYPERPARAMETERS, foreach=foreach)
    for _ in range(10):
        for mine, other in zip(ours, theirs, strict=True):
            gradient = torch.randint(-8, 8, mine.shape, device=device).to(dtype)
            mine.grad, other.grad = gradient * scale, gradient
        sharded.step()
        oracle.step()
        sharded.zero_grad()
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    state, wanted = sharded.consolidated_state_dict(to=None)["state"], oracle.state_dict()["state"]
    for index, entry in wanted.items():
        assert all(torch.equal(state[index][key], value.cpu()) for key, value in entry.items())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_gpu_gives_torchs_bits(dtype: torch.dtype, foreach: bool, stage: int) -> None:
    """Without a process group; the oracle is torch.optim.ASGD of the same form on the same GPU."""
    train_both(torch.device("cuda"), dtype, foreach, stage)


def _rank(rank: int, world_size: int, store: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=world_size)
    for stage in (1, 2):
        train_both(torch.device("cuda", rank), torch.float32, True, stage)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.multi_gpu
@needs_two_gpus
def test_two_gpus_give_torchs_bits(tmp_path: object) -> None:
    """Two NCCL ranks whose gradients are equal, so that the mean is exact."""
    mp.spawn(_rank, args=(2, f"{tmp_path}/store"), nprocs=2)
