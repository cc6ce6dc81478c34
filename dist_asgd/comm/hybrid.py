"""Two axes of a mesh: shards inside (a node, say), equal replicas of them across."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base import Communicator, SendList, ShardCollectives, Wait


class _Passage:
    """One shard on its way: reduced inside, then across. Each step is forgotten once taken, with all it refers to."""

    def __init__(self, inside: Wait, across: Callable[[], Wait], store: Wait) -> None:
        self._steps: list[Callable[[], Wait | None]] = [store, across, inside]
        self._wait: Wait | None = None

    def cross(self) -> None:
        """Wait for what comes from inside, and start across; once."""
        if len(self._steps) == 3:
            self._steps.pop()()
            self._wait = self._steps.pop()()

    def finish(self) -> None:
        """Wait until the shard is complete; once."""
        self.cross()
        wait, self._wait = self._wait, None
        assert wait is not None
        wait()
        self._steps.pop()()


class Hybrid(ShardCollectives):
    """Reduce-scatters inside, all-reduces the shard across, gathers inside.

    ``rank`` and ``world_size`` are those of the shards inside; tables have a row for every rank of the mesh, replica by
    replica. Only a shard crosses, 1 / ``world_size`` of the bytes, while the next bucket is reduced inside.
    """

    def __init__(self, inside: Communicator, across: Communicator) -> None:
        self._inside = inside
        self._across = across
        self.rank = inside.rank
        self.world_size = inside.world_size
        self._last: _Passage | None = None
        self._rooms: list[Tensor] = []
        self._bytes = 0

    @property
    def contiguous(self) -> bool:
        return self._inside.contiguous

    def reduce_scatter(self, parts: SendList, shard: Tensor, accumulate: bool, tag: int) -> Wait:
        """As the mean of the replicas' means."""
        # What was launched last has had the time of a bucket to arrive. The order is the same on all ranks.
        if self._last is not None:
            self._last.cross()
        mine = parts[self.rank]
        dtype = mine[0][1].dtype if mine else shard.dtype
        in_place = not accumulate and dtype == shard.dtype
        room = shard if in_place else self._room(dtype, shard)
        partial = room[: shard.numel()]
        inside = self._inside.reduce_scatter(parts, partial, False, tag)

        def store() -> None:
            if in_place:
                return
            for start, part in mine:
                stretch = slice(start, start + part.numel())
                if accumulate:
                    shard[stretch].add_(partial[stretch])
                else:
                    shard[stretch].copy_(partial[stretch])
            self._rooms.append(room)

        self._last = _Passage(inside, lambda: self._across.all_reduce(partial, tag), store)
        return self._last.finish

    def _room(self, dtype: torch.dtype, like: Tensor) -> Tensor:
        """Room for one shard at least, kept for others; the free one that fits best, or a new one."""
        free = [room for room in self._rooms if room.dtype == dtype and room.numel() >= like.numel()]
        if free:
            best = min(free, key=Tensor.numel)
            self._rooms = [room for room in self._rooms if room is not best]
            return best
        room = torch.empty_like(like, dtype=dtype)
        self._bytes += room.nbytes
        return room

    def all_gather(self, flat: Tensor) -> Wait:
        return self._inside.all_gather(flat)

    def collect(self, shard: Tensor, pieces: Sequence[Tensor] | None, to: int | None) -> None:
        self._inside.collect(shard, pieces, to)

    def bring(self, piece: Tensor, places: Sequence[Tensor] | None, numels: Sequence[int], to: int | None) -> None:
        self._inside.bring(piece, places, numels, to)

    def gather_rows(self, row: Tensor) -> Tensor:
        return self._across.gather_rows(self._inside.gather_rows(row).flatten()).view(-1, row.numel())

    def scratch_bytes(self) -> int:
        """Its own; the communicators that it was made of have theirs."""
        return self._bytes
