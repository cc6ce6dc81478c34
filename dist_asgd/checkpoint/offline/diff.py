"""Compares two checkpoints key by key, with one tensor of each in memory. The command ``diff`` calls it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from reprlib import repr as repr_

import torch

from ..values import same_bits, same_values
from .contents import CheckpointContents, Progress, TensorEntry, no_progress


@dataclass(frozen=True, slots=True)
class Difference:
    """One key whose values differ. The numbers are there only if both are tensors of the same shape and dtype.

    ``num_different`` counts elements, and ``max_abs`` is the largest absolute difference of two elements.
    """

    key: str
    description: str
    num_different: int | None = None
    max_abs: float | None = None


def compare(a: CheckpointContents, b: CheckpointContents, progress: Progress = no_progress) -> Iterator[Difference]:
    """Yield a Difference for every key that differs, tensors to the bit; ``progress`` counts the bytes of ``a``."""
    keys = [*a.tensors, *a.objects]
    known = set(keys)
    others = set(b.objects)
    plain = [key for key in a.objects if key in others]
    first, second = a.values(plain), b.values(plain)
    # Values that keys share are compared once, by identity.
    same: dict[tuple[int, int], bool] = {}
    for key in keys:
        if key not in b.tensors and key not in others:
            yield Difference(key, "only in the first")
        elif key in a.tensors and key in b.tensors:
            yield from _compare_tensors(a, b, a.tensors[key], b.tensors[key])
        elif key in a.tensors or key in b.tensors:
            yield Difference(key, "a tensor in one, a plain value in the other")
        else:
            one, other = first[key], second[key]
            pair = id(one), id(other)
            if pair not in same:
                same[pair] = same_values(one, other)
            if not same[pair]:
                yield Difference(key, f"{repr_(one)} and {repr_(other)}")
        progress(a.tensors[key].bytes if key in a.tensors else 0)
    for key in (*b.tensors, *b.objects):
        if key not in known:
            yield Difference(key, "only in the second")


def _compare_tensors(
    a: CheckpointContents, b: CheckpointContents, one: TensorEntry, other: TensorEntry
) -> Iterator[Difference]:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        yield Difference(one.key, f"{list(one.shape)} {_dtype(one)} and {list(other.shape)} {_dtype(other)}")
        return
    first, second = a.tensor(one.key), b.tensor(other.key)
    if same_bits(first, second):
        return
    # A difference of two 16-bit numbers would be rounded to 16 bits.
    wide = torch.complex128 if first.is_complex() else torch.float64
    gap = (first.to(wide) - second.to(wide)).abs()
    different = int(((first != second) & ~(first.isnan() & second.isnan())).sum())
    largest = float(gap.nan_to_num(0.0, float("inf"), float("inf")).max())
    description = (
        f"{different} of {first.numel()} elements" if different else "equal but for the sign of zeros or NaN payloads"
    )
    yield Difference(one.key, description, different, largest)


def _dtype(entry: TensorEntry) -> str:
    return str(entry.dtype).removeprefix("torch.")
