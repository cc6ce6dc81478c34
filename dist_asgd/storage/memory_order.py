"""Memory order: the order in which the elements of a tensor lie in memory, and tensors as 1-D in that order.

A parameter in a bucket keeps its strides (channels-last, for example), so fragments, gradients and state are counted in
memory order. It is written as the strides of a tensor that is dense in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def memory_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides that ``tensor`` has in a bucket: its own if it is dense in memory, else contiguous ones."""
    # Sorted by stride, the dimensions of a dense tensor follow each other without a gap or an overlap.
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                # Contiguous strides as torch defines them, which cost no memory on the meta device.
                return torch.empty(tensor.shape, device="meta").stride()
            expected *= size
    return tensor.stride()


def same_strides(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether the elements of ``tensor`` lie in memory as ``strides`` say.

    The strides of dimensions of size 1, and all strides of an empty tensor, do not matter.
    """
    own = tensor.stride()
    if own == strides or not tensor.numel():
        return True
    return all(size == 1 or a == b for size, a, b in zip(tensor.shape, own, strides, strict=True))


def as_real(flat: Tensor) -> Tensor:
    """``flat`` ``(n,)`` as reals: itself, or ``(2n,)`` with the (re, im) pairs of a complex one; a view."""
    return torch.view_as_real(flat).view(-1) if flat.is_complex() else flat


def in_memory_order(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``tensor`` as ``(numel,)`` in the memory order of ``strides``: a view if it has that order, else a copy."""
    # Conjugation and negation can be lazy: whoever reads bare memory must find the values there.
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if not same_strides(tensor, strides):
        tensor = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def flattened(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``tensor`` as 1-D reals in the memory order of ``strides``: a view if it has that order, else a copy."""
    return as_real(in_memory_order(tensor, strides))
