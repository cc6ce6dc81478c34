"""Parameters that cannot be optimized yet or at all, wherever they lie: without a shape, or computed from others.

``validation`` calls it for new groups, and ``ShardedASGD`` if torch's own check of a group has failed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from .dtensor import is_dtensor


def refuse_sharded(name: str, param: Tensor) -> None:
    """Raise ValueError for a sharded tensor that is no DTensor."""
    if hasattr(param, "device_mesh") and not is_dtensor(param):
        raise ValueError(
            f"dist_asgd: parameter {name} is a {type(param).__name__}: of tensors that are sharded already only "
            f"DTensor is known here. Pass plain parameters or DTensors."
        )


def refuse_unready(named: Iterable[tuple[str, Tensor]], *, non_leaves: bool) -> None:
    """Raise ValueError if a parameter has no shape yet, or, unless ``non_leaves`` are allowed, is no leaf."""
    for name, param in named:
        if is_lazy(param):
            raise ValueError(
                f"dist_asgd: parameter {name} has no shape yet: it belongs to a lazy module (LazyLinear, for example), "
                f"which makes it in its first forward. Run one forward with a batch first, on every rank alike, and "
                f"construct the optimizer (or add the group) afterwards."
            )
        if not (param.is_leaf or non_leaves):
            raise ValueError(
                f"dist_asgd: parameter {name} is computed from other tensors (it is no leaf), so that no gradient of "
                f"its own would be applied to it. Pass the tensors that it is computed from: of a weight that forward "
                f"computes anew, as WeightDrop does, only the raw weight."
            )


@contextmanager
def naming_non_leaves(group: dict[str, Any], index: int) -> Iterator[None]:
    """Inside, torch adds ``group`` as ``param_groups[index]``; its error for a non-leaf names the tensor then."""
    try:
        yield
    except ValueError:
        _refuse_non_leaves(group, index)
        raise


def _refuse_non_leaves(group: dict[str, Any], index: int) -> None:
    params = group.get("params") if isinstance(group, dict) else None
    if not isinstance(params, list) or not all(isinstance(param, Tensor) for param in params):
        return
    places = [f"param_groups[{index}]['params'][{i}]" for i in range(len(params))]
    names = group.get("param_names") or places
    refuse_unready(zip(names, params, strict=False), non_leaves=False)
