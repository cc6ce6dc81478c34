"""A model with FSDP1 around some of its layers and plain parameters beside them, and the two optimizers for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, ShardingStrategy, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp

from dist_asgd import ShardedASGD

OPTIONS: dict[str, Any] = {"lr": 0.1, "lambd": 0.01, "t0": 2, "weight_decay": 0.02}


class Model(nn.Module):
    """Some layers, of which a wrapping takes a few, and a parameter that never has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 7)
        self.blocks = nn.Sequential(nn.Linear(7, 3), nn.Linear(3, 7))
        self.norm = nn.LayerNorm(7)
        self.tiny = nn.Linear(7, 1)  # the ranks at the end hold nothing of its bias
        self.head = nn.Linear(1, 2)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tiny(self.norm(self.blocks(self.first(x)))))


def wrapped(kind: str, orig: bool, strategy: str = "FULL_SHARD") -> nn.Module:
    """Make a model with FSDP1 around the parts that ``kind`` names. Collective."""
    model = Model()
    options: dict[str, Any] = {"use_orig_params": orig, "device_id": torch.device("cpu")}
    options["sharding_strategy"] = ShardingStrategy[strategy]
    if strategy.startswith("HYBRID"):
        rank = dist.get_rank()
        nodes, across = ([dist.new_group(ranks) for ranks in pairs] for pairs in (((0, 1), (2, 3)), ((0, 2), (1, 3))))
        options["process_group"] = (nodes[rank // 2], across[rank % 2])
    if kind == "frozen":
        model.first.requires_grad_(False)
        model.norm.requires_grad_(False)
    if kind in ("one", "frozen", "backbone"):
        model.first = Fsdp(model.first, **options)
    if kind == "backbone":
        model.first.requires_grad_(False)
    if kind == "several":
        for name in ("first", "tiny"):
            setattr(model, name, Fsdp(getattr(model, name), **options))
    if kind == "nested":
        model.blocks[1] = Fsdp(model.blocks[1], **options)
        model.blocks = Fsdp(model.blocks, **options)
    if kind == "ignored":
        return Fsdp(model, ignored_states=[model.norm, model.head], **options)
    return model


def of_optimizer(model: nn.Module, kind: str) -> list[Any]:
    """Return what the optimizer of a ``kind`` is given: "several" has plain parameters in a second group alone."""
    params = list(model.parameters())
    if kind == "backbone":
        return [param for param in params if param.requires_grad]
    if kind == "several":
        managed = [p for p in params if hasattr(p, "_fsdp_flattened") or hasattr(p, "_is_flat_param")]
        plain = [p for p in params if not any(p is q for q in managed)]
        return [{"params": managed}, {"params": plain, "lr": 0.05}]
    return params


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    """Train on the same data on every rank, as plain parameters without DDP need in stage 1."""
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()


def ours(model: nn.Module, kind: str, **options: Any) -> ShardedASGD:
    """The optimizer under test."""
    return ShardedASGD(of_optimizer(model, kind), **{**OPTIONS, **options})


def torchs(model: nn.Module, kind: str, **options: Any) -> torch.optim.ASGD:
    """The oracle."""
    return torch.optim.ASGD(of_optimizer(model, kind), **{**OPTIONS, **options}, foreach=False)


def full_config(model: nn.Module, rank0_only: bool, offload: bool = True) -> Any:
    """Return a context in which FSDP1 makes full state dicts."""
    config = FullOptimStateDictConfig(offload_to_cpu=offload, rank0_only=rank0_only)
    return Fsdp.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(), config)


def full(model: nn.Module, optimizer: Any, rank0_only: bool = False, offload: bool = True) -> dict[str, Any]:
    """Return the full state dict that FSDP1 makes; {} beside rank 0 if ``rank0_only``. Collective."""
    with full_config(model, rank0_only, offload):
        return Fsdp.optim_state_dict(model, optimizer)
