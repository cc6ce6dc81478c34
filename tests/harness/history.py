"""A history: a model of odd shapes and what happens to it, the same on every rank and for every world size.

Vocabulary: a *group* is one optimizer parameter group, an *event* is one thing that happens (a step, a
changed learning rate, a save and load, ...), and *who* says which ranks hold a gradient of a parameter in a
step.

The gradient that a step applies (the *mean gradient*) depends on the seed, the step and the parameter only.
In stage 2 each rank holds a share of it: all shares are small multiples of ``world_size / 16``, so that
every way to sum and scale them is exact and gives the mean gradient to the bit, in 16-bit dtypes too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "complex64": torch.complex64,
}


@dataclass(frozen=True)
class ParamSpec:
    """One parameter. ``layout``: contiguous, transposed, channels_last or sliced (every second element)."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    frozen: bool = False


@dataclass(frozen=True)
class GroupSpec:
    """One parameter group and its hyperparameters."""

    params: tuple[ParamSpec, ...]
    lr: float = 0.05
    lambd: float = 1e-4
    alpha: float = 0.75
    t0: float = 1e6
    weight_decay: float = 0.0
    maximize: bool = False
    tensor_lr: bool = False

    def options(self) -> dict[str, Any]:
        """The group's entries apart from its parameters."""
        lr: float | Tensor = torch.tensor(self.lr, dtype=torch.float64) if self.tensor_lr else self.lr
        return {
            "lr": lr,
            "lambd": self.lambd,
            "alpha": self.alpha,
            "t0": self.t0,
            "weight_decay": self.weight_decay,
            "maximize": self.maximize,
        }


@dataclass(frozen=True)
class Step:
    """One optimizer step. ``who`` and ``by_hand`` are per parameter, repeated over longer lists.

    ``who`` is ``all``, ``none`` or ``some`` (stage 2; ``all`` in stage 1). In stage 2 ``by_hand`` parameters
    get their gradient set before ``step()``, the others from ``num_backwards`` backwards, of which all but
    the last run under ``no_sync()`` if ``no_sync``.
    """

    who: tuple[str, ...] = ("all",)
    by_hand: tuple[bool, ...] = (False,)
    num_backwards: int = 1
    no_sync: bool = False


@dataclass(frozen=True)
class SetLr:
    """``group["lr"]`` changes, in place if it is a tensor."""

    group: int
    lr: float


@dataclass(frozen=True)
class SetT0:
    """``group["t0"]`` changes."""

    group: int
    t0: float


@dataclass(frozen=True)
class StartAveraging:
    """``start_averaging()``."""


@dataclass(frozen=True)
class AddGroup:
    """``add_param_group``."""

    group: GroupSpec


@dataclass(frozen=True)
class Reload:
    """Go on with a new optimizer that loads the state.

    ``kind`` is what it loads: ``own`` (shards), ``consolidated``, ``torch`` (the oracle's), or what torch's
    ``get_optimizer_state_dict`` makes of it, ``by name``, there also ``full``.
    """

    kind: str


Event = Step | SetLr | SetT0 | StartAveraging | AddGroup | Reload


@dataclass(frozen=True)
class History:
    """Groups at construction, and the events after it."""

    groups: tuple[GroupSpec, ...]
    events: tuple[Event, ...]
    seed: int = 0
    named: bool = False


def make_params(group: GroupSpec, seed: int, first_index: int) -> list[Tensor]:
    """The group's parameters at the start; ``first_index`` counts the parameters of earlier groups."""
    return [_make_param(spec, _generator(seed, 0, first_index + i)) for i, spec in enumerate(group.params)]


def like(param: Tensor) -> Tensor:
    """A new leaf with the values, strides and ``requires_grad`` of ``param``."""
    return nn.Parameter(param.detach().clone(memory_format=torch.preserve_format), param.requires_grad)


def mean_gradient(param: Tensor, seed: int, step: int, index: int, *, dyadic: bool) -> Tensor:
    """The gradient that step ``step`` applies to parameter ``index``: contiguous, of its dtype."""
    generator = _generator(seed, step, index)
    if dyadic:
        return _small_integers(param, generator, 8) / 16
    return torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype) / 2


def shares(mean: Tensor, ranks: tuple[int, ...], world_size: int, seed: int) -> dict[int, Tensor]:
    """One gradient for each of ``ranks`` whose sum over ``world_size`` is exactly ``mean``."""
    generator = torch.Generator().manual_seed(seed)
    first, *others = ranks
    given = {rank: exact_share(mean, world_size, generator) for rank in others}
    rest = mean * world_size
    for share in given.values():
        rest = rest - share
    return {first: rest, **given}


def exact_share(like_: Tensor, world_size: int, generator: torch.Generator) -> Tensor:
    """A gradient that can be added to and taken from shares without rounding."""
    return _small_integers(like_, generator, 2) * world_size / 16


def ranks_of(who: str, world_size: int, seed: int, step: int, index: int) -> tuple[int, ...]:
    """The ranks that hold a gradient of parameter ``index`` in step ``step``."""
    if who == "none":
        return ()
    everyone = tuple(range(world_size))
    if who == "all" or world_size == 1:
        return everyone
    bits = int(torch.randint(1, 2**world_size - 1, (), generator=_generator(seed + 7, step, index)))
    return tuple(rank for rank in everyone if bits >> rank & 1)


def _small_integers(like_: Tensor, generator: torch.Generator, bound: int) -> Tensor:
    shape = (*like_.shape, 2) if like_.is_complex() else like_.shape
    drawn = torch.randint(-bound, bound + 1, shape, generator=generator)
    if like_.is_complex():
        return torch.view_as_complex(drawn.to(torch.float32)).to(like_.dtype)
    return drawn.to(like_.dtype)


def _make_param(spec: ParamSpec, generator: torch.Generator) -> Tensor:
    dtype = DTYPES[spec.dtype]
    drawn_as = torch.complex128 if dtype.is_complex else torch.float64
    shape = (*spec.shape[:-1], 2 * spec.shape[-1]) if spec.layout == "sliced" else spec.shape
    value = torch.randn(shape, generator=generator, dtype=drawn_as).to(dtype)
    if spec.layout == "sliced":
        value = value[..., ::2]
    elif spec.layout == "transposed":
        value = value.transpose(0, -1).contiguous().transpose(0, -1)
    elif spec.layout == "channels_last":
        value = value.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(value, not spec.frozen)


def _generator(seed: int, step: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step * 1_009 + index)
