"""Exchanges in log N messages: what all ranks know after one, at 2 to 64 ranks, with late and dead ones among them."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_asgd import ShardedASGD
from dist_asgd.comm import PeerError
from dist_asgd.comm.dissemination import Message, Summary, all_gather, gather, num_hops
from dist_asgd.comm.measure import Action, Meter
from dist_asgd.comm.reports import NUM_LARGEST, CollectiveCall, RankReport, RankReports
from tests.harness.ranks import outcomes, run_errors

SIZES = [2, 3, 4, 5, 7, 8, 13, 16, 33, 64]
# How long a rank waits for a message of another, in seconds.
TIMEOUT_S = 2.0


class Network:
    """Messages between threads, in order for each pair of ranks and tag; dead ranks close connections."""

    def __init__(self, world_size: int, dead: Iterable[int] = (), noticed: bool = False) -> None:
        """``noticed``: connections to dead ranks are known to be closed before anything is sent."""
        self.world_size = world_size
        self.noticed = noticed
        self.dead = frozenset(dead)
        self.num_sent = [0] * world_size
        self.peers: list[set[int]] = [set() for _ in range(world_size)]
        self._boxes: dict[tuple[int, int, int], SimpleQueue[Tensor]] = {}
        self._lock = threading.Lock()

    def box(self, source: int, target: int, tag: int) -> SimpleQueue[Tensor]:
        """The messages on their way from one rank to another."""
        with self._lock:
            return self._boxes.setdefault((source, target, tag), SimpleQueue())


class _Sent:
    def wait(self, timeout: timedelta | None = None) -> bool:
        return True


class _Receive:
    def __init__(self, network: Network, source: int, box: SimpleQueue[Tensor], place: Tensor) -> None:
        self._network, self._source, self._box, self._place = network, source, box, place

    def wait(self, timeout: timedelta | None = None) -> bool:
        if self._source in self._network.dead:
            raise RuntimeError("Connection closed by peer")
        try:
            self._place.copy_(self._box.get(timeout=TIMEOUT_S))
        except Empty:
            raise RuntimeError("Timed out waiting for a message") from None
        return True


class Rank:
    """The messenger of one rank of a ``Network``."""

    def __init__(self, network: Network, rank: int) -> None:
        self.network, self.rank, self.world_size = network, rank, network.world_size
        self.meter = Meter()

    def connect(self, peers: Iterable[int]) -> None:
        """Do nothing: boxes need no connection."""

    def post(self, action: Action, tag: int, receives: Iterable[Message], sends: Sequence[Message]) -> list[dist.Work]:
        """Start messages."""
        works: list[Any] = []
        receives, sends = list(receives), list(sends)
        for peer, _ in (*receives, *sends):
            if self.network.noticed and peer in self.network.dead:
                raise self.peer_error(action, RuntimeError("Connection closed by peer"))
        for peer, place in receives:
            self.network.peers[self.rank].add(peer)
            works.append(_Receive(self.network, peer, self.network.box(peer, self.rank, tag), place))
        for peer, tensor in sends:
            self.network.num_sent[self.rank] += 1
            self.network.peers[self.rank].add(peer)
            self.network.box(self.rank, peer, tag).put(tensor.clone())
            works.append(_Sent())
        return cast(list[dist.Work], works)

    def peer_error(self, action: Action, error: BaseException) -> PeerError:
        """As ``Gloo`` makes it."""
        return PeerError(f"{action} failed on rank {self.rank}: {error}")


def on_all(network: Network, job: Callable[[Rank], Any]) -> list[Any]:
    """Run ``job`` on a thread for each rank that is not dead; its value, or the exception, and None for dead ranks."""
    found: list[Any] = [None] * network.world_size

    def work(rank: int) -> None:
        try:
            found[rank] = job(Rank(network, rank))
        except PeerError as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(r,)) for r in range(network.world_size) if r not in network.dead]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
        assert not thread.is_alive(), "a rank hangs"
    return found


def drawn(rank: int, num_words: int) -> Tensor:
    """Words of one rank, which are those of its number."""
    return torch.randint(-(1 << 62), 1 << 62, (num_words,), generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("world_size", SIZES)
def test_a_summary(world_size: int) -> None:
    """Maxima and unions are those of all ranks, in ceil(log2 N) messages, also if ranks come late."""
    network = Network(world_size)

    def job(rank: Rank) -> list[list[int]]:
        found = []
        for _ in range(3):
            if random.random() < 0.2:
                time.sleep(random.random() / 20)
            summary = Summary(rank, 7, drawn(rank.rank, 6).tolist(), 4)
            summary.poll()
            found.append(summary.wait())
        return found

    words = torch.stack([drawn(rank, 6) for rank in range(world_size)])
    union = words[0, 4:].clone()
    for row in words[:, 4:]:
        union |= row
    wanted = [*words[:, :4].amax(0).tolist(), *union.tolist()]
    assert on_all(network, job) == [[wanted] * 3] * world_size
    assert set(network.num_sent) == {3 * num_hops(world_size)}
    assert max(len(peers) for peers in network.peers) <= 2 * num_hops(world_size)


@pytest.mark.parametrize("world_size", SIZES)
def test_the_rows_of_all_ranks(world_size: int) -> None:
    """They arrive in rank order, also if they have different lengths or none, over the same connections."""
    network = Network(world_size)
    numels = [(5 * rank) % 4 for rank in range(world_size)]
    root = world_size // 3

    def job(rank: Rank) -> tuple[Any, Any]:
        own = drawn(rank.rank, numels[rank.rank])
        everywhere = all_gather(rank, 3, own, numels)
        raw = own.view(torch.uint8)
        at_root = gather(rank, 4, raw, [8 * numel for numel in numels], root)
        return [row.tolist() for row in everywhere], at_root and [row.tolist() for row in at_root]

    wanted = [drawn(rank, numels[rank]).tolist() for rank in range(world_size)]
    raw = [drawn(rank, numels[rank]).view(torch.uint8).tolist() for rank in range(world_size)]
    found = on_all(network, job)
    assert [everywhere for everywhere, _ in found] == [wanted] * world_size
    assert [at_root for _, at_root in found] == [raw if rank == root else None for rank in range(world_size)]
    assert max(len(peers) for peers in network.peers) <= 2 * num_hops(world_size)


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("what", ["summary", "all_gather", "gather"])
@pytest.mark.parametrize("noticed", [False, True], ids=["while waiting", "before"])
def test_dead_ranks(world_size: int, what: str, noticed: bool) -> None:
    """Every other rank hears of it at once, although most have no connection to the dead one."""
    dead = random.Random(world_size).sample(range(world_size), max(1, world_size // 10))
    network = Network(world_size, dead, noticed)

    def job(rank: Rank) -> None:
        own = drawn(rank.rank, 2)
        if what == "summary":
            summary = Summary(rank, 7, own.tolist(), 1)
            with pytest.raises(PeerError):
                summary.wait()
            # Whoever waits again gets no words that nobody has sent.
            summary.wait()
        elif what == "all_gather":
            all_gather(rank, 7, own, [2] * world_size)
        else:
            gather(rank, 7, own.view(torch.uint8), [16] * world_size, min(set(range(world_size)) - set(dead)))

    started = time.monotonic()
    found = on_all(network, job)
    if what == "gather":
        # It is for its root: the others may be through before anybody can know.
        assert isinstance(found[min(set(range(world_size)) - set(dead))], PeerError)
    else:
        assert [rank for rank, error in enumerate(found) if isinstance(error, PeerError)] == sorted(
            set(range(world_size)) - set(dead)
        )
    assert time.monotonic() - started < TIMEOUT_S


def test_a_rank_that_does_not_come() -> None:
    """All others raise after one timeout, not after one for each message."""
    network = Network(13)
    started = time.monotonic()
    found = on_all(
        network, lambda rank: None if rank.rank == 5 else Summary(rank, 7, drawn(rank.rank, 2).tolist(), 1).wait()
    )
    assert [rank for rank, error in enumerate(found) if isinstance(error, PeerError)] == [
        rank for rank in range(13) if rank != 5
    ]
    assert time.monotonic() - started < 2 * TIMEOUT_S


# --- reports ------------------------------------------------------------------------------------------------


def reports_of(given: Sequence[RankReport]) -> RankReports:
    """The reports of all ranks, combined as an exchange combines them."""
    words = torch.tensor([report.summary for report in given])
    bits = words[0, NUM_LARGEST:].clone()
    for row in words[:, NUM_LARGEST:]:
        bits |= row
    summary = torch.cat((words[:, :NUM_LARGEST].amax(0), bits))
    return RankReports(summary.tolist(), given[0].mask_words, len(given), lambda: [report.row for report in given])


@pytest.mark.parametrize("seed", range(200))
def test_reports_say_what_the_rows_say(seed: int) -> None:
    """Of random rows, with ranks that have joined and counts that are unknown."""
    draw = random.Random(seed)
    num_ranks, mask_words = draw.randint(2, 9), draw.randint(0, 3)
    calls = draw.choice([[CollectiveCall.STEP], [CollectiveCall.STEP, CollectiveCall.JOINED], list(CollectiveCall)])
    few = draw.random() < 0.5

    def number(most: int) -> int:
        return draw.randint(0, 1) if few else draw.randint(0, most)

    given = []
    for rank in range(num_ranks):
        call = CollectiveCall.ROUND if rank == 0 and draw.random() < 0.3 else draw.choice(calls)
        discards = -5 if draw.random() < 0.2 else number(1 << 50)
        bits = (1 << 62 * mask_words) - 1
        masks = (draw.getrandbits(200) & bits, draw.choice([0, bits, draw.getrandbits(200) & bits]))
        given.append(RankReport(rank, call, discards, number(7), number((1 << 62) - 1), masks, mask_words))
    reports = reports_of(given)
    active = [report for report in given if report.call is not CollectiveCall.JOINED]
    known = [report.discards for report in given if report.discards >= 0]
    assert reports.calls == {report.call for report in given}
    assert reports.joined == tuple(report.rank for report in given if report not in active)
    assert reports.discards_differ == (len(set(known)) > 1)
    assert reports.discards == max(known, default=0)
    assert reports.digests_differ == (len({report.digest for report in active}) > 1)
    assert (reports.problem, reports.rebound, reports.cleared) == tuple(
        any(report.flags & flag for report in given) for flag in (1, 2, 4)
    )
    union, common, in_both = 0, (1 << 62 * mask_words) - 1, 0
    for report in given:
        union |= report.masks[0]
        in_both |= report.masks[0] & report.masks[1]
    for report in active:
        common &= report.masks[0]
    assert (reports.union(0), reports.in_both) == (union, in_both)
    assert reports.masks(1) == [report.masks[1] for report in given]
    if active:
        assert reports.first_active == active[0].rank
        assert reports.common == common & union


# --- real ranks -----------------------------------------------------------------------------------------------


def disagrees(rank: int, _world_size: int, odd: int, what: str) -> None:
    """Job: rank ``odd`` does something else than the others in a step."""
    params = [nn.Parameter(torch.ones(5)) for _ in range(3)]
    optimizer = ShardedASGD([(f"p{i}", p) for i, p in enumerate(params)], lr=0.1)
    for param in params:
        param.grad = torch.ones(5)
    optimizer.step()
    if rank == odd:
        if what == "gradient":
            params[1].grad = None
        if what == "lr":
            optimizer.param_groups[0]["lr"] = 0.2
        if what == "problem":
            params[2].grad = torch.ones(5).to_sparse()
        if what == "call":
            optimizer.consolidated_state_dict()
    optimizer.step()


TEXTS = {
    "gradient": "parameter p1 has a gradient on ranks {others} of 8 only",
    "lr": "ranks {others} have 0.1; rank {odd} has 0.2",
    "problem": "[on rank {odd} of 8]",
    "call": "ranks {others} have step(); rank {odd} has consolidated_state_dict()",
}


@pytest.mark.parametrize(("what", "odd"), [("gradient", 6), ("lr", 1), ("problem", 3), ("call", 5)])
def test_disagreements_of_eight_ranks(what: str, odd: int) -> None:
    """Every rank raises the same error, which names the odd one."""
    others = "0" if odd == 1 else f"0-{odd - 1}"
    others += ", 7" if odd == 6 else f", {odd + 1}-7"
    text = TEXTS[what].format(odd=odd, others=others)
    for error in run_errors("gloo", 8, disagrees, odd, what):
        shown = error.message.replace("rank 0 has 0.1", "ranks 0 have 0.1")
        assert text in shown, shown


def dies(rank: int, _world_size: int, dead: int, seconds: float) -> None:
    """Job: one rank ends before or while all others make a call, which have no other collective to notice it in."""
    param = nn.Parameter(torch.ones(64))
    optimizer = ShardedASGD([param])
    dist.barrier()
    if rank == dead:
        time.sleep(0.3)
        os._exit(9)
    time.sleep(seconds)
    optimizer.consolidated_state_dict()


@pytest.mark.parametrize("seconds", [0.0, 1.0], ids=["while they wait", "before they call"])
def test_a_dead_rank_of_eight(seconds: float) -> None:
    """Every other one raises in seconds, and names it."""
    found = outcomes("gloo", 8, dies, 5, seconds)
    for outcome in found:
        if outcome.rank != 5:
            assert outcome.error is not None
            assert "and was not called on rank 5" in outcome.error.message, outcome.error.message
            assert outcome.seconds < 15.0
