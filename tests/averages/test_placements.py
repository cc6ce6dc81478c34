"""``ShardedAverage`` on sharded and replicated parameters: the bits of torch's EMA of the whole model in each one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dist_asgd import ShardedAverage, export_averaged, load_checkpoint, save_checkpoint
from tests.harness.bits import assert_same_bits
from tests.harness.ranks import run

TENSOR_PARALLEL = {"0": ColwiseParallel(), "2": RowwiseParallel()}


def built() -> nn.Sequential:
    """The same model on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16), nn.LayerNorm(16))


def placed(layout: str) -> tuple[nn.Sequential, DeviceMesh | None]:
    """The model in one layout of 4 ranks, and the mesh to pass to ``ShardedAverage``."""
    model = built()
    if layout == "hybrid":
        return model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    if layout == "HSDP":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    elif layout == "tensor parallel":
        parallelize_module(model, init_device_mesh("cpu", (4,)), TENSOR_PARALLEL)
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], TENSOR_PARALLEL)
        fully_shard(model, mesh=mesh["data"])
    return model, None


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor; collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def averages(rank: int, _world_size: int, layout: str, folder: str) -> None:
    """Job: an EMA in place, from a checkpoint, and exported."""
    model, mesh = placed(layout)
    average = ShardedAverage(model.named_parameters(), decay=0.9, mesh=mesh)
    expected: list[Tensor] = []
    for step in range(4):
        torch.manual_seed(step)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.0 + torch.rand(()).item())
        average.update()
        now = [whole(p.detach()).clone() for p in model.parameters()]
        if step:
            get_ema_multi_avg_fn(0.9)(expected, now, step)
        else:
            expected = now
    save_checkpoint(f"{folder}/checkpoint", model, average, step=4)
    loaded = ShardedAverage(model.named_parameters(), mesh=mesh)
    load_checkpoint(f"{folder}/checkpoint", model, loaded)
    for of in (average, loaded):
        with of.averaged_parameters():
            for (name, p), q in zip(model.named_parameters(), expected, strict=True):
                assert_same_bits(whole(p.detach()), q, name)
    for (name, p), q in zip(model.named_parameters(), now, strict=True):
        assert_same_bits(whole(p.detach()), q, f"{name} afterwards")
    export_averaged(f"{folder}/export.safetensors", model, loaded)
    if rank == 0:
        exported = load_file(f"{folder}/export.safetensors")
        for (name, _), q in zip(model.named_parameters(), expected, strict=True):
            assert_same_bits(exported[name], q, f"{name} in the export")
    # A quarter of the model on each rank (half with two replicas), but for padding.
    held = average.memory_report().state_bytes
    share = sum(p.nbytes for p in built().parameters()) / (2 if layout == "hybrid" else 4)
    assert share <= held < 1.1 * share


@pytest.mark.parametrize("layout", ["hybrid", "HSDP", "tensor parallel", "tensor parallel and FSDP2"])
def test_an_average_of_every_layout(layout: str, tmp_path: Path) -> None:
    """Each rank has its share of the average, and no more."""
    run("gloo", 4, averages, layout, str(tmp_path))
