"""Parameters without a shape or that others are computed from, and weights that forward computes anew."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from dist_asgd import ShardedASGD
from tests.harness.bits import assert_same_bits
from tests.harness.ranks import run, run_errors

both = pytest.mark.parametrize("stage", [1, 2])


def lazy(rank: int, _world_size: int, stage: int, where: str) -> None:
    """Job: one rank has not run a forward yet."""
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    if rank == 0:
        model(torch.ones(1, 4))
    if where == "construction":
        ShardedASGD(model.named_parameters(), stage=stage)
    optimizer = ShardedASGD(model[1].named_parameters(), stage=stage)
    group = [(f"0.{name}", param) for name, param in model[0].named_parameters()]
    if where == "group":
        optimizer.add_param_group({"params": group})
    optimizer.param_groups[0]["params"] += [param for _, param in group]
    optimizer.param_groups[0]["param_names"] += [name for name, _ in group]
    optimizer.step()


@both
@pytest.mark.parametrize("where", ["construction", "group", "edit"])
def test_parameters_of_lazy_modules(stage: int, where: str) -> None:
    """The error of all ranks says what to do first."""
    for error in run_errors("gloo", 2, lazy, stage, where):
        assert error.type_name == "ValueError"
        assert "has no shape yet" in error.message
        assert "Run one forward with a batch first" in error.message
        assert "on rank 1 of 2" in error.message


def test_parameters_of_lazy_modules_differentiable() -> None:
    """There too."""
    with pytest.raises(ValueError, match="has no shape yet"):
        ShardedASGD(nn.LazyLinear(3).parameters(), differentiable=True)


class WeightDrop(nn.Module):
    """A linear layer whose weight is computed from a raw one in each forward; ``keep`` says as what it is kept."""

    def __init__(self, keep: Callable[[nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.keep = keep
        self.layer = nn.Linear(4, 3)
        self.register_parameter("raw", nn.Parameter(self.layer.weight.detach()))
        del self.layer.weight
        keep(self.layer, self.raw)

    def forward(self, x: Tensor) -> Tensor:
        """Put the weight in place and run the layer."""
        self.keep(self.layer, self.raw)
        return self.layer(x)


def as_attribute(layer: nn.Module, raw: Tensor) -> None:
    """A plain attribute."""
    object.__setattr__(layer, "weight", torch.dropout(raw, 0.0, train=True))


def as_parameter(layer: nn.Module, raw: Tensor) -> None:
    """A second Parameter of the same memory."""
    layer.weight = nn.Parameter(raw.detach())


def as_non_leaf(layer: nn.Module, raw: Tensor) -> None:
    """A tensor with a history among the parameters."""
    layer._parameters["weight"] = raw * 1


def dropped(rank: int, _world_size: int, stage: int, keep: Callable[[nn.Module, Tensor], None]) -> None:
    """Job: on one rank the list has the computed weight, too."""
    model = WeightDrop(keep)
    named = list(model.named_parameters())
    ShardedASGD(named if rank else [(name, p) for name, p in named if name != "layer.weight"], stage=stage)


@both
@pytest.mark.parametrize("keep", [as_parameter, as_non_leaf])
def test_computed_weights_in_the_list(stage: int, keep: Callable[[nn.Module, Tensor], None]) -> None:
    """The error of all ranks says which weight to pass."""
    for error in run_errors("gloo", 2, dropped, stage, keep):
        assert error.type_name == "ValueError"
        assert "only the raw weight" in error.message
        assert "layer.weight" in error.message
        assert "on rank 1 of 2" in error.message


@both
def test_non_leaves_that_retain_their_gradient(stage: int) -> None:
    """torch takes them, and its step changes a tensor that the next forward computes anew."""
    raw = nn.Parameter(torch.ones(3))
    computed = raw * 1
    computed.retain_grad()
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[1\] is computed from other tensors"):
        ShardedASGD([raw, computed], stage=stage)


def parametrized(layer: nn.Module) -> nn.Module:
    """A weight norm of today."""
    return parametrizations.weight_norm(layer)


def pruned(layer: nn.Module) -> nn.Module:
    """Half of the weights are masked."""
    return prune.l1_unstructured(layer, "weight", 0.5)


def with_attribute(_layer: nn.Module) -> nn.Module:
    """The raw weight is the only parameter."""
    return WeightDrop(as_attribute)


WRAPS: list[Callable[[nn.Module], nn.Module]] = [
    spectral_norm,
    weight_norm,
    parametrized,
    parametrizations.spectral_norm,
    parametrizations.orthogonal,
    pruned,
    with_attribute,
]


def lives(_rank: int, world_size: int, stage: int, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Job: steps beside torch, with equal data on every rank."""
    results = []
    for cls, options in ((torch.optim.ASGD, {"foreach": False}), (ShardedASGD, {"stage": stage})):
        torch.manual_seed(0)
        model = wrap(nn.Linear(4, 3))
        optimizer: Any = cls(model.parameters(), lr=0.1, t0=0, **options)
        for seed in range(3):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            model(torch.randn(2, 4)).square().sum().backward()
            optimizer.step()
        results.append(list(model.parameters()))
    for mine, theirs in zip(*results, strict=True):
        assert_same_bits(mine, theirs, f"parameter on {world_size} ranks")


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@both
@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
@pytest.mark.parametrize("wrap", WRAPS, ids=lambda wrap: f"{wrap.__module__}.{wrap.__name__}")
def test_weights_that_forward_computes(
    backend: str, world_size: int, stage: int, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    """They work if their parameters are in the list, whether old hooks or parametrizations compute them."""
    run(backend, world_size, lives, stage, wrap)
