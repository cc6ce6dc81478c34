"""ShardedASGD in Accelerate, whose ``prepare`` needs nothing from here in stage 1 and with FSDP2."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import nn

from dist_asgd import ShardedASGD

from .wrappers import sharded_asgd

_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)


def save_whole_state(accelerator: Accelerator, *optimizers: object) -> None:
    """Let every later ``accelerator.save_state()`` gather the state of ``optimizers`` on the main process.

    Called once on every rank, with optimizers before or after ``prepare``. From then on a ``state_dict()`` that would
    be a part is an error on all ranks. With FSDP, whose state Accelerate saves by shards, nothing is changed.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        return
    if accelerator.project_configuration.save_on_each_node and accelerator.num_processes > 1:
        raise ValueError(
            "dist_asgd: save_on_each_node=True would need the whole state on every node. Save to a folder that all "
            "nodes share."
        )
    inner = [sharded_asgd(optimizer) for optimizer in optimizers]
    for optimizer in inner:
        optimizer.whole_state_dicts_only = True

    def gather(*_: object) -> None:
        for optimizer in inner:
            optimizer.consolidate_state_dict(to=0)

    accelerator.register_save_state_pre_hook(gather)


def prepare_stage2(accelerator: Accelerator, *objects: Any) -> Any:
    """Do what ``accelerator.prepare(*objects)`` does, without DDP; one is a ``ShardedASGD(stage=2)``. Collective."""
    optimizers = [obj for obj in objects if isinstance(obj, ShardedASGD)]
    models = [obj for obj in objects if isinstance(obj, nn.Module)]
    if len(models) != 1 or len(optimizers) != 1 or not optimizers[0].reduces_gradients:
        raise ValueError("dist_asgd: prepare_stage2() takes one model and one ShardedASGD(stage=2) at a time.")
    model = prepare_model_stage2(accelerator, models[0], optimizers[0])
    return accelerator.prepare(*(model if obj is models[0] else obj for obj in objects))


def prepare_model_stage2(accelerator: Accelerator, model: nn.Module, optimizer: ShardedASGD) -> Any:
    """``accelerator.prepare_model(model)`` without DDP. Collective: the model takes the values of rank 0, as in DDP."""
    if accelerator.distributed_type not in _PLAIN:
        raise ValueError(
            f"dist_asgd: stage 2 takes the place of DDP, and this is {accelerator.distributed_type}. Use stage=1, and "
            f"do not call prepare_stage2()."
        )
    model = accelerator.prepare_model(model, evaluation_mode=True)
    if accelerator.num_processes > 1:
        with torch.no_grad():
            broadcast([*model.parameters(), *model.buffers()])
    # Accelerate asks the model for it, in accumulate() and no_sync().
    model.no_sync = _NoSync(optimizer)  # type: ignore[assignment]
    return model


class _NoSync:
    """``ShardedASGD.no_sync`` as an attribute of the model; copies and pickles of the model have one without effect."""

    def __init__(self, optimizer: ShardedASGD) -> None:
        self._optimizer = optimizer

    def __call__(self) -> AbstractContextManager[None]:
        return self._optimizer.no_sync()

    def __reduce__(self) -> tuple[Any, ...]:
        return type, (nullcontext(),)  # that is: the class nullcontext
