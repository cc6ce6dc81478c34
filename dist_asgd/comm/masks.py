"""Bit masks over parameters: bit i of an integer stands for the parameter with index i. Exchanges send such masks."""

from __future__ import annotations

from collections.abc import Iterable


def bit_mask(indices: Iterable[int]) -> int:
    """Return the mask in which the bits of ``indices`` are set."""
    mask = 0
    for index in indices:
        mask |= 1 << index
    return mask


def indices_in(mask: int) -> frozenset[int]:
    """Return the indices whose bits are set in ``mask``."""
    return frozenset(index for index, bit in enumerate(reversed(f"{mask:b}")) if bit == "1")
