"""Stochastic rounding of float32 values to bfloat16 parameters in torch operators: the reference of the kernels'.

key  32 bits, computed from the seed and a parameter's index, that give each parameter random numbers of its own
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..storage.masters import NAN_BITS

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9


def mix(word: int) -> int:
    """A bijection of 32-bit words; every bit of the argument affects every bit of the result."""
    word ^= word >> 16
    word = word * 0x7FEB352D & MASK
    word ^= word >> 15
    word = word * 0x846CA68B & MASK
    return word ^ word >> 16


def _mix_all(words: Tensor) -> Tensor:
    """``mix`` of every element: int64 tensors, as torch has few operators for uint32."""
    words = words ^ words >> 16
    words = words * 0x7FEB352D & MASK
    words = words ^ words >> 15
    words = words * 0x846CA68B & MASK
    return words ^ words >> 16


def parameter_key(seed: int, index: int) -> int:
    """The key of parameter ``index`` (in registration order) under a 64-bit ``seed``."""
    return mix(mix(mix(seed & MASK) ^ (seed >> 32 & MASK)) + index * GOLDEN & MASK)


def step_key(key: int, step: int) -> int:
    """The key of one parameter in step ``step``, counted from 1."""
    return mix(key ^ mix(step & MASK))


def random_16(key: int, step: int, first: int, numel: int, device: torch.device) -> Tensor:
    """Uniform integers in [0, 65536) for ``numel`` elements of a parameter from ``first`` on: ``(numel,)`` int64.

    Each depends only on the key, the step and the element's offset in the whole parameter, and so not on the sharding.
    """
    elements = torch.arange(first, first + numel, device=device)
    words = _mix_all(elements & MASK ^ step_key(key, step))
    return _mix_all(words + (elements >> 32) * GOLDEN + key & MASK) >> 16


def round_stochastically(values: Tensor, param: Tensor, random: Tensor) -> None:
    """Write float32 ``values`` to bfloat16 ``param``, each rounded up or down so that its mean is exact.

    ``random`` are integers in [0, 65536), one for each value.
    """
    bits = values.view(torch.int32)
    # Infinities and NaNs are kept: a carry into their exponent would make them other values.
    moved = torch.where(values.isfinite(), bits + random.to(torch.int32), bits) >> 16
    param.view(torch.int16).copy_(torch.where(values.isnan(), NAN_BITS >> 16, moved))
