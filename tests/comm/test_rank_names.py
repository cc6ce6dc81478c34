"""Errors of an optimizer on some ranks of the job name them by their numbers in the job."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor

from dist_asgd import ShardedASGD, save_checkpoint
from dist_asgd.comm.rank_names import RankNames
from tests.harness.ranks import outcomes, run

MEMBERS = (0, 2)


def test_names_of_a_whole_job_and_of_some_ranks() -> None:
    """Those of a whole job are short."""
    whole, some = RankNames(range(4)), RankNames((0, 2, 3, 9))
    assert (whole.place(1), some.place(1)) == ("rank 1 of 4", "rank 2 of ranks 0, 2-3, 9")
    assert (whole.describe([0, 1, 3]), some.describe([0, 1, 3])) == ("ranks 0-1, 3", "ranks 0, 2, 9")
    assert some.by_value(["a", "b", "a", "a"]) == "ranks 0, 3, 9 have a; rank 2 has b"


def fails(rank: int, world_size: int, what: str, by_mesh: bool, path: str) -> str:
    """Job: something goes wrong on the second rank of a group of ranks 0 and 2; returns the error there."""
    group = dist.new_group(MEMBERS)
    mesh = DeviceMesh("cpu", torch.tensor(MEMBERS)) if by_mesh else None
    if rank not in MEMBERS:
        return ""
    second = rank == MEMBERS[1]
    model = nn.Linear(4, 3)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(2.0 if second and what == "values" else 1.0)
    options: dict[str, Any] = {"process_group": None if by_mesh else group, "mesh": mesh, "lr": 0.1}
    stage = 2 if what in ("discards", "values") else 1
    if what == "placement":
        for name, param in list(model.named_parameters()):
            placed = distribute_tensor(param.detach(), DeviceMesh("cpu", torch.tensor(MEMBERS)), [Replicate()])
            setattr(model, name, nn.Parameter(placed))
    if second and what == "arguments":
        options["lr"] = 0.2
    with pytest.raises(Exception, match="dist_asgd") as caught:
        act(what, second, model, ShardedASGD(model.named_parameters(), stage=stage, **options), path)
    assert world_size == 3
    return str(caught.value)


def act(what: str, second: bool, model: nn.Module, optimizer: ShardedASGD, path: str) -> None:
    """Make the optimizer raise."""
    if what == "whole":
        optimizer.whole_state_dicts_only = True
        optimizer.state_dict()
    if what == "target":
        optimizer.consolidated_state_dict(to=2)
    if what == "save":
        if second:
            optimizer.state["mine"] = print
        save_checkpoint(path, model, optimizer, step=0)
    if what == "calls" and second:
        optimizer.consolidated_state_dict()
    if what == "discards":
        optimizer.zero_grad()
        if second:
            optimizer.gradients.agreement.discards += 1
    for param in model.parameters():
        has = not (second and what in ("missing", "placement"))
        param.grad = torch.full_like(param, 3.0 if second and what == "gradients" else 1.0) if has else None
    if second and what == "state":
        optimizer.state[next(model.parameters())]["ax"] = torch.ones(1)
    optimizer.step()


TEXTS = {
    "arguments": "rank 0 has 0.1; rank 2 has 0.2",
    "calls": "rank 0 has step(); rank 2 has consolidated_state_dict()",
    "state": "[on rank 2 of ranks 0, 2]",
    "missing": "has a gradient on rank 0 of ranks 0, 2 only",
    "gradients": "rank 2 has checksum",
    "values": "rank 2 has checksum",
    "discards": "rank 0 has 1; rank 2 has 2",
    "placement": "has a gradient on rank 0 of ranks 0, 2 only",
    "target": "0 to 1 (counted inside the group, which has ranks 0, 2)",
}


@pytest.mark.parametrize("by_mesh", [False, True], ids=["process_group", "mesh"])
@pytest.mark.parametrize("what", TEXTS)
def test_errors_of_a_group_name_ranks_of_the_job(what: str, by_mesh: bool) -> None:
    """Never its second rank by the number inside the group."""
    found = run("gloo", 3, fails, what, by_mesh, "")
    for rank in MEMBERS:
        assert TEXTS[what] in found[rank]
        assert "rank 1" not in found[rank]


def test_errors_of_one_rank_name_it() -> None:
    """``state_dict()`` that must be whole."""
    found = run("gloo", 3, fails, "whole", False, "")
    assert "state_dict() on rank 2 of ranks 0, 2 would" in found[2]


def test_errors_of_a_save(tmp_path: Path) -> None:
    """They are raised on both ranks."""
    found = run("gloo", 3, fails, "save", False, str(tmp_path / "saved"))
    assert "[on rank 2 of ranks 0, 2]" in found[0]
    assert found[0] == found[2]


def dies(rank: int, _world_size: int) -> None:
    """Job: the last rank dies before a step of ranks 1 and 2."""
    group = dist.new_group([1, 2])
    # Rank 0 has the store through which the others find each other: it must not end before they have.
    dist.barrier()
    if rank == 0:
        return
    param = nn.Parameter(torch.ones(64))
    optimizer = ShardedASGD([param], process_group=group)
    dist.barrier(group)
    if rank == 2:
        # Its part of the barrier has left by then: this is about the name, and the other rank is in the step.
        time.sleep(0.5)
        os._exit(9)
    param.grad = torch.ones(64)
    optimizer.step()


def test_a_peer_error_names_the_rank_of_the_job() -> None:
    """That is the rank that raises it."""
    error = outcomes("gloo", 3, dies)[1].error
    assert error is not None
    # With the stack of every thread, if the rank did not answer at all.
    assert "step() failed on rank 1 of ranks 1-2, and was not called on rank 2" in error.message, error.traceback
