"""What ranks must have in common, as claims for an exchange: parameters, and hyperparameters step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .comm.agreement import NO_FINGERPRINT, Fingerprint
from .placements import fsdp1
from .placements.dtensor import describe_placement, is_dtensor
from .storage.memory_order import memory_strides
from .validation import HYPERPARAMETERS, check_hyperparameters, hyperparameters


def _describe(param: Tensor) -> str:
    kind = "trainable" if param.requires_grad else "frozen"
    dtype = str(param.dtype).removeprefix("torch.")
    if fsdp1.is_managed(param):
        # Ranks have parts of other lengths.
        return f"<{kind} {dtype} of FSDP1, on {param.device.type}>"
    if is_dtensor(param):
        return f"<{kind} {dtype} DTensor of shape {tuple(param.shape)}, {describe_placement(param)}, on {param.device.type}>"
    return f"<{kind} {dtype} of shape {tuple(param.shape)}, strides {memory_strides(param)}, on {param.device.type}>"


def groups_fingerprint(
    options: dict[str, object], groups: Sequence[tuple[int, dict[str, Any], Sequence[tuple[str, Tensor]]]]
) -> Fingerprint:
    """The fingerprint of the constructor's own ``options``, and of new groups: (index, group, named parameters) each."""
    entries: list[tuple[str, object]] = list(options.items())
    for index, group, named in groups:
        entries += [(f"parameter {name}", _describe(param)) for name, param in named]
        entries += _hyperparameter_entries(index, group)
    remedy = "Build the same model and optimizer, in the same order, on every rank."
    return Fingerprint("parameters or hyperparameters", entries, remedy)


def _hyperparameter_entries(index: int, group: dict[str, Any]) -> list[tuple[str, object]]:
    return [(f"param_groups[{index}][{key!r}]", value) for key, value in hyperparameters(group)]


class Hyperparameters:
    """The hyperparameters of each step: checked, and claimed, anew only where they are other objects than before."""

    def __init__(self) -> None:
        # The values last checked, in the order of groups and keys; a Tensor may change where it is.
        self._checked: list[object] = []
        self._claimed: tuple[object, object] = (None, None)
        self._values: object = None
        self._fingerprint = NO_FINGERPRINT

    def check(self, groups: Sequence[dict[str, Any]], devices_of: Callable[[int], Iterable[torch.device]]) -> None:
        """ValueError where one of ``groups`` is not of its kind or out of range; ``devices_of`` by group."""
        values = [group.get(key, Ellipsis) for group in groups for key in HYPERPARAMETERS]
        if len(values) == len(self._checked) and all(map(is_, values, self._checked)):
            return
        self._checked = []
        for index, group in enumerate(groups):
            check_hyperparameters(group, f"param_groups[{index}]", devices_of(index))
        if not any(isinstance(value, Tensor) for value in values):
            self._checked = values

    def fingerprint(self, groups: Sequence[dict[str, Any]], by_scaler: bool) -> Fingerprint:
        """All hyperparameters of ``groups``, which have just been checked, and whether a gradient scaler calls."""
        if self._checked and self._claimed[0] is self._checked and self._claimed[1] is by_scaler:
            return self._fingerprint
        values = (by_scaler, [hyperparameters(group) for group in groups])
        if values != self._values:
            entries = [entry for i, group in enumerate(groups) for entry in _hyperparameter_entries(i, group)]
            entries.append(("step() called by a GradScaler", by_scaler))
            self._values = values
            self._fingerprint = Fingerprint(
                "hyperparameters", entries, "Use the same lr schedule, and a gradient scaler or none, on every rank."
            )
        self._claimed = (self._checked, by_scaler)
        return self._fingerprint
