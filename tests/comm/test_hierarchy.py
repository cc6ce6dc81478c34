"""Ranks on several hosts: memory inside of each, messages between them, and the bits of messages between all ranks."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_asgd import ShardedASGD
from dist_asgd.comm import Communicators, PeerError, chain, shared_pages
from dist_asgd.comm.base import Reduction, ShardCollectives
from dist_asgd.comm.gloo import Gloo
from dist_asgd.comm.hierarchy import Hierarchy
from dist_asgd.comm.progress import Messages, ProgressThread, Task
from dist_asgd.comm.shared_pages import ENVIRONMENT
from dist_asgd.storage.buffers import Bucket
from tests.comm.test_shared_memory import CPU, History, logged, mappings, trains
from tests.harness.bits import assert_same_bits
from tests.harness.models import mlp, mlp_loss
from tests.harness.ranks import outcomes, run, run_errors


@contextlib.contextmanager
def on_hosts(rank: int, ranks_per_host: int) -> Iterator[None]:
    """Inside, ranks are named to lie on hosts of so many ranks each."""
    with mock.patch.dict(os.environ, {ENVIRONMENT: f"host{rank // ranks_per_host}"}):
        yield


def hierarchy(rank: int, ranks_per_host: int, group: dist.ProcessGroup | None = None) -> Hierarchy:
    """The collectives of all ranks of the group."""
    with on_hosts(rank, ranks_per_host):
        made = Communicators(group).on(CPU)
    assert isinstance(made, Hierarchy)
    return made


def compares(rank: int, world_size: int, ranks_per_host: int, seed: int, segment_bytes: int) -> None:
    """Job: random collectives, through the hierarchy and as messages between all ranks."""
    with mock.patch.object(chain, "SEGMENT_BYTES", segment_bytes):
        both = (hierarchy(rank, ranks_per_host), Communicators(None, shares_memory=False).on(CPU))
        History(rank, world_size, seed, both).run(40)


@pytest.mark.parametrize(
    ("world_size", "ranks_per_host", "seed", "segment_bytes"),
    [(4, 2, 0, 1 << 16), (4, 2, 1, 1), (6, 2, 2, 1 << 18), (6, 3, 3, 1 << 16)],
)
def test_collectives_have_the_bits_of_messages(
    world_size: int, ranks_per_host: int, seed: int, segment_bytes: int
) -> None:
    """Whatever is in flight beside them, and whoever is late."""
    run("gloo", world_size, compares, ranks_per_host, seed, segment_bytes)


def trains_on_hosts(rank: int, world_size: int, mode: dict[str, Any], ranks_per_host: int) -> list[Tensor]:
    """Job: some steps in stage 2, as in the test of shared memory."""
    return trains(rank, world_size, mode, f"host{rank // ranks_per_host}" if ranks_per_host else "0")


@pytest.mark.parametrize("mode", [{}, {"reduce_dtype": torch.bfloat16}, {"mesh": (1, 4)}], ids=str)
def test_training_has_the_bits_of_messages(mode: dict[str, Any]) -> None:
    """On all ranks, also with a mesh whose replicas lie on several hosts."""
    ours, theirs = (run("gloo", 4, trains_on_hosts, mode, ranks_per_host) for ranks_per_host in (2, 0))
    for mine, others in zip(ours, theirs, strict=True):
        for a, b in zip(mine, others, strict=True):
            assert_same_bits(a, b, "parameter or average")


def launch(collectives: ShardCollectives, world_size: int, shard: Tensor, unit: float = 1.0) -> Reduction:
    """Start to take the mean of the ranks' numbers, times ``unit``, in each element of ``shard``."""
    rank, numel = collectives.rank, shard.numel()
    collectives.prepare(4 * numel * world_size)
    packed = collectives.send_buffer((world_size - 1) * numel, torch.float32)
    rows = list((torch.zeros((world_size - 1) * numel) if packed is None else packed).view(-1, numel).unbind())
    for row in rows:
        row.fill_(rank * unit)
    own = torch.full((numel,), rank * unit)
    return collectives.reduce_scatter(
        [[(0, own if to == rank else rows.pop(0))] for to in range(world_size)], shard, False, 0
    )


def looks_for_arrivals(rank: int, world_size: int, how: str) -> None:
    """Job: the last rank launches a reduction late; the others look for its end and never wait."""
    with mock.patch.dict(os.environ, {ENVIRONMENT: f"host{rank // 2}" if how == "hosts" else how}):
        collectives = Communicators(None).on(CPU)
    dist.barrier()
    if rank == world_size - 1:
        time.sleep(0.3)
    shard = torch.zeros(5)
    reduction = launch(collectives, world_size, shard)
    if rank != world_size - 1:
        assert not reduction.is_done()
    deadline = time.monotonic() + 10
    while not reduction.is_done():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    reduction.wait()
    assert shard.eq(sum(range(world_size)) / world_size).all()


@pytest.mark.parametrize("how", ["0", "1", "hosts"])
def test_a_rank_learns_what_has_arrived_before_it_waits(how: str) -> None:
    """The next stripe of a large gradient starts then, while backward goes on."""
    run("gloo", 4, looks_for_arrivals, how)


def flushes(rank: int, world_size: int) -> list[float]:
    """Job: means of numbers that some processors take for 0, before and after torch is told to do so."""
    collectives = hierarchy(rank, 2)
    found = []
    for flush in (False, True, False):
        torch.set_flush_denormal(flush)
        shard = torch.zeros(3)
        reduction = launch(collectives, world_size, shard, 1e-40)
        torch.set_flush_denormal(False)
        reduction.wait()
        found.append(shard[0].item())
    return found


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot flush")
def test_sums_are_taken_as_in_the_training_loop() -> None:
    """``torch.set_flush_denormal`` concerns the thread that calls it, and sums are taken in another one."""
    for first, flushed, last in run("gloo", 4, flushes):
        assert first == last > 0
        assert flushed == 0


class _Fails(Task):
    """A task that fails, and whose end does, too."""

    def run(self) -> None:
        raise MemoryError("no memory")

    def cancel(self) -> None:
        raise MemoryError("no memory for words either")


def test_whatever_fails_in_the_thread_is_an_error_in_the_loop() -> None:
    """Of that task and of all later ones; nobody waits for a thread that has ended."""
    thread = ProgressThread()
    tasks = [_Fails(), Messages([])]
    for task in tasks:
        thread.submit(task)
    deadline = time.monotonic() + 10
    for task in tasks:
        while not task.has_ended:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match="no memory"):
            task.wait()


def counts_messages(rank: int, world_size: int, numel: int) -> dict[int, int]:
    """Job: a reduce-scatter and a gather of ``numel`` elements a rank; returns the bytes sent to each rank."""
    collectives = hierarchy(rank, 3)
    sent: Counter[int] = Counter()
    post = Gloo.post

    def counting(self: Gloo, action: Any, tag: int, receives: Any, sends: Any) -> Any:
        sent.update({peer: tensor.nbytes for peer, tensor in sends})
        return post(self, action, tag, receives, sends)

    with mock.patch.object(Gloo, "post", counting):
        shard = torch.zeros(numel)
        launch(collectives, world_size, shard).wait()
        assert shard.eq(sum(range(world_size)) / world_size).all()
        flat = torch.full((world_size * numel,), float(rank))
        collectives.all_gather(flat)()
        assert flat.view(world_size, numel)[:, 0].tolist() == list(range(world_size))
    dist.barrier()
    return dict(sent)


def test_what_a_host_sends_does_not_grow_with_its_ranks() -> None:
    """Messages go between hosts only, and they carry each byte once for a host: of sums, of means and of a gather."""
    numel = 6000
    found = run("gloo", 6, counts_messages, numel)
    for rank, sent in enumerate(found):
        host, number = divmod(rank, 3)
        assert set(sent) == {number + 3 * (1 - host)}
    hosts = [sum(sum(sent.values()) for sent in found[first : first + 3]) for first in (0, 3)]
    # The first host sends sums of all six shards, and the second one the means of three; both gather three shards.
    for nbytes, shards in zip(hosts, (6 + 3, 3 + 3), strict=True):
        assert 0 <= nbytes - shards * numel * 4 < 100


# --- ranks that end, stop or cannot -------------------------------------------------------------------------


def fails_in_backward(rank: int, _world_size: int, dies: int, kills: bool, messages: bool = False) -> None:
    """Job: one rank is killed, or interrupted, in the middle of its second backward."""
    model = mlp(width=96)
    with on_hosts(rank, 2):
        # One bucket with messages: ranks that wait for a second one's gradients do so until the timeout.
        options: dict[str, Any] = {"shared_memory": False} if messages else {"bucket_cap_mb": 0.01}
        optimizer = ShardedASGD(model.parameters(), lr=0.1, stage=2, **options)
    mlp_loss(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    interrupted: Any = contextlib.nullcontext()
    if rank == dies and kills:
        model[0].register_full_backward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[index]
    elif rank == dies:
        interrupted = mock.patch.object(Bucket, "pack", side_effect=KeyboardInterrupt)
    with interrupted, contextlib.nullcontext() if kills else contextlib.suppress(KeyboardInterrupt, PeerError):
        mlp_loss(model, 1).backward()
    optimizer.step()


@pytest.mark.parametrize("dies", [0, 3])
def test_a_killed_rank_is_an_error_on_all_others_in_seconds(dies: int) -> None:
    """On its own host, and on the other one, whose ranks wait for sums that nobody can take."""
    for rank, found in enumerate(outcomes("gloo", 4, fails_in_backward, dies, True)):
        if rank != dies:
            assert found.error is not None
            assert found.error.type_name == "PeerError"
            assert found.seconds < 10


@pytest.mark.parametrize(("dies", "messages"), [(1, False), (2, False), (0, True)])
def test_an_interrupted_rank_is_an_error_on_all_in_seconds(dies: int, messages: bool) -> None:
    """Whether they hear of it from the ranks of its host or in the exchange of the next call."""
    for error in run_errors("gloo", 4, fails_in_backward, dies, False, messages):
        assert error.type_name in ("PeerError", "RuntimeError")
        assert not messages or "torn" in error.message


def is_late(rank: int, _world_size: int) -> float:
    """Job: rank 3 comes to no gather, in a group with a timeout of 2 seconds; returns the seconds until the error."""
    collectives = hierarchy(rank, 2, dist.new_group(timeout=timedelta(seconds=2)))
    started = time.monotonic()
    if rank == 3:
        time.sleep(4)
    else:
        waits = [collectives.all_gather(torch.zeros(8)) for _ in range(2)]
        for wait in waits:
            with pytest.raises(PeerError):
                wait()
    found = time.monotonic() - started
    dist.barrier()
    return found


def test_a_late_rank_is_an_error_after_the_timeout() -> None:
    """That of the process group, also for what lies behind it."""
    assert max(run("gloo", 4, is_late)[:3]) < 4


def falls_back(rank: int, world_size: int, hosts: str, cannot: int | None) -> list[str]:
    """Job: ranks on ``hosts`` have to use messages; returns what the log says."""
    with logged() as found, contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {ENVIRONMENT: f"host{hosts[rank]}"}))
        if rank == cannot:
            stack.enter_context(mock.patch.object(shared_pages.Pages, "of", side_effect=OSError(13, "denied")))
        on: ShardCollectives = Communicators(None).on(CPU)
    assert isinstance(on, Gloo)
    flat = torch.full((world_size,), float(rank))
    on.all_gather(flat)()
    assert flat.tolist() == list(range(world_size))
    return found


@pytest.mark.parametrize(
    ("hosts", "cannot", "says"),
    [
        ("0123", None, {}),
        ("0001", None, {0: "2 hosts have 1 to 3 of the 4 ranks"}),
        ("0101", None, {0: "2 hosts have 2 of the 4 ranks"}),
        ("0011", 3, {3: "denied"}),
    ],
)
def test_messages_are_used_where_hosts_do_not_fit(hosts: str, cannot: int | None, says: dict[int, str]) -> None:
    """By all ranks, and the log says why, unless no host has two ranks."""
    for rank, log in enumerate(run("gloo", 4, falls_back, hosts, cannot)):
        assert len(log) == (rank in says)
        if rank in says:
            assert says[rank] in log[0]


def leaves_nothing(rank: int, _world_size: int) -> None:
    """Job: an optimizer that is deleted."""
    gc.collect()
    before = mappings()
    with on_hosts(rank, 2):
        model = mlp()
        optimizer = ShardedASGD(model.parameters(), lr=0.1, stage=2)
    mlp_loss(model, 0).backward()
    optimizer.step()
    assert mappings() > before
    del optimizer
    deadline = time.monotonic() + 5
    while any("progress" in thread.name for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert mappings() == before
    assert not any("progress" in thread.name for thread in threading.enumerate())


def test_a_deleted_optimizer_leaves_no_memory_and_no_thread() -> None:
    """The thread ends once it has done what it owes."""
    run("gloo", 4, leaves_nothing)


def overlaps(rank: int, _world_size: int, ranks_per_host: int, in_backward: bool) -> list[Tensor]:
    """Job: parameters travel while the forward runs, or while backward does; returns them."""
    model = mlp(width=96)
    with mock.patch.dict(os.environ, {ENVIRONMENT: f"host{rank // ranks_per_host}" if ranks_per_host else "0"}):
        optimizer = ShardedASGD(
            model.parameters(), lr=0.1, t0=1, bucket_cap_mb=0.01, stage=2, step_in_backward=in_backward
        )
    if not in_backward:
        optimizer.overlap_forward(model)
    own = random.Random(rank)
    for step in range(4):
        time.sleep(own.random() * 0.01)
        mlp_loss(model, 10 * step + rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("in_backward", [False, True])
def test_parameters_travel_beside_forward_and_backward(in_backward: bool) -> None:
    """The thread takes them to the other ranks, whatever this one does."""
    for mine, others in zip(*(run("gloo", 4, overlaps, per_host, in_backward) for per_host in (2, 0)), strict=True):
        for a, b in zip(mine, others, strict=True):
            assert_same_bits(a, b, "parameter")
