"""Linear combinations of the tensors of several checkpoints, streamed into safetensors files in one process.

``average`` and ``between`` plan them: a mean, an EMA and the mean of the iterates between two checkpoints are sums of
tensors with factors. Sums are formed in float64, or complex128, one tensor after the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..format.paths import AnyPath
from ..format.safetensors import DEFAULT_MAX_BYTES, TensorFiles, TensorSpec
from .contents import CheckpointContents, Progress, no_progress
from .convert import Weight, read_weight

# Elements that are converted to float64 at a time: 1 MiB, beside the sum.
_BLOCK = 1 << 17


@dataclass(frozen=True, slots=True)
class Term:
    """The tensor ``weight`` of one checkpoint, which is multiplied by ``factor``."""

    contents: CheckpointContents
    weight: Weight
    factor: float = 1.0

    @property
    def bytes(self) -> int:
        """The bytes that are read for it."""
        return self.contents.tensors[self.weight.key].bytes


@dataclass(frozen=True, slots=True)
class Combination:
    """One tensor of the result: the sum of its ``terms``, divided by ``divisor``, in the dtype and shape of ``spec``.

    Without a divisor it is a copy of its only term.
    """

    spec: TensorSpec
    terms: tuple[Term, ...]
    divisor: float | None = None


@dataclass(slots=True)
class Merge:
    """What is to be written: ``tensors`` by name, and what to say of them.

    Attributes:
        tensors: each tensor of the result, in the order of the model.
        facts: plain values for the metadata of the files and for JSON: sources, steps, weights.
        num_averages: the number of tensors that combine averages ``ax``; the other combined ones are last iterates.
        notes: sentences for the user about what is not as one may expect.
    """

    tensors: dict[str, Combination]
    facts: dict[str, Any]
    num_averages: int
    notes: list[str] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        """The bytes that are read."""
        return sum(term.bytes for tensor in self.tensors.values() for term in tensor.terms)

    @property
    def num_combined(self) -> int:
        """The number of tensors that are no copies."""
        return sum(tensor.divisor is not None for tensor in self.tensors.values())


def copy_of(contents: CheckpointContents, weight: Weight) -> Combination:
    """Return the combination that is ``weight`` as it is."""
    return Combination(weight.spec, (Term(contents, weight),))


def write(
    merge: Merge,
    out: AnyPath,
    metadata: Mapping[str, str],
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> list[AnyPath]:
    """Write the tensors of ``merge`` one after the other, and return the files.

    In memory are the sum of one tensor, in float64, and one tensor of a source. Raises CheckpointError if a source is
    damaged, ValueError if ``out`` cannot be written, and OSError if the disk is full; then no file is left.
    """
    specs = {name: tensor.spec for name, tensor in merge.tensors.items()}
    with TensorFiles(out, specs, metadata=metadata, max_bytes=max_bytes, overwrite=overwrite) as files:
        for name, tensor in merge.tensors.items():
            # The value gets no name, because it would live on while the next one is computed.
            files.write(name, _value_of(tensor, progress))
    return files.paths


@torch.no_grad()
def _value_of(tensor: Combination, progress: Progress) -> Tensor:
    """Read and combine the terms of one tensor; returns it in the dtype of its spec, on the CPU."""
    if tensor.divisor is None:
        (term,) = tensor.terms
        whole = read_weight(term.contents, term.weight)
        progress(term.bytes)
        return whole.to(tensor.spec.dtype)
    wide = torch.complex128 if tensor.spec.dtype.is_complex else torch.float64
    total = _flat(tensor.terms[0]).to(wide, copy=True).mul_(tensor.terms[0].factor)
    progress(tensor.terms[0].bytes)
    for term in tensor.terms[1:]:
        _add(total, _flat(term), term.factor)
        progress(term.bytes)
    return total.div_(tensor.divisor).to(tensor.spec.dtype).view(tensor.spec.shape)


def _flat(term: Term) -> Tensor:
    return read_weight(term.contents, term.weight).reshape(-1)


def _add(total: Tensor, values: Tensor, factor: float) -> None:
    """Add ``values`` times ``factor`` to ``total``; both are ``(n,)``, and ``total`` has the wider dtype."""
    # By blocks, because add_() would convert all of the values at once.
    for start in range(0, total.numel(), _BLOCK):
        into, block = (tensor[start : start + _BLOCK] for tensor in (total, values))
        # The product is rounded by itself: add_(alpha=...) may fuse both, which depends on the processor.
        into += block.to(total.dtype, copy=True).mul_(factor)


def scaled_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return a factor for each of ``count`` checkpoints: ``weights`` times a power of two, or ones.

    The power keeps sums finite, and the ratios exact. Raises ValueError unless there are ``count`` finite weights, none
    of them negative and not all zero.
    """
    if weights is None:
        return [1.0] * count
    given = list(weights)
    shown = ", ".join(f"{weight:g}" if isinstance(weight, int | float) else repr(weight) for weight in given)
    if len(given) != count:
        raise ValueError(
            f"dist_asgd: got {len(given)} weights ({shown}) for {count} checkpoints: give one "
            f"weight for each checkpoint, in the same order."
        )
    for position, weight in enumerate(given):
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 <= weight < float("inf"):
            raise ValueError(
                f"dist_asgd: weights must be finite numbers from 0 on, got {shown}: number {position + 1} is "
                f"{weight!r}."
            )
    largest = float(max(given))
    if largest == 0:
        raise ValueError(
            f"dist_asgd: the weights ({shown}) have the sum 0, so there is no mean: give one that is not 0."
        )
    _, exponent = math.frexp(largest)
    return [math.ldexp(float(weight), 1 - exponent) for weight in given]
