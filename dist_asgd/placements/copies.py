"""Whether a tensor is a copy of another one, also if both are sharded. Nothing here communicates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .dtensor import is_dtensor, local_tensor, same_placement
from .shard_tensor import shard_tensor_of


def is_copy_of(value: object, original: Tensor) -> bool:
    """Whether ``value`` has the shape, dtype, placement and bits of ``original``, on any device.

    Of sharded tensors this rank's elements are compared. It waits for the devices of both.
    """
    if not isinstance(value, Tensor) or value.shape != original.shape or value.dtype != original.dtype:
        return False
    if is_dtensor(original):
        if not (is_dtensor(value) and same_placement(value, original)):
            return False
    elif is_dtensor(value):
        return False
    got, wanted = _local(value), _local(original)
    return got.shape == wanted.shape and torch.equal(_bits(got).to(wanted.device), _bits(wanted))


def _local(tensor: Tensor) -> Tensor:
    fragment = shard_tensor_of(tensor)
    if fragment is not None:
        return fragment.to_local()
    return local_tensor(tensor) if is_dtensor(tensor) else tensor


def _bits(tensor: Tensor) -> Tensor:
    # NaN is not equal to itself, and -0.0 is equal to 0.0.
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def put_back(entry: Any, entries: Callable[[], Mapping[str, Tensor]], show: Callable[[], None], name: str) -> None:
    """Put the published tensors of an entry of ``optimizer.state`` back where copies have replaced them.

    ``entries`` returns what is published, and ``show`` makes the average among it one with values. RuntimeError, which
    names the parameter, if other values have replaced a tensor.
    """
    before = entries()
    # Past the methods of the entry, which would take this for a user who reads the average.
    found = {key: dict.get(entry, key) if isinstance(entry, dict) else entry.get(key) for key in before}
    if all(found[key] is value for key, value in before.items()):
        return
    show()
    for key, value in entries().items():
        if found[key] is before[key]:
            continue
        if not is_copy_of(found[key], value):
            raise RuntimeError(
                f"dist_asgd: the state of parameter {name} was replaced: {key} is another tensor, and not a copy with "
                f"the same values. Change it in place, or through load_state_dict()."
            )
        entry[key] = value
