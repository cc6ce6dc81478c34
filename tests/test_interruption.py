"""Interrupted calls: whatever stops a call, at any line of it, parameters and averages are not mixed up, or it is said.

A trace function raises at the n-th line that a call runs in the package, for every n, as Ctrl-C or a failed allocation
may. The next call then finds parameters and state as they were, or raises and says that they may be torn.
"""

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import dist_asgd
from dist_asgd import ShardedASGD, load_checkpoint, save_checkpoint
from dist_asgd.gather import Arrivals
from tests.harness.bits import same_bits
from tests.harness.ranks import run

PACKAGE = str(Path(dist_asgd.__file__).parent)
OPTIONS: dict[str, Any] = {"lr": 0.5, "lambd": 0.0, "t0": 0, "bucket_cap_mb": 0.0005}


class Interruption(BaseException):
    """Is raised in the middle of a call, as KeyboardInterrupt is."""


def interrupted(call: Callable[[], None], at_line: int, error: type[BaseException]) -> bool:
    """Make ``call``, raising ``error`` before its line number ``at_line`` in the package; whether it had so many."""
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            lines += 1
            if lines == at_line:
                sys.settrace(None)
                raise error("interrupted")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except (Interruption, MemoryError):
        pass
    finally:
        sys.settrace(before)
    return lines >= at_line


def trained(dtype: torch.dtype, **options: Any) -> tuple[list[Tensor], ShardedASGD]:
    """Parameters of several buckets and an optimizer whose averages differ from them."""
    params = [torch.nn.Parameter(torch.full((numel,), float(numel), dtype=dtype)) for numel in (300, 7, 129)]
    optimizer = ShardedASGD(params, **OPTIONS, **options)
    for step in range(4):
        set_gradients(params, step)
        optimizer.step()
        optimizer.zero_grad()
    return list(params), optimizer


def set_gradients(params: list[Tensor], step: int) -> None:
    """Gradients that are the same on all ranks."""
    for index, param in enumerate(params):
        param.grad = torch.full_like(param, 0.25 * (step + index + 1))


def contents(params: list[Tensor], optimizer: ShardedASGD) -> list[Tensor]:
    """Copies of all parameters and of this rank's averages."""
    return [t.detach().clone() for p in params for t in (p, optimizer.state[p]["ax"])]


def assert_untouched(params: list[Tensor], optimizer: ShardedASGD, expected: list[Tensor], when: str) -> None:
    """Parameters and averages are to the bit what they were."""
    found = contents(params, optimizer)
    assert all(map(same_bits, found, expected)), when


@pytest.mark.parametrize("error", [Interruption, MemoryError])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["exchanged", "set aside"])
def test_a_swap_is_whole_or_undone(dtype: torch.dtype, error: type[BaseException]) -> None:
    """Whichever line of entering or leaving ``averaged_parameters()`` is interrupted."""
    params, optimizer = trained(dtype)
    expected = contents(params, optimizer)
    averages = [optimizer.state[p]["ax"].clone() for p in params]

    def evaluate() -> None:
        with optimizer.averaged_parameters():
            inside = [same_bits(p.detach(), ax.view_as(p).to(p.dtype)) for p, ax in zip(params, averages, strict=True)]
            assert all(inside), f"mixed inside, line {line}"

    line = 1
    while interrupted(evaluate, line, error):
        if optimizer.averages.is_swapped:
            # Leaving has failed, and can be repeated.
            evaluate()
        assert_untouched(params, optimizer, expected, f"after line {line}")
        line += 1
    assert line > 100
    set_gradients(params, 9)
    optimizer.step()


def refused(rank: int, world_size: int, stage: int) -> None:
    """Job: memory runs out on the last rank while it exchanges; all raise that, and can enter afterwards."""
    params, optimizer = trained(torch.bfloat16, stage=stage)
    expected = contents(params, optimizer)

    def exhausted(*_: Any, **__: Any) -> None:
        raise MemoryError("no memory for this fragment")

    with pytest.MonkeyPatch.context() as patch:
        if rank == world_size - 1:
            patch.setattr(optimizer.averages, "_exchange_all", exhausted)
        wanted = f"no memory for this fragment.*rank {world_size - 1} of {world_size}"
        with pytest.raises(RuntimeError, match=wanted), optimizer.averaged_parameters():
            raise AssertionError("inside")
    assert_untouched(params, optimizer, expected, "after the error")
    with optimizer.averaged_parameters():
        pass
    assert_untouched(params, optimizer, expected, "afterwards")


@pytest.mark.parametrize(("backend", "world_size"), [("gloo", 2), ("threads", 3)])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_rank_that_cannot_enter_is_an_error_on_all(backend: str, world_size: int, stage: int) -> None:
    """In seconds, and their parameters are what they were."""
    run(backend, world_size, refused, stage)


# --- step, load ----------------------------------------------------------------------------------------------


def trained_on(optimizer: ShardedASGD, params: list[Tensor], step: int) -> None:
    """Take one step."""
    set_gradients(params, step)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("options", [{"stage": 1}, {"stage": 2}, {"foreach": True}], ids=str)
def test_an_interrupted_step_is_no_step_or_is_said(options: dict[str, Any]) -> None:
    """Whichever line is interrupted; a load makes all whole again."""
    twins, twin = trained(torch.float32, **options)
    trained_on(twin, twins, 5)
    after = contents(twins, twin)
    params, optimizer = trained(torch.float32, **options)
    before = contents(params, optimizer)
    saved = copy.deepcopy(optimizer.consolidated_state_dict())
    line, torn = 1, 0
    set_gradients(params, 5)
    while interrupted(optimizer.step, line, Interruption):
        if optimizer.shards.torn_by is None:
            found, steps = contents(params, optimizer), {optimizer.state[p]["step"].item() for p in params}
            untouched = all(map(same_bits, found, before)) and steps == {4}
            assert untouched or (all(map(same_bits, found, after)) and steps == {5}), f"torn in silence, line {line}"
        else:
            torn += 1
            for call in (optimizer.step, optimizer.state_dict, optimizer.consolidated_state_dict):
                with pytest.raises(RuntimeError, match=r"step\(\) was interrupted while it wrote"):
                    call()
        optimizer.zero_grad()  # what a reduction has lost is given up
        optimizer.load_state_dict(saved)
        with torch.no_grad():
            for param, weight in zip(params, before[::2], strict=True):
                param.copy_(weight)
        set_gradients(params, 5)
        line += 1
    assert torn > 10


def test_an_interrupted_wait_is_said_or_comes_again() -> None:
    """Whichever line of a module's wait for parameters is interrupted; no wait is called twice."""
    line = 1
    while True:
        arrivals, called, failures = Arrivals(), [0, 0], []
        arrivals.on_failure = lambda found=failures: found.append(1)

        def wait(key: int, counts: list[int] = called) -> None:
            counts[key] += 1

        for key in range(2):
            arrivals.add(key, partial(wait, key))
        params = [torch.ones(1), torch.ones(1)]
        versions = [param._version for param in params]
        arrivals.defer({key: [param] for key, param in enumerate(params)}, [])
        if not interrupted(lambda found=arrivals: found.wait(), line, Interruption):  # type: ignore[misc]
            break
        if not failures:
            arrivals.wait()
            assert called == [1, 1], f"line {line}"
            assert [param._version for param in params] == [version + 1 for version in versions], f"line {line}"
        assert max(called) <= 1
        line += 1
    assert line > 10


def test_an_interrupted_load_is_said(tmp_path: Path) -> None:
    """At any line after which something was written; loading once more makes all whole."""
    params, optimizer = trained(torch.float32)
    model = torch.nn.ParameterList(params)
    save_checkpoint(tmp_path / "saved", model, optimizer, step=4)
    expected = contents(params, optimizer)
    trained_on(optimizer, params, 5)
    moved = contents(params, optimizer)
    lines = count_lines(lambda: load_checkpoint(tmp_path / "saved", model, optimizer))
    assert_untouched(params, optimizer, expected, "loaded")
    # The last lines write; those before, of which some are tried, only read.
    for line in [*range(1, lines - 250, 211), *range(lines - 250, lines + 1)]:
        with torch.no_grad():
            for tensor, value in zip([t for p in params for t in (p, optimizer.state[p]["ax"])], moved, strict=True):
                tensor.copy_(value)
        interrupted(lambda: load_checkpoint(tmp_path / "saved", model, optimizer), line, Interruption)
        found = contents(params, optimizer)
        if optimizer.shards.torn_by is None:
            assert all(map(same_bits, found, moved)) or all(map(same_bits, found, expected)), f"line {line}"
        else:
            with pytest.raises(RuntimeError, match="was interrupted while it wrote"):
                optimizer.state_dict()
    load_checkpoint(tmp_path / "saved", model, optimizer)
    assert_untouched(params, optimizer, expected, "at last")


def count_lines(call: Callable[[], Any]) -> int:
    """How many lines of the package ``call`` runs."""
    low, high = 1, 1
    while interrupted(call, high, Interruption):
        low, high = high, 2 * high
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if interrupted(call, middle, Interruption) else (low, middle)
    return low


# --- groups --------------------------------------------------------------------------------------------------


def add_to_group(optimizer: ShardedASGD, param: Tensor) -> None:
    """Edit a group as torch allows; the next call builds the shards anew."""
    optimizer.param_groups[0]["params"].append(param)
    optimizer.state_dict()


def add_group(optimizer: ShardedASGD, param: Tensor) -> None:
    """Add a group by the method."""
    optimizer.add_param_group({"params": [param]})


def steps_after(optimizer: ShardedASGD) -> list[Tensor]:
    """Train two steps more, and return parameters and averages of all groups."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in (6, 7):
        trained_on(optimizer, params, step)
    return contents(params, optimizer)


@pytest.mark.parametrize("change", [add_to_group, add_group])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("first_line", [1, 2, 3])
def test_an_interrupted_change_of_groups_is_whole_undone_or_said(
    change: Callable[[ShardedASGD, Tensor], None], stage: int, first_line: int
) -> None:
    """Training goes on as if the change had been made, or as if it had not, or the next call says what to do."""

    def changed(line: int | None) -> tuple[ShardedASGD, bool]:
        _, optimizer = trained(torch.float32, stage=stage)
        added = torch.nn.Parameter(torch.ones(11))
        if line is None:
            change(optimizer, added)
            return optimizer, True
        return optimizer, interrupted(lambda: change(optimizer, added), line, Interruption)

    expected = {3: steps_after(trained(torch.float32, stage=stage)[1]), 4: steps_after(changed(None)[0])}
    line, said, stride = first_line, 0, 11
    while True:
        optimizer, was_interrupted = changed(line)
        if not was_interrupted:
            break
        try:
            found = steps_after(optimizer)
        except RuntimeError as error:
            if "was interrupted while it built the shards" not in str(error):
                raise
            said += 1
        else:
            num_params = len(found) // 2
            assert all(map(same_bits, found, expected[num_params])), f"mixed up in silence, line {line}"
        line += stride
    assert said > 10
