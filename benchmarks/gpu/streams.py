"""Parity on the device: with torch in one process, and as one of four ranks whose collectives run late."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.gpu.late import imagined_ranks, mesh_of, own_fragments
from benchmarks.gpu.rows import FORMS, Part
from dist_asgd import ShardedASGD

OPTIONS: dict[str, Any] = {"lr": 1e-3, "t0": 2, "weight_decay": 0.01}
NUM_STEPS = 6


def params_on(device: torch.device, num: int, numel: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Parameters with the same values at every call."""
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(numel, generator=generator) for _ in range(num))
    return [nn.Parameter(value.to(device, dtype)) for value in values]


def backward(params: list[nn.Parameter], step: int) -> None:
    """Gradients that do not depend on the parameters, other ones in each step."""
    torch.autograd.backward(
        torch.stack([(p * float((step + 1) * (i % 7 + 1))).sum() for i, p in enumerate(params)]).sum()
    )


def run(part: Part) -> None:
    """Compare with ``torch.optim.ASGD`` of the same form on the same device, to the bit."""
    for form, options in FORMS.items():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            for stage in (1, 2):
                with part.attempt(f"one process, {form}, {name}, stage {stage}"):
                    _alone(part, form, options, dtype, stage)
    for form, options in FORMS.items():
        for shape in (None, (2, 2)):
            for averages in (True, False):
                mode = "stage 2" if shape is None else "hybrid"
                what = f"late collectives, {form}, {mode}, {'means' if averages else 'sums'} by the backend"
                with part.attempt(what), imagined_ranks(averages=averages):
                    _late(part, what, options, shape, clips=False)
    with part.attempt("late collectives, clipping"), imagined_ranks():
        _late(part, "late collectives, clipping: all values are finite", FORMS["foreach"], None, clips=True)


def _alone(part: Part, form: str, options: dict[str, Any], dtype: torch.dtype, stage: int) -> None:
    ours, theirs = (params_on(part.device, 5, 3001, dtype) for _ in range(2))
    optimizer = ShardedASGD(ours, **OPTIONS, **options, stage=stage, average_dtype=dtype)
    oracle = torch.optim.ASGD(theirs, **OPTIONS, foreach=form == "foreach")
    for step in range(NUM_STEPS):
        for params, one in ((ours, optimizer), (theirs, oracle)):
            backward(params, step)
            one.step()
            one.zero_grad()
    found = [(p, q) for p, q in zip(ours, theirs, strict=True)]
    found += [(optimizer.state[p]["ax"], oracle.state[q]["ax"]) for p, q in zip(ours, theirs, strict=True)]
    wrong = sum(not torch.equal(mine, other.view_as(mine)) for mine, other in found)
    what = f"one process, {form}, {str(dtype).removeprefix('torch.')}, stage {stage}: bits of torch"
    part.check(what, not wrong, f"{wrong} of {len(found)} tensors differ")


def _late(part: Part, what: str, options: dict[str, Any], shape: tuple[int, int] | None, clips: bool) -> None:
    ours, theirs = params_on(part.device, 40, 3000), params_on(part.device, 40, 3000)
    mesh = mesh_of(shape, part.device)
    optimizer = ShardedASGD(ours, **OPTIONS, **options, **mesh, stage=2, bucket_cap_mb=0.05)
    oracle = torch.optim.ASGD(theirs, **OPTIONS, foreach=options.get("foreach", False))
    for step in range(NUM_STEPS):
        for params, one in ((ours, optimizer), (theirs, oracle)):
            backward(params, step)
            if clips and one is optimizer:
                optimizer.clip_grad_norm_(1.0)
            one.step()
            one.zero_grad()
    part.wait()
    pairs = list(own_fragments(optimizer, theirs))
    if clips:
        wrong = sum(not bool(mine.isfinite().all()) for mine, _ in pairs)
    else:
        wrong = sum(not torch.equal(mine, other) for mine, other in pairs)
    part.check(what, bool(pairs) and not wrong, f"{wrong} of {len(pairs)} fragments differ")
