"""The Gloo group that the package makes beside NCCL, here in the place of the user's: steps, sub-groups, dead ranks."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_asgd import ShardedASGD
from dist_asgd.comm import communicators, host_group
from dist_asgd.comm.gloo import Gloo
from tests.harness.bits import same_bits
from tests.harness.ranks import outcomes, run

SHAPES = [(33, 7), (5,), (64, 16), ()]


def trained(optimizer_type: Any, **options: Any) -> list[torch.Tensor]:
    """Parameters after three steps with gradients that are the same on all ranks."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = optimizer_type(params, lr=0.1, t0=0, foreach=False, **options)
    for step in range(3):
        optimizer.zero_grad()
        sum((p * (step + 1)).square().sum() for p in params).backward()  # type: ignore[union-attr]
        optimizer.step()
    return [p.detach() for p in params]


def steps(rank: int, _world_size: int, ranks: list[int], stage: int) -> tuple[bool, int, int]:
    """Job: whether the bits are torch's on a group without a backend for the host, and this rank's connections."""
    group = dist.new_group(ranks)
    for _ in range(rank):
        # Ranks of different histories: torch names groups by how many there are.
        dist.new_group([rank], use_local_synchronization=True)
    if rank not in ranks:
        return True, 0, 0
    before = len(os.listdir("/proc/self/fd"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(communicators, "_backend_for", lambda *_: None)
        made: list[Gloo] = []
        with_own_tags = communicators._with_own_tags

        def keeping(*arguments: Any) -> Gloo:
            made.append(with_own_tags(*arguments))
            return made[-1]

        patch.setattr(communicators, "_with_own_tags", keeping)
        found = trained(ShardedASGD, process_group=group, stage=stage)
        connected = made[0]._group.connected
        assert connected is not None
        same = all(same_bits(a, b) for a, b in zip(found, trained(torch.optim.ASGD), strict=True))
        num_connected = len(connected)
        made.clear()
    return same, num_connected, len(os.listdir("/proc/self/fd")) - before


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("ranks", [[0, 1, 2, 3], [1, 3]], ids=str)
def test_steps_are_torch_to_the_bit(ranks: list[int], stage: int) -> None:
    """On all ranks and on some, although they have made different numbers of groups; nothing is left open."""
    for rank, (same, num_connected, num_open) in enumerate(run("gloo", 4, steps, ranks, stage)):
        assert same
        if rank in ranks:
            assert 0 < num_connected <= len(ranks) - 1
            assert num_open == 0


def agrees(rank: int, world_size: int) -> int:
    """Job: connections after exchanges only."""
    group = host_group.HostGroup.new(list(range(world_size)), dist.group.WORLD)
    communicator = Gloo(group, communicators.FIRST_TAG, group.ranks)
    assert communicator.largest([rank]) == [world_size - 1]
    assert communicator.exchange_objects(rank) == list(range(world_size))
    assert communicator.gather_objects(rank, 1) == (list(range(world_size)) if rank == 1 else None)
    assert group.connected is not None
    return len(group.connected)


def test_exchanges_open_few_connections() -> None:
    """2 log2 N of each rank, less those that two hops share."""
    assert run("gloo", 8, agrees) == [5] * 8


def dies(rank: int, _world_size: int) -> None:
    """Job: rank 1 ends between two calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(communicators, "_backend_for", lambda *_: None)
        optimizer = ShardedASGD([nn.Parameter(torch.ones(3))])
        dist.barrier()
        if rank == 1:
            time.sleep(0.3)
            os._exit(9)
        optimizer.consolidated_state_dict()


def test_a_dead_rank() -> None:
    """The others raise in seconds and name it."""
    for outcome in outcomes("gloo", 3, dies):
        if outcome.rank != 1:
            assert outcome.error is not None
            assert "was not called on rank 1" in outcome.error.message, outcome.error.message


@pytest.mark.parametrize(("master", "local", "world", "wanted"), [
    ("127.0.0.1", "2", "2", "127.0.0.1"),
    # Another host could not reach this one under such an address.
    ("127.0.0.1", "2", "4", None),
    ("no.such.host.invalid", "2", "4", None),
    (None, None, None, None),
])  # fmt: skip
def test_the_interface_leads_to_the_master(
    master: str | None, local: str | None, world: str | None, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun's agents take it; ``GLOO_SOCKET_IFNAME`` wins, and Gloo's own choice is left where nothing helps."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name, value in (("MASTER_ADDR", master), ("LOCAL_WORLD_SIZE", local), ("WORLD_SIZE", world)):
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    made: list[dict[str, Any]] = []

    class Recorder:
        def create_device(self, **options: Any) -> None:
            made.append(options)

        def create_default_device(self, **options: Any) -> None:
            made.append(options)

    monkeypatch.setattr(dist, "ProcessGroupGloo", Recorder())
    host_group._device()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7,eth8")
    host_group._device()
    assert made == [
        {"lazy_init": True} if wanted is None else {"hostname": wanted, "lazy_init": True},
        {"interface": "eth7", "lazy_init": True},
    ]


def test_no_split_for_some_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of some ranks is made while torch sees no bound device; one of all ranks may be split."""

    class Default:
        bound_device_id: str | None = "cuda:0"

        def size(self) -> int:
            return 4

    default = Default()
    monkeypatch.setattr(communicators, "dist", SimpleNamespace(group=SimpleNamespace(WORLD=default)))
    seen = []
    for ranks in ([0, 1], [0, 1, 2, 3]):
        with communicators._without_split(ranks):
            seen.append(default.bound_device_id)
    with pytest.raises(RuntimeError), communicators._without_split([1]):
        raise RuntimeError
    assert (seen, default.bound_device_id) == ([None, "cuda:0"], "cuda:0")
