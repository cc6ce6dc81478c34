"""``overlap_forward``: the order of gathers, ranks that wait late or never, errors, interruptions and deletion."""

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from dist_asgd import ShardedASGD
from dist_asgd.comm import PeerError
from dist_asgd.comm.gloo import Gloo
from dist_asgd.forward import ParametersInFlight
from dist_asgd.gather import Arrivals, Gatherer
from dist_asgd.storage.buffers import StateBuffer
from tests.harness.bits import assert_same_bits, same_bits
from tests.harness.meshes import hybrid_mesh
from tests.harness.native import native_collectives
from tests.harness.ranks import outcomes, run, run_errors

OPTIONS: dict[str, Any] = {"shared_memory": False, "lr": 0.1, "t0": 1, "bucket_cap_mb": 1e-4}
WIDTH = 16


class Layers(nn.Module):
    """Layers that run in another order than they are registered in."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in order])
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 16)`` to ``(batch, 16)``."""
        for index in self.order:
            x = self.layers[index](x).tanh()
        return x


def train(model: nn.Module, optimizer: ShardedASGD) -> None:
    """One step on data that are the same on all ranks."""
    model(torch.ones(2, WIDTH)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def in_flight(optimizer: ShardedASGD) -> int:
    """The number of gathers that nobody has waited for."""
    return len(optimizer.gatherer.arrivals.keys)


def launched(rank: int, _: int, orders: list[list[int]], stage: int) -> tuple[list[int], list[int]]:
    """Job: the layers in the order of their gathers in the second step, and how many are in flight in each forward."""
    model = Layers(orders[rank])
    optimizer = ShardedASGD(model.parameters(), stage=stage, **OPTIONS)
    optimizer.overlap_forward(model)
    optimizer.overlap_forward(model)
    train(model, optimizer)
    found: list[int] = []
    launch = Gatherer.launch

    def noted(self: Gatherer, buffer: StateBuffer) -> None:
        found.extend(member.index for member in buffer.members)
        launch(self, buffer)

    with mock.patch.object(Gatherer, "launch", noted):
        train(model, optimizer)
    left: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_: left.append(in_flight(optimizer)))
        for layer in model.layers  # after the hooks that wait
    ]
    train(model, optimizer)
    for handle in handles:
        handle.remove()
    return found, left


@pytest.mark.parametrize(("stage", "orders"), [(1, [[2, 0, 3, 1]] * 2), (2, [[2, 0, 3, 1], [0, 1, 2, 3]])])
def test_what_the_forward_needs_first_is_gathered_first(stage: int, orders: list[list[int]]) -> None:
    """In the order in which the first forward of rank 0 has called modules; each waits for its own alone."""
    (order, left), (other, _) = run("gloo", 2, launched, orders, stage)
    assert order == other == orders[0]
    assert left == [3, 2, 1, 0]


def waits_late(rank: int, _: int, options: dict[str, Any]) -> list[Tensor]:
    """Job: the first rank needs all parameters before any other rank waits for one."""
    model = Layers([0, 1, 2, 3])
    if "mesh" in options:
        options = options | {"mesh": hybrid_mesh(options["mesh"])}
    optimizer = ShardedASGD(model.parameters(), **OPTIONS, **options)
    optimizer.overlap_forward(model)
    store = dist.distributed_c10d._get_default_store()
    for step in range(3):
        train(model, optimizer)
        assert in_flight(optimizer) == 4
        if rank:
            store.get(f"forward/{options}/{step}")
        assert in_flight(optimizer) == 4
        with torch.no_grad():
            model(torch.ones(2, WIDTH))
        store.set(f"forward/{options}/{step}", "over")
        assert in_flight(optimizer) == 0
    return list(model.parameters())


@pytest.mark.parametrize(
    ("world_size", "options"), [(3, {"stage": 1}), (2, {"stage": 2}), (4, {"stage": 2, "mesh": (2, 2)})], ids=str
)
def test_no_rank_needs_the_wait_of_another(world_size: int, options: dict[str, Any]) -> None:
    """What a rank sends is on its way when ``step()`` returns."""
    found = run("gloo", world_size, waits_late, options)
    model = Layers([0, 1, 2, 3])
    optimizer = ShardedASGD(model.parameters(), lr=0.1, t0=1, shared_memory=False)
    for _ in range(3):
        train(model, optimizer)
    for params in found:
        for ours, alone in zip(params, model.parameters(), strict=True):
            assert_same_bits(ours, alone, "trained")


# --- errors and interruptions --------------------------------------------------------------------------------


def dies_in_step(rank: int, _: int, stage: int) -> str:
    """Job: rank 1 dies once it has gathered one of four buckets; the other one's step has returned by then."""
    model = Layers([0, 1, 2, 3])
    optimizer = ShardedASGD(model.parameters(), stage=stage, **OPTIONS)
    optimizer.overlap_forward(model)
    train(model, optimizer)
    launch, num_launched = Gatherer.launch, 0

    def deadly(self: Gatherer, buffer: StateBuffer) -> None:
        nonlocal num_launched
        num_launched += 1
        if rank == 1 and num_launched == 2:
            time.sleep(0.5)
            os._exit(9)
        launch(self, buffer)

    with mock.patch.object(Gatherer, "launch", deadly):
        train(model, optimizer)
    with pytest.raises(PeerError, match="an all-gather failed on rank 0 of 2"):
        model(torch.ones(2, WIDTH))
    for call in (optimizer.step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match=r"step\(\) was interrupted while it wrote|peer has died"):
            call()
    with pytest.raises(RuntimeError, match=r"step\(\) was interrupted while it wrote"):
        optimizer.shards.check_whole()
    return "raised"


@pytest.mark.parametrize("stage", [1, 2])
def test_a_peer_that_dies_is_an_error_of_the_forward(stage: int) -> None:
    """At once, and the optimizer says afterwards that parameters may be torn."""
    started = time.monotonic()
    survivor, dead = outcomes("gloo", 2, dies_in_step, stage)
    assert dead.error is not None
    assert dead.error.type_name == "RankDied"
    assert survivor.value == "raised", survivor.error
    assert time.monotonic() - started < 15.0


class Interruption(BaseException):
    """Is raised in the middle of a call, as KeyboardInterrupt is."""


def interrupted_in_forward(rank: int, _: int) -> None:
    """Job: the last rank is interrupted while a module waits, and before one does."""
    model = Layers([0, 1, 2, 3])
    optimizer = ShardedASGD(model.parameters(), **OPTIONS)
    optimizer.overlap_forward(model)
    train(model, optimizer)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    handle = model.layers[0].register_forward_pre_hook(interrupt, prepend=True)
    if rank:
        with pytest.raises(Interruption):
            model(torch.ones(2, WIDTH))
    handle.remove()
    # Nothing was lost: all are still waited for.
    assert in_flight(optimizer) == 4
    train(model, optimizer)
    assert not any(map(same_bits, before, model.parameters()))
    train(model, optimizer)
    if rank:
        with mock.patch.object(Gloo, "_wait", interrupted_wait), pytest.raises(Interruption):
            model(torch.ones(2, WIDTH))
        with pytest.raises(RuntimeError, match=r"step\(\) was interrupted while it wrote"):
            optimizer.state_dict()
    model(torch.ones(2, WIDTH)).sum().backward()
    with pytest.raises(RuntimeError, match=r"step\(\) was interrupted while it wrote.*on rank 1 of 2"):
        optimizer.step()


def interrupt(*_: Any) -> None:
    """Raise as Ctrl-C does."""
    raise Interruption


WAIT = Gloo._wait


def interrupted_wait(*args: Any) -> None:
    """Is interrupted at its end: what it has waited for is gone."""
    WAIT(*args)
    raise Interruption


def test_an_interruption_loses_nothing_or_is_said() -> None:
    """All ranks hear of it at the next call."""
    run("gloo", 2, interrupted_in_forward)


def read_early(_: int, __: int) -> None:
    """Job: a parameter that was kept is used before it has arrived."""
    with native_collectives(late=True):
        model, free = Layers([0, 1]), nn.Parameter(torch.ones(3))
        optimizer = ShardedASGD([{"params": model.parameters()}, {"params": [free]}], **OPTIONS)
        optimizer.overlap_forward(model)
        kept = model.layers[0].weight
        free.grad = torch.ones(3)
        train(model, optimizer)
        assert in_flight(optimizer) == 2
        assert not free.isnan().any(), "step() waits for what no module has"
        assert kept.isnan().any()
        # The gradient of the input is computed with the weight as it is in backward.
        loss = nn.functional.linear(torch.ones(2, WIDTH, requires_grad=True), kept).sum()
        model(torch.ones(2, WIDTH))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        train(model, optimizer)
        optimizer.wait_for_parameters()
        nn.functional.linear(torch.ones(2, WIDTH, requires_grad=True), kept).sum().backward()


def test_autograd_notices_what_was_read_too_early() -> None:
    """As of every other write."""
    run("gloo", 2, read_early)


def calls_wrongly(rank: int, _: int, what: str) -> None:
    """Job: calls that are refused."""
    model = Layers([0, 1])
    optimizer = ShardedASGD(model.parameters(), **OPTIONS)
    if what == "one rank":
        (optimizer.overlap_forward if rank else optimizer.wait_for_parameters)(*[model][:rank])
        train(model, optimizer)
    else:
        optimizer.overlap_forward({"foreign": nn.Linear(2, 2), "function": model.forward}[what])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("what", "type_name", "text"),
    [
        ("foreign", "ValueError", "has none of this optimizer's parameters"),
        ("function", "TypeError", "got a method"),
        ("one rank", "CallsDiffer", r"overlap_forward\(\)"),
    ],
)
def test_refusals(what: str, type_name: str, text: str) -> None:
    """On all ranks."""
    for error in run_errors("gloo", 2, calls_wrongly, what):
        assert error.type_name == type_name
        assert text.replace("\\", "") in error.message


def captures(_: int, __: int) -> None:
    """Job: a model is called while a CUDA graph is captured, as far as that can be pretended without a device."""
    model = Layers([0, 1])
    optimizer = ShardedASGD(model.parameters(), **OPTIONS)
    optimizer.overlap_forward(model)
    train(model, optimizer)
    for hook in optimizer._forward._hooks.values():
        hook.on_cuda = True
    with (
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
        pytest.raises(RuntimeError, match="a CUDA graph captures a call of Linear"),
    ):
        model(torch.ones(2, WIDTH))


def test_a_captured_forward_is_refused() -> None:
    """Its replays would not wait."""
    run("gloo", 2, captures)


class PretendedStream:
    """Knows which streams it has waited for."""

    def __init__(self) -> None:
        self.followed: list[PretendedStream] = []

    def wait_stream(self, other: "PretendedStream") -> None:
        """Wait for all that the other one has been given."""
        self.followed.append(other)


def test_other_streams_follow_that_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective stops the stream of the step in each wait, and every stream that reads waits for that."""
    of_step, second, third = (PretendedStream() for _ in range(3))
    current = [of_step]

    @contextlib.contextmanager
    def entered(stream: PretendedStream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", entered)
    stopped: list[PretendedStream] = []
    arrivals = Arrivals()
    for key in (1, 2):
        arrivals.add(key, lambda: stopped.append(current[-1]))
    arrivals.defer({1: [torch.ones(1)], 2: [torch.ones(1)]}, [torch.device("cuda", 0)])
    with entered(second):
        arrivals.wait_for({1})
    assert (stopped, second.followed) == ([of_step], [of_step])
    # Another stream, for a module whose bucket has arrived for the first one.
    with entered(third):
        arrivals.wait_for({1})
    assert (len(stopped), third.followed) == (1, [of_step])
    arrivals.wait()
    assert stopped == [of_step] * 2
    assert of_step.followed == []


# --- deletion ------------------------------------------------------------------------------------------------


def deleted(rank: int, _: int, what: str) -> list[Tensor]:
    """Job: rank 0 deletes the optimizer with gathers in flight, and perhaps the model; rank 1 is late for the step."""
    model = Layers([0, 1, 2, 3])
    optimizer = ShardedASGD(model.parameters(), **OPTIONS)
    optimizer.overlap_forward(model)
    train(model, optimizer)
    model(torch.ones(2, WIDTH)).square().sum().backward()
    launch = Gatherer.launch

    def late(self: Gatherer, buffer: StateBuffer) -> None:
        if rank == 1:
            time.sleep(0.1)
        launch(self, buffer)

    with mock.patch.object(Gatherer, "launch", late):
        optimizer.step()
    assert in_flight(optimizer) == 4
    gone = weakref.ref(optimizer)
    gc.disable()
    del optimizer
    assert gone() is None
    gc.enable()
    if what == "both" and rank == 0:
        del model
        gc.collect()
        return []
    model.zero_grad()
    # The call waits although the optimizer is gone, and nothing of it is left then but hooks that do nothing.
    out = model(torch.ones(2, WIDTH))
    assert all(type(module._parameters) is dict for module in model.modules())
    return [out.detach(), *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("what", ["optimizer", "both"])
def test_deletion_with_gathers_in_flight(what: str) -> None:
    """Other ranks get what was sent, and the forward waits for what has not arrived."""
    model = Layers([0, 1, 2, 3])
    optimizer = ShardedASGD(model.parameters(), lr=0.1, t0=1, shared_memory=False)
    train(model, optimizer)
    train(model, optimizer)
    wanted = [model(torch.ones(2, WIDTH)), *model.parameters()]
    for found in run("gloo", 2, deleted, what)[what == "both" :]:
        for got, want in zip(found, wanted, strict=True):
            assert_same_bits(got, want, "after deletion")


def test_garbage_collection_waits_for_no_rank() -> None:
    """Gathers of an optimizer in a reference cycle end in a thread of their own: not in the code that collects it."""
    waited_in: list[threading.Thread] = []
    has_waited = threading.Event()

    def wait() -> None:
        waited_in.append(threading.current_thread())
        has_waited.set()

    arrivals = Arrivals()
    arrivals.add(0, wait)
    arrivals.on_failure = arrivals.wait
    del arrivals
    gc.collect()
    assert has_waited.wait(60)
    assert waited_in[0] is not threading.current_thread()


def leaves_modules(_: int, __: int) -> None:
    """Job: a deleted optimizer takes its hooks with it."""
    model = Layers([0, 1])
    optimizer = ShardedASGD(model.parameters(), **OPTIONS)
    optimizer.overlap_forward(model)
    model(torch.ones(2, WIDTH)).square().sum().backward()
    assert all(layer._forward_pre_hooks for layer in model.layers)
    for _ in range(3):
        # Nobody reads from the modules in between.
        optimizer.step()
    assert [type(layer._parameters) for layer in model.layers] == [ParametersInFlight] * 2
    assert [type(layer._parameters.own) for layer in model.layers] == [dict] * 2
    optimizer.wait_for_parameters()
    del optimizer
    assert not any(layer._forward_pre_hooks for layer in model.layers)
    model(torch.ones(2, WIDTH))


def test_a_deleted_optimizer_leaves_no_hooks() -> None:
    """By reference counting."""
    run("gloo", 2, leaves_modules)


SCRIPT = """
import sys, time, torch, torch.distributed as dist
from dist_asgd import ShardedASGD
from dist_asgd.gather import Gatherer

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Linear(300, 300) for _ in range(4)])
optimizer = ShardedASGD(model.parameters(), lr=0.1, bucket_cap_mb=0.2, shared_memory=False)
optimizer.overlap_forward(model)
launch = Gatherer.launch

def late(self, buffer):
    time.sleep(0.4 * rank)
    launch(self, buffer)

Gatherer.launch = late
model(torch.ones(2, 300)).square().sum().backward()
optimizer.step()
dist.destroy_process_group()
if rank:
    print("arrived", model(torch.ones(1, 300)).isfinite().all().item())
"""


def test_a_process_that_ends_early(tmp_path: Path) -> None:
    """It ends after what it has sent has arrived, as one whose step has waited."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert outputs == ["", "arrived True\n"]


# --- other company -------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A layer, with the buffers that DDP broadcasts before each forward, and one that runs now and then."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 16)`` to ``(batch, 16)``."""
        self.calls += 1
        x = self.norm(self.first(x))
        return self.last(x) if self.calls % 3 else x


def with_ddp(rank: int, _: int, overlaps: bool) -> list[Tensor]:
    """Job: DDP, uneven inputs, a second optimizer of the same modules, and a parameter of no module."""
    model, free = Normed(), nn.Parameter(torch.ones(3))
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    weights = [model.first.weight, model.last.weight, model.norm.weight]
    rest = [p for p in model.parameters() if all(p is not w for w in weights)]
    one, two = ShardedASGD([*weights, free], **OPTIONS), ShardedASGD(rest, **OPTIONS)
    if overlaps:
        one.overlap_forward(ddp)
        two.overlap_forward(ddp)
    for step in range(4):
        inputs = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))
        ddp(inputs).square().sum().backward()
        free.grad = torch.ones(3)
        one.step()
        two.step()
        assert bool(in_flight(one)) is bool(in_flight(two)) is overlaps
        assert free.grad is not None
        one.zero_grad()
        two.zero_grad()
        assert_same_bits(free, free.clone(), "free")
    with Join([ddp, one]):
        for step in range(2 + rank):
            inputs = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))
            ddp(inputs).square().sum().backward()
            one.step()
            one.zero_grad()
    return [p.detach().clone() for p in (*model.parameters(), free, *model.buffers())]


def test_ddp_join_and_two_optimizers() -> None:
    """The bits of the run without it, and what no module has is there when the step returns."""
    plain, overlapped = (run("gloo", 2, with_ddp, overlaps) for overlaps in (False, True))
    for one, other in zip(plain, overlapped, strict=True):
        for a, b in zip(one, other, strict=True):
            assert_same_bits(a, b, "with DDP")
