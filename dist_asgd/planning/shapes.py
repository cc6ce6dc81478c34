"""The parameters of a model as names, shapes and dtypes: all that a plan knows of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# The name of a block: up to the first number between dots, as in ``model.layers.17.mlp.up_proj.weight``.
_BLOCK = re.compile(r"(?:.*?\.)?\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class ParamShape:
    """One parameter. ``trained`` is False if it is frozen: no mode holds a gradient or an average of it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool = True

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the elements."""
        return self.numel * self.dtype.itemsize

    @property
    def block(self) -> str:
        """The block of the model that it belongs to, by its name; empty if its name has no number."""
        found = _BLOCK.match(self.name)
        return found[0] if found else ""

    def on_meta(self) -> Tensor:
        """A parameter of this shape on the meta device, which has no memory."""
        empty = torch.empty(self.shape, dtype=self.dtype, device="meta")
        return torch.nn.Parameter(empty, requires_grad=self.trained)


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """A model: the parameters of each parameter group in registration order, tied ones once.

    source        where the shapes come from, for people
    buffer_bytes  the bytes of the model's buffers, which every rank has in every mode
    assumptions   what was assumed about shapes that were not given, a sentence each
    """

    source: str
    groups: tuple[tuple[ParamShape, ...], ...]
    buffer_bytes: int = 0
    assumptions: tuple[str, ...] = ()

    @property
    def params(self) -> Iterator[ParamShape]:
        """All parameters."""
        return (param for group in self.groups for param in group)

    @property
    def trained(self) -> list[ParamShape]:
        """The parameters that are not frozen."""
        return [param for param in self.params if param.trained]

    @property
    def frozen_bytes(self) -> int:
        """The bytes of frozen parameters."""
        return sum(param.nbytes for param in self.params if not param.trained)

    def as_dtype(self, dtype: torch.dtype) -> ModelShapes:
        """The model with its floating-point parameters in ``dtype``, as ``model.to(dtype)`` makes it."""
        groups = tuple(
            tuple(replace(p, dtype=dtype) if p.dtype.is_floating_point else p for p in group) for group in self.groups
        )
        return replace(self, groups=groups)

    def blocks(self) -> dict[str, int]:
        """The bytes of trained and frozen parameters by block; those outside of any block are under ""."""
        found: dict[str, int] = {}
        for param in self.params:
            found[param.block] = found.get(param.block, 0) + param.nbytes
        return found
