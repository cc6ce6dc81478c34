"""Several ranks on one GPU: this process is one of them, and its collectives run late on a side stream.

Peers are imagined to send what this rank sends, so that each mean is this rank's own value. As on a busy network, what
a collective reads and writes is touched late: on a stream of its own, after a pause, and it is poison before that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_asgd.comm import Communicators
from dist_asgd.comm.base import Communicator, SingleProcess
from dist_asgd.comm.measure import Action
from dist_asgd.comm.native import NativeCollectives

RANK, WORLD_SIZE = 1, 4
# So many cycles a collective keeps its stream waiting: some 10 ms, longer than any launch.
PAUSE_CYCLES = 20_000_000


class _StreamWork:
    """What a wait for a collective of NCCL does: it lets the current stream wait for that of the collective."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream

    def wait(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


class LateCollectives(NativeCollectives):
    """The collectives of one rank among ``ranks`` whose peers are imagined, late and on a side stream.

    On CPUs they run at once. If only the host is watched, ``late`` is False and they do nothing: the mean of what all
    ranks send lies where it is wanted.
    """

    def __init__(self, ranks: Sequence[int], averages: bool, device: torch.device, late: bool) -> None:
        assert dist.group.WORLD is not None
        super().__init__(dist.group.WORLD, averages)
        self.ranks = list(ranks)
        self.rank, self.world_size = self.ranks.index(dist.get_rank()), len(self.ranks)
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._late = late
        assert late or averages

    def _call(self, action: Action, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("async_op"):
            raise NotImplementedError(f"{action} has no imagined peers")
        out, sent = args[0], args[-1]
        if isinstance(out, list):
            raise NotImplementedError(f"{action} has no imagined peers")
        if not self._late:
            return _StreamWork(None)
        with self._aside():
            if out.numel() * self.world_size == sent.numel():  # a reduce-scatter
                mine = sent.view(self.world_size, -1)[self.rank].clone()
                # A send buffer that is used again too early holds this poison.
                sent.fill_(torch.nan)
                out.copy_(mine if self._averages else mine * self.world_size)
            else:
                # Peers' shards stay as they are: nobody knows what they would have become.
                kept = out.clone()
                out.fill_(torch.nan)
                summed = out is sent and not self._averages and kwargs.get("op") == dist.ReduceOp.SUM
                out.copy_(kept * self.world_size if summed and action is Action.ALL_REDUCE else kept)
        return _StreamWork(self._stream)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(PAUSE_CYCLES)  # type: ignore[no-untyped-call]
            yield


@contextmanager
def imagined_ranks(*, averages: bool = True, late: bool = True) -> Iterator[None]:
    """Inside, this process is rank 1 of 4."""

    def make(_: Communicators, ranks: Sequence[int], on: torch.device) -> Communicator:
        return SingleProcess() if len(ranks) == 1 else LateCollectives(ranks, averages, on, late)

    dist.init_process_group("fake", rank=RANK, world_size=WORLD_SIZE, store=FakeStore())
    try:
        with mock.patch.object(Communicators, "_make_among", make):
            yield
    finally:
        dist.destroy_process_group()


def mesh_of(shape: tuple[int, int] | None, device: torch.device) -> dict[str, Any]:
    """The argument of an optimizer for hybrid sharding on the imagined ranks; empty for a ``shape`` of None."""
    if shape is None:
        return {}
    names = ("replicate", "shard")
    mesh = DeviceMesh(
        device.type, torch.arange(WORLD_SIZE).view(shape), mesh_dim_names=names, _init_backend=False, _rank=RANK
    )
    return {"mesh": mesh}


def own_fragments(optimizer: Any, oracle_params: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's fragment of each parameter, beside the same elements of the oracle's; dense parameters only."""
    for member in optimizer.shards.members:
        fragment = member.fragment
        if fragment.numel:
            whole = oracle_params[member.index].detach().flatten()
            yield (
                member.param_range(fragment.start, fragment.stop),
                whole[fragment.param_start : fragment.param_start + fragment.numel],
            )
