"""The CUDA and NCCL paths; skipped where there is no GPU."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dist_asgd import ShardedASGD, ShardedAverage, async_save_checkpoint, load_checkpoint

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
HYPERPARAMETERS = {"lr": 0.1, "t0": 3, "weight_decay": 0.01}


def train_both(device: torch.device, dtype: torch.dtype, form: str, stage: int, scale: float = 1.0) -> None:
    """Ten steps of both optimizers on the same gradients; every rank's gradient is ``scale`` times the mean."""
    torch.manual_seed(0)
    shapes = [(), (3, 5), (257, 129), (1000,)]
    ours = [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    foreach = form == "foreach"
    options = {"foreach": foreach, "fused": form == "fused", "stage": stage, "average_dtype": dtype}
    sharded = ShardedASGD(ours, **HYPERPARAMETERS, **options)
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
@pytest.mark.parametrize("form", ["forloop", "foreach", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_gpu_gives_torchs_bits(dtype: torch.dtype, form: str, stage: int) -> None:
    """Without a process group; the oracle is torch.optim.ASGD of the same form on the same GPU."""
    train_both(torch.device("cuda"), dtype, form, stage)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("drops", [False, True], ids=["nn.LSTM", "weight drop"])
def test_lstm_weights_that_cudnn_takes_away(drops: bool) -> None:
    """``flatten_parameters()`` binds weights to cuDNN's chunk, by hand, or in a forward with a dropped weight."""
    results = []
    for cls in (ShardedASGD, torch.optim.ASGD):
        torch.manual_seed(0)
        layer = torch.nn.LSTM(8, 16).to("cuda")
        optimizer = cls(layer.parameters(), lr=0.1, t0=1)
        for _ in range(6):
            inputs, mask = torch.randn(5, 3, 8, device="cuda"), torch.rand(64, 16, device="cuda") > 0.3
            layer.flatten_parameters()
            weights = {"weight_hh_l0": layer.weight_hh_l0 * mask} if drops else {}
            optimizer.zero_grad()
            torch.func.functional_call(layer, weights, (inputs,))[0].square().mean().backward()
            optimizer.step()
            if isinstance(optimizer, ShardedASGD):
                before = [p.detach().clone() for p in layer.parameters()]
                with torch.no_grad(), optimizer.averaged_parameters():
                    layer.flatten_parameters()
                    layer(inputs)
                assert all(torch.equal(p, kept) for p, kept in zip(layer.parameters(), before, strict=True))
        results.append([p.detach().clone() for p in layer.parameters()])
    for ours, theirs in zip(*results, strict=True):
        # cuDNN may add gradients up in another order each time.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_in_host_memory(dtype: torch.dtype) -> None:
    """Steps follow updates at once; a write that no optimizer makes is found."""
    params = [torch.nn.Parameter(torch.randn(n, device="cuda").to(dtype)) for n in (5_000_001, 33, 1 << 20)]
    optimizer = torch.optim.SGD(params, lr=0.1)
    beside, host = (ShardedAverage(params, decay=0.9, average_device=place) for place in (None, "cpu"))
    for _ in range(10):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        beside.update()
        host.update()
    for param in params:
        assert host.state[param]["ax"].device.type == "cpu"
        assert torch.equal(host.state[param]["ax"], beside.state[param]["ax"].cpu())
    with host.averaged_parameters():
        assert all(torch.equal(p.detach(), beside.state[p]["ax"].to(dtype)) for p in params)
    host.update()
    with torch.no_grad():
        params[0].zero_()
    with pytest.raises(RuntimeError, match=r"a write to parameter 0 came after update\(\)"):
        host.update()


@pytest.mark.gpu
@needs_gpu
def test_a_step_in_a_cuda_graph() -> None:
    """Replayed with an lr that changes on the device, beside the same steps outside of graphs."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(n, device=device)) for n in (1000, 33)]
    theirs = copy.deepcopy(ours)
    rates = [torch.tensor(0.1, device=device) for _ in range(2)]
    options = {"t0": 2, "fused": True}
    captured = ShardedASGD(ours, lr=rates[0], capturable=True, **options)
    eager = ShardedASGD(theirs, lr=rates[1], **options)
    gradients = [torch.randn_like(p) for p in ours]
    for mine, other, gradient in zip(ours, theirs, gradients, strict=True):
        mine.grad, other.grad = gradient.clone(), gradient.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(3):
        eager.step()
    for lr in (0.1, 0.05, 0.2, 0.01):
        for rate in rates:
            rate.fill_(lr)
        graph.replay()
        eager.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        assert torch.equal(captured.state[mine]["ax"], eager.state[other]["ax"])


@pytest.mark.gpu
@needs_gpu
def test_host_scalars_are_not_captured() -> None:
    """They would be repeated for ever."""
    param = torch.nn.Parameter(torch.ones(5, device="cuda"))
    optimizer = ShardedASGD([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def saves_beside_training(device: torch.device, form: str, folder: Path) -> None:
    """Twice in the background, while parameters change; the second loads into a model on the CPU, to the bit."""
    options = {**HYPERPARAMETERS, "foreach": form == "foreach", "fused": form == "fused"}
    model = torch.nn.Sequential(torch.nn.Linear(33, 7), torch.nn.BatchNorm1d(7)).to(device)
    optimizer = ShardedASGD(model.parameters(), **options)
    torch.set_default_device(device)
    try:
        for number in (1, 2):
            model(torch.randn(4, 33)).square().sum().backward()
            optimizer.step()
            wanted = {key: value.cpu().clone() for key, value in model.state_dict().items()}
            state = optimizer.consolidated_state_dict()["state"]
            pending = async_save_checkpoint(folder / str(number), model, optimizer, step=number)
            with torch.no_grad():
                for param in model.parameters():
                    param.zero_()
            pending.wait()
    finally:
        torch.set_default_device(None)
    other = torch.nn.Sequential(torch.nn.Linear(33, 7), torch.nn.BatchNorm1d(7))
    loaded = ShardedASGD(other.parameters(), **HYPERPARAMETERS)
    load_checkpoint(folder / "2", other, loaded)
    assert all(torch.equal(value, wanted[key]) for key, value in other.state_dict().items())
    for index, entry in loaded.consolidated_state_dict()["state"].items():
        assert all(torch.equal(value, state[index][key]) for key, value in entry.items())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("form", ["foreach", "fused"])
def test_a_gpu_saves_while_it_trains(form: str, tmp_path: Path) -> None:
    """Through pinned memory, with the GPU as torch's default device."""
    saves_beside_training(torch.device("cuda"), form, tmp_path)


def _rank(rank: int, world_size: int, store: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=world_size)
    for stage in (1, 2):
        train_both(torch.device("cuda", rank), torch.float32, "foreach", stage)
        train_both(torch.device("cuda", rank), torch.float32, "fused", stage)
        overlapped, plain = (
            trained_in_streams(torch.device("cuda", rank), stage, overlaps) for overlaps in (True, False)
        )
        assert all(torch.equal(a, b) for a, b in zip(overlapped, plain, strict=True))
    dist.barrier()
    dist.destroy_process_group()


def trained_in_streams(device: torch.device, stage: int, overlaps: bool) -> list[torch.Tensor]:
    """Train with a forward in other streams now and then; every rank has the same data."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(8)]).to(device)
    optimizer = ShardedASGD(model.parameters(), **HYPERPARAMETERS, stage=stage, bucket_cap_mb=4)
    if overlaps:
        optimizer.overlap_forward(model)
    side = torch.cuda.Stream(device)
    found: list[torch.Tensor] = []
    for _ in range(4):
        model(torch.ones(8, 1024, device=device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            found.append(model(torch.ones(8, 1024, device=device)))
        torch.cuda.current_stream().wait_stream(side)
    return [*found, *model.parameters()]


@pytest.mark.multi_gpu
@needs_two_gpus
def test_two_gpus_give_torchs_bits(tmp_path: object) -> None:
    """Two NCCL ranks whose gradients are equal, so that the mean is exact."""
    mp.spawn(_rank, args=(2, f"{tmp_path}/store"), nprocs=2)
