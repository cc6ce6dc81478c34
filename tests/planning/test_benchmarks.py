"""What the benchmarks take from a plan: the buckets of large models, and two hosts with a slow cable between them."""

from __future__ import annotations

import os
import shutil
import time

import pytest
import torch
import torch.distributed as dist

from benchmarks import scale_plan
from benchmarks.hosts import ENVIRONMENT, Hosts
from benchmarks.ranks import Team


@pytest.mark.parametrize("ranks", [8, 16384])
def test_the_host_is_measured_with_the_buckets_of_the_plan(ranks: int) -> None:
    """As many as there are gathers; every rank holds as much as the others, and hardly more than its share."""
    for row in scale_plan.planned("7B", ranks, (scale_plan.STAGE1, scale_plan.STAGE2, scale_plan.HYBRID)):
        gathers = [entry["calls"] for entry in row["traffic"] if entry["kind"] == "all-gather"]
        groups = scale_plan.groups_of("7B", row["mode"], ranks)
        assert gathers == [len(groups)] == [row["buckets"]]
        assert sorted(position for group in groups for position in group) == list(
            range(len(scale_plan.shapes("7B").trained))
        )
        assert row["imbalance"] == 1
        assert 1 <= row["over_share"] < 1.002


class Sender:
    """Swaps a tensor with the other rank."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank

    def swap(self, nbytes: int) -> float:
        """Seconds."""
        sent, received = torch.full((nbytes,), self.rank, dtype=torch.uint8), torch.empty(nbytes, dtype=torch.uint8)
        dist.barrier()
        begin = time.perf_counter()
        for work in (dist.irecv(received, 1 - self.rank), dist.isend(sent, 1 - self.rank)):
            assert work is not None
            work.wait()
        assert received.eq(1 - self.rank).all()
        return time.perf_counter() - begin


@pytest.mark.netns
@pytest.mark.skipif(shutil.which("tc") is None or os.geteuid() != 0, reason="needs root, and ip and tc of iproute2")
def test_a_cable_between_two_hosts_has_the_rate_that_was_set() -> None:
    """In both directions at once, and also after it is changed under living ranks."""
    nbytes = 4 << 20
    try:
        hosts = Hosts()
    except RuntimeError as failure:
        pytest.skip(f"no network namespaces here: {failure}")
    with hosts:
        hosts.set_rate(0.1)
        with Team(Sender, 2, environment=ENVIRONMENT, entrance=hosts.entrance(1)) as team:
            team.wait_ready()
            slow = max(team.call("swap", nbytes))
            hosts.set_rate(10)
            fast = max(team.call("swap", nbytes))
    # What a burst lets through at once is a sixteenth of it.
    assert slow > 0.9 * 8 * nbytes / 0.1e9
    assert fast < 0.8 * slow
