"""Parameters that cannot be optimized yet or at all, wherever they lie: without a shape, or computed from others.

``validation`` calls it for new groups, and ``ShardedASGD`` if torch's own check of a group has failed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy


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


def refuse_non_leaves(group: dict[str, Any], index: int) -> None:
    """Raise ValueError if torch has refused ``group``, which is to be ``param_groups[index]``, for a tensor in it."""
    params = group.get("params") if isinstance(group, dict) else None
    if not isinstance(params, list) or not all(isinstance(param, Tensor) for param in params):
        return
    places = [f"param_groups[{index}]['params'][{i}]" for i in range(len(params))]
    names = group.get("param_names") or places
    refuse_unready(zip(names, params, strict=False), non_leaves=False)
