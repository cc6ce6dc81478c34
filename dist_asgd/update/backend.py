"""Which compiled kernel serves a device, if any: the C kernel (cpu.py) or the Triton kernels (cuda.py)."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

C, TRITON = "C", "Triton"


@cache
def of(device: torch.device) -> str | None:
    """``C`` or ``TRITON``; None if neither kernel serves the device."""
    return {"cpu": C, "cuda": TRITON}.get(device.type)


def why_unavailable(device: torch.device) -> str | None:
    """Why a group on ``device`` cannot have ``fused=True``; None if it can.

    CPUs always can: if the C kernel is missing, torch operators compute the same bits.
    """
    kind = of(device)
    if kind is None:
        return f"there is no fused kernel for {device.type}"
    if kind is TRITON and find_spec("triton") is None:
        return "triton is not installed, which comes with torch's CUDA builds"
    return None
