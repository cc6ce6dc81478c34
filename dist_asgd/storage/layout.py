"""The layout of buckets, in integers only: where each parameter lies, and which of its elements each rank owns.

bucket      one flat buffer that holds several parameters of one group, dtype and device
slot        where one parameter lies in its bucket
shard       the equal, contiguous range of a bucket that one rank owns and updates
fragment    the elements of one parameter that lie in one rank's shard
padding     elements of a bucket that belong to no parameter
stripe      one range of every rank's shard: what one reduce-scatter moves. Most buckets have one

The sizes of buckets are decided here, by ``bucket_cap_bytes`` and ``fill_buckets``. All counts are in real elements: a
complex parameter of n elements counts 2·n.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# A cache line: no two parameters share one, and vector instructions of any width start aligned.
ALIGN_BYTES = 64
MIB = 1 << 20
# Up to how many ranks a user's cap is taken as it is.
CAP_WORLD_SIZE = 400
# A bucket with less than this is no message of its own: what it holds (norms, biases) rides with a large neighbour.
LONE_BYTES = MIB
# How many buckets a model makes at least, by stage. In stage 2 the gradients of a few buckets are in flight, and they
# should be small beside the shards. In stage 1 one bucket is gathered while another is updated.
MIN_BUCKETS = {1: 4, 2: 20}
# The same with step_in_backward=True, when nothing is larger than the gradients in flight but the averages.
MIN_BUCKETS_IN_BACKWARD = 40
# By how much a bucket may exceed the cap before it is cut into stripes.
STRIPE_SLACK = 1.25


def min_buckets(stage: int, step_in_backward: bool) -> int:
    """How many buckets a model makes at least with these options."""
    return MIN_BUCKETS_IN_BACKWARD if step_in_backward else MIN_BUCKETS[stage]


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
    """The slots of a bucket, in order, and its cut into ``world_size`` equal shards, each a multiple of 64 bytes.

    ``stripe_numel`` elements of each shard are reduced at a time, so that the buffers for messages need not be as large
    as the largest parameter.
    """

    slots: tuple[Slot, ...]
    shard_numel: int
    world_size: int
    stripe_numel: int

    @property
    def numel(self) -> int:
        return self.shard_numel * self.world_size

    @property
    def padding_numel(self) -> int:
        return self.numel - sum(slot.numel for slot in self.slots)

    @property
    def stripes(self) -> list[tuple[int, int]]:
        """The range (start, stop) of every shard that is reduced at a time, one after the other."""
        starts = range(0, self.shard_numel, self.stripe_numel)
        return [(start, min(start + self.stripe_numel, self.shard_numel)) for start in starts]

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


def lay_out(numels: Sequence[int], itemsize: int, world_size: int, max_stripe_bytes: int | None = None) -> BucketLayout:
    """The layout of one bucket of parameters with these numbers of elements, in this order.

    A bucket of much more than ``max_stripe_bytes`` is cut into stripes of at most about that size; None: it is not.

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
    stripe_numel = shard_numel
    nbytes = shard_numel * world_size * itemsize
    # A bucket with a few small neighbours above the cap is one message, as if it were at the cap.
    if max_stripe_bytes is not None and nbytes > max_stripe_bytes * STRIPE_SLACK:
        num_stripes = -(-nbytes // max_stripe_bytes)
        stripe_numel = round_up(-(-shard_numel // num_stripes), align)
    return BucketLayout(tuple(slots), shard_numel, world_size, stripe_numel)


def fill_buckets(numels: Sequence[int], itemsize: int, cap_bytes: int) -> list[list[int]]:
    """Put parameters into buckets, in the order given; returns the positions of the parameters of each bucket.

    A bucket is closed before it would exceed ``cap_bytes``, unless it holds little: less than 1 MiB and than an eighth
    of the cap. A parameter is never cut by a bucket boundary: one that is larger than the cap has a bucket for itself
    and a few small neighbours, whose gradients are sent in stripes (``lay_out``).
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
