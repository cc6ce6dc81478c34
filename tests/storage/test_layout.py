"""The layout: every element has one owner, shards are equal and aligned, padding is bounded."""

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dist_asgd.storage.layout import ALIGN_BYTES, MIB, BucketLayout, bucket_cap_bytes, fill_buckets, lay_out, round_up

NUMELS = st.lists(st.one_of(st.integers(0, 70), st.integers(0, 5000)), max_size=12)
ITEMSIZES = st.sampled_from([2, 4, 8])
WORLD_SIZES = st.one_of(st.integers(1, 9), st.sampled_from([64, 1000, 1024]))


@given(NUMELS, ITEMSIZES, WORLD_SIZES)
@example([1], 4, 1024)
@example([], 4, 3)
@example([0, 0], 2, 2)
def test_every_element_is_owned_by_exactly_one_rank(numels: list[int], itemsize: int, world_size: int) -> None:
    """The fragments of a parameter, in rank order, are the parameter, and lie in its slot."""
    layout = lay_out(numels, itemsize, world_size)
    for numel, slot in zip(numels, layout.slots, strict=True):
        fragments = [layout.fragment(slot, rank) for rank in range(world_size)]
        covered = 0
        for rank, fragment in enumerate(fragments):
            if fragment.numel:
                assert fragment.param_start == covered
                assert rank * layout.shard_numel + fragment.start == slot.offset + covered
                assert 0 <= fragment.start < fragment.stop <= layout.shard_numel
                covered += fragment.numel
        assert covered == slot.numel == numel
        assert list(layout.owners(slot)) == [(r, fragment) for r, fragment in enumerate(fragments) if fragment.numel]


@given(NUMELS, ITEMSIZES, WORLD_SIZES)
def test_slots_keep_their_order_and_do_not_overlap(numels: list[int], itemsize: int, world_size: int) -> None:
    """All slots lie within the bucket."""
    layout = lay_out(numels, itemsize, world_size)
    end = 0
    for slot in layout.slots:
        assert slot.offset >= end
        end = slot.stop
    assert end <= layout.numel == layout.shard_numel * world_size


@given(NUMELS, ITEMSIZES, WORLD_SIZES)
def test_shards_and_slots_are_aligned_and_padding_is_bounded(numels: list[int], itemsize: int, world_size: int) -> None:
    """Every slot and shard starts on 64 bytes; the padding is below 64 bytes for each parameter and rank."""
    layout = lay_out(numels, itemsize, world_size)
    assert layout.shard_numel > 0
    assert layout.shard_numel * itemsize % ALIGN_BYTES == 0
    assert all(slot.offset * itemsize % ALIGN_BYTES == 0 for slot in layout.slots)
    assert layout.padding_numel == layout.numel - sum(numels)
    assert 0 <= layout.padding_numel * itemsize <= ALIGN_BYTES * (len(numels) + world_size)


def _elements_per_rank(layout: BucketLayout) -> list[int]:
    return [sum(layout.fragment(slot, rank).numel for slot in layout.slots) for rank in range(layout.world_size)]


@pytest.mark.parametrize(("numels", "world_size"), [([3], 4), ([1, 1], 8), ([17], 64)])
def test_fewer_elements_than_ranks_leaves_ranks_with_nothing(numels: Sequence[int], world_size: int) -> None:
    """Such ranks have a shard of the common size, too."""
    owned = _elements_per_rank(lay_out(numels, 4, world_size))
    assert sum(owned) == sum(numels)
    assert owned[-1] == 0


@given(st.lists(st.integers(0, 3000), max_size=30), ITEMSIZES, st.integers(1, 20_000))
def test_buckets_hold_every_parameter_once_in_order_and_keep_the_cap(
    numels: list[int], itemsize: int, cap_bytes: int
) -> None:
    """Only one parameter makes a bucket exceed it, and what is too small for a bucket of its own."""
    buckets = fill_buckets(numels, itemsize, cap_bytes)
    assert [position for bucket in buckets for position in bucket] == list(range(len(numels)))
    lone_bytes = min(MIB, cap_bytes // 8)
    for bucket in buckets:
        sizes = [numels[position] * itemsize for position in bucket]
        assert sum(sizes) <= cap_bytes + 2 * lone_bytes or sum(sizes) - max(sizes) <= 2 * lone_bytes
        assert len(buckets) == 1 or sum(sizes) >= lone_bytes


def test_norms_ride_with_their_neighbours() -> None:
    """A transformer's have no bucket of their own, neither between large parameters nor at an end."""
    layer = [4096, 1 << 26, 4096, 1 << 26]
    assert fill_buckets([*layer, *layer, 4096], 2, 25 * MIB) == [[0, 1], [2, 3], [4, 5], [6, 7, 8]]


@pytest.mark.parametrize("world_size", [8, 400, 1024, 16384])
def test_the_cap_grows_with_the_ranks(world_size: int) -> None:
    """So that a rank's piece of a message stays long, if the model is large enough for several buckets."""
    cap_bytes = bucket_cap_bytes(25.0, 1 << 40, 20, world_size)
    assert cap_bytes == 25 * MIB if world_size <= 400 else cap_bytes / world_size >= 1 << 16
    assert bucket_cap_bytes(25.0, 100 * MIB, 20, world_size) == 5 * MIB
    assert bucket_cap_bytes(0.5, 100 * MIB, 20, 8) == MIB // 2


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_round_up_is_the_next_multiple(numel: int, multiple: int) -> None:
    """The result is never below the number, and never a whole multiple above."""
    rounded = round_up(numel, multiple)
    assert rounded % multiple == 0
    assert 0 <= rounded - numel < multiple
