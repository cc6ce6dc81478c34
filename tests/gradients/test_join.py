"""Uneven inputs: ``ShardedASGD`` in torch's ``Join``, beside DDP with ``torch.optim.ASGD`` in the same context.

The oracle is the rank that joined last: it has stepped in every iteration, and DDP broadcasts its parameters.
Processes, because DDP does not run on threads.
"""

import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import dist_asgd
from dist_asgd import ShardedASGD
from tests.harness.bits import assert_same_bits
from tests.harness.cases import every_pair
from tests.harness.models import mlp
from tests.harness.ranks import outcomes, run, run_errors

Script = dict[str, Any]


def make(optimizer_class: type[Optimizer], script: Script) -> tuple[nn.Module, nn.Module, Any]:
    """The plain model, the module to call and the optimizer."""
    model = mlp().to(script.get("dtype", torch.float32))
    options = {"lr": 0.1, "t0": 2, **script.get("options", {})}
    if optimizer_class is ShardedASGD:
        options |= {"bucket_cap_mb": 0.002, **script.get("own_options", {})}
        if "mesh" in options:
            options["mesh"] = init_device_mesh("cpu", options["mesh"], mesh_dim_names=("replicate", "shard"))
    net: nn.Module = model
    if options.get("stage", 1) == 1:
        net = DistributedDataParallel(model, bucket_cap_mb=0.002, **script.get("ddp_options", {}))
    return model, net, optimizer_class(model.parameters(), **options)


def loss_of(net: nn.Module, seed: int) -> Tensor:
    """The loss on the batch of ``seed``, in the dtype of the parameters."""
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))
    outputs: Tensor = net(x.to(next(net.parameters()).dtype))
    return functional.mse_loss(outputs, x[:, :4].sin().to(outputs.dtype))


def joinables(net: nn.Module, optimizer: Any) -> list[Any]:
    """What the script passes to ``Join``."""
    in_ddp = [net] if isinstance(net, DistributedDataParallel) else []
    return in_ddp + ([optimizer] if isinstance(optimizer, ShardedASGD) else [])


def train(optimizer_class: type[Optimizer], rank: int, script: Script) -> tuple[list[Tensor], list[Tensor]]:
    """One pass over ``script["counts"][rank]`` batches inside ``Join``; final parameters and averages."""
    model, net, optimizer = make(optimizer_class, script)
    scaler = script["scaler"](optimizer_class) if "scaler" in script else None
    with Join(joinables(net, optimizer), **script.get("join_options", {})):
        for step in range(script["counts"][rank]):
            if "lrs" in script:
                optimizer.param_groups[0]["lr"] = script["lrs"][step % len(script["lrs"])]
            if script.get("accumulate"):
                with optimizer.no_sync() if hasattr(optimizer, "no_sync") else net.no_sync():  # type: ignore[operator]
                    loss_of(net, 1000 + 100 * step + rank).backward()
            loss = loss_of(net, 100 * step + rank)
            if scaler is None:
                loss.backward()
            else:
                scaler.scale(loss * (float("inf") if step == script.get("overflows_at") else 1.0)).backward()
            if "clip" in script:
                if optimizer_class is ShardedASGD:
                    optimizer.clip_grad_norm_(script["clip"])
                else:
                    nn.utils.clip_grad_norm_(model.parameters(), script["clip"])
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
    sharded = isinstance(optimizer, ShardedASGD)
    state = optimizer.consolidated_state_dict(to=None) if sharded else optimizer.state_dict()
    params = [p.detach().clone() for p in model.parameters()]
    return params, [s["ax"].clone() for s in state["state"].values()] or params


def compare(rank: int, world_size: int, script: Script) -> None:
    """Job: the script with both classes; both broadcast from the rank that joined last."""
    counts = script["counts"]
    last = max(r for r in range(world_size) if counts[r] == max(counts))
    expected = train(torch.optim.ASGD, rank, script)
    found = train(ShardedASGD, rank, script)
    for what, ours, torchs in zip(("parameter", "ax"), found, expected, strict=True):
        for index, (one, other) in enumerate(zip(ours, torchs, strict=True)):
            dist.broadcast(other, last)
            assert_same_bits(one, other, f"{what} {index} on rank {rank} of {counts}")


@pytest.mark.parametrize("stage", [1, 2])
def test_hybrid_sharding(stage: int) -> None:
    """All ranks of a replica may have joined: gradients come from another one."""
    script: Script = {"own_options": {"stage": stage, "mesh": (2, 2)}}
    for counts in ([0, 0, 3, 1], [2, 2, 0, 1]):
        run("gloo", 4, compare if stage == 1 else same_but_rounding, {**script, "counts": counts})


def counts_of(seed: int, world_size: int) -> list[int]:
    """A random uneven number of batches for each rank; some ranks may have none."""
    counts = random.Random(seed).choices(range(6), k=world_size)
    counts[seed % world_size] = 6
    return counts


@every_pair(
    world_size=[2, 3, 4],
    form=[{}, {"foreach": False}, {"foreach": True}],
    divide=[True, False],
    views=[False, True],
    lrs=[[0.1], [0.1, 0.05, 0.2]],
)
def test_stage_1(world_size: int, form: Any, divide: bool, views: bool, lrs: list[float]) -> None:
    """Also with a learning rate that changes at each step, of which a rank that has joined hears nothing."""
    script: Script = {"options": form, "ddp_options": {"gradient_as_bucket_view": views}, "lrs": lrs}
    script["join_options"] = {"divide_by_initial_world_size": divide}
    for seed in range(2):
        run("gloo", world_size, compare, {**script, "counts": counts_of(seed, world_size)})


@every_pair(world_size=[2, 4], form=[{}, {"foreach": False}, {"foreach": True}], lrs=[[0.1], [0.1, 0.05]])
def test_stage_2(world_size: int, form: Any, lrs: list[float]) -> None:
    """Two and four ranks, so that both means are exact."""
    script: Script = {"options": form, "own_options": {"stage": 2}, "lrs": lrs}
    counts = [[1, 3], [0, 2], [5, 0]] if world_size == 2 else [[0, 0, 3, 0], [2, 0, 0, 2]]
    for each in counts:
        run("gloo", world_size, same_but_rounding, {**script, "counts": each})


def same_but_rounding(rank: int, world_size: int, script: Script) -> None:
    """Job: as ``compare``; with four addends the order of the sum is not DDP's, so the bits are not either."""
    if world_size == 2:
        compare(rank, world_size, script)
        return
    counts = script["counts"]
    last = max(r for r in range(world_size) if counts[r] == max(counts))
    for ours, torchs in zip(train(ShardedASGD, rank, script), train(torch.optim.ASGD, rank, script), strict=True):
        for one, other in zip(ours, torchs, strict=True):
            dist.broadcast(other, last)
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_and_float64(stage: int) -> None:
    """Averages of bfloat16 in bfloat16 have torch's bits."""
    for dtype in (torch.float64, torch.bfloat16):
        script: Script = {"counts": [4, 1], "dtype": dtype, "own_options": {"stage": stage, "average_dtype": dtype}}
        run("gloo", 2, compare if dtype == torch.float64 or stage == 1 else train_only, script)


def train_only(rank: int, _world_size: int, script: Script) -> None:
    """Job: the script with this package alone; all ranks end with the same bits."""
    for tensor in (t for tensors in train(ShardedASGD, rank, script) for t in tensors):
        other = tensor.clone()
        dist.broadcast(other, 0)
        assert_same_bits(tensor, other, "after the context")


def test_clipping_in_stage_1() -> None:
    """Joined ranks get gradients as the step reads them, clipped."""
    run("gloo", 3, compare, {"counts": [1, 0, 4], "clip": 0.05})


def test_clipping_and_accumulation_in_stage_2() -> None:
    """A joined rank takes part in clipping, and contributes zeros to each backward that reduces."""
    clipped = {"counts": [1, 4], "own_options": {"stage": 2}, "clip": 0.05}
    reference = run("gloo", 2, train_both, clipped)
    for found, expected in zip(*reference[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    run("gloo", 2, train_only, {**clipped, "accumulate": True})


def train_both(rank: int, _world_size: int, script: Script) -> tuple[list[Tensor], list[Tensor]]:
    """Job: the parameters of both classes; those of torch are right on the rank that joined last."""
    return train(ShardedASGD, rank, script)[0], train(torch.optim.ASGD, rank, script)[0]


def scaler_for(optimizer_class: type[Optimizer]) -> Any:
    """A scaler for the optimizer's gradients."""
    own = optimizer_class is ShardedASGD
    return dist_asgd.GradScaler("cpu", init_scale=1024.0) if own else torch.amp.GradScaler("cpu", init_scale=1024.0)


@pytest.mark.parametrize("stage", [1, 2])
def test_loss_scaling(stage: int) -> None:
    """A step that the scaler skips is a step for ranks that have joined: they do not wait for it."""
    script = {"counts": [1, 5], "own_options": {"stage": stage}, "scaler": scaler_for, "overflows_at": 2}
    run("gloo", 2, compare, script)


def epochs(rank: int, _world_size: int, stage: int, order: list[list[int]]) -> None:
    """Job: several epochs with other ranks last, a checkpoint-like call between them, and own gradients kept."""
    model, net, optimizer = make(ShardedASGD, {"own_options": {"stage": stage}})
    for epoch, counts in enumerate(order):
        with Join(joinables(net, optimizer)):
            for step in range(counts[rank]):
                optimizer.zero_grad()
                loss_of(net, 1000 * epoch + 10 * step + rank).backward()
                own = [p.grad for p in model.parameters()]
                optimizer.step()
        if stage == 1 and counts[rank]:
            assert all(p.grad is g for p, g in zip(model.parameters(), own, strict=True))
        optimizer.consolidated_state_dict()
    steps = {int(optimizer.state[p]["step"]) for p in model.parameters()}
    assert steps == {sum(map(max, order))}
    with optimizer.averaged_parameters():
        for p in model.parameters():
            other = p.detach().clone()
            dist.broadcast(other, 0)
            assert_same_bits(p.detach(), other, "average")
    # Outside of a context everything is as before.
    optimizer.zero_grad()
    loss_of(net, rank).backward()
    optimizer.step()


@pytest.mark.parametrize("stage", [1, 2])
def test_epochs_and_calls_between_them(stage: int) -> None:
    """State is the same on all ranks after each context, whoever was last."""
    run("gloo", 3, epochs, stage, [[1, 2, 3], [2, 0, 1], [0, 3, 3], [2, 2, 2]])


def disabled(rank: int, _world_size: int, stage: int) -> None:
    """Job: ``enable=False`` with equal inputs."""
    model, net, optimizer = make(ShardedASGD, {"own_options": {"stage": stage}})
    with Join(joinables(net, optimizer), enable=False):
        for step in range(2):
            loss_of(net, 10 * step + rank).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert int(optimizer.state[next(model.parameters())]["step"]) == 2


@pytest.mark.parametrize("stage", [1, 2])
def test_disabled(stage: int) -> None:
    """Nothing is sent for it."""
    run("gloo", 2, disabled, stage)


def throws(rank: int, _world_size: int, stage: int) -> int:
    """Job: ``throw_on_early_termination``: every rank raises, and trains on in the next epoch."""
    model, net, optimizer = make(ShardedASGD, {"own_options": {"stage": stage}})
    for epoch in range(2):
        thrown = ""
        try:
            with Join(joinables(net, optimizer), throw_on_early_termination=True):
                for step in range(2 + rank):
                    optimizer.zero_grad()
                    loss_of(net, 100 * epoch + 10 * step + rank).backward()
                    optimizer.step()
        except RuntimeError as error:
            thrown = str(error)
        assert "exhausted" in thrown
    # Also without a further context.
    optimizer.zero_grad()
    loss_of(net, rank).backward()
    optimizer.step()
    return int(optimizer.state[next(model.parameters())]["step"])


@pytest.mark.parametrize("stage", [1, 2])
def test_throw_on_early_termination(stage: int) -> None:
    """The steps before are taken by all."""
    assert run("gloo", 2, throws, stage) == [5, 5]


def other_call(rank: int, _world_size: int, stage: int, call: Callable[[Any], Any], after_step: bool) -> None:
    """Job: a call that rank 0, which has joined, does not make."""
    _, net, optimizer = make(ShardedASGD, {"own_options": {"stage": stage}})
    with Join(joinables(net, optimizer)):
        for step in range(1 + 2 * rank):
            loss_of(net, 10 * step + rank).backward()
            if step == 2 and not after_step:
                call(optimizer)
            optimizer.step()
            if step == 2 and after_step:
                call(optimizer)
            optimizer.zero_grad()


def averages(optimizer: ShardedASGD) -> None:
    """Enter and leave the averages."""
    with optimizer.averaged_parameters():
        pass


def consolidate(optimizer: ShardedASGD) -> None:
    """Gather the state."""
    optimizer.consolidated_state_dict()


def clip_by_torch(optimizer: ShardedASGD) -> None:
    """Stage 2: reads the gradients of all ranks through ``p.grad``."""
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)


def test_torchs_clipping_is_an_error_on_all_ranks() -> None:
    """In stage 2, while a rank has joined: it cannot know what an operator on ``p.grad`` needs."""
    for error in run_errors("gloo", 2, other_call, 2, clip_by_torch, False, within_s=5.0):
        assert "an operator on p.grad" in error.message, error.message


@pytest.mark.parametrize("call", [averages, consolidate], ids=["averages", "consolidate"])
@pytest.mark.parametrize("stage", [1, 2])
def test_other_calls_are_errors_on_all_ranks(stage: int, call: Callable[[Any], Any]) -> None:
    """In seconds, not after the group's timeout."""
    for error in run_errors("gloo", 2, other_call, stage, call, False, within_s=5.0):
        assert "rank 0 has nothing more: no inputs are left; rank 1 has" in error.message, error.message
    if stage == 2:
        for error in run_errors("gloo", 2, other_call, stage, call, True, within_s=5.0):
            assert "can only step" in error.message, error.message


def refused_after_step(rank: int, _world_size: int) -> str:
    """Job: stage 1, a call between iterations; the joined rank waits in torch, so only the other one can raise."""
    _, net, optimizer = make(ShardedASGD, {})
    message = ""
    with Join(joinables(net, optimizer)):
        for step in range(1 + 2 * rank):
            loss_of(net, 10 * step + rank).backward()
            optimizer.step()
            if step:
                with pytest.raises(RuntimeError, match="after rank 0 ran out of inputs") as raised:
                    optimizer.consolidated_state_dict()
                message = str(raised.value)
            optimizer.zero_grad()
    return message


def test_calls_between_iterations_in_stage_1() -> None:
    """An error at once, after which training can go on."""
    assert "Call it after the context" in run("gloo", 2, refused_after_step)[1]


def refusals(_rank: int, _world_size: int) -> None:
    """Job: contexts that cannot work are refused at their construction, on every rank."""
    _, net, optimizer = make(ShardedASGD, {})
    with pytest.raises(ValueError, match=r"Join\(\[ddp, optimizer\]\)"):
        Join([optimizer, net])  # type: ignore[list-item]
    Join([optimizer, net], enable=False)  # type: ignore[list-item]
    _, _, second = make(ShardedASGD, {"own_options": {"stage": 2}})
    with pytest.raises(ValueError, match=r"Join\(\[optimizer\]\)"):
        Join([net, second])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="divide_by_initial_world_size=False with stage=2"):
        Join([second], divide_by_initial_world_size=False)


def test_refusals() -> None:
    """The wrong order, and what stage 2 cannot do."""
    run("gloo", 2, refusals)


def missing_wrapper(rank: int, _world_size: int) -> None:
    """Job: the first step is one of ranks 1 and 2 alone, and their gradients differ."""
    model, net, optimizer = make(ShardedASGD, {})
    with Join(joinables(net, optimizer)):
        for _ in range(min(rank, 1)):
            loss_of(net, rank).backward()
            for p in model.parameters():
                assert p.grad is not None
                p.grad.add_(rank)
            optimizer.step()


def test_the_first_step_still_compares_gradients() -> None:
    """Those of active ranks; what a joined rank has does not matter."""
    for error in run_errors("gloo", 3, missing_wrapper):
        assert "differs between ranks" in error.message


def peer_dies(rank: int, _world_size: int) -> None:
    """Job: an active rank raises inside the context and leaves; the joined rank must not be left waiting for ever."""
    _, net, optimizer = make(ShardedASGD, {})
    with contextlib.suppress(ZeroDivisionError), Join(joinables(net, optimizer)):
        for step in range(1 + 2 * rank):
            loss_of(net, step).backward()
            if step:
                optimizer.param_groups[0]["lr"] = -1.0
            optimizer.step()


def test_a_problem_of_an_active_rank_is_one_of_all() -> None:
    """The agreement carries it to ranks that have joined."""
    for error in run_errors("gloo", 2, peer_dies):
        assert "lr" in error.message
        assert "on rank 1 of 2" in error.message


def test_one_process() -> None:
    """It is a Joinable there, too, and costs no message."""
    assert outcomes("gloo", 1, disabled, 1)[0].error is None
