"""A small model whose parameters become DTensors in every way that torch offers, and the same model unsharded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.harness.bits import assert_same_bits

KINDS = ("fsdp2", "fsdp2_mixed", "fsdp2_offload", "tp", "fsdp2_tp", "hsdp", "replicas", "hsdp_tp")
# The kinds with replica groups on 4 ranks.
REPLICATED = ("tp", "fsdp2_tp", "hsdp", "replicas", "hsdp_tp")


class Net(nn.Module):
    """Two residual blocks between uneven layers. ``extra`` is for ``ignored_params``; ``unused`` gets no gradient."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(5, 12)
        self.blocks = nn.ModuleList([Block(12), Block(12)])
        self.norm = nn.LayerNorm(12)
        self.last = nn.Linear(12, 3)
        self.extra = nn.Parameter(torch.randn(3))
        self.unused = nn.Parameter(torch.randn(2, 3))
        self.single = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 5)`` to ``(batch, 3)``."""
        hidden = self.first(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.last(self.norm(hidden)) * self.single + self.extra


class Block(nn.Module):
    """A residual block whose two layers are a column-wise and a row-wise one under tensor parallelism."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, width)`` to ``(batch, width)``."""
        return x + self.down(torch.tanh(self.up(x)))


def mesh_of(kind: str, world_size: int) -> DeviceMesh:
    """The mesh for a kind. Collective.

    It has one dimension for fsdp2 and tp, and more for the others; on 4 ranks two of them have 2 ranks each.
    ``replicas`` is HSDP with a single shard.
    """
    if kind == "fsdp2_tp":
        shape = (2, 2) if world_size == 4 else (1, world_size) if world_size == 2 else (world_size, 1)
        return init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    if kind == "hsdp":
        shape = (2, 2) if world_size == 4 else (world_size, 1) if world_size == 2 else (1, world_size)
        return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    if kind == "replicas":
        return init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("replicate", "shard"))
    if kind == "hsdp_tp":
        shape = (2, 1, 2) if world_size == 4 else (world_size, 1, 1)
        return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tp"))
    return init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp" if kind == "tp" else "dp",))


def hybrid_mesh(shape: tuple[int, int]) -> DeviceMesh:
    """A mesh of ``shape`` (replicas, shards) over all ranks. Collective."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


def sharded(kind: str, world_size: int, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """The ``Net`` of ``seed``, sharded as ``kind`` says; ``options`` are for the root's ``fully_shard``. Collective."""
    model: nn.Module = Net(seed).to(dtype)
    mesh = mesh_of(kind, world_size)
    if kind in ("tp", "fsdp2_tp", "hsdp_tp"):
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        for block in model.blocks:
            parallelize_module(block, mesh["tp"], plan)
        distribute_module(model.norm, mesh["tp"], input_fn=_replicated, output_fn=_plain)
    if kind != "tp":
        if kind == "fsdp2_mixed":
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if kind == "fsdp2_offload":
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        mesh = mesh["dp"] if kind == "fsdp2_tp" else mesh["replicate", "shard"] if kind == "hsdp_tp" else mesh
        for block in model.blocks:
            fully_shard(block, mesh=mesh, **options)
        fully_shard(model, mesh=mesh, ignored_params={model.extra}, **options)
    return model


def _replicated(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
    return tuple(DTensor.from_local(value, mesh, [Replicate()], run_check=False) for value in inputs)


def _plain(_: nn.Module, output: Any, __: DeviceMesh) -> Any:
    return output.to_local()


def batch(step: int, rank: int = 0) -> Tensor:
    """The inputs of a step, ``(4, 5)``."""
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(100 * step + rank))


def gradient(name: str, step: int, param: Tensor) -> Tensor:
    """A whole gradient of the parameter's shape, the same on every rank."""
    generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
    return torch.randn(param.shape, generator=generator, dtype=torch.float32).to(param.dtype)


def placed(value: Tensor, param: Tensor) -> Tensor:
    """The whole tensor ``value`` as a DTensor placed like ``param``, or a copy of it if ``param`` is plain."""
    if not isinstance(param, DTensor):
        return value.clone()
    return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor, or a plain tensor itself. Collective."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def set_gradients(model: nn.Module, step: int, skipped: tuple[str, ...] = ()) -> None:
    """Set the gradient of step ``step`` on every trainable parameter except the ``skipped`` ones."""
    for name, param in model.named_parameters():
        full = gradient(name, step, param)
        param.grad = None if name in skipped or not param.requires_grad else placed(full, param)


def assert_same_params(model: nn.Module, plain: nn.Module, when: str) -> None:
    """Assert that every parameter is the same to the bit. Collective."""
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_same_bits(whole(found), expected.detach(), f"{name} {when}")


def assert_same_state(optimizer: Any, oracle: Any, model: nn.Module, plain: nn.Module, when: str) -> None:
    """Assert that the state of every parameter that has stepped is the same to the bit. Collective."""
    for (name, param), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        for key, expected in oracle.state.get(other, {}).items():
            found = optimizer.state[param][key]
            if key != "ax" and found._base is not None:
                found = found.to(expected.dtype)  # a view of the table of scalars, as on a GPU
            if key == "ax" and not isinstance(param, DTensor):
                continue  # this rank's fragment
            if key == "ax":
                assert isinstance(found, DTensor), name
                assert found.placements == param.placements, name
                assert found.device_mesh == param.device_mesh, name
            assert_same_bits(whole(found), expected, f"{key} of {name} {when}")


def dtensors(model: nn.Module) -> Iterator[tuple[str, DTensor]]:
    """The parameters that are DTensors, with their names."""
    return ((name, param) for name, param in model.named_parameters() if isinstance(param, DTensor))


def local(tensor: Tensor) -> Tensor:
    """The local tensor of a DTensor, or a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
