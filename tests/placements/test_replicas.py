"""Replica groups share the state of DTensors: the bits of torch.optim.ASGD in 1/R of its memory."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from dist_asgd import ShardedASGD, async_save_checkpoint, load_checkpoint
from dist_asgd.placements.shard_tensor import shard_tensor_of
from tests.harness.bits import assert_same_bits, same_bits
from tests.harness.cases import every_value
from tests.harness.meshes import REPLICATED, dtensors, gradient, local, placed, sharded, whole
from tests.harness.ranks import run, run_errors

OPTIONS: dict[str, Any] = {"lr": 0.1, "lambd": 0.01, "t0": 3, "weight_decay": 0.02}
FORMS: list[dict[str, Any]] = [{"fused": True}, {"foreach": False, "fused": False}, {"foreach": True}]
R, S = Replicate(), Shard(0)
# The number of ranks, the mesh's shape, the placements, and the size of a replica group.
MESHES: list[tuple[int, tuple[int, ...], tuple[Placement, ...], int]] = [
    (4, (2, 2), (R, S), 2),
    (4, (2, 2), (S, R), 2),
    (4, (2, 2), (R, R), 4),
    (4, (4, 1), (R, S), 4),
    (4, (2, 1, 2), (R, Shard(1), R), 4),
    (3, (3,), (R,), 3),
    (2, (2, 1), (R, S), 2),
    (4, (1, 4), (R, S), 1),
]
# Small shapes are packed, some have no elements on some rank, and large ones are sent from their own memory.
SHAPES = ((7, 5), (33,), (), (1,), (2, 3, 4), (0, 3), (301, 517), (64, 2), (3, 90_001))


def _values(dtype: torch.dtype = torch.float32, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [value.t().contiguous().t() if value.shape == (64, 2) else value for value in values]


def _placed(values: list[Tensor], mesh: DeviceMesh, placements: tuple[Placement, ...]) -> list[nn.Parameter]:
    """Place ``value`` by ``placements`` if it has their dimensions, else replicated."""
    params = []
    for value in values:
        fitting = [p if not isinstance(p, Shard) or p.dim < value.dim() else R for p in placements]
        params.append(nn.Parameter(distribute_tensor(value, mesh, fitting, src_data_rank=None)))
    return params


def _set(params: list[Any], step: int, skipped: set[int]) -> None:
    for index, param in enumerate(params):
        full = gradient(f"p{index}", step, param)
        param.grad = None if index in skipped else placed(full, param)


def _history(seed: int, count: int, num_steps: int = 9) -> list[tuple[set[int], float]]:
    """Draw which of ``count`` parameters have no gradient, and the lr, for each step."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(num_steps):
        absent = torch.rand(count, generator=generator) < 0.25
        lr = 0.05 + 0.1 * torch.rand((), generator=generator).item()
        steps.append((set(absent.nonzero().flatten().tolist()), lr))
    return steps


def _assert_same(params: list[Any], optimizer: Any, others: list[Any], oracle: Any, what: str) -> None:
    for index, (param, other) in enumerate(zip(params, others, strict=True)):
        assert_same_bits(whole(param), whole(other), f"parameter {index} {what}")
        mine, theirs = optimizer.state[param], oracle.state.get(other, {})
        for key, value in theirs.items():
            found = whole(mine[key]) if key == "ax" else mine[key]
            assert_same_bits(found, whole(value) if key == "ax" else value, f"{key} of {index} {what}")


def _lives(
    _: int, __: int, shape: tuple[int, ...], placements: tuple[Placement, ...], copies: int, form: dict[str, bool]
) -> None:
    mesh = init_device_mesh("cpu", shape)
    params, apart = (_placed(_values(), mesh, placements) for _ in range(2))
    plain = [nn.Parameter(value) for value in _values()]
    options = {**OPTIONS, **form, "bucket_cap_mb": 0.7}
    optimizer = ShardedASGD(params, **options)
    unshared = ShardedASGD(apart, **options, shard_replicated=False)
    oracle = torch.optim.ASGD(plain, **OPTIONS, foreach=form.get("foreach", False))
    for step, (skipped, lr) in enumerate(_history(sum(shape), len(plain))):
        for of, its in ((params, optimizer), (apart, unshared), (plain, oracle)):
            its.param_groups[0]["lr"] = lr
            _set(of, step, skipped)
            its.step()
        for param, other in zip(params, apart, strict=True):
            # The other replicas' fragments have arrived, too.
            assert_same_bits(local(param), local(other), f"local tensor after {step}")
    _assert_same(params, optimizer, plain, oracle, f"with {form}")
    _assert_same(apart, unshared, plain, oracle, f"with {form}, unshared")
    all_bytes = sum(local(param).nbytes for param in params)
    # The padding has 64 bytes for each parameter, and for each rank in every state buffer.
    padding = 64 * (len(params) + copies * len(optimizer.shards.presharded))
    assert optimizer.memory_report().state_bytes <= all_bytes / copies + padding
    assert unshared.memory_report().state_bytes >= all_bytes
    report = optimizer.memory_report()
    assert report.parameter_bytes == all_bytes
    largest = max(buffer.layout.numel * buffer.dtype.itemsize for buffer in optimizer.shards.presharded)
    assert optimizer.gatherer.scratch_bytes <= 2 * largest


@every_value(world=MESHES, form=FORMS)
def test_lives_as_torch_in_a_fraction_of_the_memory(world: tuple[int, Any, Any, int], form: dict[str, bool]) -> None:
    """Random histories run in every implementation, and are compared with replicas that share nothing, too."""
    world_size, *mesh = world
    run("gloo", world_size, _lives, *mesh, form)


def test_other_backends_gather_one_flat_buffer() -> None:
    """NCCL gathers so; the communicator of the harness's threads stands in for it."""
    run("threads", 4, _lives, (2, 2), (R, S), 2, FORMS[0])
    run("threads", 4, _lives, (2, 1, 2), (R, Shard(1), R), 4, FORMS[1])


def _several_state_buffers(_: int, __: int) -> None:
    """Make more state buffers than may be in flight, so that send buffers are used again."""
    mesh = init_device_mesh("cpu", (2, 2))
    values = [torch.full((50, 100), float(index)) for index in range(12)]
    params = _placed(values, mesh, (R, S))
    plain = [nn.Parameter(value.clone()) for value in values]
    optimizer = ShardedASGD(params, **OPTIONS, bucket_cap_mb=0.02)
    oracle = torch.optim.ASGD(plain, **OPTIONS, foreach=False)
    assert len(optimizer.shards.presharded) == 6
    for step in range(5):
        _set(params, step, set())
        _set(plain, step, set())
        optimizer.step()
        oracle.step()
    _assert_same(params, optimizer, plain, oracle, "in several state buffers")


@pytest.mark.parametrize("backend", ["gloo", "threads"])
def test_state_buffers_are_gathered_one_after_the_other(backend: str) -> None:
    """At most two state buffers are in flight."""
    run(backend, 4, _several_state_buffers)


# --- precision --------------------------------------------------------------------------------------------------


def _precision(
    _: int,
    __: int,
    dtype: torch.dtype,
    options: dict[str, Any],
    placements: tuple[Placement, ...],
    form: dict[str, bool],
) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    # Random numbers are drawn by place, so parameters that lie transposed in memory are refused.
    values = [value.contiguous() if options.get("stochastic_rounding") else value for value in _values(dtype)]
    params, apart = (_placed([v.clone() for v in values], mesh, placements) for _ in range(2))
    optimizer = ShardedASGD(params, **OPTIONS, **form, **options)
    unshared = ShardedASGD(apart, **OPTIONS, **form, **options, shard_replicated=False)
    for step in range(6):
        for of, its in ((params, optimizer), (apart, unshared)):
            _set(of, step, {1} if step == 2 else set())
            its.step()
    _assert_same(params, optimizer, apart, unshared, f"{dtype} {options}")
    mine, theirs = (its.consolidated_state_dict(to=None)["state"] for its in (optimizer, unshared))
    for index, entry in theirs.items():
        assert mine[index].keys() == entry.keys()
        for key, value in entry.items():
            assert_same_bits(mine[index][key], value, f"{key} of {index}")
    again = ShardedASGD(params, **OPTIONS, **form, **options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _assert_same(params, again, params, optimizer, "loaded again")
    again = ShardedASGD(params, **OPTIONS, **form, **options)
    with torch.no_grad():
        for param in params:
            param.zero_()
    again.load_state_dict(theirs_with_groups(unshared, theirs))
    if options.get("master_weights"):
        # Masters set the parameters, but each replica has masters of its fragment only.
        for param, other in zip(params, apart, strict=True):
            assert_same_bits(local(param), local(other), "after loading masters")


def theirs_with_groups(optimizer: Any, state: Any) -> dict[str, Any]:
    """Make a whole state dict from ``state``."""
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


@every_value(
    kind=[
        (torch.bfloat16, {}),
        (torch.bfloat16, {"average_dtype": torch.bfloat16}),
        (torch.bfloat16, {"master_weights": True}),
        (torch.float16, {"master_weights": True}),
        (torch.bfloat16, {"stochastic_rounding": 11}),
        (torch.float64, {}),
        (torch.complex64, {}),
        (torch.float32, {"average_dtype": torch.float64}),
    ],
    placements=[(R, S), (R, R), (R, S)],
    form=FORMS[:2],
)
def test_precision_does_not_depend_on_who_updates(
    kind: tuple[torch.dtype, dict[str, Any]], placements: tuple[Placement, ...], form: dict[str, bool]
) -> None:
    """Masters, random numbers, wider averages, 16-bit lanes and complex parameters are the same for every sharding."""
    run("gloo", 4, _precision, *kind, placements, form)


# --- state entries -----------------------------------------------------------------------------------------------


def _stepped(mesh_shape: tuple[int, ...] = (2, 2), **options: Any) -> tuple[list[nn.Parameter], ShardedASGD]:
    params = _placed(_values(), init_device_mesh("cpu", mesh_shape), (R, S))
    optimizer = ShardedASGD(params, **{**OPTIONS, **options})
    for step in range(5):
        _set(params, step, set())
        optimizer.step()
    return params, optimizer


def _shows(_: int, __: int) -> None:
    params, optimizer = _stepped()
    param = params[8]
    shown = optimizer.state[param]["ax"]
    assert isinstance(shown, DTensor)
    assert (shown.shape, shown.placements, shown.device_mesh) == ((3, 90_001), param.placements, param.device_mesh)
    part = shown.to_local()
    assert part.shape == (shard_tensor_of(shown).to_local().numel(),)
    assert 0 < part.numel() < local(param).numel()
    for wrong in (
        lambda: shown + 1,
        lambda: torch.zeros(3, 90_001).add_(shown),
        lambda: shown.mul_(2),
        lambda: shown.to(torch.float64),
        lambda: shown.to(dtype=torch.float32, device="cpu"),
        lambda: shown.double(),
        lambda: shown[0],
        lambda: shard_tensor_of(shown).copy_(torch.zeros(3)),
    ):
        with pytest.raises(RuntimeError, match="one rank's part"):
            wrong()
    everything = whole(shown)
    for same in (shown.detach(), shown.clone(), copy.deepcopy(shown), shown.to("cpu"), shown.cpu()):
        assert_same_bits(whole(same), everything, "a copy")
    assert_same_bits(whole(shown.redistribute(placements=[Shard(1), R])), everything, "redistributed")
    taken = shown.clone()
    # Loaders of full state dicts copy the whole local tensor into the fragment.
    taken.to_local().copy_(placed(everything + 1, param).to_local())
    assert_same_bits(whole(taken), everything + 1, "copied into")
    taken.to_local().zero_()
    assert not whole(taken).any()
    assert type(taken.to_local() + 1) is Tensor
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    loaded = torch.load(io.BytesIO(stream.getvalue()))
    with pytest.raises(RuntimeError, match="consolidated_state_dict"):
        loaded["state"][8]["ax"].full_tensor()
    again = ShardedASGD(params, lr=7.0)
    again.load_state_dict(loaded)
    assert_same_bits(whole(again.state[param]["ax"]), everything, "saved by torch.save")


def test_state_is_a_dtensor_placed_like_its_parameter() -> None:
    """Each replica has a fragment of it, which can be copied, saved and gathered; nothing takes it for the whole."""
    run("gloo", 4, _shows)


def _boxes(_: int, world_size: int) -> None:
    for kind in REPLICATED:
        model = sharded(kind, world_size)
        optimizer = ShardedASGD(dict(dtensors(model)).items(), lr=0.1)
        num_shared = 0
        for name, param in dtensors(model):
            part = shard_tensor_of(optimizer.state[param]["ax"])
            if part is None:
                assert not any(p.is_replicate() for p in param.placements), name
                continue
            places = torch.zeros(param.shape, dtype=torch.int64)
            for (offsets, sizes), view in part.regions():
                assert tuple(view.shape) == sizes
                places[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] += 1
            dist.all_reduce(places)
            # Parameters that only FSDP2 has sharded have a mesh for each rank of tensor parallelism.
            num_meshes = world_size // param.device_mesh.size()
            assert (places == num_meshes).all(), f"{kind} {name}: {places}"
            num_shared += 1
        assert num_shared, kind


def test_regions_of_all_ranks_tile_every_parameter() -> None:
    """They do so for FSDP2 on top of tensor parallelism, too."""
    run("gloo", 4, _boxes)


# --- loading ----------------------------------------------------------------------------------------------------


def _loads_of_others(_: int, __: int, what: str) -> None:
    params, optimizer = _stepped(shard_replicated=what != "unshared")
    saved = copy.deepcopy(optimizer.state_dict())
    if what == "other state buffers":
        ShardedASGD(params, lr=7.0, bucket_cap_mb=0.3).load_state_dict(saved)
    if what == "into unshared":
        ShardedASGD(params, lr=7.0, shard_replicated=False).load_state_dict(saved)
    again = ShardedASGD(params, lr=7.0)
    again.load_state_dict(saved)
    _assert_same(params, again, params, optimizer, "loaded")


def test_loads_what_unshared_replicas_saved() -> None:
    """Those state dicts have whole local tensors."""
    run("gloo", 4, _loads_of_others, "unshared")


@pytest.mark.parametrize("what", ["other state buffers", "into unshared"])
def test_fragments_that_do_not_fit_are_refused(what: str) -> None:
    """The error names the remedy."""
    for error in run_errors("gloo", 4, _loads_of_others, what, within_s=20.0):
        assert "this rank holds elements" in error.message
        assert "shard_replicated" in error.message


def _saves(_: int, __: int, folder: str) -> None:
    model, other = sharded("hsdp", 4), sharded("hsdp", 4, seed=5)
    optimizer = ShardedASGD(model.named_parameters(), **OPTIONS)
    second = ShardedASGD(other.named_parameters(), **OPTIONS)
    for step in range(5):
        for name, param in model.named_parameters():
            param.grad = placed(gradient(name, step, param), param)
        optimizer.step()
    before = optimizer.consolidated_state_dict(to=None)
    handle = async_save_checkpoint(f"{folder}/ours", model, optimizer, step=5)
    for name, param in model.named_parameters():
        param.grad = placed(gradient(name, 9, param), param)
    optimizer.step()
    handle.wait()
    load_checkpoint(f"{folder}/ours", other, second)
    for index, entry in second.consolidated_state_dict(to=None)["state"].items():
        assert_same_bits(entry["ax"], before["state"][index]["ax"], f"ax of {index} from the background")
    # Each element is written once, by the replica that has it.
    written = dcp.FileSystemReader(f"{folder}/ours").read_metadata().state_dict_metadata
    for name, param in model.named_parameters():
        chunks = written[f"optim.state.{name}.ax"].chunks
        assert sum(chunk.sizes.numel() for chunk in chunks) == param.numel()


def test_checkpoints_are_written_in_the_background(tmp_path: Any) -> None:
    """Training goes on meanwhile."""
    run("gloo", 4, _saves, str(tmp_path))


# --- ranks ------------------------------------------------------------------------------------------------------


def _differs(rank: int, __: int, shared: bool) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    params = _placed(_values(), mesh, (R, S))
    if rank == 2:
        params[1].to_local().data[3] += 1
    optimizer = ShardedASGD([(f"p{i}", p) for i, p in enumerate(params)], lr=0.1, shard_replicated=shared)
    _set(params, 0, set())
    optimizer.step()


def test_replicas_that_start_from_other_values_are_refused() -> None:
    """Every rank raises, also those outside of the replica group: its fragments would be of different tensors."""
    for error in run_errors("gloo", 4, _differs, True, within_s=20.0):
        assert "parameter p1 does not start from the same values on ranks 0, 2" in error.message
    run("gloo", 4, _differs, False)


def _some_options(rank: int, __: int) -> None:
    params = _placed(_values(), init_device_mesh("cpu", (2, 1)), (R, S))
    ShardedASGD(params, lr=0.1, shard_replicated=rank == 0)


def test_ranks_agree_on_the_option() -> None:
    """They raise if the option differs."""
    for error in run_errors("gloo", 2, _some_options):
        assert "shard_replicated: rank 0 has True; rank 1 has False" in error.message
    with pytest.raises(ValueError, match="shard_replicated must be True or False"):
        ShardedASGD([nn.Parameter(torch.zeros(2))], shard_replicated=1)  # type: ignore[arg-type]


def _of_a_sub_group(rank: int, __: int) -> None:
    groups = [(members, dist.new_group(members), DeviceMesh("cpu", members)) for members in ([0, 3], [1, 2])]
    ranks, group, mesh = groups[0 if rank in (0, 3) else 1]
    values, optimizers = _values(), []
    for seed in (0, 1):
        params = _placed([value + seed for value in values], mesh, (R,))
        plain = [nn.Parameter(value + seed) for value in values]
        ours = ShardedASGD(params, **OPTIONS, process_group=group)
        optimizers.append((params, ours, plain, torch.optim.ASGD(plain, **OPTIONS, foreach=False)))
    for step in range(5):
        for params, ours, plain, oracle in optimizers:
            # The two sub-groups have different gradients.
            _set(params, step + ranks[0], set())
            _set(plain, step + ranks[0], set())
            ours.step()
            oracle.step()
    for params, ours, plain, oracle in optimizers:
        _assert_same(params, ours, plain, oracle, f"on {ranks}")


def test_two_optimizers_on_each_of_two_sub_groups() -> None:
    """No optimizer disturbs another."""
    run("gloo", 4, _of_a_sub_group)


def _on_several_meshes(_: int, __: int) -> None:
    both, rows = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    few = DeviceMesh("cpu", [0, 1])
    values = _values()
    places = [(both, (R,)), (rows, (R, S)), (rows, (S, R)), (few, (R,))]
    params = [p for i, v in enumerate(values) for p in _placed([v], *places[i % len(places)])]
    plain = [nn.Parameter(value.clone()) for value in values]
    optimizer = ShardedASGD([*params, extra := nn.Parameter(torch.ones(5))], **OPTIONS)
    other = nn.Parameter(torch.ones(5))
    oracle = torch.optim.ASGD([*plain, other], **OPTIONS, foreach=False)
    for step in range(5):
        # Ranks outside of a mesh have gradients too, without elements.
        _set([*params, extra], step, {step})
        _set([*plain, other], step, {step})
        optimizer.step()
        oracle.step()
    for param, value in zip(params, plain, strict=True):
        if param.device_mesh.get_coordinate() is not None:
            assert_same_bits(whole(param), value, "parameter")
            assert_same_bits(whole(optimizer.state[param]["ax"]), oracle.state[value]["ax"], "ax")
    assert_same_bits(extra, other, "a plain one")


def test_meshes_mix() -> None:
    """One group has several meshes, one of them without all ranks, and a plain parameter."""
    run("gloo", 4, _on_several_meshes)


def _clips(_: int, __: int, shared: bool) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    for norm_type in (2.0, 1.0, 0.0, float("inf"), -1.0):
        params = _placed(_values(), mesh, (R, S))
        plain = [nn.Parameter(value) for value in _values()]
        optimizer = ShardedASGD(params, lr=0.1, shard_replicated=shared)
        # torch has no infinite norm of an empty tensor.
        _set(params, 0, {1, 5})
        _set(plain, 0, {1, 5})
        found = optimizer.clip_grad_norm_(0.5, norm_type)
        expected = torch.nn.utils.clip_grad_norm_(plain, 0.5, norm_type)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("shared", [True, False])
def test_every_element_counts_once_in_the_norm(shared: bool) -> None:
    """It does not matter which rank has its fragment."""
    run("gloo", 4, _clips, shared)


# --- averages ---------------------------------------------------------------------------------------------------


def _averages(_: int, world_size: int, kind: str, dtype: torch.dtype) -> None:
    models = [sharded(kind, world_size, dtype=dtype) for _ in range(2)]
    params, others = (list(dict(dtensors(model)).values()) for model in models)
    options: dict[str, Any] = {"lr": 0.1, "t0": 1, "foreach": False}
    optimizer, unshared = ShardedASGD(params, **options), ShardedASGD(others, **options, shard_replicated=False)
    for step in range(5):
        for of, its in ((params, optimizer), (others, unshared)):
            _set(of, step, set())
            its.step()
    before = [local(param).detach().clone() for param in params]
    with optimizer.averaged_parameters(), unshared.averaged_parameters():
        for param, other in zip(params, others, strict=True):
            assert_same_bits(local(param), local(other), "average")
        assert not all(same_bits(local(p), b) for p, b in zip(params, before, strict=True))
    for param, own in zip(params, before, strict=True):
        assert_same_bits(local(param), own, "parameter afterwards")


@every_value(kind=REPLICATED, dtype=(torch.float32, torch.bfloat16))
def test_averages_reach_every_replica(kind: str, dtype: torch.dtype) -> None:
    """Averages are swapped in place, or set aside if they are wider than the parameters."""
    run("gloo", 4, _averages, kind, dtype)
