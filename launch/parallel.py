"""How the model, its gradients and its optimizer's state are spread over the ranks: one plan for each `--parallel`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from model import ByteTransformer
from processes import Processes, TrainingError
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from dist_asgd import ShardedASGD


class Mode(StrEnum):
    """What is sharded: nothing; state; gradients and state; parameters too; the latter two inside a node only."""

    DDP = "ddp"
    ZERO1 = "zero1"
    ZERO2 = "zero2"
    FSDP2 = "fsdp2"
    HSDP = "hsdp"
    HYBRID = "hybrid"


WRAPPED_IN_DDP = (Mode.DDP, Mode.ZERO1)
WITH_REPLICAS = (Mode.HSDP, Mode.HYBRID)
WITH_FULLY_SHARD = (Mode.FSDP2, Mode.HSDP)


@dataclass(frozen=True)
class Spread:
    """A model on its ranks: `network` to call in training, and what the optimizer is constructed with.

    Ranks with the same `data_rank` of `num_data_ranks` see the same data: they share layers (tensor parallelism).
    """

    mode: Mode
    network: nn.Module
    optimizer_options: dict[str, Any]
    data_rank: int
    num_data_ranks: int
    description: str

    @contextmanager
    def no_sync(self, optimizer: ShardedASGD) -> Iterator[None]:
        """Backwards inside add to gradients that stay local."""
        if isinstance(self.network, DistributedDataParallel):
            with self.network.no_sync():
                yield
        elif self.mode in WITH_FULLY_SHARD:
            self.network.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                self.network.set_requires_gradient_sync(True)
        elif optimizer.reduces_gradients:
            with optimizer.no_sync():
                yield
        else:
            yield


def spread(
    model: ByteTransformer, mode: Mode, num_replicas: int | None, tensor_parallel: int, processes: Processes
) -> Spread:
    """Wrap or shard `model` as `mode` says. Collective."""
    if not processes.is_distributed:
        if mode in WITH_REPLICAS or mode in WITH_FULLY_SHARD:
            raise TrainingError(f"--parallel {mode} needs process groups: start the trainer with torchrun")
        return Spread(mode, model, {"stage": 2 if mode is Mode.ZERO2 else 1}, 0, 1, str(mode))
    world_size = processes.world_size
    if mode in WITH_FULLY_SHARD:
        return _fully_shard(model, mode, _replicas(mode, num_replicas, world_size), tensor_parallel, processes)
    options: dict[str, Any] = {"stage": 1 if mode in WRAPPED_IN_DDP else 2}
    text = str(mode)
    if mode is Mode.DDP:
        # Every rank is a replica with all of the state.
        options["mesh"] = _mesh(processes, replicate=world_size, shard=1)
    elif mode is Mode.HYBRID:
        replicas = _replicas(mode, num_replicas, world_size)
        options["mesh"] = _mesh(processes, replicate=replicas, shard=world_size // replicas)
        text += f" ({replicas} replicas)"
    network: nn.Module = model
    if mode in WRAPPED_IN_DDP:
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return Spread(mode, network, options, processes.rank, world_size, text)


def _mesh(processes: Processes, **axes: int) -> DeviceMesh:
    return init_device_mesh(processes.device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))


def _replicas(mode: Mode, asked: int | None, world_size: int) -> int:
    if mode is Mode.FSDP2:
        return 1
    replicas = _default_replicas(world_size) if asked is None else asked
    if world_size % replicas:
        raise TrainingError(f"--replicas {replicas} does not divide the {world_size} ranks")
    return replicas


def _default_replicas(world_size: int) -> int:
    """One for each node; two on a single one with an even number of ranks."""
    num_nodes = world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return num_nodes if num_nodes > 1 else 2 - world_size % 2


def _fully_shard(
    model: ByteTransformer, mode: Mode, replicas: int, tensor_parallel: int, processes: Processes
) -> Spread:
    """FSDP2 over blocks and the rest, on `replicas` replicas, over feed-forward layers that are split already."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if processes.world_size % (replicas * tensor_parallel):
        raise TrainingError(
            f"{replicas} replicas of layers on {tensor_parallel} ranks do not divide the {processes.world_size} ranks: "
            "see --replicas and --tensor-parallel"
        )
    shards = processes.world_size // (replicas * tensor_parallel)
    axes = {"replicate": replicas} if mode is Mode.HSDP else {}
    mesh = _mesh(processes, **axes, shard=shards, tensor=tensor_parallel)
    data_mesh = mesh[(*axes, "shard")] if axes else mesh["shard"]
    for block in model.blocks:
        if tensor_parallel > 1:
            layers = {"feed_in": ColwiseParallel(), "feed_out": RowwiseParallel()}
            parallelize_module(block, mesh["tensor"], layers)
        fully_shard(block, mesh=data_mesh)
    fully_shard(model, mesh=data_mesh)
    text = str(mode)
    text += f" ({replicas} replicas)" if mode is Mode.HSDP else ""
    text += f" on feed-forward layers split in {tensor_parallel}" if tensor_parallel > 1 else ""
    data_rank = processes.rank // tensor_parallel
    return Spread(mode, model, {}, data_rank, replicas * shards, text)
