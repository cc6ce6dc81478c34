"""How the gradients of a bucket are sent, in integers only: which ranges go to which rank, and what is packed for that.

send range  a range of a shard that is sent in one message: from the gradient itself, or packed with its neighbours
piece       elements of one parameter, or padding, that are copied into the send buffer together

The reducer sends one stripe (see ``layout.py``) after the other; gathers of replica groups use the same layouts in the
other direction. All counts are in real elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from .layout import BucketLayout

# A gradient of at least this size is sent from its own memory if the backend can; smaller ones are packed, because a
# message costs more than a copy of this size.
DIRECT_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class SendRange:
    """The elements ``[start, stop)`` of a stripe that go into one message, and where their gradient is read.

    ``slot`` is the position of a large parameter, whose gradient is sent from its own memory, from element ``source``
    on. It is None for small parameters, which are packed: ``source`` counts in the send buffer then.
    """

    start: int
    stop: int
    slot: int | None
    source: int


@dataclass(frozen=True, slots=True)
class Piece:
    """``rows`` times ``numel`` elements of the parameter at position ``slot``, or zeros for padding (None).

    The first element is ``source`` of the parameter, and lies at ``target`` in the send buffer. Rows are a shard apart
    in the bucket and a stripe apart in the send buffer.
    """

    slot: int | None
    source: int
    target: int
    numel: int
    rows: int = 1


@dataclass(frozen=True, slots=True)
class SendLayout:
    """How one stripe of a bucket is sent, by every rank to every other.

    start, stop   the stripe: this range of every shard
    ranges        the send ranges of each rank's shard, by rank; of ``whole_layout`` one for all shards
    pieces        what is packed; together they fill the send buffer
    packed_numel  the number of elements of the send buffer
    row_numels    how far the rows of pieces are apart in the bucket, and in the send buffer
    """

    start: int
    stop: int
    ranges: tuple[tuple[SendRange, ...], ...]
    pieces: tuple[Piece, ...]
    packed_numel: int
    row_numels: tuple[int, int]


@dataclass(frozen=True, slots=True)
class SendRuns:
    """How a bucket is sent, before it is cut by rank: nothing here grows with the number of ranks.

    runs          (start, stop, slot, source) of each range of the bucket, as in ``SendRange``
    pieces        what is packed of small slots, and of the padding between them
    packed_numel  the number of elements of the send buffer
    """

    runs: tuple[tuple[int, int, int | None, int], ...]
    pieces: tuple[Piece, ...]
    packed_numel: int

    def num_messages(self, layout: BucketLayout) -> int:
        """How many messages the first rank sends to the others, over all stripes."""
        shard, found = layout.shard_numel, 0
        for start, stop in layout.stripes:
            for first, last, *_ in self.runs:
                top, bottom = first // shard, (last - 1) // shard
                # The ranks in between get a message for sure.
                found += max(0, bottom - top - 1)
                found += sum(
                    max(first, rank * shard + start) < min(last, rank * shard + stop) for rank in {top, bottom} - {0}
                )
        return found


def send_runs(layout: BucketLayout, direct_numel: int) -> SendRuns:
    """Send slots of at least ``direct_numel`` elements from their own memory, and pack neighbouring smaller ones.

    For backends that send to each rank separately (Gloo). Empty slots are sent nowhere.
    """
    runs: list[tuple[int, int, int | None, int]] = []
    pieces: list[Piece] = []
    packed_numel = 0
    for index, slot in enumerate(layout.slots):
        if slot.numel >= direct_numel:
            runs.append((slot.offset, slot.stop, index, 0))
        elif slot.numel:
            # Runs of small slots include the padding between them, so that a run stays one message for each rank.
            if runs and runs[-1][2] is None:
                start, stop, _, source = runs.pop()
                if stop < slot.offset:
                    pieces.append(Piece(None, 0, packed_numel, slot.offset - stop))
            else:
                start, source = slot.offset, packed_numel
            packed_numel = source + slot.stop - start
            pieces.append(Piece(index, 0, source + slot.offset - start, slot.numel))
            runs.append((start, slot.stop, None, source))
    return SendRuns(tuple(runs), tuple(pieces), packed_numel)


def send_layout(layout: BucketLayout, direct_numel: int, start: int, stop: int) -> SendLayout:
    """The runs of ``send_runs`` in the stripe from ``start`` to ``stop``, cut by the ranks whose shards they lie in."""
    runs = send_runs(layout, direct_numel)
    by_rank: list[list[SendRange]] = [[] for _ in range(layout.world_size)]
    for first, last, slot, source in runs.runs:
        for rank, low, high in _by_rank(layout, first, last, start, stop):
            at = rank * layout.shard_numel + start
            by_rank[rank].append(SendRange(low - at, high - at, slot, source + low - first))
    # A cut bucket has few small slots: a stripe that needs some of them packs them all.
    packs = any(one.slot is None for ranges in by_rank for one in ranges)
    pieces, numel = (runs.pieces, runs.packed_numel) if packs else ((), 0)
    return SendLayout(start, stop, tuple(map(tuple, by_rank)), pieces, numel, (0, 0))


def _by_rank(layout: BucketLayout, first: int, last: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The ranks in whose stripes elements of ``[first, last)`` of the bucket lie, each with the range of these."""
    for rank in range(first // layout.shard_numel, (last - 1) // layout.shard_numel + 1):
        at = rank * layout.shard_numel
        low, high = max(first, at + start), min(last, at + stop)
        if low < high:
            yield rank, low, high


def whole_layout(layout: BucketLayout, start: int = 0, stop: int | None = None) -> SendLayout:
    """Pack the stripe from ``start`` to ``stop`` of all shards, with one send range for all of them together.

    For backends whose collectives take one contiguous buffer (NCCL): nothing here has an entry for each rank. The
    default is the whole bucket, as it lies.
    """
    stop = layout.shard_numel if stop is None else stop
    width = stop - start
    pieces: list[Piece] = []
    for slot, first, last in _parts(layout, 0, layout.numel):
        pieces += _pieces(layout, slot, first, last, start, stop)
    numel = width * layout.world_size
    ranges = ((SendRange(0, numel, None, 0),),)
    return SendLayout(start, stop, ranges, tuple(pieces), numel, (layout.shard_numel, width))


def row_layout(layout: BucketLayout, direct_numel: int, rank: int, start: int, stop: int) -> SendLayout:
    """Pack the stripe from ``start`` to ``stop`` of the shards of all ranks but ``rank``, one row for each.

    For ranks that read each other's send buffers: what they need of their own gradients they read where it lies. Only
    slots of fewer than ``direct_numel`` elements are packed for that as well, behind the rows. The send buffers of all
    ranks have the same size.
    """
    width = stop - start
    pieces: list[Piece] = []
    for slot, first, last in _parts(layout, 0, layout.numel):
        pieces += _pieces(layout, slot, first, last, start, stop, left_out=rank)
    behind = (layout.world_size - 1) * width
    own: list[SendRange] = []
    packed = [0] * layout.world_size
    for first, last, slot, source in send_runs(layout, direct_numel).runs:
        for reader, low, high in _by_rank(layout, first, last, start, stop):
            place = behind + packed[reader] if slot is None else source + low - first
            packed[reader] += high - low if slot is None else 0
            if reader != rank:
                continue
            at = rank * layout.shard_numel + start
            own.append(SendRange(low - at, high - at, slot, place))
            for small, begin, end in _parts(layout, low, high) if slot is None else ():
                offset = begin if small is None else layout.slots[small].offset
                pieces.append(Piece(small, begin - offset, place + begin - low, end - begin))
    rows = [*range(rank), -1, *range(rank, layout.world_size - 1)]
    ranges = [own if row < 0 else [SendRange(0, width, None, row * width)] for row in rows]
    return SendLayout(
        start, stop, tuple(map(tuple, ranges)), tuple(pieces), behind + max(packed), (layout.shard_numel, width)
    )


def _parts(layout: BucketLayout, first: int, last: int) -> Iterator[tuple[int | None, int, int]]:
    """The slots, and None for padding, that ``[first, last)`` of the bucket consists of, and the range of each."""
    filled = first
    for index, slot in enumerate(layout.slots):
        low, high = max(first, slot.offset), min(last, slot.stop)
        if low < high:
            if filled < low:
                yield None, filled, low
            yield index, low, high
            filled = high
    if filled < last:
        yield None, filled, last


def _pieces(
    layout: BucketLayout, slot: int | None, first: int, last: int, start: int, stop: int, left_out: int | None = None
) -> Iterator[Piece]:
    """What is packed of ``[first, last)`` of the bucket, which are elements of ``slot`` only: a few pieces.

    The row of the rank ``left_out`` is not packed, and those behind it move up.
    """
    shard, width = layout.shard_numel, stop - start
    if width == shard and left_out is None:
        # One run: the send buffer is in the order of the bucket.
        yield Piece(slot, 0, first, last - first)
        return

    def piece(row: int, end: int) -> Iterator[Piece]:
        at = row * shard
        low, high = max(first, at + start), min(last, at + stop)
        if low < high and row < end:
            target = (row if left_out is None or row < left_out else row - 1) * width
            yield Piece(slot, low - first, target + low - at - start, high - low, end - row)

    top, bottom = first // shard, (last - 1) // shard
    # The rows between the first and the last are whole.
    ends = {top, top + 1, bottom, bottom + 1} | ({left_out, left_out + 1} if left_out is not None else set())
    cuts = sorted(end for end in ends if top <= end <= bottom + 1)
    for row, end in pairwise(cuts):
        if row != left_out:
            yield from piece(row, end)
