"""Integers only: which bucket holds a parameter, and which part of it each rank owns.

Vocabulary
----------
bucket   one flat buffer that holds several parameters of one group, dtype and device
slot     where one parameter lies in its bucket
shard    the equal, contiguous part of a bucket that one rank owns and updates
piece    the part of one parameter that lies in one rank's shard
padding  elements of a bucket that belong to no parameter

All counts are in real elements: a complex parameter of n elements counts 2·n.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ALIGN_BYTES = 64
MIB = 1 << 20
# What has at least this size is sent from where it lies, where the backend can; smaller pieces share a message.
DIRECT_BYTES = 1 << 18
# How many buckets a model makes at least, by stage. Stage 2: gradients in flight are a few buckets, and should be
# small beside the shards. Stage 1: enough to gather one while another is updated.
MIN_BUCKETS = {1: 4, 2: 20}


@dataclass(frozen=True, slots=True)
class Slot:
    """Elements ``[offset, offset + numel)`` of a bucket belong to one parameter."""

    offset: int
    numel: int

    @property
    def stop(self) -> int:
        return self.offset + self.numel


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements of a parameter in a shard: ``shard[start:stop]`` is ``param[param_start:][:numel]``."""

    start: int
    stop: int
    param_start: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class BucketLayout:
    """The slots of a bucket and its cut into ``world_size`` equal shards, each a multiple of 64 bytes."""

    slots: tuple[Slot, ...]
    shard_numel: int
    world_size: int

    @property
    def numel(self) -> int:
        return self.shard_numel * self.world_size

    @property
    def padding_numel(self) -> int:
        return self.numel - sum(slot.numel for slot in self.slots)

    def fragment(self, slot: Slot, rank: int) -> Fragment:
        """The part of ``slot`` in the shard of ``rank``; empty where that rank owns nothing of it."""
        shard_start = rank * self.shard_numel
        start = min(max(slot.offset, shard_start), slot.stop)
        stop = max(min(slot.stop, shard_start + self.shard_numel), start)
        if start == stop:
            return Fragment(0, 0, 0)
        return Fragment(start - shard_start, stop - shard_start, start - slot.offset)

    def owners(self, slot: Slot) -> Iterator[tuple[int, Fragment]]:
        """Every rank that owns some of ``slot``, in order, with its piece."""
        if slot.numel:
            for rank in range(slot.offset // self.shard_numel, (slot.stop - 1) // self.shard_numel + 1):
                yield rank, self.fragment(slot, rank)


@dataclass(frozen=True, slots=True)
class SendRange:
    """Elements ``[start, stop)`` of a shard, and where their gradient comes from.

    ``slot`` is the slot of a large parameter, whose gradient is sent from where it lies, from element ``source``
    on; None for a stretch of small ones, which are packed: ``source`` counts in the packed buffer.
    """

    start: int
    stop: int
    slot: int | None
    source: int


@dataclass(frozen=True, slots=True)
class SendLayout:
    """What every rank sends of a bucket: the stretches of each rank's shard; and the packed buffer for small slots.

    ``packed`` gives (slot, offset in the packed buffer) of every small slot.
    """

    stretches: tuple[tuple[SendRange, ...], ...]
    packed: tuple[tuple[int, int], ...]
    packed_numel: int


def send_layout(layout: BucketLayout, direct_numel: int) -> SendLayout:
    """Slots of at least ``direct_numel`` elements go as they lie; neighbouring smaller ones share a message."""
    runs: list[tuple[int, int, int | None, int]] = []
    packed: list[tuple[int, int]] = []
    packed_numel = 0
    for index, slot in enumerate(layout.slots):
        if slot.numel >= direct_numel:
            runs.append((slot.offset, slot.stop, index, 0))
        elif slot.numel:
            if runs and runs[-1][2] is None:
                start, _, _, source = runs.pop()
            else:
                start, source = slot.offset, packed_numel
            packed_numel = source + slot.stop - start
            packed.append((index, source + slot.offset - start))
            runs.append((start, slot.stop, None, source))
    by_rank: list[list[SendRange]] = [[] for _ in range(layout.world_size)]
    for start, stop, owner, source in runs:
        for rank in range(start // layout.shard_numel, (stop - 1) // layout.shard_numel + 1):
            first = rank * layout.shard_numel
            low, high = max(start, first), min(stop, first + layout.shard_numel)
            by_rank[rank].append(SendRange(low - first, high - first, owner, source + low - start))
    return SendLayout(tuple(map(tuple, by_rank)), tuple(packed), packed_numel)


def whole_layout(layout: BucketLayout) -> SendLayout:
    """Everything packed, padding included, one stretch a rank: for backends that want one flat buffer."""
    shard = layout.shard_numel
    stretches = tuple((SendRange(0, shard, None, rank * shard),) for rank in range(layout.world_size))
    packed = tuple((index, slot.offset) for index, slot in enumerate(layout.slots) if slot.numel)
    return SendLayout(stretches, packed, layout.numel)


def round_up(numel: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``numel``."""
    return -(-numel // multiple) * multiple


def bucket_cap_bytes(bucket_cap_mb: float, total_bytes: int, min_buckets: int) -> int:
    """The size at which a bucket is closed, in bytes: the user's cap, or that which makes ``min_buckets`` if smaller.

    Never below 1 MiB unless the user asks for less: smaller messages cost more than they save.
    """
    return int(min(bucket_cap_mb * MIB, max(MIB, total_bytes // min_buckets)))


def lay_out(numels: Sequence[int], itemsize: int, world_size: int) -> BucketLayout:
    """One bucket of parameters with these element counts, in this order.

    Every parameter starts on a 64-byte boundary and every shard is a multiple of 64 bytes, so the padding is
    below ``64 · (parameters + world_size)`` bytes. A bucket is never empty: shards hold at least one element.
    """
    align = ALIGN_BYTES // itemsize
    slots: list[Slot] = []
    offset = 0
    for numel in numels:
        slots.append(Slot(offset, numel))
        offset += round_up(numel, align)
    shard_numel = round_up(-(-max(offset, 1) // world_size), align)
    return BucketLayout(tuple(slots), shard_numel, world_size)


def fill_buckets(numels: Sequence[int], itemsize: int, cap_bytes: int) -> list[list[int]]:
    """Positions of parameters, put into buckets in the order given; a bucket closes before it would pass the cap.

    A parameter is never cut by a bucket boundary: one larger than the cap has a bucket of its own.
    """
    buckets: list[list[int]] = []
    used_bytes = 0
    for position, numel in enumerate(numels):
        size = numel * itemsize
        if not buckets or used_bytes + size > cap_bytes:
            buckets.append([])
            used_bytes = 0
        buckets[-1].append(position)
        used_bytes += size
    return buckets
