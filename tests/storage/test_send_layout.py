"""What is sent of a bucket: every element once, to the rank that owns it, whatever the stripes are."""

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from dist_asgd.storage.bucketing import build_buckets
from dist_asgd.storage.buffers import Bucket
from dist_asgd.storage.layout import STRIPE_SLACK, lay_out
from dist_asgd.storage.precision import Precision
from dist_asgd.storage.send_layout import SendLayout, row_layout, send_layout, send_runs, whole_layout

NUMELS = st.lists(st.one_of(st.integers(0, 70), st.integers(0, 3000)), min_size=1, max_size=6)
WORLD_SIZES = st.integers(1, 9)
STRIPE_BYTES = st.sampled_from([64, 200, 1000, 5000, 1 << 20])


def bucket_of(numels: list[int], world_size: int, stripe_bytes: int) -> Bucket:
    """One bucket of float32 parameters with these sizes, whatever they are together."""
    params = [(i, str(i), nn.Parameter(torch.zeros(numel))) for i, numel in enumerate(numels)]
    (bucket,) = build_buckets(
        params, group_index=0, rank=0, world_size=world_size, replica=0, cap_bytes=1 << 30, precision=Precision()
    )
    bucket.layout = lay_out([slot.numel for slot in bucket.layout.slots], 4, world_size, stripe_bytes)
    return bucket


def gradients_of(bucket: Bucket) -> tuple[list[Tensor | None], Tensor]:
    """Different numbers for each element, every third parameter without; and how they lie in the bucket."""
    whole = torch.zeros(bucket.layout.numel)
    given: list[Tensor | None] = []
    count = 1
    for position, slot in enumerate(bucket.layout.slots):
        values = torch.arange(count, count + slot.numel, dtype=torch.float32)
        count += slot.numel
        missing = position % 3 == 2
        given.append(None if missing else values)
        if not missing:
            whole[slot.offset : slot.stop] = values
    return given, whole


@given(NUMELS, WORLD_SIZES, STRIPE_BYTES)
@example([3000], 3, 64)
@example([0, 1], 9, 64)
def test_stripes_cut_every_shard(numels: list[int], world_size: int, stripe_bytes: int) -> None:
    """They follow each other, are aligned, and none is much above the limit."""
    layout = lay_out(numels, 4, world_size, stripe_bytes)
    assert [start for start, _ in layout.stripes] == [0, *(stop for _, stop in layout.stripes[:-1])]
    assert layout.stripes[-1][1] == layout.shard_numel
    for start, stop in layout.stripes:
        assert start < stop
        assert start % 16 == 0
        # Stripes are multiples of 64 bytes of each shard.
        assert (stop - start) * world_size * 4 <= max(STRIPE_SLACK * stripe_bytes, stripe_bytes + 64 * world_size)
    assert lay_out(numels, 4, world_size).stripes == [(0, layout.shard_numel)]


@given(NUMELS, WORLD_SIZES, STRIPE_BYTES)
@example([3000], 3, 64)
@example([5, 3000, 7], 4, 1000)
def test_a_packed_stripe_is_that_range_of_all_shards(numels: list[int], world_size: int, stripe_bytes: int) -> None:
    """Stale values in the send buffer are gone, also where parameters have no gradient and in the padding."""
    bucket = bucket_of(numels, world_size, stripe_bytes)
    given, whole = gradients_of(bucket)
    for start, stop in bucket.layout.stripes:
        layout = whole_layout(bucket.layout, start, stop)
        # Strided copies count from where the tensors begin in their storages.
        out = torch.full((layout.packed_numel + 3,), torch.nan)[3:]
        moved = [None if g is None else torch.cat([torch.zeros(2), g])[2:] for g in given]
        bucket.pack(moved, layout, out)
        assert torch.equal(out.view(world_size, -1), whole.view(world_size, -1)[:, start:stop])
        assert len(layout.pieces) <= 3 * (2 * len(numels) + 1)


@given(NUMELS, WORLD_SIZES, STRIPE_BYTES, st.sampled_from([1, 40, 500, 1 << 20]))
@example([3000], 3, 64, 40)
@example([5, 3000, 7], 4, 1000, 500)
def test_ranges_send_every_element_to_its_owner(
    numels: list[int], world_size: int, stripe_bytes: int, direct_numel: int
) -> None:
    """Large gradients from where they lie, and small ones packed: together they are the shards."""
    bucket = bucket_of(numels, world_size, stripe_bytes)
    given, whole = gradients_of(bucket)
    shards = torch.zeros_like(whole).view(world_size, -1)
    times = torch.zeros_like(shards)
    ones: list[Tensor | None] = [torch.ones(slot.numel) for slot in bucket.layout.slots]
    num_messages = 0
    for start, stop in bucket.layout.stripes:
        layout = send_layout(bucket.layout, direct_numel, start, stop)
        packed = torch.full((layout.packed_numel,), torch.nan)
        bucket.pack(given, layout, packed)
        for rank in range(world_size):
            num_messages += len(layout.ranges[rank]) if rank else 0
            receive(layout, rank, given, packed, shards[rank, start:stop])
            receive(layout, rank, ones, torch.ones_like(packed), times[rank, start:stop])
    assert torch.equal(shards.flatten(), whole)
    assert times.max() <= 1
    for slot in bucket.layout.slots:
        assert (times.flatten()[slot.offset : slot.stop] == 1).all()
    assert send_runs(bucket.layout, direct_numel).num_messages(bucket.layout) == num_messages


@given(NUMELS, st.integers(2, 9), STRIPE_BYTES, st.sampled_from([1, 40, 500, 1 << 20]))
@example([3000], 3, 64, 40)
@example([5, 3000, 7], 4, 1000, 500)
@example([20, 3000, 30, 2, 900], 5, 1000, 100)
def test_rows_hold_what_other_ranks_read(
    numels: list[int], world_size: int, stripe_bytes: int, direct_numel: int
) -> None:
    """Each rank finds its stripe in the row that another has packed for it, and in its own gradients."""
    bucket = bucket_of(numels, world_size, stripe_bytes)
    given, whole = gradients_of(bucket)
    shards = whole.view(world_size, -1)
    for start, stop in bucket.layout.stripes:
        width = stop - start
        layouts = [row_layout(bucket.layout, direct_numel, rank, start, stop) for rank in range(world_size)]
        assert len({layout.packed_numel for layout in layouts}) == 1
        assert layouts[0].packed_numel <= world_size * width
        for rank, layout in enumerate(layouts):
            packed = torch.full((layout.packed_numel,), torch.nan)
            bucket.pack(given, layout, packed)
            for row, reader in enumerate(other for other in range(world_size) if other != rank):
                assert torch.equal(packed[row * width : (row + 1) * width], shards[reader, start:stop])
                (sent,) = layout.ranges[reader]
                assert (sent.start, sent.stop, sent.slot, sent.source) == (0, width, None, row * width)
            own = torch.zeros(width)
            receive(layout, rank, given, packed, own)
            assert torch.equal(own, shards[rank, start:stop])
            for part in layout.ranges[rank]:
                assert part.slot is None or numels_of(bucket)[part.slot] >= direct_numel


def numels_of(bucket: Bucket) -> list[int]:
    """The sizes of the members of ``bucket``."""
    return [slot.numel for slot in bucket.layout.slots]


def receive(layout: SendLayout, rank: int, given: list[Tensor | None], packed: Tensor, stripe: Tensor) -> None:
    """Add what ``rank`` gets to its ``stripe``."""
    for part in layout.ranges[rank]:
        numel = part.stop - part.start
        flat = packed if part.slot is None else given[part.slot]
        if flat is not None:
            stripe[part.start : part.stop] += flat[part.source : part.source + numel]
