"""What a plan depends on besides the model: ranks, nodes, options of the constructor, and the backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..storage.precision import Precision

BACKENDS = ("nccl", "gloo")


@dataclass(frozen=True, slots=True)
class Setup:
    """One job.

    ranks                     the number of ranks
    ranks_per_node            how many of them share a node
    mesh                      (replicas, shards) of the modes on a mesh; None without such modes
    precision                 the dtypes of averages, masters and messages
    bucket_cap_mb             as in ``ShardedASGD``
    backend                   "nccl" (on GPUs) or "gloo" (on CPUs)
    gradient_as_bucket_view   whether gradients are views of DDP's buckets, or have memory beside them
    fused                     whether the update is ``fused=True``, which needs no scratch memory on GPUs
    step_in_backward          whether stage 2 updates buckets during backward
    averages                  how many ``ShardedAverage`` of the same parameters there are beside the optimizer
    averages_on_host          whether those lie in host memory (``average_device="cpu"``)
    """

    ranks: int
    ranks_per_node: int
    mesh: tuple[int, int] | None
    precision: Precision
    bucket_cap_mb: float = 25.0
    backend: str = "nccl"
    gradient_as_bucket_view: bool = True
    fused: bool = False
    step_in_backward: bool = False
    averages: int = 0
    averages_on_host: bool = False

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return -(-self.ranks // self.ranks_per_node)

    @property
    def contiguous(self) -> bool:
        """Whether the backend takes one contiguous buffer, into which all gradients of a bucket are packed."""
        return self.backend != "gloo"

    @property
    def device(self) -> torch.device:
        """The kind of device that parameters lie on."""
        return torch.device("cpu" if self.backend == "gloo" else "cuda")
