"""A rank that dies or never comes: the others raise in bounded time, and say which call it was."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_asgd import PeerError, ShardedASGD, ShardedAverage, async_save_checkpoint, save_checkpoint
from dist_asgd.averaging import FragmentExchange
from dist_asgd.checkpoint.format import writer
from dist_asgd.gather import Gatherer
from tests.harness.bits import assert_same_bits
from tests.harness.models import mlp, mlp_loss
from tests.harness.outcome import Outcome
from tests.harness.processes import GROUP_TIMEOUT_S
from tests.harness.ranks import outcomes

SHORT_TIMEOUT_S = 2.0


def die(how: str) -> None:
    """End this process at once."""
    if how == "exit":
        os._exit(9)
    os.kill(os.getpid(), signal.SIGKILL)


def train_until_death(rank: int, world_size: int, how: str, stage: int, where: str) -> None:
    """Job: the last rank dies in the third step."""
    model = mlp()
    optimizer = ShardedASGD(model.named_parameters(), stage=stage, bucket_cap_mb=0.002)
    for step in range(5):
        dying = rank == world_size - 1 and step == 2
        optimizer.zero_grad()
        mlp_loss(model, step).backward()
        if dying and where == "before step":
            die(how)
        optimizer.step()
        if dying:
            die(how)


def assert_survivors_raised(found: list[Outcome], within_s: float) -> None:
    """The last rank died; every other one raised a RuntimeError that says so, soon."""
    *survivors, dead = found
    assert dead.error is not None
    assert dead.error.type_name == "RankDied"
    for outcome in survivors:
        assert outcome.error is not None, f"rank {outcome.rank} returned"
        assert outcome.error.type_name in ("PeerError", "RuntimeError"), outcome.error.traceback
        assert "peer" in outcome.error.message
        assert outcome.seconds < within_s


# Each two of the three once.
@pytest.mark.parametrize(
    ("how", "where", "stage"),
    [("exit", "before step", 1), ("exit", "after step", 2), ("kill", "before step", 2), ("kill", "after step", 1)],
)
def test_a_peer_that_dies(how: str, where: str, stage: int) -> None:
    """The survivors raise when the connection closes, not at the timeout."""
    assert_survivors_raised(outcomes("gloo", 2, train_until_death, how, stage, where), within_s=10.0)


def test_a_peer_of_three_that_dies() -> None:
    """Ranks that wait for each other raise as well."""
    found = outcomes("gloo", 3, train_until_death, "kill", 2, "before step")
    assert_survivors_raised(found, within_s=GROUP_TIMEOUT_S + 5.0)


def swap_until_death(rank: int, world_size: int, where: str, shared_memory: bool) -> None:
    """Job: the last rank is killed in averaged_parameters(); the others know what their parameters are, and raise."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = ShardedAverage(model.named_parameters(), bucket_cap_mb=0.002, shared_memory=shared_memory)
    for step in range(3):
        mlp_loss(model, step).backward()
        optimizer.step()
        average.update()
    before = [p.detach().clone() for p in model.parameters()]
    with average.averaged_parameters():
        averages = [p.detach().clone() for p in model.parameters()]
    owner, call = {"entering": (FragmentExchange, "run"), "gather": (Gatherer, "launch"), "block": (None, "")}[where]
    dies = rank == world_size - 1
    try:
        if dies and owner is not None:
            mock.patch.object(owner, call, side_effect=lambda *_: die("kill")).start()
        with average.averaged_parameters():
            if dies:
                die("kill")
    except PeerError:
        for p, last, mean in zip(model.parameters(), before, averages, strict=True):
            if where != "gather":
                assert_same_bits(p.detach(), last if where == "entering" else mean, where)
        if where == "entering":
            average.state_dict()
        else:
            with pytest.raises(RuntimeError, match=r"the parameters are still the averages"):
                average.state_dict()
            with pytest.raises(RuntimeError, match=r"step\(\) of SGD after leaving averaged_parameters\(\)"):
                optimizer.step()
        raise


@pytest.mark.parametrize(("where", "shared_memory"), [("entering", True), ("gather", True), ("block", False)])
def test_a_peer_that_is_killed_while_averages_are_swapped(where: str, shared_memory: bool) -> None:
    """Before the ranks agree the survivors undo their own exchange; later the averages stay, and calls say so."""
    found = outcomes("gloo", 2, swap_until_death, where, shared_memory)
    assert_survivors_raised(found, within_s=10.0)


def stay_away(rank: int, _world_size: int) -> None:
    """Job: rank 1 is too late for a step."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=SHORT_TIMEOUT_S))
    weight = nn.Parameter(torch.ones(3))
    optimizer = ShardedASGD([("weight", weight)], process_group=group)
    weight.grad = torch.ones(3)
    if rank == 1:
        time.sleep(SHORT_TIMEOUT_S + 1.0)
    optimizer.step()


def test_a_peer_that_does_not_come() -> None:
    """The group's timeout ends the wait, on every rank."""
    for outcome in outcomes("gloo", 2, stay_away):
        assert outcome.error is not None
        assert outcome.error.type_name == "PeerError"
        assert SHORT_TIMEOUT_S <= outcome.seconds < GROUP_TIMEOUT_S


def hangs_in_a_save(rank: int, _world_size: int, folder: str, asynchronous: bool) -> None:
    """Job: rank 1 is stuck in a checkpoint for longer than the optimizer's group lets anybody wait."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    model = mlp()
    optimizer = ShardedASGD(model.named_parameters(), process_group=group)
    original = writer.HashedFile.sync

    def sync(self: writer.HashedFile) -> None:
        time.sleep(3.5)
        original(self)

    if rank == 1:
        writer.HashedFile.sync = sync  # type: ignore[method-assign]
    try:
        if asynchronous:
            async_save_checkpoint(Path(folder) / "new", model, optimizer, step=1).wait()
        else:
            save_checkpoint(Path(folder) / "new", model, optimizer, step=1)
    finally:
        writer.HashedFile.sync = original  # type: ignore[method-assign]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "async"])
def test_a_peer_that_hangs_in_a_save(asynchronous: bool, tmp_path: Path) -> None:
    """The timeout of the group that the user gave ends the wait in the background too, and nothing is committed."""
    for outcome in outcomes("gloo", 2, hangs_in_a_save, str(tmp_path), asynchronous):
        assert outcome.error is not None
        assert outcome.error.type_name == "PeerError", outcome.error.traceback
        assert "saving" in outcome.error.message
        assert outcome.seconds < 12.0
    assert not (tmp_path / "new").exists()
