"""The ways of training that the benchmarks compare: one table, ``PEERS``, with a line for each.

Vocabulary
    peer   a wrapping of the model (none, DDP with or without gradient views, FSDP2, HSDP, or another library's) and an
           optimizer
    views  DDP's ``gradient_as_bucket_view``: gradients live in DDP's buckets, not beside them
    state  the tensors an optimizer keeps for itself; ASGD's is ``ax`` and three scalars a parameter
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import ASGD, Optimizer

from benchmarks.training import DeepSpeed, FairScale, Training

# t0=0: averaging runs from the second step on (mu != 1), so that the update does all of its work.
HYPERPARAMETERS: dict[str, Any] = {"lr": 0.05, "lambd": 1e-4, "alpha": 0.75, "t0": 0.0}

QUICK = ("ddp", "zero", "stage1-views", "stage2", "stage2-backward")


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


def _fairscale(model: nn.Module) -> Training:
    return FairScale(model, ASGD, HYPERPARAMETERS)


def _deepspeed(model: nn.Module, stage: int) -> Training:
    return DeepSpeed(model, _asgd, stage)


@dataclass(frozen=True)
class Peer:
    """One way of training. ``key`` names it on the command line, and ``label`` in the tables.

    ``stage`` is ShardedASGD's, or 0 for another optimizer. ``fsdp2`` is the number of replicas under FSDP2 or HSDP,
    or 0 for another wrapping. ``library`` starts a training that is not a wrapping and an optimizer of torch's kind.
    ``usual`` peers are measured unless the command line names others, on ``least_ranks`` or more.
    """

    key: str
    label: str
    make_optimizer: Callable[[nn.Module], Optimizer] = field(repr=False)
    stage: int = 0
    gradient_views: bool = False
    fsdp2: int = 0
    library: Callable[[nn.Module], Training] | None = field(default=None, repr=False)
    usual: bool = True

    @property
    def least_ranks(self) -> int:
        """The fewest ranks on which this is another peer than the rest: HSDP needs replicas of several shards."""
        return 2 * self.fsdp2 if self.fsdp2 > 1 else 1

    @property
    def ours(self) -> bool:
        """Whether the optimizer is this repository's."""
        return self.stage > 0

    @property
    def ddp(self) -> bool:
        """Whether DDP reduces the gradients."""
        return self.stage != 2 and not self.fsdp2 and self.library is None

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

    def train(self, model: nn.Module) -> Training:
        """Wrap the model and construct the optimizer. Collective."""
        if self.library is not None:
            return self.library(model)
        wrapped = self.wrap(model)
        return Training(wrapped, self.make_optimizer(model))


REPLICAS = 2
_STAGE1 = partial(_sharded, stage=1)
_STAGE2 = partial(_sharded, stage=2)
_FOREACH1 = partial(_STAGE1, foreach=True)
_FOREACH = partial(_asgd, foreach=True)
_LOOP = partial(_asgd, foreach=False)

# The first is the 1.00 of the ratios.
PEERS = (
    Peer("ddp", "DDP + torch.optim.ASGD", _asgd),
    Peer("ddp-views", "DDP (views) + torch.optim.ASGD", _asgd, gradient_views=True),
    Peer("zero", "DDP (views) + ZeroRedundancyOptimizer (views)", _zero, gradient_views=True),
    Peer("fairscale", "fairscale ShardedDDP + OSS", _asgd, library=_fairscale),
    Peer("deepspeed1", "DeepSpeed ZeRO-1 + torch.optim.ASGD", _asgd, library=partial(_deepspeed, stage=1)),
    Peer("deepspeed2", "DeepSpeed ZeRO-2 + torch.optim.ASGD", _asgd, library=partial(_deepspeed, stage=2)),
    Peer("fsdp2", "FSDP2 + torch.optim.ASGD, foreach", _FOREACH, fsdp2=1),
    Peer("fsdp2-loop", "FSDP2 + torch.optim.ASGD, for-loop", _LOOP, fsdp2=1, usual=False),
    Peer("fsdp2-sharded", "FSDP2 + ShardedASGD", _STAGE1, stage=1, fsdp2=1),
    Peer("fsdp2-sharded-foreach", "FSDP2 + ShardedASGD, foreach", _FOREACH1, stage=1, fsdp2=1, usual=False),
    Peer("hsdp", "HSDP + torch.optim.ASGD, foreach", _FOREACH, fsdp2=REPLICAS),
    Peer("hsdp-loop", "HSDP + torch.optim.ASGD, for-loop", _LOOP, fsdp2=REPLICAS, usual=False),
    Peer("hsdp-sharded", "HSDP + ShardedASGD", _STAGE1, stage=1, fsdp2=REPLICAS),
    Peer(
        "hsdp-unshared",
        "HSDP + ShardedASGD, shard_replicated=False",
        partial(_STAGE1, shard_replicated=False),
        stage=1,
        fsdp2=REPLICAS,
        usual=False,
    ),
    Peer("stage1", "DDP + ShardedASGD stage 1", _STAGE1, stage=1, usual=False),
    Peer("stage1-views", "DDP (views) + ShardedASGD stage 1", _STAGE1, stage=1, gradient_views=True),
    Peer(
        "stage1-views-foreach",
        "DDP (views) + ShardedASGD stage 1, foreach",
        _FOREACH1,
        stage=1,
        gradient_views=True,
        usual=False,
    ),
    Peer("stage2", "ShardedASGD stage 2", _STAGE2, stage=2),
    Peer(
        "stage2-messages",
        "ShardedASGD stage 2, shared_memory=False",
        partial(_STAGE2, shared_memory=False),
        stage=2,
        usual=False,
    ),
    Peer("stage2-backward", "ShardedASGD stage 2, step_in_backward", partial(_STAGE2, step_in_backward=True), stage=2),
    Peer("stage2-foreach", "ShardedASGD stage 2, foreach", partial(_STAGE2, foreach=True), stage=2, usual=False),
)


def peer_of(key: str) -> Peer:
    """The peer with this key."""
    return next(peer for peer in PEERS if peer.key == key)


def select_peers(keys: Iterable[str] | None, quick: bool = False) -> tuple[Peer, ...]:
    """The baseline and the peers with these keys, in the order of the table.

    None stands for the usual peers, or for those of QUICK. Raises ValueError for an unknown key.
    """
    if keys is None:
        return tuple(peer for peer in PEERS if (peer.key in QUICK if quick else peer.usual))
    wanted = set(keys) | {PEERS[0].key}
    unknown = wanted - {peer.key for peer in PEERS}
    if unknown:
        raise ValueError(f"unknown peers {sorted(unknown)}; there are {[peer.key for peer in PEERS]}")
    return tuple(peer for peer in PEERS if peer.key in wanted)


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
