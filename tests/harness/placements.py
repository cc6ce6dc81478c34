"""The placements of a history's parameters before the optimizer is constructed: plain tensors, or DTensors.

Every rank makes the whole parameter from the history and keeps its local tensor, so nothing is sent. The index of a
parameter and the seed of the history choose its placement. A dimension that a parameter does not have is not sharded;
tensor parallelism replicates such parameters, too.

Placements need Gloo processes. Threads share torch's cache of plans for a mesh, take the plan of another rank from it,
and hang.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from tests.harness.meshes import hybrid_mesh, local

# The world sizes of each kind.
KINDS = {"shard": (2, 3, 4), "hsdp": (2, 3, 4), "tp": (2, 3, 4), "2d": (2, 4), "mixed": (2, 3, 4)}

_Layout = tuple[DeviceMesh, Sequence[Placement]] | None


class Placements:
    """The placements of one ``kind`` over all ranks; None leaves every parameter plain. Construction is collective.

    shard   FSDP2: by rows; the last ranks may have none
    hsdp    the same rows in several replicas
    tp      by rows, by columns or replicated, on one axis
    2d      FSDP2 over tensor parallelism: by rows and columns, by rows twice, by rows with replicas
    mixed   plain parameters beside DTensors by rows or columns, on meshes with one and with two dimensions
    """

    def __init__(self, kind: str | None, world_size: int, seed: int) -> None:
        self._seed = seed
        self._layouts = [None] if kind is None else _layouts(kind, world_size, seed)

    def place(self, index: int, whole: Tensor) -> Tensor:
        """``whole`` with the placement of parameter ``index``: a new parameter, or ``whole`` itself if plain."""
        layout = self._layouts[(self._seed + index) % len(self._layouts)]
        if layout is None:
            return whole
        mesh, placements = layout
        fitting = [Replicate() if _dim(p) >= whole.dim() else p for p in placements]
        # A local tensor that is not dense in memory cannot be updated in place.
        dense = whole.detach().clone(memory_format=torch.preserve_format)
        return nn.Parameter(distribute_tensor(dense, mesh, fitting, src_data_rank=None), whole.requires_grad)

    def part(self, index: int, whole: Tensor) -> Tensor:
        """This rank's local tensor of ``whole`` with the placement of parameter ``index``."""
        return held(self.place(index, whole))


def held(param: Tensor) -> Tensor:
    """This rank's local tensor of a parameter, or a plain parameter's data; it shares memory."""
    return local(param.detach())


def placed_like(param: Tensor, part: Tensor) -> Tensor:
    """A tensor with the placement of ``param`` whose local tensor on this rank is ``part``."""
    placed = param.detach().clone()
    held(placed).copy_(part)
    return placed


def loads_in_full(params: Sequence[Tensor]) -> bool:
    """Whether torch's helpers load full state for these parameters, some of which are DTensors.

    The helpers take the device from state with dimensions, and cannot scatter rows that are sharded twice.
    """
    dtensors = [p for p in params if isinstance(p, DTensor)]
    strided = any(isinstance(placement, _StridedShard) for p in dtensors for placement in p.placements)
    return bool(dtensors) and not strided and any(p.dim() and p.requires_grad for p in params)


def _layouts(kind: str, world_size: int, seed: int) -> list[_Layout]:
    rows, columns, everything = Shard(0), Shard(1), Replicate()
    if kind in ("shard", "tp"):
        flat = init_device_mesh("cpu", (world_size,))
        return [(flat, [p]) for p in ([rows] if kind == "shard" else [rows, columns, everything])]
    if kind == "2d":
        shape = (2, 2) if world_size == 4 else [(1, 2), (2, 1)][seed % 2]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        rows_of_rows = _StridedShard(0, split_factor=shape[1])
        return [(mesh, pair) for pair in ([rows, columns], [rows_of_rows, rows], [rows, everything])]
    hsdp = hybrid_mesh((2, 2) if world_size == 4 else (world_size, 1))
    if kind == "hsdp":
        return [(hsdp, [everything, rows])]
    flat = init_device_mesh("cpu", (world_size,))
    return [None, (flat, [rows]), (hsdp, [everything, rows]), (flat, [columns]), None, (hsdp, [columns, everything])]


def _dim(placement: Placement) -> int:
    return placement.dim if isinstance(placement, Shard | _StridedShard) else -1
