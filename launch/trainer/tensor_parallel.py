"""Tensor parallelism: ranks that train on the same data share the layers of each block, attention by heads."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from model import Block


def split_layers(block: Block, mesh: DeviceMesh) -> None:
    """Split attention and the feed-forward layer by columns, then by rows, so that each takes one sum. Collective."""
    layers = {
        "query_key_value": _ByHeads(),
        "attention_out": RowwiseParallel(),
        "feed_in": ColwiseParallel(),
        "feed_out": RowwiseParallel(),
    }
    parallelize_module(block, mesh, layers)


class _ByHeads(ParallelStyle):
    """What ColwiseParallel is for a linear layer, for the three stacked layers of QueryKeyValue."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, _shard_heads, _whole_input)


def _shard_heads(_name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for name, parameter in module.named_parameters():
        module.register_parameter(name, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(1)])))


def _whole_input(_module: nn.Module, inputs: tuple[Tensor], mesh: DeviceMesh) -> Any:
    """Pass the input on; in backward its gradient is summed over the ranks, each of which computes it for its heads."""
    whole = DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)
    return (whole.to_local(grad_placements=[Partial()]),)
