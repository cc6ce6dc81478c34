"""Which compiled kernels serve a device."""

from __future__ import annotations

from importlib.util import find_spec

import torch

C, TRITON = "C", "Triton"


def of(device: torch.device) -> str | None:
    """``C`` or ``TRITON``; None where there is neither."""
    return {"cpu": C, "cuda": TRITON}.get(device.type)


def why_unavailable(device: torch.device) -> str | None:
    """Why ``fused=True`` cannot be had on ``device``, None where it can; on CPUs torch operators stand in."""
    kind = of(device)
    if kind is None:
        return f"there is no fused kernel for {device.type}"
    if kind is TRITON and find_spec("triton") is None:
        return "triton is not installed, which comes with torch's CUDA builds"
    return None
