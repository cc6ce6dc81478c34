"""The ways of training that the benchmarks compare: a wrapping of the model, and an optimizer.

Vocabulary
    peer   a wrapping (plain, DDP with or without gradient views, FSDP2 or HSDP) and an optimizer
    views  DDP's ``gradient_as_bucket_view``: gradients live in DDP's buckets, not beside them
    state  the tensors an optimizer keeps for itself; ASGD's is ``ax`` and three scalars a parameter
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import ASGD, Optimizer

# t0=0: averaging runs from the second step on (mu != 1), so that the update does all of its work.
HYPERPARAMETERS: dict[str, Any] = {"lr": 0.05, "lambd": 1e-4, "alpha": 0.75, "t0": 0.0}

QUICK = ("ddp", "zero", "stage1-views", "stage2")


def _asgd(model: nn.Module, foreach: bool | None = None) -> Optimizer:
    return ASGD(model.parameters(), **HYPERPARAMETERS, foreach=foreach)


def _zero(model: nn.Module) -> Optimizer:
    return ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=ASGD, parameters_as_bucket_view=True, **HYPERPARAMETERS
    )


def _sharded(model: nn.Module, stage: int, **options: Any) -> Optimizer:
    # Imported here, so that the peers can be measured where dist_asgd cannot be imported.
    from dist_asgd import ShardedASGD

    return ShardedASGD(model.parameters(), **HYPERPARAMETERS, stage=stage, **options)


@dataclass(frozen=True)
class Peer:
    """One way of training. ``key`` names it on the command line, and ``label`` in the tables.

    ``stage`` is ShardedASGD's, or 0 for another optimizer. ``fsdp2`` is the number of replicas under FSDP2 or HSDP,
    or 0 for another wrapping.
    """

    key: str
    label: str
    make_optimizer: Callable[[nn.Module], Optimizer] = field(repr=False)
    stage: int = 0
    gradient_views: bool = False
    fsdp2: int = 0

    @property
    def ours(self) -> bool:
        """Whether the optimizer is this repository's."""
        return self.stage > 0

    @property
    def ddp(self) -> bool:
        """Whether DDP reduces the gradients."""
        return self.stage != 2 and not self.fsdp2

    @property
    def consolidates(self) -> bool:
        """Whether the state is sharded, so that it can be consolidated."""
        return self.ours or self.key == "zero"

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module whose forward and backward are called. Collective with DDP and FSDP2."""
        if self.fsdp2:
            # Imported here, because importing FSDP2 takes memory that would count for other peers, too.
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            names, shape = ("replicate", "shard"), (self.fsdp2, torch.distributed.get_world_size() // self.fsdp2)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            mesh = mesh if self.fsdp2 > 1 else mesh["shard"]
            for block in model.get_submodule("blocks").children():
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            return model
        if not self.ddp:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=self.gradient_views)


_STAGE1 = partial(_sharded, stage=1)
_STAGE2 = partial(_sharded, stage=2)

PEERS = (
    Peer("ddp", "DDP + torch.optim.ASGD", _asgd),
    Peer("ddp-views", "DDP (views) + torch.optim.ASGD", _asgd, gradient_views=True),
    Peer("zero", "DDP (views) + ZeroRedundancyOptimizer (views)", _zero, gradient_views=True),
    Peer("stage1", "DDP + ShardedASGD stage 1", _STAGE1, stage=1),
    Peer("stage1-views", "DDP (views) + ShardedASGD stage 1", _STAGE1, stage=1, gradient_views=True),
    Peer("stage2", "ShardedASGD stage 2", _STAGE2, stage=2),
    Peer("stage2-backward", "ShardedASGD stage 2, step_in_backward", partial(_STAGE2, step_in_backward=True), stage=2),
    Peer(
        "stage1-views-foreach",
        "DDP (views) + ShardedASGD stage 1, foreach",
        partial(_STAGE1, foreach=True),
        stage=1,
        gradient_views=True,
    ),
    Peer("stage2-foreach", "ShardedASGD stage 2, foreach", partial(_STAGE2, foreach=True), stage=2),
)

FSDP2_PEERS = (
    Peer("fsdp2", "FSDP2 + torch.optim.ASGD, foreach", partial(_asgd, foreach=True), fsdp2=1),
    Peer("fsdp2-loop", "FSDP2 + torch.optim.ASGD, for-loop", partial(_asgd, foreach=False), fsdp2=1),
    Peer("fsdp2-sharded", "FSDP2 + ShardedASGD", _STAGE1, stage=1, fsdp2=1),
    Peer("fsdp2-sharded-foreach", "FSDP2 + ShardedASGD, foreach", partial(_STAGE1, foreach=True), stage=1, fsdp2=1),
)

REPLICAS = 2
_UNSHARED = partial(_STAGE1, shard_replicated=False)

HSDP_PEERS = (
    Peer("hsdp", "HSDP + torch.optim.ASGD, foreach", partial(_asgd, foreach=True), fsdp2=REPLICAS),
    Peer("hsdp-loop", "HSDP + torch.optim.ASGD, for-loop", partial(_asgd, foreach=False), fsdp2=REPLICAS),
    Peer("hsdp-sharded", "HSDP + ShardedASGD", _STAGE1, stage=1, fsdp2=REPLICAS),
    Peer("hsdp-unshared", "HSDP + ShardedASGD, shard_replicated=False", _UNSHARED, stage=1, fsdp2=REPLICAS),
)

# Peers by the wrapping that makes gradients the same on all ranks. The first of each is the baseline of the ratios.
PARALLEL = {"ddp": PEERS, "fsdp2": FSDP2_PEERS, "hsdp": HSDP_PEERS}


def peer_of(key: str) -> Peer:
    """The peer with this key."""
    return next(peer for peers in PARALLEL.values() for peer in peers if peer.key == key)


def select_peers(keys: Iterable[str] | None, quick: bool = False, parallel: str = "ddp") -> tuple[Peer, ...]:
    """The baseline and the peers with these keys, in the order of the table.

    None stands for all peers, or for those of QUICK. Raises ValueError for an unknown key.
    """
    peers = PARALLEL[parallel]
    if keys is None:
        return tuple(peer for peer in peers if not quick or peer.key in QUICK or peer.fsdp2)
    wanted = set(keys) | {peers[0].key}
    unknown = wanted - {peer.key for peer in peers}
    if unknown:
        raise ValueError(f"unknown peers {sorted(unknown)}; there are {[peer.key for peer in peers]}")
    return tuple(peer for peer in peers if peer.key in wanted)


def consolidate(optimizer: Optimizer, to: int = 0) -> dict[str, Any]:
    """The whole state on rank ``to``, and ``{}`` on the others. Collective."""
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict(to=to)
        return optimizer.state_dict() if torch.distributed.get_rank() == to else {}
    return optimizer.consolidated_state_dict(to=to)  # type: ignore[attr-defined,no-any-return]


def local(tensor: Tensor) -> Tensor:
    """The local tensor of a DTensor, or a plain tensor itself."""
    # Asking for the attribute recognises a DTensor without importing DTensors.
    local_tensor: Tensor = getattr(tensor.detach(), "_local_tensor", tensor)
    return local_tensor


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the distinct storages behind these tensors, which include padding."""
    sizes = {}
    for tensor in map(local, tensors):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """The tensors of the optimizer's state on this rank."""
    inner = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    for state in inner.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
