"""The harness itself: values come back, errors come from every rank, hangs and deaths are told apart."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.harness.outcome import RanksFailed
from tests.harness.ranks import outcomes, run, run_errors


def sum_of_ranks(rank: int, _world_size: int, scale: float) -> torch.Tensor:
    """One all-reduce."""
    x = torch.full((3,), scale * (rank + 1))
    dist.all_reduce(x)
    return x


def raise_on(rank: int, _world_size: int, ranks: tuple[int, ...]) -> None:
    """Raise on some ranks, wait for them in a collective on the others."""
    if rank in ranks:
        raise ValueError(f"told to on rank {rank}")
    dist.barrier()


def sleep_on(rank: int, _world_size: int, sleeper: int) -> None:
    """Never come back on one rank."""
    if rank == sleeper:
        time.sleep(1000)


def exit_on(rank: int, _world_size: int, victim: int) -> None:
    """Die on one rank, without a word."""
    if rank == victim:
        os._exit(3)


@pytest.mark.parametrize("backend", ["threads", "gloo"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_values_come_back_in_rank_order(backend: str, world_size: int) -> None:
    """Every rank took part in the collective."""
    expected = torch.full((3,), 0.5 * sum(range(1, world_size + 1)))
    found = run(backend, world_size, sum_of_ranks, 0.5)
    assert len(found) == world_size
    assert all(torch.equal(x, expected) for x in found)


@pytest.mark.parametrize("backend", ["threads", "gloo"])
def test_an_error_on_every_rank_is_collected_and_the_next_job_runs(backend: str) -> None:
    """Type, message and traceback of each rank."""
    found = run_errors(backend, 2, raise_on, (0, 1))
    assert [e.message for e in found] == ["told to on rank 0", "told to on rank 1"]
    assert {e.type_name for e in found} == {"ValueError"}
    assert all("raise_on" in e.traceback for e in found)
    assert run(backend, 2, sum_of_ranks, 1.0)[1][0].item() == 3.0


def test_an_error_on_one_rank_only_is_a_failure_and_not_a_hang() -> None:
    """The rank that was left waiting is named."""
    with pytest.raises(RanksFailed, match="rank 1: RankHung"):
        run_errors("threads", 2, raise_on, (0,))
    assert run("threads", 2, sum_of_ranks, 1.0)[0][0].item() == 3.0


def test_a_hung_process_is_named_with_its_stack_and_the_pool_comes_back() -> None:
    """A job that does not end costs its timeout, not the session."""
    found = outcomes("gloo", 2, sleep_on, 1, timeout_s=2.0)
    assert found[0].error is None
    assert found[1].error is not None
    assert found[1].error.type_name == "RankHung"
    assert "sleep_on" in found[1].error.traceback
    assert run("gloo", 2, sum_of_ranks, 1.0)[0][0].item() == 3.0


def test_a_dead_process_is_named_and_the_pool_comes_back() -> None:
    """The exit code is kept."""
    found = outcomes("gloo", 2, exit_on, 0)
    assert found[0].error is not None
    assert (found[0].error.type_name, found[0].error.message) == ("RankDied", "exit code 3")
    assert run("gloo", 2, sum_of_ranks, 1.0)[0][0].item() == 3.0
