"""Small real models and their data, built from a seed so that every rank has the same ones.

Modules draw from torch's global generator, so ranks that are threads take turns.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn
from torch.nn import functional

_ONE_AT_A_TIME = threading.Lock()


def odd_net(seed: int = 0) -> OddNet:
    """The ``OddNet`` of ``seed``."""
    with _ONE_AT_A_TIME:
        torch.manual_seed(seed)
        return OddNet()


class OddNet(nn.Module):
    """Awkward parameters: tied, frozen, transposed, channels_last, 0-dim, empty, never used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1).to(memory_format=torch.channels_last)
        self.inner = nn.Linear(20, 20)
        self.tied = nn.Linear(20, 20, bias=False)
        self.tied.weight = self.inner.weight
        self.crossed = nn.Parameter(torch.randn(7, 20).t() / 5)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.zeros(0, 4))
        self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(11))

    def forward(self, images: Tensor) -> Tensor:
        """``(batch, 3, 4, 4)`` images to ``(batch, 7)`` outputs."""
        hidden = functional.relu(self.conv(images)).mean(1).reshape(len(images), 16)
        hidden = functional.pad(hidden, (0, 4))
        hidden = torch.tanh(self.tied(torch.tanh(self.inner(hidden))))
        return (hidden @ self.crossed) * self.scale + self.frozen + self.nothing.sum()


def odd_loss(model: nn.Module, seed: int) -> Tensor:
    """The loss of an ``OddNet`` on the batch that ``seed`` draws."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(6, 3, 4, 4, generator=generator)
    target = torch.randn(6, 7, generator=generator)
    return functional.mse_loss(model(images), target)


class Block(nn.Module):
    """A pre-norm residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, width)`` to ``(batch, width)``."""
        return x + self.down(functional.gelu(self.up(self.norm(x))))


def mlp(width: int = 32, depth: int = 3, seed: int = 0) -> nn.Sequential:
    """A residual network for regression, without oddities."""
    with _ONE_AT_A_TIME:
        torch.manual_seed(seed)
        blocks = [Block(width) for _ in range(depth)]
        return nn.Sequential(nn.Linear(12, width), *blocks, nn.Linear(width, 4))


def mlp_loss(model: nn.Module, seed: int) -> Tensor:
    """The loss of an ``mlp`` on the batch that ``seed`` draws."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 12, generator=generator)
    return functional.mse_loss(model(x), x[:, :4].sin())
