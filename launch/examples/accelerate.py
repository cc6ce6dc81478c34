"""Accelerate: trains a language model of bytes on Python's own sources, resumes it, and exports the averaged weights.

torchrun --standalone --nproc-per-node 2 -m launch.examples.accelerate

`--stage 2` shards the gradients, too. Run it in the root of the repository, with `-m`: by its path this file would be
found in place of the library of the same name. Files are written to the folder `--folder`.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from dist_asgd import ShardedASGD, export_averaged
from dist_asgd.integrations.accelerate import prepare_stage2, save_whole_state
from launch.trainer.corpus import read_corpus
from launch.trainer.model import ByteTransformer, ModelShape

SHAPE = ModelShape(d_model=64, layers=2, heads=4, context=64)
STEPS, BATCH = 400, 16


def main(stage: int, folder: Path) -> None:
    """Train for half of the steps, build everything anew, resume, and compare the average with the last iterate."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    corpus = read_corpus(None, SHAPE.context)
    count = STEPS * BATCH * accelerator.num_processes
    windows = corpus.batch(seed=0, step=0, batch_index=0, num_batches=1, windows=count, context=SHAPE.context)
    held_out = corpus.held_out_windows(windows=256, context=SHAPE.context)
    for first, stop in ((0, STEPS // 2), (STEPS // 2, STEPS)):
        torch.manual_seed(0)
        model = ByteTransformer(SHAPE)
        optimizer = ShardedASGD(model.named_parameters(), lr=2.0, t0=300, stage=stage)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
        loader: DataLoader[Tensor] = DataLoader(windows, BATCH)
        prepare = accelerator.prepare if stage == 1 else partial(prepare_stage2, accelerator)
        prepared = prepare(model, optimizer, loader, scheduler)
        save_whole_state(accelerator, optimizer)
        if first:
            accelerator.load_state(str(folder / "state"))
        loss = train(accelerator, prepared, first, stop)
        if stop < STEPS:
            accelerator.save_state(str(folder / "state"))
            accelerator.free_memory()
        accelerator.print(f"step {stop}: training loss {loss:.3f}")
    with torch.no_grad():
        last = float(model(held_out))
        with optimizer.averaged_parameters():
            average = float(model(held_out))
    export_averaged(folder / "averaged.safetensors", model, optimizer, overwrite=True)
    accelerator.print(f"held-out nats per byte: last iterate {last:.3f}, average {average:.3f}")
    accelerator.end_training()


def train(accelerator: Any, prepared: Any, first: int, stop: int) -> float:
    """Accelerate's documented loop; returns the last loss."""
    model, optimizer, loader, scheduler = prepared
    for step, batch in enumerate(accelerator.skip_first_batches(loader, first), first + 1):
        with accelerator.accumulate(model):
            loss = model(batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if step == stop:
            break
    return float(loss.detach())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2))
    parser.add_argument("--folder", type=Path, default=Path("runs/accelerate"))
    main(**vars(parser.parse_args()))
