"""Nothing silent, nothing hangs: every misuse is an error on *every* rank, with the ranks and the parameter in it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dist_asgd import ShardedASGD
from tests.harness.models import mlp, mlp_loss
from tests.harness.outcome import RankError
from tests.harness.ranks import run_errors

Job = Callable[..., Any]
WORLDS = [("threads", 3), ("gloo", 2)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)
both = pytest.mark.parametrize("stage", [1, 2])


def assert_all_say(errors: list[RankError], kind: str, *words: str) -> None:
    """Every rank raised ``kind``, and its message holds every one of ``words``."""
    for error in errors:
        assert error.type_name == kind, error.traceback
        for word in words:
            assert word in error.message, f"{word!r} not in {error.message!r}"


def named(count: int, *, start: int = 0) -> list[tuple[str, nn.Parameter]]:
    """Named parameters ``layer0``, ``layer1``, ... of distinct sizes."""
    return [(f"layer{i}", nn.Parameter(torch.full((i + 3,), 0.5))) for i in range(start, start + count)]


# --- construction ------------------------------------------------------------------------------------------


DIFFERENCES: dict[str, tuple[Callable[[], list[tuple[str, nn.Parameter]]], dict[str, Any], str]] = {
    "shape": (lambda: [*named(1), ("layer1", nn.Parameter(torch.ones(9)))], {}, "layer1"),
    "dtype": (lambda: [*named(1), ("layer1", nn.Parameter(torch.ones(4).double()))], {}, "layer1"),
    "frozen": (lambda: [*named(1), ("layer1", nn.Parameter(torch.ones(4), requires_grad=False))], {}, "layer1"),
    "name": (lambda: [*named(1), ("other", named(2)[1][1])], {}, "layer1"),
    "order": (lambda: named(2)[::-1], {}, "layer0"),
    "count": (lambda: named(3), {}, "layer2"),
    "lr": (lambda: named(2), {"lr": 0.5}, "lr"),
    "lambd": (lambda: named(2), {"lambd": 0.5}, "lambd"),
    "alpha": (lambda: named(2), {"alpha": 0.5}, "alpha"),
    "t0": (lambda: named(2), {"t0": 7}, "t0"),
    "weight_decay": (lambda: named(2), {"weight_decay": 0.5}, "weight_decay"),
    "maximize": (lambda: named(2), {"maximize": True}, "maximize"),
    "foreach": (lambda: named(2), {"foreach": True}, "foreach"),
    "bucket_cap_mb": (lambda: named(2), {"bucket_cap_mb": 3.0}, "bucket_cap_mb"),
}


def differ_at_construction(rank: int, _world_size: int, what: str, stage: int) -> None:
    """Job: rank 1 builds something else."""
    make, options, _ = DIFFERENCES[what]
    if rank == 1:
        ShardedASGD(make(), stage=stage, **options)
    else:
        ShardedASGD(named(2), stage=stage)


@both
@worlds
@pytest.mark.parametrize("what", DIFFERENCES)
def test_ranks_that_build_different_optimizers(backend: str, world_size: int, what: str, stage: int) -> None:
    """The error names rank 1 and what differs first."""
    errors = run_errors(backend, world_size, differ_at_construction, what, stage)
    assert_all_say(errors, "ValueError", DIFFERENCES[what][2], "rank 1")


def differ_in_stage(rank: int, _world_size: int) -> None:
    """Job: rank 1 asks for the other stage."""
    ShardedASGD(named(2), stage=1 + (rank == 1))


@worlds
def test_ranks_that_ask_for_different_stages(backend: str, world_size: int) -> None:
    """Named as such."""
    assert_all_say(run_errors(backend, world_size, differ_in_stage), "ValueError", "stage", "rank 1")


def differ_in_values(rank: int, _world_size: int, stage: int) -> None:
    """Job: rank 1 starts from other weights, and trains."""
    params = named(3)
    if rank == 1:
        params[2][1].data += 1e-6
    optimizer = ShardedASGD(params, stage=stage)
    for _, p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


@both
@worlds
def test_ranks_that_start_from_different_values(backend: str, world_size: int, stage: int) -> None:
    """At construction or at the first step, before anything has changed."""
    errors = run_errors(backend, world_size, differ_in_values, stage)
    assert_all_say(errors, "RuntimeError", "layer2", "rank 1")


def differ_in_added_group(rank: int, _world_size: int, what: str, stage: int) -> None:
    """Job: rank 1 adds another group; nothing has changed after the error, and training goes on."""
    optimizer = ShardedASGD(named(1), stage=stage)
    make, options, _ = DIFFERENCES[what]
    added = make() if rank == 1 else named(2)
    extra = options if rank == 1 else {}
    try:
        optimizer.add_param_group({"params": [(f"added.{n}", p) for n, p in added], **extra})
    except ValueError:
        assert len(optimizer.param_groups) == 1
        first = optimizer.param_groups[0]["params"][0]
        first.grad = torch.ones_like(first)
        optimizer.step()
        raise


@both
@worlds
@pytest.mark.parametrize("what", ["shape", "dtype", "name", "count", "lr"])
def test_ranks_that_add_different_groups(backend: str, world_size: int, what: str, stage: int) -> None:
    """As at construction; the optimizer stays as it was."""
    errors = run_errors(backend, world_size, differ_in_added_group, what, stage)
    assert_all_say(errors, "ValueError", DIFFERENCES[what][2], "rank 1")


# --- options -----------------------------------------------------------------------------------------------

REFUSED: dict[str, dict[str, Any]] = {
    "lr": {"lr": -0.1},
    "lambd": {"lambd": float("inf")},
    "alpha": {"alpha": float("nan")},
    "t0": {"t0": float("nan")},
    "weight_decay": {"weight_decay": -1e-3},
    "capturable": {"capturable": True},
    "differentiable": {"differentiable": True},
    "stage": {"stage": 3},
    "bucket_cap_mb": {"bucket_cap_mb": 0},
}


def construct(rank: int, _world_size: int, options: dict[str, Any], only_rank: int | None) -> None:
    """Job: construct with options that are refused, on all ranks or one."""
    ShardedASGD(named(2), **(options if only_rank in (None, rank) else {}))


@worlds
@pytest.mark.parametrize("only_rank", [None, 1], ids=["all", "rank1"])
@pytest.mark.parametrize("name", REFUSED)
def test_options_that_are_refused(backend: str, world_size: int, name: str, only_rank: int | None) -> None:
    """A ValueError that names the option, on all ranks, also where only one asked for it."""
    errors = run_errors(backend, world_size, construct, REFUSED[name], only_rank)
    assert_all_say(errors, "ValueError", name)


@pytest.mark.parametrize(
    "options",
    [{"lr": torch.tensor([0.1, 0.2])}, {"bucket_cap_mb": -1.0}, {"bucket_cap_mb": float("nan")}, {"stage": 0}],
)
def test_options_that_are_refused_in_one_process(options: dict[str, Any]) -> None:
    """No process group needed."""
    with pytest.raises(ValueError, match=next(iter(options))):
        ShardedASGD(named(1), **options)


def test_a_group_with_bad_hyperparameters_is_not_added() -> None:
    """Names the hyperparameter and leaves the optimizer as it was."""
    optimizer = ShardedASGD(named(1))
    with pytest.raises(ValueError, match="lambd"):
        optimizer.add_param_group({"params": named(1, start=1), "lambd": -1.0})
    assert len(optimizer.param_groups) == 1


def test_a_parameter_given_twice_is_refused() -> None:
    """Also across groups, as in torch."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = ShardedASGD([weight])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [weight]})


@pytest.mark.parametrize(
    "param",
    [nn.Parameter(torch.ones(3, device="meta")), nn.Parameter(torch.ones(1).expand(5))],
    ids=["meta", "expanded"],
)
def test_parameters_that_cannot_be_sharded_are_named(param: nn.Parameter) -> None:
    """What to do instead is in the message."""
    with pytest.raises(ValueError, match="odd_one"):
        ShardedASGD([("odd_one", param)])


# --- gradients ---------------------------------------------------------------------------------------------


def without_ddp(rank: int, _world_size: int) -> None:
    """Job: stage 1 on a bare model, every rank with its own data."""
    model = mlp()
    optimizer = ShardedASGD(model.named_parameters(), stage=1)
    mlp_loss(model, rank).backward()
    optimizer.step()


@worlds
def test_stage_1_without_ddp(backend: str, world_size: int) -> None:
    """The first step finds that gradients differ and says what to do."""
    errors = run_errors(backend, world_size, without_ddp)
    assert_all_say(errors, "RuntimeError", "wrap the model in DDP or pass stage=2", "rank 1", "0.weight")


def missing_gradient(rank: int, _world_size: int) -> None:
    """Job: stage 1, one parameter has a gradient on rank 1 only."""
    params = named(3)
    optimizer = ShardedASGD(params, stage=1)
    for name, p in params:
        if name != "layer1" or rank == 1:
            p.grad = torch.ones_like(p)
    optimizer.step()


@worlds
def test_stage_1_with_a_gradient_on_one_rank_only(backend: str, world_size: int) -> None:
    """DDP leaves gradients on all ranks or on none."""
    errors = run_errors(backend, world_size, missing_gradient)
    assert_all_say(errors, "RuntimeError", "layer1", "rank 1")


def _sparse(p: nn.Parameter) -> None:
    p.grad = torch.ones(len(p)).to_sparse()


def _wrong_dtype(p: nn.Parameter) -> None:
    p.grad = None
    p.grad_dtype = torch.float64
    p.grad = torch.ones(len(p), dtype=torch.float64)


def _recast(p: nn.Parameter) -> None:
    p.data = p.data.double()


def _shortened(p: nn.Parameter) -> None:
    p.data = p.data[:2]


def _restrided(p: nn.Parameter) -> None:
    p.data = p.data.as_strided((4,), (0,))


DAMAGE = {
    "sparse": _sparse,
    "wrong dtype": _wrong_dtype,
    "recast": _recast,
    "shortened": _shortened,
    "restrided": _restrided,
}


def damaged(rank: int, _world_size: int, what: str, stage: int) -> None:
    """Job: after a good step, something happens to ``layer1`` on rank 1."""
    params = named(3)
    optimizer = ShardedASGD(params, stage=stage)
    for number in range(2):
        optimizer.zero_grad()
        for name, p in params:
            if number == 1 and name == "layer1" and rank == 1:
                DAMAGE[what](p)
            if p.grad is None and p.dtype == torch.float32:
                p.grad = torch.ones_like(p)
        optimizer.step()
        assert number == 0, "the second step should have raised"


@both
@worlds
@pytest.mark.parametrize("what", DAMAGE)
def test_a_gradient_or_parameter_that_went_wrong_on_one_rank(
    backend: str, world_size: int, what: str, stage: int
) -> None:
    """All ranks name the parameter and the rank."""
    errors = run_errors(backend, world_size, damaged, what, stage)
    assert_all_say(errors, "RuntimeError", "layer1", "rank 1")


def sparse_embedding(_rank: int, _world_size: int, stage: int) -> None:
    """Job: a real sparse gradient, from backward."""
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = ShardedASGD(embedding.named_parameters(), stage=stage)
    with torch.no_grad():
        embedding.weight.fill_(0.5)
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer.step()


@both
@worlds
def test_sparse_embeddings(backend: str, world_size: int, stage: int) -> None:
    """Refused as torch refuses them, with the name."""
    errors = run_errors(backend, world_size, sparse_embedding, stage)
    assert_all_say(errors, "RuntimeError", "weight", "sparse")


def model_to(_rank: int, _world_size: int, stage: int) -> None:
    """Job: ``model.to(dtype)`` after the first step."""
    model = mlp()
    optimizer = ShardedASGD(model.named_parameters(), stage=stage)
    mlp_loss(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.to(torch.bfloat16)
    model(torch.ones(2, 12, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()


@both
@worlds
def test_a_model_that_was_recast_after_a_step(backend: str, world_size: int, stage: int) -> None:
    """The first parameter is named."""
    errors = run_errors(backend, world_size, model_to, stage)
    assert_all_say(errors, "RuntimeError", "0.weight")


def changed_lr(rank: int, _world_size: int, lr: float, only_rank: int | None, stage: int) -> None:
    """Job: the learning rate changes after a good step."""
    params = named(2)
    optimizer = ShardedASGD(params, stage=stage)
    for number in range(2):
        optimizer.zero_grad()
        for _, p in params:
            p.grad = torch.ones_like(p)
        if number == 1 and only_rank in (None, rank):
            optimizer.param_groups[0]["lr"] = lr
        optimizer.step()


@both
@worlds
@pytest.mark.parametrize(
    ("lr", "only_rank", "kind"), [(float("nan"), None, "ValueError"), (-1.0, 1, "ValueError"), (0.5, 1, "ValueError")]
)
def test_a_learning_rate_that_went_wrong(
    backend: str, world_size: int, lr: float, only_rank: int | None, kind: str, stage: int
) -> None:
    """NaN everywhere, negative on one rank, or merely different on one rank."""
    errors = run_errors(backend, world_size, changed_lr, lr, only_rank, stage)
    assert_all_say(errors, kind, "lr", *(["rank 1"] if only_rank else []))


# --- calls -------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[ShardedASGD], Any]] = {
    "consolidated_state_dict": lambda optimizer: optimizer.consolidated_state_dict(to=None),
    "clip_grad_norm_": lambda optimizer: optimizer.clip_grad_norm_(1.0),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "averaged_parameters": lambda optimizer: optimizer.averaged_parameters().__enter__(),
    "add_param_group": lambda optimizer: optimizer.add_param_group({"params": named(1, start=5)}),
}


def different_calls(rank: int, _world_size: int, call: str, stage: int) -> None:
    """Job: rank 1 makes another call than the others, who step."""
    params = named(3)
    optimizer = ShardedASGD(params, stage=stage)
    for _, p in params:
        p.grad = torch.ones_like(p)
    if rank == 1:
        CALLS[call](optimizer)
    else:
        optimizer.step()


@worlds
@pytest.mark.parametrize(
    ("call", "stage"), [(call, stage) for call in CALLS for stage in (1, 2) if (call, stage) != ("clip_grad_norm_", 1)]
)
def test_ranks_that_make_different_calls(backend: str, world_size: int, call: str, stage: int) -> None:
    """An error that names both calls, not a hang."""
    errors = run_errors(backend, world_size, different_calls, call, stage)
    assert_all_say(errors, "CallsDiffer", "step", call.strip("_"), "rank 1")


def different_targets(rank: int, _world_size: int) -> None:
    """Job: ranks disagree on where the state goes."""
    ShardedASGD(named(2)).consolidated_state_dict(to=rank)


@worlds
def test_ranks_that_consolidate_to_different_ranks(backend: str, world_size: int) -> None:
    """Named."""
    assert_all_say(run_errors(backend, world_size, different_targets), "ValueError", "to")


def consolidate_to(_rank: int, _world_size: int, to: Any) -> None:
    """Job: a rank that does not exist."""
    ShardedASGD(named(2)).consolidated_state_dict(to=to)


@worlds
@pytest.mark.parametrize("to", [-1, 17])
def test_consolidating_to_a_rank_that_does_not_exist(backend: str, world_size: int, to: int) -> None:
    """Refused on all ranks."""
    assert_all_say(run_errors(backend, world_size, consolidate_to, to), "ValueError", str(to))
