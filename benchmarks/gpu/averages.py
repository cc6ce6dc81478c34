"""Averages take no memory on the device before a step writes them, and have torch's bits from then on."""

from __future__ import annotations

import copy

import torch
from torch import nn

from benchmarks.gpu.rows import FORMS, Part
from benchmarks.gpu.streams import params_on
from dist_asgd import ShardedASGD, ShardedAverage

T0 = 3
# The step whose averages are read by the next one: mu is 1 in it for the last time.
FIRST = T0 + 2
NUM_PARAMS, NUMEL = 4, 1 << 20


def run(part: Part) -> None:
    """Bits and bytes around the step that makes the memory, and what becomes of a step that finds none."""
    for form in ("forloop", "fused"):
        for stage in (1, 2):
            with part.attempt(f"{form}, stage {stage}"):
                _watch(part, form, stage)
        with part.attempt(f"{form}: a step without memory"):
            _refuse(part, form)
    with part.attempt("an average that begins later"):
        _begin_later(part)


def _allocated(part: Part) -> int:
    part.wait()
    return 0 if part.cpu else torch.cuda.memory_allocated()


def _backward(params: list[nn.Parameter], step: int) -> None:
    torch.autograd.backward(torch.stack([(p * (step + 0.3)).sin().sum() for p in params]).sum())


def _watch(part: Part, form: str, stage: int) -> None:
    what, params = f"{form}, stage {stage}", params_on(part.device, NUM_PARAMS, NUMEL)
    others = copy.deepcopy(params)
    ours = ShardedASGD(params, lr=0.1, t0=T0, stage=stage, **FORMS[form])
    theirs = torch.optim.ASGD(others, lr=0.1, t0=T0, foreach=False)
    state_bytes, equal = ours.memory_report().state_bytes, True
    taken: list[int] = []
    unwritten: list[int] = []
    for step in range(1, FIRST + 4):
        for mine, optimizer in ((params, ours), (others, theirs)):
            _backward(mine, step)
            before = _allocated(part)
            optimizer.step()
            if optimizer is ours:
                taken.append(_allocated(part) - before)
            optimizer.zero_grad()
        saved = ours.consolidated_state_dict()["state"]
        for index, (mine_one, other) in enumerate(zip(params, others, strict=True)):
            equal &= torch.equal(mine_one, other)
            equal &= torch.equal(saved[index]["ax"], theirs.state[other]["ax"].cpu())
        unwritten.append(ours.memory_report().unwritten_state_bytes)
    expected = [state_bytes * (step < FIRST) for step in range(1, FIRST + 4)]
    part.check(f"{what}: averages are unwritten up to step {FIRST - 1}", unwritten == expected, f"{unwritten}")
    part.check(f"{what}: parameters and averages are torch's", equal)
    if not part.cpu:
        early, begins = taken[1 : FIRST - 1], taken[FIRST - 1]
        part.check(f"{what}: steps before averaging take no memory", max(early) < state_bytes // 4, f"{early}")
        part.check(f"{what}: one step takes that of the averages", begins >= state_bytes, f"{begins} of {state_bytes}")


def _refuse(part: Part, form: str) -> None:
    """Let a step find no memory for averages, and try it again."""
    if part.cpu:
        return
    params = params_on(part.device, NUM_PARAMS, NUMEL)
    optimizer = ShardedASGD(params, lr=0.1, t0=T0, **FORMS[form])
    for step in range(1, FIRST):
        _backward(params, step)
        optimizer.step()
        optimizer.zero_grad()
    _backward(params, FIRST)
    before = [p.detach().clone() for p in params]
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(part.device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 20)) / total)
    error = ""
    try:
        optimizer.step()
    except RuntimeError as refused:
        error = str(refused)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    what = f"{form}: a step without memory"
    part.check(f"{what} says so", error.startswith("dist_asgd: averages begin to take memory"), error)
    part.check(f"{what} changes nothing", all(map(torch.equal, params, before)))
    optimizer.step()
    part.check(f"{what} works afterwards", not optimizer.memory_report().unwritten_state_bytes)


def _begin_later(part: Part) -> None:
    params = params_on(part.device, NUM_PARAMS, NUMEL)
    before = _allocated(part)
    average = ShardedAverage(params, start=2)
    average.update()
    average.update()
    taken, state_bytes = _allocated(part) - before, average.memory_report().state_bytes
    part.check("an average takes no memory before its first iterate", taken < state_bytes // 4, f"{taken}")
    average.update()
    with average.averaged_parameters():
        part.wait()
    saved = average.consolidated_state_dict()["state"]
    equal = all(torch.equal(saved[i]["ax"], p.detach().cpu()) for i, p in enumerate(params))
    part.check("its first iterate is a copy of the parameters", equal)
