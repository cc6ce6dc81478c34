"""Averages in host memory: the bits of those beside their parameters, whoever writes and reads while they are updated.

Streams are imagined: what they are given runs as late as a GPU may run it, which is when somebody waits for it.
"""

import copy
import gc
import mmap
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim.optimizer import _global_optimizer_pre_hooks

from dist_asgd import (
    ExponentialMean,
    ShardedASGD,
    ShardedAverage,
    UniformMean,
    export_averaged,
    load_checkpoint,
    save_checkpoint,
)
from dist_asgd.update import offload
from tests.harness.bits import assert_same_bits
from tests.harness.late_streams import LateStream, offloaded_on_cpus
from tests.harness.models import mlp, mlp_loss, odd_net
from tests.harness.ranks import run, run_errors

WORLDS = [("none", 1), ("gloo", 2)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)
# How parameters are trained and placed.
KINDS = ("AdamW", "fully_shard", "ShardedASGD", "step_in_backward")


class Pair:
    """Two averages of the same parameters, one of them in host memory, beside an optimizer."""

    def __init__(self, rank: int, world_size: int, seed: int, kind: str) -> None:
        self.random = random.Random(seed)
        self.rank, self.world_size = rank, world_size
        torch.manual_seed(seed)
        self.model: nn.Module = odd_net() if kind == "AdamW" else mlp()
        self.is_fsdp2 = kind == "fully_shard"
        if not self.is_fsdp2 and self.random.random() < 0.4:
            self.model.bfloat16()
        if kind == "fully_shard":
            fully_shard(self.model)
        self.optimizer: torch.optim.Optimizer
        if kind in ("ShardedASGD", "step_in_backward"):
            options = {"stage": 2, "step_in_backward": kind == "step_in_backward"}
            self.optimizer = ShardedASGD(self.model.parameters(), lr=0.1, t0=3, bucket_cap_mb=0.001, **options)
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        rule = self.random.choice([{"decay": 0.8}, {}, {"weight": ExponentialMean(0.9, warmup=2)}, {"every": 2}])
        self.options: dict[str, Any] = {**rule, "foreach": self.random.choice([None, False])}
        self.options |= {"start": self.random.randrange(3), "bucket_cap_mb": self.random.choice([0.0005, 25])}
        self.beside, self.host = (self.make(device) for device in (None, "cpu"))

    def make(self, device: str | None) -> ShardedAverage:
        """An average of the parameters as they are now."""
        return ShardedAverage(self.model.named_parameters(), average_device=device, **self.options)

    @property
    def both(self) -> tuple[ShardedAverage, ShardedAverage]:
        """The two."""
        return self.beside, self.host

    def step(self) -> None:
        """One of the optimizer, and an update of both."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average in self.both:
            average.update()

    def loss(self) -> Tensor:
        """A loss whose gradients are of any values, the same on all ranks."""
        seed = self.random.randrange(1 << 30)
        if self.is_fsdp2:
            return mlp_loss(self.model, seed)
        draw = torch.Generator().manual_seed(seed)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.stack([(p * torch.randn(p.shape, generator=draw).to(p.dtype)).sum() for p in trained]).sum()

    def compare(self) -> None:
        """The averages, through a way to read them that is drawn."""
        how = self.random.randrange(4)
        if how == 0:
            found = [average.consolidated_state_dict(to=None)["state"] for average in self.both]
            for index, entry in found[0].items():
                for key, value in entry.items():
                    assert_same_bits(found[1][index][key], value, key)
        elif how == 1:
            for param in self.beside.state:
                shown = [_local(average.state[param]["ax"]) for average in self.both]
                assert_same_bits(shown[1], shown[0], "state")
        elif how == 2:
            values = []
            before = [_local(p.detach()).clone() for p in self.model.parameters()]
            for average in self.both:
                with average.averaged_parameters():
                    values.append([_local(p.detach()).clone() for p in self.model.parameters()])
            for mine, theirs in zip(*values, strict=True):
                assert_same_bits(mine, theirs, "in place")
            for param, value in zip(self.model.parameters(), before, strict=True):
                assert_same_bits(_local(param.detach()), value, "afterwards")
        else:
            found = [average.state_dict()["state"] for average in self.both]
            for index, entry in found[0].items():
                assert_same_bits(_local(found[1][index]["ax"]), _local(entry["ax"]), "state_dict")

    def reload(self) -> None:
        """Both from the dict of one: a copy, with updates in flight when it is taken and when it is loaded."""
        whole = copy.deepcopy(self.host.consolidated_state_dict(to=None))
        self.step()
        for average in self.both:
            average.load_state_dict(whole)

    def write(self) -> None:
        """Parameters, after a wait for those who read them."""
        self.host.wait_for_parameters()
        with torch.no_grad():
            for param in self.model.parameters():
                param.mul_(1.5)

    def begin(self) -> None:
        """Averaging begins anew."""
        for average in self.both:
            average.start_averaging()

    def again(self) -> None:
        """The average in host memory is deleted with an update in flight, and another one takes its state."""
        state = self.beside.consolidated_state_dict(to=None)
        self.step()
        self.host = self.make("cpu")
        for average in self.both:
            average.load_state_dict(state)


def _local(tensor: Tensor) -> Tensor:
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def follows(rank: int, world_size: int, seed: int, kind: str, late: bool) -> None:
    """Job: one random history."""
    with offloaded_on_cpus(late):
        pair = Pair(rank, world_size, seed, kind)
        assert pair.host.shards.state_buffers[0].is_offloaded
        for _ in range(14):
            event = pair.random.choice(
                [pair.step] * 5 + [pair.compare] * 3 + [pair.reload, pair.write, pair.begin, pair.again]
            )
            event()
        pair.step()
        pair.compare()


def histories(rank: int, world_size: int, kind: str) -> None:
    """Job: some of them, in one process."""
    for seed in range(6):
        follows(rank, world_size, seed, kind, late=seed % 3 > 0)


@worlds
@pytest.mark.parametrize("kind", KINDS)
def test_random_histories_have_the_bits_of_averages_beside_their_parameters(
    backend: str, world_size: int, kind: str
) -> None:
    """Steps, writes, reads of all kinds, loads, and averages that are deleted, with updates in flight."""
    if kind == "fully_shard" and world_size == 1:
        pytest.skip("FSDP2 has several ranks")
    run(backend, world_size, histories, kind)


DTYPES = [torch.float32, torch.float64, torch.float16, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("foreach", [None, False])
def test_all_dtypes(dtype: torch.dtype, foreach: bool | None) -> None:
    """Also tiles that end within a parameter, parameters of several tiles, and those that join later."""
    draw = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(n, 3, generator=draw, dtype=torch.float64).to(dtype)) for n in (1, 5, 90, 0, 7)]
    params[1].requires_grad_(False)
    with offloaded_on_cpus():
        both = [ShardedAverage(params, decay=0.5, foreach=foreach, average_device=device) for device in (None, "cpu")]
        for n in range(6):
            for average in both:
                average.update()
            # As before the step of an optimizer.
            offload.Offload.before_write()
            if n == 2:
                # A cohort of its own, between the others.
                params[1].requires_grad_(True)
            with torch.no_grad():
                for p in params:
                    p.mul_(1.1).sub_(0.3)
        for p in params:
            assert_same_bits(both[1].state[p]["ax"], both[0].state[p]["ax"], "ax")


def saves(rank: int, world_size: int, folder: str) -> None:
    """Job: a checkpoint and an export while an update is in flight, and a load under another one."""
    with offloaded_on_cpus():
        pair = Pair(rank, world_size, 5, "ShardedASGD")
        for _ in range(5):
            pair.step()
        save_checkpoint(f"{folder}/saved", pair.model, pair.optimizer, step=5, averages=pair.host)
        pair.step()
        wanted = pair.beside.consolidated_state_dict(to=None)["state"]
        export_averaged(f"{folder}/host.safetensors", pair.model, pair.host)
        export_averaged(f"{folder}/beside.safetensors", pair.model, pair.beside)
        pair.step()
        load_checkpoint(f"{folder}/saved", pair.model, pair.optimizer, averages=pair.host)
        pair.beside.load_state_dict(pair.host.consolidated_state_dict(to=None))
        pair.step()
        found = pair.host.consolidated_state_dict(to=None)["state"]
        beside = pair.beside.consolidated_state_dict(to=None)["state"]
        for index, entry in wanted.items():
            assert not torch.equal(entry["ax"], found[index]["ax"])
            assert_same_bits(found[index]["ax"], beside[index]["ax"], "ax")


def loads_for_another(rank: int, world_size: int, folder: str) -> None:
    """Job: a checkpoint without averages is loaded while an update is in flight."""
    with offloaded_on_cpus():
        pair = Pair(rank, world_size, 3, "AdamW")
        for _ in range(3):
            pair.step()
        save_checkpoint(f"{folder}/saved", pair.model, pair.optimizer, step=3)
        pair.step()
        load_checkpoint(f"{folder}/saved", pair.model, pair.optimizer)
        pair.step()
        pair.compare()


@worlds
def test_a_load_of_parameters_waits_for_those_who_read_them(backend: str, world_size: int, tmp_path: Path) -> None:
    """Although it has nothing to do with the average."""
    run(backend, world_size, loads_for_another, str(tmp_path))


@worlds
def test_checkpoints_and_exports(backend: str, world_size: int, tmp_path: Path) -> None:
    """They are of the update before; a load writes parameters, and averages."""
    from safetensors.torch import load_file

    run(backend, world_size, saves, str(tmp_path))
    host, beside = (load_file(tmp_path / f"{name}.safetensors") for name in ("host", "beside"))
    for name, value in beside.items():
        assert_same_bits(host[name], value, name)


def writes_without_waiting(rank: int, world_size: int, collective: bool) -> None:
    """Job: a parameter is written behind the optimizer's back; the next call says so."""
    with offloaded_on_cpus():
        pair = Pair(rank, world_size, 0, "ShardedASGD")
        for _ in range(4):
            pair.step()
        with torch.no_grad():
            next(iter(pair.model.parameters())).mul_(2)
        if collective:
            pair.host.consolidated_state_dict()
        else:
            pair.host.update()


@worlds
@pytest.mark.parametrize("collective", [False, True], ids=["update", "consolidated_state_dict"])
def test_a_write_while_an_update_may_read_is_an_error(backend: str, world_size: int, collective: bool) -> None:
    """Whether or not the update has read it by then: no one knows."""
    for error in run_errors(backend, world_size, writes_without_waiting, collective):
        assert error.type_name == "RuntimeError"
        assert "came after update() and before the step of an optimizer, while its average" in error.message
        assert "Call the average's wait_for_parameters() before such a write" in error.message


def test_a_load_ends_the_error() -> None:
    """The averages are whole again then."""
    with offloaded_on_cpus():
        model = mlp()
        average = ShardedAverage(model.named_parameters(), average_device="cpu")
        average.update()
        state = copy.deepcopy(average.state_dict())
        average.update()
        with torch.no_grad():
            model[0].weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"a write to parameter 0\.weight came after update\(\)"):
            average.update()
        average.load_state_dict(state)
        average.update()
        assert average.averaged_steps() == 2


@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_memory_is_unlocked_once_an_update_has_ended(in_a_cycle: bool) -> None:
    """A deleted average waits for the device, which would write memory that somebody else has."""
    with offloaded_on_cpus() as runtime:
        average = ShardedAverage(mlp().named_parameters(), weight=UniformMean(), average_device="cpu")
        average.update()
        average.update()
        assert any(stream.waiting for stream in runtime.streams)
        if in_a_cycle:
            # Finalizers come before every __del__ then.
            average.myself = average
        del average
        gc.collect()
        assert runtime.num_unlocked
        assert not runtime.num_late
        assert not any(stream.waiting for stream in runtime.streams)


def test_an_interrupted_update_leaves_nothing_behind() -> None:
    """Whatever is in flight ends before averages are loaded, and before parameters are written."""
    with offloaded_on_cpus() as runtime:
        model = mlp()
        average = ShardedAverage(model.named_parameters(), decay=0.5, average_device="cpu")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        average.update()
        state = copy.deepcopy(average.state_dict())
        run, calls = LateStream.run, [0]

        def interrupted(stream: LateStream, work: Any, reads: Any = ()) -> None:
            calls[0] += 1
            if calls[0] == 3:
                raise KeyboardInterrupt
            run(stream, work, reads)

        with mock.patch.object(LateStream, "run", interrupted), pytest.raises(KeyboardInterrupt):
            average.update()
        in_flight = [len(stream.waiting) for stream in runtime.streams]
        assert sum(in_flight) == 2
        optimizer.step()
        assert [stream.num_reads for stream in runtime.streams] == in_flight
        with pytest.raises(RuntimeError, match=r"update\(\) was interrupted"):
            average.update()
        average.load_state_dict(state)
        assert not any(stream.waiting for stream in runtime.streams)
        for param, loaded in zip(model.parameters(), state["state"].values(), strict=True):
            assert_same_bits(average.state[param]["ax"], loaded["ax"].flatten(), "ax")


def test_an_update_does_not_wait_for_that_of_another_average() -> None:
    """Two of them go on beside the same forward and backward; a write by hand is found in both."""
    with offloaded_on_cpus() as runtime:
        model = mlp()
        both = [ShardedAverage(model.named_parameters(), decay=d, average_device="cpu") for d in (0.5, 0.9)]
        for average in both:
            average.update()
        assert all(stream.waiting and not stream.num_reads for stream in runtime.streams)
        with torch.no_grad():
            model[0].weight.mul_(2)
        for average in both:
            with pytest.raises(RuntimeError, match="a write to parameter"):
                average.update()


WAYS: dict[str, Callable[[nn.Module, ShardedAverage, str], object]] = {
    "state_dict": lambda _, average, __: average.state_dict(),
    "consolidated_state_dict": lambda _, average, __: average.consolidated_state_dict(),
    "export_averaged": lambda model, average, folder: export_averaged(f"{folder}/a.safetensors", model, average),
    "save_checkpoint": lambda model, average, folder: save_checkpoint(
        f"{folder}/a", model, torch.optim.SGD(model.parameters()), step=1, averages=average
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_averages_that_may_be_wrong_do_not_leave(way: str, tmp_path: Path) -> None:
    """In the first call after the write already, and in later ones."""
    with offloaded_on_cpus():
        model = mlp()
        average = ShardedAverage(model.named_parameters(), average_device="cpu")
        average.update()
        with torch.no_grad():
            model[0].weight.mul_(2)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="a write to parameter"):
                WAYS[way](model, average, str(tmp_path))
    assert not list(tmp_path.rglob("*.safetensors"))


def lacks_memory(rank: int, world_size: int) -> None:
    """Job: wider averages are loaded, for which one rank finds no page-locked memory."""
    with offloaded_on_cpus():
        model = mlp()
        wide, host = (
            ShardedAverage(model.named_parameters(), average_device=place, average_dtype=dtype)
            for place, dtype in ((None, torch.float64), ("cpu", None))
        )
        for average in (wide, host):
            average.update()
        before = host.consolidated_state_dict(to=None)["state"]
        try:
            with mock.patch.object(mmap, "mmap", _refused if rank == world_size - 1 else mmap.mmap):
                host.load_state_dict(wide.consolidated_state_dict(to=None))
        finally:
            after = host.consolidated_state_dict(to=None)["state"]
            for index, entry in before.items():
                assert_same_bits(after[index]["ax"], entry["ax"], "ax")


def _refused(*_: Any) -> Any:
    raise OSError(12, "Cannot allocate memory")


@worlds
def test_a_load_that_finds_no_memory_is_an_error_on_all_ranks(backend: str, world_size: int) -> None:
    """And changes nothing."""
    for error in run_errors(backend, world_size, lacks_memory):
        assert error.type_name == "RuntimeError"
        assert "there is no memory for the averages of a load" in error.message


def another_place(rank: int, _world_size: int) -> None:
    """Job: ranks differ in where averages are to lie."""
    with offloaded_on_cpus():
        ShardedAverage([nn.Parameter(torch.ones(5))], average_device="cpu" if rank else None)


def test_ranks_that_differ_in_the_place_all_raise() -> None:
    """Before any memory is made."""
    for error in run_errors("gloo", 2, another_place):
        assert error.type_name == "ValueError"
        assert "average_device: rank 0 has None; rank 1 has cpu" in error.message


def fewer_elements_than_ranks(_rank: int, _world_size: int) -> None:
    """Job: most ranks have an empty shard, and one element is no number."""
    with offloaded_on_cpus():
        params = [nn.Parameter(torch.tensor([1.0, torch.nan])), nn.Parameter(torch.tensor(3.0))]
        optimizer = torch.optim.SGD(params, lr=0.1)
        both = [ShardedAverage(params, decay=0.5, average_device=place) for place in (None, "cpu")]
        for step in range(4):
            for param in params:
                param.grad = torch.full_like(param, step + 1.0)
            optimizer.step()
            for average in both:
                average.update()
        beside, host = (average.consolidated_state_dict(to=None)["state"] for average in both)
        for index, entry in beside.items():
            assert_same_bits(host[index]["ax"], entry["ax"], "ax")


def test_more_ranks_than_elements() -> None:
    """Ranks without an element take part in everything."""
    run("gloo", 4, fewer_elements_than_ranks)


def test_there_is_one_hook_for_all_averages() -> None:
    """One that came and went with each would go while torch runs hooks, if the average is collected then."""
    with offloaded_on_cpus():
        first = ShardedAverage(mlp().named_parameters(), average_device="cpu")
        hooks = list(_global_optimizer_pre_hooks)
        assert hooks
        second = ShardedAverage(mlp().named_parameters(), average_device="cpu")
        del first, second
        gc.collect()
        assert list(_global_optimizer_pre_hooks) == hooks


def test_scratch_is_two_tiles_of_averages() -> None:
    """And two more of parameters that are widened; it is there from construction on, so that no update allocates."""
    params = [nn.Parameter(torch.zeros(5000, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(300))]
    with offloaded_on_cpus(tile_bytes=4096):
        plain, average = (ShardedAverage(params, decay=0.9, average_device=device) for device in (None, "cpu"))
        before = average.memory_report().in_flight_bytes
        lanes = offload.NUM_LANES * 2 * 4096
        assert before - plain.memory_report().in_flight_bytes == lanes
        average.update()
        average.update()
        assert average.memory_report().in_flight_bytes == before


def test_reports_say_where_averages_lie() -> None:
    """Page-locked host memory is counted by itself."""
    with offloaded_on_cpus():
        average = ShardedAverage(mlp().named_parameters(), decay=0.9, average_device="cpu")
        report = average.memory_report()
        assert report.host_state_bytes == report.state_bytes > 0
        assert ShardedAverage(mlp().named_parameters(), decay=0.9).memory_report().host_state_bytes == 0
