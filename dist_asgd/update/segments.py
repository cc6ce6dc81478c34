"""What a kernel call updates: a table of segments, planned once and run every step.

segment  consecutive elements with the same scalars and one place for their gradient: a stretch of a shard, a piece
         of a parameter, or a whole tensor
kind     what the arrays hold: one compiled kernel each
row      the line of the scalars (c, -eta, mu) that a segment is updated with
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KernelDtypes:
    """The dtypes of one kernel call.

    param       float32, float64, bfloat16 or float16
    gradient    the parameter's, or float32 for a 16-bit parameter
    average     the parameter's, or a wider one
    master      16-bit parameters: int16 remainders beside bfloat16, float32 masters beside float16
    stochastic  bfloat16 without master: rounded stochastically
    """

    param: torch.dtype
    gradient: torch.dtype
    average: torch.dtype
    master: bool = False
    stochastic: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """``numel`` elements; tensors are 1-D, contiguous and real.

    gradient  None where it comes anew with every step (stage 1)
    first     the place of the first element in its parameter (stochastic rounding)
    key       of the parameter (stochastic rounding)
    lanes     16-bit parameters on CPUs: so many first elements are rounded as torch rounds full vector lanes
    """

    param: Tensor
    average: Tensor
    master: Tensor | None
    gradient: Tensor | None
    row: int
    first: int = 0
    key: int = 0
    lanes: int = 0

    @property
    def numel(self) -> int:
        """Elements of the segment."""
        return self.param.numel()


@dataclass(frozen=True, slots=True)
class Scaling:
    """What a step multiplies its gradients by: 0-dim tensors, None where there is nothing to do."""

    unscale: Tensor | None = None
    clip: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return (factor for factor in (self.unscale, self.clip) if factor is not None)

    def numbers(self) -> tuple[float, float]:
        """Both factors on the host."""
        unscale, clip = (1.0 if factor is None else float(factor.item()) for factor in (self.unscale, self.clip))
        return unscale, clip


UNSCALED = Scaling()
