"""Memory for averages: made or asked for in the step that needs it, before ranks agree; a lack is everybody's error."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from dist_asgd import ExponentialMean, ShardedASGD, ShardedAverage
from dist_asgd.storage import room
from dist_asgd.storage.average import AverageMemory
from tests.harness.bits import assert_same_bits
from tests.harness.deferred import deferred_averages, maybe_deferred
from tests.harness.ranks import run, run_errors

SHAPES = [(40, 30), (7,), (33, 5)]
T0 = 2.0
# The step that gives averages memory: mu is 1 in it, and the parameters may be written before the next one.
FIRST = 4
everywhere = pytest.mark.parametrize("deferred", [False, True], ids=["cpu", "device"])


def params_of() -> list[nn.Parameter]:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def backward(params: list[nn.Parameter], step: int) -> None:
    """Gradients that are the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    torch.stack([(p * torch.randn(p.shape, generator=generator)).sum() for p in params]).sum().backward()


@contextmanager
def no_room(deferred: bool) -> Iterator[None]:
    """Inside there is no memory for averages."""
    lack = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 KiB")
    on_device = mock.patch.object(AverageMemory, "new_average", side_effect=lack)
    with on_device if deferred else mock.patch.object(room, "available_bytes", return_value=1000):
        yield


def lacks_room(rank: int, world_size: int, deferred: bool, options: dict[str, Any]) -> str:
    """Job: the last rank has no memory once; all raise, nothing has changed, and the same step works later."""
    with maybe_deferred(deferred):
        params, expected = params_of(), params_of()
        optimizer = ShardedASGD(params, lr=0.1, t0=T0, bucket_cap_mb=0.004, **options)
        torchs = torch.optim.ASGD(expected, lr=0.1, t0=T0, foreach=options.get("foreach", False))
        refused = ""
        for step in range(1, 7):
            backward(expected, step)
            torchs.step()
            torchs.zero_grad()
            if step == (1 if options.get("foreach") else FIRST):
                refused = refused_step(params, optimizer, step, deferred, lacks=rank == world_size - 1)
            backward(params, step)
            optimizer.step()
            optimizer.zero_grad()
        saved = optimizer.consolidated_state_dict(to=None)["state"]
        for index, (param, theirs) in enumerate(zip(params, expected, strict=True)):
            assert_same_bits(param.detach(), theirs.detach(), "parameter")
            for key, value in torchs.state[theirs].items():
                assert_same_bits(saved[index][key], value, key)
        return refused


def refused_step(params: list[nn.Parameter], optimizer: ShardedASGD, step: int, deferred: bool, lacks: bool) -> str:
    """Try a step, on a rank that lacks memory or not; returns the error."""
    before = [param.detach().clone() for param in params]
    state = copy.deepcopy(optimizer.consolidated_state_dict(to=None))
    backward(params, step)
    with no_room(deferred) if lacks else nullcontext(), pytest.raises(RuntimeError) as raised:
        optimizer.step()
    for param, value in zip(params, before, strict=True):
        assert_same_bits(param.detach(), value, "parameter after a refused step")
    for index, entry in optimizer.consolidated_state_dict(to=None)["state"].items():
        for key, value in entry.items():
            assert_same_bits(value, state["state"][index][key], f"{key} after a refused step")
    optimizer.zero_grad()
    return str(raised.value)


OPTIONS: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "operators": {"stage": 2, "fused": False},
    "foreach": {"stage": 1, "foreach": True},
}


@everywhere
@pytest.mark.parametrize("name", OPTIONS)
def test_a_lack_of_memory_on_one_rank_is_an_error_on_all(name: str, deferred: bool) -> None:
    """It says what is wanted, what there is, and what helps; the step can be tried again."""
    for text in run("gloo", 2, lacks_room, deferred, OPTIONS[name]):
        assert text.startswith("dist_asgd: averages begin to take memory with this step")
        assert "[on rank 1 of 2]" in text
        assert "wanted 0.0 MiB" in text
        assert "later t0" in text
        assert ("CUDA out of memory" in text) == deferred


def lacks_room_for_some(rank: int, world_size: int) -> None:
    """Job: a first step in which not all parameters of a bucket have gradients, so that its averages are no copies."""
    with deferred_averages():
        params = params_of()
        optimizer = ShardedASGD(params, lr=0.1, stage=2)
        backward(params[:2], 1)
        with no_room(deferred=True) if rank == world_size - 1 else nullcontext():
            optimizer.step()


def test_a_lack_of_memory_for_some_parameters() -> None:
    """It is found before the ranks agree, too."""
    for error in run_errors("gloo", 2, lacks_room_for_some):
        assert "averages begin to take memory with this step" in str(error)


def lacks_room_in_backward(rank: int, _world_size: int, deferred: bool) -> None:
    """Job: a step that backward begins."""
    with maybe_deferred(deferred):
        params = params_of()
        optimizer = ShardedASGD(params, lr=0.1, t0=T0, stage=2, step_in_backward=True, bucket_cap_mb=0.004)
        for step in range(1, FIRST):
            backward(params, step)
            optimizer.step()
            optimizer.zero_grad()
        with no_room(deferred) if rank == 1 else nullcontext():
            backward(params, FIRST)
            optimizer.step()


@everywhere
def test_a_lack_of_memory_in_backward(deferred: bool) -> None:
    """It is raised before the first bucket is updated."""
    for error in run_errors("gloo", 2, lacks_room_in_backward, deferred):
        assert "averages begin to take memory with this step" in str(error)


@pytest.mark.parametrize(
    ("options", "first"),
    [({"stage": 2}, FIRST), ({"stage": 2, "step_in_backward": True}, FIRST), ({"stage": 1, "foreach": True}, 1)],
    ids=["stage 2", "in backward", "foreach"],
)
def test_the_system_is_asked_in_one_step(options: dict[str, Any], first: int) -> None:
    """And in no other one, although a bucket never steps."""
    params = params_of()
    with mock.patch.object(room, "available_bytes", return_value=1 << 40) as asked:
        optimizer = ShardedASGD(params, lr=0.1, t0=T0, bucket_cap_mb=0.002, **options)
        assert len(optimizer.shards.buckets) > 1
        for step in range(1, 8):
            assert asked.call_count == (step > first)
            backward(params[1:], step)
            optimizer.step()
            optimizer.zero_grad()


def asks_again(rank: int, _world_size: int) -> None:
    """Job: only the last rank has no memory in a step that is refused; when averaging begins later, none has."""
    params = params_of()
    optimizer = ShardedASGD(params, lr=0.1, t0=T0)
    for step in range(1, 9):
        backward(params, step)
        if step in (FIRST, FIRST + 3):
            left = 1000 if rank or step > FIRST else 1 << 40
            refuses = pytest.raises(RuntimeError, match="has not enough")
            with mock.patch.object(room, "available_bytes", return_value=left), refuses as caught:
                optimizer.step()
            assert str(caught.value).endswith("[on rank 1 of 2]" if step == FIRST else "[on ranks 0-1 of 2]")
            optimizer.param_groups[0]["t0"] = T0 + (3 if step == FIRST else 0)
        optimizer.step()
        optimizer.zero_grad()


def test_a_step_after_a_refused_one_asks_again() -> None:
    """Also on ranks that had found memory for the refused one, and have not taken it since."""
    run("gloo", 2, asks_again)


def needs_twice(_rank: int, _world_size: int) -> None:
    """Job: ranks of one host take memory together."""
    params = [nn.Parameter(torch.ones(1 << 16))]
    optimizer = ShardedASGD(params, lr=0.1, foreach=True)
    assert optimizer.communicators.ranks_on_host == 2
    own = optimizer.memory_report().state_bytes
    for left, works in ((2 * own - 1, False), (2 * own, True)):
        params[0].grad = torch.ones_like(params[0])
        with mock.patch.object(room, "available_bytes", return_value=left):
            if works:
                optimizer.step()
            else:
                with pytest.raises(RuntimeError, match="with the 1 other ranks of this host"):
                    optimizer.step()


def test_ranks_of_a_host_share_its_memory() -> None:
    """What is left must do for all of them."""
    run("gloo", 2, needs_twice)


# --- averages beside an optimizer ------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("foreach", [True, False])
def test_an_average_that_finds_no_memory(foreach: bool, deferred: bool) -> None:
    """``update()`` raises and has counted nothing; the next one has the same iterate."""
    params = params_of()
    with maybe_deferred(deferred):
        average = ShardedAverage(params, weight=ExponentialMean(0.5), start=2, foreach=foreach)
        for _ in range(2):
            average.update()
        with no_room(deferred), pytest.raises(RuntimeError, match="take memory with this step"):
            average.update()
        for _ in range(2):
            average.update()
        for param in params:
            assert average.state[param]["step"].item() == 4
            assert_same_bits(average.state[param]["ax"].view(param.shape), param.detach(), "ax")


def bytes_of(sharded: ShardedASGD | ShardedAverage) -> int:
    """The bytes of all storages that averages have."""
    return sum(buffer.average.untyped_storage().nbytes() for buffer in sharded.shards.state_buffers)


def small(sharded: ShardedASGD | ShardedAverage) -> bool:
    """Whether averages have one element each, and the report says so."""
    report = sharded.memory_report()
    found = bytes_of(sharded)
    placeholders = sum(buffer.average.itemsize for buffer in sharded.shards.state_buffers)
    return report.unwritten_state_bytes == report.state_bytes and found == placeholders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_an_average_takes_no_memory_before_it_counts(dtype: torch.dtype) -> None:
    """On a device; state dicts show zeros until then, whatever the dtype is."""
    param = nn.Parameter(torch.arange(12.0).view(3, 4).to(dtype))
    with deferred_averages():
        average = ShardedAverage([param], start=3)
        for _ in range(3):
            assert small(average)
            average.update()
            assert not average.consolidated_state_dict()["state"][0]["ax"].any()
        assert small(average)
        average.update()
        assert not average.memory_report().unwritten_state_bytes
        assert_same_bits(average.consolidated_state_dict()["state"][0]["ax"].to(dtype), param.detach(), "ax")
        average.start_averaging()
        average.update()
        assert not average.memory_report().unwritten_state_bytes


FORMS: dict[str, tuple[dict[str, Any], int]] = {
    # With the first step that has a placeholder no more.
    "kernel": ({}, FIRST),
    "operators": ({"fused": False}, FIRST),
    "foreach": ({"foreach": True}, 1),
    "wider": ({"average_dtype": torch.float64}, 1),
    "another rule": ({"average": ExponentialMean(0.5)}, FIRST),
}


def holds_none(_rank: int, _world_size: int, name: str, stage: int) -> None:
    """Job: averages of a device have memory from one step on, in one place; a load gives it back once."""
    options, first = FORMS[name]
    params = params_of()
    optimizer = ShardedASGD(params, lr=0.1, t0=T0, stage=stage, **options)

    def step(number: int) -> None:
        backward(params, number)
        optimizer.step()
        optimizer.zero_grad()

    kept: list[int] = []
    for number in range(1, 8):
        assert small(optimizer) == (number <= first), number
        step(number)
        if number >= first:
            kept.append(optimizer.shards.buckets[0].average.data_ptr())
    assert len(set(kept)) == 1
    if first == 1:
        return
    for group in optimizer.param_groups:
        group["t0"] = 100.0
    for number in range(8, 10):
        # Not given back: it may be needed again in the next step.
        step(number)
        assert not optimizer.memory_report().unwritten_state_bytes
    assert all(bucket.params_stand for bucket in optimizer.shards.buckets)
    optimizer.load_state_dict(optimizer.consolidated_state_dict(to=None))
    assert not optimizer.memory_report().unwritten_state_bytes
    step(10)
    assert small(optimizer)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", FORMS)
def test_averages_of_a_device_have_memory_from_one_step_on(name: str, stage: int) -> None:
    """And in all forms that copy parameters to averages none before."""
    with deferred_averages():
        run("threads", 2, holds_none, name, stage)


def test_replaced_averages_are_noticed() -> None:
    """Also if what was replaced had no values: nothing is taken for the average that is none."""
    for others, works in ((1.0, False), (0.0, True)):
        params = params_of()
        with deferred_averages():
            optimizer = ShardedASGD(params, lr=0.1)
            for step in range(2):
                backward(params, step)
                optimizer.step()
            own = [p.detach().reshape(-1).clone() for p in params]
            own[1] += others
            for param, tensor in zip(params, own, strict=True):
                optimizer.state[param]["ax"] = tensor
            if works:
                optimizer.step()
                assert not any(optimizer.state[p]["ax"] is tensor for p, tensor in zip(params, own, strict=True))
            else:
                with pytest.raises(RuntimeError, match=r"state of parameter .*\[1\] was replaced: ax"):
                    optimizer.step()


def test_new_memory_is_followed() -> None:
    """A tensor that somebody has got, and moved elsewhere, is brought back as any other."""
    params = params_of()
    with deferred_averages():
        optimizer = ShardedASGD(params, lr=0.1)
        for step in range(2):
            backward(params, step)
            optimizer.step()
        ax = optimizer.state[params[1]]["ax"]
        ax.data = ax.clone()
        for step in range(2):
            backward(params, step)
            optimizer.step()
            assert optimizer.state[params[1]]["ax"] is ax
            assert_same_bits(ax, params[1].detach(), "ax")


def test_an_entry_outlives_its_place_in_the_state() -> None:
    """Whoever has kept an entry of an optimizer that has built its shards anew, or is deleted, reads what was there."""
    for deletes in (False, True):
        params = params_of()
        with deferred_averages():
            optimizer = ShardedASGD(params, lr=0.1)
            backward(params, 0)
            optimizer.step()
            entries, values = [optimizer.state[p] for p in params], [p.detach().reshape(-1).clone() for p in params]
            if deletes:
                del optimizer
            else:
                optimizer.param_groups[0]["params"] = params[:2]
                optimizer.zero_grad()
                backward(params[:2], 1)
                optimizer.step()
            for entry, value in zip(entries, values, strict=True):
                assert entry["ax"].untyped_storage().nbytes() >= value.nbytes
                if deletes:
                    assert_same_bits(entry["ax"], value, "ax")
            if not deletes:
                optimizer.step()
                for param in params[:2]:
                    assert_same_bits(optimizer.state[param]["ax"], param.detach().reshape(-1), "ax")


# --- what the system says --------------------------------------------------------------------------------

MEMINFO = "MemTotal: 4000 kB\nMemFree: 100 kB\nMemAvailable:  1000 kB\nSwapFree: 24 kB\nHugePages_Total: 0\n"
KIB = 1 << 10
GROUPS: dict[str, tuple[dict[str, str], int]] = {
    "none": ({}, 1024 * KIB),
    "no limit": (
        {"proc/self/cgroup": "0::/a\n", "groups/a/memory.max": "max\n", "groups/a/memory.current": "5"},
        1024 * KIB,
    ),
    "second": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "groups/a/memory.max": str(500 * KIB),
            "groups/a/memory.current": str(400 * KIB),
            "groups/a/memory.stat": f"anon 5\nactive_file {20 * KIB}\ninactive_file {KIB}\n",
            "groups/a/b/memory.max": "max",
            "groups/a/b/memory.current": "1",
        },
        (100 + 21 + 24) * KIB,
    ),
    "container": (
        {"proc/self/cgroup": "0::/\n", "groups/memory.max": str(300 * KIB), "groups/memory.current": str(KIB)},
        (299 + 24) * KIB,
    ),
    "first": (
        {
            "proc/self/cgroup": "9:name=systemd:/x\n4:cpu,memory:/job\n0::/\n",
            "groups/memory/job/memory.limit_in_bytes": str(200 * KIB),
            "groups/memory/job/memory.usage_in_bytes": str(150 * KIB),
            "groups/memory/job/memory.stat": f"total_inactive_file {10 * KIB}\ntotal_active_file 0\n",
        },
        (50 + 10 + 24) * KIB,
    ),
    "names of files, and lines of no known form": (
        {
            "proc/self/cgroup": "what\n0::/job\n\n",
            "groups/job/memory.max": str(200 * KIB),
            "groups/job/memory.current": str(190 * KIB),
            "groups/job/memory.stat": f"inactive_file 0\nslab_reclaimable {70 * KIB}\n",
        },
        (10 + 70 + 24) * KIB,
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_what_is_left(name: str, tmp_path: Path) -> None:
    """Of the host, or below the limit of a control group: what files take there can be had, and swap."""
    files, wanted = GROUPS[name]
    for path, text in {"proc/meminfo": MEMINFO, **files}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    with mock.patch.object(room, "_PROC", tmp_path / "proc"), mock.patch.object(room, "_CGROUPS", tmp_path / "groups"):
        assert room.available_bytes() == wanted


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    """Nothing is refused there."""
    param = nn.Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    with mock.patch.object(room, "_PROC", tmp_path):
        assert room.available_bytes() is None
        ShardedASGD([param], foreach=True).step()


def test_what_this_system_says() -> None:
    """A number, wherever there is a Linux."""
    left = room.available_bytes()
    assert left is None or left > 0
