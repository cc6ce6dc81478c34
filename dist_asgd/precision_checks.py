"""Checks the options of ``Precision`` by themselves, and whether they fit the parameters; ``validation`` calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .placements import fsdp1
from .storage.precision import Precision

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)


def check_kinds(precision: Precision) -> None:
    """Raise ValueError unless every option of ``precision`` is of its kind."""
    for key in ("average_dtype", "reduce_dtype"):
        dtype = getattr(precision, key)
        if dtype is not None and (dtype not in DTYPES or dtype.is_complex):
            raise ValueError(f"dist_asgd: {key} must be None, float32, float64, bfloat16 or float16, got {dtype!r}.")
    if not isinstance(precision.master_weights, bool):
        raise ValueError(f"dist_asgd: master_weights must be True or False, got {precision.master_weights!r}.")
    seed = precision.stochastic_rounding
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64):
        raise ValueError(
            f"dist_asgd: stochastic_rounding must be None or a seed, a whole number from 0 to 2^64 - 1, got {seed!r}."
        )


def check_precision_fits(precision: Precision, groups: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError if an option of ``precision`` has an effect on no parameter of ``groups`` (all groups)."""
    dtypes = {param.dtype for group in groups for param in group["params"]}
    if precision.master_weights and not dtypes & {torch.bfloat16, torch.float16}:
        raise ValueError(
            "dist_asgd: master_weights=True, but no parameter is bfloat16 or float16. Pass master_weights=False, or "
            "convert the model first (model.bfloat16())."
        )
    if precision.stochastic_rounding is not None and torch.bfloat16 not in dtypes:
        raise ValueError(
            "dist_asgd: stochastic_rounding, but no parameter is bfloat16. Pass stochastic_rounding=None, or convert "
            "the model first (model.bfloat16())."
        )


def check_rounding(precision: Precision, named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ValueError if a parameter cannot be rounded as ``precision`` asks."""
    half = next((name for name, param in named if param.dtype == torch.float16), None)
    if precision.stochastic_rounding is not None and half is not None:
        raise ValueError(
            f"dist_asgd: stochastic_rounding is for bfloat16 parameters, and {half} is float16. Pass "
            f"master_weights=True instead."
        )
    managed = next((name for name, param in named if fsdp1.is_managed(param)), None)
    if precision.stochastic_rounding is not None and managed is not None:
        raise ValueError(
            f"dist_asgd: stochastic_rounding of {managed}, which FSDP1 manages: random numbers go by an "
            f"element's place in the whole parameter, which only the module knows. Pass master_weights=True "
            f"instead, or use fully_shard (FSDP2)."
        )


def check_average_device(precision: Precision, named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ValueError unless averages can lie on ``average_device``: that of their parameter, or the host of a GPU."""
    wanted = precision.average_device
    if wanted is None:
        return
    for name, param in named:
        device = param.device
        same = wanted.type == device.type and wanted.index in (None, device.index)
        if not same and (wanted.type, device.type) != ("cpu", "cuda"):
            raise ValueError(
                f"dist_asgd: average_device={str(wanted)!r}, and parameter {name} is on {device}: averages lie where "
                f"their parameters do, or those of CUDA parameters in host memory. Pass average_device=None, or 'cpu' "
                f"for parameters on CUDA devices."
            )
