"""Distributes the model, its gradients and its optimizer's state over the ranks, in one way for each `--parallel`."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from dist_asgd import ShardedASGD
from model import Block, ByteTransformer
from processes import Processes, TrainingError
from tensor_parallel import split_layers


class Mode(StrEnum):
    """The values of --parallel; its help says what each of them shards."""

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
    """A distributed model: the `network` to call in training, and keyword arguments for the optimizer.

    Ranks with the same `data_rank` (of `num_data_ranks`) train on the same data, because they share layers by tensor
    parallelism. `description` is for people.
    """

    network: nn.Module
    optimizer_options: dict[str, Any]
    data_rank: int
    num_data_ranks: int
    description: str

    @contextmanager
    def no_sync(self, optimizer: ShardedASGD) -> Iterator[None]:
        """Inside the block, backward passes accumulate gradients locally, and no gradients are sent."""
        if isinstance(self.network, DistributedDataParallel):
            with self.network.no_sync():
                yield
        elif isinstance(self.network, FSDPModule):
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
    model: nn.Module, mode: Mode, num_replicas: int | None, tensor_parallel: int, processes: Processes
) -> Spread:
    """Wrap or shard `model` as `mode` says; raises TrainingError if the ranks do not allow it. Collective."""
    if not processes.is_distributed:
        if mode in WITH_REPLICAS or mode in WITH_FULLY_SHARD:
            raise TrainingError(f"--parallel {mode} needs process groups: start the trainer with torchrun")
        return Spread(model, {"stage": 2 if mode is Mode.ZERO2 else 1}, 0, 1, str(mode))
    world_size = processes.world_size
    replicas = _replicas(num_replicas, tensor_parallel, processes) if mode in WITH_REPLICAS else 1
    if mode in WITH_FULLY_SHARD:
        return _fully_shard(model, mode, replicas, tensor_parallel, processes)
    options: dict[str, Any] = {"stage": 1 if mode in WRAPPED_IN_DDP else 2}
    text = str(mode)
    if mode is Mode.DDP:
        # On a mesh with one shard every rank is a replica that keeps the whole state.
        options["mesh"] = _mesh(processes, replicate=world_size, shard=1)
    elif mode is Mode.HYBRID:
        options["mesh"] = _mesh(processes, replicate=replicas, shard=world_size // replicas)
        text += f" ({_counted(replicas)})"
    network: nn.Module = model
    if mode in WRAPPED_IN_DDP:
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return Spread(network, options, processes.rank, world_size, text)


def _mesh(processes: Processes, **axes: int) -> DeviceMesh:
    """A mesh with dimensions of these names and sizes. Collective."""
    mesh = init_device_mesh(processes.device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    for group in mesh.get_all_groups():
        # By default the groups of a mesh have torch's timeout of half an hour instead of --timeout.
        distributed_c10d._set_pg_timeout(processes.timeout, group)
    return mesh


def _replicas(num_replicas: int | None, tensor_parallel: int, processes: Processes) -> int:
    """The number of replicas. Collective.

    By default there is one replica on each node, or two on a single node if its ranks can be halved.
    """
    world_size = processes.world_size
    if num_replicas is not None:
        replicas = num_replicas
    else:
        local_sizes = processes.gather(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
        if len(set(local_sizes)) > 1:
            raise TrainingError(f"nodes have {sorted(set(local_sizes))} ranks: say how to cut them with --replicas")
        num_nodes = world_size // local_sizes[0]
        replicas = num_nodes if num_nodes > 1 else 1 if world_size // tensor_parallel % 2 else 2
    if world_size % (replicas * tensor_parallel):
        shared = f" of layers on {tensor_parallel} ranks each" if tensor_parallel > 1 else ""
        raise TrainingError(f"{world_size} ranks cannot be cut into {_counted(replicas)}{shared}: see --replicas")
    return replicas


def _counted(replicas: int) -> str:
    return "1 replica" if replicas == 1 else f"{replicas} replicas"


def _fully_shard(model: nn.Module, mode: Mode, replicas: int, tensor_parallel: int, processes: Processes) -> Spread:
    """Split layers by tensor parallelism, then apply FSDP2 to each block and to the rest of the model. Collective."""
    if not isinstance(model, ByteTransformer):
        raise TrainingError(f"--parallel {mode} shards the blocks of a transformer, which this model has not")
    if processes.world_size % tensor_parallel:
        raise TrainingError(f"--tensor-parallel {tensor_parallel} does not divide the {processes.world_size} ranks")
    shards = processes.world_size // (replicas * tensor_parallel)
    axes = {"replicate": replicas} if mode is Mode.HSDP else {}
    mesh = _mesh(processes, **axes, shard=shards, tensor=tensor_parallel)
    data_mesh = mesh[(*axes, "shard")] if axes else mesh["shard"]
    for block in model.blocks:
        assert isinstance(block, Block)
        if tensor_parallel > 1:
            split_layers(block, mesh["tensor"])
        fully_shard(block, mesh=data_mesh, shard_placement_fn=_placement(block, shards * tensor_parallel))
    fully_shard(model, mesh=data_mesh)
    text = str(mode)
    text += f" ({_counted(replicas)})" if mode is Mode.HSDP else ""
    text += f" on layers split in {tensor_parallel}" if tensor_parallel > 1 else ""
    data_rank = processes.rank // tensor_parallel
    return Spread(model, {}, data_rank, replicas * shards, text)


def _placement(block: Block, num_shards: int) -> Callable[[nn.Parameter], Shard | None]:
    """The dimension by which FSDP2 shards each parameter: 0 by default, for which None stands.

    Stacked matrices are sharded by their rows, dimension 1, if `num_shards` divides these, as FSDP2 requires of every
    dimension but 0.
    """
    stacked = set(block.query_key_value.parameters())

    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter in stacked and parameter.shape[1] % num_shards == 0 else None

    return placement
