"""Parameter groups in state dicts: parameters as numbers, in the order of registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# How a process runs, not what it trains; torch.optim.ASGD's groups have no such key.
NOT_SAVED = ("fused",)


def _snapshot(value: Any) -> Any:
    # A Tensor lr changes in place; what was saved must not.
    return value.detach().clone() if isinstance(value, Tensor) else value


def pack_groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``param_groups`` with parameters numbered in order, as ``torch.optim`` packs them."""
    packed = []
    first = 0
    for group in groups:
        entry = {key: _snapshot(value) for key, value in group.items() if key not in ("params", *NOT_SAVED)}
        entry["params"] = list(range(first, first + len(group["params"])))
        first += len(group["params"])
        packed.append(entry)
    return packed
