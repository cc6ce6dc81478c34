"""The strategy of NCCL with values, on four Gloo ranks: in time, and with every collective as late as it may be."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from dist_asgd import ShardedASGD, export_averaged, load_checkpoint, save_checkpoint
from dist_asgd.comm import Communicators
from dist_asgd.comm.native import NativeCollectives
from tests.harness.bits import assert_same_bits, same_bits
from tests.harness.cases import every_value
from tests.harness.meshes import hybrid_mesh
from tests.harness.native import LateCollectives, late_streams, native_collectives
from tests.harness.ranks import run

OPTIONS: dict[str, Any] = {"lr": 0.1, "t0": 3, "weight_decay": 0.01, "bucket_cap_mb": 0.003}
MODES: dict[str, dict[str, Any]] = {
    "stage1": {"stage": 1},
    "stage2": {"stage": 2},
    "hybrid": {"stage": 2, "mesh": (2, 2)},
    "hybrid-stage1": {"stage": 1, "mesh": (2, 2)},
    "replicas": {"stage": 2, "mesh": (4, 1)},
}


def net() -> nn.Sequential:
    """A model of several buckets, with sizes that no number of ranks divides."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 65), nn.Linear(65, 7), nn.Linear(7, 1, bias=False))


def gradients(model: nn.Module, step: int, rank: int) -> list[Tensor]:
    """The gradients of one rank: small integers, whose sums are exact; every third step the first has none."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    drawn = [torch.randint(-8, 8, p.shape, generator=generator).to(p.dtype) for p in model.parameters()]
    return drawn[step % 3 == 1 :]


def backward(model: nn.Module, step: int, rank: int) -> None:
    """Run a backward that gives these gradients."""
    drawn = gradients(model, step, rank)
    params = list(model.parameters())[-len(drawn) :]
    torch.stack([(p * g).sum() for p, g in zip(params, drawn, strict=True)]).sum().backward()


def clip_in_double(params: list[nn.Parameter], max_norm: float) -> Tensor:
    """Clip as the optimizer does: by a norm in double precision."""
    given = [p.grad for p in params if p.grad is not None]
    total = torch.stack([g.double().square().sum() for g in given]).sum().sqrt()
    for gradient in given:
        gradient.mul_(torch.clamp(max_norm / (total + 1e-6), max=1.0))
    return total


def trains_on_late_streams(rank: int, world_size: int, mode: str, folder: str) -> None:
    """Job: the same with gradients that travel on a stream which is behind that of the computation."""
    with late_streams() as made:
        trains(rank, world_size, mode, {"foreach": False}, {"averages": True, "late": True}, folder)
    assert made
    assert any(one.num_run for one in made)


def trains(rank: int, world_size: int, mode: str, options: dict[str, Any], how: dict[str, bool], folder: str) -> None:
    """Job: eight steps beside torch on the mean gradients; accumulation, clipping, all gathers, and a checkpoint."""
    arguments = dict(MODES[mode])
    if "mesh" in arguments:
        arguments["mesh"] = hybrid_mesh(arguments["mesh"])
    arguments |= OPTIONS | options
    with native_collectives(**how) as made:
        model, plain = net(), net()
        optimizer = ShardedASGD(model.named_parameters(), **arguments)
        foreach = bool(options.get("foreach"))
        theirs = {key: OPTIONS[key] for key in ("lr", "t0", "weight_decay")}
        oracle = torch.optim.ASGD(plain.parameters(), **theirs, foreach=foreach)
        for step in range(8):
            train_step(rank, world_size, optimizer, model, plain, step)
            oracle.step()
            optimizer.zero_grad()
            for name, p, q in zip(dict(model.named_parameters()), model.parameters(), plain.parameters(), strict=True):
                assert_same_bits(p, q, f"{name} after step {step}")
        assert made
        assert {type(one) for one in made} == {LateCollectives if how["late"] else NativeCollectives}
        check_gathers(rank, optimizer, model, [oracle.state[q]["ax"] for q in plain.parameters()])
        check_files(folder, optimizer, model, arguments)


def train_step(
    rank: int, world_size: int, optimizer: ShardedASGD, model: nn.Module, plain: nn.Module, step: int
) -> None:
    """One step of both, of which the other's is left to the caller: with one backward, two, or one inside no_sync."""
    drawn = [gradients(model, step, other) for other in range(world_size)]
    mean = [torch.stack(list(same)).mean(0) for same in zip(*drawn, strict=True)]
    times = 1
    if not optimizer.reduces_gradients:
        for p, gradient in zip(list(model.parameters())[-len(mean) :], mean, strict=True):
            p.grad = gradient.clone()
    elif step % 4 == 2:
        times = 2
        with optimizer.no_sync():
            backward(model, step, rank)
        backward(model, step, rank)
    else:
        times = 2 if step % 4 == 3 else 1
        for _ in range(times):
            backward(model, step, rank)
    for q in plain.parameters():
        q.grad = None
    params = list(plain.parameters())
    for q, gradient in zip(params[-len(mean) :], mean, strict=True):
        q.grad = gradient * times
    if step in (3, 5):
        if optimizer.reduces_gradients:
            found, expected = optimizer.clip_grad_norm_(0.5), clip_in_double(params, 0.5)
        else:
            found, expected = optimizer.clip_grad_norm_(0.5), nn.utils.clip_grad_norm_(params, 0.5)
        assert_same_bits(found, expected.float(), "norm")
    optimizer.step()


def check_gathers(rank: int, optimizer: ShardedASGD, model: nn.Module, averages: list[Tensor]) -> None:
    """State on one rank and on all, and the averages in place of the parameters."""
    for to in (1, None):
        state = optimizer.consolidated_state_dict(to=to)
        assert bool(state) == (to is None or to == rank)
        for index, entry in state.get("state", {}).items():
            assert_same_bits(entry["ax"], averages[index], f"ax of {index}")
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.averaged_parameters():
        for p, average in zip(model.parameters(), averages, strict=True):
            assert_same_bits(p, average, "average in place")
    for p, kept in zip(model.parameters(), before, strict=True):
        assert_same_bits(p, kept, "parameter after averages")


def check_files(folder: str, optimizer: ShardedASGD, model: nn.Module, arguments: dict[str, Any]) -> None:
    """An export, and a checkpoint loaded by another optimizer."""
    export_averaged(f"{folder}/average.safetensors", model, optimizer)
    save_checkpoint(f"{folder}/checkpoint", model, optimizer, step=8)
    again = net()
    loaded = ShardedASGD(again.named_parameters(), **arguments)
    load_checkpoint(f"{folder}/checkpoint", again, loaded)
    exported = load_file(f"{folder}/average.safetensors")
    state = loaded.consolidated_state_dict(to=None)["state"]
    for index, (name, p) in enumerate(model.named_parameters()):
        assert_same_bits(dict(again.named_parameters())[name], p, f"{name} after loading")
        assert_same_bits(exported[name], state[index]["ax"], f"{name} in the export")


@every_value(
    mode=["stage1", "stage2", "hybrid", "hybrid-stage1", "replicas", "stage2", "hybrid"],
    averages=[True, True, True, False, True, False, False],
    late=[True, True, True, True, False, False, True],
)
def test_training_is_torch_to_the_bit(mode: str, averages: bool, late: bool, tmp_path: Path) -> None:
    """Contiguous buckets and means by the backend, or sums; for the mean of NCCL see ``averages``."""
    run("gloo", 4, trains, mode, {"foreach": False}, {"averages": averages, "late": late}, str(tmp_path))


@every_value(
    mode=["hybrid", "stage2"],
    options=[{"foreach": True}, {"reduce_dtype": torch.float64, "foreach": False}],
)
def test_late_collectives_in_other_implementations(mode: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The foreach implementation, and gradients that are sent in another dtype than they are kept in."""
    run("gloo", 4, trains, mode, options, {"averages": True, "late": True}, str(tmp_path))


@pytest.mark.parametrize("mode", ["stage2", "hybrid", "replicas"])
def test_gradients_on_a_stream_of_their_own(mode: str, tmp_path: Path) -> None:
    """Nobody reads a shard before it has waited for the stream, nor overwrites what the stream has yet to read."""
    run("gloo", 4, trains_on_late_streams, mode, str(tmp_path))


def replicas_train(rank: int, _world_size: int, late: bool) -> None:
    """Job: FSDP2 on two replicas, which share their state: uneven gathers inside of replica groups."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    with native_collectives(late=late) as made:
        model, plain = net(), net()
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = ShardedASGD(model.named_parameters(), **OPTIONS, foreach=False)
        single = ShardedASGD(plain.named_parameters(), **OPTIONS, foreach=False, process_group=dist.new_group([rank]))
        for step in range(5):
            for p, q, whole in zip(model.parameters(), plain.parameters(), gradients(model, 3 * step, 0), strict=True):
                q.grad = whole.clone()
                p.grad = dist.tensor.distribute_tensor(whole, p.device_mesh, p.placements)
            if step == 2:
                found, expected = optimizer.clip_grad_norm_(0.5), clip_in_double(list(plain.parameters()), 0.5)
                assert_same_bits(found, expected.float(), "norm")
            optimizer.step()
            single.step()
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                assert_same_bits(p.full_tensor(), q, f"parameter after step {step}")
        assert {(0, 2), (1, 3)} & {tuple(one.ranks) for one in made}
        with optimizer.averaged_parameters():
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                assert_same_bits(p.full_tensor(), single.state[q]["ax"].reshape(q.shape), "average")


@pytest.mark.parametrize("late", [True, False], ids=["late", "in time"])
def test_replica_groups_are_torch_to_the_bit(late: bool) -> None:
    """Replica groups gather by native collectives."""
    run("gloo", 4, replicas_train, late)


def reduces(rank: int, world_size: int, native: bool, mesh: tuple[int, int] | None) -> list[Tensor]:
    """Job: what ``reduce_scalars`` makes of numbers of very different sizes, by operation."""
    with native_collectives() if native else contextlib.nullcontext():
        communicators = Communicators(None, None if mesh is None else hybrid_mesh(mesh))
        collectives = communicators.on(torch.device("cpu"))
        generator = torch.Generator().manual_seed(rank)
        values = torch.rand(20, generator=generator, dtype=torch.float64) * 10.0 ** torch.arange(-10, 10)
        values[0] = [0.0, math.inf, 1.0, 2.0][rank]
        values[1] = [0.0, math.nan, 1.0, 2.0][rank]
        rows = [torch.empty_like(values) for _ in range(world_size)]
        dist.all_gather(rows, values)
        table = torch.stack(rows)
        found = [collectives.reduce_scalars(values.clone(), op) for op in ("sum", "max", "min")]
        torch.testing.assert_close(found[0], table.sum(0), rtol=1e-14, atol=0, equal_nan=True)
        assert_same_bits(found[1][2:], table.amax(0)[2:], "max")
        assert_same_bits(found[2][2:], table.amin(0)[2:], "min")
        assert found[0][0] == math.inf
        assert found[0][1].isnan()
        return found


@pytest.mark.parametrize("mesh", [None, (2, 2)], ids=str)
@pytest.mark.parametrize("native", [True, False], ids=["native", "gloo"])
def test_all_ranks_reduce_to_the_same_bits(native: bool, mesh: tuple[int, int] | None) -> None:
    """Norms are equal on all ranks, whatever the order of additions."""
    found = run("gloo", 4, reduces, native, mesh)
    for others in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], others, strict=True))
