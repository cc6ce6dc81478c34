"""A checkpoint of any topology loads in any other, and training goes on with the same bits."""

from __future__ import annotations

import functools
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import dist_asgd
from dist_asgd import ShardedASGD, load_checkpoint, save_checkpoint
from tests.harness.bits import assert_same_bits, same_tree
from tests.harness.cases import ALL_CASES, every_value
from tests.harness.ranks import run, run_errors
from tests.harness.topologies import OPTIONS, Run, assert_same_state, build, whole_state

Place = tuple[str, int]
WORLD_SIZES: dict[str, tuple[int, ...]] = {
    "single": (1,),
    "stage1": (1, 2, 3, 4),
    "stage2": (2, 3, 4),
    "fsdp2": (1, 2, 3, 4),
    "fsdp2-sharded": (2, 3),
    "hybrid": (2, 3, 4),
    "hsdp": (4,),
    "hsdp-sharded": (2, 4),
    "tp": (2, 3, 4),
    "tp-torch": (2, 3),
    "fsdp2-tp1": (2,),
    "fsdp2-tp2": (2, 4),
}
# Every topology is loaded by itself and another. World sizes take turns, so that each is a source and a target.
PAIRS: list[tuple[Place, Place]] = [
    ((source, sizes[j % len(sizes)]), (target, target_sizes[(i + 1) % len(target_sizes)]))
    for i, (source, sizes) in enumerate(WORLD_SIZES.items())
    for j, (target, target_sizes) in enumerate(WORLD_SIZES.items())
    if (j - i) % len(WORLD_SIZES) in (0, 5) or ALL_CASES
]
# Those that take any parameter.
OURS = [(name, n) for name in ("single", "stage1", "stage2", "hybrid") for n in WORLD_SIZES[name]]


def at(place: Place, fn: Any, *args: Any) -> list[Any]:
    """Run a job in a topology."""
    return run("none" if place[0] in ("single", "torch") else "gloo", place[1], fn, place[0], *args)


def save(rank: int, _world_size: int, topology: str, kind: str, path: str) -> dict[str, Tensor]:
    """Job: train, save, train on; the whole state after that."""
    live = build(topology, kind).train(4)
    save_checkpoint(path, live.model, live.optimizer, step=4, extra={"rank": rank})
    return whole_state(live.train(3))


def load(rank: int, world_size: int, topology: str, kind: str, path: str, expected: Any, saved_by: int) -> None:
    """Job: load into a fresh model of other values, and train on."""
    live = build(topology, kind, seed=7).train(1)
    extra = load_checkpoint(path, live.model, live.optimizer)
    assert extra == {"rank": rank if world_size == saved_by else 0}
    assert_same_state(Run(topology, live.model, live.optimizer, 4).train(3), expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The checkpoint of each topology, and the state after training on; made on first use."""

    @functools.cache
    def of(place: Place, kind: str) -> tuple[str, Any]:
        path = str(tmp_path_factory.mktemp("saved") / "checkpoint")
        return path, at(place, save, kind, path)[0]

    return of


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda place: f"{place[0]}-{place[1]}")
def test_any_topology_loads_any_other(saved: Any, source: Place, target: Place) -> None:
    """Three steps after loading, parameters, buffers and state are equal to the bit."""
    path, expected = saved(source, "mlp")
    at(target, load, "mlp", path, expected, source[1])


UNEVEN: list[Place] = [("tp", 4), ("fsdp2-tp2", 4), ("stage2", 3), ("tp-torch", 3), ("fsdp2-tp2", 2), ("single", 1)]


@pytest.mark.parametrize("step", range(len(UNEVEN)))
def test_ranks_may_hold_none_of_a_layer(saved: Any, step: int) -> None:
    """Checkpoints load under tensor parallelism whose ranks do not divide the widths, or are more than these."""
    source, target = UNEVEN[step - 1], UNEVEN[step]
    path, expected = saved(source, "narrow")
    at(target, load, "narrow", path, expected, source[1])


@every_value(step=range(len(OURS)), kind=["odd", "complex", "bfloat16"])
def test_odd_parameters_load_anywhere(saved: Any, step: int, kind: str) -> None:
    """Tied, frozen, transposed, channels_last, 0-dim, empty, unused and complex parameters load, and wider averages."""
    source, target = OURS[step], OURS[(step + 3) % len(OURS)]
    path, expected = saved(source, kind)
    at(target, load, kind, path, expected, source[1])


@pytest.mark.parametrize("pair", [(("stage1", 2), ("torch", 1)), (("torch", 1), ("stage2", 3))], ids=str)
def test_torchs_optimizer_saves_and_loads_too(saved: Any, pair: tuple[Place, Place]) -> None:
    """``torch.optim.ASGD``, which has no state for parameters that never stepped, loads checkpoints and writes them."""
    path, expected = saved(pair[0], "odd")
    at(pair[1], load, "odd", path, expected, pair[0][1])


# --- torch's own tools -------------------------------------------------------------------------------------


def torch_loads(_rank: int, _world_size: int, topology: str, path: str, expected: Any) -> None:
    """Job: ``dcp.load`` and ``set_state_dict`` read what ``save_checkpoint`` wrote."""
    import torch.distributed.checkpoint as dcp

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    live = build(topology, "mlp", seed=7)
    model, optim = get_state_dict(live.model, live.optimizer, options=options)
    state = {"model": model, "optim": optim}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(live.model, live.optimizer, model_state_dict=model, optim_state_dict=state["optim"], options=options)
    assert_same_state(Run(topology, live.model, live.optimizer, 4).train(3), expected)


def torch_saves(_rank: int, _world_size: int, topology: str, path: str, flatten: bool) -> dict[str, Tensor]:
    """Job: ``dcp.save`` of ``get_state_dict`` on ``torch.optim.ASGD``."""
    import torch.distributed.checkpoint as dcp

    live = build(topology, "mlp").train(4)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optim = get_state_dict(live.model, live.optimizer, options=options)
    dcp.save({"model": model, "optim": optim}, checkpoint_id=path)
    return whole_state(live.train(3))


@every_value(
    target=[("fsdp2", 2), ("fsdp2-sharded", 2), ("stage1", 2), ("tp-torch", 2), ("tp", 3), ("fsdp2-tp2", 4)],
    source=[("single", 1), ("stage1", 3), ("stage2", 2), ("tp", 3), ("fsdp2-tp2", 4)],
)
def test_torchs_tools_load_ours(saved: Any, target: Place, source: Place) -> None:
    """torch's own tools read a checkpoint of this package."""
    path, expected = saved(source, "mlp")
    at(target, torch_loads, path, expected)


def load_foreign(_rank: int, _world_size: int, topology: str, path: str, expected: Any) -> None:
    """Job: load a checkpoint without a manifest: with ``verify=True`` an error, with ``verify=False`` not."""
    live = build(topology, "mlp", seed=7)
    with pytest.raises(RuntimeError, match="verify=False"):
        load_checkpoint(path, live.model, live.optimizer)
    assert load_checkpoint(path, live.model, live.optimizer, verify=False) is None
    assert_same_state(Run(topology, live.model, live.optimizer, 4).train(3), expected)


@every_value(
    target=[("single", 1), ("stage1", 3), ("stage2", 2), ("fsdp2", 3), ("tp", 2), ("fsdp2-tp2", 4)],
    written=itertools.product((("fsdp2", 2), ("tp-torch", 3)), (True, False)),
)
def test_ours_load_what_torchs_tools_wrote(target: Place, written: tuple[Place, bool], tmp_path: Path) -> None:
    """Checkpoints of torch's tools, which have no manifest, load with ``verify=False``, flattened and nested ones."""
    source, flatten = written
    expected = at(source, torch_saves, str(tmp_path / "theirs"), flatten)[0]
    at(target, load_foreign, str(tmp_path / "theirs"), expected)


# --- wrappers, groups, models that differ --------------------------------------------------------------------


def wrapped(_rank: int, _world_size: int, path: str) -> None:
    """Job: DDP and torch.compile add prefixes to names, which checkpoints do not have."""
    live = build("stage1", "odd").train(3)
    shell = torch.compile(DistributedDataParallel(live.model), backend="eager")
    save_checkpoint(path + "/wrapped", shell, live.optimizer, step=3)
    expected = whole_state(live)
    for number, wrap in enumerate((lambda m: m, torch.compile, DistributedDataParallel)):
        other = build("stage1", "odd", seed=7)
        load_checkpoint(path + "/wrapped", wrap(other.model), other.optimizer)
        assert_same_state(other, expected)
        save_checkpoint(f"{path}/{number}", wrap(other.model), other.optimizer, step=3)
        load_checkpoint(f"{path}/{number}", shell, live.optimizer)
        assert_same_state(live, expected)


def test_names_are_those_without_wrappers(tmp_path: Path) -> None:
    """A checkpoint of a wrapped model loads into a bare one, and the other way round."""
    run("gloo", 2, wrapped, str(tmp_path))


def net(*names: str, width: int = 3) -> nn.ParameterDict:
    """Return the parameters by name."""
    return nn.ParameterDict({name: nn.Parameter(torch.full((width, 4), float(len(name)))) for name in names})


def stepped(model: nn.Module, **options: Any) -> ShardedASGD:
    """Return an optimizer after two steps."""
    optimizer = ShardedASGD(model.parameters(), **{**OPTIONS, "t0": 0, **options})
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    return optimizer


def other_models(_rank: int, _world_size: int, path: str) -> list[str]:
    """Job: models with added, removed, renamed and reshaped parameters get an error that lists them, and no change."""
    model = net("kept", "removed", "old_name")
    optimizer = stepped(model)
    save_checkpoint(path, model, optimizer, step=2)
    messages = []
    for other in (net("kept", "added", "new_name"), net("kept", "removed", "old_name", width=5)):
        theirs = stepped(other)
        before = [p.detach().clone() for p in other.parameters()], theirs.consolidated_state_dict(to=None)
        for strict in (True, False):
            if not strict and "added" in other:
                continue
            with pytest.raises(ValueError, match="dist_asgd") as caught:
                load_checkpoint(path, other, theirs, strict=strict)
            messages.append(str(caught.value))
        assert same_tree(before, ([p.detach() for p in other.parameters()], theirs.consolidated_state_dict(to=None)))
    return messages


@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
def test_another_model_is_an_error_that_lists_what_differs(backend: str, world_size: int, tmp_path: Path) -> None:
    """A checkpoint of another model is an error on every rank, and nothing is loaded."""
    for messages in run(backend, world_size, other_models, str(tmp_path / "c")):
        for name in ("model.added", "model.new_name", "optim.state.added"):
            assert name in messages[0].split("in the checkpoint only")[0]
        for name in ("model.removed", "model.old_name", "optim.state.old_name"):
            assert name in messages[0].split("in the checkpoint only")[1]
        assert "kept" not in messages[0]
        for message in messages[1:]:
            assert "model.kept is (3, 4) torch.float32 in the checkpoint and (5, 4) torch.float32 here" in message


def what_matches(rank: int, _world_size: int, path: str) -> None:
    """Job: ``strict=False`` loads what matches, keeps the rest, and says so on rank 0."""
    model = net("kept", "removed")
    optimizer = stepped(model, lr=0.5)
    save_checkpoint(path, model, optimizer, step=2)
    other = net("kept", "added")
    theirs = stepped(other)
    before = theirs.consolidated_state_dict(to=None)["state"]
    added = other["added"].detach().clone()
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dist_asgd").addHandler(handler)
    load_checkpoint(path, other, theirs, strict=False)
    logging.getLogger("dist_asgd").removeHandler(handler)
    assert_same_bits(other["kept"], model["kept"], "kept")
    assert_same_bits(other["added"], added, "added")
    found, wanted = (o.consolidated_state_dict(to=None)["state"] for o in (theirs, optimizer))
    order, theirs_order = list(model), list(other)
    assert same_tree(found[theirs_order.index("kept")], wanted[order.index("kept")])
    assert same_tree(found[theirs_order.index("added")], before[theirs_order.index("added")])
    assert theirs.param_groups[0]["lr"] == 0.5
    assert len(seen) == (rank == 0)
    assert all("model.added" in text and "model.removed" in text for text in seen)


@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
def test_strict_false_loads_what_matches(backend: str, world_size: int, tmp_path: Path) -> None:
    """``strict=False`` loads the entries that match, and leaves the rest as it is."""
    run(backend, world_size, what_matches, str(tmp_path / "c"))


def groups_and_lr(_rank: int, _world_size: int, path: str) -> None:
    """Job: two groups, a Tensor lr, values that schedulers add; loaded in another order of registration."""
    model = net("a", "b", "c")

    def optimizer(order: list[str], lr: float) -> ShardedASGD:
        groups = [
            {"params": [(n, model[n]) for n in order if n != "b"], "lr": torch.tensor(lr)},
            {"params": [("b", model["b"])], "lr": 0.25, "weight_decay": 0.125},
        ]
        return ShardedASGD(groups, **{**OPTIONS, "lr": 1.0})

    saved = optimizer(["a", "b", "c"], 0.5)
    torch.optim.lr_scheduler.LambdaLR(saved, lambda _step: 0.5)
    for param in model.values():
        param.grad = torch.ones_like(param)
    saved.step()
    save_checkpoint(path, model, saved, step=1)
    expected = {n: saved.consolidated_state_dict(to=None)["state"][i] for i, n in enumerate(["a", "c", "b"])}
    loaded = optimizer(["c", "b", "a"], 9.0)
    load_checkpoint(path, model, loaded)
    found = {n: loaded.consolidated_state_dict(to=None)["state"][i] for i, n in enumerate(["c", "a", "b"])}
    assert same_tree(dict(sorted(found.items())), dict(sorted(expected.items())))
    assert float(loaded.param_groups[0]["lr"]) == 0.25
    assert isinstance(loaded.param_groups[0]["lr"], Tensor)
    assert (loaded.param_groups[1]["lr"], loaded.param_groups[1]["weight_decay"]) == (0.125, 0.125)
    assert loaded.param_groups[1]["initial_lr"] == 0.25
    assert loaded.param_groups[0]["param_names"] == ["c", "a"]


@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
def test_groups_go_by_name(backend: str, world_size: int, tmp_path: Path) -> None:
    """Parameters and their hyperparameters are matched by name, and not by position."""
    run(backend, world_size, groups_and_lr, str(tmp_path / "c"))


def foreign_parameter(rank: int, world_size: int, path: str) -> None:
    """Job: an optimizer with a parameter that the model lacks, on one rank."""
    model = net("a")
    optimizer = stepped(model)
    save_checkpoint(path, net("b") if rank == world_size - 1 else model, optimizer, step=1)


def test_a_parameter_that_the_model_lacks_is_an_error(tmp_path: Path) -> None:
    """Every rank raises an error, although only one passed another model."""
    for error in run_errors("gloo", 2, foreign_parameter, str(tmp_path / "c")):
        assert error.type_name == "ValueError"
        assert "is no parameter of the model" in error.message
        assert "rank 1" in error.message
    assert not list(tmp_path.iterdir())


def extras(rank: int, _world_size: int, path: str) -> None:
    """Job: scheduler and RNG states and plain values come back as they were; values that run code are refused."""
    model = net("a")
    optimizer = stepped(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    scheduler.step()
    torch.manual_seed(rank)
    extra = {
        "scheduler": scheduler.state_dict(),
        "rng": torch.get_rng_state(),
        "data": {"epoch": 3, "order": [3, 1, 2], "shape": (2, 2), "name": "x", "none": None},
        "tensors": [torch.arange(3), torch.zeros(())],
    }
    save_checkpoint(path, model, optimizer, step=2, extra=extra)
    drawn = torch.rand(3)
    found = load_checkpoint(path, model, optimizer)
    assert same_tree(found, extra)
    torch.set_rng_state(found["rng"])
    assert torch.equal(torch.rand(3), drawn)
    with pytest.raises(ValueError, match=r"extra\[.path.\] .* cannot be saved so that it loads safely"):
        save_checkpoint(path + "2", model, optimizer, step=3, extra={"path": Path()} if rank == 0 else None)


@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
def test_extra_comes_back_on_its_rank(backend: str, world_size: int, tmp_path: Path) -> None:
    """Each rank gets its own ``extra`` back."""
    run(backend, world_size, extras, str(tmp_path / "c"))


def test_the_package_offers_what_it_lists() -> None:
    """Every public name of the package exists, also those that are loaded on demand."""
    assert all(getattr(dist_asgd, name) is not None for name in dist_asgd.__all__)
    with pytest.raises(AttributeError):
        _ = dist_asgd.nothing  # type: ignore[attr-defined]
