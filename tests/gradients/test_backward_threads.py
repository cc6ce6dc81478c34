"""Stage 2 with backwards in several threads, and several accelerators in one process."""

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dist_asgd import ShardedASGD
from dist_asgd.validation import check_accelerators
from tests.gradients.test_stage2 import OPTIONS, assert_same_models, holds_no_gradient, integer_backward
from tests.harness.models import mlp
from tests.harness.ranks import run


def in_threads(*calls: Callable[[], object]) -> None:
    """Begin all calls at once, and wait for all."""
    start = threading.Barrier(len(calls))
    threads = [threading.Thread(target=lambda call=call: (start.wait(), call())) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Meeting(torch.autograd.Function):
    """Backward waits here for the other thread, so that two backwards are under way at once."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, meeting: threading.Barrier) -> Tensor:
        ctx.meeting = meeting  # type: ignore[attr-defined]
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.meeting.wait(10)  # type: ignore[attr-defined]
        return grads[0], None


def two_losses(params: list[nn.Parameter], number: int, meeting: threading.Barrier) -> Tensor:
    """A loss whose backward comes to the last parameters, meets the other thread, and goes on with the first ones."""
    first = torch.stack([(p * (number + 1.0 + i)).sum() for i, p in enumerate(params[:4])]).sum()
    value = Meeting.apply(first, meeting)
    for i, p in enumerate(params[4:]):
        value = value + (p * (number + 2.0 * i)).sum()
    return value


def overlaps(_rank: int, _world_size: int, shared: bool) -> None:
    """Job: two backwards at once, of halves of the parameters or both of all; integers keep sums exact."""
    params = [nn.Parameter(torch.full((5,), 1.0 + i)) for i in range(16)]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    subject = ShardedASGD(params, stage=2, bucket_cap_mb=1e-6, **OPTIONS)
    oracle = torch.optim.ASGD(copies, **OPTIONS)
    for step in range(4):
        subject.zero_grad()
        oracle.zero_grad()
        parts = (params, params) if shared else (params[:8], params[8:])
        meeting = threading.Barrier(2)
        losses = [two_losses(part, 3 * step + number, meeting) for number, part in enumerate(parts)]
        in_threads(*(loss.backward for loss in losses))
        alone = threading.Barrier(1)
        for number, part in enumerate((copies[:8], copies[8:]) if not shared else (copies, copies)):
            two_losses(part, 3 * step + number, alone).backward()
        subject.step()
        oracle.step()
        assert all(map(torch.equal, params, copies)), f"after step {step}"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
def test_backwards_that_overlap_in_threads(backend: str, world_size: int, shared: bool) -> None:
    """No gradient is lost, and none counted twice."""
    run(backend, world_size, overlaps, shared)


def in_turns(_rank: int, _world_size: int) -> None:
    """Job: backward in another thread than construction and step, one at a time; buckets leave during it."""
    ours = mlp()
    theirs = copy.deepcopy(ours)
    subject = ShardedASGD(ours.parameters(), stage=2, bucket_cap_mb=0.002, **OPTIONS)
    oracle = torch.optim.ASGD(theirs.parameters(), **OPTIONS)
    for step in range(3):
        subject.zero_grad()
        oracle.zero_grad()
        for number in range(2):
            in_threads(lambda seed=2 * step + number: integer_backward(ours, seed))  # type: ignore[misc]
            assert holds_no_gradient(ours)
            integer_backward(theirs, 2 * step + number)
        subject.step()
        oracle.step()
        assert_same_models(ours, theirs, f"after step {step}")


@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
def test_backwards_in_threads_in_turns(backend: str, world_size: int) -> None:
    """A thread of one's own for backward is nothing special."""
    run(backend, world_size, in_turns)


CUDA = [torch.device("cuda", 0), torch.device("cuda", 1)]
BOTH = {CUDA[0]: "first", CUDA[1]: "second", torch.device("cpu"): "third"}


def test_several_accelerators_in_stage_2() -> None:
    """The error names a parameter on each."""
    with pytest.raises(ValueError, match=r"parameter first is on cuda:0, parameter second is on cuda:1.*stage=1"):
        check_accelerators(BOTH, 2, 2, None)


def test_accelerators_that_the_process_group_does_not_serve() -> None:
    """In both stages."""
    for stage in (1, 2):
        with pytest.raises(ValueError, match="parameter second is on cuda:1, but the process group is bound to cuda:0"):
            check_accelerators({CUDA[1]: "second"}, 2, stage, CUDA[0])
    with pytest.raises(ValueError, match="parameter second is on cuda:1"):
        check_accelerators(BOTH, 2, 1, CUDA[0])


def test_accelerators_that_work() -> None:
    """One and the host; several in stage 1; anything in one process."""
    check_accelerators({CUDA[0]: "first", torch.device("cpu"): "third"}, 2, 2, CUDA[0])
    check_accelerators(BOTH, 2, 1, None)
    check_accelerators(BOTH, 1, 2, None)
