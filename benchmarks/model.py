"""The models that are trained in the benchmarks.

Vocabulary
    P       the bytes of all parameters (fp32), the unit that memory is reported in
    shape   the sizes of the model and of one rank's batch: ``Shape`` is a GPT of 31 million parameters in 173 tensors,
            ``WideShape`` is 103 million parameters in two layers, each larger than any bucket

Batch and context are small on purpose. The optimizer and the communication cost the same for every batch, so with a
small batch they weigh most, and activations do not hide gradients and state in the memory figures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 8192


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of one rank's batch. The defaults: 31.3M parameters in 173 tensors."""

    num_layers: int = 14
    width: int = 384
    num_heads: int = 6
    context: int = 32
    batch: int = 1

    def tiny(self) -> Shape:
        """The same number of tensors at a tenth of the size, for ``--quick``."""
        return Shape(self.num_layers, 128, 4, self.context, self.batch)

    def miniature(self) -> Shape:
        """The smallest model of this kind, which loads the same code."""
        return Shape(num_layers=1, width=32, num_heads=2, context=8)

    def input(self) -> str:
        """The input of one rank and step, for the report."""
        return f"{self.batch} x {self.context} tokens"


@dataclass(frozen=True)
class WideShape:
    """Sizes of a perceptron and of one rank's batch. The defaults: 102.8M parameters in two matrices."""

    num_layers: int = 2
    width: int = 7168
    batch: int = 4

    def tiny(self) -> WideShape:
        """The same number of tensors at a tenth of the size, for ``--quick``."""
        return WideShape(self.num_layers, 2240, self.batch)

    def miniature(self) -> WideShape:
        """The smallest model of this kind, which loads the same code."""
        return WideShape(width=32)

    def input(self) -> str:
        """The input of one rank and step, for the report."""
        return f"{self.batch} rows of {self.width}"


AnyShape = Shape | WideShape
MODELS: dict[str, AnyShape] = {"gpt": Shape(), "wide": WideShape()}


class Block(nn.Module):
    """Pre-norm attention and a perceptron of four times the width: 12 tensors, about ``12 * width**2`` elements."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm_perceptron = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, context, width)
        batch, context, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, context, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch, heads, context, width / heads)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, context, width))
        widened = F.gelu(self.widen(self.norm_perceptron(x)))
        result: Tensor = x + self.narrow(widened)
        return result


class GPT(nn.Module):
    """A decoder-only language model with a head that is not tied. ``forward`` returns the mean loss, 0-dim."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList([Block(shape.width, shape.num_heads) for _ in range(shape.num_layers)])
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, context + 1) -> ()
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        loss: Tensor = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss


class Wide(nn.Module):
    """Matrices with ReLUs between them. ``forward`` returns the mean of the squared outputs, 0-dim."""

    def __init__(self, shape: WideShape) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(shape.width, shape.width, bias=False) for _ in range(shape.num_layers)])

    def forward(self, x: Tensor) -> Tensor:  # (batch, width) -> ()
        for block in self.blocks:
            x = F.relu(block(x))
        loss: Tensor = x.square().mean()
        return loss


def build_model(shape: AnyShape, seed: int = 0) -> GPT | Wide:
    """Build the model. It is the same to the bit on every rank and for every peer."""
    torch.manual_seed(seed)
    return Wide(shape) if isinstance(shape, WideShape) else GPT(shape)


def batch_of(shape: AnyShape, rank: int, number: int) -> Tensor:
    """The batch of rank ``rank`` in step ``number``: (batch, context + 1) tokens, or (batch, width) numbers.

    It is the same for every peer.
    """
    generator = torch.Generator().manual_seed(1_000_003 * number + rank)
    if isinstance(shape, WideShape):
        return torch.randn(shape.batch, shape.width, generator=generator)
    return torch.randint(VOCABULARY, (shape.batch, shape.context + 1), generator=generator)


def parameter_bytes(model: nn.Module) -> int:
    """P: the bytes of all distinct parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
