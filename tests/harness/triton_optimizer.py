"""``ShardedASGD(fused=True)`` with the Triton kernels, beside ``torch.optim.ASGD``; in a process of its own.

``python -m tests.harness.triton_optimizer cpu`` interprets the kernels: CPU tensors are passed off as the device's,
scalars and all. ``cuda`` uses a GPU. Both print a line ``name<TAB>what went wrong`` a case.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dist_asgd import GradScaler, ShardedASGD
from dist_asgd.update import backend

from .bits import assert_same_bits
from .deferred import deferred_averages
from .history import AddGroup, GroupSpec, History, ParamSpec, Reload, SetLr, SetT0, StartAveraging, Step
from .ranks import run
from .subject import Setting, check_history
from .triton_kernels import round_as_hardware

DTYPES = ("float32", "float64")
OPTIONS: dict[str, Any] = {"lr": 0.1, "t0": 2, "weight_decay": 0.01}


def history_of(dtype: str) -> History:
    """A history: skips that split cohorts, changed hyperparameters, an added group, three reloads, odd layouts."""
    spec = partial(ParamSpec, dtype=dtype)
    return History(
        (
            GroupSpec((spec((9, 5)), spec((), frozen=True), spec((4099,))), t0=2, weight_decay=0.1),
            GroupSpec(
                (spec((2, 3, 4, 5), layout="channels_last"), spec((0,)), spec(())), maximize=True, tensor_lr=True
            ),
        ),
        (
            SetLr(0, 0.3),
            Step(who=("all", "none", "all")),
            Step(by_hand=(True, False)),
            StartAveraging(),
            Step(who=("none", "all", "all"), num_backwards=2),
            SetLr(1, 0.02),
            AddGroup(GroupSpec((spec((7,)), spec((6, 7), layout="transposed")), lambd=0.0, t0=0)),
            Step(),
            Reload("own"),
            Step(),
            Reload("consolidated"),
            Step(who=("none", "all")),
            SetT0(0, 1.0),
            Reload("torch"),
            Step(),
            Step(),
        ),
        named=True,
    )


def lives_a_history(dtype: str, stage: int, masters: bool, _device: torch.device) -> None:
    """Check the history in one process."""
    check_history(0, 1, history_of(dtype), Setting(stage, "fused", 0.001, masters))


def check_as_device(rank: int, world_size: int, *args: Any) -> None:
    """Job: run a history in a process of the pool, whose interpreter has to round as the device does, too."""
    round_as_hardware()
    with mock.patch.object(backend, "of", return_value=backend.TRITON):
        check_history(rank, world_size, *args)


def lives_on_ranks(stage: int, _device: torch.device) -> None:
    """Check the history on two Gloo processes."""
    from tests.harness.triton_optimizer import check_as_device as job  # by a name that other processes know

    run("gloo", 2, job, history_of("float32"), Setting(stage, "fused", 0.001), timeout_s=300.0)


def lives_sharded_as_device(rank: int, world_size: int) -> None:
    """Job: update the local tensors of FSDP2, each of which has an address of its own."""
    from tests.placements.test_dtensor import _lives_as_torch

    round_as_hardware()
    with mock.patch.object(backend, "of", return_value=backend.TRITON):
        _lives_as_torch(rank, world_size, "fsdp2", "fused")


def lives_sharded(_device: torch.device) -> None:
    """Check DTensors on two Gloo processes."""
    from tests.harness.triton_optimizer import lives_sharded_as_device as job

    run("gloo", 2, job, timeout_s=300.0)


def parameters(device: torch.device) -> list[torch.nn.Parameter]:
    """Three parameters on ``device``."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, generator=generator).to(device)) for n in (33, 1, 4099)]


def gradients(params: list[torch.nn.Parameter], step: int) -> None:
    """Set gradients, which are the same in equal steps."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)


def changes_its_form(device: torch.device) -> None:
    """Scalars move to the device, back to the host for the for-loop implementation, and to the device again."""
    ours, theirs = parameters(device), parameters(device)
    optimizer = ShardedASGD(ours, **OPTIONS, fused=True)
    oracle = torch.optim.ASGD(theirs, **OPTIONS, foreach=False)
    for step in range(9):
        fused = step // 3 != 1
        optimizer.param_groups[0].update(fused=fused, foreach=None if fused else False)
        for params, opt in ((ours, optimizer), (theirs, oracle)):
            gradients(params, step)
            opt.step()
        for p, q in zip(ours, theirs, strict=True):
            assert_same_bits(p, q, f"parameter after step {step}")
            assert optimizer.state[p]["step"].item() == oracle.state[q]["step"].item() == step + 1


def skips_on_the_device(device: torch.device) -> None:
    """The kernels read a scaler's found_inf: on overflow nothing changes, in the first step neither."""
    ours, theirs = parameters(device), parameters(device)
    optimizer = ShardedASGD(ours, **OPTIONS, fused=True)
    oracle = torch.optim.ASGD(theirs, **OPTIONS, foreach=False)
    scalers = [GradScaler(device.type, init_scale=2.0**8, growth_interval=2) for _ in range(2)]
    with mock.patch(
        "dist_asgd.gradients.loss_scaling.ScalerInfo.overflowed", side_effect=AssertionError("the host waited")
    ):
        for step in range(7):
            optimizer.param_groups[0]["lr"] = oracle.param_groups[0]["lr"] = 0.3 if step == 0 else 0.1
            for params, opt, scaler in ((ours, optimizer, scalers[0]), (theirs, oracle, scalers[1])):
                gradients(params, step)
                for p in params:
                    p.grad = None if p.grad is None else p.grad * scaler.scale(torch.ones((), device=device))
                if step in (0, 3):
                    params[2].grad = torch.full_like(params[2], torch.inf)
                scaler.step(opt)
                scaler.update()
    for index, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        assert_same_bits(p, q, f"parameter {index}")
    state = optimizer.consolidated_state_dict()["state"]
    for index, q in enumerate(theirs):
        for key, value in oracle.state[q].items():
            assert_same_bits(state[index][key], value.cpu(), f"{key} of parameter {index}")


def reads_its_lr_on_the_device(device: torch.device) -> None:
    """No tensor on the device is asked for its value."""
    ours, theirs = parameters(device), parameters(device)
    lr = torch.tensor(0.1, device=device)
    optimizer = ShardedASGD(ours, **{**OPTIONS, "lr": lr}, fused=True)
    oracle = torch.optim.ASGD(theirs, **{**OPTIONS, "lr": 0.1}, foreach=False)
    for step in range(5):
        lr.fill_(0.1 / (step + 1))
        oracle.param_groups[0]["lr"] = lr.item()
        gradients(ours, step)
        gradients(theirs, step)
        # The first step plans.
        waits = mock.patch.object(Tensor, "item", side_effect=AssertionError("the host waited"))
        with waits if step else contextlib.nullcontext():
            optimizer.step()
        oracle.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def loads_its_own_state(device: torch.device) -> None:
    """Loading its own state repeatedly assigns new rows of the table and changes no bit."""
    ours, theirs = parameters(device), parameters(device)
    optimizer = ShardedASGD(ours, **OPTIONS, fused=True)
    oracle = torch.optim.ASGD(theirs, **OPTIONS, foreach=False)
    for step in range(6):
        for params, opt in ((ours, optimizer), (theirs, oracle)):
            gradients(params, step)
            if step == 2:
                params[1].grad = None
            opt.step()
        optimizer.load_state_dict(optimizer.consolidated_state_dict() if step % 2 else optimizer.state_dict())
    for p, q in zip(ours, theirs, strict=True):
        assert_same_bits(p, q, "parameter")


def averages_and_clips(device: torch.device) -> None:
    """``averaged_parameters()`` and ``clip_grad_norm_`` in stage 2 give torch's results."""
    ours, theirs = parameters(device), parameters(device)
    optimizer = ShardedASGD(ours, **OPTIONS, fused=True, stage=2)
    oracle = torch.optim.ASGD(theirs, **OPTIONS, foreach=False)
    for step in range(6):
        for params, opt in ((ours, optimizer), (theirs, oracle)):
            opt.zero_grad()
            gradients(params, step)
            if opt is optimizer:
                optimizer.clip_grad_norm_(0.5)
            else:
                torch.nn.utils.clip_grad_norm_(params, 0.5)
            opt.step()
    with optimizer.averaged_parameters():
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.detach(), oracle.state[q]["ax"], rtol=1e-5, atol=1e-6)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def without_memory(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Averages have no memory before they are written, as on a GPU."""
    return deferred_averages() if device.type == "cpu" else contextlib.nullcontext()


def has_no_averages_before(device: torch.device) -> None:
    """The kernel leaves averages alone that have no memory, up to the step that t0 says; all bits are torch's."""
    with without_memory(device):
        ours, theirs = parameters(device), parameters(device)
        optimizer = ShardedASGD(ours, **OPTIONS, fused=True)
        oracle = torch.optim.ASGD(theirs, **OPTIONS, foreach=False)
        for step in range(1, 8):
            (bucket,) = optimizer.shards.buckets
            # Whoever asks for a number gets no tensor that could be written.
            assert optimizer.averaged_steps() == max(0, step - 2 - OPTIONS["t0"])
            assert bucket.average_has_address == (step > OPTIONS["t0"] + 2), step
            for params, opt in ((ours, optimizer), (theirs, oracle)):
                gradients(params, step)
                opt.step()
            state = optimizer.consolidated_state_dict()["state"]
            for index, (p, q) in enumerate(zip(ours, theirs, strict=True)):
                assert_same_bits(p, q, f"parameter {index} after step {step}")
                assert_same_bits(state[index]["ax"], oracle.state[q]["ax"].cpu(), f"ax {index} after step {step}")


def begins_after_skips(device: torch.device) -> None:
    """The host does not learn of skips: averages get memory when they may be needed, and are copies until they are."""
    with without_memory(device):
        ours, theirs = parameters(device), parameters(device)
        optimizer = ShardedASGD(ours, **OPTIONS, fused=True)
        oracle = torch.optim.ASGD(theirs, **OPTIONS, foreach=False)
        for step in range(1, 16):
            # A later t0 makes mu 1 again in the first step that is not skipped.
            skips = step in (3, 4, 5, 11)
            if step == 11:
                optimizer.param_groups[0]["t0"] = oracle.param_groups[0]["t0"] = 100
            optimizer.found_inf = torch.tensor(float(skips), device=device)
            optimizer.grad_scale = torch.ones((), device=device)
            gradients(ours, step)
            optimizer.step()
            if not skips:
                gradients(theirs, step)
                oracle.step()
            assert optimizer.shards.buckets[0].average_has_address == (step >= OPTIONS["t0"] + 2), step
            if step == 5:
                for p in (*ours, *theirs):
                    p.data.mul_(0.5)
                continue
            state = optimizer.consolidated_state_dict()["state"]
            for index, q in enumerate(theirs):
                assert_same_bits(state[index]["ax"], oracle.state[q]["ax"].cpu(), f"ax {index} after step {step}")


def splits_as_it_changes_its_form(device: torch.device) -> None:
    """One parameter skips the very step in which scalars move to the host: those of both are there afterwards."""
    with without_memory(device):
        ours, theirs = parameters(device), parameters(device)
        optimizer = ShardedASGD(ours, **OPTIONS, fused=True, bucket_cap_mb=1e-4)
        oracle = torch.optim.ASGD(theirs, **OPTIONS, foreach=False)
        for step in range(12):
            if step == 2:
                optimizer.param_groups[0].update(fused=False, foreach=False)
            for params, opt in ((ours, optimizer), (theirs, oracle)):
                gradients(params, step)
                if step == 2:
                    params[1].grad = None
                opt.step()
        state = optimizer.consolidated_state_dict()["state"]
        for index, q in enumerate(theirs):
            for key, value in oracle.state[q].items():
                assert_same_bits(state[index][key], value.cpu(), f"{key} {index}")


def lives_unseen(stage: int, device: torch.device) -> None:
    """Histories in which nobody looks at the averages but now and then, with all that makes them begin."""
    from tests.averages.test_until_averaging import Pair, one_event

    assert device.type == "cpu"
    with deferred_averages():
        for seed in range(3):
            Pair(seed, "kernel", stage=stage).run(24)
        one_event(0, 1, "kernel", {"stage": stage})


Case = Callable[[torch.device], None]


def all_cases(kind: str) -> dict[str, Case]:
    """All cases by name. Histories compare with torch on the CPU, so they run in the interpreter only."""
    cases: list[Case] = [changes_its_form, skips_on_the_device, reads_its_lr_on_the_device, averages_and_clips]
    cases += [loads_its_own_state, has_no_averages_before, begins_after_skips, splits_as_it_changes_its_form]
    found: dict[str, Case] = {case.__name__: case for case in cases}  # type: ignore[attr-defined]
    if kind == "cpu":
        found["dtensors"] = lives_sharded
        for stage in (1, 2):
            found[f"unseen/{stage}"] = partial(lives_unseen, stage)
            found |= {f"history/{dtype}/{stage}": partial(lives_a_history, dtype, stage, False) for dtype in DTYPES}
            found[f"history/bfloat16 + master/{stage}"] = partial(lives_a_history, "bfloat16", stage, True)
            found[f"history/ranks/{stage}"] = partial(lives_on_ranks, stage)
    return found


def main(kind: str) -> None:
    """Run all cases on a device of ``kind``."""
    device = torch.device(kind)
    if kind == "cpu":
        round_as_hardware()
        backend.of = lambda _device: backend.TRITON  # type: ignore[assignment]
    for name, case in all_cases(kind).items():
        try:
            case(device)
            outcome = ""
        except Exception:
            outcome = traceback.format_exc()
        print(f"{name}\t{json.dumps(outcome)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
