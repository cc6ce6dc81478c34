"""What a plan adds for FSDP2 itself, beside torch's own tracker of FSDP2's memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_asgd import plan
from dist_asgd.planning.choice import FSDP2

RANKS = 8


class Block(nn.Module):
    """A residual block of two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., width)`` to ``(..., width)``."""
        out: Tensor = x + self.down(self.up(x))
        return out


class Decoder(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, width: int, depth: int, vocab: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(batch, length)`` to ``(batch, length, vocab)``."""
        hidden: Tensor = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        out: Tensor = self.head(hidden)
        return out


@pytest.fixture
def fake_group() -> Iterator[None]:
    """A default group of 8 ranks that moves no data."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize(("width", "depth", "vocab"), [(256, 6, 500), (128, 3, 8000), (256, 0, 2000)], ids=str)
def test_the_estimate_is_an_upper_bound_that_is_close(width: int, depth: int, vocab: int) -> None:
    """Parameters, gradients and what is gathered: no less than the tracked peak, and 20% more at most."""
    model = Decoder(width, depth, vocab)
    found = plan(model, ranks=RANKS).row(FSDP2).bytes
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = FSDPMemTracker(model, optimizer)
    with tracker:
        for _ in range(2):
            model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            tracker.reset_mod_stats()
    (peak,) = (kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())
    planned = found.parameters + found.gradients + found.passing
    assert peak <= planned <= 1.2 * peak
