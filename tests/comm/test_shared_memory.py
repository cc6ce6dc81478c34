"""Ranks of one host through memory that they share: the bits of Gloo's messages, and what happens without it."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_asgd import ShardedASGD
from dist_asgd.comm import Communicators, PeerError, pages, shared_pages
from dist_asgd.comm.base import ShardCollectives
from dist_asgd.comm.gloo import Gloo
from dist_asgd.comm.outboxes import PIECE_BYTES
from dist_asgd.comm.ring import Ring, file_bytes
from dist_asgd.comm.shared_memory import SharedMemory
from dist_asgd.comm.shared_pages import ENVIRONMENT
from dist_asgd.gradients import sending
from dist_asgd.storage.buffers import Bucket
from tests.harness.bits import assert_same_bits
from tests.harness.meshes import hybrid_mesh
from tests.harness.models import mlp, mlp_loss
from tests.harness.ranks import outcomes, run, run_errors

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@contextlib.contextmanager
def environment(value: str) -> Iterator[None]:
    """Inside, the variable that turns shared memory off has this value."""
    with mock.patch.dict(os.environ, {ENVIRONMENT: value}):
        yield


def both_ways() -> tuple[SharedMemory, Gloo]:
    """The collectives of all ranks, through shared memory and through messages."""
    with environment("1"):
        shared = Communicators(None).on(CPU)
    messages = Communicators(None, shares_memory=False).on(CPU)
    assert isinstance(shared, SharedMemory)
    assert isinstance(messages, Gloo)
    return shared, messages


class History:
    """Random collectives, the same on all ranks, each both ways; waits come late, and ranks pause at random."""

    def __init__(
        self, rank: int, world_size: int, seed: int, both: tuple[ShardCollectives, ShardCollectives] | None = None
    ) -> None:
        """``both`` are the collectives of all ranks, those under test and messages between all of them."""
        self.rank, self.world_size = rank, world_size
        self.shared, self.messages = both or both_ways()
        self.draw = random.Random(seed)
        self.own = random.Random(100 * seed + rank)
        self.values = torch.Generator().manual_seed(1000 * seed + rank)
        self.in_flight: deque[Callable[[], None]] = deque()
        self.num_reductions = 0

    def run(self, num: int) -> None:
        """Run ``num`` collectives of random kinds."""
        for _ in range(num):
            if self.own.random() < 0.2:
                time.sleep(self.own.random() * 0.01)
            kind = self.draw.choice([self.reduce_scatter, self.all_gather, self.uneven, self.all_reduce, self.gather])
            # As in the reducer: two are in flight at most.
            while len(self.in_flight) > 1 or (self.in_flight and self.draw.random() < 0.3):
                self.in_flight.popleft()()
            kind(self.draw.choice(DTYPES))
        while self.in_flight:
            self.in_flight.popleft()()

    def random(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Values of this rank."""
        return torch.randn(numel, generator=self.values).to(dtype)

    def numel(self) -> int:
        """Often small, sometimes some pieces long."""
        return self.draw.choice([1, 17, 1000, PIECE_BYTES // 4, 3 * PIECE_BYTES // 4 + 5])

    def reduce_scatter(self, dtype: torch.dtype) -> None:
        """Into a shard of the same or of a wider dtype, or added to it."""
        numel, accumulate = self.draw.choice([16, 1000, 40_000]), self.draw.random() < 0.5
        kept = torch.float32 if dtype.itemsize == 2 and self.draw.random() < 0.5 else dtype
        sent = self.random(self.world_size * numel, dtype).view(self.world_size, numel)
        ours, theirs = (torch.full((numel,), 3.0, dtype=kept) for _ in range(2))
        self.shared.prepare(sent.nbytes)
        buffer = self.shared.send_buffer(sent.numel() - numel, dtype)
        assert buffer is not None
        others = [row for rank, row in enumerate(sent) if rank != self.rank]
        rows = list(buffer.view(-1, numel).unbind())
        torch._foreach_copy_(rows, others)
        # Its own values a rank may have in several tensors, cut as no other rank does.
        cut = self.own.randrange(1, numel)
        own = [(0, sent[self.rank, :cut]), (cut, sent[self.rank, cut:])]
        sends = [own if rank == self.rank else [(0, rows.pop(0))] for rank in range(self.world_size)]
        self.num_reductions += 1  # messages of two in flight have different tags
        mean = self.shared.reduce_scatter(sends, ours, accumulate, self.num_reductions)
        reference = self.messages.reduce_scatter([[(0, row)] for row in sent], theirs, accumulate, self.num_reductions)
        self.later(lambda: (mean.wait(), reference.wait(), assert_same_bits(ours, theirs, "mean")))

    def later(self, end: Callable[[], Any]) -> None:
        """Wait for it after some other collective."""
        self.in_flight.append(lambda: end() and None)

    def all_gather(self, dtype: torch.dtype) -> None:
        """Of one flat buffer."""
        numel = self.numel()
        ours = self.random(self.world_size * numel, dtype)
        theirs = ours.clone()
        waits = [self.shared.all_gather(ours), self.messages.all_gather(theirs)]
        self.later(lambda: (waits[0](), waits[1](), assert_same_bits(ours, theirs, "gathered")))

    def uneven(self, dtype: torch.dtype) -> None:
        """Of lists of tensors, of which some are empty."""
        numels = [[self.draw.choice([0, 3, self.numel()]) for _ in range(3)] for _ in range(self.world_size)]
        ours = [[self.random(numel, dtype) for numel in of_rank] for of_rank in numels]
        theirs = [[one.clone() for one in of_rank] for of_rank in ours]
        waits = [self.shared.all_gather_uneven(ours), self.messages.all_gather_uneven(theirs)]

        def end() -> None:
            for wait in waits:
                wait()
            for mine, other in zip(ours, theirs, strict=True):
                for a, b in zip(mine, other, strict=True):
                    assert_same_bits(a, b, "gathered unevenly")

        self.later(end)

    def all_reduce(self, dtype: torch.dtype) -> None:
        """In place."""
        ours = self.random(self.numel(), dtype)
        theirs = ours.clone()
        self.num_reductions += 1
        waits = [both.all_reduce(x, self.num_reductions) for both, x in ((self.shared, ours), (self.messages, theirs))]
        self.later(lambda: (waits[0](), waits[1](), assert_same_bits(ours, theirs, "mean of all")))

    def gather(self, dtype: torch.dtype) -> None:
        """To one rank or to all."""
        to = self.draw.choice([None, *range(self.world_size)])
        numels = [self.draw.choice([0, 5, self.numel()]) for _ in range(self.world_size)]
        fragment = self.random(numels[self.rank], dtype)
        found = []
        for collectives in (self.shared, self.messages):
            places = [fragment.new_zeros(numel) for numel in numels] if to in (None, self.rank) else None
            collectives.gather(fragment, places, numels, to)
            found.append(places or [])
        for a, b in zip(*found, strict=True):
            assert_same_bits(a, b, "gathered to one")


def compares(rank: int, world_size: int, seed: int) -> None:
    """Job: a random history, both ways."""
    History(rank, world_size, seed).run(40)


@pytest.mark.parametrize(("world_size", "seed"), [(2, 0), (2, 1), (3, 2), (4, 3), (5, 4)])
def test_collectives_have_the_bits_of_messages(world_size: int, seed: int) -> None:
    """Whatever is in flight beside them, and whoever is late."""
    run("gloo", world_size, compares, seed)


def trains(rank: int, _world_size: int, mode: dict[str, Any], shared: str) -> list[Tensor]:
    """Job: some steps with two backwards, clipping and averages; ranks pause at random. Returns parameters and ax."""
    own = random.Random(rank)
    options = {key: hybrid_mesh(value) if key == "mesh" else value for key, value in mode.items()}
    model = mlp(width=96)
    # Its own gradients a rank reads as they lie, if they are large enough.
    with environment(shared), mock.patch.object(sending, "DIRECT_BYTES", 96 * 4 + 4):
        optimizer = ShardedASGD(model.parameters(), lr=0.1, t0=1, bucket_cap_mb=0.01, stage=2, **options)
    for step in range(4):
        for number in range(1 + step % 2):
            handle = model[2].register_full_backward_hook(lambda *_: time.sleep(own.random() * 0.01))  # type: ignore[index]
            mlp_loss(model, 100 * step + 10 * number + rank).backward()
            handle.remove()
        optimizer.clip_grad_norm_(0.3)
        optimizer.step()
        optimizer.zero_grad()
    with optimizer.averaged_parameters():
        averages = [p.detach().clone() for p in model.parameters()]
    return [*(p.detach().clone() for p in model.parameters()), *averages]


@pytest.mark.parametrize("mode", [{}, {"mesh": (2, 2)}, {"reduce_dtype": torch.bfloat16}, {"mesh": (4, 1)}], ids=str)
def test_training_has_the_bits_of_messages(mode: dict[str, Any]) -> None:
    """On all ranks, in hybrid sharding too, where sums across replicas are in flight beside those inside."""
    ours, theirs = (run("gloo", 4, trains, mode, shared) for shared in "10")
    for mine, others in zip(ours, theirs, strict=True):
        for a, b in zip(mine, others, strict=True):
            assert_same_bits(a, b, "parameter or average")


# --- ranks that end, stop or cannot -------------------------------------------------------------------------


def dies_in_backward(rank: int, world_size: int) -> None:
    """Job: the last rank is killed in the middle of its second backward."""
    model = mlp(width=96)
    with environment("1"):
        optimizer = ShardedASGD(model.parameters(), lr=0.1, stage=2, bucket_cap_mb=0.01)
    mlp_loss(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == world_size - 1:
        model[0].register_full_backward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[index]
    mlp_loss(model, 1).backward()
    optimizer.step()


def test_a_killed_rank_is_an_error_on_all_others_in_seconds() -> None:
    """They wait for its gradients, and its process has ended."""
    for found in outcomes("gloo", 3, dies_in_backward)[:2]:
        assert found.error is not None
        assert found.error.type_name == "PeerError"
        assert found.seconds < 10


def is_interrupted(rank: int, _world_size: int) -> None:
    """Job: rank 1 is interrupted while it packs a bucket, and goes on."""
    model = mlp(width=96)
    with environment("1"):
        optimizer = ShardedASGD(model.parameters(), lr=0.1, stage=2, bucket_cap_mb=0.01)
    mlp_loss(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    interrupted = mock.patch.object(Bucket, "pack", side_effect=KeyboardInterrupt) if rank == 1 else None
    with interrupted or contextlib.nullcontext(), contextlib.suppress(KeyboardInterrupt, PeerError):
        mlp_loss(model, 1).backward()
    optimizer.step()


def test_an_interrupted_rank_is_an_error_on_all_in_seconds() -> None:
    """They wait for gradients that it will never send, and hear so."""
    for error in run_errors("gloo", 2, is_interrupted):
        assert error.type_name in ("PeerError", "RuntimeError")
        assert "interrupted" in error.message


def stops(rank: int, _world_size: int) -> None:
    """Job: a rank never comes to a collective of a group of two with a timeout of 2 seconds."""
    group = dist.new_group([1, 2], timeout=timedelta(seconds=2))
    if rank == 0:
        return
    with environment("1"):
        shared = Communicators(group).on(CPU)
    assert isinstance(shared, SharedMemory)
    if rank == 2:
        time.sleep(4)
        return
    started = time.monotonic()
    with pytest.raises(PeerError, match="timed out after 2 s of waiting for rank 2"):
        shared.all_gather(torch.zeros(10))()
    assert 2 <= time.monotonic() - started < 4


def test_a_late_rank_is_an_error_after_the_timeout() -> None:
    """That of the process group; it is named by its number in the job."""
    run("gloo", 3, stops)


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """Inside, what is logged is appended to this list, also what the process has logged once before."""
    shared_pages._log_once.cache_clear()
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dist_asgd").addHandler(handler)
    try:
        yield found
    finally:
        logging.getLogger("dist_asgd").removeHandler(handler)


def falls_back(rank: int, _world_size: int, why: str) -> tuple[bool, list[str]]:
    """Job: one rank cannot share memory. Returns whether messages are used, and what the log says."""
    failing = contextlib.ExitStack()
    with logged() as found, environment("0" if why == "switched off" and rank == 1 else "1"), failing:
        if why == "no file" and rank == 0:
            failing.enter_context(mock.patch.object(pages, "memory_file", side_effect=OSError(1, "not permitted")))
        if why == "not opened" and rank == 1:
            failing.enter_context(mock.patch.object(pages.Pages, "of", side_effect=OSError(13, "denied")))
        if why == "not compiled" and rank == 1:
            failing.enter_context(mock.patch.object(shared_pages, "library", return_value="was not compiled"))
        if why == "another host":
            name = f"host of rank {rank}"
            failing.enter_context(mock.patch.object(shared_pages, "host_of_this_process", return_value=name))
        on: ShardCollectives = Communicators(None).on(CPU)
        again: ShardCollectives = Communicators(None).on(CPU)
    flat = torch.tensor([float(rank)]).repeat(2)
    on.all_gather(flat)()
    assert flat.tolist() == [0.0, 1.0]
    return isinstance(on, Gloo) and isinstance(again, Gloo), found


@pytest.mark.parametrize(
    ("why", "says"),
    [
        ("no file", ["not permitted", None]),
        ("not opened", [None, "denied"]),
        ("not compiled", [None, "was not compiled"]),
        ("another host", [None, None]),
        ("switched off", [None, None]),
    ],
)
def test_messages_are_used_where_memory_cannot_be_shared(why: str, says: list[str | None]) -> None:
    """By all ranks, and the log of the rank that knows why says so once."""
    for (uses_messages, log), expected in zip(run("gloo", 2, falls_back, why), says, strict=True):
        assert uses_messages
        assert len(log) == (expected is not None)
        if expected is not None:
            assert expected in log[0]
            assert f"{ENVIRONMENT}=0" in log[0]


def mappings() -> int:
    """How many files of shared memory this process has mapped or open."""
    mapped = Path("/proc/self/maps").read_text().count("memfd:dist_asgd")
    links = (os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_open(name))
    return mapped + sum("memfd:dist_asgd" in link for link in links)


def _is_open(name: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{name}")


def leaves_nothing(_rank: int, _world_size: int) -> None:
    """Job: an optimizer that is deleted."""
    gc.collect()
    before = mappings()
    with environment("1"):
        model = mlp()
        optimizer = ShardedASGD(model.parameters(), lr=0.1, stage=2)
    mlp_loss(model, 0).backward()
    optimizer.step()
    assert mappings() > before
    del optimizer
    assert mappings() == before


def test_a_deleted_optimizer_leaves_no_memory() -> None:
    """The kernel frees the pages with the last mapping, so that nothing has a name that could be left behind."""
    run("gloo", 2, leaves_nothing)


def test_the_options_must_be_equal() -> None:
    """The constructor compares them."""
    for error in run_errors("gloo", 2, differ):
        assert "shared_memory" in error.message


def differ(rank: int, _world_size: int) -> None:
    """Job: one rank wants messages."""
    ShardedASGD(mlp().parameters(), shared_memory=rank == 0)


# --- the ring --------------------------------------------------------------------------------------------------


def ring_of(outbox_bytes: int) -> Ring:
    """One rank's ring, of three."""
    made, _ = pages.Pages.new(file_bytes(3, outbox_bytes))
    made.close()
    return Ring(made, 0, pages.Processes([os.getpid()] * 3, range(3)), 3, outbox_bytes, 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_a_message_waits_for_all_that_lie_where_it_will(seed: int) -> None:
    """Its ``after`` is the last of them, so no unread byte is overwritten; and two send buffers never wait for one."""
    draw = random.Random(seed)
    size = 64 * draw.randint(3, 60)
    ring = ring_of(size)
    made: list[Any] = []
    for _ in range(200):
        message = ring.message(draw.randint(1, size if draw.random() < 0.1 else size // 3 // 64 * 64))
        assert 0 <= message.start < message.stop <= size
        overlapping = [m.number for m in made if m.start < message.stop and message.start < m.stop]
        assert all(number <= message.after for number in overlapping)
        assert message.after in (max(overlapping, default=0), made[-1].after if made else 0)
        made.append(message)
    small = ring_of(size)
    for number in range(1, 100):
        assert small.message(draw.randint(1, size // 3 // 64 * 64)).after < max(1, number - 1)


def trains_in_a_child(rank: int, _world_size: int, in_backward: bool) -> None:
    """Job: forked processes of all ranks run a step, while the ranks wait; then the ranks go on."""
    models = [mlp(), mlp()]
    optimizers = [
        ShardedASGD(m.parameters(), lr=0.1, stage=2, bucket_cap_mb=0.001, step_in_backward=in_backward) for m in models
    ]

    def step(which: int, seed: int) -> None:
        optimizers[which].zero_grad()
        mlp_loss(models[which], seed).backward()
        optimizers[which].step()

    for which in (0, 1):
        step(which, rank)
    child = os.fork()
    if not child:
        try:
            step(0, 100 + rank)
        except RuntimeError as error:
            os._exit(0 if "which was forked from process" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    # What a child had written would be there for the ranks that come first.
    time.sleep(0.3 * rank)
    for seed in (10, 20):
        for which in (0, 1):
            step(which, seed + rank)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_same_bits(p, q, "after the child")


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_forked_process_takes_part_in_nothing(in_backward: bool) -> None:
    """It would write into the memory of the ranks, in the name of the one that it was forked from."""
    run("gloo", 2, trains_in_a_child, in_backward)


def fails_twice(rank: int, _world_size: int) -> float:
    """Job: a rank does not come to two gathers; returns how long the other one has waited for both, in seconds."""
    group = dist.new_group(timeout=timedelta(seconds=1.5))
    collectives = Communicators(group).on(CPU)
    assert isinstance(collectives, SharedMemory)
    started = time.monotonic()
    if rank == 0:
        waits = [collectives.all_gather(torch.zeros(8)) for _ in range(2)]
        for wait in waits:
            with pytest.raises(PeerError, match="timed out after 2 s of waiting for rank 1"):
                wait()
    waited = time.monotonic() - started
    dist.barrier()
    return waited


def test_what_lies_behind_a_failed_wait_fails_at_once() -> None:
    """Else a rank would wait once more when its process ends, for gathers that are in flight."""
    assert run("gloo", 2, fails_twice)[0] < 2.5
