"""Checks what ``step_in_backward=True`` can be combined with; the caller shares errors with the other ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .placements.presharded import is_presharded


def check_step_in_backward(options: Mapping[str, object], groups: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError if ``options``, those of the constructor, ask for what ``groups`` (all groups) cannot have.

    Called when groups are added, and when their parameters have changed. Not collective.
    """
    if options["step_in_backward"] is not True:
        return
    if options["stage"] != 2:
        raise ValueError(
            f"dist_asgd: step_in_backward=True with stage={options['stage']}: DDP has the averaged gradients then, and "
            f"keeps them. Pass stage=2, without DDP, or step_in_backward=False."
        )
    for index, group in enumerate(groups):
        if group["differentiable"]:
            raise ValueError(
                f"dist_asgd: step_in_backward=True with differentiable=True in param_groups[{index}]: a step that "
                f"autograd goes through needs its gradients. Pass one of them."
            )
        for position, param in enumerate(group["params"]):
            what = None
            if is_presharded(param):
                what = "is a DTensor, or managed by FSDP1, and its gradient arrives reduced"
            elif param.device.type != "cpu":
                what = f"is on {param.device}, and only parameters on CPUs are updated in backward so far"
            if what is not None:
                raise ValueError(
                    f"dist_asgd: step_in_backward=True, but parameter {position} of param_groups[{index}] {what}. Pass "
                    f"step_in_backward=False."
                )
