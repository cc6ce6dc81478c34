"""Averaged SGD that shards gradients, too, without DDP: train, resume, evaluate the average, export it.

    torchrun --standalone --nproc-per-node 2 launch/examples/stage2.py --steps 400

The same command with more steps goes on from the newest checkpoint. On GPUs use "nccl", and move model and data there.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.functional import cross_entropy

from dist_asgd import CheckpointManager, ShardedASGD, export_averaged

CONTEXT = 16  # bytes from which the next one is predicted


def python_sources() -> tuple[Tensor, Tensor]:
    """The sources of Python's own library as bytes: to train on, and held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    held_out = len(text) // 20
    return text[:-held_out], text[-held_out:]


def batch(text: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Contexts, (size, CONTEXT), and the bytes that follow them, (size,)."""
    starts = torch.randint(len(text) - CONTEXT, (size, 1), generator=torch.Generator().manual_seed(seed))
    windows = text[starts + torch.arange(CONTEXT + 1)].long()
    return windows[:, :-1], windows[:, -1]


@record  # a launch that fails ends with the cause
def main() -> None:
    """Run one rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/stage2"))
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    train, held_out = python_sources()
    torch.manual_seed(0)  # every rank begins with the same weights
    layers = nn.Embedding(256, 32), nn.Flatten(), nn.Linear(32 * CONTEXT, 256), nn.Tanh(), nn.Linear(256, 256)
    model = nn.Sequential(*layers)
    optimizer = ShardedASGD(model.named_parameters(), lr=0.5, t0=200, stage=2)  # reduces gradients during backward
    with CheckpointManager(options.out / "checkpoints", keep=2) as checkpoints:
        restored = checkpoints.restore(model, optimizer)
        first = restored.step if restored else 0
        for step in range(first + 1, options.steps + 1):
            inputs, targets = batch(train, 64, seed=step * ranks + rank)  # every rank draws other data
            cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 100 == 0 or step == options.steps:
                checkpoints.async_save(model, optimizer, step=step)

    inputs, targets = batch(held_out, 4096, seed=0)
    with torch.no_grad():  # on every rank, and so is the export, although rank 0 alone writes
        last = cross_entropy(model(inputs), targets).item()
        with optimizer.averaged_parameters():
            average = cross_entropy(model(inputs), targets).item()
    export_averaged(options.out / "averaged.safetensors", model, optimizer, overwrite=True)
    if rank == 0:
        print(f"steps {first + 1} to {options.steps}: held-out loss {last:.4f}, of the average {average:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
