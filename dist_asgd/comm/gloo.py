"""Gloo on the host: everything from peer-to-peer messages, the sums local and in rank order.

Gloo emulates reduce-scatter and all-gather with two to three times their traffic. And messages with tags of their
own, unlike named collectives, cannot be taken for those that the user, or another optimizer, has under way on the
same group.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.profiler import record_function

from .base import GroupCommunicator, SendList, Wait

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
# Elements that are summed and divided at a time: they stay in a core's cache in between.
SUM_NUMEL = 1 << 16

# Tags of one optimizer: buckets on their way first, then one for each other kind of message. Messages of one tag
# between two ranks keep their order.
BUCKET_TAGS = (1 << 16) - 4
GATHER, COLLECT, GATHER_ROWS, EXCHANGE = range(BUCKET_TAGS, 1 << 16)


class Gloo(GroupCommunicator):
    """Gloo on the host: both collectives from peer-to-peer messages, the sums local and in rank order."""

    def __init__(self, group: dist.ProcessGroup, first_tag: int, ranks: Sequence[int] | None = None) -> None:
        """``ranks``: those of ``group`` that take part, as numbers in the default group; None: all of them."""
        super().__init__(group)
        self._first_tag = first_tag
        self._global = list(ranks or dist.get_process_group_ranks(group))
        self.rank, self.world_size = self._global.index(dist.get_rank()), len(self._global)
        self._ranks = range(self.world_size)
        self._peers = [rank for rank in self._ranks if rank != self.rank]
        self._inboxes: dict[torch.dtype, list[Tensor]] = {}
        self._bytes = 0
        self._sums: Tensor | None = None

    def _send(self, tensor: Tensor, peer: int, tag: int) -> dist.Work | None:
        return dist.isend(tensor, self._global[peer], group=self.group, tag=self._first_tag + tag)

    def _receive(self, tensor: Tensor, peer: int, tag: int) -> dist.Work | None:
        return dist.irecv(tensor, self._global[peer], group=self.group, tag=self._first_tag + tag)

    def scratch_bytes(self) -> int:
        return self._bytes + (0 if self._sums is None else self._sums.nbytes)

    def _inbox(self, dtype: torch.dtype, numel: int) -> Tensor:
        """A buffer for peers' parts, kept for other buckets; the free one that fits best, or a new one."""
        free = self._inboxes.setdefault(dtype, [])
        fitting = [inbox for inbox in free if inbox.numel() >= numel]
        if fitting:
            best = min(fitting, key=Tensor.numel)
            self._inboxes[dtype] = [inbox for inbox in free if inbox is not best]
            return best
        inbox = torch.empty(numel, dtype=dtype, device="cpu")
        self._bytes += inbox.nbytes
        return inbox

    def reduce_scatter(self, parts: SendList, shard: Tensor, accumulate: bool, tag: int) -> Wait:
        tag %= BUCKET_TAGS
        mine = parts[self.rank]
        numel = sum(part.numel() for _, part in mine)
        dtype = mine[0][1].dtype if mine else shard.dtype
        # The first peer's parts land where the result will be; the sum is in rank order all the same.
        in_place = not accumulate and dtype == shard.dtype
        rows = len(self._peers) - in_place
        inbox = self._inbox(dtype, rows * numel) if rows * numel else None
        landing: list[list[Tensor]] = []
        if in_place:
            landing.append([shard[start : start + part.numel()] for start, part in mine])
        if inbox is not None:
            sizes = [part.numel() for _, part in mine]
            landing += [list(row.split(sizes)) for row in inbox[: rows * numel].view(rows, numel)]
        works: list[dist.Work | None] = []
        with record_function("dist_asgd::reduce_scatter"), self._guard("a reduce-scatter"):
            # Receives first: a message that finds its buffer waiting is never buffered twice.
            for peer, places in zip(self._peers, landing, strict=True) if mine else ():
                works += [self._receive(place, peer, tag) for place in places]
            for peer in self._peers:
                works += [self._send(part, peer, tag) for _, part in parts[peer]]

        def store() -> None:
            for i, (start, part) in enumerate(mine):
                received = [places[i] for places in landing]
                received.insert(self.rank, part)
                self._store_mean(received, shard[start : start + part.numel()], accumulate)
            if inbox is not None:
                self._inboxes[dtype].append(inbox)

        return self._waiting(works, "a reduce-scatter", store)

    def _store_mean(self, parts: list[Tensor], shard: Tensor, accumulate: bool) -> None:
        """``shard (+)= mean(parts)``, summed in list order; one part is ``shard`` where dtypes are equal and it is set.

        In stretches that stay in cache. 16-bit gradients are summed in float32, so that they are rounded at most once.
        """
        narrow = parts[0].dtype in SIXTEEN_BIT
        in_place = not accumulate and parts[0].dtype == shard.dtype
        if narrow and self._sums is None:
            self._sums = torch.empty(SUM_NUMEL, dtype=torch.float32, device="cpu")
        for first in range(0, shard.numel(), SUM_NUMEL):
            stretch = slice(first, first + SUM_NUMEL)
            place = shard[stretch]
            chunks = [part[stretch] for part in parts]
            if narrow and self._sums is not None:
                total = self._sums[: place.numel()].copy_(chunks[0])
                total.add_(chunks[1])
            else:
                total = torch.add(chunks[0], chunks[1], out=place if in_place else chunks[0 if self.rank else 1])
            for chunk in chunks[2:]:
                total.add_(chunk)
            total.div_(len(chunks))
            if accumulate:
                place.add_(total.to(place.dtype))
            elif narrow or not in_place:
                place.copy_(total)

    def all_reduce(self, values: Tensor, tag: int) -> Wait:
        """Every rank sums a chunk and sends it to all: 2 (n - 1) / n of the bytes, whatever the number of ranks."""
        tag %= BUCKET_TAGS
        chunks = values.tensor_split(self.world_size)
        own = chunks[self.rank]
        inbox = self._inbox(values.dtype, self.world_size * own.numel())
        rows = [inbox[rank * own.numel() : (rank + 1) * own.numel()] for rank in self._ranks]
        works: list[dist.Work | None] = []
        with record_function("dist_asgd::all_reduce"), self._guard("an all-reduce"):
            works += [self._receive(rows[peer], peer, tag) for peer in self._peers if own.numel()]
            works += [self._send(chunks[peer], peer, tag) for peer in self._peers if chunks[peer].numel()]
        rows[self.rank].copy_(own)
        summed = self._waiting(works, "an all-reduce")

        def wait() -> None:
            summed()
            self._store_mean(rows, own, accumulate=False)
            self._inboxes[values.dtype].append(inbox)
            with self._guard("an all-reduce"):
                passed = [self._receive(chunks[peer], peer, tag) for peer in self._peers if chunks[peer].numel()]
                passed += [self._send(own, peer, tag) for peer in self._peers if own.numel()]
            self._waiting(passed, "an all-reduce")()

        return wait

    def among(self, ranks: Sequence[int]) -> Gloo:
        """The like of some of its ranks, this one among them, as numbers in the default group; not collective."""
        # With the same tags: messages between two ranks keep their order, and both have it from the same calls.
        return Gloo(self.group, self._first_tag, ranks)

    def all_gather(self, flat: Tensor) -> Wait:
        return self.all_gather_parts([[part] for part in flat.view(self.world_size, -1)])

    def all_gather_parts(self, parts: Sequence[Sequence[Tensor]]) -> Wait:
        works: list[dist.Work | None] = []
        with record_function("dist_asgd::all_gather"), self._guard("an all-gather"):
            for peer in self._peers:
                works += [self._receive(part, peer, GATHER) for part in parts[peer]]
            for peer in self._peers:
                works += [self._send(part, peer, GATHER) for part in parts[self.rank]]
        return self._waiting(works, "an all-gather")

    def collect(self, shard: Tensor, pieces: Sequence[Tensor] | None, to: int | None) -> None:
        with self._guard("a gather"):
            if pieces is not None:
                pieces[self.rank].copy_(shard)
                works = [self._receive(pieces[peer], peer, COLLECT) for peer in self._peers]
            else:
                works = []
            for target in self._peers if to is None else [to]:
                if target != self.rank:
                    works.append(self._send(shard, target, COLLECT))
            for work in works:
                if work is not None:
                    work.wait()

    def bring(self, piece: Tensor, places: Sequence[Tensor] | None, numels: Sequence[int], to: int | None) -> None:
        with self._guard("a gather"):
            works: list[dist.Work | None] = []
            if places is not None:
                places[self.rank].copy_(piece)
                works = [self._receive(places[peer], peer, COLLECT) for peer in self._peers if numels[peer]]
            for target in self._peers if to is None else [to]:
                if target != self.rank and numels[self.rank]:
                    works.append(self._send(piece, target, COLLECT))
            for work in works:
                if work is not None:
                    work.wait()

    def gather_rows(self, row: Tensor) -> Tensor:
        return self._table(row, GATHER_ROWS)()

    def exchange(self, words: Tensor) -> Callable[[], Tensor]:
        return self._table(words, EXCHANGE)

    def _table(self, row: Tensor, tag: int) -> Callable[[], Tensor]:
        table = row.new_empty((self.world_size, row.numel()))
        table[self.rank] = row
        works: list[dist.Work | None] = []
        with self._guard("a control exchange"):
            for peer in self._peers:
                works.append(self._receive(table[peer], peer, tag))
            for peer in self._peers:
                works.append(self._send(table[self.rank], peer, tag))
        wait = self._waiting(works, "a control exchange")

        def complete() -> Tensor:
            wait()
            return table

        return complete

    def exchange_objects(self, value: Any) -> list[Any]:
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = self.exchange(torch.tensor([data.numel()], device="cpu"))().flatten().tolist()
        row = torch.zeros(max(sizes), dtype=torch.uint8, device="cpu")
        row[: data.numel()] = data
        table = self._table(row, EXCHANGE)()
        return [pickle.loads(table[rank, :size].numpy().tobytes()) for rank, size in enumerate(sizes)]
