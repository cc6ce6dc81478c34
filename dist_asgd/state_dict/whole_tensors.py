"""Whole tensors from the fragments that ranks hold of them, gathered on one rank or on all, a batch at a time.

``consolidated_state_dict()`` and ``export_averaged()`` use it. A receiving rank holds one batch beside the tensors that
its caller keeps, and the other ranks hold at most what they send of one batch.

batch       tensors that are gathered with one message per rank: those of a bucket, or some DTensors of one dtype
collective  what backends such as NCCL have for a batch, if all ranks send as much; with messages of other sizes they
            need a broadcast from every rank in its place
region      the elements of a DTensor that one rank sends, see ``RankRegion``; ranks exchange their regions once
staging     the buffer in which the messages of a batch arrive; the next batch uses it again
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..comm import Communicators
from ..comm.base import ShardCollectives
from ..placements.presharded import DTensorParam
from ..placements.shard_tensor import ShardTensor
from ..storage.buffers import ShardedParam, StateBuffer
from ..storage.memory_order import as_real

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# The size of a batch of DTensors, as bytes of whole tensors. A larger tensor is a batch of its own.
MAX_BYTES = 8 << 20
# The size of the staging for a bucket that a collective gathers. A larger bucket takes several, and room on the host:
# the memory of an accelerator is for training.
MAX_STAGING_BYTES = 256 << 20


def whole_state(
    params: Sequence[ShardedParam], communicators: Communicators, to: int | None, *, masters: bool, one_by_one: bool
) -> Iterator[tuple[ShardedParam, str, Tensor]]:
    """Yield ``ax`` of every parameter, whole, on rank ``to`` (None: on all ranks), and nothing on the others.

    Collective: every rank passes the same parameters and runs the iterator to its end, the ranks that get nothing too.
    Parameters come in any order, each with the key of its tensor in state dicts. A tensor has the parameter's shape;
    for a parameter in a bucket it has its strides too, and for a DTensor it is contiguous.

    Args:
        params: parameters in buckets and DTensors, each once.
        communicators: those of the optimizer.
        to: the receiving rank, counted among all ranks of the optimizer.
        masters: also yield the float32 ``master`` of parameters that have one.
        one_by_one: if False, a batch is a bucket, or up to ``MAX_BYTES`` of DTensors, and every tensor is new and on
            the CPU. If True, a tensor may lie on the parameter's device, and in memory that the next one overwrites.
            On backends that send messages between two ranks (Gloo) a batch is then one tensor.
    """
    staging = _Staging()
    in_buckets = [param for param in params if param.is_whole]
    for batch in _bucket_batches(in_buckets, one_by_one, communicators):
        bucket = batch.bucket
        for key, shard in (bucket.state_shards() if masters else {"ax": bucket.average_values}).items():
            # As below: a placeholder has no memory to send.
            flat = _gather_bucket(batch, shard.contiguous(), communicators, to, staging)
            if flat is None:
                continue
            for param in batch.params:
                whole = _view(param, flat[param.slot.offset - batch.start : param.slot.stop - batch.start])
                yield param, key, whole if one_by_one else _copied(whole)
    dtensors = [param for param in params if isinstance(param, DTensorParam)]
    if not dtensors:
        return
    # Averages that no step has written may be a placeholder, which has neither strides nor memory to send.
    averages = [param.state_entry(param.average_values.contiguous()) for param in dtensors]
    assembly = _Assembly(averages, communicators, to, staging)
    for run in _runs(averages, one_by_one and not assembly.needs_collectives(averages[0].device)):
        # float32 masters are made for this call, so only those of one batch exist at a time.
        fragments = [dtensors[i].state_fragments() if masters else {"ax": dtensors[i].average_values} for i in run]
        for key in fragments[0]:
            tensors = [dtensors[i].state_entry(own[key].contiguous()) for i, own in zip(run, fragments, strict=True)]
            for i, whole in zip(run, assembly.gather(run, tensors), strict=False):  # no tensors on other ranks
                yield dtensors[i], key, whole


def whole_dtensors(
    tensors: Sequence[DTensor], communicators: Communicators, to: int | None
) -> Iterator[tuple[int, Tensor]]:
    """Yield the position of each DTensor and the whole tensor, on rank ``to`` (None: on all), nothing on the others.

    Collective, like ``whole_state``. Tensors are gathered one by one; each is new, contiguous and on the CPU.
    """
    if not tensors:
        return
    assembly = _Assembly(tensors, communicators, to, _Staging())
    for i, tensor in enumerate(tensors):
        for whole in assembly.gather(range(i, i + 1), [tensor]):
            yield i, whole


class _Staging:
    """One buffer for each use, device and dtype; ``take`` overwrites what the last call for the same ones returned."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype, str], Tensor] = {}

    def take(self, device: torch.device, dtype: torch.dtype, numel: int, use: str = "messages") -> Tensor:
        """Return an uninitialised buffer ``(numel,)``."""
        key = (device, dtype, use)
        if key not in self._buffers or self._buffers[key].numel() < numel:
            # The smaller buffer is dropped first, so that there are never two.
            self._buffers.pop(key, None)
            self._buffers[key] = torch.empty(numel, dtype=dtype, device=device)
        return self._buffers[key][:numel]


# --- parameters in buckets -------------------------------------------------------------------------------


class _BucketBatch(NamedTuple):
    """Some parameters of a bucket; elements ``[start, stop)`` of the bucket travel, with the padding in between."""

    bucket: StateBuffer
    params: list[ShardedParam]
    start: int
    stop: int


def _bucket_batches(
    params: Sequence[ShardedParam], one_by_one: bool, communicators: Communicators
) -> list[_BucketBatch]:
    """Make the batches, the largest first: the staging buffer is then allocated once."""
    batches: list[_BucketBatch] = []
    by_bucket: dict[int, _BucketBatch] = {}
    for p in params:
        # Only some ranks have a fragment of a parameter, of any size: no collective gathers that.
        if one_by_one and not communicators.on(p.bucket.average.device).gathers_contiguous:
            batches.append(_BucketBatch(p.bucket, [p], p.slot.offset, p.slot.stop))
            continue
        if id(p.bucket) not in by_bucket:
            # All of the bucket travels: shards have one size, for which backends have their fastest gather.
            by_bucket[id(p.bucket)] = _BucketBatch(p.bucket, [], 0, p.bucket.layout.numel)
            batches.append(by_bucket[id(p.bucket)])
        by_bucket[id(p.bucket)].params.append(p)
    return sorted(batches, key=lambda batch: batch.stop - batch.start, reverse=True)


def _gather_bucket(
    batch: _BucketBatch, shard: Tensor, communicators: Communicators, to: int | None, staging: _Staging
) -> Tensor | None:
    """Collective. Return all ranks' elements ``(stop - start,)`` where they are received, and None elsewhere.

    ``shard`` ``(shard_numel,)`` is this rank's shard of the bucket's state.
    """
    start, stop, shard_numel = batch.start, batch.stop, len(shard)
    here = to is None or to == communicators.rank
    if communicators.num_shards == 1:
        return shard[start:stop] if here else None
    target = None if to is None else communicators.shard_rank_of(to)
    if to is not None and target is None:
        # Rank `to` is of another replica, which has all shards itself.
        return None
    collectives = communicators.on(shard.device)
    if collectives.gathers_contiguous and stop - start == batch.bucket.layout.numel:
        return _gather_columns(shard, collectives, here, target, staging)
    spans = []  # the elements that each rank holds, counted in the bucket
    for first in range(0, communicators.num_shards * shard_numel, shard_numel):
        low = min(max(start, first), first + shard_numel)
        spans.append((low, max(min(stop, first + shard_numel), low)))
    low, high = spans[communicators.shard_rank]
    own_start = communicators.shard_rank * shard_numel
    flat = staging.take(shard.device, shard.dtype, stop - start) if here else None
    places = (
        None if flat is None else [flat[low - start : high - start] if high > low else flat[:0] for low, high in spans]
    )
    numels = [high - low for low, high in spans]
    collectives.gather(shard[low - own_start : high - own_start], places, numels, target)
    return flat


def _gather_columns(
    shard: Tensor, collectives: ShardCollectives, here: bool, target: int | None, staging: _Staging
) -> Tensor | None:
    """Collective. Gather a whole bucket: return its elements where they are received, ``here``, and None elsewhere.

    Of a bucket larger than ``MAX_STAGING_BYTES`` ranks send one range of their shards after the other, and it is put
    together on the host.
    """
    num_shards, shard_numel = collectives.world_size, len(shard)
    width = max(1, min(shard_numel, MAX_STAGING_BYTES // (num_shards * shard.itemsize)))
    whole: Tensor | None = None
    if here and width < shard_numel:
        whole = staging.take(torch.device("cpu"), shard.dtype, num_shards * shard_numel, "bucket")
        whole = whole.view(num_shards, shard_numel)
    rows: Tensor | None = None
    for first in range(0, shard_numel, width):
        sent = shard[first : first + width]
        if here:
            rows = staging.take(shard.device, shard.dtype, num_shards * len(sent)).view(num_shards, len(sent))
        collectives.gather(sent, None if rows is None else list(rows), [len(sent)] * num_shards, target)
        if whole is not None and rows is not None:
            whole[:, first : first + width].copy_(rows)
    received = rows if whole is None else whole
    return None if received is None else received.view(-1)


def _view(param: ShardedParam, reals: Tensor) -> Tensor:
    """View real elements ``(slot_numel,)`` in memory order as a tensor like the parameter."""
    flat = torch.view_as_complex(reals.view(-1, 2)) if param.dtype.is_complex else reals
    return flat.as_strided(param.param.shape, param.strides, flat.storage_offset())


def _copied(whole: Tensor) -> Tensor:
    """Return a copy on the CPU with the same strides, which fill memory without gaps."""
    return torch.empty_strided(whole.shape, whole.stride(), dtype=whole.dtype, device="cpu").copy_(whole)


# --- DTensors --------------------------------------------------------------------------------------------


class RankRegion(NamedTuple):
    """The elements of a DTensor that one rank sends.

    They are ``numel`` elements, from element ``start`` on, of a region of the tensor at ``global_offset`` that has
    ``sizes``. Elements are counted in the memory order that the region's ``strides`` give.
    """

    global_offset: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    numel: int

    @classmethod
    def of(cls, fragment: ShardTensor | None, num_dims: int) -> RankRegion:
        """Return the region of a fragment that this rank sends; with ``numel`` 0 if it sends nothing."""
        if fragment is None or not fragment.to_local().numel():
            return cls((0,) * num_dims, (0,) * num_dims, (0,) * num_dims, 0, 0)
        sizes, strides, start, numel = fragment.extent
        return cls(fragment.global_offset, sizes, strides, start, numel)

    @classmethod
    def from_words(cls, words: Sequence[int], num_dims: int) -> RankRegion:
        """Return the region that another rank's ``words`` describe."""
        offset, sizes, strides = (tuple(words[i * num_dims : (i + 1) * num_dims]) for i in range(3))
        return cls(offset, sizes, strides, *words[3 * num_dims :])

    @property
    def words(self) -> list[int]:
        """The ``3 * num_dims + 2`` words that describe this region to other ranks."""
        return [*self.global_offset, *self.sizes, *self.strides, self.start, self.numel]

    def first_in(self, shape: Sequence[int]) -> int | None:
        """Return the number of the first element in a contiguous tensor of ``shape``; None if not all follow it."""
        inner = 1
        for dim in reversed(range(len(shape))):
            if self.sizes[dim] != 1 and self.strides[dim] != inner:
                return None
            inner *= self.sizes[dim]
        outer = next((dim for dim, size in enumerate(self.sizes) if size != 1), len(shape))
        if any(self.sizes[dim] != shape[dim] for dim in range(outer + 1, len(shape))):
            return None
        return self.start + sum(at * math.prod(shape[dim + 1 :]) for dim, at in enumerate(self.global_offset))

    def copy_into(self, whole: Tensor, values: Tensor) -> None:
        """Copy this rank's elements ``values`` ``(numel,)`` to their place in the contiguous tensor ``whole``."""
        first = self.first_in(whole.shape)
        if first is not None:
            whole.view(-1)[first : first + self.numel].copy_(values)
            return
        fragment = ShardTensor(values, self.sizes, self.strides, self.start, (tuple(whole.shape), self.global_offset))
        for (offsets, sizes), view in fragment.regions():
            region = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
            whole[region].copy_(view)


class _Assembly:
    """Gathers DTensors: those that it was made with, or others that are placed in the same way."""

    def __init__(
        self, tensors: Sequence[DTensor], communicators: Communicators, to: int | None, staging: _Staging
    ) -> None:
        """Collective: every rank describes its regions. All ranks pass the same DTensors in the same order."""
        self._communicators = communicators
        self._to = to
        self._staging = staging
        self._shapes = [tuple(tensor.shape) for tensor in tensors]
        own = [RankRegion.of(_fragment(tensor), tensor.dim()) for tensor in tensors]
        words = torch.tensor([word for region in own for word in region.words], dtype=torch.int64, device="cpu")
        rows = communicators.host.exchange(words).tolist()
        self._everyone = tuple(communicators.ranks)
        self._regions: list[list[RankRegion]] = []  # of each tensor, one per rank
        first = 0
        for shape in self._shapes:
            stop = first + 3 * len(shape) + 2
            self._regions.append(_without_copies([RankRegion.from_words(row[first:stop], len(shape)) for row in rows]))
            first = stop

    def needs_collectives(self, device: torch.device) -> bool:
        """Whether a batch on ``device`` costs a collective, or only messages of the ranks that have some of it."""
        return self._communicators.among(self._everyone, device).gathers_contiguous

    def gather(self, run: range, tensors: Sequence[DTensor]) -> list[Tensor]:
        """Collective. Return the whole tensors, new, contiguous and on the CPU; [] on ranks that receive nothing.

        ``run`` gives the positions of ``tensors`` in the constructor's list; all have one dtype and device.
        """
        rank, first = self._communicators.rank, tensors[0]
        device, dtype = first.device, first.dtype.to_real()
        fragments = [_fragment(tensor) for i, tensor in zip(run, tensors, strict=True) if self._regions[i][rank].numel]
        sent = [as_real(fragment.to_local()) for fragment in fragments if fragment is not None]
        width = 2 if first.is_complex() else 1
        numels = [width * sum(self._regions[i][r].numel for i in run) for r in range(self._communicators.world_size)]
        here = self._to is None or self._to == rank
        wholes = [torch.empty(self._shapes[i], dtype=first.dtype, device="cpu") for i in run if here]
        everyone, padded = self._communicators.among(self._everyone, device), max(numels)
        # Messages that are nearly equal are padded, so that a collective takes them.
        is_even = everyone.gathers_contiguous and 0 < padded * len(numels) <= 2 * sum(numels)
        lengths = [padded] * len(numels) if is_even else numels
        # If all fragments of a single tensor are consecutive in it, they arrive in place and need no staging.
        in_place = self._places_in(run, wholes) if here and device.type == "cpu" and lengths == numels else None
        places = in_place
        if here and places is None:
            places = list(torch.split(self._staging.take(device, dtype, sum(lengths)), lengths))
        filling = torch.zeros(lengths[rank] - numels[rank], dtype=dtype, device=device)
        message = sent[0] if len(sent) == 1 and not len(filling) else torch.cat([*sent, filling])
        everyone.gather(message, places, lengths, self._to)
        if places is not None and places is not in_place:
            self._unpack(run, places, wholes)
        return wholes

    def _places_in(self, run: range, wholes: Sequence[Tensor]) -> list[Tensor] | None:
        """Return each rank's elements of a single whole tensor, 1-D and real; None if some are not consecutive."""
        if len(run) != 1:
            return None
        flat, width = as_real(wholes[0].view(-1)), 2 if wholes[0].is_complex() else 1
        places = []
        for region in self._regions[run.start]:
            first = region.first_in(self._shapes[run.start]) if region.numel else 0
            if first is None:
                return None
            places.append(flat[width * first : width * (first + region.numel)])
        return places

    def _unpack(self, run: range, messages: Sequence[Tensor], wholes: Sequence[Tensor]) -> None:
        """Copy the ranks' 1-D, real messages, which have fragments of all tensors in order, into the whole tensors."""
        firsts = [0] * len(messages)
        for i, whole in zip(run, wholes, strict=True):
            width = 2 if whole.is_complex() else 1
            for rank, region in enumerate(self._regions[i]):
                if not region.numel:
                    continue
                reals = messages[rank][firsts[rank] : firsts[rank] + width * region.numel]
                firsts[rank] += width * region.numel
                region.copy_into(whole, torch.view_as_complex(reals.view(-1, 2)) if whole.is_complex() else reals)


def _fragment(tensor: DTensor) -> ShardTensor | None:
    """Return the fragment of ``tensor`` that this rank sends, or None."""
    # That module imports torch's DTensors, which an optimizer without any need not load.
    from ..placements.shard_dtensor import written_fragment

    return written_fragment(tensor)


def _without_copies(regions: Sequence[RankRegion]) -> list[RankRegion]:
    """If several ranks hold the same elements, on several meshes, let only the first of them send its own."""
    known: set[RankRegion] = set()
    kept = []
    for region in regions:
        kept.append(region._replace(numel=0) if region in known else region)
        known.add(region)
    return kept


def _runs(tensors: Sequence[DTensor], one_by_one: bool) -> Iterator[range]:
    """Yield the batches: positions of consecutive tensors of one dtype and device, the same on all ranks."""
    first, nbytes = 0, 0
    for i, tensor in enumerate(tensors):
        size = tensor.numel() * tensor.dtype.itemsize
        alike = (tensor.dtype, tensor.device) == (tensors[first].dtype, tensors[first].device)
        if i > first and (one_by_one or not alike or nbytes + size > MAX_BYTES):
            yield range(first, i)
            first, nbytes = i, 0
        nbytes += size
    if tensors:
        yield range(first, len(tensors))
