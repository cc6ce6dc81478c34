"""World size and bucket size do not change a bit, and awkward layouts keep their meaning."""

import copy
import itertools
from typing import Any

import pytest
import torch

from dist_asgd import ShardedASGD
from tests.harness.bits import assert_same_bits, same_bits, same_tree
from tests.harness.cases import every_pair, every_value
from tests.harness.history import DTYPES, GroupSpec, History, ParamSpec, SetLr, Step
from tests.harness.models import mlp, odd_loss, odd_net
from tests.harness.ranks import run
from tests.harness.subject import Saved, Setting, check_history

forms = pytest.mark.parametrize("form", ["forloop", "foreach", "fused"])
stages = pytest.mark.parametrize("stage", [1, 2], ids=["stage1", "stage2"])

STEPS = (
    Step(),
    Step(who=("all", "none", "all")),
    SetLr(0, 0.3),
    Step(by_hand=(False, True)),
    Step(num_backwards=2, no_sync=True),
)


def history_of(dtype: str) -> History:
    """Five awkward parameters of one dtype and a large one, in two groups."""
    return History(
        (
            GroupSpec(
                (
                    ParamSpec((), dtype),
                    ParamSpec((0, 3), dtype),
                    ParamSpec((3,), dtype),
                    ParamSpec((41, 7), dtype, "transposed"),
                    ParamSpec((2, 3, 5, 7), dtype, "channels_last"),
                ),
                weight_decay=0.1,
                t0=1,
            ),
            GroupSpec((ParamSpec((1237,), dtype), ParamSpec((5, 8), dtype, "sliced")), t0=2, maximize=True),
        ),
        STEPS,
    )


@every_pair(
    dtype=DTYPES,
    update=itertools.product((1, 2), ("forloop", "foreach", "fused")),
    world=[("none", 1), *itertools.product(("threads", "gloo"), (2, 3, 4))],
    bucket_cap_mb=(0.0005, 0.004, 25.0),
)
def test_world_size_and_bucket_size_do_not_change_a_bit(
    dtype: str, update: tuple[int, str], world: tuple[str, int], bucket_cap_mb: float
) -> None:
    """1 to 4 ranks, one bucket or many; threads and Gloo processes."""
    history = history_of(dtype)
    expected: Saved = run("none", 1, check_history, history, Setting(*update))[0]
    for found in run(*world, check_history, history, Setting(*update, bucket_cap_mb)):
        assert all(map(same_bits, found.params, expected.params))
        assert same_tree(found.state["state"], expected.state["state"])


def train_odd_net(_rank: int, _world_size: int, stage: int, form: str) -> dict[str, Any]:
    """The same batch on every rank, so that the mean of 2 or 4 equal gradients is exact."""
    theirs = odd_net()
    ours = copy.deepcopy(theirs)
    strides = {name: p.stride() for name, p in ours.named_parameters()}
    options = {"lr": 0.1, "t0": 1, "weight_decay": 0.01}
    subject = ShardedASGD(ours.parameters(), **Setting(stage, form).forms, stage=stage, **options)
    oracle = torch.optim.ASGD(theirs.parameters(), foreach=form == "foreach", **options)
    assert ours.tied.weight is ours.inner.weight
    assert {name: p.stride() for name, p in ours.named_parameters()} == strides
    for seed in range(4):
        losses = []
        for model, optimizer in ((ours, subject), (theirs, oracle)):
            optimizer.zero_grad()
            loss = odd_loss(model, seed)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert_same_bits(losses[0], losses[1], f"loss {seed}")
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert_same_bits(p, q, f"{name} after step {seed}")
    found = subject.consolidated_state_dict(to=None)["state"]
    expected = oracle.state_dict()["state"]
    assert same_tree(found, expected)
    return {"unused": ours.unused.detach().clone(), "frozen": ours.frozen.detach().clone()}


@forms
@stages
@pytest.mark.parametrize(
    ("backend", "world_size"), [("none", 1), ("threads", 2), ("threads", 4), ("gloo", 2), ("gloo", 4)]
)
def test_a_model_of_awkward_layouts_trains_as_with_torch(backend: str, world_size: int, stage: int, form: str) -> None:
    """Tied, frozen, transposed, channels_last, 0-dim, empty and unused parameters in one model."""
    start = odd_net()
    for found in run(backend, world_size, train_odd_net, stage, form):
        assert same_bits(found["unused"], start.unused)
        assert same_bits(found["frozen"], start.frozen)


def train_on_own_data(rank: int, _world_size: int, bucket_cap_mb: float, dtype: torch.dtype) -> list[torch.Tensor]:
    """Stage 2 on different data per rank, with means that are not exact; the weights after some steps."""
    model = mlp().to(dtype)
    optimizer = ShardedASGD(model.parameters(), lr=0.1, t0=1, stage=2, bucket_cap_mb=bucket_cap_mb)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(2):
            generator = torch.Generator().manual_seed(1000 * step + 10 * part + rank)
            model(torch.randn(8, 12, generator=generator).to(dtype)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@every_value(world_size=[2, 3, 4], dtype=[torch.float32, torch.float64, torch.bfloat16])
def test_bucket_size_does_not_change_a_bit_of_the_reduction_either(world_size: int, dtype: torch.dtype) -> None:
    """The mean over ranks is summed and divided in one way, whatever shares a bucket with it."""
    expected = run("gloo", world_size, train_on_own_data, 25.0, dtype)[0]
    for bucket_cap_mb in (1e-6, 0.002):
        for found in run("gloo", world_size, train_on_own_data, bucket_cap_mb, dtype):
            for index, (p, q) in enumerate(zip(found, expected, strict=True)):
                assert_same_bits(p, q, f"parameter {index} with buckets of {bucket_cap_mb} MiB")
