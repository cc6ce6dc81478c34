"""Cases for the Triton kernels, run in a process of their own: Triton reads its settings when it is first imported.

``python -m tests.harness.triton_kernels cpu`` interprets the kernels, and ``cuda`` runs them on a GPU; both print a
line ``name<TAB>error`` for each case. ``ahead`` compiles for an H100 without one, and prints facts about the code.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from dist_asgd.storage import masters
from dist_asgd.update import addresses, rounding
from dist_asgd.update.schedule import Cohort, StepHyperparameters
from dist_asgd.update.segments import KernelDtypes, Segment

from .bits import assert_same_bits

Case = Callable[[torch.device], None]

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
KERNEL_DTYPES = {
    "fp32": KernelDtypes(F32, F32, F32),
    "fp64": KernelDtypes(F64, F64, F64),
    "fp32-average64": KernelDtypes(F32, F32, F64),
    "bf16": KernelDtypes(BF16, BF16, F32),
    "bf16-average16": KernelDtypes(BF16, BF16, BF16),
    "bf16-gradient32": KernelDtypes(BF16, F32, F32),
    "fp16": KernelDtypes(F16, F16, F32),
    "fp16-average16": KernelDtypes(F16, F32, F16),
    "bf16-master": KernelDtypes(BF16, BF16, F32, master=True),
    "bf16-master-gradient32": KernelDtypes(BF16, F32, BF16, master=True),
    "fp16-master": KernelDtypes(F16, F16, F32, master=True),
    "bf16-stochastic": KernelDtypes(BF16, BF16, F32, stochastic=True),
    "bf16-stochastic-gradient32": KernelDtypes(BF16, F32, F32, stochastic=True),
}


@dataclass(frozen=True)
class Options:
    """The options of a launch; with ``found_inf`` None the argument is left out."""

    weight_decay: float = 0.0
    maximize: bool = False
    scale: float | None = None
    clip: Tensor | None = None
    found_inf: float | None = None
    aligned: bool = True


OPTIONS = {
    "plain": Options(),
    "decay": Options(weight_decay=0.013),
    "maximize": Options(maximize=True),
    "scale": Options(scale=3.0, found_inf=0.0),
    "clip": Options(clip=torch.tensor([0.37])),
    "all": Options(0.1, True, 65536.0, torch.tensor([0.61], dtype=F64), 0.0, False),
    "skipped": Options(weight_decay=0.013, found_inf=1.0),
    "unaligned": Options(weight_decay=0.013, aligned=False),
}
BLOCK_NUMEL = 1024
NUMELS = (1, 15, 0, 1023, 1024, 1025, 3333)
# Rows of factors: mu 1, and two others.
FACTORS = torch.tensor([[1 - 1e-4, -0.3, 1.0, 1.0], [1 - 0.03, -0.07, 0.25, 7.0], [1 - 1e-5, -1e-3, 1 / 3, 2.0**33]])
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -3e-41, 3e38, 65504.0, 1.0)


def values(numel: int, dtype: torch.dtype, generator: torch.Generator, special: bool = True) -> Tensor:
    """Random numbers of many magnitudes, ``(numel,)``; one in fifty is a special one if ``special``."""
    exponents = torch.randint(-12, 4, (numel,), generator=generator)
    x = torch.randn(numel, generator=generator, dtype=F64) * 2.0**exponents
    if special:
        chosen = torch.tensor(SPECIAL, dtype=F64)[torch.randint(len(SPECIAL), (numel,), generator=generator)]
        x = torch.where(torch.rand(numel, generator=generator) < 0.02, chosen, x)
    return x.to(dtype)


def bits_of_nan(x: Tensor) -> Tensor:
    """``x`` with all NaNs replaced by one of them, because the bits of a NaN depend on the hardware."""
    return torch.where(x.isnan(), torch.nan, x) if x.is_floating_point() else x


@dataclass
class Arrays:
    """The tensors of one segment. ``gradient`` may begin at an odd address."""

    param: Tensor
    gradient: Tensor
    average: Tensor
    master: Tensor | None
    row: int
    first: int
    key: int

    @classmethod
    def random(
        cls, numel: int, dtypes: KernelDtypes, index: int, aligned: bool, generator: torch.Generator
    ) -> "Arrays":
        """Draw arrays of these dtypes. Masters fit their parameters, except some float16 masters."""
        gradient = values(numel + 1, dtypes.gradient, generator)
        param, master = values(numel, dtypes.param, generator), None
        if dtypes.master:
            wide = values(numel, F32, generator)
            if dtypes.param == BF16:
                master = torch.empty(numel, dtype=torch.int16)
                masters.write(wide, param, master)
            else:
                master = wide
                param = torch.where(torch.rand(numel, generator=generator) < 0.1, param, wide.half())
        average = values(numel, dtypes.average, generator)
        first = 2**32 - 7 if index % 2 else 5
        start = 0 if aligned else 1
        return cls(param, gradient[start : start + numel], average, master, index % 3, first, 0x9E3779B1 + index)

    def on(self, device: torch.device, given: bool, aligned: bool = True) -> Segment:
        """A segment of copies on ``device``. The parameter begins at an odd address unless ``aligned``."""
        gradient = self.gradient.to(device) if given else None
        master = None if self.master is None else self.master.to(device, copy=True)
        param = self.param.to(device, copy=True) if aligned else shifted(self.param, device)
        return Segment(param, self.average.to(device, copy=True), master, gradient, self.row, self.first, self.key)


def expected(arrays: Arrays, dtypes: KernelDtypes, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
    """Parameter, average and master after one step, in torch operators on the CPU.

    There ``add`` with ``alpha`` is fused in float32 and float64 (not under ``ATEN_CPU_CAPABILITY=default``).
    """
    if options.found_inf:
        return arrays.param, arrays.average, arrays.master
    factors = FACTORS.double()[arrays.row]
    c, negative_eta, mu, step = factors.tolist()
    wide = F64 if dtypes.param == F64 else F32
    each = F32 if dtypes.master or dtypes.stochastic else dtypes.param
    scaled = F32 if dtypes.master or dtypes.stochastic else dtypes.gradient

    def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    g = arrays.gradient.to(wide)
    if options.scale is not None:
        inverse = torch.tensor([options.scale]).double().reciprocal().float()
        g = rounded(g * inverse.to(wide), scaled)
    if options.clip is not None:
        g = rounded(g * options.clip.to(wide), scaled)
    if options.maximize:
        g = -g
    g = rounded(g, each)
    if arrays.master is None:
        x = arrays.param.to(wide)
    else:
        x = masters.read(arrays.param, arrays.master, torch.empty_like(g))
    if options.weight_decay:
        g = rounded(torch.add(g, x, alpha=options.weight_decay), each)
    x = rounded(x * c, each)
    x = rounded(torch.add(x, g, alpha=negative_eta), each)

    param, master = x.to(dtypes.param), None
    if arrays.master is not None and dtypes.param == BF16:
        master = torch.empty_like(arrays.master)
        masters.write(x, param, master)
    elif dtypes.master:
        master = x
    elif dtypes.stochastic:
        random = rounding.random_16(arrays.key, int(step), arrays.first, len(x), x.device)
        rounding.round_stochastically(x, param, random)
        x = param.to(wide)
    average_wide = torch.promote_types(wide, dtypes.average)
    average_each = each if dtypes.average == each else average_wide
    ax = arrays.average.to(average_wide)
    x = x.to(average_wide)
    moved = rounded(rounded(x - ax, average_each) * mu, average_each)
    return param, (x if mu == 1 else ax + moved).to(dtypes.average), master


def check(found: Segment, arrays: Arrays, dtypes: KernelDtypes, options: Options) -> None:
    """Compare a segment with the oracle, to the bit; a NaN equals any other, but where the kernel chooses it."""
    chosen = dtypes.param == BF16 and (dtypes.master or dtypes.stochastic)
    wanted = expected(arrays, dtypes, options)
    results = (found.param, found.average, found.master)
    for name, result, oracle in zip(("param", "average", "master"), results, wanted, strict=True):
        if oracle is None or result is None:
            assert oracle is result
            continue
        exact = chosen and name != "average"
        pair = (result.cpu(), oracle) if exact else (bits_of_nan(result.cpu()), bits_of_nan(oracle))
        assert_same_bits(*pair, f"{name}, {len(oracle)}, row {arrays.row}")


def compare_with_operators(dtypes: KernelDtypes, options: Options, given: bool, device: torch.device) -> None:
    """One launch over segments of many sizes and three rows."""
    from dist_asgd.update.cuda import Launch

    generator = torch.Generator().manual_seed(17)
    arrays = [Arrays.random(numel, dtypes, i, options.aligned, generator) for i, numel in enumerate(NUMELS)]
    segments = [a.on(device, given, options.aligned) for a in arrays]
    gradients = [a.gradient.to(device) if options.aligned else shifted(a.gradient, device) for a in arrays]
    launch = Launch(segments, dtypes, options.maximize, options.weight_decay, device, BLOCK_NUMEL)
    launch.run(
        None if given else [gradient.data_ptr() for gradient in gradients],
        FACTORS.double().to(device),
        None if options.scale is None else torch.tensor([options.scale], device=device).double().reciprocal().float(),
        None if options.clip is None else options.clip.to(device),
        None if options.found_inf is None else torch.tensor([options.found_inf], device=device),
    )
    for segment, array in zip(segments, arrays, strict=True):
        check(segment, array, dtypes, options)


def shifted(x: Tensor, device: torch.device) -> Tensor:
    """A copy of ``x`` that starts one element past an aligned address."""
    copy = torch.empty(len(x) + 1, dtype=x.dtype, device=device)[1:]
    assert not len(x) or copy.data_ptr() % 16
    return copy.copy_(x)


def leave_averages_alone(device: torch.device) -> None:
    """Parameters and masters become what they become otherwise; averages may have memory, and are not touched."""
    from dist_asgd.update.cuda import Launch

    for dtypes in KERNEL_DTYPES.values():
        generator = torch.Generator().manual_seed(7)
        arrays = [Arrays.random(numel, dtypes, i, True, generator) for i, numel in enumerate(NUMELS)]
        written, kept = ([a.on(device, True) for a in arrays] for _ in range(2))
        none = [replace(segment, average=None) for segment in (a.on(device, True) for a in arrays)]
        for segments, unwritten in ((written, False), (kept, True), (none, True)):
            launch = Launch(segments, dtypes, False, 0.01, device, BLOCK_NUMEL)
            launch.run(None, FACTORS.double().to(device), unwritten=unwritten)
        for array, wanted, *others in zip(arrays, written, kept, none, strict=True):
            for found in others:
                assert_same_bits(bits_of_nan(found.param), bits_of_nan(wanted.param), "param")
                assert (found.master is None) == (wanted.master is None)
                if found.master is not None and wanted.master is not None:
                    assert_same_bits(bits_of_nan(found.master), bits_of_nan(wanted.master), "master")
            assert_same_bits(others[0].average.cpu(), array.average, "average")


def table_of(hypers: Sequence[StepHyperparameters], active: Sequence[bool], initial: Sequence[bool]) -> Tensor:
    """The argument ``hyper`` of ``advance``."""
    return torch.tensor(
        [[r.lr, r.lambd, r.alpha, r.t0, a, i] for r, a, i in zip(hypers, active, initial, strict=True)], dtype=F64
    )


def compare_with_optimizer(dtype: torch.dtype, device: torch.device) -> None:
    """Compare with torch.optim.ASGD(foreach=False) over seven steps: two groups, a changing lr, skipped steps."""
    from dist_asgd.update.cuda import Launch, advance

    generator = torch.Generator().manual_seed(3)
    dtypes = KernelDtypes(dtype, dtype, dtype)
    params = [torch.nn.Parameter(values(n, dtype, generator, special=False)) for n in (70001, 5, 4096)]
    options = [{"lr": 0.1, "t0": 2, "lambd": 1e-2}, {"lr": 0.05, "t0": float("inf"), "alpha": 0.5}]
    groups = [{"params": params[:2], **options[0]}, {"params": params[2:], **options[1]}]
    oracle = torch.optim.ASGD(groups, weight_decay=0.01, foreach=False)  # type: ignore[arg-type]
    segments = []
    for param, row in zip(params, (0, 0, 1), strict=True):
        copy = param.detach().to(device, copy=True)
        segments.append(Segment(copy, torch.zeros_like(copy), None, None, row))
    scalars = torch.tensor([[0.0, 9.0, 1.0], [0.0, 9.0, 1.0]], dtype=F64, device=device)
    factors = torch.zeros(2, 4, dtype=F64, device=device)
    for step in range(7):
        if step == 0:
            oracle.param_groups[0]["lr"] = 0.2
        active = [True, step != 4]
        infinite = step == 2
        gradients = [values(p.numel(), dtype, generator, special=False) for p in params]
        found_inf = torch.tensor([float(infinite)], device=device)
        hypers = [StepHyperparameters.of({**group, "maximize": False}, False) for group in oracle.param_groups]
        advance(scalars, table_of(hypers, active, [True, True]).to(device), factors, found_inf)
        on_device = [gradient.to(device) for gradient in gradients]
        count = 3 if active[1] else 2
        launch = Launch(segments[:count], dtypes, False, 0.01, device, 16384)
        launch.run([gradient.data_ptr() for gradient in on_device[:count]], factors, found_inf=found_inf)
        if not infinite:
            for i, (param, gradient) in enumerate(zip(params, gradients, strict=True)):
                param.grad = gradient if active[i == 2] else None
            oracle.step()
        if step == 0:
            oracle.param_groups[1]["lr"] = 0.3
    for i, (param, segment) in enumerate(zip(params, segments, strict=True)):
        state = oracle.state[param]
        assert_same_bits(segment.param.cpu(), param.detach(), f"param {i}")
        assert_same_bits(segment.average.cpu(), state["ax"], f"ax {i}")
        for column, key in enumerate(("step", "eta", "mu")):
            found = scalars[segment.row, column].to(state[key].dtype)
            assert_same_bits(found.cpu(), state[key], f"{key} {i}")


def compare_schedules(double: bool, device: torch.device) -> None:
    """``advance`` against ``Cohort.advance``: 40 sets of hyperparameters, 60 steps, some far into a run."""
    from dist_asgd.update.cuda import advance

    before = torch.get_default_dtype()
    torch.set_default_dtype(F64 if double else F32)
    try:
        hypers = [
            StepHyperparameters(lr, lambd, alpha, t0, 0.0, False, False)
            for lr in (0.1, 3.0, 0.0, 1e-5)
            for lambd in (1e-4, 0.3)
            for alpha in (0.75, 0.0, 1.0)
            for t0 in (1e6, 5.0, 0.0, float("inf"), 2.5)
        ][::3]
        cohorts = [Cohort.new(hyper.lr, {i}) for i, hyper in enumerate(hypers)]
        scalars = torch.zeros(len(hypers), 3, dtype=F64)
        for row, cohort in enumerate(cohorts):
            if row % 4 == 3:
                cohort.step.fill_(1_000_000 + row)
            scalars[row] = torch.stack([cohort.step, cohort.eta, cohort.mu]).double()
        scalars = scalars.to(device)
        factors = torch.zeros(len(hypers), 4, dtype=F64, device=device)
        table = table_of(hypers, [True] * len(hypers), [False] * len(hypers)).to(device)
        for _ in range(60):
            used = [
                (1 - r.lambd * c.eta.item(), -c.eta.item(), c.mu.item()) for r, c in zip(hypers, cohorts, strict=True)
            ]
            advance(scalars, table, factors, None)
            for hyper, cohort in zip(hypers, cohorts, strict=True):
                cohort.advance(hyper)
            wanted = torch.stack([torch.stack([c.step, c.eta, c.mu]) for c in cohorts]).double()
            if double:
                # A power made of exp and log, and one of the C library, in the last places of float64.
                torch.testing.assert_close(scalars.cpu(), wanted, rtol=1e-14, atol=0)
                scalars.copy_(wanted)
            else:
                assert_same_bits(scalars.cpu(), wanted, "scalars")
            steps = wanted[:, :1]
            assert_same_bits(factors.cpu(), torch.cat([torch.tensor(used, dtype=F64), steps], dim=1), "factors")
    finally:
        torch.set_default_dtype(before)


def skip_inactive_rows(device: torch.device) -> None:
    """Rows that are not active do not change; after an overflow no row changes, and factors stay."""
    from dist_asgd.update.cuda import advance

    hyper = StepHyperparameters(0.1, 1e-4, 0.75, 1e6, 0.0, False, False)
    start = torch.tensor([[3.0, 0.5, 0.25]] * 2, dtype=F64)
    scalars, factors = start.to(device, copy=True), torch.full((2, 4), 7.0, dtype=F64, device=device)
    table = table_of([hyper, hyper], [False, True], [True, True]).to(device)
    advance(scalars, table, factors, torch.ones(1, device=device))
    assert torch.equal(scalars.cpu(), start)
    assert bool((factors == 7).all())
    advance(scalars, table, factors, None)
    assert torch.equal(scalars[0].cpu(), start[0])
    assert bool((factors[0] == 7).all())
    assert scalars[1, 0] == 4
    # The lr makes eta in step 0 only.
    assert factors[1, 1] == -0.5


def update_large(device: torch.device) -> None:
    """Check a segment with a million elements, an odd number."""
    from dist_asgd.update.cuda import Launch

    dtypes = KERNEL_DTYPES["fp32"]
    arrays = Arrays.random(1_000_003, dtypes, 1, True, torch.Generator().manual_seed(1))
    segment = arrays.on(device, True)
    Launch([segment], dtypes, False, 0.01, device, 1 << 16).run(None, FACTORS.double().to(device))
    check(segment, arrays, dtypes, Options(weight_decay=0.01))


def update_far_elements(device: torch.device) -> None:
    """Check the block at element 2^33 of a segment. The arrays hold this block only, and addresses are set to fit."""
    from dist_asgd.update import cuda

    dtypes, numel, place = KERNEL_DTYPES["bf16-stochastic"], 777, 2**33 // BLOCK_NUMEL
    arrays = Arrays.random(numel, dtypes, 1, True, torch.Generator().manual_seed(2))
    segment = arrays.on(device, True)
    launch = cuda.Launch([segment], dtypes, False, 0.0, device, BLOCK_NUMEL)
    start = place * BLOCK_NUMEL
    offsets = torch.tensor([2, 4, 0, -1, 0, 1, 0, 0], device=device) * start
    launch._table.sub_(offsets)
    launch._blocks[0, 1] = place
    assert arrays.gradient.itemsize == 2
    assert launch._given is not None
    launch._given = [launch._given[0] - 2 * start]
    launch.run(None, FACTORS.double().to(device))
    check(segment, arrays, dtypes, Options())


def follow_gradients(device: torch.device) -> None:
    """Pointers are uploaded only when they change, and unaligned ones are noticed."""
    from dist_asgd.update.cuda import Launch

    dtypes = KERNEL_DTYPES["fp32"]
    generator = torch.Generator().manual_seed(5)
    segments = [Arrays.random(9, dtypes, i, True, generator).on(device, False) for i in range(3)]
    launch = Launch(segments, dtypes, False, 0.0, device, 16)
    factors = FACTORS.double().to(device)
    columns = []
    gradients = [torch.ones(9, device=device) for _ in segments]
    others = [shifted(torch.full((9,), 2.0), device) for _ in segments]
    for now in (gradients, gradients, others, others):
        before = [segment.param.clone() for segment in segments]
        launch.run([gradient.data_ptr() for gradient in now], factors)
        assert launch._column._latest is not None
        columns.append(launch._column._latest[1][0])
        for segment, param in zip(segments, before, strict=True):
            c, negative_eta = FACTORS.double()[segment.row, :2].tolist()
            wanted = torch.add(param.cpu() * c, now[0].cpu(), alpha=negative_eta)
            assert_same_bits(bits_of_nan(segment.param.cpu()), bits_of_nan(wanted), "param")
    assert columns[0] is columns[1]
    assert columns[1] is not columns[2]
    assert columns[2] is columns[3]


def keep_columns_of_graphs(device: torch.device) -> None:
    """While a graph is captured: a column of its own, kept; one spare; then an error that says what to do."""
    column = addresses.AddressColumn([0, 2], 3, device)
    eager, aligned = column.of([16, 0, 32])
    assert (eager.tolist(), aligned) == ([16, 32], True)
    with mock.patch.object(addresses, "_is_capturing", return_value=True):
        assert column.of([16, 0, 32])[0] is eager
        captured, aligned = column.of([48, 0, 68])
        assert (captured.tolist(), aligned) == ([48, 68], False)
        assert column.of([48, 0, 68])[0] is captured
        with pytest.raises(RuntimeError, match="one step outside of graphs"):
            column.of([64, 0, 80])
    # What was captured was not uploaded: a step outside does not rely on it, and makes a new spare.
    assert column.of([48, 0, 68])[0] is not captured
    with mock.patch.object(addresses, "_is_capturing", return_value=True):
        assert column.of([64, 0, 80])[0].tolist() == [64, 80]
    assert (captured.tolist(), eager.tolist()) == ([48, 68], [16, 32])


def refuse(device: torch.device) -> None:
    """Wrong arguments raise errors that name the problem, at construction and at the call."""
    from dist_asgd.update.cuda import Launch

    dtypes = KERNEL_DTYPES["fp32"]
    good = Segment(torch.zeros(8, device=device), torch.zeros(8, device=device), None, None, 0)
    given = Segment(good.param, good.average, None, torch.zeros(8, device=device), 0)
    off = torch.zeros(24, device=device)[4:12]
    factors = FACTORS.double().to(device)
    bare = Segment(good.param, None, None, None, 0)
    refusals: list[tuple[str, Callable[[], Any]]] = [
        (
            "average starts 16",
            lambda: Launch([good, Segment(good.param, off, None, None, 0)], dtypes, False, 0.0, device),
        ),
        ("param must be", lambda: Launch([good], KERNEL_DTYPES["fp64"], False, 0.0, device)),
        (
            "master must be",
            lambda: Launch([Segment(good.param, good.average, off, None, 0)], dtypes, False, 0.0, device),
        ),
        ("average must be", lambda: Launch([Segment(good.param, off[:3], None, None, 0)], dtypes, False, 0.0, device)),
        ("1 of 2 segments", lambda: Launch([good, given], dtypes, False, 0.0, device)),
        ("None if they have their own", lambda: Launch([good], dtypes, False, 0.0, device).run(None, factors)),
        ("pass data pointers if", lambda: Launch([given], dtypes, False, 0.0, device).run([0], factors)),
        ("averages that have no memory", lambda: Launch([bare], dtypes, False, 0.0, device).run([0], factors)),
        ("2 gradients for 1", lambda: Launch([good], dtypes, False, 0.0, device).run([0, 0], factors)),
    ]
    for message, action in refusals:
        with pytest.raises(ValueError, match=message):
            action()
    Launch([], dtypes, False, 0.0, device).run(None, factors)
    Launch([Segment(off[:0], off[:0], None, None, 0)], dtypes, False, 0.0, device).run([0], factors)


def all_cases() -> dict[str, Case]:
    """All cases by name."""
    cases: dict[str, Case] = {
        f"{dtypes}/{name}": partial(compare_with_operators, KERNEL_DTYPES[dtypes], options, name == "plain")
        for dtypes in KERNEL_DTYPES
        for name, options in OPTIONS.items()
    }
    cases |= {f"optimizer/{dtype}": partial(compare_with_optimizer, dtype) for dtype in (F32, F64)}
    cases |= {f"schedule/{'double' if double else 'single'}": partial(compare_schedules, double) for double in (0, 1)}
    extra: list[Case] = [
        skip_inactive_rows,
        leave_averages_alone,
        follow_gradients,
        keep_columns_of_graphs,
        refuse,
        update_large,
    ]
    return cases | {case.__name__: case for case in [*extra, update_far_elements]}  # type: ignore[attr-defined]


def round_as_hardware() -> None:
    """Make Triton's interpreter round as the device does.

    It truncates float32 to bfloat16 where PTX rounds to nearest even, and loses bfloat16 subnormals. Before 3.9 its
    fma rounds twice.
    """
    import numpy as np
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        pair = (source.dtype.scalar, target.scalar)
        if pair == (tl.bfloat16, tl.float32):
            data = (source.data.astype(np.uint32) << 16).view(np.float32)
        elif pair == (tl.float32, tl.bfloat16):
            bits = source.data.view(np.uint32)
            data = (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)
            data = np.where(np.isnan(source.data), np.uint16(0x7FFF), data)
        else:
            return cast(self, source, target)
        return interpreter.TensorHandle(data, target.scalar)

    builder.cast_impl = cast_impl
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9):

        def create_fma(_: Any, x: Any, y: Any, z: Any) -> Any:
            a, b, c = (torch.from_numpy(np.array(v)) for v in np.broadcast_arrays(x.data, y.data, z.data))
            # torch's fused operator takes one factor only as a number; here one always is one value.
            factor, other = (a, b) if a.unique().numel() == 1 else (b, a)
            total = torch.add(c, other, alpha=factor.flatten()[0].item())
            return interpreter.TensorHandle(total.numpy(), z.dtype.scalar)

        builder.create_fma = create_fma


def compiled(dtypes: KernelDtypes, aligned: bool = True, options: bool = False, averaged: bool = True) -> Any:
    """``update_kernel`` for an H100."""
    import triton.language as tl

    from dist_asgd.update import cuda

    names = cuda.update_kernel.arg_names
    flags = {"MASTER": dtypes.master, "STOCHASTIC": dtypes.stochastic, "MAXIMIZE": False, "WEIGHT_DECAY": True}
    flags["AVERAGED"] = averaged
    constants: dict[str, Any] = {
        **flags,
        "PARAM_ALIGNED": True,
        "GRADIENT_ALIGNED": aligned,
        "BLOCK_NUMEL": cuda.default_block_numel(dtypes),
    }
    for name in ("param", "gradient", "average"):
        constants[name.upper()] = getattr(tl, str(getattr(dtypes, name)).removeprefix("torch."))
    signature = {"blocks": "*i32", "table": "*i64", "column": "*i64", "factors": "*fp64"}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in signature}
    for name in ("unscale", "clip", "found_inf"):
        if options:
            signature[name] = "*fp32"
        else:
            constants[name] = None
    return build(cuda.update_kernel, signature, constants, attributes, cuda.NUM_WARPS)


def compiled_advance() -> Any:
    """``advance_kernel``, compiled for an H100."""
    from dist_asgd.update import cuda

    signature = {"scalars": "*fp64", "hyper": "*fp64", "factors": "*fp64", "found_inf": "*fp32", "num_rows": "i32"}
    constants = {"DOUBLE": False, "BLOCK_ROWS": cuda.BLOCK_ROWS}
    return build(cuda.advance_kernel, signature, constants, {}, 1)


def build(kernel: Any, signature: dict[str, str], constants: dict[str, Any], attributes: Any, num_warps: int) -> Any:
    """Compile ``kernel`` as a launch would, but without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = signature | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        {name: signature[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        attributes,
    )
    settings = {"enable_fp_fusion": False, "num_warps": num_warps}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=settings)


def machine_code(kernel: Any) -> dict[str, int]:
    """How often each instruction occurs in the SASS, and REG, STACK and LOCAL as cuobjdump prints them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass, usage = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    counts = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass, re.MULTILINE))
    return {**counts, **{key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}}


def ahead_of_time() -> dict[str, dict[str, int]]:
    """What the machine code for some dtypes holds, and that for unaligned gradients."""
    facts = {name: machine_code(compiled(KERNEL_DTYPES[name])) for name in AHEAD}
    facts["fp32-unaligned"] = machine_code(compiled(KERNEL_DTYPES["fp32"], aligned=False))
    facts["fp32-unwritten"] = machine_code(compiled(KERNEL_DTYPES["fp32"], averaged=False))
    facts["fp32-options"] = machine_code(compiled(KERNEL_DTYPES["fp32"], options=True))
    facts["advance"] = machine_code(compiled_advance())
    return facts


AHEAD = ("fp32", "fp64", "bf16", "bf16-average16", "bf16-master", "fp16-master", "bf16-stochastic")


def main(what: str) -> None:
    """Run the cases that ``what`` names: cpu, cuda or ahead."""
    torch.set_num_threads(1)
    if what == "ahead":
        print(json.dumps(ahead_of_time()))
        return
    if what == "cpu":
        round_as_hardware()
    for name, case in all_cases().items():
        outcome = ""
        try:
            case(torch.device(what))
        except Exception:
            outcome = traceback.format_exc()
        print(name, json.dumps(outcome), sep="\t", flush=True)


def start(what: str, module: str = "tests.harness.triton_kernels") -> str:
    """Run ``module`` in a process of its own, with Triton's settings for ``what``, and return its output."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": str(int(what == "cpu"))}
        command = [sys.executable, "-W", "ignore", "-m", module, what]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{what} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1])
