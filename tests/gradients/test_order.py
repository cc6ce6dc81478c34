"""Stage 2: buckets are launched in the order in which the first backward has filled them, the same on all ranks."""

import time
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_asgd import ShardedASGD
from dist_asgd.gradients.reducer import Reducer
from tests.harness.bits import same_bits
from tests.harness.ranks import run

NUM_LAYERS = 8


class Model(nn.Module):
    """Layers that are registered in another order than they run in."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(16, 16, bias=False) for _ in range(NUM_LAYERS)])
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self.layers[index](x).tanh()
        return x.square().sum()


def launched(rank: int, world_size: int, orders: list[list[int]]) -> tuple[list[int], list[int], bool]:
    """Job: the layers in the order of launching, how many were launched after each gradient, and whether bits fit."""
    model = Model(orders[rank])
    optimizer = ShardedASGD(model.parameters(), lr=0.1, t0=0, foreach=False, stage=2, bucket_cap_mb=1e-6)
    peers = [Model(order) for order in orders]
    oracle = torch.optim.ASGD(peers[0].parameters(), lr=0.1, t0=0, foreach=False)
    reducer = cast(Reducer, optimizer.gradients)
    progress: list[int] = []
    for step in range(3):
        inputs = [torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * step + r)) for r in range(world_size)]
        handles = [
            layer.weight.register_post_accumulate_grad_hook(lambda _: progress.append(reducer._round.position))
            for layer in model.layers
        ]
        progress.clear()
        model(inputs[rank]).backward()
        for handle in handles:
            handle.remove()
        optimizer.step()
        optimizer.zero_grad()
        for peer, given in zip(peers, inputs, strict=True):
            peer.load_state_dict(peers[0].state_dict())
            peer.zero_grad()
            peer(given).backward()
        for params in zip(*(peer.parameters() for peer in peers), strict=True):
            total = params[0].grad
            for other in params[1:]:
                total = total + other.grad
            params[0].grad = total / world_size
        oracle.step()
    same = all(same_bits(a, b) for a, b in zip(model.parameters(), peers[0].parameters(), strict=True))
    return [bucket.members[0].index for bucket in reducer._round.buckets], progress, same


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_order_of_the_first_backward(world_size: int) -> None:
    """A decoder registered first does not keep everything waiting for its end."""
    order = [4, 5, 6, 7, 0, 1, 2, 3]
    for layers, progress, same in run("gloo", world_size, launched, [order] * world_size):
        assert layers == order[::-1]
        # Each bucket but the one at hand is on its way.
        assert progress == list(range(NUM_LAYERS))
        assert same


def test_ranks_that_run_in_other_orders() -> None:
    """All of them take that of rank 0."""
    orders = [[3, 1, 2, 0, 7, 4, 6, 5], list(range(NUM_LAYERS)), [7, 6, 5, 4, 3, 2, 1, 0]]
    for layers, _, same in run("gloo", 3, launched, orders):
        assert layers == orders[0][::-1]
        assert same


def goes_elsewhere(rank: int, world_size: int) -> list[float]:
    """Job: rank 1 runs a backward less, and waits for the others in a collective of the user's before the step."""
    param = nn.Parameter(torch.ones(8))
    optimizer = ShardedASGD([param], lr=1.0, lambd=0.0, stage=2)
    for _ in range(2):
        optimizer.zero_grad()
        for _ in range(1 if rank == 1 else 2):
            param.sum().backward()
        dist.all_reduce(torch.ones(1))
        optimizer.step()
    assert world_size == 4
    return param.detach().tolist()


def test_ranks_that_are_elsewhere_send_exchanges_on() -> None:
    """The others open another round only when they know of the first, of which they hear through a rank in no call."""
    started = time.monotonic()
    mean = (2 + 1 + 2 + 2) / 4
    for found in run("gloo", 4, goes_elsewhere):
        assert found == pytest.approx([1 - 2 * mean] * 8, rel=1e-3)
    assert time.monotonic() - started < 15.0
