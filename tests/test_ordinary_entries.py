"""What users keep in ``optimizer.state`` beside step, eta, mu and ax is saved and loaded as in torch; so are names."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dist_asgd import ShardedASGD, async_save_checkpoint, load_checkpoint, save_checkpoint
from dist_asgd.checkpoint.offline.contents import CheckpointContents
from dist_asgd.checkpoint.offline.convert import consolidate
from tests.harness.bits import same_bits, same_tree
from tests.harness.ranks import run, run_errors

both = pytest.mark.parametrize("stage", [1, 2])
worlds = pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
HYPERPARAMETERS: dict[str, Any] = {"lr": 0.1, "t0": 0}


def make(cls: type, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, Any]:
    """A model of two parameters, the same on every rank, and an optimizer of it."""
    model = nn.Linear(5, 3, dtype=dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.arange(param.numel()).reshape(param.shape))
    return model, cls(model.parameters(), **HYPERPARAMETERS, **options)


def steps(model: nn.Module, optimizer: Any, count: int) -> None:
    """Take steps with gradients of ones."""
    for _ in range(count):
        optimizer.zero_grad()
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()


def put_all(model: nn.Module, optimizer: Any) -> None:
    """Own entries of every kind."""
    weight = next(model.parameters())
    optimizer.state["samples_seen"] = 640
    optimizer.state["loss"] = {"ema": torch.tensor(0.5), "history": [1.0, (2, None)]}
    entry = optimizer.state[weight]
    entry["grad_ema"] = torch.arange(15.0).reshape(3, 5)
    entry["wide"] = torch.arange(15.0, dtype=torch.float64).reshape(3, 5)
    entry["rows"] = torch.arange(3.0)
    entry["seen"] = torch.tensor(7)
    entry["count"] = 3
    entry["nested"] = {"step": torch.tensor(2.0, dtype=torch.float64), "pair": (torch.ones(2), 4), 5: [None]}
    entry["a.b"] = 0.25


def own(model: nn.Module, optimizer: Any) -> tuple[dict[Any, Any], list[dict[Any, Any]]]:
    """The own entries of the optimizer and of each parameter."""
    names = {"step", "eta", "mu", "ax", "master"}
    of_params = [
        {key: value for key, value in optimizer.state.get(p, {}).items() if key not in names}
        for p in model.parameters()
    ]
    return {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}, of_params


def through(way: str, optimizer: Any) -> Any:
    """A state dict, by name of the call that makes it."""
    if way == "consolidated":
        return optimizer.consolidated_state_dict(to=None)
    if way == "consolidate_state_dict":
        rank = optimizer.communicators.rank
        gathered = None
        for to in range(optimizer.communicators.world_size):
            optimizer.consolidate_state_dict(to)
            saved = optimizer.state_dict()
            gathered = saved if to == rank else gathered
        return gathered
    saved = optimizer.state_dict()
    if way == "saved":
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        return torch.load(file, weights_only=True)
    return saved


def travel(_rank: int, _world_size: int, stage: int, way: str, dtype: torch.dtype) -> None:
    """Job: state dicts with own entries, loaded into new optimizers, give what torch's give."""
    model, optimizer = make(ShardedASGD, dtype, stage=stage)
    twin, oracle = make(torch.optim.ASGD, dtype)
    for module, each in ((model, optimizer), (twin, oracle)):
        steps(module, each, 2)
        put_all(module, each)
    saved = through(way, optimizer)
    for module, each in ((model, optimizer), (twin, oracle)):
        assert same_tree(own(module, each), own(model, optimizer))
    fresh, target = make(ShardedASGD, dtype, stage=stage)
    twin, expected = make(torch.optim.ASGD, dtype)
    target.state["gone"] = 1
    target.state[next(fresh.parameters())]["gone"] = 1
    fresh.load_state_dict(model.state_dict())
    target.load_state_dict(saved)
    expected.load_state_dict(copy.deepcopy(oracle.state_dict()))
    assert same_tree(own(fresh, target), own(twin, expected))
    steps(fresh, target, 1)
    steps(model, optimizer, 1)
    assert same_tree(
        target.consolidated_state_dict(to=None)["state"][1], optimizer.consolidated_state_dict(to=None)["state"][1]
    )
    assert same_tree(own(fresh, target), own(twin, expected))
    if way == "consolidated":
        twin, expected = make(torch.optim.ASGD, dtype)
        expected.load_state_dict(saved)
        assert same_tree(own(fresh, target), own(twin, expected))
    target.load_state_dict(oracle.state_dict())
    assert same_tree(own(fresh, target), own(twin, expected))
    target.load_state_dict(make(torch.optim.ASGD, dtype)[1].state_dict())
    assert own(fresh, target) == ({}, [{}, {}])


@both
@worlds
@pytest.mark.parametrize("way", ["state_dict", "saved", "consolidated", "consolidate_state_dict"])
def test_own_entries_travel_in_state_dicts(backend: str, world_size: int, stage: int, way: str) -> None:
    """The values of the optimizer are as they were, those of parameters as torch casts them."""
    run(backend, world_size, travel, stage, way, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_own_entries_are_cast_as_in_torch(dtype: torch.dtype) -> None:
    """To the parameter's dtype if it is a floating-point one."""
    run("none", 1, travel, 1, "state_dict", dtype)


def test_strings_and_arrays_of_users_stay() -> None:
    """torch makes "<generator object ...>" of a string, and cannot load an array."""
    model, optimizer = make(ShardedASGD)
    optimizer.state[model.weight]["tag"] = "abc"
    saved = optimizer.state_dict()
    _, target = make(ShardedASGD)
    target.load_state_dict(saved)
    assert next(iter(target.state.values()))["tag"] == "abc"


def test_state_dicts_refer_to_own_entries_and_full_ones_copy_them() -> None:
    """As ``state_dict()`` of torch does."""
    model, optimizer = make(ShardedASGD)
    put_all(model, optimizer)
    entry = optimizer.state[model.weight]
    assert optimizer.state_dict()["state"][0]["grad_ema"] is entry["grad_ema"]
    assert optimizer.consolidated_state_dict()["state"][0]["grad_ema"] is not entry["grad_ema"]


def hooked(rank: int, world_size: int, stage: int, full: bool) -> Any:
    """Job: what a pre-hook adds, and an error that it raises on one rank."""
    _, optimizer = make(ShardedASGD, stage=stage)
    handle = optimizer.register_state_dict_pre_hook(lambda o: o.state.__setitem__("samples_seen", 640))
    saved = optimizer.consolidated_state_dict() if full else optimizer.state_dict()
    handle.remove()

    def fails(_optimizer: object) -> None:
        raise RuntimeError("no space for samples")

    if rank == 0:
        optimizer.register_state_dict_pre_hook(fails)
    with pytest.raises(RuntimeError, match="no space for samples"):
        optimizer.consolidated_state_dict()
    assert world_size
    return saved.get("state", {}).get("samples_seen")


@both
@worlds
def test_what_a_state_dict_pre_hook_adds_is_saved(backend: str, world_size: int, stage: int) -> None:
    """On the ranks that get the dict. Its error is raised on all of them, and nobody waits."""
    assert run(backend, world_size, hooked, stage, True)[0] == 640
    assert run(backend, world_size, hooked, stage, False) == [640] * world_size


@both
@pytest.mark.parametrize("count", [0, 2])
def test_state_dict_of_one_rank_is_torchs(stage: int, count: int) -> None:
    """Keys, their order, types and values of groups and state; before the first step ours has the state, too."""
    model, optimizer = make(ShardedASGD, stage=stage)
    twin, oracle = make(torch.optim.ASGD, foreach=False)
    steps(model, optimizer, count)
    steps(twin, oracle, count)
    mine, theirs = optimizer.state_dict(), oracle.state_dict()
    for group in (*mine["param_groups"], *theirs["param_groups"]):
        del group["foreach"]
    assert [list(group) for group in mine["param_groups"]] == [list(group) for group in theirs["param_groups"]]
    assert mine["param_groups"] == theirs["param_groups"]
    for index, state in theirs["state"].items():
        assert list(mine["state"][index]) == list(state)
        assert same_tree(mine["state"][index], state)


@both
@worlds
def test_fresh_parameters_with_own_entries(backend: str, world_size: int, stage: int) -> None:
    """They have a whole state in full dicts, with which torch goes on."""
    run(backend, world_size, fresh_ones, stage)


def fresh_ones(_rank: int, _world_size: int, stage: int) -> None:
    """Job: before the first step, with a frozen parameter."""
    model, optimizer = make(ShardedASGD, stage=stage)
    model.bias.requires_grad_(False)
    for param in model.parameters():
        optimizer.state[param]["grad_ema"] = torch.full_like(param, 0.25)
    saved = optimizer.consolidated_state_dict(to=None)
    twin, oracle = make(torch.optim.ASGD)
    oracle.load_state_dict(saved)
    steps(twin, oracle, 2)
    assert optimizer.state_dict()["state"][1]["grad_ema"].tolist() == [0.25] * 3
    steps(model, optimizer, 2)
    assert same_bits(model.weight, twin.weight)
    assert optimizer.consolidated_state_dict(to=None)["state"][1]["grad_ema"].tolist() == [0.25] * 3


def frozen_ones(_rank: int, world_size: int, stage: int, path: str) -> None:
    """Job: a parameter that was never trained has own entries and no state, also where it is trained later."""

    def build(frozen: bool) -> tuple[nn.Module, ShardedASGD]:
        model, _ = make(ShardedASGD)
        model.bias.requires_grad_(not frozen)
        return model, ShardedASGD(model.named_parameters(), **HYPERPARAMETERS, stage=stage)

    model, optimizer = build(frozen=True)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    optimizer.state[model.bias].update({"grad_ema": torch.ones(3), "tag": ["a"]})
    before = own(model, optimizer)
    save_checkpoint(path, model, optimizer, step=1)
    for frozen in (True, False):
        # One rank's fragments do not load into other buckets.
        sharded = [optimizer.state_dict()] if frozen or world_size == 1 else []
        for saved in (*sharded, optimizer.consolidated_state_dict(to=None)):
            assert saved["state"][1].keys() == {"grad_ema", "tag"}
            twin, target = build(frozen)
            target.load_state_dict(saved)
            assert same_tree(own(twin, target), before)
            steps(twin, target, 1)
        twin, target = build(frozen)
        load_checkpoint(path, twin, target)
        assert same_tree(own(twin, target), before)
        assert ("ax" in target.state[twin.bias]) is not frozen
    model.bias.requires_grad_(True)
    steps(model, optimizer, 1)
    assert same_tree(own(model, optimizer), before)
    if world_size == 1:
        (file,) = consolidate(CheckpointContents(path), Path(path + ".pt"))
        assert torch.load(file)["optim"]["state"][1].keys() == {"grad_ema", "tag"}


@both
@worlds
def test_frozen_parameters_with_own_entries(tmp_path: Path, backend: str, world_size: int, stage: int) -> None:
    """As in torch, and they get a state as soon as they are trained."""
    run(backend, world_size, frozen_ones, stage, str(tmp_path / "saved"))


@pytest.mark.parametrize("other", [torch.optim.Adam, torch.optim.SGD, torch.optim.Rprop])
def test_the_state_of_another_optimizer_is_refused(other: type) -> None:
    """Its entries are no own entries: those of ASGD are missing."""
    model, optimizer = make(ShardedASGD)
    twin = nn.Linear(5, 3)
    source = other(twin.parameters(), lr=0.1, **({"momentum": 0.9} if other is torch.optim.SGD else {}))
    steps(twin, source, 1)
    saved = optimizer.state_dict()
    saved["state"] = source.state_dict()["state"]
    with pytest.raises(ValueError, match="not the state of an ASGD optimizer"):
        optimizer.load_state_dict(saved)
    assert own(model, optimizer) == ({}, [{}, {}])


def test_keys_that_a_state_dict_needs_for_parameters_are_refused() -> None:
    """torch would overwrite the parameter's state."""
    _, optimizer = make(ShardedASGD)
    optimizer.state[1] = "mine"
    for call in (optimizer.state_dict, optimizer.consolidated_state_dict):
        with pytest.raises(ValueError, match=r"optimizer.state\[1\]"):
            call()
    saved = make(ShardedASGD)[1].state_dict()
    saved["state"][7] = saved["state"][0]
    with pytest.raises(ValueError, match="no parameter group lists"):
        make(ShardedASGD)[1].load_state_dict(saved)


def test_an_empty_entry_is_none() -> None:
    """Reading ``state[p]`` makes one in torch."""
    twin, oracle = make(torch.optim.ASGD)
    assert not oracle.state[twin.weight]
    _, optimizer = make(ShardedASGD)
    optimizer.load_state_dict(oracle.state_dict())


def test_edits_of_groups_keep_own_entries() -> None:
    """A parameter that moves to a new group, and one that joins."""
    model, optimizer = make(ShardedASGD)
    steps(model, optimizer, 1)
    put_all(model, optimizer)
    before = own(model, optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.2})
    assert same_tree(own(model, optimizer), before)
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop(0))
    steps(model, optimizer, 1)
    assert same_tree(own(model, optimizer), before)


# --- names -----------------------------------------------------------------------------------------------


@both
@worlds
@pytest.mark.parametrize("named", [False, True])
def test_loaded_names_are_kept(backend: str, world_size: int, stage: int, named: bool) -> None:
    """As in torch: they replace the group's, which stay if the dict has none."""
    run(backend, world_size, load_names, stage, named)


def load_names(_rank: int, _world_size: int, stage: int, named: bool) -> None:
    """Job: names in the dict, and none."""
    model, _ = make(ShardedASGD)
    source = ShardedASGD([(f"module.{n}", p) for n, p in model.named_parameters()], stage=stage)
    saved = source.consolidated_state_dict(to=None)
    model, _ = make(ShardedASGD)
    optimizer = ShardedASGD(model.named_parameters() if named else model.parameters(), stage=stage)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == ["module.weight", "module.bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["module.weight", "module.bias"]
    model.double()  # the groups are adopted with the names of now
    steps(model, optimizer, 1)
    assert optimizer.param_groups[0]["param_names"] == ["module.weight", "module.bias"]
    del saved["param_groups"][0]["param_names"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == ["module.weight", "module.bias"]
    saved["param_groups"][0]["param_names"] = ["module.weight"]
    with pytest.raises(ValueError, match="2 parameters and 1 param_names"):
        optimizer.load_state_dict(saved)


# --- checkpoints -----------------------------------------------------------------------------------------


def save(_rank: int, _world_size: int, stage: int, path: str, asynchronous: bool) -> None:
    """Job: a checkpoint with own entries."""
    model, optimizer = make(ShardedASGD, stage=stage)
    steps(model, optimizer, 2)
    put_all(model, optimizer)
    if asynchronous:
        async_save_checkpoint(path, model, optimizer, step=2).wait()
    else:
        save_checkpoint(path, model, optimizer, step=2)


def load(_rank: int, _world_size: int, stage: int, path: str) -> None:
    """Job: it has them, as a state dict of torch has."""
    twin, oracle = make(torch.optim.ASGD)
    steps(twin, oracle, 2)
    put_all(twin, oracle)
    expected = make(torch.optim.ASGD)
    expected[1].load_state_dict(oracle.state_dict())
    targets = [make(ShardedASGD, stage=stage)]
    if _world_size == 1:
        targets.append(make(torch.optim.ASGD))
    for model, optimizer in targets:
        optimizer.state["gone"] = 1
        load_checkpoint(path, model, optimizer)
        assert same_tree(own(model, optimizer), own(*expected))
    model, optimizer = targets[0]
    optimizer.state["kept"] = 1
    load_checkpoint(path, model, optimizer, strict=False)
    assert optimizer.state["kept"] == 1


@both
@pytest.mark.parametrize(("saved_on", "loaded_on"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_own_entries_travel_in_checkpoints(tmp_path: Path, stage: int, saved_on: int, loaded_on: int) -> None:
    """On another number of ranks too, and into the file of ``consolidate``."""
    backends = {1: "none", 2: "gloo"}
    run(backends[saved_on], saved_on, save, stage, str(tmp_path / "saved"), saved_on == loaded_on)
    run(backends[loaded_on], loaded_on, load, 3 - stage, str(tmp_path / "saved"))
    (file,) = consolidate(CheckpointContents(tmp_path / "saved"), tmp_path / "whole.pt")
    model, optimizer = make(torch.optim.ASGD)
    steps(model, optimizer, 2)
    put_all(model, optimizer)
    twin, target = make(torch.optim.ASGD)
    target.load_state_dict(torch.load(file)["optim"])
    expected = make(torch.optim.ASGD)
    expected[1].load_state_dict(optimizer.state_dict())
    assert same_tree(own(twin, target), own(*expected))


class Anything:
    """An object of the user's."""


def save_objects(rank: int, world_size: int, stage: int, path: str, where: str) -> None:
    """Job: rank 0 keeps what no checkpoint can hold."""
    model, optimizer = make(ShardedASGD, stage=stage)
    entry = optimizer.state if where == "optimizer" else optimizer.state[model.weight]
    fragment = optimizer.state[model.weight]["ax"].clone()
    if rank == 0:
        values = {"sparse": torch.ones(3, 5).to_sparse(), "list": [1, Anything()], "fragment": fragment}
        entry["mine"] = values.get(where, Anything())
    save_checkpoint(path, model, optimizer, step=0)
    assert world_size


@both
@pytest.mark.parametrize("where", ["optimizer", "param", "list", "sparse", "fragment"])
def test_what_a_checkpoint_cannot_hold_is_an_error_on_all_ranks(tmp_path: Path, stage: int, where: str) -> None:
    """That names parameter and key, and leaves nothing behind."""
    for error in run_errors("gloo", 2, save_objects, stage, str(tmp_path / "saved"), where):
        what = "optimizer.state['mine']" if where == "optimizer" else "state[p]['mine'] of parameter "
        assert error.type_name == "ValueError"
        assert what in error.message
    assert not list(tmp_path.iterdir())


# --- DTensors, and the helpers of torch -------------------------------------------------------------------


def dtensor_entries(_rank: int, world_size: int, stage: int, path: str) -> None:
    """Job: own entries of DTensors are placed like them, in every form of state."""
    mesh = init_device_mesh("cpu", (world_size,))

    def build() -> tuple[nn.Module, ShardedASGD]:
        model, _ = make(ShardedASGD)
        for name, placement in (("weight", Shard(0)), ("bias", Replicate())):
            placed = distribute_tensor(getattr(model, name).detach(), mesh, [placement])
            setattr(model, name, nn.Parameter(placed))
        return model, ShardedASGD(model.named_parameters(), **HYPERPARAMETERS, stage=stage)

    def check(model: nn.Module, optimizer: ShardedASGD) -> None:
        for param in model.parameters():
            found = optimizer.state[param]["grad_ema"]
            assert isinstance(found, DTensor)
            assert found.placements == param.placements
            expected = torch.arange(param.numel(), dtype=torch.float32).reshape(param.shape)
            assert same_bits(found.full_tensor(), expected)
        assert optimizer.state[model.weight]["count"] == 3

    model, optimizer = build()
    steps(model, optimizer, 1)
    optimizer.state[model.weight]["count"] = 3
    for param in model.parameters():
        optimizer.state[param]["grad_ema"] = param.detach().clone()
        optimizer.state[param]["grad_ema"].copy_(
            distribute_tensor(torch.arange(float(param.numel())).reshape(param.shape), mesh, param.placements)
        )
    whole = optimizer.consolidated_state_dict(to=None)
    assert not isinstance(whole["state"][0]["grad_ema"], DTensor)
    for saved in (optimizer.state_dict(), whole):
        target = build()
        target[1].load_state_dict(saved)
        check(*target)
    save_checkpoint(path, model, optimizer, step=1)
    target = build()
    load_checkpoint(path, *target)
    check(*target)


@both
def test_own_entries_of_dtensors(tmp_path: Path, stage: int) -> None:
    """Full dicts and checkpoints gather them."""
    run("gloo", 2, dtensor_entries, stage, str(tmp_path / "saved"))


def by_helpers(_rank: int, _world_size: int, stage: int, flat: bool) -> None:
    """Job: torch's helpers carry own entries of parameters."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    targets: list[tuple[nn.Module, Any]] = []
    for cls, extra in ((ShardedASGD, {"stage": stage}), (torch.optim.ASGD, {})):
        model, optimizer = make(cls, **extra)
        steps(model, optimizer, 1)
        optimizer.state[model.weight]["grad_ema"] = torch.full((3, 5), 0.25)
        optimizer.state[model.weight]["count"] = 3
        saved = get_state_dict(model, optimizer, options=options)
        target = make(cls, **extra)
        if flat:  # loading asks for the keys that are there
            target[1].state[target[0].weight].update({"grad_ema": torch.zeros(3, 5), "count": 0})
            if cls is torch.optim.ASGD:
                target = model, optimizer
        set_state_dict(*target, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
        targets.append(target)
    assert same_tree(own(*targets[0]), own(*targets[1]))


@both
@worlds
@pytest.mark.parametrize("flat", [False, True])
def test_torchs_helpers_carry_own_entries(backend: str, world_size: int, stage: int, flat: bool) -> None:
    """``get_state_dict`` and ``set_state_dict``, nested and flattened."""
    run(backend, world_size, by_helpers, stage, flat)
