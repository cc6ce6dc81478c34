"""Parameters sharded by FSDP2 and tensor parallelism, beside torch.optim.ASGD on the whole model, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch

from dist_asgd import ShardedASGD
from tests.harness.meshes import (
    KINDS,
    Net,
    assert_same_params,
    assert_same_state,
    dtensors,
    set_gradients,
    sharded,
)
from tests.harness.ranks import run

FORMS = {
    "forloop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True, "fused": False},
    "fused": {"foreach": False, "fused": True},
}
OPTIONS = {"lr": 0.1, "lambd": 0.01, "t0": 3, "weight_decay": 0.02}


def _lives_as_torch(_rank: int, world_size: int, kind: str, form: str) -> int:
    model, plain = sharded(kind, world_size), Net()
    optimizer = ShardedASGD(model.named_parameters(), **OPTIONS, **FORMS[form])
    oracle = torch.optim.ASGD(plain.parameters(), **OPTIONS, foreach=form == "foreach")
    saved = None
    for step in range(8):
        skipped = ("unused", "blocks.0.up.weight") if step % 3 == 1 else ("unused",)
        set_gradients(model, step, skipped)
        set_gradients(plain, step, skipped)
        if step == 4:
            optimizer.param_groups[0]["lr"] = oracle.param_groups[0]["lr"] = 0.03
        optimizer.step()
        oracle.step()
        assert_same_params(model, plain, f"after step {step}")
        assert_same_state(optimizer, oracle, model, plain, f"after step {step}")
        if step == 5:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = ShardedASGD(model.named_parameters(), **{**OPTIONS, "lr": 7.0}, **FORMS[form])
            optimizer.load_state_dict(saved)
    return sum(1 for _ in dtensors(model))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_lives_as_torch_on_the_whole_model(world_size: int, kind: str, form: str) -> None:
    """Skipped gradients, a changed lr, averaging from the middle on, and a reload."""
    assert min(run("gloo", world_size, _lives_as_torch, kind, form)) >= 8
