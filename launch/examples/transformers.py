"""Transformers: trains a small Llama on the bytes of Python's own sources, resumes it, and evaluates with the average.

torchrun --standalone --nproc-per-node 2 -m launch.examples.transformers

`--stage 2` shards the gradients, too. Run it in the root of the repository, with `-m`: by its path this file would be
found in place of the library of the same name. Files are written to the folder `--folder`, which should be new.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dist_asgd import ShardedASGD, export_averaged
from dist_asgd.integrations.transformers import ShardedASGDCallback, Stage2Mixin
from launch.trainer.corpus import read_corpus

CONTEXT, STEPS = 64, 400


class Stage2Trainer(Stage2Mixin, Trainer):
    """The Trainer without DDP."""


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of bytes, (context,) each."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def main(stage: int, folder: Path) -> None:
    """Train for half of the steps, build everything anew, resume, and compare the average with the last iterate."""
    corpus = read_corpus(None, CONTEXT)
    train = Windows(corpus.batch(seed=0, step=0, batch_index=0, num_batches=1, windows=20_000, context=CONTEXT))
    held_out = Windows(corpus.held_out_windows(windows=256, context=CONTEXT))
    options: dict[str, Any] = {
        "report_to": [],
        "disable_tqdm": True,
        "eval_strategy": "steps",
        "eval_steps": STEPS // 4,
    }
    options |= {"save_steps": STEPS // 4, "load_best_model_at_end": True, "use_cpu": not torch.cuda.is_available()}
    for stop in (STEPS // 2, STEPS):
        # Before the optimizer: this makes the process group.
        args = TrainingArguments(str(folder), max_steps=stop, per_device_train_batch_size=16, **options)
        torch.manual_seed(0)
        layers = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **layers))
        optimizer = ShardedASGD(model.named_parameters(), lr=2.0, t0=STEPS * 3 // 4, stage=stage)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
        trainer = (Trainer if stage == 1 else Stage2Trainer)(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            optimizers=(optimizer, scheduler),
            callbacks=[ShardedASGDCallback(evaluate_average=True, save_average=True)],
        )
        trainer.train(resume_from_checkpoint=stop == STEPS)
    best = trainer.evaluate()["eval_loss"]
    trainer.log({"best_average": best, "in_step": trainer.state.best_global_step})
    export_averaged(folder / "last-average.safetensors", model, optimizer, overwrite=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2))
    parser.add_argument("--folder", type=Path, default=Path("runs/transformers"))
    main(**vars(parser.parse_args()))
