"""A small decoder-only transformer language model over bytes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

NUM_BYTE_VALUES = 256


@dataclass(frozen=True)
class ModelShape:
    """The options that decide the shapes of the parameters."""

    d_model: int
    layers: int
    heads: int
    context: int
    tie_embedding: bool = False


class QueryKeyValue(nn.Module):
    """The linear layers for queries, keys and values in one product, with their outputs side by side.

    The parameters of the three layers are stacked on dimension 0. Tensor parallelism splits dimension 1 by heads, so
    that a rank has the same heads of all three, and the output has this rank's heads only.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        joint = nn.Linear(d_model, 3 * d_model)
        self.weight = nn.Parameter(joint.weight.detach().view(3, d_model, d_model))
        self.bias = nn.Parameter(joint.bias.detach().view(3, d_model))

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, d_model) to (batch, time, 3 * d_model)
        return F.linear(x, _local(self.weight).flatten(0, 1), _local(self.bias).flatten())


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind a norm and inside a residual."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.head_width = shape.d_model // shape.heads
        self.attention_norm = nn.LayerNorm(shape.d_model)
        self.query_key_value = QueryKeyValue(shape.d_model)
        self.attention_out = nn.Linear(shape.d_model, shape.d_model)
        self.feed_norm = nn.LayerNorm(shape.d_model)
        self.feed_in = nn.Linear(shape.d_model, 4 * shape.d_model)
        self.feed_out = nn.Linear(4 * shape.d_model, shape.d_model)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, d_model)
        x = x + self.attention_out(self._attend(self.attention_norm(x)))
        fed: Tensor = self.feed_out(F.gelu(self.feed_in(self.feed_norm(x)), approximate="tanh"))
        return x + fed

    def _attend(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        heads = self.query_key_value(x).view(batch, time, 3, -1, self.head_width)  # -1: this rank's heads
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, head_width)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, time, -1)


class ByteTransformer(nn.Module):
    """A pre-norm transformer with learned positions. `forward` returns the mean loss in nats per byte, 0-dim."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.byte_embedding = nn.Embedding(NUM_BYTE_VALUES, shape.d_model)
        self.position_embedding = nn.Embedding(shape.context, shape.d_model)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.final_norm = nn.LayerNorm(shape.d_model)
        self.output = nn.Linear(shape.d_model, NUM_BYTE_VALUES, bias=False)
        self._initialise(shape)
        if shape.tie_embedding:
            self.output.weight = self.byte_embedding.weight

    def _initialise(self, shape: ModelShape) -> None:
        residual_scale = (2 * shape.layers) ** -0.5  # keeps the residual stream's size independent of depth
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2 or name.endswith("bias"):
                continue  # norms and biases keep PyTorch's values
            std = 0.1 if "embedding" in name else parameter.shape[-1] ** -0.5
            if name.endswith(("attention_out.weight", "feed_out.weight")):
                std *= residual_scale
            nn.init.normal_(parameter, std=std)

    def forward(self, windows: Tensor) -> Tensor:  # (batch, time + 1) of byte values
        inputs, targets = windows[:, :-1], windows[:, 1:]
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.byte_embedding(inputs) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        logits = self.output(self.final_norm(x)).float()  # the loss in float32 whatever the parameters are
        loss: Tensor = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss
