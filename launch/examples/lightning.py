"""Lightning: trains a language model of bytes on Python's own sources, resumes it, and exports the averaged weights.

torchrun --standalone --nproc-per-node 2 -m launch.examples.lightning

`--stage 2` shards the gradients, too. Start it in the root of the repository and with `-m`: by its path this file would
be found in place of the library of the same name. It writes to `--folder`, and goes on if that has a checkpoint.
"""

import argparse
import os
import sysconfig
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dist_asgd import ShardedASGD
from dist_asgd.integrations.lightning import AveragedWeights, Stage2Strategy

EPOCHS, STEPS_PER_EPOCH = 4, 150


class ByteModel(pl.LightningModule):
    """Predicts the next byte; losses are in nats."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.stage, self.embedding, self.output = stage, nn.Embedding(256, 64), nn.Linear(128, 256)
        self.lstm = nn.LSTM(64, 128, batch_first=True)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        windows = batch[0].long()
        hidden, _state = self.lstm(self.embedding(windows[:, :-1]))
        return nn.functional.cross_entropy(self.output(hidden).flatten(0, 1), windows[:, 1:].flatten())

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("held_out", self.training_step(batch, index), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        t0 = (EPOCHS - 1) * STEPS_PER_EPOCH  # averages the last epoch
        return ShardedASGD(self.named_parameters(), lr=8.0, t0=t0, stage=self.stage)


def main(stage: int, folder: Path) -> None:
    """Train for half of the epochs, resume for the rest, and compare the average with the last iterate."""
    pl.seed_everything(0)
    sources = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
    text = torch.frombuffer(bytearray(sources), dtype=torch.uint8)
    windows = text.unfold(0, 65, 64)  # (windows, 65); every 20th is held out. Lightning divides them among the ranks.
    is_held_out = torch.arange(len(windows)) % 20 == 0
    train = DataLoader(TensorDataset(windows[~is_held_out]), batch_size=16, shuffle=True)
    held_out = DataLoader(TensorDataset(windows[is_held_out][:512]), batch_size=64)
    last = folder / "last.ckpt"
    for epochs in (EPOCHS // 2, EPOCHS):
        model, saver = ByteModel(stage), ModelCheckpoint(folder, monitor="held_out", save_last=True)
        strategy = Stage2Strategy() if stage == 2 else "ddp"
        options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        options |= {"max_epochs": epochs, "limit_train_batches": STEPS_PER_EPOCH, "gradient_clip_val": 0.5}
        options |= {"callbacks": [AveragedWeights(), saver], "devices": int(os.environ["WORLD_SIZE"])}  # on one node
        trainer = pl.Trainer(accelerator="cpu", strategy=strategy, **options)
        trainer.fit(model, train, held_out, ckpt_path=last if last.exists() else None)
    if trainer.is_global_zero:
        save_file(model.state_dict(), folder / "averaged.safetensors")
    average = trainer.validate(model, held_out, verbose=False)[0]["held_out"]  # fit() leaves the average in the model
    model.load_state_dict(torch.load(last)["current_model_state"])
    iterate = trainer.validate(model, held_out, verbose=False)[0]["held_out"]
    if trainer.is_global_zero:
        print(f"step {trainer.global_step}, held out: {iterate:.4f} by the last iterate, {average:.4f} by the average")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A language model in Lightning.")
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2))
    parser.add_argument("--folder", type=Path, default=Path("runs/lightning"))
    main(**vars(parser.parse_args()))
