"""The actor of ``benchmarks.step``: it trains the model of one peer on one rank, and measures.

Vocabulary
    whole step  ``zero_grad``, forward, backward, ``optimizer.step()``, timed from a barrier to the end
    split step  the same, but only ``optimizer.step()`` is timed, from a barrier before it
    peak        the most memory this process held since the last reset: the kernel's high-water mark (VmHWM)
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from benchmarks.model import AnyShape, batch_of, build_model, parameter_bytes
from benchmarks.peers import Peer, consolidate, local, storage_bytes
from benchmarks.training import Training

# Of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class Trainer:
    """Trains one peer's model. Construction and all public methods are collective on the ranks of the team."""

    model: nn.Module
    training: Training

    def __init__(self, rank: int, world_size: int, peer: Peer, shape: AnyShape) -> None:
        self.rank = rank
        self.world_size = world_size
        self.peer = peer
        self.shape = shape
        self._num_steps = 0
        self.build()

    def build(self) -> None:
        """Build the model, the wrapping and the optimizer. The constructor calls it."""
        self.model = build_model(self.shape)
        self.wrap()

    def wrap(self) -> None:
        """Wrap the model and construct the optimizer."""
        self.training = self.peer.train(self.model)

    @property
    def wrapped(self) -> nn.Module:
        """The module whose forward is called."""
        return self.training.module

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer."""
        return self.training.optimizer

    def whole_step(self) -> tuple[float, float]:
        """Take a training step; returns its seconds, and the seconds of processor time of all threads of the rank."""
        tokens = self._next_batch()
        dist.barrier()
        begin, begin_processor = time.perf_counter(), time.process_time()
        _train(self.training, tokens)
        self.training.step()
        return time.perf_counter() - begin, time.process_time() - begin_processor

    def split_step(self) -> float:
        """Take a training step; returns the seconds of ``optimizer.step()``, which begins when all ended backward."""
        tokens = self._next_batch()
        _train(self.training, tokens)
        dist.barrier()
        begin = time.perf_counter()
        self.training.step()
        return time.perf_counter() - begin

    def _next_batch(self) -> torch.Tensor:
        self._num_steps += 1
        return batch_of(self.shape, self.rank, self._num_steps)

    def held_bytes(self) -> dict[str, int]:
        """The bytes of parameters, state and gradients that this rank holds between backward and step."""
        _train(self.training, self._next_batch())
        parameters = list(self.model.parameters())
        gradients = storage_bytes(self.training.gradients(parameters))
        if self.peer.stage == 2:
            gradients = self.optimizer.memory_report().gradient_bytes  # type: ignore[attr-defined]
        if self.peer.ddp and not self.peer.gradient_views:
            gradients += parameter_bytes(self.model)  # DDP's buckets, which Python does not see
        result = {
            "parameters": storage_bytes(parameters),
            "state": storage_bytes(self.training.state()),
            "gradients": gradients,
        }
        self.training.step()
        return result

    def parameters_digest(self) -> str:
        """A hash of the bits of all parameters on this rank, which is the same for peers with the same results."""
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            digest.update(local(parameter).detach().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def consolidation_seconds(self) -> float:
        """The seconds that it takes to gather the whole state on rank 0."""
        dist.barrier()
        begin = time.perf_counter()
        state = consolidate(self.optimizer)
        seconds = time.perf_counter() - begin
        del state
        return seconds

    def save_seconds(self, folder: str) -> float:
        """The seconds that ``torch.save`` takes to write this optimizer's whole state, on rank 0; 0 on the others."""
        if self.rank != 0:
            return 0.0
        path = Path(folder, f"state_{os.getpid()}.pt")
        begin = time.perf_counter()
        torch.save(self.optimizer.state_dict(), path)
        seconds = time.perf_counter() - begin
        path.unlink()
        return seconds


class MemoryTrainer(Trainer):
    """A ``Trainer`` that measures the memory of each stage of a run. It reads /proc/self and so needs Linux.

    Peaks are counted above two floors, both of which include the bare model. ``cold`` is measured when the model was
    just built. ``warm`` is measured after a miniature was trained in the same way and dropped, so that code and scratch
    space which torch loads on first use are not counted.
    """

    def build(self) -> None:
        self.model = build_model(self.shape)
        self.floors = {"cold": settled_bytes()}
        small = self.shape.miniature()
        miniature = build_model(small)
        training = self.peer.train(miniature)
        for number in range(3):
            _train(training, batch_of(small, self.rank, number))
            training.step()
        del miniature, training
        self.floors["warm"] = settled_bytes()

    def wrap_peak(self) -> dict[str, int]:
        """The peak while the wrapping and the optimizer are built, in bytes above each floor."""
        reset_peak()
        self.wrap()
        return self._above_floors(peak_bytes())

    def steps_peak(self, num_steps: int) -> dict[str, int]:
        """The peak of ``num_steps`` training steps, in bytes above each floor."""
        reset_peak()
        for _ in range(num_steps):
            _train(self.training, self._next_batch())
            self.training.step()
        return self._above_floors(peak_bytes())

    def _above_floors(self, peak: int) -> dict[str, int]:
        return {name: peak - floor for name, floor in self.floors.items()}

    def consolidation_peak(self) -> int:
        """The peak of consolidating to rank 0, in bytes above those of this process before the call."""
        before = settled_bytes()
        reset_peak()
        state = consolidate(self.optimizer)
        peak = peak_bytes()
        del state
        return peak - before


def _train(training: Training, batch: torch.Tensor) -> None:
    """Take a training step up to the optimizer's. Collective."""
    training.zero_grad()
    training.backward(training.module(batch))


def follow_memory(_rank: int) -> None:
    """Let resident memory follow what is in use: allocations of 64 KiB and more are mapped and unmapped one by one.

    By default glibc keeps freed memory in its heap, and the peak shows the heap's history. An entrance of a team.
    """
    libc = ctypes.CDLL(None)
    for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        if libc.mallopt(option, 1 << 16) != 1:
            raise OSError("mallopt refused a threshold of 64 KiB: peaks are measured with glibc only")


def settled_bytes() -> int:
    """The resident bytes of this process, once garbage and free heap were returned to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status_bytes("VmRSS")


def reset_peak() -> None:
    """Set the kernel's high-water mark to the bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The largest number of bytes that were resident since the last ``reset_peak``."""
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
