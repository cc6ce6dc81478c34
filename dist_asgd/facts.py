"""What many tensors are, compared all at once: a few passes in C instead of Python per tensor.

For dense tensors the strides and the number of elements say the shape, dimensions of size 1 apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

gradient_of = attrgetter("grad")
dtype_of = attrgetter("dtype")


@dataclass(frozen=True, slots=True)
class Facts:
    """The number of elements, strides and dtype of each of some dense tensors."""

    numels: list[int]
    strides: list[tuple[int, ...]]
    dtypes: list[torch.dtype]

    def hold_for(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` are as many, and such, plain ones, and lie in memory as they read (no lazy negation)."""
        try:
            strides = list(map(Tensor.stride, tensors))
        except RuntimeError:  # sparse tensors have none
            return False
        return (
            strides == self.strides
            and list(map(Tensor.numel, tensors)) == self.numels
            and list(map(dtype_of, tensors)) == self.dtypes
            and set(map(type, tensors)) <= {Tensor}
            and True not in map(Tensor.is_neg, tensors)
        )
