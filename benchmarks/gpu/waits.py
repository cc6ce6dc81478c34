"""Which calls make the host wait for the device: ``torch.cuda.set_sync_debug_mode`` around each, in every mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.late import imagined_ranks, mesh_of
from benchmarks.gpu.rows import FORMS, NOTE, Part
from benchmarks.gpu.streams import params_on
from dist_asgd import GradScaler, ShardedASGD

MODES: dict[str, dict[str, Any]] = {
    "one process, stage 1": {"stage": 1},
    "one process, stage 2": {"stage": 2},
    "rank of 4, stage 1": {"stage": 1, "ranks": True},
    "rank of 4, stage 2": {"stage": 2, "ranks": True},
    "rank of 4, hybrid": {"stage": 2, "ranks": True, "shape": (2, 2)},
    "rank of 4, bf16 with masters": {"stage": 2, "ranks": True, "dtype": torch.bfloat16, "master_weights": True},
    "rank of 4, bf16, stochastic rounding": {
        "stage": 2,
        "ranks": True,
        "dtype": torch.bfloat16,
        "stochastic_rounding": 1,
    },
}


def run(part: Part) -> None:
    """In the first step waits are counted; in later ones there may be none."""
    for mode, settings in MODES.items():
        for form, options in FORMS.items():
            what = f"{mode}, {form}"
            group: AbstractContextManager[None] = nullcontext()
            if settings.get("ranks"):
                group = imagined_ranks(late=False)
            with part.attempt(what), group:
                _watch(part, what, settings, options)
    with part.attempt("GradScaler, fused"):
        _watch_scaler(part)


def waits_in(part: Part, call: Callable[[], object]) -> list[str]:
    """Run ``call``; where it made the host wait for the device, as ``file:line``, once for each place."""
    if part.cpu:
        call()
        return []
    part.wait()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    return sorted({f"{warning.filename.rsplit('/', 1)[-1]}:{warning.lineno}" for warning in waits})


def _backward(params: Sequence[nn.Parameter]) -> None:
    torch.autograd.backward(torch.stack([p.float().sum() for p in params]).sum())


def _watch(part: Part, what: str, settings: dict[str, Any], options: dict[str, Any]) -> None:
    own = {key: value for key, value in settings.items() if key not in ("ranks", "shape", "dtype")}
    params = params_on(part.device, 20, 4096, settings.get("dtype", torch.float32))
    own |= mesh_of(settings.get("shape"), part.device)
    optimizer = ShardedASGD(params, lr=1e-3, t0=2, bucket_cap_mb=0.1, **own, **options)
    clip = lambda: optimizer.clip_grad_norm_(1.0)  # noqa: E731
    found: dict[str, set[str]] = {}
    # The second step is the first whose plan is there; in the third and fifth half of the parameters have gradients.
    for step in range(6):
        _backward(params[10:] if step in (2, 4) else params)
        for name, call in (("clip", clip), ("step", optimizer.step), ("zero_grad", optimizer.zero_grad)):
            key = f"{name}, first" if step == 0 else f"{name}, other parameters" if step in (2, 3, 4, 5) else name
            found.setdefault(key, set()).update(waits_in(part, call))
    first = {place for key, places in found.items() if key.endswith("first") for place in places}
    later = {key: places for key, places in found.items() if not key.endswith("first") and places}
    part.check(f"{what}: no wait in clip, step and zero_grad", not later, f"{later}")
    part.add(
        f"{what}: waits in the first step", f"{len(first)} places" if not part.cpu else NOTE, ", ".join(sorted(first))
    )


def _watch_scaler(part: Part) -> None:
    params = params_on(part.device, 20, 4096)
    optimizer = ShardedASGD(params, lr=1e-3, stage=2, fused=True)
    scaler = GradScaler(part.device.type, init_scale=4.0)
    found: list[str] = []
    for step in range(4):
        torch.autograd.backward(scaler.scale(torch.stack([p.sum() for p in params]).sum()))
        places = waits_in(part, lambda: scaler.step(optimizer))
        found = places if step else []
        scaler.update()
        optimizer.zero_grad()
    part.add(
        "GradScaler, fused: places that wait in scaler.step()", NOTE if part.cpu else f"{len(found)}", ", ".join(found)
    )
