"""The collectives for Gloo, on the host: messages between two ranks, and local sums in rank order.

Gloo emulates reduce-scatter and all-gather with two to three times their traffic, and messages between two ranks
avoid that. Messages also have tags, so they cannot be paired with messages that the user, or another optimizer, has in
flight on the same group; named collectives can.

A steady-state step enters no other modules of this package but ``agreement``, ``measure`` and ``progress``.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..labels import Label, label
from . import dissemination
from .base import GroupCommunicator, PendingSummary, ReduceScalars, Reduction, SendList, Wait
from .board import MAX_WORDS, Board
from .dissemination import Message, Summary
from .host_group import HostGroup
from .measure import Action, Meter
from .progress import Messages, ProgressThread
from .roll import Roll
from .sums import SIXTEEN_BIT, SUM_NUMEL

# The tags of one optimizer: first those of buckets in flight, then one for each other kind of message. Messages with
# the same tag between the same two ranks keep their order.
BUCKET_TAGS = (1 << 16) - 4
ALL_GATHER, GATHER, REDUCE_SCALARS, EXCHANGE = range(BUCKET_TAGS, 1 << 16)


class Gloo(GroupCommunicator):
    """The collectives of some ranks of a Gloo group, from messages between two ranks.

    Every sum is taken in rank order, whichever message arrives first, so that results are reproducible.
    """

    def __init__(self, group: HostGroup, first_tag: int, ranks: Sequence[int], meter: Meter | None = None) -> None:
        """Use the ``1 << 16`` tags from ``first_tag`` on. No communication.

        ``ranks`` are the members of ``group`` that take part, as ranks of the default group. ``meter``: as in the base.
        """
        super().__init__(ranks, meter)
        self._group = group
        self._first_tag = first_tag
        position = {rank: index for index, rank in enumerate(group.ranks)}
        self._in_group = [position[rank] for rank in ranks]
        self._inboxes: dict[torch.dtype, list[Tensor]] = {}
        self._inbox_bytes = 0
        self._sums: Tensor | None = None
        # Where these ranks exchange control words if they share memory.
        self._board: Board | None = None
        # Waits for gradients beside backward, so that the next stripe can be sent once one has arrived.
        self._arrivals = ProgressThread()
        self._roll_prefix = f"dist_asgd/{first_tag}/{self.ranks[0]}"
        self._num_summaries = 0

    def among(self, ranks: Sequence[int]) -> Gloo:
        """Return a communicator of some of these ranks, this one among them, as ranks of the default group.

        It is not collective.
        """
        # The same tags do: two ranks make the same calls in the same order, so their messages pair up.
        same = list(ranks) == self.ranks
        return self if same else Gloo(self._group, self._first_tag, ranks, self.meter)

    def metered_by(self, meter: Meter) -> Gloo:
        """Return a communicator of the same ranks and tags whose messages ``meter`` counts. No communication."""
        return Gloo(self._group, self._first_tag, self.ranks, meter)

    @cached_property
    def _peers(self) -> list[int]:
        """The other ranks, for the collectives that send to each."""
        return [rank for rank in range(self.world_size) if rank != self.rank]

    def scratch_bytes(self) -> int:
        return self._inbox_bytes + (0 if self._sums is None else self._sums.nbytes)

    # --- messages ----------------------------------------------------------------------------------------

    def connect(self, peers: Iterable[int]) -> None:
        """Make sure that there are connections to ``peers``, which do the same; called before they are sent to."""
        try:
            self._group.connect(self._in_group[peer] for peer in peers)
        except RuntimeError as error:
            raise self.peer_error("a connection", error) from error

    def post(self, action: Action, tag: int, receives: Iterable[Message], sends: Sequence[Message]) -> list[dist.Work]:
        """Start messages of the collective ``action``; every message passes here."""
        works: list[dist.Work] = []
        tag += self._first_tag
        group, in_group = self._group, self._in_group
        try:
            with self.meter.launching(action, sum(tensor.nbytes for _, tensor in sends)):
                # Receives come first: Gloo buffers a message again if its receive has not been posted yet.
                for peer, tensor in receives:
                    works.append(group.receive(tensor, in_group[peer], tag))
                for peer, tensor in sends:
                    works.append(group.send(tensor, in_group[peer], tag))
        except RuntimeError as error:
            raise self.peer_error(action, error) from error
        return works

    def _wait(self, action: Action, works: Sequence[dist.Work]) -> None:
        """Wait for messages that ``post`` started."""
        try:
            with self.meter.waiting(action):
                for work in works:
                    work.wait()
        except RuntimeError as error:
            raise self.peer_error(action, error) from error

    def _take_inbox(self, dtype: torch.dtype, numel: int) -> Tensor:
        """Return a receive buffer of at least ``numel`` elements: the smallest free one that fits, or a new one.

        Callers put it back into ``_inboxes`` once its contents are used, for other buckets.
        """
        free = self._inboxes.setdefault(dtype, [])
        fitting = [inbox for inbox in free if inbox.numel() >= numel]
        if fitting:
            best = min(fitting, key=Tensor.numel)
            self._inboxes[dtype] = [inbox for inbox in free if inbox is not best]
            return best
        inbox = torch.empty(numel, dtype=dtype, device="cpu")
        self._inbox_bytes += inbox.nbytes
        return inbox

    # --- reductions --------------------------------------------------------------------------------------

    def reduce_scatter(self, sends: SendList, shard: Tensor, accumulate: bool, tag: int) -> Reduction:
        tag %= BUCKET_TAGS
        mine = sends[self.rank]
        numels = [source.numel() for _, source in mine]
        numel = sum(numels)
        dtype = mine[0][1].dtype if mine else shard.dtype
        self.connect(self._peers)
        # The first peer's message lands in the shard itself, which saves a buffer; the sum is in rank order anyway.
        in_place = not accumulate and dtype == shard.dtype
        rows = len(self._peers) - in_place
        inbox = self._take_inbox(dtype, rows * numel) if rows * numel else None
        landing: list[list[Tensor]] = []  # for each peer, one tensor per range of `mine`
        if in_place:
            landing.append([shard[start : start + source.numel()] for start, source in mine])
        if inbox is not None:
            landing += [list(row.split(numels)) for row in inbox[: rows * numel].view(rows, numel)]
        receives: list[Message] = []
        for peer, places in zip(self._peers, landing, strict=True) if mine else ():
            receives += [(peer, place) for place in places]
        outgoing = [(peer, source) for peer in self._peers for _, source in sends[peer]]
        arrival = Messages(self.post(Action.REDUCE_SCATTER, tag, receives, outgoing))
        self._arrivals.submit(arrival)

        def wait() -> None:
            try:
                with self.meter.waiting(Action.REDUCE_SCATTER):
                    arrival.wait()
            except RuntimeError as error:
                raise self.peer_error(Action.REDUCE_SCATTER, error) from error
            with label(Label.MEAN):
                for i, (start, source) in enumerate(mine):
                    values = [places[i] for places in landing]
                    values.insert(self.rank, source)
                    self._store_mean(values, shard[start : start + source.numel()], accumulate)
            if inbox is not None:
                self._inboxes[dtype].append(inbox)

        return Reduction(wait, lambda: arrival.has_ended)

    def _store_mean(self, values: list[Tensor], target: Tensor, accumulate: bool) -> None:
        """``target = mean(values)``, or ``+=``; ``values`` has one 1-D tensor per rank, summed in list order.

        If dtypes are equal and ``accumulate`` is False, one of ``values`` is ``target`` itself. The other values may
        be overwritten. 16-bit values are summed in float32, so that they are rounded at most once.
        """
        narrow = values[0].dtype in SIXTEEN_BIT
        in_place = not accumulate and values[0].dtype == target.dtype
        if narrow and self._sums is None:
            self._sums = torch.empty(SUM_NUMEL, dtype=torch.float32, device="cpu")
        for first in range(0, target.numel(), SUM_NUMEL):
            stretch = slice(first, first + SUM_NUMEL)
            place = target[stretch]
            chunks = [value[stretch] for value in values]
            if narrow and self._sums is not None:
                total = self._sums[: place.numel()].copy_(chunks[0])
                total.add_(chunks[1])
            else:
                # The sum needs a tensor that may be overwritten: a peer's values, never those that this rank sent.
                total = torch.add(chunks[0], chunks[1], out=place if in_place else chunks[0 if self.rank else 1])
            for chunk in chunks[2:]:
                total.add_(chunk)
            total.div_(len(chunks))
            if accumulate:
                place.add_(total.to(place.dtype))
            elif narrow or not in_place:
                place.copy_(total)

    def all_reduce(self, values: Tensor, tag: int) -> Wait:
        """Every rank sums one chunk and sends the sum to all: 2 (n - 1) / n of the bytes for any number n of ranks."""
        tag %= BUCKET_TAGS
        self.connect(self._peers)
        chunks = values.tensor_split(self.world_size)
        own = chunks[self.rank]
        inbox = self._take_inbox(values.dtype, self.world_size * own.numel())
        rows = list(inbox[: self.world_size * own.numel()].view(self.world_size, -1)) if own.numel() else []
        to_sum = self.post(
            Action.ALL_REDUCE,
            tag,
            [(peer, rows[peer]) for peer in self._peers if own.numel()],
            [(peer, chunks[peer]) for peer in self._peers if chunks[peer].numel()],
        )
        if own.numel():
            rows[self.rank].copy_(own)

        def wait() -> None:
            self._wait(Action.ALL_REDUCE, to_sum)
            if own.numel():
                with label(Label.MEAN):
                    self._store_mean(rows, own, accumulate=False)
            self._inboxes[values.dtype].append(inbox)
            # The sums are sent only here, so this rank's wait also decides when its peers get them.
            sums = self.post(
                Action.ALL_REDUCE,
                tag,
                [(peer, chunks[peer]) for peer in self._peers if chunks[peer].numel()],
                [(peer, own) for peer in self._peers if own.numel()],
            )
            self._wait(Action.ALL_REDUCE, sums)

        return wait

    # --- gathers -----------------------------------------------------------------------------------------

    def all_gather(self, flat: Tensor, action: Action = Action.ALL_GATHER) -> Wait:
        return self._gather_everywhere([[shard] for shard in flat.view(self.world_size, -1)], action)

    def all_gather_uneven(self, fragments: Sequence[Sequence[Tensor]]) -> Wait:
        return self._gather_everywhere(fragments, Action.ALL_GATHER)

    def _gather_everywhere(self, fragments: Sequence[Sequence[Tensor]], action: Action) -> Wait:
        self.connect(self._peers)
        works = self.post(
            action,
            ALL_GATHER,
            [(peer, fragment) for peer in self._peers for fragment in fragments[peer]],
            [(peer, fragment) for peer in self._peers for fragment in fragments[self.rank]],
        )
        return lambda: self._wait(action, works)

    def gather(self, fragment: Tensor, places: Sequence[Tensor] | None, numels: Sequence[int], to: int | None) -> None:
        self.connect(self._peers)
        receives: list[Message] = []
        if places is not None:
            places[self.rank].copy_(fragment)
            receives = [(peer, places[peer]) for peer in self._peers if numels[peer]]
        targets = self._peers if to is None else [to]
        sends = [(target, fragment) for target in targets if target != self.rank and numels[self.rank]]
        self._wait(Action.GATHER, self.post(Action.GATHER, GATHER, receives, sends))

    def reduce_scalars(self, values: Tensor, op: ReduceScalars) -> Tensor:
        # As bits: what is exchanged are integers. Every rank combines the same rows in the same order.
        numel = values.numel()
        words = torch.zeros(-(-values.nbytes // 8), dtype=torch.int64, device="cpu")
        words.view(values.dtype)[:numel] = values
        table = self._rows(REDUCE_SCALARS, words).view(values.dtype)[:, :numel].contiguous()
        return table.sum(0) if op == "sum" else table.amax(0) if op == "max" else table.amin(0)

    # --- control words -----------------------------------------------------------------------------------

    def summarise(self, words: Sequence[int], num_largest: int) -> PendingSummary:
        if self._board is not None and len(words) <= MAX_WORDS:
            return self._board.summarise(words, num_largest)
        self._num_summaries += 1
        summary = Summary(self, EXCHANGE, words, num_largest)
        roll = Roll(self._group.store, f"{self._roll_prefix}/{self._num_summaries}", self.rank, self.world_size)
        return PendingSummary(summary.wait, summary.poll, roll)

    @property
    def ranks_on_host(self) -> int:
        return 1 if self._board is None else self.world_size

    def use_board(self, board: Board) -> None:
        """Combine control words on ``board`` from now on. All ranks do so between the same two exchanges."""
        self._board = board

    def exchange(self, words: Tensor) -> Tensor:
        return self._rows(EXCHANGE, words)

    def _rows(self, tag: int, words: Tensor) -> Tensor:
        """The ``words`` ``(n,)``, int64, of all ranks: ``(world_size, n)``."""
        if self._board is not None and words.numel() <= MAX_WORDS:
            return self._board.all_gather(words)
        return torch.stack(dissemination.all_gather(self, tag, words, [words.numel()] * self.world_size))

    def exchange_objects(self, value: Any) -> list[Any]:
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        numels = self.exchange(torch.tensor([data.numel()], device="cpu")).flatten().tolist()
        return [pickle.loads(row.numpy().tobytes()) for row in dissemination.all_gather(self, EXCHANGE, data, numels)]

    def gather_objects(self, value: Any, to: int) -> list[Any] | None:
        raw = bytearray(b"" if self.rank == to else pickle.dumps(value))
        data = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8, device="cpu")
        numels = self.exchange(torch.tensor([data.numel()], device="cpu")).flatten().tolist()
        rows = dissemination.gather(self, EXCHANGE, data, numels, to)
        if rows is None:
            return None
        return [value if r == to else pickle.loads(row.numpy().tobytes()) for r, row in enumerate(rows)]


class ControlByMessages(GroupCommunicator):
    """The base of communicators that carry values in another way, and leave control words to messages of Gloo."""

    def __init__(self, messages: Gloo) -> None:
        """``messages`` are those of the same ranks. No communication."""
        super().__init__(messages.ranks, messages.meter)
        self._messages = messages

    def reduce_scalars(self, values: Tensor, op: ReduceScalars) -> Tensor:
        return self._messages.reduce_scalars(values, op)

    def summarise(self, words: Sequence[int], num_largest: int) -> PendingSummary:
        return self._messages.summarise(words, num_largest)

    def exchange(self, words: Tensor) -> Tensor:
        return self._messages.exchange(words)

    def exchange_objects(self, value: Any) -> list[Any]:
        return self._messages.exchange_objects(value)

    def gather_objects(self, value: Any, to: int) -> list[Any] | None:
        return self._messages.gather_objects(value, to)
