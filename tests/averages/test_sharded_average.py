"""``ShardedAverage`` against torch.optim.swa_utils and an unsharded oracle, on 1 to 4 ranks, with random histories."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

from dist_asgd import (
    AverageRule,
    ExponentialMean,
    HalfLife,
    PowerMean,
    ShardedASGD,
    ShardedAverage,
    UniformMean,
    load_checkpoint,
    save_checkpoint,
)
from dist_asgd.update.weights import AverageSchedule
from tests.harness.bits import assert_same_bits
from tests.harness.models import mlp, mlp_loss, odd_loss, odd_net
from tests.harness.ranks import run, run_errors

WORLDS = [("none", 1), ("threads", 3), ("gloo", 2), ("gloo", 4)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)
# Arguments of ShardedAverage, and those of torch's AveragedModel that stand for them.
TORCH: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "EMA, multi-tensor": ({"decay": 0.9}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}),
    "EMA, one tensor": ({"decay": 0.9, "foreach": False}, {"avg_fn": get_ema_avg_fn(0.9)}),
    "SWA, multi-tensor": ({}, {"multi_avg_fn": get_swa_multi_avg_fn()}),
    "SWA, one tensor": ({"foreach": False}, {"avg_fn": get_swa_avg_fn()}),
}
RULES: list[AverageRule] = [UniformMean(), ExponentialMean(0.7, warmup=2), HalfLife(3), PowerMean(1.5)]


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor; collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def perturb(model: nn.Module, seed: int) -> None:
    """Make the same small change of every trained parameter on every rank, as an optimizer would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                change = torch.randn(p.shape, generator=draw, dtype=torch.float32).to(p.dtype)
                p.add_(change, alpha=0.1)


def follows_torch(_rank: int, _world_size: int, which: str, dtype: torch.dtype) -> None:
    """Job: the averages, in place of the parameters, are torch's; afterwards the parameters are back."""
    ours, theirs = TORCH[which]
    model = odd_net().to(dtype)
    average = ShardedAverage(model.named_parameters(), average_dtype=dtype, bucket_cap_mb=0.0005, **ours)
    expected = AveragedModel(model, **theirs)
    for step in range(12):
        perturb(model, step)
        average.update()
        expected.update_parameters(model)
    before = [p.detach().clone() for p in model.parameters()]
    with average.averaged_parameters():
        for (name, p), q in zip(model.named_parameters(), expected.module.parameters(), strict=True):
            # Of one that does not change, a rounded EMA is another value.
            if p.requires_grad:
                assert_same_bits(p.detach(), q.detach(), name)
    for (name, p), q in zip(model.named_parameters(), before, strict=True):
        assert_same_bits(p.detach(), q, f"{name} afterwards")
    assert average.averaged_steps() == 12


@worlds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", TORCH)
def test_the_bits_are_those_of_torch(backend: str, world_size: int, which: str, dtype: torch.dtype) -> None:
    """Tied, frozen, transposed, channels-last, 0-dim and empty parameters among them."""
    run(backend, world_size, follows_torch, which, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.complex64], ids=str)
@pytest.mark.parametrize("which", TORCH)
def test_other_dtypes_have_the_bits_of_torch(which: str, dtype: torch.dtype) -> None:
    """Also complex parameters, which are stored as reals. Functions are called as AveragedModel calls them."""
    ours, theirs = TORCH[which]
    draw = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(n, 3, generator=draw, dtype=torch.float64).to(dtype)) for n in (1, 5, 40)]
    average = ShardedAverage(params, average_dtype=dtype.to_real(), **ours)
    expected = [p.detach().clone() for p in params]
    average.update()
    for n in range(1, 10):
        with torch.no_grad():
            for p in params:
                p.mul_(1.1).sub_(0.3)
        average.update()
        if "multi_avg_fn" in theirs:
            theirs["multi_avg_fn"](expected, [p.detach() for p in params], n)
        else:
            expected = [theirs["avg_fn"](a, p.detach(), torch.tensor(n)) for a, p in zip(expected, params, strict=True)]
    for p, q in zip(params, expected, strict=True):
        assert_same_bits(average.state[p]["ax"], q.flatten(), "ax")


class Oracle:
    """The averages of one ShardedAverage, unsharded, by the recurrence of its rule in float64."""

    def __init__(self, rule: AverageRule, start: int) -> None:
        self.schedule = AverageSchedule(rule)
        self.t0 = start - 1
        self.step = 0
        self.means: dict[str, Tensor] = {}

    def update(self, values: dict[str, Tensor]) -> None:
        """Take ``values`` if this update counts."""
        self.step += 1
        if not self.schedule.counts(self.step, self.t0):
            return
        n = self.schedule.num_iterates(self.step, self.t0)
        assert self.schedule.rule is not None
        weight = 1.0 if n == 1 else self.schedule.rule.weight(n)
        for name, value in values.items():
            mean = self.means.get(name, value.double())
            self.means[name] = mean + (value.double() - mean) * weight

    def check(self, model: nn.Module) -> None:
        """Compare with the parameters of ``model``, which are the averages."""
        for name, p in model.named_parameters():
            if name in self.means:
                torch.testing.assert_close(whole(p.detach()).double(), self.means[name], rtol=2e-5, atol=2e-6)


def fails_inside(average: ShardedAverage, oracle: Oracle, model: nn.Module, rank: int) -> None:
    """Raise KeyError in the block, on every rank."""
    with average.averaged_parameters():
        oracle.check(model)
        raise KeyError(rank)


def lives(rank: int, world_size: int, seed: int, folder: str) -> None:
    """Job: a random history of several averages of the same parameters, beside AdamW on DTensors or plain ones."""
    draw = random.Random(seed)
    model = mlp()
    if draw.random() < 0.5 and world_size > 1 and not folder.startswith("threads"):
        fully_shard(model)

    def make() -> tuple[ShardedAverage, Oracle]:
        every, start = draw.choice([1, 1, 2, 3]), draw.choice([0, 0, 2, 5])
        rule = copy.copy(draw.choice(RULES))
        average = ShardedAverage(
            model.named_parameters(),
            weight=rule,
            every=every,
            start=start,
            foreach=draw.choice([None, False]),
            bucket_cap_mb=draw.choice([0.0005, 25.0]),
        )
        return average, Oracle(average.param_groups[0]["average"], start)

    pairs = [make() for _ in range(draw.randint(1, 3))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for action in range(20):
        what = draw.choice(["step", "step", "step", "swap", "state", "consolidated", "save", "raise"])
        if what == "step":
            optimizer.zero_grad()
            for p in model.parameters():
                values = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed * 1000 + action))
                p.grad = values if not hasattr(p, "device_mesh") else _like(values, p)
            optimizer.step()
            now = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
            for average, oracle in pairs:
                average.update()
                oracle.update(now)
            continue
        which = draw.randrange(len(pairs))
        average, oracle = pairs[which]
        before = [whole(p.detach()).clone() for p in model.parameters()]
        if what == "swap":
            with average.averaged_parameters():
                oracle.check(model)
        elif what == "raise":
            with pytest.raises(KeyError):
                fails_inside(average, oracle, model, rank)
        elif what == "state":
            average.load_state_dict(average.state_dict())
        elif what == "consolidated":
            average.load_state_dict(average.consolidated_state_dict(to=None))
        else:
            path = f"{folder}/{action}"
            save_checkpoint(path, model, average, step=action)
            again = ShardedAverage(model.named_parameters(), weight=UniformMean(), start=3, bucket_cap_mb=0.001)
            load_checkpoint(path, model, again)
            pairs[which] = (again, oracle)
        assert pairs[which][0].averaged_steps() == oracle.schedule.num_iterates(oracle.step, oracle.t0)
        for p, q in zip(model.parameters(), before, strict=True):
            assert_same_bits(whole(p.detach()), q, f"after {what}")


def _like(values: Tensor, param: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, param.device_mesh, param.placements)


@pytest.mark.parametrize("seed", range(5))
def test_random_histories(seed: int, tmp_path: Any) -> None:
    """Steps, updates, swaps, exceptions, state dicts and checkpoints, with up to three averages at once."""
    run("gloo", [1, 2, 4][seed % 3] if seed % 3 else 2, lives, seed, str(tmp_path))


def sits_beside_asgd(_rank: int, _world_size: int, averages_first: bool, stage: int) -> None:
    """Job: an average beside a ShardedASGD of the same parameters, which it moves; both are as they would be alone."""
    model, alone = odd_net(), odd_net()
    options: dict[str, Any] = {"lr": 0.1, "t0": 2, "stage": stage, "bucket_cap_mb": 0.0005}

    def build() -> tuple[ShardedAverage, ShardedASGD]:
        if averages_first:
            average = ShardedAverage(model.named_parameters(), decay=0.8)
            return average, ShardedASGD(model.parameters(), **options)
        optimizer = ShardedASGD(model.parameters(), **options)
        return ShardedAverage(model.named_parameters(), decay=0.8), optimizer

    average, optimizer = build()
    other = ShardedASGD(alone.parameters(), **options)
    expected = AveragedModel(alone, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    for seed in range(6):
        for net, opt in ((model, optimizer), (alone, other)):
            opt.zero_grad()
            odd_loss(net, seed).backward()
            opt.step()
        average.update()
        expected.update_parameters(alone)
        if seed == 3:
            # One inside the other, as long as they are left in order.
            with optimizer.averaged_parameters(), average.averaged_parameters():
                for p, q in zip(model.parameters(), expected.module.parameters(), strict=True):
                    assert_same_bits(p.detach(), q.detach(), "inside both")
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach(), "parameters")
    with average.averaged_parameters():
        for p, q in zip(model.parameters(), expected.module.parameters(), strict=True):
            assert_same_bits(p.detach(), q.detach(), "averages")


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("averages_first", [False, True])
@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
def test_beside_sharded_asgd(backend: str, world_size: int, averages_first: bool, stage: int) -> None:
    """It follows parameters that are moved, and disturbs nothing."""
    run(backend, world_size, sits_beside_asgd, averages_first, stage)


def reads_what_has_arrived(rank: int, _world_size: int) -> None:
    """Job: an average reads parameters that overlap_forward() has left in flight, in the shard of another rank."""
    model = mlp()
    optimizer = ShardedASGD(model.parameters(), lr=0.1, stage=2, shared_memory=False)
    optimizer.overlap_forward(model)
    average = ShardedAverage(list(model.named_parameters())[::-1], decay=0.5)
    expected = None
    for seed in range(3):
        optimizer.zero_grad()
        mlp_loss(model, seed).backward()
        optimizer.step()
        assert seed == 0 or optimizer.gatherer.arrivals.keys
        average.update()
        # What has not arrived could be read all the same, and would be right on a fast connection.
        assert not optimizer.gatherer.arrivals.keys
        expected = expected or AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        expected.update_parameters(model)
    assert expected is not None
    with average.averaged_parameters():
        for p, q in zip(model.parameters(), expected.module.parameters(), strict=True):
            assert_same_bits(p.detach(), q.detach(), f"on rank {rank}")


def refuses_counts_that_differ(rank: int, _world_size: int) -> None:
    """Job: one rank has called update() once more than the others."""
    average = ShardedAverage(mlp().named_parameters())
    average.update()
    if rank == 1:
        average.update()
    with average.averaged_parameters():
        raise AssertionError("entered")


def test_parameters_in_flight_are_waited_for() -> None:
    """The order of parameters is another one, so that shards of the average are not those of the optimizer."""
    run("gloo", 2, reads_what_has_arrived)


def test_updates_that_ranks_do_not_share_are_an_error() -> None:
    """In the next collective call, on every rank."""
    for error in run_errors("gloo", 2, refuses_counts_that_differ):
        assert "number of calls of update(): rank 0 has 1; rank 1 has 2" in str(error)


def refuses_edits(rank: int, _world_size: int, key: str, value: Any, restores: bool) -> None:
    """Job: one rank has edited its group, and perhaps edits it back after an update."""
    average = ShardedAverage(mlp().named_parameters(), decay=0.5)
    group = average.param_groups[0]
    before = group[key]
    if rank == 1:
        group[key] = value
    for _ in range(3):
        average.update()
    if restores:
        group[key] = before
    with average.averaged_parameters():
        raise AssertionError("entered")


@pytest.mark.parametrize(
    ("key", "value", "restores", "problem"),
    [
        ("t0", 5.0, False, "param_groups[0]['t0']: rank 0 has -1.0; rank 1 has 5.0"),
        ("average", ExponentialMean(0.9), False, "param_groups[0]['average']: rank 0 has {"),
        ("t0", 5.0, True, "(step, mu) of the parameters: rank 0 has [(3.0, 0.5)]; rank 1 has [(3.0, 1.0)]"),
    ],
)
def test_edits_of_one_rank_are_an_error(key: str, value: Any, restores: bool, problem: str) -> None:
    """Ranks whose averaging has begun or not would gather other parameters, and wait for each other."""
    for error in run_errors("gloo", 2, refuses_edits, key, value, restores):
        assert problem in str(error)


def refuses_values_that_differ(rank: int, _world_size: int) -> None:
    """Job: ranks have other parameters, so that shards of their averages are those of no model."""
    average = ShardedAverage(mlp(seed=rank).named_parameters())
    average.update()
    with average.averaged_parameters():
        raise AssertionError("entered")


def test_parameters_that_differ_are_an_error() -> None:
    """When averages are first put together."""
    for error in run_errors("gloo", 2, refuses_values_that_differ):
        assert "does not start from the same values on" in str(error)


def test_steps_on_averages_are_refused() -> None:
    """Of any optimizer, and an update() of whatever average: they would train, or average, the averages."""
    model = mlp()
    first, second = ShardedAverage(model.named_parameters(), decay=0.5), ShardedAverage(model.named_parameters())
    others: list[torch.optim.Optimizer] = [
        torch.optim.SGD(model.parameters(), lr=1.0),
        torch.optim.AdamW(mlp().parameters()),
    ]
    for seed in range(3):
        perturb(model, seed)
        first.update()
        second.update()
    with first.averaged_parameters():
        with pytest.raises(RuntimeError, match=r"step\(\) of SGD inside averaged_parameters\(\)"):
            others[0].step()
        with pytest.raises(RuntimeError, match=r"update\(\) inside averaged_parameters\(\)"):
            second.update()
        # That of other parameters.
        others[1].step()
    others[0].step()
    second.update()


ARGUMENTS: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (lambda: {"decay": 0.9, "weight": UniformMean()}, "decay=0.9 with weight: two rules"),
    (lambda: {"decay": 1.0}, "decay must be a number > 0 and < 1"),
    (lambda: {"weight": 0.5}, "wanted a rule of averaging or a function of n, got 0.5"),
    (lambda: {"weight": UniformMean(every=2), "every": 3}, "every=3, and the rule has every=2"),
    (lambda: {"every": 0}, "every must be a whole number from 1 on"),
    (lambda: {"start": -1}, "start must be a number of updates >= 0"),
    (lambda: {"start": 0.5}, "start=0.5 is a share of the run, so total_updates must say"),
    (lambda: {"start": 2.5, "total_updates": 10}, "no whole number of updates, and no share"),
    (lambda: {"start": 3, "total_updates": 10}, "total_updates=10 with start=3"),
    (lambda: {"buffers": "all"}, "buffers must be one of 'keep', 'copy', 'average'"),
    (lambda: {"buffers": "copy"}, "buffers='copy' needs the module that has them"),
    (lambda: {"average_device": "cuda"}, "is on cpu: averages lie where their parameters do"),
    (lambda: {"average_device": "nowhere"}, "average_device must be None, 'cpu' or another device, got 'nowhere'"),
    (lambda: {"average_device": 1.5}, "average_device must be None, 'cpu' or another device, got 1.5"),
    (lambda: {"average_dtype": torch.int8}, "average_dtype must be None, float32"),
    (lambda: {"foreach": 1}, "foreach must be None, True or False"),
    (lambda: {"bucket_cap_mb": 0}, "bucket_cap_mb must be a positive number"),
]


@pytest.mark.parametrize(("arguments", "problem"), ARGUMENTS, ids=[problem[:30] for _, problem in ARGUMENTS])
def test_arguments_that_are_refused(arguments: Callable[[], dict[str, Any]], problem: str) -> None:
    """At construction, with what to do instead."""
    with pytest.raises(ValueError, match=r"dist_asgd: ") as caught:
        ShardedAverage(mlp().named_parameters(), **arguments())
    assert problem in str(caught.value)


def test_groups_have_no_options_that_would_be_ignored() -> None:
    """But a rule of their own."""
    model = mlp()
    params = list(model.parameters())
    with pytest.raises(ValueError, match=r"has \['decay'\], which it would ignore"):
        ShardedAverage([{"params": params, "decay": 0.9}])
    average = ShardedAverage([{"params": params[:1], "average": ExponentialMean(0.5)}, {"params": params[1:2]}])
    with pytest.raises(ValueError, match="which it would ignore"):
        average.add_param_group({"params": params[2:], "lr": 0.1})
    average.add_param_group({"params": params[2:]})
    for seed in range(3):
        perturb(model, seed)
        average.update()
    assert [group["average"] for group in average.param_groups] == [ExponentialMean(0.5), UniformMean(), UniformMean()]


@pytest.mark.parametrize("beside", [False, True])
def test_a_function_that_fails_leaves_everything_whole(beside: bool) -> None:
    """It is called before anything is written, so that the next call goes on."""
    fails = [False]

    def weight(n: int) -> float:
        if fails[0]:
            raise KeyError(n)
        return 2 / (n + 1)

    model = mlp()
    subject: Any
    if beside:
        subject = ShardedAverage(model.named_parameters(), weight=weight)
        advance = subject.update
    else:
        subject = ShardedASGD(model.parameters(), lr=0.1, t0=0, average=weight)
        advance = subject.step
    for seed in range(5):
        mlp_loss(model, seed).backward()
        advance()
    before = copy.deepcopy(subject.consolidated_state_dict()), [p.detach().clone() for p in model.parameters()]
    fails[0] = True
    with pytest.raises(KeyError):
        advance()
    fails[0] = False
    after = subject.consolidated_state_dict()
    for index, entry in before[0]["state"].items():
        for key, value in entry.items():
            assert_same_bits(after["state"][index][key], value, key)
    for p, q in zip(model.parameters(), before[1], strict=True):
        assert_same_bits(p.detach(), q, "parameters")
    advance()


def test_state_of_optimizers_and_averages_is_not_mixed_up() -> None:
    """An lr of 0 that an optimizer has taken from an average would stop its training in silence."""
    model = mlp()
    average, optimizer = ShardedAverage(model.named_parameters()), ShardedASGD(mlp().named_parameters())
    with pytest.raises(ValueError, match="is that of a ShardedAverage, and this is an optimizer"):
        optimizer.load_state_dict(average.state_dict())
    with pytest.raises(ValueError, match="is that of an optimizer, and this is a ShardedAverage"):
        average.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("mode", ["keep", "copy", "average"])
def test_buffers_of_the_module(mode: str) -> None:
    """Inside the block they are those that the mode says, and afterwards the module's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    average = ShardedAverage(model, decay=0.9, buffers=mode)
    expected = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=mode == "average")
    norm = model[1]
    for seed in range(5):
        perturb(model, seed)
        model(torch.randn(8, 4))
        average.update()
        expected.update_parameters(model)
    at_update = norm.running_mean.clone(), norm.num_batches_tracked.clone()
    model(torch.randn(8, 4))
    own = norm.running_mean.clone(), norm.num_batches_tracked.clone()
    average.load_state_dict(copy.deepcopy(average.state_dict()))
    with average.averaged_parameters():
        if mode == "average":
            assert_same_bits(norm.running_mean, expected.module[1].running_mean, "the average")
        else:
            assert_same_bits(norm.running_mean, (own if mode == "keep" else at_update)[0], mode)
        assert norm.num_batches_tracked == (own if mode == "keep" else at_update)[1]
    assert_same_bits(norm.running_mean, own[0], "afterwards")
    assert norm.num_batches_tracked == own[1]


def test_a_share_of_the_run_and_a_new_start() -> None:
    """start=0.6 of 10 updates is update 7; start_averaging() makes the next update the first one."""
    model = mlp()
    average = ShardedAverage(model.named_parameters(), start=0.6, total_updates=10)
    held = []
    for seed in range(10):
        perturb(model, seed)
        average.update()
        held.append(average.averaged_steps())
    assert held == [0] * 6 + [1, 2, 3, 4]
    average.start_averaging()
    assert average.averaged_steps() == 0
    perturb(model, 99)
    average.update()
    assert average.averaged_steps() == 1
    first = next(model.parameters())
    assert_same_bits(average.state[first]["ax"], first.detach().flatten(), "the first iterate")


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("rule", [ExponentialMean(0.8), UniformMean(every=3), HalfLife(2)], ids=str)
def test_sharded_asgd_takes_a_rule(rule: AverageRule, foreach: bool | None) -> None:
    """Instead of torch's mean, from step t0 + 2 on; and the state dict carries it."""
    model = mlp()
    optimizer = ShardedASGD(model.parameters(), lr=0.1, t0=2, average=rule, foreach=foreach)
    oracle = Oracle(rule, 3)
    for seed in range(12):
        optimizer.zero_grad()
        mlp_loss(model, seed).backward()
        optimizer.step()
        oracle.update({name: p.detach().clone() for name, p in model.named_parameters()})
        assert optimizer.averaged_steps() == oracle.schedule.num_iterates(seed + 1, 2)
    with optimizer.averaged_parameters():
        oracle.check(model)
    again = ShardedASGD(mlp().parameters(), lr=0.3)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["average"] == rule
