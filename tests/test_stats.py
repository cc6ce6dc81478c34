"""``stats()``: bytes beside plans, through shared memory and by native collectives; steps and waits.

Bytes of messages are compared with the messages themselves in ``tests/planning/test_real_runs.py``.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import dist_asgd
from dist_asgd import GradScaler, ShardedASGD, Stats, plan
from dist_asgd.comm.gloo import Gloo
from dist_asgd.comm.measure import Action
from dist_asgd.comm.shared_pages import ENVIRONMENT
from dist_asgd.planning.choice import HSDP, HYBRID2, STAGE1, STAGE2
from dist_asgd.storage.buffers import Bucket
from tests.harness.meshes import hybrid_mesh
from tests.harness.native import native_collectives
from tests.harness.ranks import run

MESHES: dict[str, tuple[int, int] | None] = {STAGE1: None, STAGE2: None, HYBRID2: (2, 2), HSDP: (2, 2)}
BUCKET_MB = 0.02
# By how much a rank is late, beside which whatever else the machine does is short.
LATE_S = 0.3


def net() -> nn.Sequential:
    """Several buckets, of sizes that no number of ranks divides."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(65, 77), nn.Linear(77, 41), nn.Linear(41, 1, bias=False))


def set_gradients(model: nn.Module) -> None:
    """Let a backward give every parameter a gradient."""
    model(torch.ones(2, 65)).sum().backward()


def one_step(_rank: int, _world_size: int, mode: str, transport: str) -> Stats:
    """Job: what a step sends, after one that has made all that is kept."""
    mesh = MESHES[mode]
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv(ENVIRONMENT, str(int(transport == "memory")))
        if transport == "native":
            stack.enter_context(native_collectives())
        model = net()
        grid = None if mesh is None else hybrid_mesh(mesh)
        if mode == HSDP:
            fully_shard(model, mesh=grid)
            grid = None
        stage = 2 if mode in (STAGE2, HYBRID2) else 1
        optimizer = ShardedASGD(model.parameters(), stage=stage, mesh=grid, bucket_cap_mb=BUCKET_MB)
        assert optimizer.stats() == Stats(*[0] * 10), "construction counts"
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.stats(reset=True)
            set_gradients(model)
            optimizer.step()
        return optimizer.stats()


@pytest.mark.parametrize("transport", ["memory", "native"])
@pytest.mark.parametrize("mode", list(MESHES))
def test_bytes_are_those_of_the_plan(mode: str, transport: str) -> None:
    """With shared memory and with native collectives whole buckets travel, as a plan for NCCL has them.

    Replicas gather local tensors through shared memory as they do by messages, which need no padding. Control words
    there go to every other rank at once, and have no status.
    """
    with torch.device("meta"):
        model = net()
    backend = "gloo" if mode == HSDP and transport == "memory" else "nccl"
    row = plan(model, ranks=4, mesh=MESHES[mode], backend=backend, bucket_cap_mb=BUCKET_MB).row(mode)
    planned = {"reduce-scatter": 0, "all-reduce": 0, "all-gather": 0, "control exchange": 0}
    for transfer in row.traffic:
        planned[transfer.kind] += transfer.sent_bytes * (transfer.by == "dist_asgd")
        if transfer.kind == "control exchange" and transport == "memory":
            planned[transfer.kind] = transfer.calls * 3 * (transfer.piece_bytes - 8)
    found = run("gloo", 4, one_step, mode, transport)
    # FSDP2 cuts rows: its ranks hold local tensors of different sizes, and a plan tells of the first.
    for stats in found[:1] if mode == HSDP else found:
        assert stats.sent_gradient_bytes == planned["reduce-scatter"] + planned["all-reduce"]
        assert stats.sent_parameter_bytes == planned["all-gather"] > 0
        assert stats.sent_control_bytes == planned["control exchange"]
        assert (stats.sent_other_bytes, stats.steps) == (0, 1)


def waits(rank: int, _world_size: int, memory: bool) -> list[Stats]:
    """Job: rank 1 comes late to the step, to its gradients, and to the gather of its parameters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT, str(int(memory)))
        model = net()
        optimizer = ShardedASGD(model.parameters(), stage=2)

        def late(phase: str) -> None:
            if rank == 1 and phase == now:
                time.sleep(LATE_S)

        launch, pack, post = optimizer.gatherer.launch, Bucket.pack, Gloo.post

        def packing(*arguments: Any) -> None:
            if memory:
                late("gradients")
            pack(*arguments)

        def posting(self: Gloo, action: Action, tag: int, receives: Any, sends: Any) -> Any:
            if rank == 1 and action is Action.REDUCE_SCATTER and now == "gradients":
                # As on a slow link: this rank goes on, and takes part in the exchange before its gradients arrive.
                threading.Timer(LATE_S, post, (self, action, tag, (), sends)).start()
                sends = ()
            return post(self, action, tag, receives, sends)

        def launching(buffer: Any) -> None:
            late("parameters")
            launch(buffer)

        patch.setattr(Bucket, "pack", packing)
        patch.setattr(Gloo, "post", posting)
        patch.setattr(optimizer.gatherer, "launch", launching)
        found = []
        for phase in ("none", "control", "gradients", "parameters"):
            now = phase
            optimizer.zero_grad()
            optimizer.stats(reset=True)
            set_gradients(model)
            late("control")
            optimizer.step()
            found.append(optimizer.stats())
        return found


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "messages"])
def test_waits_are_counted_where_they_are(memory: bool) -> None:
    """A rank that waits for another one says for what; the late one has not waited for it."""
    found = run("gloo", 2, waits, memory)
    kinds = ("control", "gradient", "parameter")
    for number, kind in enumerate(kinds, 1):
        on_time, late = ({k: getattr(s[number], f"waited_{k}_s") for k in kinds} for s in found)
        assert on_time[kind] > 0.9 * LATE_S
        assert on_time[kind] == max(on_time.values())
        assert on_time[kind] > late[kind]


def scaled(rank: int, _world_size: int) -> list[Stats]:
    """Job: a step, one in which a gradient of rank 1 overflows, and a call without any gradient."""
    param = nn.Parameter(torch.ones(8))
    optimizer = ShardedASGD([param], stage=2)
    scaler = GradScaler("cpu", init_scale=2.0)
    found = []
    for value in (1.0, torch.inf if rank == 1 else 1.0, None):
        optimizer.zero_grad()
        if value is not None:
            scaler.scale((param * value).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        found.append(optimizer.stats())
    return found


def test_skipped_steps_are_counted_on_all_ranks() -> None:
    """They are no steps."""
    for found in run("gloo", 2, scaled):
        assert [(stats.steps, stats.skipped_steps) for stats in found] == [(1, 0), (1, 1), (1, 1)]


def gathers(_rank: int, _world_size: int, folder: str) -> tuple[Stats, Stats, Stats]:
    """Job: what averages, a consolidated state dict and a checkpoint send."""
    model = net()
    optimizer = ShardedASGD(model.named_parameters(), t0=0)
    for _ in range(2):
        set_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.stats(reset=True)
    with optimizer.averaged_parameters():
        averaged = optimizer.stats(reset=True)
    optimizer.stats(reset=True)
    optimizer.consolidated_state_dict(to=0)
    consolidated = optimizer.stats(reset=True)
    dist_asgd.save_checkpoint(f"{folder}/saved", model, optimizer, step=2)
    return averaged, consolidated, optimizer.stats()


def test_other_calls_count_by_what_they_send(tmp_path: Any) -> None:
    """Averages are gathered as parameters are; state that state dicts gather, and what saves say, is something else."""
    numel = sum(param.numel() for param in net().parameters())
    for rank, (averaged, consolidated, saved) in enumerate(run("gloo", 2, gathers, str(tmp_path))):
        assert averaged.sent_parameter_bytes >= numel // 2 * 4
        assert averaged.sent_other_bytes == averaged.steps == 0
        assert consolidated.sent_parameter_bytes == consolidated.sent_gradient_bytes == 0
        assert (consolidated.sent_other_bytes >= numel // 2 * 4) == (rank == 1)
        assert saved.sent_parameter_bytes == 0 < saved.sent_other_bytes


def test_whole_steps_count() -> None:
    """With ``differentiable=True``, too; a step of no parameter does not."""
    param = torch.ones(3)
    optimizer = ShardedASGD([param], differentiable=True)
    optimizer.step()
    param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.stats().steps == 1


def test_one_process_sends_nothing() -> None:
    """Its stats are plain values that users may keep, pickle and subtract."""
    param = nn.Parameter(torch.ones(3))
    optimizer = ShardedASGD([param], stage=2)
    for _ in range(3):
        param.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    stats = optimizer.stats(reset=True)
    assert stats == Stats(3, *[0] * 9)
    assert pickle.loads(pickle.dumps(stats)) == stats
    assert stats.since(stats) == optimizer.stats()
    with pytest.raises(FrozenInstanceError):
        stats.steps = 4  # type: ignore[misc]


def test_steps_that_a_device_skips_are_read_from_it() -> None:
    """The flag of a step is kept as a tensor until somebody asks."""
    optimizer = ShardedASGD([nn.Parameter(torch.ones(3))])

    class Step:
        def __init__(self, found_inf: Tensor | None) -> None:
            self.found_inf = found_inf

    for flag in (0.0, 1.0, None, 2.0):
        optimizer.counts.add([0], Step(None if flag is None else torch.tensor([flag])))  # type: ignore[arg-type]
    assert (optimizer.stats().steps, optimizer.stats(reset=True).skipped_steps) == (2, 2)
    assert optimizer.stats().skipped_steps == 0
