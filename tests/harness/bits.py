"""Equality to the bit: NaNs equal themselves, and -0.0 differs from 0.0."""

from typing import Any

import torch
from torch import Tensor

from dist_asgd.placements.shard_tensor import ShardTensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and bits are the same; strides may differ. ShardTensors need the same fragment."""
    if isinstance(a, ShardTensor) and isinstance(b, ShardTensor):
        return a.extent == b.extent and same_bits(a.to_local(), b.to_local())
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_as_integers(a), _as_integers(b))


def assert_same_bits(found: Tensor, expected: Tensor, what: str) -> None:
    """Fail and name the first element that differs, unless ``same_bits``; ``what`` names the tensor."""
    assert found.dtype == expected.dtype, f"{what}: dtype {found.dtype}, expected {expected.dtype}"
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, expected {expected.shape}"
    if same_bits(found, expected):
        return
    differs = (_as_integers(found) != _as_integers(expected)).reshape(*found.shape, -1).any(-1).reshape(-1)
    at = int(differs.nonzero()[0])
    f, e = found.detach().reshape(-1)[at].item(), expected.detach().reshape(-1)[at].item()
    raise AssertionError(
        f"{what}: {int(differs.sum())} of {differs.numel()} elements of {tuple(found.shape)} {found.dtype} "
        f"differ, first [{at}]: {f!r}, expected {e!r}"
    )


def same_tree(a: Any, b: Any) -> bool:
    """Whether nested dicts, lists and tuples are equal; tensors are compared to the bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and same_bits(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tree(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same_tree(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b or (a != a and b != b))


def _as_integers(x: Tensor) -> Tensor:
    x = x.detach().contiguous()
    if x.is_complex():
        x = torch.view_as_real(x)
    return x.view(_INTEGERS[x.element_size()]) if x.is_floating_point() else x
