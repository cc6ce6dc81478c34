"""What a kernel call updates: a table of segments, planned once and run at every step.

segment  consecutive elements with the same scalars and contiguous gradients: a range of a shard, of one parameter's
         fragment, or a whole tensor
row      the line of scalars (c, -eta, mu, t) that a segment is updated with
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..storage.buffers import ShardedParam, StateBuffer
from ..storage.memory_order import flattened
from ..storage.snapshots import AddressTable

NO_AVERAGES = "dist_asgd: a kernel is to write averages that have no memory yet"


@dataclass(frozen=True, slots=True)
class KernelDtypes:
    """The dtypes of one kernel call.

    param       float32, float64, bfloat16 or float16
    gradient    the parameter's, or float32 for a 16-bit parameter
    average     the parameter's, or a wider one
    master      16-bit parameters: int16 remainders beside bfloat16, float32 masters beside float16
    stochastic  bfloat16 without masters: rounded stochastically
    """

    param: torch.dtype
    gradient: torch.dtype
    average: torch.dtype
    master: bool = False
    stochastic: bool = False

    @classmethod
    def of(cls, buffer: StateBuffer) -> KernelDtypes:
        """The dtypes of a state buffer's parameters, gradients and state."""
        has_master = buffer.master is not None
        return cls(buffer.dtype, buffer.gradient_dtype, buffer.average.dtype, has_master, buffer.seed is not None)


@dataclass(frozen=True, slots=True)
class Segment:
    """The arrays of one segment: 1-D, contiguous and real, all of ``numel`` elements.

    average   None if it has no memory yet, because the parameters stand for their averages
    gradient  None if it is another tensor at every step (stage 1)
    row       the index of the segment's scalars
    first     the offset of the first element in its whole parameter (stochastic rounding)
    key       the parameter's key (stochastic rounding)
    lanes     16-bit parameters on CPUs: how many of the first elements are rounded as torch rounds full vector lanes
    """

    param: Tensor
    average: Tensor | None
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


class SegmentGradients:
    """Finds the gradients of a launch's segments in ``p.grad`` (stage 1), one for each segment.

    ``members[i]`` is the parameter of segment i, whose gradient begins ``starts_bytes[i]`` into the parameter's.
    """

    def __init__(self, members: list[ShardedParam], starts_bytes: list[int]) -> None:
        self._members = members
        self._starts_bytes = starts_bytes
        indices = [member.index for member in members]
        self._addresses = AddressTable(list(zip(indices, starts_bytes, strict=True)))
        buffer = members[0].bucket
        # Only then does the step's table of addresses have these gradients, element for element as the kernel's.
        self._in_table = not buffer.separate_params and not buffer.param_dtype.is_complex

    def pointers(self, addresses: array[int] | None) -> tuple[array[int], list[Tensor]]:
        """The address of each segment's gradient in this step, and tensors to keep until the kernel has been called.

        ``addresses`` are ``GradientTable.addresses``. Gradients that are not in memory order are copied.
        """
        if addresses is not None and self._in_table:
            return self._addresses.of(addresses), []
        flats = [_in_memory_order(member) for member in self._members]
        starts = zip(flats, self._starts_bytes, strict=True)
        return array("Q", [flat.data_ptr() + start for flat, start in starts]), flats


def _in_memory_order(member: ShardedParam) -> Tensor:
    """A tensor whose memory has the parameter's gradient as reals in memory order: the gradient itself if it can be."""
    gradient = cast(Tensor, member.gradient)
    if gradient.stride() == member.strides and not gradient.is_complex() and not gradient.is_neg():
        return gradient
    return flattened(gradient, member.strides)


@dataclass(frozen=True, slots=True)
class Scaling:
    """The factors that a step multiplies gradients by: 0-dim tensors, None instead of 1."""

    unscale: Tensor | None = None
    clip: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return (factor for factor in (self.unscale, self.clip) if factor is not None)

    def numbers(self) -> tuple[float, float]:
        """Both factors as numbers; waits for the device that they are on."""
        unscale, clip = (1.0 if factor is None else float(factor.item()) for factor in (self.unscale, self.clip))
        return unscale, clip


UNSCALED = Scaling()
