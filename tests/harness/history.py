"""Histories of training: a model of odd shapes and events, the same on every rank and for every world size.

Vocabulary
    group   one parameter group of the optimizer
    event   a step, a changed learning rate, a save and load, or the like
    who     the ranks that have a gradient of a parameter in a step
    share   the gradient of one rank in stage 2; the mean of all shares is the mean gradient

The gradient that a step applies (the *mean gradient*) depends on the seed, the step and the parameter only. Shares are
small multiples of ``world_size / 16``, so that they can be summed and scaled in any order without rounding, and give
the mean gradient to the bit, in 16-bit dtypes too.
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
    """One parameter. ``layout`` is contiguous, transposed, channels_last or sliced (every second element)."""

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
    """One optimizer step. ``who`` and ``by_hand`` have an entry for each parameter; shorter ones are repeated.

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
    """Set ``group["lr"]``, in place if it is a tensor."""

    group: int
    lr: float


@dataclass(frozen=True)
class SetT0:
    """Set ``group["t0"]``."""

    group: int
    t0: float


@dataclass(frozen=True)
class StartAveraging:
    """Call ``start_averaging()``."""


@dataclass(frozen=True)
class AddGroup:
    """Call ``add_param_group()``."""

    group: GroupSpec


@dataclass(frozen=True)
class SetTrained:
    """Freeze or unfreeze a parameter of the groups at construction, counted over all of them and around the end."""

    param: int
    trained: bool

    def index(self, history: History) -> int:
        """The number of the parameter."""
        return self.param % sum(len(group.params) for group in history.groups)


@dataclass(frozen=True)
class Reload:
    """Continue with a new optimizer that loads the state.

    ``kind`` is the state dict that it loads: ``own`` (the rank's shards), ``consolidated``, ``torch`` (the oracle's),
    or the result of torch's ``get_optimizer_state_dict``: ``by name``, or ``full``.
    """

    kind: str


Event = Step | SetLr | SetT0 | StartAveraging | AddGroup | SetTrained | Reload


@dataclass(frozen=True)
class History:
    """The groups at construction, and the events after it. With ``named``, parameters are given with names."""

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
    """The gradient that step ``step`` applies to parameter ``index``: contiguous, with the parameter's dtype."""
    generator = _generator(seed, step, index)
    if dyadic:
        return _small_integers(param, generator, 8) / 16
    return torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype) / 2


def shares(mean: Tensor, ranks: tuple[int, ...], world_size: int, seed: int) -> dict[int, Tensor]:
    """Gradients for ``ranks``, by rank. Their sum divided by ``world_size`` is exactly ``mean``."""
    generator = torch.Generator().manual_seed(seed)
    first, *others = ranks
    given = {rank: exact_share(mean, world_size, generator) for rank in others}
    rest = mean * world_size
    for share in given.values():
        rest = rest - share
    return {first: rest, **given}


def exact_share(like_: Tensor, world_size: int, generator: torch.Generator) -> Tensor:
    """A gradient that can be added to shares, and subtracted from them, without rounding."""
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
