"""torchtitan: its containers and checkpoints around FSDP2; trains on torch's own sources, resumes and exports.

Its Trainer needs an accelerator, so a loop stands in for it here. Start it in the root of the repository:
torchrun --standalone --nproc-per-node 2 -m launch.examples.torchtitan runs/torchtitan"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer

from dist_asgd import ShardedASGD, export_averaged

STEPS = 1000


class ASGDContainer(OptimizersContainer):
    """One ShardedASGD for each part of the model: Trainer.Config(optimizer=ASGDContainer.Config(lr=..., t0=...))."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        lr: float
        t0: float = 1e6

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        self.model_parts = model_parts
        self.optimizers = [ShardedASGD(part.named_parameters(), lr=config.lr, t0=config.t0) for part in model_parts]
        torch.optim.Optimizer.__init__(self, [p for part in model_parts for p in part.parameters()], {})


def build(model: nn.Module, config: Any, folder: Path) -> tuple[Any, Any, Any]:
    """What torchtitan's Trainer builds: optimizers, schedulers and checkpoints; `config` is that of the optimizers."""
    optimizers = config.build(model_parts=[model])
    schedulers = LRSchedulersContainer.Config(warmup_steps=10).build(optimizers=optimizers, training_steps=10 * STEPS)
    parts = {"model_parts": [model], "optimizers": optimizers, "lr_schedulers": schedulers, "dataloader": None}
    saving = CheckpointManager.Config(enable=True, interval=STEPS // 2, last_save_model_only=False)
    return optimizers, schedulers, saving.build(states={}, sd_adapter=None, base_folder=str(folder), **parts)


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:  # in nats, of predicting the last byte of each window
    return nn.functional.cross_entropy(model(windows[:, :-1].long()), windows[:, -1].long())


def main(folder: Path) -> None:
    """Train for half of the steps, start anew from the checkpoint, and compare the average with the last iterate."""
    dist.init_process_group("gloo")
    files = sorted(Path(torch.__file__).parent.glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    train, held_out = text[200_000:].unfold(0, 17, 1), text[:200_000].unfold(0, 17, 17)
    for first in (0, STEPS // 2):
        torch.manual_seed(0)
        layers = nn.Embedding(256, 32), nn.Flatten(-2), nn.Linear(512, 256), nn.Tanh(), nn.Linear(256, 256)
        fully_shard(model := nn.Sequential(*layers))
        container, schedulers, checkpointer = build(model, ASGDContainer.Config(lr=1.0, t0=0.75 * STEPS), folder)
        assert checkpointer.load() == (first > 0)
        for step in range(first, first + STEPS // 2):
            random = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
            torch.autograd.backward(loss_of(model, train[torch.randint(len(train), (64,), generator=random)]))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            container.step()
            schedulers.step()
            container.zero_grad()
        checkpointer.save(step + 1, last_step=True)
    iterate = loss_of(model, held_out)
    with container.optimizers[0].averaged_parameters():
        average = loss_of(model, held_out)
    export_averaged(folder / "averaged.safetensors", model, container.optimizers[0])
    if dist.get_rank() == 0:
        print(f"step {step + 1}, held out: {iterate:.4f} by the last iterate, {average:.4f} by the average")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
