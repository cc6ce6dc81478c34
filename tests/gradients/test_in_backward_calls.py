"""``step_in_backward=True``: when parameters change, who may read them, and what is refused before ``step()``."""

import copy
import gc
import os
import re
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from dist_asgd import ShardedASGD, load_checkpoint, save_checkpoint
from dist_asgd.backward_checks import check_step_in_backward
from dist_asgd.storage.buffers import StateBuffer
from tests.harness.bits import assert_same_bits, same_bits
from tests.harness.models import mlp, mlp_loss
from tests.harness.ranks import outcomes, run, run_errors

WORLDS = [("none", 1), ("threads", 2), ("gloo", 2)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)
OPTIONS: dict[str, Any] = {"lr": 0.1, "t0": 1, "weight_decay": 0.01, "stage": 2, "bucket_cap_mb": 0.002}


def make(model: nn.Module, **options: Any) -> ShardedASGD:
    """The optimizer of ``model`` that steps in backward."""
    return ShardedASGD(model.parameters(), **{**OPTIONS, "step_in_backward": True, **options})


def twins(model: nn.Module) -> tuple[nn.Module, ShardedASGD, nn.Module, ShardedASGD]:
    """The model with the subject, and its copy with stage 2 without the option."""
    other = copy.deepcopy(model)
    return model, make(model), other, make(other, step_in_backward=False)


def assert_same_models(ours: nn.Module, theirs: nn.Module, when: str) -> None:
    """Every parameter, to the bit."""
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_same_bits(p, q, f"{name} {when}")


def holds_buckets_in_flight(rank: int, _world_size: int) -> None:
    """Job: after backward all but the last buckets are updated, and no gradient is left."""
    model = mlp(width=64, depth=6)
    optimizer = make(model)
    for step in range(3):
        optimizer.zero_grad()
        loss = mlp_loss(model, 10 * step + rank)
        before = [p.detach().clone() for p in model.parameters()]
        loss.backward()
        buckets = optimizer.shards.buckets
        waiting = [b for b in buckets if b.gradient is not None]
        assert len(buckets) >= 6
        assert len(waiting) <= 2
        left = {id(m.param) for b in waiting for m in b.members}
        optimizer.wait_for_parameters()
        changed = [not same_bits(p, old) for p, old in zip(model.parameters(), before, strict=True)]
        assert changed == [id(p) not in left for p in model.parameters()]
        optimizer.step()
    report = optimizer.memory_report()
    assert report.gradient_bytes == 0
    # Scratch shards: at most two of the largest bucket.
    largest = max(b.shard.nbytes for b in optimizer.shards.buckets)
    assert optimizer.gradients.in_flight_bytes > 0
    plain = make(mlp(width=64, depth=6), step_in_backward=False)
    assert report.in_flight_bytes <= plain.memory_report().in_flight_bytes + 2 * largest + 2**21


@worlds
def test_buckets_are_updated_during_backward(backend: str, world_size: int) -> None:
    """And gradient shards do not stay."""
    run(backend, world_size, holds_buckets_in_flight)


class Reuser(nn.Module):
    """A module that is used twice, a tied weight, and blocks that are computed again in backward."""

    def __init__(self, read_past: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.twice = nn.Linear(16, 16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(6)])
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.read_past = read_past

    def forward(self, tokens: Tensor, reentrant: bool) -> Tensor:
        """The loss."""
        hidden = torch.tanh(self.twice(self.embedding(tokens)))
        if self.read_past:
            # The first layer is read once more, past autograd, by an operator whose backward needs it late.
            hidden = hidden @ self.blocks[5].weight.detach()
        for block in self.blocks:
            hidden = torch.tanh(checkpoint(block, hidden, use_reentrant=reentrant))
        return self.head(torch.tanh(self.twice(hidden))).square().mean()


def tokens_of(seed: int) -> Tensor:
    """A batch."""
    return torch.randint(20, (7,), generator=torch.Generator().manual_seed(seed))


def reuses(rank: int, _world_size: int) -> None:
    """Job: tied and reused weights, and activation checkpoints."""
    torch.manual_seed(0)
    model, subject, other, plain = twins(Reuser())
    for step in range(4):
        for m, o in ((model, subject), (other, plain)):
            o.zero_grad()
            m(tokens_of(10 * step + rank), False).backward()
            o.step()
        assert_same_models(model, other, f"after step {step}")


@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
def test_weights_that_backward_still_needs_wait(backend: str, world_size: int) -> None:
    """Tied and reused weights have their last gradient before they are updated."""
    run(backend, world_size, reuses)


def test_a_weight_that_is_read_past_its_gradient_is_an_error_of_torch() -> None:
    """Its version says that it was written; nothing is computed with the new value."""
    torch.manual_seed(0)
    model = Reuser(read_past=True)
    optimizer = make(model)
    loss = model(tokens_of(0), False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match="are torn: load a checkpoint"):
        optimizer.state_dict()


def is_reentrant(rank: int, _world_size: int) -> None:
    """Job: reentrant checkpoints run one backward inside another."""
    torch.manual_seed(0)
    model = Reuser()
    optimizer = make(model)
    model(tokens_of(rank), True).backward()
    optimizer.step()


def backs_twice(rank: int, _world_size: int) -> None:
    """Job: gradients of two backwards."""
    model = mlp()
    optimizer = make(model)
    for part in range(2 if rank == 0 else 1):
        mlp_loss(model, part).backward()
    optimizer.step()


def torn_later(rank: int, _world_size: int) -> None:
    """Job: the last gradient of one rank cannot be used, when other parameters have been updated."""
    model = mlp(width=24, depth=4)
    optimizer = make(model)
    first = next(iter(model.parameters()))
    if rank == 0:
        first.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad.to_sparse()))
    before = [p.detach().clone() for p in model.parameters()]
    mlp_loss(model, rank).backward()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        optimizer.step()
    changed = [not same_bits(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert any(changed)
    assert not changed[0]
    optimizer.consolidated_state_dict()


def differs_at_first(rank: int, _world_size: int) -> None:
    """Job: hyperparameters differ between ranks."""
    model = mlp()
    optimizer = make(model)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["weight_decay"] = 0.1 * rank
    mlp_loss(model, rank).backward()
    optimizer.wait_for_parameters()
    assert all(same_bits(p, old) for p, old in zip(model.parameters(), before, strict=True))
    optimizer.step()


def starts_elsewhere(rank: int, _world_size: int) -> None:
    """Job: parameters differ from the beginning."""
    model = mlp()
    with torch.no_grad():
        next(iter(model.parameters())).add_(rank)
    optimizer = make(model)
    mlp_loss(model, rank).backward()
    optimizer.step()


def steps_by_scaler(_rank: int, _world_size: int) -> None:
    """Job: torch's gradient scaler."""
    model = mlp()
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(mlp_loss(model, 0)).backward()
    scaler.step(optimizer)


@pytest.mark.parametrize(
    ("job", "message", "world"),
    [
        (is_reentrant, "use_reentrant=False", ("none", 1)),
        (is_reentrant, "use_reentrant=False", ("gloo", 2)),
        (backs_twice, "a second backward before step\\(\\)", ("none", 1)),
        (backs_twice, "a second backward before step\\(\\).*on rank 0 of", ("gloo", 2)),
        (torn_later, "are torn: load a checkpoint", ("gloo", 2)),
        (differs_at_first, "weight_decay", ("gloo", 2)),
        (starts_elsewhere, "does not start from the same values", ("gloo", 2)),
        (steps_by_scaler, "step_in_backward=False", ("none", 1)),
        (steps_by_scaler, "step_in_backward=False", ("gloo", 2)),
    ],
)
def test_every_rank_hears_of_what_is_wrong(
    job: Callable[[int, int], None], message: str, world: tuple[str, int]
) -> None:
    """In seconds, and by name."""
    for error in run_errors(*world, job):
        assert re.search(message, error.message), error.message


Call = Callable[[nn.Module, ShardedASGD], object]
BETWEEN: dict[str, tuple[Call, str]] = {
    "zero_grad": (lambda _m, o: o.zero_grad(), "zero_grad\\(\\) between a backward and step"),
    "zero_grad to zeros": (lambda _m, o: o.zero_grad(set_to_none=False), "set_to_none=False"),
    "clip": (lambda _m, o: o.clip_grad_norm_(1.0), "clip_grad_norm_?\\(\\) with step_in_backward"),
    "clip of torch": (lambda m, _o: torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0), "reading p.grad"),
    "p.grad": (lambda m, _o: next(iter(m.parameters())).grad.to_local(), "reading p.grad"),
    "state dict": (lambda _m, o: o.state_dict(), "Call step\\(\\) first"),
    "consolidated": (lambda _m, o: o.consolidated_state_dict(), "Call step\\(\\) first"),
    "averages": (
        lambda _m, o: o.averaged_parameters().__enter__(),
        "Call step\\(\\) first",
    ),
    "new group": (
        lambda _m, o: o.add_param_group({"params": [nn.Parameter(torch.zeros(3))]}),
        "Call step\\(\\) first",
    ),
    "overlap": (lambda m, o: o.overlap_forward(m), "overlap_forward"),
    "keep": (lambda _m, o: o.keep_gradients(), "keep_gradients"),
    "closure": (lambda _m, o: o.step(lambda: 1.0), "closure"),
}


def calls_between(rank: int, _world_size: int) -> None:
    """Job: each call is refused, and the step goes on."""
    model, subject, other, plain = twins(mlp(width=24, depth=4))
    for step, (name, (call, message)) in enumerate(BETWEEN.items()):
        for m, o in ((model, subject), (other, plain)):
            mlp_loss(m, 10 * step + rank).backward()
            if o is subject:
                with pytest.raises((RuntimeError, ValueError), match=message):
                    call(m, o)
                assert len(o.param_groups) == 1, name
            o.step()
            o.zero_grad()
        assert_same_models(model, other, f"after {name}")


@worlds
def test_calls_between_backward_and_step_are_refused_by_name(backend: str, world_size: int) -> None:
    """And do no harm."""
    run(backend, world_size, calls_between)


def clears_between(rank: int, _world_size: int) -> None:
    """Job: the model clears gradients that have been used."""
    model = mlp()
    optimizer = make(model)
    mlp_loss(model, rank).backward()
    model.zero_grad()
    optimizer.step()


def test_gradients_that_were_used_cannot_be_cleared() -> None:
    """It is no skipped step."""
    for error in run_errors("gloo", 2, clears_between):
        assert "was taken away between backward and step()" in error.message


def steps_again(rank: int, _world_size: int) -> None:
    """Job: a step without a backward uses no gradient again, and after zero_grad() it does nothing."""
    model, subject, other, plain = twins(mlp())
    for m, o in ((model, subject), (other, plain)):
        mlp_loss(m, rank).backward()
        o.step()
    with pytest.raises(RuntimeError, match="once more"):
        subject.step()
    for m, o in ((model, subject), (other, plain)):
        o.zero_grad()
        o.step()
        mlp_loss(m, rank + 5).backward()
        o.step()
    assert_same_models(model, other, "in the end")


@worlds
def test_a_step_needs_a_backward_of_its_own(backend: str, world_size: int) -> None:
    """Gradients are gone."""
    run(backend, world_size, steps_again)


def changes_hyperparameters(rank: int, _world_size: int) -> None:
    """Job: what step() reads may change until then, and what the update has read may not."""
    model, subject, other, plain = twins(mlp(width=24, depth=4))
    for step in range(4):
        for m, o in ((model, subject), (other, plain)):
            o.zero_grad()
            mlp_loss(m, 10 * step + rank).backward()
            if step:
                o.param_groups[0]["lr"] = 0.1 / (1 + step)
                o.start_averaging()
            o.step()
        assert_same_models(model, other, f"after step {step}")
    subject.zero_grad()
    mlp_loss(model, rank).backward()
    subject.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(RuntimeError, match=r"weight_decay=0.01 when backward began.*weight_decay=0.5 at step"):
        subject.step()


@worlds
def test_changed_hyperparameters_are_noticed(backend: str, world_size: int) -> None:
    """Schedulers that run between backward and step give the bits of stage 2."""
    run(backend, world_size, changes_hyperparameters)


def test_a_parameter_that_has_not_stepped_keeps_its_eta() -> None:
    """The one of the lr at construction, until its first step, as without the option."""
    model, subject, other, plain = twins(mlp())
    for m, o in ((model, subject), (other, plain)):
        o.param_groups[0]["lr"] = 0.3
        first, *_ = m.parameters()
        first.requires_grad_(False)
        mlp_loss(m, 0).backward()
        o.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert subject.state[p]["eta"] == plain.state[q]["eta"]
    assert len({float(subject.state[p]["eta"]) for p in model.parameters()}) == 2


def test_a_bucket_is_not_updated_under_its_own_gather() -> None:
    """If backward updates one parameter of a bucket, and step() another one that had no gradient in the last step."""
    first, second = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = ShardedASGD([first, second], **{**OPTIONS, "step_in_backward": True, "bucket_cap_mb": 1.0})
    launch, arrivals = optimizer.gatherer.launch, optimizer.gatherer.arrivals
    sent: list[tuple[Tensor, Tensor]] = []

    def launch_late(buffer: StateBuffer) -> None:
        """What is gathered is read when somebody waits, as a slow connection would."""
        launch(buffer)
        assert id(buffer) not in late, "two gathers of one bucket"
        late.add(id(buffer))
        assert buffer.flat is not None
        flat, before = buffer.flat, buffer.flat.clone()

        def arrive() -> None:
            late.discard(id(buffer))
            sent.append((before, flat.clone()))

        arrivals.add(id(buffer), arrive)

    late: set[int] = set()
    optimizer.gatherer.launch = launch_late  # type: ignore[method-assign]
    for params in ([first], [first, second]):
        optimizer.zero_grad()
        torch.stack([p.sum() for p in params]).sum().backward()
        optimizer.step()
    optimizer.wait_for_parameters()
    assert len(sent) == 3
    for before, after in sent:
        assert_same_bits(after, before, "what is gathered")


def has_large_buckets(rank: int, _world_size: int) -> None:
    """Job: buckets of many stripes, more than there is room for in memory that ranks share."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1500, 1500, bias=False) for _ in range(3)))
    other = copy.deepcopy(model)
    subject, plain = make(model, bucket_cap_mb=1.0), make(other, bucket_cap_mb=1.0, step_in_backward=False)
    for step in range(2):
        for m, o in ((model, subject), (other, plain)):
            o.zero_grad()
            m(torch.full((1, 1500), 0.1 * rank + step)).square().mean().backward()
            o.step()
        assert_same_models(model, other, f"after step {step}")


def test_buckets_of_many_stripes_arrive() -> None:
    """No rank waits for one that waits for it."""
    run("gloo", 2, has_large_buckets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 1}, "Pass stage=2"),
        ({"differentiable": True}, "differentiable"),
        ({"step_in_backward": 1}, "must be True or False"),
    ],
)
def test_combinations_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    """They say what to do instead."""
    with pytest.raises(ValueError, match=message):
        make(mlp(), **options)


def shards_parameters(_rank: int, world_size: int) -> None:
    """Job: a DTensor."""
    weight = distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (world_size,)), [Shard(0)])
    with pytest.raises(ValueError, match="is a DTensor"):
        ShardedASGD([nn.Parameter(weight)], stage=2, step_in_backward=True)


def test_parameters_that_cannot_be_updated_in_backward_are_refused() -> None:
    """DTensors, and devices on which it has not been tried."""
    run("threads", 2, shards_parameters)
    groups = [{"differentiable": False, "params": [torch.empty(1, device="meta")]}]
    with pytest.raises(ValueError, match="is on meta"):
        check_step_in_backward({"step_in_backward": True, "stage": 2}, groups)


def joins(_rank: int, _world_size: int) -> None:
    """Job: uneven inputs."""
    optimizer = make(mlp())
    with pytest.raises(ValueError, match="Join with step_in_backward"), Join([optimizer]):
        pass


def test_uneven_inputs_are_refused() -> None:
    """Before anything is sent."""
    run("gloo", 2, joins)


def loads_after_a_tear(rank: int, _world_size: int, path: str) -> None:
    """Job: a backward fails half-way; a checkpoint makes everything whole."""
    model, subject, other, plain = twins(mlp(width=24, depth=4))
    save_checkpoint(path, model, subject, step=0)
    first = next(iter(model.parameters()))
    handle = first.register_hook(lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        mlp_loss(model, rank).backward()
    handle.remove()
    with pytest.raises(RuntimeError, match="are torn: load a checkpoint"):
        subject.state_dict()
    load_checkpoint(path, model, subject)
    for m, o in ((model, subject), (other, plain)):
        o.zero_grad()
        mlp_loss(m, rank).backward()
        o.step()
    assert_same_models(model, other, "after the load")


@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
def test_a_checkpoint_heals_a_backward_that_failed(backend: str, world_size: int, tmp_path: Path) -> None:
    """Its gradients are dropped."""
    run(backend, world_size, loads_after_a_tear, str(tmp_path / "saved"))


def dies_in_backward(rank: int, _world_size: int, shared_memory: bool) -> None:
    """Job: a rank is killed when some buckets are updated."""
    model = mlp(width=24, depth=4)
    optimizer = make(model, shared_memory=shared_memory)
    if rank == 1:
        next(iter(model.parameters())).register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
    mlp_loss(model, rank).backward()
    optimizer.step()


@pytest.mark.parametrize("shared_memory", [True, False], ids=["shared memory", "messages"])
def test_a_dead_peer_is_an_error_in_seconds(shared_memory: bool) -> None:
    """On the rank that is left."""
    survivor, dead = outcomes("gloo", 2, dies_in_backward, shared_memory)
    assert survivor.error is not None
    assert survivor.error.type_name == "PeerError", survivor.error.traceback
    assert survivor.seconds < 10.0
    assert dead.error is not None
    assert dead.error.type_name == "RankDied"


def is_deleted(_rank: int, _world_size: int) -> None:
    """Job: the optimizer goes between backward and step."""
    model = mlp(width=24, depth=4)
    optimizer = make(model)
    memory = weakref.ref(optimizer.shards.buckets[0])
    mlp_loss(model, 0).backward()
    optimizer.wait_for_parameters()
    del optimizer
    assert memory() is None
    assert all(p.grad is None for p in model.parameters())


def test_a_deleted_optimizer_is_freed_at_once() -> None:
    """No object that it made waits for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        run("none", 1, is_deleted)
    finally:
        gc.enable()
