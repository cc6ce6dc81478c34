"""``overlap_forward``: whoever reads a parameter from a module waits for it.

Collectives are late here: they run in the wait for them, and what they write is not a number until then.
"""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, parametrizations
from torch.utils.checkpoint import checkpoint

from dist_asgd import ShardedASGD, load_checkpoint, save_checkpoint
from tests.harness.bits import assert_same_bits
from tests.harness.native import native_collectives
from tests.harness.ranks import run

OPTIONS: dict[str, Any] = {"lr": 0.1, "t0": 1, "bucket_cap_mb": 1e-4}


class Model(nn.Module):
    """Parameters that are tied, read by the parent of their module, kept in lists, and computed from others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 11, bias=False)
        self.embedding = nn.Embedding(11, 8)
        self.embedding.weight = self.head.weight
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.uncalled = nn.Linear(8, 8)
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.again = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.listed = nn.ParameterList([torch.ones(8), torch.full((8,), 2.0)])

    def forward(self, tokens: Tensor) -> Tensor:
        """``(batch, length)`` token ids to ``(batch, length, 11)`` logits."""
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x)[0]
        x = x + self.recurrent(x)[0]
        x = x + functional.linear(x, self.uncalled.weight, self.uncalled.bias)
        x = x + self.normed(x)
        x = x + checkpoint(self.again, x, use_reentrant=False)
        return self.head(x * self.scale * self.listed[0] * self.listed[1])


TOKENS = torch.arange(12).view(2, 6) % 11
Reader = Callable[[Model, ShardedASGD, Path], Any]


def evaluated(model: Model, _: ShardedASGD, __: Path) -> Any:
    """A forward in another mode than that of training."""
    model.eval()
    with torch.inference_mode():
        found = model(TOKENS).clone()
    model.train()
    return found


def read_by_name(model: Model, _: ShardedASGD, __: Path) -> Any:
    """What the user may read of the parts."""
    return model.again.weight + 1, model.recurrent.weight_hh_l0.sum(), model.listed[1].detach().clone()


def called_with_others(model: Model, _: ShardedASGD, __: Path) -> Any:
    """Only one parameter is replaced."""
    return functional_call(model, {"scale": torch.ones(8)}, (TOKENS,))


def pickled(model: Model, _: ShardedASGD, __: Path) -> Any:
    """A part, whole, through a file."""
    file = io.BytesIO()
    torch.save(model.attention, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    return loaded(*[torch.ones(1, 2, 8)] * 3)[0]


def copied(model: Model, _: ShardedASGD, __: Path) -> Any:
    """A copy computes by itself."""
    other = copy.deepcopy(model.again)
    assert type(other._parameters) is dict
    return other(torch.ones(8)), copy.copy(model.uncalled).weight.sum()


def kept(_: Model, optimizer: ShardedASGD, __: Path) -> Any:
    """Parameters that somebody holds, after the call for them."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    assert any(param.isnan().any() for param in params) is bool(optimizer.gatherer.arrivals.keys)
    optimizer.wait_for_parameters()
    return [param.detach().clone() for param in params]


def averaged(model: Model, optimizer: ShardedASGD, _: Path) -> Any:
    """The averages in place of the parameters, which come back."""
    with optimizer.averaged_parameters():
        inside = model(TOKENS)
    return inside, model(TOKENS)


def saved(model: Model, optimizer: ShardedASGD, path: Path) -> Any:
    """A checkpoint, loaded into the same model after another change of it."""
    save_checkpoint(path, model, optimizer, step=1)
    with torch.no_grad():
        model.scale.mul_(2.0)
    load_checkpoint(path, model, optimizer)
    return model(TOKENS)


def changed(model: Model, _: ShardedASGD, __: Path) -> Any:
    """Writes that go through modules."""
    with torch.no_grad():
        model.scale.mul_(0.5)
        model.again.weight.data.add_(1.0)
    return model(TOKENS)


READERS: list[Reader] = [
    lambda model, _, __: model(TOKENS),
    evaluated,
    read_by_name,
    lambda model, _, __: parameters_to_vector(model.parameters()),
    lambda model, _, __: [value.clone() for value in model.state_dict().values()],
    lambda model, _, __: {**model.recurrent._parameters},
    called_with_others,
    pickled,
    copied,
    kept,
    averaged,
    saved,
    changed,
    lambda _, optimizer, __: optimizer.consolidated_state_dict(to=None)["state"][0]["ax"],
    lambda model, _, __: model.double().float()(TOKENS),
]


def results(model: Model, optimizer: ShardedASGD, path: Path, overlaps: bool) -> list[Any]:
    """What each reader gets after a step."""
    found: list[Any] = []
    for reader in READERS:
        model(TOKENS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.train()
        assert bool(optimizer.gatherer.arrivals.keys) is overlaps
        found.append(reader(model, optimizer, path))
    return found


def flattened(value: Any) -> list[Tensor]:
    """The tensors in a result."""
    if isinstance(value, Tensor):
        return [value.detach()]
    values = value.values() if isinstance(value, dict) else value
    return [tensor for one in values for tensor in flattened(one)]


def reads(_: int, __: int, options: dict[str, Any], folder: str) -> None:
    """Job: with and without the option."""
    with native_collectives(late=True):
        path = Path(folder)
        model, other = Model(), Model()
        optimizer = ShardedASGD(other.named_parameters(), **OPTIONS, **options)
        expected = results(other, optimizer, path / "without", overlaps=False)
        del optimizer
        optimizer = ShardedASGD(model.named_parameters(), **OPTIONS, **options)
        optimizer.overlap_forward(model)
        found = results(model, optimizer, path / "with", overlaps=True)
        for number, (got, want) in enumerate(zip(found, expected, strict=True)):
            for a, b in zip(flattened(got), flattened(want), strict=True):
                assert_same_bits(a, b, f"reader {number}")


@pytest.mark.parametrize("options", [{"stage": 1}, {"stage": 2}], ids=str)
def test_every_reader_waits(options: dict[str, Any], tmp_path: Path) -> None:
    """Also those that the training forward does not go through."""
    run("gloo", 2, reads, options, str(tmp_path))
