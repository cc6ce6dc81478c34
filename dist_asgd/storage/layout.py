"""The layout of buckets, in integers only: where each parameter lies, and which of its elements each rank owns.

bucket      one flat buffer that holds several parameters of one group, dtype and device
slot        where one parameter lies in its bucket
shard       the equal, contiguous range of a bucket that one rank owns and updates
fragment    the elements of one parameter that lie in one rank's shard
padding     elements of a bucket that belong to no parameter
send range  a range of a shard that is sent in one message: from the gradient itself, or packed with its neighbours

The sizes of buckets are decided here, by ``bucket_cap_bytes`` and ``fill_buckets``. All counts are in real elements: a
complex parameter of n elements counts 2·n.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# A cache line: no two parameters share one, and vector instructions of any width start aligned.
ALIGN_BYTES = 64
MIB = 1 << 20
# A gradient of at least this size is sent from its own memory if the backend can; smaller ones are packed, because a
# message costs more than a copy of this size.
DIRECT_BYTES = 1 << 18
# Up to how many ranks a user's cap is taken as it is.
CAP_WORLD_SIZE = 400
# A bucket with less than this is no message of its own: what it holds (norms, biases) rides with a large neighbour.
LONE_BYTES = MIB
# How many buckets a model makes at least, by stage. In stage 2 the gradients of a few buckets are in flight, and they
# should be small beside the shards. In stage 1 one bucket is gathered while another is updated.
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
    """The elements of one parameter in one shard: ``shard[start:stop]`` is ``param[param_start:][:numel]``."""

    start: int
    stop: int
    param_start: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class BucketLayout:
    """The slots of a bucket, in order, and its cut into ``world_size`` equal shards, each a multiple of 64 bytes."""

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
        """The fragment of ``slot`` in the shard of ``rank``; empty if that rank owns no element of it."""
        shard_start = rank * self.shard_numel
        start = min(max(slot.offset, shard_start), slot.stop)
        stop = max(min(slot.stop, shard_start + self.shard_numel), start)
        if start == stop:
            # All empty fragments are equal, and slice any shard to nothing.
            return Fragment(0, 0, 0)
        return Fragment(start - shard_start, stop - shard_start, start - slot.offset)

    def owners(self, slot: Slot) -> Iterator[tuple[int, Fragment]]:
        """Every rank that owns elements of ``slot``, in order, with its fragment."""
        if slot.numel:
            # Only the ranks in question: with thousands of ranks a walk over all would be slow.
            for rank in range(slot.offset // self.shard_numel, (slot.stop - 1) // self.shard_numel + 1):
                yield rank, self.fragment(slot, rank)


@dataclass(frozen=True, slots=True)
class SendRange:
    """The elements ``[start, stop)`` of a shard that go into one message, and where their gradient is read.

    ``slot`` is the position of a large parameter, whose gradient is sent from its own memory, from element ``source``
    on. It is None for small parameters, which are packed: ``source`` counts in the send buffer then.
    """

    start: int
    stop: int
    slot: int | None
    source: int


@dataclass(frozen=True, slots=True)
class SendLayout:
    """How a bucket is sent, by every rank to every other; gathers of replica groups use it in the other direction.

    ranges        the send ranges of each rank's shard, by rank; of ``whole_layout`` one for all shards
    packed        (position of a slot, offset in the send buffer) for every small slot
    packed_numel  the number of elements of the send buffer
    """

    ranges: tuple[tuple[SendRange, ...], ...]
    packed: tuple[tuple[int, int], ...]
    packed_numel: int


@dataclass(frozen=True, slots=True)
class SendRuns:
    """How a bucket is sent, before it is cut by rank: nothing here grows with the number of ranks.

    runs          (start, stop, slot, source) of each range of the bucket, as in ``SendRange``
    packed        (position of a slot, offset in the send buffer) for every small slot
    packed_numel  the number of elements of the send buffer
    """

    runs: tuple[tuple[int, int, int | None, int], ...]
    packed: tuple[tuple[int, int], ...]
    packed_numel: int


def send_runs(layout: BucketLayout, direct_numel: int) -> SendRuns:
    """Send slots of at least ``direct_numel`` elements from their own memory, and pack neighbouring smaller ones.

    For backends that send to each rank separately (Gloo). Empty slots are sent nowhere.
    """
    runs: list[tuple[int, int, int | None, int]] = []
    packed: list[tuple[int, int]] = []
    packed_numel = 0
    for index, slot in enumerate(layout.slots):
        if slot.numel >= direct_numel:
            runs.append((slot.offset, slot.stop, index, 0))
        elif slot.numel:
            # Runs of small slots include the padding between them, so that a run stays one message for each rank.
            if runs and runs[-1][2] is None:
                start, _, _, source = runs.pop()
            else:
                start, source = slot.offset, packed_numel
            packed_numel = source + slot.stop - start
            packed.append((index, source + slot.offset - start))
            runs.append((start, slot.stop, None, source))
    return SendRuns(tuple(runs), tuple(packed), packed_numel)


def send_layout(layout: BucketLayout, direct_numel: int) -> SendLayout:
    """The runs of ``send_runs``, cut by the ranks whose shards they lie in."""
    runs = send_runs(layout, direct_numel)
    by_rank: list[list[SendRange]] = [[] for _ in range(layout.world_size)]
    for start, stop, owner, source in runs.runs:
        for rank in range(start // layout.shard_numel, (stop - 1) // layout.shard_numel + 1):
            first = rank * layout.shard_numel
            low, high = max(start, first), min(stop, first + layout.shard_numel)
            by_rank[rank].append(SendRange(low - first, high - first, owner, source + low - start))
    return SendLayout(tuple(map(tuple, by_rank)), runs.packed, runs.packed_numel)


def whole_layout(layout: BucketLayout) -> SendLayout:
    """Pack everything, padding included, with one send range for the shards of all ranks together.

    For backends whose collectives take one contiguous buffer (NCCL): nothing here has an entry for each rank.
    """
    packed = tuple((index, slot.offset) for index, slot in enumerate(layout.slots) if slot.numel)
    return SendLayout(((SendRange(0, layout.numel, None, 0),),), packed, layout.numel)


def round_up(numel: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``numel``."""
    return -(-numel // multiple) * multiple


def bucket_cap_bytes(bucket_cap_mb: float, total_bytes: int, min_buckets: int, world_size: int) -> int:
    """The size in bytes that a bucket may have: the user's cap, or less so that there are ``min_buckets`` buckets.

    It is never below 1 MiB unless the user asks for less: smaller messages cost more than they save. From 400 ranks on
    the user's cap grows with ``world_size``, so that the shard of each rank, which is a message of its own in a ring,
    stays as long as it is at 400: 64 KiB for the default of 25 MiB.
    """
    cap_bytes = bucket_cap_mb * MIB * max(1.0, world_size / CAP_WORLD_SIZE)
    return int(min(cap_bytes, max(min(MIB, cap_bytes), total_bytes // min_buckets)))


def lay_out(numels: Sequence[int], itemsize: int, world_size: int) -> BucketLayout:
    """The layout of one bucket of parameters with these numbers of elements, in this order.

    Every parameter starts on a 64-byte boundary, for vector instructions, and every shard is a multiple of 64 bytes.
    The padding is therefore below ``64 · (parameters + world_size)`` bytes. A bucket is never empty: shards have at
    least one element.
    """
    align = ALIGN_BYTES // itemsize
    slots: list[Slot] = []
    offset = 0
    for numel in numels:
        slots.append(Slot(offset, numel))
        offset += round_up(numel, align)
    # Equal shards: collectives that gather or reduce uneven ones are slow, or missing in some backends.
    shard_numel = round_up(-(-max(offset, 1) // world_size), align)
    return BucketLayout(tuple(slots), shard_numel, world_size)


def fill_buckets(numels: Sequence[int], itemsize: int, cap_bytes: int) -> list[list[int]]:
    """Put parameters into buckets, in the order given; returns the positions of the parameters of each bucket.

    A bucket is closed before it would exceed ``cap_bytes``, unless it holds little: less than 1 MiB and than an eighth
    of the cap. A parameter is never cut by a bucket boundary: one that is larger than the cap has a bucket for itself
    and a few small neighbours.
    """
    buckets: list[list[int]] = []
    used_bytes = 0
    lone_bytes = min(LONE_BYTES, cap_bytes // 8)
    for position, numel in enumerate(numels):
        size = numel * itemsize
        if not buckets or (used_bytes + size > cap_bytes and used_bytes >= lone_bytes):
            buckets.append([])
            used_bytes = 0
        buckets[-1].append(position)
        used_bytes += size
    if len(buckets) > 1 and used_bytes < lone_bytes:
        last = buckets.pop()
        buckets[-1] += last
    return buckets
