"""The collectives for backends whose own reduce-scatter and all-gather are the fastest way: NCCL, and others."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..labels import Label, label
from .base import GroupCommunicator, PendingSummary, ReduceScalars, Reduction, SendList, Wait
from .measure import Action, Meter


class NativeCollectives(GroupCommunicator):
    """Calls the collectives of ``torch.distributed`` on a whole group.

    On GPUs a wait blocks only the current stream, not the host. What is sent counts as a ring of all ranks sends it:
    how the backend does it, nobody sees.
    """

    def __init__(self, group: dist.ProcessGroup, averages: bool, meter: Meter | None = None) -> None:
        """``averages``: whether the backend can take the mean itself (``ReduceOp.AVG``). No communication."""
        super().__init__(dist.get_process_group_ranks(group), meter)
        self.group = group
        self._averages = averages
        # torch 2.13 renamed both functions; 2.11 knows only the old names.
        self._reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        self._all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    @property
    def contiguous(self) -> bool:
        return True

    def _call(self, action: Action, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``collective`` on the group; ``action`` names it in a PeerError."""
        try:
            return collective(*args, group=self.group, **kwargs)
        except RuntimeError as error:
            raise self.peer_error(action, error) from error

    def _launch(
        self, action: Action, sent_bytes: int, collective: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Call ``collective``, in which this rank sends so many bytes."""
        with self.meter.launching(action, sent_bytes):
            return self._call(action, collective, *args, **kwargs)

    def _launch_and_wait(
        self, action: Action, sent_bytes: int, collective: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> None:
        """Call a ``collective`` that waits by itself."""
        with self.meter.waiting(action):
            self._launch(action, sent_bytes, collective, *args, **kwargs)

    def _to_others(self, nbytes: int) -> int:
        """What a rank sends in a ring that brings its ``nbytes`` to all others."""
        return (self.world_size - 1) * nbytes

    def _all_reduced(self, nbytes: int) -> int:
        """What a rank sends in a ring that sums ``nbytes``: twice around, each time all but one of N parts."""
        return 2 * nbytes * (self.world_size - 1) // self.world_size

    def _wait(self, action: Action, work: dist.Work | None) -> None:
        """Wait for what ``_call`` started."""
        try:
            if work is not None:
                with self.meter.waiting(action):
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
        sent_bytes = self._to_others(out.nbytes)
        start = self._reduce_scatter_single
        work = self._launch(Action.REDUCE_SCATTER, sent_bytes, start, out, send, op=op, async_op=True)

        def wait() -> None:
            self._wait(Action.REDUCE_SCATTER, work)
            with label(Label.MEAN):
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
        sent_bytes = self._all_reduced(values.nbytes)
        work = self._launch(Action.ALL_REDUCE, sent_bytes, dist.all_reduce, values, op=op, async_op=True)

        def wait() -> None:
            self._wait(Action.ALL_REDUCE, work)
            with label(Label.MEAN):
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

    def all_gather(self, flat: Tensor, action: Action = Action.ALL_GATHER) -> Wait:
        mine = flat.view(self.world_size, -1)[self.rank]
        sent_bytes = self._to_others(mine.nbytes)
        work = self._launch(action, sent_bytes, self._all_gather_single, flat, mine, async_op=True)
        return lambda: self._wait(action, work)

    def all_gather_uneven(self, fragments: Sequence[Sequence[Tensor]]) -> Wait:
        # They are even here, and lie in one flat buffer.
        return self.all_gather(fragments[0][0])

    def gather(self, fragment: Tensor, places: Sequence[Tensor] | None, numels: Sequence[int], to: int | None) -> None:
        if len(set(numels)) > 1:
            self._gather_uneven(fragment, places, numels, to)
        elif not numels[0]:
            return
        elif to is None:
            received = list(cast(Sequence[Tensor], places))
            self._launch_and_wait(Action.GATHER, self._to_others(fragment.nbytes), dist.all_gather, received, fragment)
        else:
            sent_bytes, target = 0 if self.rank == to else fragment.nbytes, dist.get_global_rank(self.group, to)
            received_there = None if places is None else list(places)
            self._launch_and_wait(Action.GATHER, sent_bytes, dist.gather, fragment, received_there, dst=target)

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
                sent_bytes = self._to_others(buffer.nbytes) if mine else 0
                source = dist.get_global_rank(self.group, rank)
                self._launch_and_wait(Action.GATHER, sent_bytes, dist.broadcast, buffer, source)

    def reduce_scalars(self, values: Tensor, op: ReduceScalars) -> Tensor:
        # NCCL reduces each element in one place and hands the result on, so all ranks have the same bits.
        kind = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op]
        sent_bytes = self._all_reduced(values.nbytes)
        work = self._launch(Action.REDUCE_SCALARS, sent_bytes, dist.all_reduce, values, op=kind, async_op=True)
        self._wait(Action.REDUCE_SCALARS, work)
        return values

    def summarise(self, words: Sequence[int], num_largest: int) -> PendingSummary:
        largest = torch.tensor(words[:num_largest], dtype=torch.int64, device="cpu")
        bits = torch.tensor(words[num_largest:], dtype=torch.int64, device="cpu")
        works = [
            self._launch(
                Action.EXCHANGE, self._all_reduced(values.nbytes), dist.all_reduce, values, op=op, async_op=True
            )
            for values, op in ((largest, dist.ReduceOp.MAX), (bits, dist.ReduceOp.BOR))
            if values.numel()
        ]

        def wait() -> list[int]:
            for work in works:
                self._wait(Action.EXCHANGE, work)
            return [*largest.tolist(), *bits.tolist()]

        return PendingSummary(wait)

    def exchange(self, words: Tensor) -> Tensor:
        # The table starts with this rank's own words in all rows, so that a group that moves nothing (torch's `fake`
        # backend) agrees with itself.
        table = words.repeat(self.world_size, 1)
        rows = list(table.unbind(0))
        self._launch_and_wait(Action.EXCHANGE, self._to_others(words.nbytes), dist.all_gather, rows, words)
        return table

    def exchange_objects(self, value: Any) -> list[Any]:
        values: list[Any] = [value] * self.world_size
        sent_bytes = self._to_others(len(pickle.dumps(value)))
        self._launch_and_wait(Action.EXCHANGE_OBJECTS, sent_bytes, dist.all_gather_object, values, value)
        return values

    def gather_objects(self, value: Any, to: int) -> list[Any] | None:
        values: list[Any] | None = [value] * self.world_size if self.rank == to else None
        target = dist.get_global_rank(self.group, to)
        sent_bytes = 0 if self.rank == to else len(pickle.dumps(value))
        self._launch_and_wait(Action.GATHER_OBJECTS, sent_bytes, dist.gather_object, value, values, dst=target)
        if values is not None:
            values[to] = value
        return values
