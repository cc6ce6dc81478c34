"""What training waits for while a checkpoint is copied to the host, and how much page-locked memory that takes."""

from __future__ import annotations

import tempfile
import time
from unittest import mock

import torch
from torch import nn

from benchmarks.gpu.rows import Part
from dist_asgd import ShardedASGD, async_save_checkpoint
from dist_asgd.storage import pinned


def run(part: Part) -> None:
    """Two saves in the background: the first allocates, the second finds its memory there."""
    width = 256 if part.cpu else 8192
    with part.attempt("asynchronous saves"):
        # Sizes that are no power of two, as those of models are not.
        model = nn.Sequential(
            *[nn.Linear(width, width + width // 16) for _ in range(1)], nn.Linear(width + width // 16, width)
        )
        model.to(part.device)
        optimizer = ShardedASGD(model.named_parameters(), lr=1e-3)
        model(torch.randn(2, width, device=part.device)).sum().backward()
        optimizer.step()
        made: list[pinned.PinnedMemory] = []
        construct = pinned.PinnedMemory.__init__

        def counted(memory: pinned.PinnedMemory, sizes_bytes: list[int]) -> None:
            construct(memory, sizes_bytes)
            made.append(memory)

        asked = 2 * sum(p.nbytes for p in model.parameters())
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(pinned.PinnedMemory, "__init__", counted):
            for number in (1, 2):
                part.wait()
                start = time.perf_counter()
                pending = async_save_checkpoint(f"{folder}/{number}", model, optimizer, step=number)
                stall = time.perf_counter() - start
                pending.wait()
                part.add(f"stall of save {number}", f"{stall * 1e3:.0f} ms", f"{asked / 2**20:,.0f} MiB of state")
        locked = sum(memory.nbytes for memory in made)
        by_torch = 0 if part.cpu else torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)
        part.add(
            "page-locked for the state",
            f"{locked / 2**20:,.0f} MiB",
            f"by torch's allocator: {by_torch / 2**20:,.0f} MiB",
        )
        if not part.cpu:
            part.check(
                "page-locked: within 1% of the state", asked <= locked <= 1.01 * asked, f"{locked} for {asked} bytes"
            )
