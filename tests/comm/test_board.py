"""Control words of ranks on one host, which they read in each other's memory: the results of messages, and failures."""

from __future__ import annotations

import os
import random
import time
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dist_asgd.comm import Communicators, PeerError
from dist_asgd.comm.board import MAX_WORDS, Board
from dist_asgd.comm.gloo import Gloo
from dist_asgd.comm.pages import Signals
from dist_asgd.comm.shared_pages import ENVIRONMENT
from tests.harness.ranks import run


def host_of(group: dist.ProcessGroup | None, *, shares: bool) -> Gloo:
    """The communicator of control words, with a board or without."""
    communicators = Communicators(group, shares_memory=shares)
    with mock.patch.dict(os.environ, {ENVIRONMENT: "1"}):
        communicators.share_control()
    host = communicators.host
    assert isinstance(host, Gloo)
    return host


def history(host: Gloo, rank: int, seed: int) -> list[Any]:
    """The results of random exchanges, the same for every ``host``."""
    draw, own = random.Random(seed), random.Random(100 * seed + rank)
    found: list[Any] = []
    for _ in range(60):
        kind = draw.choice(["words", "rows", "sum", "max"])
        numel = draw.choice([1, 3, 40, MAX_WORDS, MAX_WORDS + 1])
        if kind == "words":
            words = [own.choice([0, -1, 1 << 62, -(1 << 63), own.getrandbits(63)]) for _ in range(numel)]
            found.append(host.summarise(words, draw.randint(0, numel))())
        elif kind == "rows":
            found.append(host.exchange(torch.tensor([own.getrandbits(60) for _ in range(numel)])).tolist())
        else:
            dtype = draw.choice([torch.float32, torch.float64])
            values = torch.tensor([own.gauss(0, 1) for _ in range(numel)], dtype=dtype)
            op: Any = kind
            found.append(host.reduce_scalars(values, op).tolist())
    return found


def exchanges(rank: int, _world_size: int, seed: int) -> int:
    """Job: a history on the board and in messages. Returns how many exchanges went over the board."""
    board, messages = host_of(None, shares=True), host_of(None, shares=False)
    own = random.Random(rank)
    wait_for_all = Board._wait_for_all
    count = 0

    def late(self: Board, number: int) -> None:
        nonlocal count
        count += 1
        wait_for_all(self, number)
        # Others go on while this rank still has to read the rows.
        time.sleep(own.random() * 0.002)

    with mock.patch.object(Board, "_wait_for_all", late):
        assert history(board, rank, seed) == history(messages, rank, seed)
    return count


@pytest.mark.parametrize(("world_size", "seed"), [(2, 0), (3, 1), (5, 2)])
def test_exchanges_have_the_results_of_messages(world_size: int, seed: int) -> None:
    """Whoever is late, in writing or in reading; long ones go through messages."""
    assert all(count > 20 for count in run("gloo", world_size, exchanges, seed))


def comes_late(rank: int, _world_size: int) -> list[str]:
    """Job: rank 2 comes to an exchange of three ranks when the others have given up. Returns the error's text."""
    host = host_of(dist.new_group([0, 1, 2], timeout=timedelta(seconds=2)), shares=True)
    if rank == 2:
        dist.barrier()
    pending = host.summarise([rank], 1)
    with pytest.raises(PeerError) as first:
        pending()
    if rank != 2:
        assert pending.missing() == [2]
        dist.barrier()
    started = time.monotonic()
    with pytest.raises(PeerError) as second:
        host.summarise([rank], 1)()
    assert time.monotonic() - started < 10
    return [str(first.value), str(second.value)]


def test_a_rank_that_comes_too_late_fails_too() -> None:
    """It finds the words of the others, who wait for it no more."""
    *early, late = run("gloo", 3, comes_late)
    for found in early:
        assert "timed out after 2 s of waiting for rank 2" in found[0]
    assert "rank 0 has failed in an exchange before" in late[0]


def interrupted(rank: int, _world_size: int) -> list[list[int]]:
    """Job: Ctrl-C in the wait of one rank, which then goes on."""
    host = host_of(None, shares=True)
    wait_for = Signals.wait_for
    found = []
    for number in range(3):
        pending = host.summarise([10 * number + rank], 1)
        if rank == 0 and number == 1:
            with (
                mock.patch.object(Signals, "wait_for", side_effect=KeyboardInterrupt),
                pytest.raises(KeyboardInterrupt),
            ):
                pending()
            assert Signals.wait_for is wait_for
        else:
            found.append(pending())
    return found


def test_an_interrupted_wait_leaves_the_next_exchange_as_it_should_be() -> None:
    """The words of the interrupted rank were there for the others before."""
    first, second = run("gloo", 2, interrupted)
    assert first == [[1], [21]]
    assert second == [[1], [11], [21]]
