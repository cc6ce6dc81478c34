"""The collectives that NCCL gets, on Gloo ranks: with values, and as late as a device may run them.

``native_collectives`` makes optimizers use ``NativeCollectives`` on CPUs, where Gloo's own formulation is used
otherwise: contiguous buckets, reductions in place, means by the backend. A GPU runs a collective at any time between
its launch and its wait. Here, with ``late``, it runs in the wait, and what it writes is poison until then.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from dist_asgd.comm import Communicators
from dist_asgd.comm.base import Communicator, SingleProcess
from dist_asgd.comm.measure import Action
from dist_asgd.comm.native import NativeCollectives
from dist_asgd.comm.streams import Stream
from dist_asgd.gradients import transfers


class LateWork:
    """The work of a collective that runs when it is waited for; ``wait`` is called once."""

    def __init__(self, run: Callable[[], object]) -> None:
        self._run: Callable[[], object] | None = run

    def is_completed(self) -> bool:
        """Never: as late as may be."""
        return False

    def wait(self) -> None:
        """Run the collective."""
        assert self._run is not None, "waited for twice"
        run, self._run = self._run, None
        run()


class LateCollectives(NativeCollectives):
    """Runs each asynchronous collective in its wait.

    Until then what it will write is poisoned, and what it will read may not change: a wait that finds either changed
    fails. All ranks must wait in one order, which they do: in that of the launches.
    """

    def _call(self, action: Action, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not kwargs.pop("async_op", False):
            return super()._call(action, collective, *args, **kwargs)
        out, sent = args[0], args[-1]
        kept = sent.clone()
        # Nobody may read anything of an operand that is also written before the collective has left it there.
        poison(out)
        poisoned, expected = out.clone(), sent.clone()

        def run() -> None:
            assert same_bytes(out, poisoned), f"the result of {action} was written before its wait"
            assert same_bytes(sent, expected), f"what {action} sends was changed before its wait"
            sent.copy_(kept)
            collective(*args, group=self.group, **kwargs)

        return LateWork(run)


def poison(tensor: Tensor) -> None:
    """Fill a tensor with values that nobody can mistake for results."""
    tensor.fill_(torch.nan if tensor.dtype.is_floating_point else -77)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether the bits of two 1-D tensors are equal; those of NaNs count."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


class LateStream(Stream):
    """A stream that runs nothing before somebody waits for it.

    What it reads may then have been overwritten, and what it writes may have been read before: values come out wrong,
    as on a GPU whose computing stream is ahead. ``num_run`` counts what has run.
    """

    def __init__(self) -> None:
        self._queue: deque[Callable[[], None]] = deque()
        self.num_run = 0

    def run(self, work: Callable[[], None], reads: Iterable[Tensor] = ()) -> None:
        """Put ``work`` off."""
        self._queue.append(work)

    def mark(self) -> Callable[[], None]:
        """The call runs all that was put off before this one."""
        return partial(self._run_until, self.num_run + len(self._queue))

    def synchronize(self) -> None:
        """Run everything."""
        self._run_until(self.num_run + len(self._queue))

    def _run_until(self, number: int) -> None:
        while self.num_run < number:
            self.num_run += 1
            self._queue.popleft()()


@contextlib.contextmanager
def late_streams() -> Iterator[list[LateStream]]:
    """Inside, the gradients of each device travel on a ``LateStream``; yields the list of those."""
    made: list[LateStream] = []

    def make(_: torch.device, __: bool) -> Stream:
        made.append(LateStream())
        return made[-1]

    with mock.patch.object(transfers, "stream_for", make):
        yield made


@contextlib.contextmanager
def native_collectives(*, averages: bool = True, late: bool = False) -> Iterator[list[NativeCollectives]]:
    """Inside, optimizers use ``NativeCollectives`` for tensors; yields the list of those that they have made.

    Control words stay on Gloo, as they do beside NCCL. Collective at the first use of each set of ranks.
    """
    made: list[NativeCollectives] = []

    def make(communicators: Communicators, ranks: tuple[int, ...], __: torch.device) -> Communicator:
        if len(ranks) == 1:
            return SingleProcess()
        group = dist.new_group(list(ranks), backend="gloo", use_local_synchronization=True)
        made.append((LateCollectives if late else NativeCollectives)(group, averages, communicators.meter))
        return made[-1]

    with mock.patch.object(Communicators, "_make_among", make):
        yield made
