"""Measures how evenly the state is sharded at world sizes that this machine does not have.

The ``fake`` process group lets one process be any rank of any world. Its collectives send nothing, but construction,
which decides what each rank owns, needs no data of other ranks.

Vocabulary
    overhead   the most bytes of state on one rank, divided by an exact N-th of the state without padding
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer

from benchmarks.model import Shape, build_model, parameter_bytes
from benchmarks.peers import peer_of, storage_bytes
from benchmarks.training import state_tensors

WORLD_SIZES = (2, 8, 64, 1024)


def measure_imbalance(shape: Shape, ours: bool) -> dict[str, dict[int, dict[str, float]]]:
    """The overhead by peer and world size; ``ours`` adds this repository's optimizer."""
    table: dict[str, dict[int, dict[str, float]]] = {"zero": {}}
    if ours:
        table["stage2"] = {}
    for world_size in WORLD_SIZES:
        table["zero"][world_size] = _figures(_zero_state_bytes(shape, world_size), shape, world_size)
        if ours:
            ranks = sorted({0, 1, world_size // 2, world_size - 1})
            held = [_sharded_state_bytes(shape, rank, world_size) for rank in ranks]
            table["stage2"][world_size] = _figures(held, shape, world_size)
    return table


def _figures(held: list[int], shape: Shape, world_size: int) -> dict[str, float]:
    """``held`` are the bytes of state on each of the ranks that were looked at."""
    share = parameter_bytes(build_model(shape)) / world_size
    return {"overhead": max(held) / share}


def _zero_state_bytes(shape: Shape, world_size: int) -> list[int]:
    """The bytes of ``ax`` on every rank, according to the partition that ZeroRedundancyOptimizer makes."""
    with fake_world(0, world_size):
        optimizer = peer_of("zero").make_optimizer(build_model(shape))
        assert isinstance(optimizer, ZeroRedundancyOptimizer)
        return [
            sum(p.numel() * p.element_size() for group in groups for p in group["params"])
            for groups in optimizer._partition_parameters()  # type: ignore[attr-defined]
        ]


def _sharded_state_bytes(shape: Shape, rank: int, world_size: int) -> int:
    """The bytes of ``ax`` on one rank, by storages and with their padding."""
    with fake_world(rank, world_size):
        optimizer = peer_of("stage2").make_optimizer(build_model(shape))
        return storage_bytes(tensor for tensor in state_tensors(optimizer) if tensor.dim() > 0)


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Make this process one rank of a world in which nothing is ever sent."""
    dist.init_process_group("fake", rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
