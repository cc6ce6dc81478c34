"""State dicts of an optimizer that shards nothing (``differentiable=True``), in torch's own layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..update.differentiable import init_state
from .load import ParsedStateDict
from .sharded import pack_groups


def pack(groups: Sequence[dict[str, Any]], state: Any) -> dict[str, Any]:
    """Return torch's own state dict of ``optimizer.state``; its tensors are the live ones, as in torch."""
    params = [param for group in groups for param in group["params"]]
    return {
        "state": {i: dict(state[p]) for i, p in enumerate(params) if p in state},
        "param_groups": pack_groups(groups),
    }


def apply(loaded: ParsedStateDict, groups: Sequence[dict[str, Any]], state: Any) -> None:
    """Replace ``optimizer.state`` by the loaded state; no tensor is cast to a narrower dtype."""
    params = [(param, group["lr"]) for group in groups for param in group["params"]]
    for index, (param, lr) in enumerate(params):
        entry = loaded.entries.get(index)
        state.pop(param, None)
        if param.requires_grad:
            state[param] = init_state(param, lr)
        if entry is not None:
            dtype = torch.promote_types(entry.average.dtype, param.dtype)
            average = entry.average.detach().to(param.device, dtype, copy=True)
            state[param] = {"step": entry.step, "eta": entry.eta, "mu": entry.mu, "ax": average}
