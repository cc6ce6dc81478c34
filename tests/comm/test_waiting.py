"""Calls that some ranks make alone: the log says for whom they wait, and the error names the ranks that are missing."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_asgd import ShardedASGD, export_averaged, save_checkpoint
from dist_asgd.comm import waiting
from tests.harness.ranks import outcomes, run

# With the stage in which each is tried: a dead rank costs some seconds.
CALLS = [
    ("averaged_parameters", 1),
    ("consolidated_state_dict", 2),
    ("save_checkpoint", 2),
    ("export_averaged", 1),
    ("step", 2),
]


def make_call(call: str, optimizer: ShardedASGD, model: nn.Module, folder: str) -> None:
    """Make one of ``CALLS``."""
    calls: dict[str, Callable[[], Any]] = {
        "averaged_parameters": lambda: optimizer.averaged_parameters().__enter__(),
        "consolidated_state_dict": optimizer.consolidated_state_dict,
        "save_checkpoint": lambda: save_checkpoint(Path(folder, "saved"), model, optimizer, step=1),
        "export_averaged": lambda: export_averaged(Path(folder, "a.safetensors"), model, optimizer),
        "step": optimizer.step,
    }
    calls[call]()


def trained(stage: int) -> tuple[nn.Module, ShardedASGD]:
    """A model and its optimizer after a step."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = ShardedASGD(model.parameters(), lr=0.1, stage=stage)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def alone(rank: int, _world_size: int, call: str, stage: int, folder: str) -> None:
    """Job: ranks 0 and 2 make the call, rank 1 ends without it."""
    model, optimizer = trained(stage)
    dist.barrier()
    if rank == 1:
        time.sleep(0.3)
        os._exit(3)
    make_call(call, optimizer, model, folder)


@pytest.mark.parametrize(("call", "stage"), CALLS)
def test_the_error_names_the_ranks_that_did_not_call(call: str, stage: int, tmp_path: Path) -> None:
    """And the call, on every rank that made it."""
    for rank, outcome in enumerate(outcomes("gloo", 3, alone, call, stage, str(tmp_path))):
        if rank != 1:
            assert outcome.error is not None
            assert outcome.error.type_name == "PeerError"
            assert f"{call}() failed on rank {rank} of 3, and was not called on rank 1" in outcome.error.message
            assert "no condition such as 'if rank == 0:'" in outcome.error.message


def late(rank: int, _world_size: int, call: str, folder: str) -> list[str]:
    """Job: rank 1 comes late; returns what each rank's log says."""
    model, optimizer = trained(1)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("dist_asgd").addHandler(handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(waiting, "PATIENCE_S", 0.2)
            dist.barrier()
            if rank == 1:
                # The threads that look do so every two seconds.
                time.sleep(3.5)
            make_call(call, optimizer, model, folder)
    finally:
        logging.getLogger("dist_asgd").removeHandler(handler)
    return [record.getMessage() for record in records if "has waited" in record.getMessage()]


@pytest.mark.parametrize("call", ["averaged_parameters", "save_checkpoint"])
def test_the_log_says_which_call_waits_for_whom(call: str, tmp_path: Path) -> None:
    """Once, on the ranks that wait; the call goes on when the others arrive."""
    said = run("gloo", 3, late, call, str(tmp_path))
    assert said[1] == []
    for rank in (0, 2):
        assert len(said[rank]) == 1
        assert said[rank][0].startswith(f"{call}() on rank {rank} of 3 has waited ")
        assert " s for rank 1. Every rank must make this call" in said[rank][0]
