"""Backends whose own reduce-scatter and all-gather are the fast ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.profiler import record_function

from .base import GroupCommunicator, SendList, Wait


class NativeCollectives(GroupCommunicator):
    """Backends whose own reduce-scatter and all-gather are the fast ones: NCCL."""

    def __init__(self, group: dist.ProcessGroup, averages: bool) -> None:
        super().__init__(group)
        self._averages = averages
        # torch 2.13 renamed both; 2.11 knows only the old names.
        self._reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        self._gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    @property
    def contiguous(self) -> bool:
        return True

    def reduce_scatter(self, parts: SendList, shard: Tensor, accumulate: bool, tag: int) -> Wait:
        # NCCL reduces in place, into this rank's own part; others need room of their own.
        mine = parts[self.rank][0][1]
        send = parts[0][0][1].as_strided((self.world_size * mine.numel(),), (1,))
        out = mine if self._averages else torch.empty_like(mine)
        op = dist.ReduceOp.AVG if self._averages else dist.ReduceOp.SUM
        with record_function("dist_asgd::reduce_scatter"), self._guard("a reduce-scatter"):
            work = self._reduce(out, send, op=op, group=self.group, async_op=True)

        def store() -> None:
            if not self._averages:
                out.div_(self.world_size)
            if accumulate:
                shard.add_(out)
            else:
                shard.copy_(out)

        return self._waiting([work], "a reduce-scatter", store)

    def all_reduce(self, values: Tensor, tag: int) -> Wait:
        op = dist.ReduceOp.AVG if self._averages else dist.ReduceOp.SUM
        with record_function("dist_asgd::all_reduce"), self._guard("an all-reduce"):
            work = dist.all_reduce(values, op=op, group=self.group, async_op=True)

        def divide() -> None:
            if not self._averages:
                values.div_(self.world_size)

        return self._waiting([work], "an all-reduce", divide)

    def all_gather(self, flat: Tensor) -> Wait:
        mine = flat.view(self.world_size, -1)[self.rank]
        with record_function("dist_asgd::all_gather"), self._guard("an all-gather"):
            work = self._gather(flat, mine, group=self.group, async_op=True)
        return self._waiting([work], "an all-gather")

    def all_gather_parts(self, parts: Sequence[Sequence[Tensor]]) -> Wait:
        first = parts[0][0]
        return self.all_gather(first.as_strided((self.world_size * first.numel(),), (1,)))

    def collect(self, shard: Tensor, pieces: Sequence[Tensor] | None, to: int | None) -> None:
        with self._guard("a gather"):
            if to is None:
                dist.all_gather(list(cast(Sequence[Tensor], pieces)), shard, group=self.group)
            else:
                target = dist.get_global_rank(self.group, to)
                dist.gather(shard, None if pieces is None else list(pieces), dst=target, group=self.group)

    def bring(self, piece: Tensor, places: Sequence[Tensor] | None, numels: Sequence[int], to: int | None) -> None:
        # Broadcasts, as not all of these backends have messages between two ranks.
        with self._guard("a gather"):
            for rank, numel in enumerate(numels):
                if rank == self.rank and places is not None:
                    places[rank].copy_(piece)
                if rank != to and numel:
                    mine = piece if rank == self.rank else piece.new_empty(numel) if places is None else places[rank]
                    dist.broadcast(mine, dist.get_global_rank(self.group, rank), group=self.group)

    def gather_rows(self, row: Tensor) -> Tensor:
        table = row.repeat(self.world_size, 1)
        with self._guard("a gather of norms"):
            dist.all_gather(list(table.unbind(0)), row, group=self.group)
        return table

    def exchange(self, words: Tensor) -> Callable[[], Tensor]:
        # Pre-filled with this rank's own words, so that a group that moves nothing (``fake``) agrees with itself.
        table = words.repeat(self.world_size, 1)
        with self._guard("a control exchange"):
            work = dist.all_gather(list(table.unbind(0)), words, group=self.group, async_op=True)

        def wait() -> Tensor:
            with self._guard("a control exchange"):
                if work is not None:
                    work.wait()
            return table

        return wait

    def exchange_objects(self, value: Any) -> list[Any]:
        values: list[Any] = [value] * self.world_size
        with self._guard("an exchange of messages"):
            dist.all_gather_object(values, value, group=self.group)
        return values
