"""A word-level language model of LSTM layers with the dropouts of AWD-LSTM (Merity, Keskar & Socher 2017)."""

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of each layer, the output and the cell of the latest word, (1, columns, width) each.
Hidden = list[tuple[Tensor, Tensor]]


class Recurrence(nn.LSTM):
    """`nn.LSTM`, whose weights stay in the optimizer's memory on GPUs too.

    A forward in which a weight is another tensor than in the last one calls `flatten_parameters()`, which binds all
    parameters to a buffer of cuDNN's. The optimizer follows that, and copies them back in each step: right, but slow.
    Here cuDNN gets a copy of the weights for one forward, which it needs anyway, as dropped weights are new each time.
    """

    def flatten_parameters(self) -> None:
        """Leave the weights where they are."""


class WeightDrop(nn.Module):
    """One LSTM layer. In training each forward drops other elements of its recurrent matrix (DropConnect).

    The parameters are those of the layer, so optimizers, DDP and checkpoints see nothing of it. The dropped matrix is
    computed from them, and autograd brings its gradient back: that of an element that is dropped is zero.
    """

    def __init__(self, layer: nn.LSTM, share: float) -> None:
        super().__init__()
        self.layer = layer
        self.share = share

    def forward(self, words: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`words`, (time, columns, in), to outputs, (time, columns, out), and the hidden state after them."""
        dropped = {
            name: F.dropout(weight, self.share, self.training)
            for name, weight in self.layer.named_parameters()
            if name.startswith("weight_hh")
        }
        output, after = torch.func.functional_call(self.layer, dropped, (words, hidden))
        return output, after


def locked_dropout(values: Tensor, share: float, training: bool) -> Tensor:
    """Drop features of `values`, (time, columns, features): the same ones at all times of a column."""
    if not training or not share:
        return values
    return values * F.dropout(torch.ones_like(values[:1]), share)


class WordLSTM(nn.Module):
    """LSTM layers between an embedding and a decoder that is the same matrix. `forward` returns the loss and the state.

    Dropouts: `drop` of embeddings, of outputs between layers and of the last output, and `weight_drop` of the
    recurrent matrices.
    """

    def __init__(
        self, num_words: int, width: int, hidden_width: int, num_layers: int, drop: float, weight_drop: float
    ) -> None:
        super().__init__()
        self.drop = drop
        self.embedding = nn.Embedding(num_words, width)
        # The last layer is as wide as the embedding, because the decoder is.
        widths = [width, *[hidden_width] * (num_layers - 1), width]
        self.layers = nn.ModuleList(
            WeightDrop(Recurrence(before, after), weight_drop) for before, after in pairwise(widths)
        )
        self.decoder_bias = nn.Parameter(torch.zeros(num_words))
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def first_hidden(self, columns: int) -> Hidden:
        """The state before the first word."""
        like = self.embedding.weight
        widths = [cast(WeightDrop, layer).layer.hidden_size for layer in self.layers]
        return [(like.new_zeros(1, columns, width), like.new_zeros(1, columns, width)) for width in widths]

    def forward(self, words: Tensor, targets: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        """The mean loss in nats per word, 0-dim, of `targets` after `words`, (time, columns) each; and the state.

        The state is detached: backward ends at the first word of the window.
        """
        values = locked_dropout(self.embedding(words), self.drop, self.training)
        after: Hidden = []
        for layer, state in zip(self.layers, hidden, strict=True):
            values, (output, cell) = layer(values, state)
            values = locked_dropout(values, self.drop, self.training)
            after.append((output.detach(), cell.detach()))
        logits = F.linear(values, self.embedding.weight, self.decoder_bias)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), after
