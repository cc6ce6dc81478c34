"""Stage 2: gradients reduced during backward, freed as they go, accumulated, clipped, whoever produced them."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_asgd import ShardedASGD
from dist_asgd.gradients.gradient_tensor import GradientTensor
from dist_asgd.storage.layout import STRIPE_SLACK
from tests.harness.bits import assert_same_bits
from tests.harness.models import mlp, mlp_loss
from tests.harness.ranks import run

WORLDS = [("none", 1), ("threads", 2), ("gloo", 2), ("gloo", 4)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)
OPTIONS: dict[str, Any] = {"lr": 0.1, "t0": 1, "weight_decay": 0.01}
SMALL_MB = 0.002


def twins(**options: Any) -> tuple[nn.Module, ShardedASGD, nn.Module, torch.optim.ASGD]:
    """A model with the subject, and its copy with the oracle."""
    ours = mlp()
    theirs = copy.deepcopy(ours)
    subject = ShardedASGD(ours.parameters(), stage=2, bucket_cap_mb=SMALL_MB, **OPTIONS, **options)
    return ours, subject, theirs, torch.optim.ASGD(theirs.parameters(), **OPTIONS)


def assert_same_models(ours: nn.Module, theirs: nn.Module, when: str) -> None:
    """Every parameter, to the bit."""
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_same_bits(p, q, f"{name} {when}")


def holds_no_gradient(model: nn.Module) -> bool:
    """Whether this rank holds a whole gradient of no parameter."""
    gradients = [p.grad for p in model.parameters()]
    return all(isinstance(g, GradientTensor) and g.unsent is None for g in gradients)


def frees_gradients(_rank: int, world_size: int) -> None:
    """Job: gradients are gone after backward, and memory is one shard and buckets in flight."""
    model = mlp(width=512, depth=6)
    optimizer = ShardedASGD(model.parameters(), stage=2, bucket_cap_mb=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        mlp_loss(model, seed).backward()
        assert holds_no_gradient(model)
        optimizer.step()
    report = optimizer.memory_report()
    total = sum(p.nbytes for p in model.parameters())
    padding = 64 * (len(list(model.parameters())) + world_size * 40)
    assert report.full_gradient_bytes == report.full_state_bytes == total
    assert total / world_size <= report.gradient_bytes <= (total + padding) / world_size
    assert total / world_size <= report.state_bytes <= (total + padding) / world_size
    # Two stripes sent and two received, however large a parameter is; the scratch of the update, of which one process
    # without stage 2 has as much; and a MiB that does not grow with the model.
    bucket = STRIPE_SLACK * 0.1 * 2**20
    largest = max(p.nbytes for p in model.parameters())
    assert largest > 4 * bucket
    assert 0 < report.in_flight_bytes <= 4 * bucket + largest / world_size + 2**20
    assert report.in_flight_bytes < total / 2


@worlds
def test_gradients_are_freed_and_memory_is_a_shard_and_buckets_in_flight(backend: str, world_size: int) -> None:
    """The accounting names shard, padding and in-flight bytes."""
    run(backend, world_size, frees_gradients)


SILENT: dict[str, Callable[[int, int], bool]] = {
    "never": lambda _rank, _number: False,
    "all but the last": lambda _rank, number: number < 2,
    "all": lambda _rank, _number: True,
    "one rank only": lambda rank, _number: rank == 0,
    "in turns": lambda rank, number: (rank + number) % 2 == 0,
}


def accumulates(rank: int, _world_size: int, silent: str) -> None:
    """Job: three backwards a step; equal data on every rank, in powers of two, keep every mean exact."""
    ours, subject, theirs, oracle = twins()
    for step in range(3):
        subject.zero_grad()
        oracle.zero_grad()
        for number in range(3):
            with subject.no_sync() if SILENT[silent](rank, number) else contextlib.nullcontext():
                integer_backward(ours, 10 * step + number)
            if silent == "all":
                assert all(p.grad is not None for p in ours.parameters())
            integer_backward(theirs, 10 * step + number)
        subject.step()
        oracle.step()
        assert_same_models(ours, theirs, f"after step {step}")


def integer_backward(model: nn.Module, seed: int) -> None:
    """A backward whose gradients are small integers, so that any order of summing gives the same bits."""
    generator = torch.Generator().manual_seed(seed)
    terms = [(p * torch.randint(-8, 9, p.shape, generator=generator)).sum() for p in model.parameters()]
    torch.stack(terms).sum().backward()


@worlds
@pytest.mark.parametrize("silent", SILENT)
def test_backwards_add_up(backend: str, world_size: int, silent: str) -> None:
    """Under ``no_sync`` or not, and whichever ranks use it when: the same sum as torch's own accumulation."""
    run(backend, world_size, accumulates, silent)


def hand_set(rank: int, world_size: int) -> None:
    """Job: gradients that no backward delivered, on every rank or on one."""
    ours, subject, theirs, oracle = twins()
    generator = torch.Generator().manual_seed(5)
    for number, (p, q) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
        gradient = torch.randint(-4, 5, p.shape, generator=generator).float()
        if number % 2 or rank == number % world_size:
            p.grad = gradient if number % 2 else gradient * world_size
        q.grad = gradient
    subject.step()
    oracle.step()
    assert_same_models(ours, theirs, "after the step")


@worlds
def test_hand_set_gradients_are_reduced_by_step(backend: str, world_size: int) -> None:
    """On all ranks, or on one of them while the others contribute zeros."""
    run(backend, world_size, hand_set)


def partly_used(rank: int, world_size: int, user: int | None) -> None:
    """Job: one layer is used on rank ``user`` only (None: nowhere)."""
    torch.manual_seed(3)
    weights = [nn.Parameter(torch.arange(6.0) + i) for i in range(3)]
    copies = [nn.Parameter(w.detach().clone()) for w in weights]
    subject = ShardedASGD(weights, stage=2, bucket_cap_mb=1e-6, **OPTIONS)
    oracle = torch.optim.ASGD(copies, **OPTIONS)
    for _ in range(3):
        subject.zero_grad()
        loss = (weights[0] * 2 + weights[2]).sum()
        if rank == user:
            loss = loss + (weights[1] * world_size).sum()
        loss.backward()
        subject.step()
        for copied, scale in zip(copies, (2.0, None if user is None else 1.0, 1.0), strict=True):
            copied.grad = None if scale is None else torch.full_like(copied, scale)
        oracle.step()
        for found, expected in zip(weights, copies, strict=True):
            assert_same_bits(found, expected, "weight")
    steps = subject.consolidated_state_dict(to=None)["state"]
    assert (1 in steps) == (user is not None)


@worlds
def test_parameters_used_on_one_rank_only_get_zeros_from_the_others(backend: str, world_size: int) -> None:
    """Every rank agrees that they step, whichever rank used them."""
    for user in range(world_size):
        run(backend, world_size, partly_used, user)


@worlds
def test_parameters_used_nowhere_are_skipped(backend: str, world_size: int) -> None:
    """No decay, no step, no entry in the state that torch would write."""
    run(backend, world_size, partly_used, None)


def idle_rank(rank: int, world_size: int, num_backwards: int) -> None:
    """Job: rank 0 runs backwards, the others none at all; a clip or a discard may come before the step."""
    weight = nn.Parameter(torch.ones(5))
    expected = nn.Parameter(torch.ones(5))
    subject = ShardedASGD([weight], stage=2, **OPTIONS)
    oracle = torch.optim.ASGD([expected], **OPTIONS)
    for clipped in (False, True, False):
        subject.zero_grad()
        for _ in range(num_backwards if rank == 0 else 0):
            (weight * world_size).sum().backward()
        if clipped:
            subject.clip_grad_norm_(1e6)
        subject.step()
        expected.grad = torch.full_like(expected, float(num_backwards))
        oracle.step()
        assert_same_bits(weight, expected, "weight")


@worlds
@pytest.mark.parametrize("num_backwards", [1, 2, 3])
def test_ranks_may_differ_in_how_many_backwards_they_run(backend: str, world_size: int, num_backwards: int) -> None:
    """A rank without data still takes part, and nobody hangs."""
    run(backend, world_size, idle_rank, num_backwards)


def crossed_order(rank: int, _world_size: int) -> None:
    """Job: gradients arrive in another order on every rank."""
    weights = [nn.Parameter(torch.full((4,), float(i))) for i in range(6)]
    copies = [nn.Parameter(w.detach().clone()) for w in weights]
    subject = ShardedASGD(weights, stage=2, bucket_cap_mb=1e-6, **OPTIONS)
    oracle = torch.optim.ASGD(copies, **OPTIONS)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(rank)).tolist()
    for _ in range(3):
        subject.zero_grad()
        value = torch.zeros(4)
        for index in order:
            value = value + weights[index] * (index + 1.0)
        value.sum().backward()
        subject.step()
        for index, copied in enumerate(copies):
            copied.grad = torch.full_like(copied, index + 1.0)
        oracle.step()
        for index in range(6):
            assert_same_bits(weights[index], copies[index], f"weight {index}")


@worlds
def test_gradients_may_arrive_in_another_order_on_each_rank(backend: str, world_size: int) -> None:
    """Buckets are launched in one order all the same."""
    run(backend, world_size, crossed_order)


def clips(rank: int, world_size: int, norm_type: float, max_norm: float) -> None:
    """Job: the global norm over shards beside torch's on the whole mean gradients."""
    ours, subject, theirs, _ = twins()
    mlp_loss(ours, rank).backward()
    found = subject.clip_grad_norm_(max_norm, norm_type)
    gradients = []
    for other in range(world_size):
        theirs.zero_grad()
        mlp_loss(theirs, other).backward()
        gradients.append([q.grad for q in theirs.parameters() if q.grad is not None])
    for q, parts in zip(theirs.parameters(), zip(*gradients, strict=True), strict=True):
        q.grad = torch.stack(parts).double().mean(0).float()
    start = [q.detach().clone() for q in theirs.parameters()]
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm, norm_type)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    subject.step()
    lr, lambd, decay = OPTIONS["lr"], 1e-4, OPTIONS["weight_decay"]
    for p, q, x in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        assert q.grad is not None
        moved = x * (1 - lambd * lr) - lr * (q.grad + decay * x)
        torch.testing.assert_close(p.detach(), moved, rtol=1e-5, atol=1e-6)


@worlds
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_clipping_is_torchs_on_the_same_gradients(backend: str, world_size: int, norm_type: float) -> None:
    """Below and above the bound."""
    for max_norm in (1e-2, 1e3):
        run(backend, world_size, clips, norm_type, max_norm)


def clips_nonfinite(_rank: int, _world_size: int) -> str:
    """Job: a non-finite norm is an error on request."""
    weight = nn.Parameter(torch.ones(3))
    subject = ShardedASGD([weight], stage=2)
    (weight * torch.tensor([1.0, float("nan"), 1.0])).sum().backward()
    with pytest.raises(RuntimeError, match="norm") as caught:
        subject.clip_grad_norm_(1.0, error_if_nonfinite=True)
    return str(caught.value)


def test_a_nonfinite_norm_is_an_error_on_request() -> None:
    """On every rank, also on those whose shard is finite."""
    assert len(run("gloo", 2, clips_nonfinite)) == 2


class Twice(nn.Module):
    """Shared weights: the layer runs twice, and under activation checkpointing."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.layer = mlp(width=12, depth=1)[1]
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 12)`` to ``(batch, 4)``."""
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=False) if self.checkpointed else self.layer(x)
        return x[:, :4]


def runs_twice(_rank: int, _world_size: int, checkpointed: bool) -> None:
    """Job: a shared layer's gradient is counted once it is complete."""
    ours = Twice(checkpointed)
    theirs = copy.deepcopy(ours)
    subject = ShardedASGD(ours.parameters(), stage=2, bucket_cap_mb=SMALL_MB, **OPTIONS)
    oracle = torch.optim.ASGD(theirs.parameters(), **OPTIONS)
    for seed in range(3):
        for model, optimizer in ((ours, subject), (theirs, oracle)):
            optimizer.zero_grad()
            mlp_loss(model, seed).backward()
            optimizer.step()
        assert_same_models(ours, theirs, f"after step {seed}")


@worlds
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_a_module_that_runs_twice(backend: str, world_size: int, checkpointed: bool) -> None:
    """Also when backward runs its forward again."""
    run(backend, world_size, runs_twice, checkpointed)


def closes(_rank: int, _world_size: int, stage: int) -> None:
    """Job: a closure runs forward and backward inside step, and its loss comes back."""
    ours = mlp()
    theirs = copy.deepcopy(ours)
    subject = ShardedASGD(ours.parameters(), stage=stage, **OPTIONS)
    oracle = torch.optim.ASGD(theirs.parameters(), **OPTIONS)
    for seed in range(3):
        found = []
        for model, optimizer in ((ours, subject), (theirs, oracle)):

            def closure(model: nn.Module = model, seed: int = seed, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = mlp_loss(model, seed)
                loss.backward()
                return loss

            found.append(optimizer.step(closure).detach())
        assert_same_bits(found[0], found[1], "loss")
        assert_same_models(ours, theirs, f"after step {seed}")


@worlds
@pytest.mark.parametrize("stage", [1, 2])
def test_closures(backend: str, world_size: int, stage: int) -> None:
    """As torch's optimizers take them."""
    run(backend, world_size, closes, stage)


def discards(_rank: int, _world_size: int, set_to_none: bool) -> None:
    """Job: what was reduced before ``zero_grad`` is forgotten."""
    ours, subject, theirs, oracle = twins()
    for seed in range(3):
        mlp_loss(ours, seed + 50).backward()
        subject.zero_grad(set_to_none=set_to_none)
        mlp_loss(ours, seed).backward()
        subject.step()
        subject.zero_grad(set_to_none=set_to_none)
        oracle.zero_grad(set_to_none=set_to_none)
        mlp_loss(theirs, seed).backward()
        oracle.step()
        assert_same_models(ours, theirs, f"after step {seed}")


@worlds
@pytest.mark.filterwarnings("error:dist_asgd")
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_forgets_what_was_reduced(backend: str, world_size: int, set_to_none: bool) -> None:
    """An abandoned backward leaves no trace, and nothing warns."""
    run(backend, world_size, discards, set_to_none)
