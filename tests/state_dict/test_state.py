"""State exists from construction on, is never cast down, and shares no memory with the caller's dicts."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_asgd import ShardedASGD
from tests.harness.bits import assert_same_bits, same_tree
from tests.harness.models import mlp
from tests.harness.ranks import run

STATE_KEYS = {"step", "eta", "mu", "ax"}
WORLDS = [("none", 1), ("threads", 3), ("gloo", 2)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)
OPTIONS: dict[str, Any] = {"lr": 0.1, "t0": 1}


def trained(steps: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, ShardedASGD]:
    """A small model after some steps on the same data everywhere."""
    model = mlp(width=8, depth=1).to(dtype)
    optimizer = ShardedASGD(model.parameters(), **OPTIONS, **options)
    train(model, optimizer, steps)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Deterministic gradients that do not depend on the rank."""
    for step in range(steps):
        for index, p in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(97 * step + index)
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def oracle(steps: int = 3, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.ASGD]:
    """The same with ``torch.optim.ASGD``."""
    model = mlp(width=8, depth=1).to(dtype)
    optimizer = torch.optim.ASGD(model.parameters(), **OPTIONS)
    train(model, optimizer, steps)
    return model, optimizer


# --- what there is -----------------------------------------------------------------------------------------


def fresh_state(_rank: int, _world_size: int) -> list[int]:
    """Job: check the state of a new optimizer; returns the sizes of this rank's fragments."""
    model = mlp(width=8, depth=1)
    extra = nn.Parameter(torch.ones(3))
    optimizer = ShardedASGD(model.parameters(), **OPTIONS)
    optimizer.add_param_group({"params": [extra], "lr": 0.7})
    params = [*model.parameters(), extra]
    assert set(optimizer.state) == set(params)
    for p in params:
        state = optimizer.state[p]
        assert set(state) == STATE_KEYS
        assert (float(state["step"]), float(state["mu"])) == (0.0, 1.0)
        assert float(state["eta"]) == pytest.approx(0.7 if p is extra else 0.1)
        assert state["ax"].dim() == 1
        assert state["ax"].dtype == p.dtype
    return [optimizer.state[p]["ax"].numel() for p in params]


@worlds
def test_state_exists_from_construction_with_the_same_keys_on_every_rank(backend: str, world_size: int) -> None:
    """The fragments of all ranks add up to each parameter."""
    sizes = run(backend, world_size, fresh_state)
    wanted = [p.numel() for p in mlp(width=8, depth=1).parameters()] + [3]
    assert [sum(column) for column in zip(*sizes, strict=True)] == wanted


def state_dict_alone(rank: int, _world_size: int) -> None:
    """Job: one rank calls ``state_dict`` and ``memory_report`` as often as it likes."""
    _, optimizer = trained()
    for _ in range(3 * rank):
        optimizer.state_dict()
        optimizer.memory_report()
    optimizer.consolidated_state_dict()


@worlds
def test_state_dict_does_not_communicate(backend: str, world_size: int) -> None:
    """Ranks may make these calls a different number of times, because they do not communicate."""
    run(backend, world_size, state_dict_alone)


def consolidates(rank: int, world_size: int) -> None:
    """Job: consolidate on one rank or on all, and check layout, device and that no memory is shared."""
    _, optimizer = trained()
    _, other = oracle()
    expected = other.state_dict()
    for to in (*range(world_size), None):
        found = optimizer.consolidated_state_dict(to=to)
        if to not in (None, rank):
            assert found == {}
            continue
        assert found.keys() == expected.keys()
        assert same_tree(found["state"], expected["state"])
        assert found["param_groups"] == expected["param_groups"]
        for entry in found["state"].values():
            for value in entry.values():
                assert value.device.type == "cpu"
                value.zero_()
    assert same_tree(optimizer.consolidated_state_dict(to=None)["state"], expected["state"])


@worlds
def test_consolidated_is_torchs_own_layout(backend: str, world_size: int) -> None:
    """The full dict equals torch's in every key and bit, and changing it changes nothing in the optimizer."""
    run(backend, world_size, consolidates)


def goes_to_torch(_rank: int, _world_size: int) -> None:
    """Job: plain torch loads it and goes on with the same bits."""
    model, optimizer = trained()
    plain = copy.deepcopy(model)
    loaded = torch.optim.ASGD(plain.parameters(), lr=7.0)
    loaded.load_state_dict(optimizer.consolidated_state_dict(to=None))
    train(model, optimizer, 3)
    train(plain, loaded, 3)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same_bits(q, p, "parameter")


@worlds
def test_plain_torch_goes_on_from_a_consolidated_dict(backend: str, world_size: int) -> None:
    """``torch.optim.ASGD`` loads the full dict and goes on with the same bits."""
    run(backend, world_size, goes_to_torch)


# --- loading -----------------------------------------------------------------------------------------------


def old_floats(saved: dict[str, Any]) -> dict[str, Any]:
    """As releases before 1.12 wrote it: scalars as Python numbers."""
    for entry in saved["state"].values():
        entry.update(step=int(entry["step"]), eta=float(entry["eta"]), mu=float(entry["mu"]))
    return saved


def through_disk(saved: dict[str, Any]) -> dict[str, Any]:
    """``torch.save`` and a safe ``torch.load``."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def round_trip(_rank: int, _world_size: int, kind: str, in_place: bool) -> None:
    """Job: save, spoil or start anew, load, and go on beside an undisturbed run."""
    model, optimizer = trained()
    saved: dict[str, Any]
    if kind == "own":
        saved = copy.deepcopy(optimizer.state_dict())
    elif kind == "consolidated":
        saved = through_disk(optimizer.consolidated_state_dict(to=None))
    else:
        saved = through_disk(oracle()[1].state_dict())
        saved = old_floats(saved) if kind == "old torch" else saved
    kept = copy.deepcopy(saved)
    weights = [p.detach().clone() for p in model.parameters()]
    if in_place:
        train(model, optimizer, 2)
    else:
        model = mlp(width=8, depth=1)
        optimizer = ShardedASGD(model.parameters(), lr=9.0, weight_decay=3.0, stage=1)
    with torch.no_grad():
        for p, value in zip(model.parameters(), weights, strict=True):
            p.copy_(value)
    optimizer.load_state_dict(saved)
    assert same_tree(saved["state"], kept["state"]), "the caller's dict has changed"
    train(model, optimizer, 3)
    assert same_tree(saved["state"], kept["state"]), "the caller's dict is shared"
    other, undisturbed = oracle()
    train(other, undisturbed, 3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(p, q, f"parameter after loading {kind}")
    found = optimizer.consolidated_state_dict(to=None)["state"]
    assert same_tree(found, undisturbed.state_dict()["state"])


@worlds
@pytest.mark.parametrize("in_place", [False, True], ids=["fresh", "in place"])
@pytest.mark.parametrize("kind", ["own", "consolidated", "torch", "old torch"])
def test_round_trips(backend: str, world_size: int, kind: str, in_place: bool) -> None:
    """Sharded and full dicts, torch's own, and those of old releases of torch load and go on with the same bits."""
    run(backend, world_size, round_trip, kind, in_place)


def wider(_rank: int, _world_size: int) -> None:
    """Job: bf16 parameters, with an average and scalars in fp32 and fp64."""
    model, optimizer = trained(dtype=torch.bfloat16)
    saved = optimizer.consolidated_state_dict(to=None)
    for entry in saved["state"].values():
        entry["ax"] = entry["ax"].float() + 1e-5
        entry["eta"] = torch.tensor(0.123456789, dtype=torch.float64)
    optimizer.load_state_dict(saved)
    state = optimizer.state[next(model.parameters())]
    assert state["ax"].dtype == torch.float32
    found = optimizer.consolidated_state_dict(to=None)["state"]
    for index, entry in saved["state"].items():
        assert_same_bits(found[index]["ax"], entry["ax"], "ax")
        assert_same_bits(found[index]["mu"], entry["mu"], "mu")
        assert_same_bits(found[index]["step"], entry["step"], "step")
        assert float(found[index]["eta"]) == pytest.approx(0.123456789, rel=1e-7)
    train(model, optimizer, 2)
    assert state["ax"].dtype == torch.float32


@worlds
def test_nothing_is_cast_down(backend: str, world_size: int) -> None:
    """A wider average stays wide, and scalars of 16-bit parameters stay fp32."""
    run(backend, world_size, wider)


def bad_dicts(optimizer: ShardedASGD) -> dict[str, Any]:
    """Return dicts that must not load, with the reason that the error gives."""
    good = optimizer.consolidated_state_dict(to=None)

    def changed(change: Any) -> dict[str, Any]:
        bad = copy.deepcopy(good)
        change(bad)
        return bad

    def shape(bad: dict[str, Any]) -> None:
        bad["state"][1]["ax"] = torch.ones(3)

    def missing(bad: dict[str, Any]) -> None:
        del bad["state"][1]["mu"]

    def sizes(bad: dict[str, Any]) -> None:
        bad["param_groups"][0]["params"].append(99)

    def groups(bad: dict[str, Any]) -> None:
        bad["param_groups"].append(bad["param_groups"][0])

    def lr(bad: dict[str, Any]) -> None:
        bad["param_groups"][0]["lr"] = float("nan")

    return {f.__name__: changed(f) for f in (shape, missing, sizes, groups, lr)}


def refuses(rank: int, _world_size: int, what: str, only_rank: int | None) -> list[str]:
    """Job: a bad dict, on one rank or all, is refused by all, and changes nothing."""
    _, optimizer = trained()
    before = optimizer.consolidated_state_dict(to=None)
    bad = bad_dicts(optimizer)[what]
    with pytest.raises((ValueError, KeyError, RuntimeError)) as caught:
        optimizer.load_state_dict(bad if only_rank in (None, rank) else before)
    assert same_tree(optimizer.consolidated_state_dict(to=None), before)
    return [str(caught.value)]


@worlds
@pytest.mark.parametrize("what", ["shape", "missing", "sizes", "groups", "lr"])
def test_dicts_that_do_not_fit_are_refused_whole(backend: str, world_size: int, what: str) -> None:
    """All ranks raise together, and the optimizer does not change."""
    run(backend, world_size, refuses, what, None)
    if world_size > 1:
        for message in run(backend, world_size, refuses, what, 1):
            assert "rank 1" in message[0]


def own_shard(_rank: int, _world_size: int, width: int = 8, stage: int = 1) -> bytes:
    """Job: this rank's ``state_dict``, as bytes."""
    model = mlp(width=width, depth=1)
    optimizer = ShardedASGD(model.parameters(), stage=stage, **OPTIONS)
    train(model, optimizer, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return file.getvalue()


def load_foreign(rank: int, world_size: int, shards: list[bytes], only_rank: int | None) -> list[str]:
    """Job: load a shard that is not this rank's; the message says what would do."""
    _, optimizer = trained()
    mine = optimizer.state_dict()
    foreign = torch.load(io.BytesIO(shards[(rank + 1) % len(shards)]), weights_only=True)
    with pytest.raises((ValueError, RuntimeError), match="consolidated_state_dict") as caught:
        optimizer.load_state_dict(foreign if only_rank in (None, rank) else mine)
    assert world_size > 0
    return [str(caught.value)]


def test_a_shard_of_another_rank_world_or_model_is_refused() -> None:
    """Every rank raises, and the error names ``consolidated_state_dict``."""
    of_two = run("gloo", 2, own_shard)
    run("gloo", 2, load_foreign, of_two, None)
    for message in run("gloo", 2, load_foreign, of_two, 1):
        assert "rank 1" in message[0]
    run("gloo", 3, load_foreign, of_two, None)
    run("none", 1, load_foreign, of_two, None)
    run("gloo", 2, load_foreign, run("gloo", 2, own_shard, 9), None)


def load_whole(_rank: int, _world_size: int, saved: bytes) -> None:
    """Job: what one process saved is whole, so it loads anywhere."""
    _, optimizer = trained()
    optimizer.load_state_dict(torch.load(io.BytesIO(saved), weights_only=True))
    assert same_tree(optimizer.consolidated_state_dict(to=None)["state"], oracle(steps=2)[1].state_dict()["state"])


@worlds
def test_the_state_dict_of_one_process_loads_anywhere(backend: str, world_size: int) -> None:
    """A single process saves plain whole tensors as ``ax``."""
    run(backend, world_size, load_whole, run("none", 1, own_shard)[0])


def mixed_kinds(rank: int, _world_size: int) -> Tensor:
    """Job: one rank loads its shard, the others the whole: same content, so it is fine."""
    model, optimizer = trained()
    whole = optimizer.consolidated_state_dict(to=None)
    own = optimizer.state_dict()
    optimizer.load_state_dict(own if rank == 1 else whole)
    train(model, optimizer, 1)
    return next(model.parameters()).detach().clone()


@worlds
def test_ranks_may_load_the_same_state_in_different_forms(backend: str, world_size: int) -> None:
    """Ranks may load different forms of the same content."""
    found = run(backend, world_size, mixed_kinds)
    assert all(torch.equal(x, found[0]) for x in found)


def tensor_lr(_rank: int, _world_size: int, kind: str) -> None:
    """Job: schedulers change a Tensor lr in place; the dict it was loaded from must not see that."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = ShardedASGD([weight], lr=torch.tensor(0.25))
    saved = optimizer.state_dict() if kind == "own" else optimizer.consolidated_state_dict(to=None)
    other = ShardedASGD([nn.Parameter(torch.ones(3))], lr=0.5)
    other.load_state_dict(saved)
    assert isinstance(other.param_groups[0]["lr"], Tensor)
    other.param_groups[0]["lr"].fill_(9.0)
    assert float(saved["param_groups"][0]["lr"]) == 0.25
    assert float(optimizer.param_groups[0]["lr"]) == 0.25


@worlds
@pytest.mark.parametrize("kind", ["own", "consolidated"])
def test_a_tensor_lr_is_copied(backend: str, world_size: int, kind: str) -> None:
    """The loaded dict keeps its lr: groups are copied, as in torch."""
    run(backend, world_size, tensor_lr, kind)
