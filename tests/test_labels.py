"""The labels of phases in traces: each mode has exactly those that ``docs/trace.md`` lists; without a profiler none."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from dist_asgd import GradScaler, ShardedASGD, labels, load_checkpoint, save_checkpoint
from dist_asgd.checkpoint.save import async_save_checkpoint
from dist_asgd.labels import LABELS, Label, label
from tests.harness.meshes import hybrid_mesh
from tests.harness.ranks import run

PAGE = Path(__file__).parent.parent / "docs" / "trace.md"
STEP = {Label.EXCHANGE, Label.EXCHANGE_WAIT, Label.UPDATE, Label.ALL_GATHER, Label.ALL_GATHER_WAIT}
STAGE2 = STEP | {Label.PACK, Label.REDUCE_SCATTER, Label.REDUCE_SCATTER_WAIT, Label.MEAN}
WANTED = {
    "stage 1": STEP,
    "stage 2": STAGE2,
    "stage 2, scaled and clipped": STAGE2 | {Label.UNSCALE, Label.CLIP},
    "hybrid": STAGE2 | {Label.ALL_REDUCE, Label.ALL_REDUCE_WAIT},
    "replicas": STEP | {Label.PACK, Label.UNPACK},
    "averages": {Label.SWAP, Label.EXCHANGE, Label.EXCHANGE_WAIT, Label.ALL_GATHER, Label.ALL_GATHER_WAIT},
    "state": {Label.EXCHANGE, Label.EXCHANGE_WAIT, Label.GATHER, Label.GATHER_WAIT},
    "save": {Label.EXCHANGE, Label.EXCHANGE_WAIT, Label.SAVE_STATE, Label.SAVE_WRITE, Label.SAVE_FINISH},
    "save in the background": {Label.EXCHANGE, Label.EXCHANGE_WAIT, Label.SAVE_STATE, Label.SAVE_COPY},
    "load": STEP - {Label.UPDATE} | {Label.LOAD_OPEN, Label.LOAD_READ, Label.LOAD_APPLY},
}
MODES = [mode for mode in WANTED if mode.startswith(("stage", "hybrid", "replicas"))]
CALLS = [mode for mode in WANTED if mode not in MODES]


def names(recorded: torch.profiler.profile) -> list[str]:
    """The labels in a profile, as often as they are there."""
    return [event.name for event in recorded.events() or () if event.name.startswith("dist_asgd::")]


def step(_rank: int, _world_size: int, mode: str) -> list[str]:
    """Job: the labels of a step in this mode, from its forward on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    mesh = hybrid_mesh((2, 2)) if mode in ("hybrid", "replicas") else None
    if mode == "replicas":
        fully_shard(model, mesh=mesh)
        mesh = None
    stage = 2 if mode.startswith(("stage 2", "hybrid")) else 1
    optimizer = ShardedASGD(model.parameters(), stage=stage, mesh=mesh)
    scaler = GradScaler("cpu", init_scale=2.0, enabled="scaled" in mode)
    for recorded in (None, torch.profiler.profile()):
        if recorded is not None:
            recorded.start()
        scaler.scale(model(torch.ones(2, 6)).sum()).backward()
        if "clipped" in mode:
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert recorded is not None
    recorded.stop()
    return names(recorded)


@pytest.mark.parametrize(("ranks", "mode"), [*((4, mode) for mode in MODES), (2, "stage 2")])
def test_a_step_has_its_labels(ranks: int, mode: str) -> None:
    """And no others: bucket by bucket, whatever the number of parameters. Two ranks share memory."""
    for found in run("gloo", ranks, step, mode):
        assert set(found) == WANTED[mode]
        assert found.count(Label.UPDATE) == 1


def calls(rank: int, _world_size: int, folder: str) -> dict[str, list[str]]:
    """Job: the labels of what is done beside steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    optimizer = ShardedASGD(model.named_parameters(), t0=0)
    for _ in range(2):
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.consolidated_state_dict(None)

    def average() -> None:
        with optimizer.averaged_parameters():
            assert rank < 2

    jobs: dict[str, Any] = {
        "averages": average,
        "state": lambda: optimizer.consolidated_state_dict(None),
        "save": lambda: save_checkpoint(f"{folder}/a", model, optimizer, step=1),
        "save in the background": lambda: async_save_checkpoint(f"{folder}/b", model, optimizer, step=1),
        "load": lambda: load_checkpoint(f"{folder}/a", model, optimizer),
    }
    found = {}
    for name, job in jobs.items():
        with torch.profiler.profile() as recorded:
            pending = job()
        found[name] = names(recorded)
        if name == "save in the background":
            pending.wait()
    return found


def test_calls_beside_steps_have_their_labels(tmp_path: Path) -> None:
    """Rank 0 finishes a save; what a thread does beside training is not in the trace of this one."""
    for rank, found in enumerate(run("gloo", 2, calls, str(tmp_path))):
        for name in CALLS:
            wanted = WANTED[name] - ({Label.SAVE_FINISH} if rank else set())
            assert set(found[name]) == wanted, name


def test_the_page_lists_all_labels() -> None:
    """The table of docs/trace.md has every label once, and each is found by a test above."""
    assert re.findall(r"^\| `(dist_asgd::\w+)` \|", PAGE.read_text(), re.MULTILINE) == list(LABELS)
    assert set().union(*WANTED.values()) == set(LABELS)


def test_nothing_is_made_without_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A label costs as little as reading an attribute, then; with one it is torch's own."""
    made: list[str] = []
    stand_in = SimpleNamespace(record_function=made.append, _is_profiler_enabled=False)
    monkeypatch.setattr(labels, "profiler", stand_in)
    param = nn.Parameter(torch.ones(3))
    param.sum().backward()
    ShardedASGD([param]).step()
    assert not made
    stand_in._is_profiler_enabled = True
    label(Label.PACK)
    assert made == [Label.PACK]
