"""What ranks must have in common, as claims for an exchange: parameters, and hyperparameters step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import fsdp1
from .agreement import NO_CLAIM, Claim
from .buffers import memory_strides
from .dtensor import description, is_dtensor
from .validation import hyperparameters


def _describe(param: Tensor) -> str:
    kind = "trainable" if param.requires_grad else "frozen"
    dtype = str(param.dtype).removeprefix("torch.")
    if fsdp1.is_part(param):
        # Ranks have parts of other lengths.
        return f"<{kind} {dtype} of FSDP1, on {param.device.type}>"
    if is_dtensor(param):
        return f"<{kind} {dtype} DTensor of shape {tuple(param.shape)}, {description(param)}, on {param.device.type}>"
    return f"<{kind} {dtype} of shape {tuple(param.shape)}, strides {memory_strides(param)}, on {param.device.type}>"


def groups_claim(
    options: dict[str, object], groups: Sequence[tuple[int, dict[str, Any], Sequence[tuple[str, Tensor]]]]
) -> Claim:
    """The claim of the constructor's own ``options``, and of new groups: (index, group, named parameters) each."""
    entries: list[tuple[str, object]] = list(options.items())
    for index, group, named in groups:
        entries += [(f"parameter {name}", _describe(param)) for name, param in named]
        entries += _hyperparameter_entries(index, group)
    remedy = "Build the same model and optimizer, in the same order, on every rank."
    return Claim("parameters or hyperparameters", entries, remedy)


def _hyperparameter_entries(index: int, group: dict[str, Any]) -> list[tuple[str, object]]:
    return [(f"param_groups[{index}][{key!r}]", value) for key, value in hyperparameters(group)]


class HyperparameterClaims:
    """The claim of each step; hashed anew only where a hyperparameter has changed."""

    def __init__(self) -> None:
        self._values: object = None
        self._claim = NO_CLAIM

    def of(self, groups: Sequence[dict[str, Any]], by_scaler: bool) -> Claim:
        """All hyperparameters of ``groups``, as they are now, and whether a gradient scaler calls."""
        values = (by_scaler, [hyperparameters(group) for group in groups])
        if values != self._values:
            entries = [entry for i, group in enumerate(groups) for entry in _hyperparameter_entries(i, group)]
            entries.append(("step() called by a GradScaler", by_scaler))
            self._values = values
            self._claim = Claim(
                "hyperparameters", entries, "Use the same lr schedule, and a gradient scaler or none, on every rank."
            )
        return self._claim
