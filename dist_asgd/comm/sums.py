"""Sums of values that lie in several places of the host's memory, in a given order, and with the bits of torch's."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .pages import library

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
# How many elements are summed and divided at a time, so that they stay in a core's cache in between.
SUM_NUMEL = 1 << 16


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype values of ``dtype`` are summed: 16 bits in float32, so that they are rounded at most once."""
    return torch.float32 if dtype in SIXTEEN_BIT else dtype


def fold(values: Sequence[Tensor], total: Tensor, divisor: int) -> None:
    """``total = (values[0] + values[1] + ...) / divisor``, summed from left to right in the dtype of ``total``.

    All are 1-D and of one length, ``values`` two or more of ``total``'s dtype or of 16 bits; ``values[0]`` may be
    ``total``. Waits for nobody.
    """
    loaded = library()
    dtype = total.dtype
    if dtype in (torch.float32, torch.float64) and all(value.dtype == dtype for value in values):
        assert not isinstance(loaded, str)
        function = loaded.dist_asgd_fold_float32 if dtype == torch.float32 else loaded.dist_asgd_fold_float64
        addresses = (ctypes.c_void_p * len(values))(*(value.data_ptr() for value in values))
        function(total.data_ptr(), addresses, len(values), total.numel(), divisor)
        return
    for first in range(0, total.numel(), SUM_NUMEL):
        sums = total[first : first + SUM_NUMEL]
        for i, value in enumerate(values):
            chunk = value[first : first + SUM_NUMEL]
            if i:
                sums.add_(chunk)
            elif chunk.data_ptr() != sums.data_ptr():
                sums.copy_(chunk)
        if divisor != 1:
            sums.div_(divisor)


def store(total: Tensor, target: Tensor, accumulate: bool) -> None:
    """``target = total``, or ``target += total`` in the dtype of ``target``."""
    if accumulate:
        target.add_(total.to(target.dtype))
    else:
        target.copy_(total)


class Means:
    """Means of values, with the memory that their sums need."""

    def __init__(self) -> None:
        self._sums: dict[torch.dtype, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """The bytes that are kept between steps."""
        return sum(buffer.nbytes for buffer in self._sums.values())

    def store(self, values: Sequence[Tensor], target: Tensor, accumulate: bool) -> None:
        """``target = mean(values)``, or ``+=``: with the bits of ``Gloo``'s, and ``values`` are only read."""
        dtype = values[0].dtype
        if not accumulate and target.dtype == dtype and dtype in (torch.float32, torch.float64):
            fold(values, target, len(values))
            return
        wide = sum_dtype(dtype)
        if wide not in self._sums:
            self._sums[wide] = torch.empty(SUM_NUMEL, dtype=wide, device="cpu")
        for first in range(0, target.numel(), SUM_NUMEL):
            place = target[first : first + SUM_NUMEL]
            total = self._sums[wide][: place.numel()]
            fold([value[first : first + SUM_NUMEL] for value in values], total, len(values))
            store(total, place, accumulate)
