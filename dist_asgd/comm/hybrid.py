"""Hybrid sharding: the ranks inside a node (say) hold different shards, and equal replicas lie across the nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base import Communicator, ReduceScalars, Reduction, SendList, ShardCollectives, Wait
from .measure import Action


class _Steps:
    """One shard on its way through the three steps of a hybrid reduction, each of which runs once.

    A step is dropped once it has run, so that the buffers it refers to can be freed.
    """

    def __init__(self, wait_inside: Wait, start_across: Callable[[], Wait], store: Wait) -> None:
        self._steps: list[Callable[[], Wait | None]] = [store, start_across, wait_inside]  # the last one runs first
        self._wait_across: Wait | None = None

    def start_across(self) -> None:
        """Wait for the reduce-scatter inside, and start the all-reduce across; only the first call does something."""
        if len(self._steps) == 3:
            self._steps.pop()()
            self._wait_across = self._steps.pop()()

    def finish(self) -> None:
        """Wait until the shard is complete; called once."""
        self.start_across()
        wait, self._wait_across = self._wait_across, None
        assert wait is not None
        wait()
        self._steps.pop()()


class Hybrid(ShardCollectives):
    """Reduce-scatters a bucket inside a replica, all-reduces the shard across replicas, and gathers inside.

    ``rank`` and ``world_size`` count the shards of one replica, and ``reduce_scalars`` reduces over all ranks of the
    mesh. Only a shard, 1 / ``world_size`` of the bytes, is sent across.
    """

    def __init__(self, inside: Communicator, across: Communicator) -> None:
        """``inside``: the ranks of this replica. ``across``: the ranks that hold this shard. No communication."""
        self._inside = inside
        self._across = across
        self.rank = inside.rank
        self.world_size = inside.world_size
        self._last: _Steps | None = None
        self._free: list[Tensor] = []
        self._bytes = 0

    @property
    def contiguous(self) -> bool:
        return self._inside.contiguous

    @property
    def gathers_contiguous(self) -> bool:
        return self._inside.gathers_contiguous

    @property
    def in_background(self) -> bool:
        return self._inside.in_background and self._across.in_background

    @property
    def max_send_bytes(self) -> int | None:
        return self._inside.max_send_bytes

    def prepare(self, send_bytes: int) -> None:
        self._inside.prepare(send_bytes)

    def abandon(self) -> None:
        self._inside.abandon()
        self._across.abandon()

    def send_buffer(self, numel: int, dtype: torch.dtype) -> Tensor | None:
        return self._inside.send_buffer(numel, dtype)

    @property
    def reads_rows(self) -> bool:
        return self._inside.reads_rows

    @property
    def waits_to_launch(self) -> bool:
        return True

    def reduce_scatter(self, sends: SendList, shard: Tensor, accumulate: bool, tag: int) -> Reduction:
        """The result is the mean of the replicas' means."""
        # The previous bucket has had the time of this one's backward to arrive inside. It starts across here and not
        # when it is ready, because every rank must launch in the same order.
        if self._last is not None:
            self._last.start_across()
        if self.contiguous:
            dtype, mine = sends[0][0][1].dtype, [slice(0, shard.numel())]
        else:
            own = sends[self.rank]
            dtype = own[0][1].dtype if own else shard.dtype
            mine = [slice(start, start + source.numel()) for start, source in own]
        # The reduction inside may not touch what the shard has accumulated, nor round to the shard's dtype.
        in_place = not accumulate and dtype == shard.dtype
        buffer = shard if in_place else self._take_buffer(dtype, shard)
        partial = buffer[: shard.numel()]
        inside = self._inside.reduce_scatter(sends, partial, False, tag)
        # The steps must not refer to this object, which keeps the last reduction.
        across, free = self._across, self._free

        def store() -> None:
            if in_place:
                return
            for stretch in mine:
                if accumulate:
                    shard[stretch].add_(partial[stretch])
                else:
                    shard[stretch].copy_(partial[stretch])
            free.append(buffer)

        self._last = _Steps(inside.wait, lambda: across.all_reduce(partial, tag), store)
        # On the host the sum across is waited for where it is started, so nobody can tell before.
        return Reduction(self._last.finish, lambda: shard.device.type == "cuda")

    def _take_buffer(self, dtype: torch.dtype, shard: Tensor) -> Tensor:
        """Return a buffer of ``shard``'s size at least: the smallest free one that fits, or a new one."""
        free = [buffer for buffer in self._free if buffer.dtype == dtype and buffer.numel() >= shard.numel()]
        if free:
            best = min(free, key=Tensor.numel)
            self._free[:] = [buffer for buffer in self._free if buffer is not best]
            return best
        buffer = torch.empty_like(shard, dtype=dtype)
        self._bytes += buffer.nbytes
        return buffer

    def all_gather(self, flat: Tensor, action: Action = Action.ALL_GATHER) -> Wait:
        return self._inside.all_gather(flat, action)

    def gather(self, fragment: Tensor, places: Sequence[Tensor] | None, numels: Sequence[int], to: int | None) -> None:
        self._inside.gather(fragment, places, numels, to)

    def reduce_scalars(self, values: Tensor, op: ReduceScalars) -> Tensor:
        reduced = self._across.reduce_scalars(self._inside.reduce_scalars(values, op), op)
        # Groups across may have added the same numbers in different orders: the largest sum is one that all ranks find.
        return self._inside.reduce_scalars(reduced, "max") if op == "sum" else reduced

    def scratch_bytes(self) -> int:
        """Return the bytes of its own buffers; ``Communicators`` counts those of ``inside`` and ``across``."""
        return self._bytes
