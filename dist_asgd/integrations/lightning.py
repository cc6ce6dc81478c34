"""Lightning: a callback that validates and saves with the average, and ``Stage2Strategy``. Stage 1 needs neither."""

import copy
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor

from dist_asgd import ShardedASGD

from .lightning_stage2 import Stage2Strategy as Stage2Strategy


class AveragedWeights(pl.Callback):
    """Validates with the averages of all ``ShardedASGD``, and stores them as the ``state_dict`` of checkpoints.

    As with Lightning's ``WeightAveraging``, the weights that training goes on from are ``current_model_state`` in the
    checkpoint, and from the end of training on the model has the averages. What cannot be is a ValueError on all ranks.
    """

    def __init__(self) -> None:
        self._swap = ExitStack()
        # On rank 0 what training would go on from, once the averages have been put into the model for good.
        self._last: dict[str, Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = None
        if not any(isinstance(optimizer, ShardedASGD) for optimizer in trainer.optimizers):
            raise ValueError("dist_asgd: AveragedWeights without a ShardedASGD. Return one in configure_optimizers().")
        if any(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks):
            what = "dist_asgd: ModelCheckpoint(save_weights_only=True) asks no callback, so its files would not hold"
            raise ValueError(f"{what} the averages. Leave save_weights_only out, or AveragedWeights.")

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # After fit() the model has the averages, or what was loaded since.
        for optimizer in trainer.optimizers if trainer.state.fn == "fit" else []:
            if isinstance(optimizer, ShardedASGD):
                self._swap.enter_context(optimizer.averaged_parameters())

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._swap.close()

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = _copied(trainer)
        with self._swap:
            self.on_validation_epoch_start(trainer, pl_module)
            averages = [param.clone() for param in pl_module.parameters()]
        for param, average in zip(pl_module.parameters(), averages, strict=True):
            param.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        return {"state_dict": "averages"}  # not empty, so that Lightning warns who resumes without this callback

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        if any(isinstance(value, DTensor) for value in checkpoint["state_dict"].values()):
            what = "dist_asgd: AveragedWeights cannot save distributed checkpoints. Leave it out, or pass"
            raise ValueError(f"{what} ModelParallelStrategy(save_distributed_checkpoint=False).")
        checkpoint["current_model_state"] = checkpoint["state_dict"] if self._last is None else self._last
        if self._last is None:
            with self._swap:
                self.on_validation_epoch_start(trainer, pl_module)
                checkpoint["state_dict"] = _copied(trainer)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        if trainer.state.fn == "fit" and "current_model_state" in checkpoint:
            options = StateDictOptions(full_state_dict=True, strict=pl_module.strict_loading)
            set_model_state_dict(pl_module, checkpoint["current_model_state"], options=options)


def _copied(trainer: pl.Trainer) -> dict[str, Any]:
    state = trainer.strategy.lightning_module_state_dict()  # collective for FSDP2
    return {name: copy.deepcopy(value) for name, value in state.items()} if trainer.is_global_zero else {}
