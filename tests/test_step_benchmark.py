"""``benchmarks.step``: its rounds and batches, peers that fail, and the pages that show its committed figures."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch.nn as nn

from benchmarks import floor, step_pages, step_report
from benchmarks.measure import Timer, batches, summarize
from benchmarks.model import Shape
from benchmarks.peers import PEERS, Peer, peer_of
from benchmarks.settings import Pace, Setting, groups_of
from benchmarks.training import Training

FIGURES = json.loads((step_pages.RESULTS / "step.json").read_text())


@pytest.mark.parametrize("page", step_pages.PAGES, ids=lambda page: page.name)
def test_pages_show_the_committed_figures(page: Path) -> None:
    """``python -m benchmarks.step --publish`` writes all of them, and nobody edits one."""
    assert step_pages.with_copy(page.read_text(), FIGURES) == page.read_text()


def test_the_report_is_that_of_the_committed_figures() -> None:
    assert (step_pages.RESULTS / "step.md").read_text() == step_report.as_markdown(FIGURES)


def test_a_page_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0; put both comments"):
        step_pages.with_copy("# Page\n", FIGURES)


def test_a_page_does_not_lose_a_setting_that_was_not_measured() -> None:
    with pytest.raises(ValueError, match=r"no times for .*wide/8/host"):
        step_pages.with_copy("<!-- benchmarks.step: gpt/2/host wide/8/host -->\n\n<!-- end -->\n", FIGURES)


def _missing(_model: nn.Module) -> Training:
    raise ModuleNotFoundError("No module named 'elsewhere'")


def test_a_peer_that_fails_gives_its_error_and_the_others_their_figures() -> None:
    """Also its rank that waits for the other one ends. Stage 2 does the same work as the baseline."""
    setting = Setting("gpt", 2)
    peers = (peer_of("ddp"), Peer("elsewhere", "a library", _missing, library=_missing), peer_of("stage2"))
    failures: dict[str, str] = {}
    with Timer(peers, [setting], Shape().miniature(), None, failures) as timer:
        timer.run(Pace(warmup=1, least=2, most=2, deadline=0.0), split_every=2)
    assert failures == {"elsewhere": "ModuleNotFoundError: No module named 'elsewhere'"}
    figures = summarize(timer.raw[setting.key])
    assert list(figures) == ["ddp", "stage2"]
    assert [figures["stage2"][name] for name in ("whole_rounds", "step_rounds", "same_bits")] == [2, 1, True]
    assert figures["stage2"]["gradients_bytes"] < 0.3 * figures["ddp"]["gradients_bytes"]


def test_rounds_end_at_the_deadline_but_not_before_the_fewest() -> None:
    now = time.monotonic()
    assert list(Pace(2, 3, 9, deadline=now - 1).rounds()) == [-2, -1, 0, 1, 2]
    assert list(Pace(0, 3, 5, deadline=now + 1000).rounds()) == [0, 1, 2, 3, 4]
    slow = []
    for number in Pace(0, 1, 1000, deadline=now + 0.2).rounds():
        slow.append(number)
        time.sleep(0.02)
    assert 2 <= len(slow) <= 11


@pytest.mark.parametrize("available", [1.0, 5.0, 7.0, math.inf])
def test_batches_fit_in_memory_and_begin_with_the_baseline(available: float) -> None:
    """A peer that does not fit beside the baseline is measured all the same, with nothing but the baseline."""
    sizes = {peer.key: 1.0 + number % 3 for number, peer in enumerate(PEERS)}
    found = batches(PEERS, sizes, available)
    assert [peer for batch in found for peer in batch[1:]] == list(PEERS[1:])
    for batch in found:
        assert batch[0] is PEERS[0]
        assert len(batch) == 2 or sum(sizes[peer.key] for peer in batch) <= available


def test_the_same_processes_measure_settings_that_differ_in_the_link() -> None:
    groups = groups_of([Setting.parse(key) for key in ("gpt/2/host", "gpt/2/1", "gpt/4/1", "wide/2/host", "gpt/2/10")])
    assert [[setting.key for setting in group] for group in groups] == [
        ["gpt/2/host"],
        ["gpt/2/1", "gpt/2/10"],
        ["gpt/4/1"],
        ["wide/2/host"],
    ]


@pytest.mark.parametrize("key", ["gpt", "gpt/two/host", "tpg/2/host", "gpt/3/10", "gpt/2/0", "gpt/0/host"])
def test_what_names_no_setting_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"wanted .*got '{key}'"):
        Setting.parse(key)


def test_the_floor_is_the_sum_of_its_parts() -> None:
    """In time; and in memory the shards beside what forward and backward need."""
    seconds = {floor.DDP: 1.0, floor.STAGE2: 0.7, **dict.fromkeys(floor.PARTS, 0.1)}
    found = {"unit": 100_000_000, "seconds": seconds, "activations_bytes": 25_000_000, "surroundings": {}}
    report = floor.as_markdown(found, ranks=4)
    assert [line.split("|")[-2].strip() for line in report.splitlines() if "floor: the sum" in line] == ["0.50"]
    # Every rank sends three quarters of its gradients, and reads and writes a quarter of the parameters five times.
    assert [floor.moved_bytes(part, 100, 4) for part in floor.PARTS] == [None, 125, 75, 50, 100]
    assert "together 0.75 P" in report
    assert "no shard of gradients: 0.50 P" in report
