"""State dicts where nothing is sharded (``differentiable=True``): torch's own layout over ``optimizer.state``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..update.differentiable import init_state
from .load import ParsedStateDict
from .packing import pack_groups


def pack(groups: Sequence[dict[str, Any]], state: Any) -> dict[str, Any]:
    """torch's own state dict; tensors are the live ones, as in torch."""
    params = [param for group in groups for param in group["params"]]
    return {"state": {i: dict(state[p]) for i, p in enumerate(params)}, "param_groups": pack_groups(groups)}


def apply(loaded: ParsedStateDict, groups: Sequence[dict[str, Any]], state: Any) -> None:
    """Replace the state by a loaded one; nothing is cast to a narrower dtype."""
    params = [(param, group["lr"]) for group in groups for param in group["params"]]
    for index, (param, lr) in enumerate(params):
        state[param] = init_state(param, lr)
        entry = loaded.entries.get(index)
        if entry is not None:
            dtype = torch.promote_types(entry.average.dtype, param.dtype)
            average = entry.average.detach().to(param.device, dtype, copy=True)
            state[param] = {"step": entry.step, "eta": entry.eta, "mu": entry.mu, "ax": average}
