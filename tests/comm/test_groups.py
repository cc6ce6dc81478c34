"""Process groups other than the default one, several optimizers at once, and gathers of uneven fragments."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dist_asgd import ShardedASGD, load_checkpoint, save_checkpoint
from dist_asgd.comm import Communicators
from tests.harness.bits import assert_same_bits
from tests.harness.meshes import Net, assert_same_params, set_gradients
from tests.harness.models import mlp, mlp_loss
from tests.harness.ranks import run


def beside_plain(model: nn.Module, optimizer: ShardedASGD, seeds: list[int]) -> None:
    """Train on equal data on every rank of the group, beside torch in this process."""
    plain = copy.deepcopy(model)
    oracle = torch.optim.ASGD(plain.parameters(), lr=0.1, t0=1)
    for seed in seeds:
        optimizer.zero_grad()
        oracle.zero_grad()
        mlp_loss(model, seed).backward()
        mlp_loss(plain, seed).backward()
        optimizer.step()
        oracle.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same_bits(p, q, "parameter")
    found = optimizer.consolidated_state_dict(to=None)["state"]
    for index, entry in oracle.state_dict()["state"].items():
        assert_same_bits(found[index]["ax"], entry["ax"], "ax")


def halves(rank: int, world_size: int, stage: int, stride: int) -> list[int]:
    """Job: two groups of two ranks train on different data; returns this rank's fragments."""
    members = [[r for r in range(world_size) if (r // stride) % 2 == half] for half in (0, 1)]
    groups = [dist.new_group(ranks) for ranks in members]
    half = (rank // stride) % 2
    model = mlp()
    optimizer = ShardedASGD(
        model.parameters(), lr=0.1, t0=1, stage=stage, process_group=groups[half], bucket_cap_mb=0.002
    )
    beside_plain(model, optimizer, [10 * half + i for i in range(3)])
    assert optimizer.consolidated_state_dict(to=1).keys() == (
        {"state", "param_groups"} if members[half].index(rank) == 1 else set()
    )
    with optimizer.averaged_parameters():
        pass
    beside_plain(mlp(), ShardedASGD(mlp().parameters(), process_group=groups[half]), [])
    return [optimizer.state[p]["ax"].numel() for p in model.parameters()]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("stride", [1, 2], ids=["interleaved", "blocks"])
def test_two_groups_of_two_train_apart(stage: int, stride: int) -> None:
    """Ranks of the group, not of the world, own the shards and name the target."""
    sizes = run("gloo", 4, halves, stage, stride)
    for half in (0, 1):
        members = [sizes[r] for r in range(4) if (r // stride) % 2 == half]
        assert [sum(c) for c in zip(*members, strict=True)] == [p.numel() for p in mlp().parameters()]


def outsider(rank: int, _world_size: int) -> None:
    """Job: a rank constructs on a group that it is not in."""
    group = dist.new_group([0, 1])
    if rank == 2:
        with pytest.raises(ValueError, match="not a member"):
            ShardedASGD([nn.Parameter(torch.ones(3))], process_group=group)
    else:
        ShardedASGD([nn.Parameter(torch.ones(3))], process_group=group)


def test_a_rank_outside_the_group_is_told_so() -> None:
    """That rank raises alone, and the members go on."""
    run("gloo", 3, outsider)


def two_optimizers(rank: int, _world_size: int) -> None:
    """Job: two optimizers on one group, whose backwards and steps interleave."""
    first, second = mlp(seed=1), mlp(seed=2)
    plain = [copy.deepcopy(first), copy.deepcopy(second)]
    ours = [ShardedASGD(m.parameters(), lr=0.1, stage=2, bucket_cap_mb=0.002) for m in (first, second)]
    theirs = [torch.optim.ASGD(m.parameters(), lr=0.1) for m in plain]
    for seed in range(3):
        for model, twin in zip((first, second), plain, strict=True):
            mlp_loss(model, seed).backward()
            mlp_loss(twin, seed).backward()
        for optimizer in (*reversed(ours), *theirs):
            optimizer.step()
            optimizer.zero_grad()
    for model, twin in zip((first, second), plain, strict=True):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert_same_bits(p, q, f"parameter on rank {rank}")


@pytest.mark.parametrize(("backend", "world_size"), [("threads", 2), ("gloo", 2), ("gloo", 4)])
def test_two_optimizers_share_a_group(backend: str, world_size: int) -> None:
    """Transfers of one optimizer never meet those of the other."""
    run(backend, world_size, two_optimizers)


def generator_and_discriminator(_rank: int, _world_size: int) -> None:
    """Job: one backward reaches the parameters of two optimizers."""
    first, second = (nn.Parameter(torch.ones(40)) for _ in range(2))
    ours = [ShardedASGD([p], lr=0.1, stage=2) for p in (first, second)]
    for _ in range(3):
        (first * second).sum().backward()
        for optimizer in ours:
            optimizer.step()
            optimizer.zero_grad()
    assert_same_bits(first, second, "the mirror image")


@pytest.mark.parametrize(("backend", "world_size"), [("threads", 2), ("gloo", 2)])
def test_one_backward_for_two_optimizers(backend: str, world_size: int) -> None:
    """Each optimizer takes the gradients of its own parameters."""
    run(backend, world_size, generator_and_discriminator)


def actor_and_critic(rank: int, _world_size: int, stage: int) -> None:
    """Job: every rank is in a row with one peer and in a column with another; one model on each, all interleaved."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("column", "row"))
    plain = {name: Net(seed) for seed, name in enumerate(("row", "column"))}
    nets = {name: Net(seed) for seed, name in enumerate(("row", "column"))}
    ours, theirs = {}, {}
    for name, net in nets.items():
        for block in net.blocks:
            fully_shard(block, mesh=mesh[name])  # the rest is plain: sharded by the optimizer
        # The row goes by its group, the column by its mesh of one dimension.
        ranks = {"process_group": mesh[name].get_group()} if name == "row" else {"mesh": mesh[name]}
        ours[name] = ShardedASGD(net.named_parameters(), lr=0.1, t0=1, stage=stage, bucket_cap_mb=0.001, **ranks)
        theirs[name] = torch.optim.ASGD(plain[name].parameters(), lr=0.1, t0=1, foreach=False)
    for step in range(4):
        for turn, name in enumerate(("row", "column", "column")):
            for net, optimizer in ((nets[name], ours[name]), (plain[name], theirs[name])):
                set_gradients(net, 10 * step + turn)
                optimizer.step()
                optimizer.zero_grad()
        with ours["row"].averaged_parameters():
            set_gradients(nets["column"], 99)
            set_gradients(plain["column"], 99)
            found = ours["column"].clip_grad_norm_(0.5)
            expected = torch.nn.utils.clip_grad_norm_(plain["column"].parameters(), 0.5)
            torch.testing.assert_close(found, expected)
            for optimizer in (ours["column"], theirs["column"]):
                optimizer.zero_grad()
    for name, net in nets.items():
        assert_same_params(net, plain[name], f"of the {name} on rank {rank}")
        found_state = ours[name].consolidated_state_dict(to=None)["state"]
        for index, entry in theirs[name].state_dict()["state"].items():
            assert_same_bits(found_state[index]["ax"], entry["ax"], f"ax of {index}")


@pytest.mark.parametrize("stage", [1, 2])
def test_two_optimizers_over_two_subgroups_in_one_process(stage: int) -> None:
    """Messages of one optimizer never meet those of the other, for DTensors or for plain parameters."""
    run("gloo", 4, actor_and_critic, stage)


def uneven(_rank: int, _world_size: int, path: str) -> None:
    """Job: ranks are members of different numbers of groups when the optimizer makes one of its own."""
    for _ in range(3):
        dist.new_group([0, 1])
    model = mlp()
    optimizer = ShardedASGD(model.parameters(), lr=0.1)
    save_checkpoint(path, model, optimizer, step=1)
    load_checkpoint(path, model, optimizer)


def test_ranks_may_be_in_different_numbers_of_groups(tmp_path: Path) -> None:
    """torch puts that number into the name of a group that only its members make."""
    run("gloo", 3, uneven, str(tmp_path / "checkpoint"))


def gathers(rank: int, _world_size: int, to: int | None, numels: list[int]) -> None:
    """Job: rank r sends ``numels[r]`` elements, twice."""
    communicator = Communicators(None).on(torch.device("cpu"))
    here = to is None or to == rank
    places = [torch.full((numel,), -1.0) for numel in numels] if here else None
    for round_ in range(2):
        fragment = torch.arange(numels[rank], dtype=torch.float32) + 100 * rank + round_
        communicator.gather(fragment, places, numels, to)
        for r, place in enumerate(places or ()):
            assert torch.equal(place, torch.arange(numels[r], dtype=torch.float32) + 100 * r + round_)


@pytest.mark.parametrize("numels", [[0, 3, 6], [4, 4, 4], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("to", [None, 0, 2])
@pytest.mark.parametrize("backend", ["threads", "gloo"])
def test_gather_takes_fragments_of_any_size(backend: str, to: int | None, numels: list[int]) -> None:
    """Fragments arrive on one rank or on all, by named collectives and by messages."""
    run(backend, 3, gathers, to, numels)
