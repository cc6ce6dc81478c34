"""The newest checkpoint is damaged: restore() says which one is good, or takes it, the same on all ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_asgd import CheckpointError, CheckpointManager, ShardedASGD
from dist_asgd.checkpoint.format import reader
from dist_asgd.checkpoint.offline import verify
from tests.harness.ranks import run, run_errors
from tests.harness.topologies import Run, assert_same_state, build, whole_state


def flip(path: Path) -> None:
    """Change one bit in the middle of each data file."""
    for file in path.glob("*.distcp"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


def truncate(path: Path) -> None:
    """Cut the last bytes of the first data file off."""
    os.truncate(path / "__0_0.distcp", 100)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "bits": flip,
    "truncated": truncate,
    "data gone": lambda path: (path / "__0_0.distcp").unlink(),
    "metadata gone": lambda path: (path / ".metadata").unlink(),
    "manifest gone": lambda path: (path / "manifest.json").unlink(),
    "metadata empty": lambda path: (path / ".metadata").write_bytes(b""),
}


def keep_four(live: Run, folder: str) -> dict[int, dict[str, torch.Tensor]]:
    """Save steps 1 to 4 and return the state of each. Collective."""
    states = {}
    for step in range(1, 5):
        states[step] = whole_state(live.train(1))
        CheckpointManager(folder, keep=None).save(live.model, live.optimizer, step=step, extra=step)
    return states


def barrier() -> None:
    """Wait for the other ranks, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def falls_back(rank: int, _world_size: int, folder: str, topology: str, kind: str) -> list[str]:
    """Job: the two newest are damaged; returns what this rank has logged."""
    live = build(topology)
    states = keep_four(live, folder)
    barrier()
    if rank == 0:
        DAMAGE[kind](Path(folder, "step-00000004"))
        flip(Path(folder, "step-00000003"))
    barrier()
    before = whole_state(live)
    manager = CheckpointManager(folder, keep=2)
    with pytest.raises(CheckpointError) as caught:
        manager.restore(live.model, live.optimizer)
    assert "step-00000004" in str(caught.value)
    assert "that is whole is step-00000002: pass fallback=True to restore() to load it, or step=2" in str(caught.value)
    assert_same_state(live, before)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dist_asgd").addHandler(handler)
    try:
        restored = manager.restore(live.model, live.optimizer, fallback=True)
    finally:
        logging.getLogger("dist_asgd").removeHandler(handler)
    assert restored is not None
    assert (restored.step, restored.extra) == (2, 2)
    assert [path.name for path, _ in restored.skipped] == ["step-00000004", "step-00000003"]
    assert_same_state(live, states[2])
    # Training goes on at the steps that are damaged, and they take nobody's place.
    barrier()
    live.num_steps = restored.step
    for step in (3, 4):
        live.train(1)
        manager.save(live.model, live.optimizer, step=step)
        assert_same_state(live, states[step])
    barrier()
    assert sorted(os.listdir(folder)) == [
        *("damaged-step-00000003", "damaged-step-00000004", "latest", "step-00000003", "step-00000004")
    ]
    assert os.readlink(Path(folder, "latest")) == "step-00000004"
    again = manager.restore(live.model, live.optimizer)
    assert again is not None
    assert (again.step, again.skipped) == (4, ())
    return lines


CASES = [(1, "single", kind) for kind in DAMAGE] + [(2, "stage1", "bits"), (2, "stage2", "data gone")]
CASES += [(2, "fsdp2-sharded", "truncated"), (2, "stage2", "manifest gone")]


@pytest.mark.parametrize(("world_size", "topology", "kind"), CASES)
def test_the_newest_good_checkpoint_is_named_or_taken(
    world_size: int, topology: str, kind: str, tmp_path: Path
) -> None:
    """An error names the newest good one and the argument; with it all ranks load that one, and all say so."""
    folder = str(tmp_path / "c")
    for lines in run("none" if world_size == 1 else "gloo", world_size, falls_back, folder, topology, kind):
        assert [line.split(": ")[0].split("/")[-1] for line in lines] == [
            *(f"step-00000002, because step-0000000{step} could not be read" for step in (4, 3))
        ]


def met_by_one(rank: int, _world_size: int, folder: str, only_rank: int) -> int:
    """Job: only one rank cannot read the newest checkpoint."""
    live = build("stage2")
    states = keep_four(live, folder)
    barrier()
    kept, calls = reader.hash_of, []

    def hash_of(data: bytes | memoryview) -> str:
        # Of the first checkpoint that is read the data does not fit.
        calls.append(len(data))
        return kept(data) if len(data) > 3000 or len(calls) > 3 else "0" * 32

    manager = CheckpointManager(folder)
    if rank == only_rank:
        reader.hash_of = hash_of
    try:
        restored = manager.restore(live.model, live.optimizer, fallback=True)
    finally:
        reader.hash_of = kept
    assert restored is not None
    assert f"rank {only_rank} of 2" in restored.skipped[0][1]
    assert_same_state(live, states[restored.step])
    return restored.step


@pytest.mark.parametrize("only_rank", [0, 1])
def test_damage_that_one_rank_meets_moves_all(only_rank: int, tmp_path: Path) -> None:
    """The choice is the same on all ranks, whoever has met the damage."""
    steps = run("gloo", 2, met_by_one, str(tmp_path / "c"), only_rank)
    assert steps[0] == steps[1] < 4


def none_is_left(rank: int, _world_size: int, folder: str, fallback: bool) -> None:
    """Job: all are damaged."""
    live = build("stage1")
    keep_four(live, folder)
    barrier()
    if rank == 0:
        for path in Path(folder).glob("step-*"):
            flip(path)
    barrier()
    CheckpointManager(folder).restore(live.model, live.optimizer, fallback=fallback)


@pytest.mark.parametrize("fallback", [True, False])
def test_no_good_checkpoint_is_an_error(fallback: bool, tmp_path: Path) -> None:
    """Nothing is started afresh in silence: all ranks raise, with every checkpoint that was tried."""
    for error in run_errors("gloo", 2, none_is_left, str(tmp_path / "c"), fallback):
        assert error.type_name == "CheckpointError"
        assert ("can be read, so none is restored" if fallback else "No earlier checkpoint") in error.message
        assert ("step-00000001" in error.message) == fallback


def disagrees(rank: int, _world_size: int, folder: str) -> None:
    """Job: one rank asks for the fallback."""
    live = build("stage1").train(1)
    CheckpointManager(folder).restore(live.model, live.optimizer, fallback=rank == 0)


def test_ranks_that_differ_in_fallback_raise(tmp_path: Path) -> None:
    """All ranks pass the same argument."""
    for error in run_errors("gloo", 2, disagrees, str(tmp_path)):
        assert "fallback" in error.message


def test_another_model_is_no_damage(tmp_path: Path) -> None:
    """A checkpoint of another model is never passed over."""
    keep_four(build("single"), str(tmp_path))
    model = nn.Linear(2, 2)
    optimizer = ShardedASGD(model.parameters())
    with pytest.raises(ValueError, match="another model"):
        CheckpointManager(tmp_path).restore(model, optimizer, fallback=True)
    assert CheckpointManager(tmp_path / "empty").restore(model, optimizer, fallback=True) is None


def test_a_search_that_takes_too_long_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks wait for the search: after its time only sizes and metadata are checked, and the error says so."""
    live = build("single")
    keep_four(live, str(tmp_path))
    flip(tmp_path / "step-00000004")
    truncate(tmp_path / "step-00000003")
    monkeypatch.setattr(verify, "_MAX_READING_S", -1.0)
    with pytest.raises(CheckpointError, match=r"by its files' sizes .* is step-00000002"):
        CheckpointManager(tmp_path).restore(live.model, live.optimizer)
