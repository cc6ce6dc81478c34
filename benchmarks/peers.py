"""The ways of training that are compared: how the model is wrapped, and which optimizer steps it.

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


def _sharded(model: nn.Module, stage: int, foreach: bool | None = None, shard_replicated: bool = True) -> Optimizer:
    # Imported here, so that the peers can be measured where dist_asgd cannot be imported.
    from dist_asgd import ShardedASGD

    return ShardedASGD(
        model.parameters(), **HYPERPARAMETERS, stage=stage, foreach=foreach, shard_replicated=shard_replicated
    )


@dataclass(frozen=True)
class Peer:
    """One way of training. ``key`` names it on the command line, ``label`` in the table; ``stage`` is ShardedASGD's.

    ``fsdp2``: on so many replicas; 0 where it is no FSDP2.
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
        """Whether the state is split, so that there is something to consolidate."""
        return self.ours or self.key == "zero"

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module whose forward and backward are called. With DDP and FSDP2, collective: all ranks, same order."""
        if self.fsdp2:
            # Only where it is wanted: importing FSDP2 takes memory of its own.
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

# By what makes the gradients the same on all ranks; the first of each is the baseline of its ratios.
PARALLEL = {"ddp": PEERS, "fsdp2": FSDP2_PEERS, "hsdp": HSDP_PEERS}


def peer_of(key: str) -> Peer:
    """The peer of this key."""
    return next(peer for peers in PARALLEL.values() for peer in peers if peer.key == key)


def select_peers(keys: Iterable[str] | None, quick: bool = False, parallel: str = "ddp") -> tuple[Peer, ...]:
    """The peers of these keys in the table's order, the baseline always among them; None: all, or QUICK."""
    peers = PARALLEL[parallel]
    if keys is None:
        return tuple(peer for peer in peers if not quick or peer.key in QUICK or peer.fsdp2)
    wanted = set(keys) | {peers[0].key}
    unknown = wanted - {peer.key for peer in peers}
    if unknown:
        raise ValueError(f"unknown peers {sorted(unknown)}; there are {[peer.key for peer in peers]}")
    return tuple(peer for peer in peers if peer.key in wanted)


def consolidate(optimizer: Optimizer, to: int = 0) -> dict[str, Any]:
    """The whole state on rank ``to``, ``{}`` elsewhere. Collective: all ranks, same order."""
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict(to=to)
        return optimizer.state_dict() if torch.distributed.get_rank() == to else {}
    return optimizer.consolidated_state_dict(to=to)  # type: ignore[attr-defined,no-any-return]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``."""
    part: Tensor = getattr(tensor.detach(), "_local_tensor", tensor)  # of a DTensor, without importing them
    return part


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind these tensors: what they keep alive, padding and all."""
    sizes = {}
    for tensor in map(local, tensors):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """The tensors of the state that this rank's process holds."""
    inner = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    for state in inner.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
