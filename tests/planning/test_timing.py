"""The times of a plan: what follows from the definition of links, and the order in which calls are made."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from dist_asgd import plan
from dist_asgd.planning.choice import FSDP2, HSDP, HYBRID1, HYBRID2, STAGE1, STAGE2, UNSHARDED
from dist_asgd.planning.links import GBIT, Links, exchanged
from dist_asgd.planning.setup import Setup
from dist_asgd.planning.timing import FORWARD_SHARE, StepTime
from dist_asgd.storage.precision import Precision
from tests.planning.test_plan import TWO_LAYERS

ALL = (UNSHARDED, STAGE1, STAGE2, HYBRID1, HYBRID2, FSDP2, HSDP)
# One matrix a layer, in a bucket of its own: all of them are alike.
LAYERS, NUMEL = 24, 1 << 20
BYTES = LAYERS * NUMEL * 4


def equal_layers() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(LAYERS)))


def time_of(mode: str, **options: Any) -> StepTime:
    """The time of ``mode`` for equal layers, without latency unless ``options`` have one."""
    defaults = {"ranks": 16, "link_gbit": 8.0, "node_gbit": 1e6, "latency_us": 0.0, "node_latency_us": 0.0}
    time = plan(equal_layers(), **{**defaults, **options}).row(mode).time
    assert time is not None
    return time


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_without_computation_a_step_is_what_its_links_need(backend: str) -> None:
    """The bytes that leave the node over what the node's link carries; nothing is hidden, and nothing counted twice."""
    found = plan(
        equal_layers(),
        ranks=16,
        backend=backend,
        link_gbit=1.0,
        node_gbit=1e6,
        latency_us=0.0,
        node_latency_us=0.0,
        host_gbit=1e6,
    )
    for row in found.rows:
        assert row.time is not None
        expected = sum(t.across_bytes for t in row.traffic if t.kind != "control exchange") * 8 / GBIT
        assert row.time.exposed == pytest.approx(expected, rel=0.02), row.mode
        assert row.time.communication == pytest.approx(expected, rel=0.02), row.mode
        assert row.time.exposed_overlapped is None


def test_inside_a_node_its_own_link_counts() -> None:
    """On one node nothing crosses; a ring passes each byte on through every rank."""
    found = plan(equal_layers(), ranks=8, node_gbit=80.0, node_latency_us=0.0)
    time = found.row(STAGE2).time
    assert time is not None
    assert time.communication == pytest.approx(2 * BYTES * 7 / 8 / (80 * GBIT))


@pytest.mark.parametrize("mode", ALL)
def test_computation_hides_communication_but_not_all(mode: str) -> None:
    """A step is no shorter than either, and no longer than both; overlapping the next forward hides more."""
    alone = time_of(mode).communication
    for compute in (0.3 * alone, alone, 3 * alone):
        time = time_of(mode, compute_ms=1e3 * compute)
        assert max(compute, alone) <= time.step * 1.0001
        assert time.step < compute + alone
        assert time.communication == pytest.approx(alone)
        overlapped = time.exposed_overlapped
        assert (overlapped is None) == (mode in (UNSHARDED, FSDP2, HSDP))
        assert overlapped is None or overlapped <= time.exposed * 1.0001
        # On a mesh the gathers, inside a node, take next to nothing here.
        assert mode not in (STAGE1, STAGE2) or overlapped < 0.95 * time.exposed  # type: ignore[operator]


def test_stage_2_exposes_its_gathers_and_the_last_bucket() -> None:
    """With much computation: the gather of all, and one bucket; with overlap_forward one bucket twice."""
    whole = time_of(STAGE2).communication
    time = time_of(STAGE2, compute_ms=1e5)
    bucket = whole / 2 / LAYERS
    assert time.exposed == pytest.approx(whole / 2 + bucket, rel=0.01)
    assert time.exposed_overlapped == pytest.approx(2 * bucket, rel=0.01)


def test_backward_waits_for_the_bucket_before_last() -> None:
    """With little computation the reductions fill the link from the first bucket on."""
    whole = time_of(STAGE2).communication
    compute = 0.3 * whole
    first = compute * (FORWARD_SHARE + (1 - FORWARD_SHARE) / LAYERS)
    assert time_of(STAGE2, compute_ms=1e3 * compute).step == pytest.approx(first + whole, rel=0.01)


def test_latency_grows_with_the_ring_and_with_the_hops_of_an_exchange() -> None:
    """Once around for each bucket; in trees for sums between nodes; messages of Gloo leave all at once."""
    free: dict[str, Any] = {"link_gbit": 1e9, "node_gbit": 1e9, "latency_us": 1000.0}
    around = time_of(STAGE2, **free, ranks=64, ranks_per_node=1).communication
    assert around == pytest.approx(2 * LAYERS * 63e-3, rel=0.01)
    across = time_of(HYBRID2, **free, ranks=64).communication
    assert across == pytest.approx(LAYERS * 2 * 3e-3, rel=0.02)
    at_once = time_of(STAGE2, **free, ranks=64, ranks_per_node=1, backend="gloo", host_gbit=1e9).communication
    assert at_once == pytest.approx(2 * LAYERS * 1e-3, rel=0.01)
    # The exchange of the step is on its way while the last bucket is.
    assert time_of(STAGE2, **free, ranks=64, compute_ms=1e6).exposed == pytest.approx((LAYERS + 1) * 7e-3, rel=0.01)
    setup = Setup(64, 8, None, Precision(None, False, None, None))
    assert exchanged(Links(1.0, 1000.0, 1.0, 1.0), setup) == pytest.approx(3e-3 + 3e-6)


def test_a_processor_that_passes_messages_on_computes_less() -> None:
    """With Gloo the computation and its messages share a core, also where the link is fast."""
    free: dict[str, Any] = {"backend": "gloo", "link_gbit": 1e9, "node_gbit": 1e9, "compute_ms": 1e5}
    idle = time_of(STAGE1, **free, host_gbit=1e9).exposed
    busy = time_of(STAGE1, **free, host_gbit=8.0).exposed
    ddp, own = 2 * BYTES * 15 / 16 / 1e9, BYTES * 15 / 16 / 1e9
    assert idle < 0.01 * busy
    assert ddp + own < busy < ddp + 2 * own


def test_times_are_in_the_table_and_in_json() -> None:
    """With what they rest on; nothing of them without links."""
    plain = plan(TWO_LAYERS, ranks=16)
    assert plain.links is None
    assert all(row.time is None for row in plain.rows)
    assert "Time of a step" not in str(plain)
    timed = plan(TWO_LAYERS, ranks=16, link_gbit=100)
    assert "estimated for 100 Gbit/s a node, 14 us; 2400 Gbit/s a rank inside, 3.4 us" in str(timed)
    assert "exposed" not in str(timed).split("Bytes on a rank in other")[0]
    computed = plan(TWO_LAYERS, ranks=16, link_gbit=100, compute_ms=100)
    assert "exposed, overlap_forward" in str(computed)
    entry = computed.as_dict()["rows"][2]["time"]
    assert entry["step"] == entry["compute"] + entry["exposed"]
    assert any("no contention" in text for text in computed.assumptions)
    assert not math.isinf(computed.as_dict()["links"]["link_gbit"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"link_gbit": 0}, "link_gbit must be a positive number, got 0"),
        ({"link_gbit": -1.0}, "link_gbit must be a positive number"),
        ({"link_gbit": math.inf}, "link_gbit must be a positive number"),
        ({"link_gbit": True}, "link_gbit must be a positive number"),
        ({"link_gbit": "100"}, "link_gbit must be a positive number"),
        ({"link_gbit": 100, "latency_us": -1}, "latency_us must be a positive number"),
        ({"link_gbit": 100, "compute_ms": math.nan}, "compute_ms must be a positive number"),
        ({"compute_ms": 5}, "compute_ms without link_gbit"),
        ({"node_gbit": 100, "latency_us": 5}, "without link_gbit"),
        ({"ranks": 8, "link_gbit": 100}, "all 8 ranks are on one"),
        ({"ranks": 8, "node_gbit": 100, "latency_us": 3}, "all 8 ranks are on one"),
        ({"ranks": 8, "compute_ms": 100}, "compute_ms without node_gbit"),
    ],
    ids=str,
)
def test_links_that_say_nothing_are_refused(options: dict[str, Any], text: str) -> None:
    """Each error says what to give."""
    with pytest.raises(ValueError, match=r"^dist_asgd: ") as raised:
        plan(7_000_000, **{"ranks": 16, **options})
    assert text in str(raised.value)
