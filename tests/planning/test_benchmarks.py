"""What the benchmarks take from a plan: the buckets of large models, and two hosts with a slow cable between them."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest
import torch
import torch.distributed as dist

from benchmarks import scale_plan, trace
from benchmarks.hosts import ENVIRONMENT, Hosts
from benchmarks.ranks import Team
from dist_asgd.labels import Label


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


def test_the_picture_of_a_trace_has_what_the_host_does_and_what_travels() -> None:
    """Of nested phases the innermost counts in each moment; a transfer ends with the wait that belongs to it."""
    spans = [
        trace.Span("backward", 0, 10),
        trace.Span(Label.REDUCE_SCATTER, 1, 2),
        trace.Span(Label.REDUCE_SCATTER, 3, 4),
        trace.Span(Label.REDUCE_SCATTER_WAIT, 6, 8),
        trace.Span(Label.MEAN, 7, 8),
        trace.Span("step()", 10, 14),
        trace.Span(Label.REDUCE_SCATTER_WAIT, 11, 12),
    ]
    hosts = trace.stretches(spans)
    assert [(span.begin, span.end) for span in hosts if span.label == "backward"] == [(0, 1), (2, 3), (4, 6), (8, 10)]
    assert [span for span in hosts if span.label == Label.REDUCE_SCATTER_WAIT] == [
        trace.Span(Label.REDUCE_SCATTER_WAIT, 6, 7),
        trace.Span(Label.REDUCE_SCATTER_WAIT, 11, 12),
    ]
    assert sum(span.end - span.begin for span in hosts) == 14
    assert trace.in_flight(spans) == [
        trace.Span(Label.REDUCE_SCATTER, 2, 8),
        trace.Span(Label.REDUCE_SCATTER, 4, 12),
    ]


def test_the_report_of_a_trace_is_of_its_figures() -> None:
    """The committed text has been made of the committed JSON, whose stats are those of a step."""
    report = json.loads((trace.RESULTS / "trace.json").read_text())
    assert (trace.RESULTS / "trace.md").read_text() == trace.as_markdown(report)
    for run in report["runs"].values():
        assert [stats["steps"] for stats in run["stats"]] == [1, 1]
        for spans in run["spans"]:
            assert {Label.PACK, Label.REDUCE_SCATTER_WAIT, Label.UPDATE, Label.ALL_GATHER_WAIT} <= {s[0] for s in spans}
