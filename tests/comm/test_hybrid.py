"""Hybrid sharding: shards along one axis of a mesh, replicas of them along the other."""

from __future__ import annotations

import copy
import gc
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import dist_asgd
from dist_asgd import ShardedASGD, export_averaged
from tests.harness.bits import assert_same_bits, same_bits
from tests.harness.cases import every_value
from tests.harness.history import History
from tests.harness.meshes import hybrid_mesh
from tests.harness.models import mlp, mlp_loss
from tests.harness.ranks import outcomes, run, run_errors
from tests.harness.strategies import histories
from tests.harness.subject import Setting, check_history
from tests.test_parity import EVERYTHING, TINY_BUCKETS_MB

MESHES = [(2, 2), (1, 3), (3, 1), (2, 1), (4, 1)]
WORLDS = [("threads", mesh) for mesh in MESHES] + [("gloo", mesh) for mesh in MESHES]

forms = pytest.mark.parametrize("form", ["forloop", "foreach", "fused"])
stages = pytest.mark.parametrize("stage", [1, 2], ids=["stage1", "stage2"])


@forms
@stages
@settings(max_examples=8)
@example(history=EVERYTHING, world=("gloo", (2, 2)))
@given(history=histories(("float32", "bfloat16", "complex64")), world=st.sampled_from(WORLDS))
def test_histories_are_torch_to_the_bit(stage: int, form: str, history: History, world: tuple[str, Any]) -> None:
    """If sums of gradients are exact, taking them along two axes gives the same bits as along one."""
    backend, mesh = world
    setting = Setting(stage, form, TINY_BUCKETS_MB, mesh=mesh)
    run(backend, mesh[0] * mesh[1], check_history, history, setting)


def train_on_own_data(
    rank: int, _world_size: int, mesh: tuple[int, int] | None, options: dict[str, Any], num_backwards: int
) -> tuple[list[Tensor], dict[str, Any], dict[str, int]]:
    """Job: stage 2 on data whose means are not exact; returns parameters, full state and bytes held."""
    shape = None if mesh is None else hybrid_mesh(mesh)
    model = mlp(width=24)
    optimizer = ShardedASGD(model.parameters(), lr=0.1, t0=1, stage=2, bucket_cap_mb=0.002, mesh=shape, **options)
    for step in range(4):
        optimizer.zero_grad()
        for part in range(num_backwards):
            mlp_loss(model, 100 * step + 10 * part + rank).backward()
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()
    report = optimizer.memory_report()
    held = {"state": report.state_bytes, "gradient": report.gradient_bytes, "parameter": report.parameter_bytes}
    return [p.detach().clone() for p in model.parameters()], optimizer.consolidated_state_dict(to=None), held


@every_value(
    mesh=[(2, 2), (2, 2), (3, 1), (1, 3)],
    options=[{}, {"reduce_dtype": torch.bfloat16}],
    num_backwards=[1, 2, 2, 1],
)
def test_replicas_are_equal_and_near_flat_sharding(mesh: Any, options: dict[str, Any], num_backwards: int) -> None:
    """All ranks have the same bits, and flat sharding differs only by the order of its sums."""
    world_size = mesh[0] * mesh[1]
    found = run("gloo", world_size, train_on_own_data, mesh, options, num_backwards)
    flat = run("gloo", world_size, train_on_own_data, None, options, num_backwards)[0]
    for params, state, held in found:
        for mine, first, other in zip(params, found[0][0], flat[0], strict=True):
            assert same_bits(mine, first)
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-2 if options else 1e-6)
        for index, entry in state["state"].items():
            assert same_bits(entry["ax"], found[0][1]["state"][index]["ax"])
        assert held["state"] * mesh[1] <= held["parameter"]
        assert held["gradient"] * mesh[1] <= held["parameter"]


def count_sent(rank: int, world_size: int, mesh: tuple[int, int] | None, stage: int) -> dict[int, int]:
    """Job: the bytes that this rank sends to each other one in a step, control words left out."""
    shape = None if mesh is None else hybrid_mesh(mesh)
    model = mlp(width=64)
    optimizer = ShardedASGD(model.parameters(), lr=0.1, stage=stage, bucket_cap_mb=0.02, mesh=shape)
    sent = dict.fromkeys(range(world_size), 0)
    isend = dist.isend

    def counting(tensor: Tensor, dst: int, **options: Any) -> Any:
        if tensor.dtype != torch.int64:
            sent[dst] += tensor.nbytes
        return isend(tensor, dst, **options)

    for step in range(2):
        if step == 1:
            dist.isend = counting  # type: ignore[assignment]
        try:
            optimizer.zero_grad()
            mlp_loss(model, step).backward()
            optimizer.step()
        finally:
            dist.isend = isend  # type: ignore[assignment]
    sent[rank] = optimizer.memory_report().parameter_bytes
    return sent


@pytest.mark.parametrize("stage", [1, 2])
def test_only_a_shard_crosses(stage: int) -> None:
    """Replicas send each other the reduced shard and its mean, and nothing in stage 1."""
    for rank, sent in enumerate(run("gloo", 4, count_sent, (2, 2), stage)):
        flat_bytes = sent[rank]
        inside, across, diagonal = rank ^ 1, rank ^ 2, rank ^ 3
        assert sent[diagonal] == 0
        assert sent[across] == (flat_bytes // 2 if stage == 2 else 0)
        assert sent[inside] <= flat_bytes // 2 * stage


def norms(rank: int, _world_size: int, mesh: tuple[int, int], norm_type: float) -> None:
    """Job: clip gradients, and compare with torch's function on the mean of all ranks' gradients."""
    model = mlp()
    plain = copy.deepcopy(model)
    optimizer = ShardedASGD(model.parameters(), lr=0.1, stage=2, bucket_cap_mb=0.002, mesh=hybrid_mesh(mesh))
    mlp_loss(model, rank).backward()
    for other in range(mesh[0] * mesh[1]):
        (mlp_loss(plain, other) / (mesh[0] * mesh[1])).backward()
    found = optimizer.clip_grad_norm_(0.1, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1, norm_type)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("mesh", [(2, 2), (3, 1)], ids=str)
def test_the_norm_counts_every_element_once(mesh: Any, norm_type: float) -> None:
    """A parameter counts once in the norm, however many replicas hold it."""
    run("gloo", mesh[0] * mesh[1], norms, mesh, norm_type)


def looks_at_the_average(rank: int, world_size: int, mesh: tuple[int, int], path: str) -> None:
    """Job: swap, consolidate to each rank, export; beside torch in this process."""
    model = mlp()
    plain = copy.deepcopy(model)
    optimizer = ShardedASGD(model.parameters(), lr=0.1, t0=1, bucket_cap_mb=0.002, mesh=hybrid_mesh(mesh))
    oracle = torch.optim.ASGD(plain.parameters(), lr=0.1, t0=1)
    for step in range(3):
        for live, net in ((optimizer, model), (oracle, plain)):
            live.zero_grad()
            mlp_loss(net, step).backward()
            live.step()
    before = [p.detach().clone() for p in model.parameters()]
    averages = [oracle.state[p]["ax"] for p in plain.parameters()]
    with optimizer.averaged_parameters():
        for p, average in zip(model.parameters(), averages, strict=True):
            assert_same_bits(p, average, "average")
    for p, kept in zip(model.parameters(), before, strict=True):
        assert_same_bits(p, kept, "parameter")
    for to in range(world_size):
        state = optimizer.consolidated_state_dict(to=to)
        assert bool(state) == (rank == to)
        for index, entry in state.get("state", {}).items():
            assert_same_bits(entry["ax"], averages[index], f"ax of {index} on {to}")
    export_averaged(path, model, optimizer)
    exported = load_file(path)
    for (name, _), average in zip(model.named_parameters(), averages, strict=True):
        assert_same_bits(exported[name], average, name)


@pytest.mark.parametrize("mesh", [(2, 2), (1, 2), (3, 1)], ids=str)
def test_the_average(mesh: Any, tmp_path: Path) -> None:
    """The averages can be swapped in, gathered on any rank, and exported."""
    run("gloo", mesh[0] * mesh[1], looks_at_the_average, mesh, str(tmp_path / "average.safetensors"))


def overflows(rank: int, _world_size: int) -> bool:
    """Job: one rank of one replica has an infinite gradient; whether the step was skipped here."""
    model = mlp()
    optimizer = ShardedASGD(model.parameters(), lr=0.1, stage=2, mesh=hybrid_mesh((2, 2)))
    scaler = dist_asgd.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(mlp_loss(model, rank) * (torch.inf if rank == 3 else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    return all(same_bits(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_an_overflow_in_one_replica_skips_the_step_in_all() -> None:
    """The overflow is found after the reduction, and all ranks skip the step."""
    assert run("gloo", 4, overflows) == [True] * 4


def by_name(_rank: int, _world_size: int, names: tuple[str, str], shape: tuple[int, int]) -> int:
    """Job: how many state elements this rank holds."""
    optimizer = ShardedASGD(mlp().parameters(), mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    return optimizer.memory_report().state_bytes


def test_axes_go_by_name_where_they_have_these_names_and_else_by_place() -> None:
    """One of the names "shard" and "replicate" is enough; without them the first dimension replicates, as in HSDP."""
    one = run("gloo", 3, by_name, ("replicate", "shard"), (3, 1))[0]
    third = run("gloo", 3, by_name, ("replicate", "shard"), (1, 3))[0]
    assert third < one
    assert run("gloo", 3, by_name, ("shard", "replicate"), (3, 1))[0] == third
    assert run("gloo", 3, by_name, ("shard", "dp"), (3, 1))[0] == third
    assert run("gloo", 3, by_name, ("fsdp", "replicate"), (3, 1))[0] == third
    assert run("gloo", 3, by_name, ("dp", "shard"), (3, 1))[0] == one
    assert run("gloo", 3, by_name, ("dp", "fsdp"), (3, 1))[0] == one


def one_dimension(_rank: int, world_size: int) -> None:
    """Job: a mesh of one dimension is its ranks."""
    mesh = init_device_mesh("cpu", (world_size,))
    flat = ShardedASGD(mlp().parameters(), lr=0.1).memory_report()
    assert ShardedASGD(mlp().parameters(), lr=0.1, mesh=mesh).memory_report() == flat


def test_a_mesh_of_one_dimension_shards_over_it() -> None:
    """A mesh with one dimension acts as ``process_group`` with its ranks."""
    run("gloo", 2, one_dimension)


def train_beside(model: Any, optimizer: ShardedASGD, seed: int) -> None:
    """Steps beside torch in this process on equal data; to the bit."""
    plain = copy.deepcopy(model)
    oracle = torch.optim.ASGD(plain.parameters(), lr=0.1, t0=1)
    for step in range(3):
        for live, net in ((optimizer, model), (oracle, plain)):
            live.zero_grad()
            mlp_loss(net, seed + step).backward()
            live.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same_bits(p, q, "parameter")


def part_of_the_ranks(rank: int, _world_size: int, stage: int) -> None:
    """Job: a mesh of four of five ranks, beside an optimizer on all of them."""
    mesh = DeviceMesh("cpu", [[1, 2], [3, 4]], mesh_dim_names=("replicate", "shard"))
    everyone = mlp()
    wide = ShardedASGD(everyone.parameters(), lr=0.1, t0=1, bucket_cap_mb=0.002)
    if rank > 0:
        model = mlp()
        narrow = ShardedASGD(model.parameters(), lr=0.1, t0=1, stage=stage, bucket_cap_mb=0.002, mesh=mesh)
        train_beside(model, narrow, 10)
        assert bool(narrow.consolidated_state_dict(to=2)) == (rank == 3)
    else:
        with pytest.raises(ValueError, match="not in the mesh"):
            ShardedASGD(mlp().parameters(), mesh=mesh)
    train_beside(everyone, wide, 20)


@stages
def test_a_mesh_of_some_ranks_beside_an_optimizer_on_all(stage: int) -> None:
    """Neither optimizer disturbs the other, and ``to`` counts ranks within the mesh."""
    run("gloo", 5, part_of_the_ranks, stage)


def is_tensor(found: object) -> bool:
    """Whether it is a tensor with memory."""
    return isinstance(found, Tensor) and found.layout == torch.strided and not found.is_meta


def holds(rank: int, _world_size: int) -> None:
    """Job: compare the tensors that live between steps with those that should."""
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicate", "shard"))
    net = nn.Sequential(nn.Embedding(20_000, 16), nn.Linear(16, 1))
    num_groups = dist.get_pg_count()
    optimizer = ShardedASGD(net.parameters(), stage=2, mesh=mesh, shared_memory=False)
    assert dist.get_pg_count() == num_groups  # so that the default group's timeout holds
    for step in range(2):
        optimizer.zero_grad()
        net(torch.arange(rank, 50 + step)).sum().backward()
        optimizer.step()
    gc.collect()
    known = {param.untyped_storage().data_ptr() for param in net.parameters()}
    large = [
        found
        for found in gc.get_objects()
        if is_tensor(found) and found.untyped_storage().nbytes() >= net[0].weight.nbytes
    ]
    assert not [found for found in large if found.untyped_storage().data_ptr() not in known]
    kept = {s.data_ptr(): s.nbytes() for s in map(Tensor.untyped_storage, filter(is_tensor, gc.get_objects()))}
    belonging = [*net.parameters(), *(optimizer.state[p]["ax"] for p in net.parameters())]
    for tensor in (*belonging, *(bucket.gradient for bucket in optimizer.shards.buckets)):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    beside = sum(kept.values())
    assert 0 < optimizer.memory_report().in_flight_bytes <= beside


def test_between_steps_no_whole_gradient_is_held_no_group_made_and_no_byte_counted_twice() -> None:
    """The last bucket's gradient is sent from its own memory and then freed, as the others are."""
    run("gloo", 4, holds)


# --- what is refused ---------------------------------------------------------------------------------------


def refused(rank: int, _world_size: int, how: str) -> None:
    """Job: construct on a mesh that is not supported."""
    mesh: Any = hybrid_mesh((2, 2))
    options: dict[str, Any] = {}
    if how == "with a group" or (how == "one with a group" and rank == 3):
        options["process_group"] = dist.group.WORLD
    elif how == "three dimensions":
        mesh = init_device_mesh("cpu", (1, 2, 2))
    elif how == "no mesh" or (how == "one without" and rank == 3):
        mesh = (2, 2)
    elif how == "not ascending":
        mesh = DeviceMesh("cpu", [[0, 1], [3, 2]])
    elif how == "other meshes":
        other = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("replicate", "shard"))
        mesh = other if rank == 3 else mesh
    ShardedASGD(mlp().parameters(), mesh=mesh, **options)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("with a group", "process_group and mesh are both given"),
        ("three dimensions", "mesh must have two dimensions"),
        ("no mesh", "mesh must be a DeviceMesh, got tuple"),
        ("one with a group", "both given.*on rank 3 of 4"),
        ("one without", "got tuple.*on rank 3 of 4"),
        ("not ascending", "do not ascend along its dimensions"),
        ("other meshes", "mesh: ranks 0-2 have .* rank 3 has"),
    ],
)
def test_what_is_refused(how: str, says: str) -> None:
    """Every rank raises, and the error says what to do instead."""
    for error in run_errors("gloo", 4, refused, how):
        assert error.type_name == "ValueError"
        assert re.search(says, error.message, re.DOTALL), error.message


def dies(rank: int, _world_size: int) -> None:
    """Job: a rank of the second replica dies between backward and step."""
    model = mlp()
    optimizer = ShardedASGD(model.parameters(), stage=2, bucket_cap_mb=0.002, mesh=hybrid_mesh((2, 2)))
    for step in range(5):
        optimizer.zero_grad()
        mlp_loss(model, step).backward()
        if rank == 3 and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()


def test_a_rank_of_another_replica_that_dies() -> None:
    """Every other rank raises soon, also one that shares neither shard nor replica with the dead one."""
    for outcome in outcomes("gloo", 4, dies)[:3]:
        assert outcome.error is not None
        assert outcome.error.type_name == "PeerError"
        assert outcome.seconds < 10
