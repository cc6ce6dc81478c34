"""The collectives for backends whose own reduce-scatter and all-gather are the fastest way: NCCL, and others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.profiler import record_function

from .base import GroupCommunicator, PendingSummary, ReduceScalars, Reduction, SendList, Wait


class NativeCollectives(GroupCommunicator):
    """Calls the collectives of ``torch.distributed`` on a whole group.

    On GPUs a wait blocks only the current stream, not the host.
    """

    def __init__(self, group: dist.ProcessGroup, averages: bool) -> None:
        """``averages``: whether the backend can take the mean itself (``ReduceOp.AVG``). No communication."""
        super().__init__(dist.get_process_group_ranks(group))
        self.group = group
        self._averages = averages
        # torch 2.13 renamed both functions; 2.11 knows only the old names.
        self._reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        self._all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    @property
    def contiguous(self) -> bool:
        return True

    def _call(self, action: str, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``collective`` on the group; ``action`` is its name in a PeerError."""
        try:
            return collective(*args, group=self.group, **kwargs)
        except RuntimeError as error:
            raise self.peer_error(action, error) from error

    def _wait(self, action: str, work: dist.Work | None) -> None:
        """Wait for what ``_call`` started."""
        try:
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise self.peer_error(action, error) from error

    def reduce_scatter(self, sends: SendList, shard: Tensor, accumulate: bool, tag: int) -> Reduction:
        send = sends[0][0][1]
        straight = not accumulate and send.dtype == shard.dtype
        if straight:
            out = shard
        else:
            # NCCL reduces in place, into this rank's own range of the send buffer. Other backends may read that range
            # after they have written it, so they get a tensor of their own.
            mine = send.view(self.world_size, -1)[self.rank]
            out = mine if self._averages else torch.empty_like(mine)
        op, divisor = self._begin_mean(send)
        with record_function("dist_asgd::reduce_scatter"):
            work = self._call("a reduce-scatter", self._reduce_scatter_single, out, send, op=op, async_op=True)

        def wait() -> None:
            self._wait("a reduce-scatter", work)
            if divisor != 1:
                out.div_(divisor)
            if accumulate:
                shard.add_(out)
            elif not straight:
                shard.copy_(out)

        # On GPUs a wait stops a stream, and never the host.
        return Reduction(wait, lambda: out.is_cuda or work is None or work.is_completed())

    def all_reduce(self, values: Tensor, tag: int) -> Wait:
        op, divisor = self._begin_mean(values)
        with record_function("dist_asgd::all_reduce"):
            work = self._call("an all-reduce", dist.all_reduce, values, op=op, async_op=True)

        def wait() -> None:
            self._wait("an all-reduce", work)
            if divisor != 1:
                values.div_(divisor)

        return wait

    def _begin_mean(self, values: Tensor) -> tuple[Any, float]:
        """Return the operation that reduces ``values``, and what its result has to be divided by for the mean.

        NCCL's own mean divides before it sums, and so do small float16 values vanish; a sum alone overflows where the
        mean would not. As in FSDP2, both ends get half of the division: ``values`` are divided in place by about the
        root of N here, which is a power of two.
        """
        if not self._averages:
            return dist.ReduceOp.SUM, self.world_size
        if values.dtype != torch.float16:
            return dist.ReduceOp.AVG, 1
        before = 1 << (self.world_size.bit_length() - 1) // 2
        if before > 1:
            values.div_(before)
        return dist.ReduceOp.SUM, self.world_size / before

    def all_gather(self, flat: Tensor) -> Wait:
        mine = flat.view(self.world_size, -1)[self.rank]
        with record_function("dist_asgd::all_gather"):
            work = self._call("an all-gather", self._all_gather_single, flat, mine, async_op=True)
        return lambda: self._wait("an all-gather", work)

    def all_gather_uneven(self, fragments: Sequence[Sequence[Tensor]]) -> Wait:
        # They are even here, and lie in one flat buffer.
        return self.all_gather(fragments[0][0])

    def gather(self, fragment: Tensor, places: Sequence[Tensor] | None, numels: Sequence[int], to: int | None) -> None:
        if len(set(numels)) > 1:
            self._gather_uneven(fragment, places, numels, to)
        elif not numels[0]:
            return
        elif to is None:
            self._call("a gather", dist.all_gather, list(cast(Sequence[Tensor], places)), fragment)
        else:
            target = dist.get_global_rank(self.group, to)
            self._call("a gather", dist.gather, fragment, None if places is None else list(places), dst=target)

    def _gather_uneven(
        self, fragment: Tensor, places: Sequence[Tensor] | None, numels: Sequence[int], to: int | None
    ) -> None:
        """``gather`` by broadcasts, because not all of these backends have messages between two ranks."""
        for rank, numel in enumerate(numels):
            if rank == self.rank and places is not None:
                places[rank].copy_(fragment)
            if rank != to and numel:
                mine = rank == self.rank
                buffer = fragment if mine else fragment.new_empty(numel) if places is None else places[rank]
                self._call("a gather", dist.broadcast, buffer, dist.get_global_rank(self.group, rank))

    def reduce_scalars(self, values: Tensor, op: ReduceScalars) -> Tensor:
        # NCCL reduces each element in one place and hands the result on, so all ranks have the same bits.
        kind = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op]
        work = self._call("a reduction of norms", dist.all_reduce, values, op=kind, async_op=True)
        self._wait("a reduction of norms", work)
        return values

    def summarise(self, words: Sequence[int], num_largest: int) -> PendingSummary:
        largest = torch.tensor(words[:num_largest], dtype=torch.int64, device="cpu")
        bits = torch.tensor(words[num_largest:], dtype=torch.int64, device="cpu")
        works = [
            self._call("a control exchange", dist.all_reduce, values, op=op, async_op=True)
            for values, op in ((largest, dist.ReduceOp.MAX), (bits, dist.ReduceOp.BOR))
            if values.numel()
        ]

        def wait() -> list[int]:
            for work in works:
                self._wait("a control exchange", work)
            return [*largest.tolist(), *bits.tolist()]

        return PendingSummary(wait)

    def exchange(self, words: Tensor) -> Tensor:
        # The table starts with this rank's own words in all rows, so that a group that moves nothing (torch's `fake`
        # backend) agrees with itself.
        table = words.repeat(self.world_size, 1)
        self._call("a control exchange", dist.all_gather, list(table.unbind(0)), words)
        return table

    def exchange_objects(self, value: Any) -> list[Any]:
        values: list[Any] = [value] * self.world_size
        self._call("an exchange of messages", dist.all_gather_object, values, value)
        return values

    def gather_objects(self, value: Any, to: int) -> list[Any] | None:
        values: list[Any] | None = [value] * self.world_size if self.rank == to else None
        target = dist.get_global_rank(self.group, to)
        self._call("a gather of messages", dist.gather_object, value, values, dst=target)
        if values is not None:
            values[to] = value
        return values
