"""One model and optimizer under any topology, trained on the same gradients to the same bits, for checkpoint tests.

A topology is ``single`` (one process), ``stage1``, ``stage2``, ``fsdp2`` (``fully_shard`` and ``torch.optim.ASGD``),
``fsdp2-sharded`` (the same and ``ShardedASGD``), ``hsdp`` and ``hsdp-sharded`` (both on 2 replicas), ``hybrid``
(stage 2 on a mesh with 1 or 2 shards and 2 or more replicas), ``torch`` (``torch.optim.ASGD`` alone), ``tp`` (tensor
parallelism over all ranks and ``ShardedASGD``), ``tp-torch`` (the same and ``torch.optim.ASGD``), or ``fsdp2-tp1`` and
``fsdp2-tp2`` (``fully_shard`` on tensor parallelism over 1 or 2 ranks, and ``ShardedASGD``).
Gradients are set by hand. They are small multiples of a power of two, so that means over ranks are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_asgd import ShardedASGD
from tests.harness.bits import assert_same_bits
from tests.harness.meshes import hybrid_mesh
from tests.harness.models import mlp, odd_net

OPTIONS: dict[str, Any] = {"lr": 0.0625, "t0": 2, "weight_decay": 0.01, "lambd": 1e-3, "foreach": False}


WITH_TORCHS_OPTIMIZER = ("torch", "fsdp2", "hsdp", "tp-torch")


@dataclass
class Run:
    """A model, its optimizer, and the number of steps that they have taken."""

    topology: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    num_steps: int = 0

    def train(self, num_steps: int) -> Run:
        """Take steps with gradients that depend on the step and the parameter's name only; returns itself."""
        for _ in range(num_steps):
            self.optimizer.zero_grad()
            for name, param in self.model.named_parameters():
                if param.requires_grad and name != "unused":
                    param.grad = _like(gradient(name, self.num_steps, param), param)
            self.optimizer.step()
            self.num_steps += 1
        return self


def gradient(name: str, step: int, param: Tensor) -> Tensor:
    """A whole gradient, which is the same on every rank, with the strides of its parameter."""
    generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
    values = torch.randint(-64, 65, param.shape, generator=generator).to(param.dtype) / 256
    return torch.empty_like(param, layout=torch.strided).copy_(values) if type(param) is nn.Parameter else values


def build(topology: str, kind: str = "mlp", seed: int = 0) -> Run:
    """A fresh model of ``kind`` (mlp, narrow, odd, complex or bfloat16) and its optimizer. Collective."""
    model: nn.Module = odd_net(seed) if kind == "odd" else mlp(width=3 if kind == "narrow" else 8, depth=1, seed=seed)
    if kind == "complex":
        model.register_parameter("wave", nn.Parameter(torch.full((3, 5), 1 + 2j)))
    if kind == "bfloat16":
        model.to(torch.bfloat16)
    model.register_buffer("seen", torch.full((2,), float(seed)))
    if topology.startswith(("fsdp2", "hsdp", "tp")):
        _shard(model, topology)
    if topology in WITH_TORCHS_OPTIMIZER:
        return Run(topology, model, torch.optim.ASGD(model.parameters(), **OPTIONS))
    mesh = None
    if topology == "hybrid":
        import torch.distributed as dist

        num_shards = dist.get_world_size() // 2
        mesh = hybrid_mesh((dist.get_world_size() // num_shards, num_shards))
    stage = 2 if topology in ("stage2", "hybrid") else 1
    optimizer = ShardedASGD(model.parameters(), stage=stage, bucket_cap_mb=0.001, mesh=mesh, **OPTIONS)
    return Run(topology, model, optimizer)


def _shard(model: nn.Module, topology: str) -> None:
    """Make DTensors of the parameters; under tensor parallelism alone the norms stay plain. Collective."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    world_size = dist.get_world_size()
    replicas = 2 if topology.startswith("hsdp") else 1
    tensor = world_size if topology.startswith("tp") else 2 if topology == "fsdp2-tp2" else 1
    axes = ("replicate", "shard", "tensor")
    mesh = init_device_mesh("cpu", (replicas, world_size // replicas // tensor, tensor), mesh_dim_names=axes)
    if "tp" in topology:
        # One of 3 ranks has no row of the last layer. In narrow models one of 4 ranks has no column of any layer.
        plan = {"0": ColwiseParallel(), "1.up": ColwiseParallel(), "1.down": RowwiseParallel(), "2": ColwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
    if not topology.startswith("tp"):
        fully_shard(model, mesh=mesh["replicate", "shard"] if replicas > 1 else mesh["shard"])


def _like(whole: Tensor, param: Tensor) -> Tensor:
    """``whole`` with the placement of ``param``. Nothing is sent: torch cannot scatter uneven shards of FSDP2 on TP."""
    if not hasattr(param, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None)


def whole_state(run: Run) -> dict[str, Tensor]:
    """Every parameter, buffer and state tensor, whole and by name. Collective."""
    found = {f"model.{name}": _whole(value) for name, value in run.model.state_dict().items()}
    names = [name for name, _ in run.model.named_parameters()]
    if isinstance(run.optimizer, ShardedASGD):
        state = run.optimizer.consolidated_state_dict(to=None)["state"]
    else:
        state = run.optimizer.state_dict()["state"]
    for index, entry in state.items():
        for key, value in entry.items():
            found[f"{key} of {names[index]}"] = _whole(value)
    return found


def _whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


def assert_same_state(run: Run, expected: dict[str, Tensor]) -> None:
    """Assert that ``whole_state`` is ``expected`` to the bit. Collective."""
    found = whole_state(run)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_bits(found[name], value, f"{name} after {run.num_steps} steps of {run.topology}")
