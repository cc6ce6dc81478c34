"""Code that takes plain tensors for whole ones refuses a rank's fragments, so that no wrong checkpoint is written.

torch's helpers for "full" state take plain tensors for whole ones, and so does ``torch.optim.ASGD`` when it loads.
Either would keep one rank's fragment of ``ax`` as if it were the whole. ``checkpoint/test_dcp.py`` has the cases in
which ``torch.distributed.checkpoint`` saves and loads fragments correctly.
"""

import contextlib
import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dist_asgd import ShardedASGD
from tests.harness.bits import same_bits, same_tree
from tests.harness.models import mlp
from tests.harness.ranks import run

WORLDS = [("none", 1), ("gloo", 2), ("gloo", 3)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)


def trained(steps: int) -> tuple[nn.Module, ShardedASGD]:
    """A model and its optimizer after some steps."""
    model = mlp(width=8, depth=1)
    optimizer = ShardedASGD(model.parameters(), lr=0.1, t0=1)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    return model, optimizer


def get_on_fresh(_rank: int, _world_size: int) -> None:
    """Job: DCP's helper would step an optimizer without state; this one has state, so nothing may change."""
    model, optimizer = trained(0)
    weights = [p.detach().clone() for p in model.parameters()]
    state = copy.deepcopy(optimizer.consolidated_state_dict(to=None))
    shards = {k: {n: t.clone() for n, t in v.items()} for k, v in optimizer.state.items()}
    for options in (StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True)):
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            get_optimizer_state_dict(model, optimizer, options=options)
    assert all(map(same_bits, model.parameters(), weights))
    assert same_tree(optimizer.consolidated_state_dict(to=None), state)
    for p, entry in shards.items():
        assert same_tree(dict(optimizer.state[p]), entry)
    assert all(p.grad is None for p in model.parameters())


@worlds
def test_dcps_helper_does_not_change_a_fresh_optimizer(backend: str, world_size: int) -> None:
    """No dummy step: step stays 0, eta stays lr, and the weights stay."""
    run(backend, world_size, get_on_fresh)


FORMS: dict[str, StateDictOptions] = {
    "full": StateDictOptions(full_state_dict=True),
    "full on cpu": StateDictOptions(full_state_dict=True, cpu_offload=True),
    "full and flattened": StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True),
    "cpu_offload": StateDictOptions(cpu_offload=True),
}


def gather_full(_rank: int, _world_size: int, form: str, steps: int, both: bool) -> str:
    """Job: ask torch's helper for full state; the refusal."""
    model, optimizer = trained(steps)
    get = get_state_dict if both else get_optimizer_state_dict
    with pytest.raises((ValueError, RuntimeError), match="dist_asgd") as caught:
        get(model, optimizer, options=FORMS[form])
    return str(caught.value)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("both", [False, True], ids=["optimizer", "model and optimizer"])
@pytest.mark.parametrize("steps", [0, 3], ids=["fresh", "trained"])
@pytest.mark.parametrize("form", FORMS)
def test_full_state_of_parts_is_refused(world_size: int, form: str, steps: int, both: bool) -> None:
    """Every rank raises, and the error names the right call; no fragment is returned as a whole tensor."""
    for message in run("gloo", world_size, gather_full, form, steps, both):
        assert "consolidated_state_dict" in message


def gather_full_of_both(_rank: int, world_size: int, seen_before: bool) -> list[torch.Size]:
    """Job: DTensors join plain parameters whose state was handed out before, or not; shapes of full averages."""
    mesh = init_device_mesh("cpu", (world_size,))
    torch.manual_seed(0)
    model = nn.ParameterDict({"plain": torch.randn(6, 4)})
    model["sharded"] = nn.Parameter(distribute_tensor(torch.randn(6, 4), mesh, [Shard(0)]))
    optimizer = ShardedASGD([model["plain"]])
    if seen_before:
        optimizer.state_dict()
    optimizer.add_param_group({"params": [model["sharded"]]})
    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    return [entry["ax"].shape for entry in full["state"].values()]


@pytest.mark.parametrize("seen_before", [False, True])
def test_full_state_of_dtensors_that_join_later_is_whole(seen_before: bool) -> None:
    """The tensor that stands for a plain parameter's fragment is another one if there are DTensors too."""
    assert run("gloo", 2, gather_full_of_both, seen_before) == [[torch.Size((6, 4))] * 2] * 2


def test_scalars_can_be_changed_as_torchs() -> None:
    """Every entry can be changed by itself and in place, as any tensor."""
    _, optimizer = trained(3)
    state = optimizer.state_dict()["state"]
    kept = copy.deepcopy(state)
    for key in ("step", "eta", "mu"):
        state[0][key].detach_().fill_(7.0)
    assert same_tree(state[1], kept[1])
    assert optimizer.state_dict()["state"][0]["step"].item() == 3


@pytest.mark.parametrize("form", FORMS)
def test_full_state_of_one_process_is_whole(form: str) -> None:
    """In one process a fragment is the whole tensor."""
    model, optimizer = trained(3)
    found = get_optimizer_state_dict(model, optimizer, options=FORMS[form])
    for index, (name, _) in enumerate(model.named_parameters()):
        expected = optimizer.consolidated_state_dict()["state"][index]["ax"]
        ax = found[f"state.{name}.ax"] if "flattened" in form else found["state"][name]["ax"]
        assert same_bits(ax, expected)


def clone_all(saved: Any) -> Any:
    """A deep copy."""
    return copy.deepcopy(saved)


def save_and_load(saved: Any) -> Any:
    """Through ``torch.save``."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def as_is(saved: Any) -> Any:
    """The dict itself."""
    return saved


def load_into_plain(_rank: int, _world_size: int, way: Callable[[Any], Any], steps: int, like: bool) -> None:
    """Job: one rank's dict goes into ``torch.optim.ASGD``, which must refuse it."""
    _, optimizer = trained(steps)
    plain = mlp(width=8, depth=1)
    other = torch.optim.ASGD(plain.parameters(), lr=7.0)
    saved = way(optimizer.state_dict())
    if like:
        saved["param_groups"] = other.state_dict()["param_groups"]
    with pytest.raises(Exception, match="consolidated_state_dict"):
        other.load_state_dict(saved)


@pytest.mark.parametrize(("backend", "world_size"), WORLDS[1:])
@pytest.mark.parametrize("like", [False, True], ids=["as saved", "with torch's own groups"])
@pytest.mark.parametrize("steps", [0, 3], ids=["fresh", "trained"])
@pytest.mark.parametrize("way", [as_is, clone_all, save_and_load], ids=lambda way: way.__name__)
def test_torch_cannot_load_one_ranks_dict_as_if_it_were_the_whole(
    backend: str, world_size: int, way: Callable[[Any], Any], steps: int, like: bool
) -> None:
    """torch refuses it also after a copy or a file, and if the groups have lost their ``NotGatherable``."""
    run(backend, world_size, load_into_plain, way, steps, like)


def set_by_dcp(_rank: int, _world_size: int) -> None:
    """Job: DCP's setter must not load a plain dict halfway."""
    model, optimizer = trained(2)
    other_model, other = trained(5)
    whole = other.consolidated_state_dict(to=None)
    named = {
        "state": {n: whole["state"][i] for i, (n, _) in enumerate(other_model.named_parameters())},
        "param_groups": [{**whole["param_groups"][0], "params": [n for n, _ in other_model.named_parameters()]}],
    }
    before = optimizer.consolidated_state_dict(to=None)
    try:
        set_optimizer_state_dict(model, optimizer, named)
    except (RuntimeError, ValueError, TypeError, KeyError):
        assert same_tree(optimizer.consolidated_state_dict(to=None), before)
    else:
        assert same_tree(optimizer.consolidated_state_dict(to=None)["state"], whole["state"])


@worlds
def test_dcps_setter_loads_all_or_nothing(backend: str, world_size: int) -> None:
    """Either the whole state is loaded or none of it."""
    run(backend, world_size, set_by_dcp)
