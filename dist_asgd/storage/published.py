"""Tensors that users hold over the flat memory: parameters, and the state that ``optimizer.state`` shows.

torch, savers and users tell tensors apart by their storages, and move a tensor by moving its storage. A view of a
bucket would share one storage with all its neighbours, so each tensor that is handed out has a storage of its own.
Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]


def own_storage(tensor: Tensor) -> Tensor:
    """The memory of ``tensor``, which is dense, as a tensor with a storage of its own, of exactly its bytes.

    It has the same dtype, shape and strides, and a version counter of its own. The flat memory lives as long as it.
    Whoever saves, pickles or copies the result gets its bytes only, and whoever moves its storage moves nothing else.
    """
    if not tensor.numel():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    try:
        owner: Tensor = from_dlpack(to_dlpack(tensor.detach()))
    except (BufferError, RuntimeError):
        # Not every backend has DLPack. Without it the tensor works, and only shares its storage with its neighbours.
        return tensor
    # DLPack normalises the strides of dimensions of size 1.
    return owner if owner.stride() == tensor.stride() else owner.as_strided(tensor.shape, tensor.stride())


def placeholder(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a tensor ``(numel,)`` of zeros that has memory for one: whoever writes it gets torch's error."""
    return torch.zeros(1, dtype=dtype, device=device).expand(numel)


def as_strided(tensor: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """View ``tensor``, ``(numel,)`` and dense or a part of a placeholder, in another shape."""
    return tensor[0].expand(shape) if _is_placeholder(tensor) else tensor.as_strided(shape, strides)


def as_complex(reals: Tensor) -> Tensor:
    """View pairs of ``reals``, ``(numel,)`` and dense or a part of a placeholder, as complex numbers."""
    if _is_placeholder(reals):
        return torch.complex(reals[:1], reals[:1]).expand(reals.numel() // 2)
    return torch.view_as_complex(reals.view(-1, 2))


def _is_placeholder(tensor: Tensor) -> bool:
    return tensor.stride() == (0,) and tensor.numel() > 0
