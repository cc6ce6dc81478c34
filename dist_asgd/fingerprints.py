"""Fingerprints of what must be equal on all ranks: parameters at construction, hyperparameters at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .backward_checks import check_step_in_backward
from .comm import Communicators
from .comm.agreement import NO_FINGERPRINT, Fingerprint
from .placements import fsdp1
from .placements.dtensor import describe_placement, is_dtensor
from .precision_checks import check_precision_fits
from .storage.memory_order import memory_strides
from .storage.precision import Precision
from .validation import (
    HYPERPARAMETERS,
    Held,
    check_hyperparameters,
    check_new_group,
    hyperparameters,
    named_params,
)


def groups_fingerprint(options: dict[str, object], groups: Sequence[dict[str, Any]], first: int) -> Fingerprint:
    """The fingerprint of the constructor's own ``options`` and of the parameter groups from ``first`` on."""
    entries: list[tuple[str, object]] = list(options.items())
    for index in range(first, len(groups)):
        entries += [(f"parameter {name}", _describe(param)) for name, param in named_params(groups, index)]
        entries += _hyperparameter_entries(index, groups[index])
    remedy = "Build the same model and optimizer, in the same order, on every rank."
    return Fingerprint("parameters or hyperparameters", entries, remedy)


def checked_fingerprint(
    options: dict[str, object],
    communicators: Communicators,
    precision: Precision,
    stage: int,
    groups: Sequence[dict[str, Any]],
    held: Held,
) -> Fingerprint:
    """The fingerprint of all ``groups``; ValueError unless they can be optimized together.

    ``held`` says whether a parameter has state afterwards; ranks compare that too. Called when parameters
    or groups were changed. Collective on the ranks that make a communicator for a new device.
    """
    for end in range(1, len(groups) + 1):
        check_new_group(groups[:end], communicators, precision, False, stage, held)
    check_precision_fits(precision, groups)
    check_step_in_backward(options, groups)
    found = groups_fingerprint(options, groups, 0)
    without = [name for i in range(len(groups)) for name, param in named_params(groups, i) if not held(param)]
    return replace(found, entries=[*found.entries, ("parameters without state", without)])


def _describe(param: Tensor) -> str:
    """The parameter as it must be on all ranks."""
    kind = "trainable" if param.requires_grad else "frozen"
    kind += f" {str(param.dtype).removeprefix('torch.')}"
    device = param.device.type
    if fsdp1.is_managed(param):
        # Its fragments have other lengths on other ranks.
        return f"<{kind} of FSDP1, on {device}>"
    if is_dtensor(param):
        return f"<{kind} DTensor of shape {tuple(param.shape)}, {describe_placement(param)}, on {device}>"
    strides = memory_strides(param) if param.layout == torch.strided else None
    return f"<{kind} of shape {tuple(param.shape)}, strides {strides}, on {device}>"


def _hyperparameter_entries(index: int, group: dict[str, Any]) -> list[tuple[str, object]]:
    return [(f"param_groups[{index}][{key!r}]", value) for key, value in hyperparameters(group)]


class Hyperparameters:
    """Checks and fingerprints the hyperparameters at each step.

    It skips both as long as the values are the same objects as at the last step.
    """

    def __init__(self) -> None:
        # The values last checked, in the order of groups and keys; empty if one is a Tensor, which may change in place.
        self._checked: list[object] = []
        # The list of checked values, and by_scaler, that the fingerprint below is of.
        self._fingerprint_of: tuple[object, object] = (None, None)
        self._values: object = None
        self._fingerprint = NO_FINGERPRINT

    def check(self, groups: Sequence[dict[str, Any]], devices_of: Callable[[int], Iterable[torch.device]]) -> None:
        """Raise ValueError if a hyperparameter of ``groups`` is not of its kind or out of range.

        ``devices_of`` gives the devices of the parameters of a group, by its index.
        """
        values = [group.get(key, Ellipsis) for group in groups for key in HYPERPARAMETERS]
        if len(values) == len(self._checked) and all(map(is_, values, self._checked)):
            return
        self._checked = []
        for index, group in enumerate(groups):
            check_hyperparameters(group, f"param_groups[{index}]", devices_of(index))
        if not any(isinstance(value, Tensor) for value in values):
            self._checked = values

    def fingerprint(self, groups: Sequence[dict[str, Any]], by_scaler: bool) -> Fingerprint:
        """The fingerprint of all hyperparameters of ``groups``, which have just been checked.

        It also says whether a gradient scaler calls ``step()``, which must be so on all ranks or on none.
        """
        if self._checked and self._fingerprint_of[0] is self._checked and self._fingerprint_of[1] is by_scaler:
            return self._fingerprint
        values = (by_scaler, [hyperparameters(group) for group in groups])
        if values != self._values:
            entries = [entry for i, group in enumerate(groups) for entry in _hyperparameter_entries(i, group)]
            entries.append(("step() called by a GradScaler", by_scaler))
            self._values = values
            self._fingerprint = Fingerprint(
                "hyperparameters", entries, "Use the same lr schedule, and a gradient scaler or none, on every rank."
            )
        self._fingerprint_of = (self._checked, by_scaler)
        return self._fingerprint
