"""Runs small models in Lightning's Trainer on the ranks of a job. Import it after ``pytest.importorskip``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from dist_asgd import ShardedASGD

OPTIONS = {"lr": 0.1, "t0": 3, "lambd": 0.01, "weight_decay": 0.01}


class Regression(pl.LightningModule):
    """A small network; ``make`` builds an optimizer of parameters. Losses and validation losses are recorded."""

    def __init__(self, make: Any, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2))
        self.net[0].requires_grad_(not options.get("frozen"))
        self.make, self.options = make, options
        self.losses: list[float] = []
        self.validated: list[torch.Tensor] = []

    def configure_model(self) -> None:
        if self.options.get("fsdp2") and not isinstance(self.net[0].weight, torch.distributed.tensor.DTensor):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def loss(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(self.net(batch[0]))
        self.log("held_out", self.loss(batch), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.named_parameters())
        if not self.options.get("scheduler"):
            return optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Manual(Regression):
    """Manual optimization, with gradients of two batches accumulated by hand."""

    def __init__(self, make: Any, **options: Any) -> None:
        super().__init__(make, **options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, last = self.optimizers(), batch_idx % 2 == 1
        with optimizer.toggle_model(sync_grad=last):
            self.manual_backward(self.loss(batch))
        if last:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
        if self.options.get("scheduler"):
            self.lr_schedulers().step()


class Two(Regression):
    """Two optimizers that take turns, each with the other's parameters switched off."""

    def __init__(self, make: Any, **options: Any) -> None:
        super().__init__(make, **options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            self.manual_backward(self.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [self.make(self.net[0].named_parameters()), self.make(self.net[2].named_parameters())]


def plain(named: Iterator[Any]) -> torch.optim.Optimizer:
    return torch.optim.ASGD(named, foreach=False, **OPTIONS)


def sharded(named: Iterator[Any]) -> torch.optim.Optimizer:
    return ShardedASGD(named, **OPTIONS)


def stage2(named: Iterator[Any]) -> torch.optim.Optimizer:
    return ShardedASGD(named, stage=2, **OPTIONS)


def loader(seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    xs, ys = torch.randn(32, 5, generator=generator), torch.randn(32, 2, generator=generator)
    return DataLoader(TensorDataset(xs, ys), batch_size=4, shuffle=False)


@contextmanager
def launched(rank: int, world_size: int) -> Iterator[None]:
    """What torchrun sets; the process group of the job is there already."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    with patch.dict(os.environ, {name: str(value) for name, value in names.items()}):
        yield


def trainer(world_size: int, **options: Any) -> Any:
    """A Trainer for this rank that prints and writes nothing."""
    options = {"max_epochs": 2, "enable_checkpointing": False, "num_sanity_val_steps": 0} | options
    if world_size > 1:
        options = {"strategy": "ddp", "plugins": []} | options
        options["plugins"] = [*options["plugins"], TorchElasticEnvironment()]
    else:
        options["strategy"] = "auto"
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", devices=world_size, **quiet, **options)


def state_of(module: Any, fitted: Any) -> Any:
    """Weights, whole optimizer states, and losses."""
    states = []
    for optimizer in fitted.optimizers:
        whole = getattr(optimizer, "consolidated_state_dict", None)
        states.append((whole(to=None) if whole else optimizer.state_dict())["state"])
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    return weights, states, module.losses, module.validated


def fit(world_size: int, kind: Any, make: Any, module_options: dict[str, Any], **options: Any) -> Any:
    module, fitting = kind(make, **module_options), trainer(world_size, **options)
    fitting.fit(module, loader(), loader(1))
    return state_of(module, fitting)
