"""Never a wrong checkpoint: whatever takes plain tensors for whole ones refuses a rank's slices.

``torch.distributed.checkpoint`` (DCP) takes plain tensors for replicated ones, and ``torch.optim.ASGD`` takes
what it loads for whole ones; either would keep one rank's slice of ``ax`` as if it were all of it.
"""

import contextlib
import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)

from dist_asgd import ShardedASGD
from tests.harness.bits import same_bits, same_tree
from tests.harness.models import mlp
from tests.harness.ranks import run

WORLDS = [("none", 1), ("gloo", 2), ("gloo", 3)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)


def refusal(call: Callable[[], Any]) -> str:
    """The message with which ``call`` refuses; DCP's own exception is not an ``Exception``."""
    try:
        call()
    except (CheckpointException, RuntimeError, TypeError, ValueError, NotImplementedError) as refused:
        return str(refused)
    pytest.fail("nothing was refused")


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


FORMS: dict[str, StateDictOptions | None] = {
    "plain": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
    "full on cpu": StateDictOptions(full_state_dict=True, cpu_offload=True),
    "full and flattened": StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True),
    "cpu_offload": StateDictOptions(cpu_offload=True),
    "bare state_dict": None,
}


def save_by_dcp(_rank: int, world_size: int, form: str, folder: str, steps: int, both: bool) -> str:
    """Job: try to save what DCP's helpers hand out; the refusal."""
    model, optimizer = trained(steps)
    options = FORMS[form]

    def save() -> None:
        if options is None:
            state: dict[str, Any] = {"optimizer": optimizer.state_dict()}
        elif both:
            weights, gotten = get_state_dict(model, optimizer, options=options)
            state = {"model": weights, "optimizer": gotten}
        else:
            state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
        dcp.save(state, checkpoint_id=folder, no_dist=world_size == 1)

    return refusal(save)


@worlds
@pytest.mark.parametrize("both", [False, True], ids=["optimizer", "model and optimizer"])
@pytest.mark.parametrize("steps", [0, 3], ids=["fresh", "trained"])
@pytest.mark.parametrize("form", FORMS)
def test_dcp_cannot_save_it_in_any_form(
    backend: str, world_size: int, form: str, steps: int, both: bool, tmp_path: Path
) -> None:
    """Every rank refuses, in the name of this package, and no checkpoint is left."""
    for message in run(backend, world_size, save_by_dcp, form, str(tmp_path), steps, both):
        assert "dist_asgd" in message
    assert not (tmp_path / ".metadata").exists()


def test_dcp_cannot_save_it_asynchronously(tmp_path: Path) -> None:
    """Neither while staging nor while writing."""
    _, optimizer = trained(2)
    state = {"optimizer": optimizer.state_dict()}
    message = refusal(lambda: dcp.async_save(state, checkpoint_id=str(tmp_path), no_dist=True).result())
    assert "consolidated_state_dict" in message
    assert not (tmp_path / ".metadata").exists()


def load_by_dcp(_rank: int, _world_size: int, folder: str) -> None:
    """Job: reading a plain checkpoint into what ``state_dict`` hands out changes nothing and is refused."""
    model, optimizer = trained(3)
    before = optimizer.consolidated_state_dict(to=None)
    refusal(lambda: dcp.load({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder))
    assert same_tree(optimizer.consolidated_state_dict(to=None), before)


def test_dcp_cannot_load_into_it(tmp_path: Path) -> None:
    """A slice must not be filled from the beginning of a whole tensor."""
    plain = mlp(width=8, depth=1)
    optimizer = torch.optim.ASGD(plain.parameters())
    for p in plain.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    dcp.save({"optimizer": get_optimizer_state_dict(plain, optimizer)}, checkpoint_id=str(tmp_path), no_dist=True)
    run("gloo", 2, load_by_dcp, str(tmp_path))


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


@worlds
@pytest.mark.parametrize("like", [False, True], ids=["as saved", "with torch's own groups"])
@pytest.mark.parametrize("steps", [0, 3], ids=["fresh", "trained"])
@pytest.mark.parametrize("way", [as_is, clone_all, save_and_load], ids=lambda way: way.__name__)
def test_torch_cannot_load_one_ranks_dict_as_if_it_were_the_whole(
    backend: str, world_size: int, way: Callable[[Any], Any], steps: int, like: bool
) -> None:
    """Also after a copy or a file, and where someone took the marks off the groups."""
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
    """Either the whole state arrives, or none of it."""
    run(backend, world_size, set_by_dcp)
