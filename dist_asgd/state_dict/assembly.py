"""Whole tensors out of the parts that ranks hold of them: DTensors, brought together on one rank or on all.

Each rank tells the others once where its parts lie. Then it sends them, many small ones in one message, and nobody
holds more of a whole than its part but the ranks that ask for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..comm import Communicators
from ..placements.shard_dtensor import written_fragment
from ..placements.shard_tensor import ShardTensor
from ..storage.memory_order import as_real

# What is brought in one go, as bytes of whole tensors; a larger tensor goes alone.
MAX_BYTES = 8 << 20


class RankRegion(NamedTuple):
    """Where a part lies: ``numel`` elements from ``start`` on of a region with these strides in memory, at ``corner``."""

    global_offset: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    numel: int

    @classmethod
    def of(cls, part: ShardTensor | None, num_dims: int) -> RankRegion:
        """Of what this rank sends; with ``numel`` 0 where it sends nothing."""
        if part is None or not part.to_local().numel():
            return cls((0,) * num_dims, (0,) * num_dims, (0,) * num_dims, 0, 0)
        sizes, strides, start, numel = part.extent
        return cls(part.global_offset, sizes, strides, start, numel)

    @classmethod
    def read(cls, words: Sequence[int], num_dims: int) -> RankRegion:
        """From its words, in the order of its fields."""
        corner, sizes, strides = (tuple(words[i * num_dims : (i + 1) * num_dims]) for i in range(3))
        return cls(corner, sizes, strides, *words[3 * num_dims :])

    @property
    def words(self) -> list[int]:
        """As other ranks get it."""
        return [*self.global_offset, *self.sizes, *self.strides, self.start, self.numel]

    def first_in(self, shape: Sequence[int]) -> int | None:
        """Where the part begins in a contiguous tensor of ``shape``; None where it is not one stretch of that."""
        inner = 1
        for dim in reversed(range(len(shape))):
            if self.sizes[dim] != 1 and self.strides[dim] != inner:
                return None
            inner *= self.sizes[dim]
        outer = next((dim for dim, size in enumerate(self.sizes) if size != 1), len(shape))
        if any(self.sizes[dim] != shape[dim] for dim in range(outer + 1, len(shape))):
            return None
        return self.start + sum(at * math.prod(shape[dim + 1 :]) for dim, at in enumerate(self.global_offset))


class Assembly:
    """Brings ``tensors`` together, or others that are spread over the ranks alike."""

    def __init__(self, tensors: Sequence[DTensor], communicators: Communicators) -> None:
        """Collective: every rank tells where its parts lie. All ranks pass the same DTensors in the same order."""
        self._communicators = communicators
        self._shapes = [tuple(tensor.shape) for tensor in tensors]
        own = [RankRegion.of(written_fragment(tensor), tensor.dim()) for tensor in tensors]
        words = torch.tensor([word for spot in own for word in spot.words], dtype=torch.int64, device="cpu")
        rows = communicators.host.exchange(words)().tolist()
        self._spots: list[list[RankRegion]] = []
        first = 0
        for shape in self._shapes:
            stop = first + 3 * len(shape) + 2
            spots = [RankRegion.read(row[first:stop], len(shape)) for row in rows]
            self._spots.append(_once(spots))
            first = stop
        self._staging: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def bring(self, chosen: Sequence[int], tensors: Sequence[DTensor], to: int | None) -> list[Tensor]:
        """Collective: the whole tensors on rank ``to`` (None: on all), contiguous, on the CPU; [] on the others.

        ``chosen`` are the numbers of ``tensors`` among those passed to the constructor; all have one dtype and device.
        """
        rank = self._communicators.rank
        like = tensors[0]
        held = [written_fragment(t) for i, t in zip(chosen, tensors, strict=True) if self._spots[i][rank].numel]
        sent = [as_real(part.to_local()) for part in held if part is not None]
        width = 2 if like.is_complex() else 1
        numels = [width * sum(self._spots[i][r].numel for i in chosen) for r in range(self._communicators.world_size)]
        here = to is None or to == rank
        wholes = [torch.empty(self._shapes[i], dtype=like.dtype, device="cpu") for i in chosen if here]
        in_place = self._stretches(chosen, wholes) if here and like.device.type == "cpu" else None
        places = list(torch.split(self._room(like, sum(numels)), numels)) if here and in_place is None else in_place
        mine = sent[0] if len(sent) == 1 else torch.cat([self._room(like, 0), *sent])
        everyone = self._communicators.among(tuple(self._communicators.ranks), like.device)
        everyone.gather(mine, places, numels, to)
        if places is not None and places is not in_place:
            self._unpack(chosen, places, wholes)
        return wholes

    def _stretches(self, chosen: Sequence[int], wholes: Sequence[Tensor]) -> list[Tensor] | None:
        """Where the ranks' parts of a single tensor lie in the whole, 1-D and real; None unless all are stretches."""
        if len(chosen) != 1:
            return None
        flat, width = as_real(wholes[0].view(-1)), 2 if wholes[0].is_complex() else 1
        places = []
        for spot in self._spots[chosen[0]]:
            first = spot.first_in(self._shapes[chosen[0]]) if spot.numel else 0
            if first is None:
                return None
            places.append(flat[width * first : width * (first + spot.numel)])
        return places

    def _room(self, like: Tensor, numel: int) -> Tensor:
        """For reals, on the device; overwritten by the next call."""
        key = (like.device, like.dtype.to_real())
        if key not in self._staging or self._staging[key].numel() < numel:
            self._staging[key] = torch.empty(numel, dtype=key[1], device=key[0])
        return self._staging[key][:numel]

    def _unpack(self, chosen: Sequence[int], places: Sequence[Tensor], wholes: Sequence[Tensor]) -> None:
        firsts = [0] * len(places)
        for i, whole in zip(chosen, wholes, strict=True):
            width = 2 if whole.is_complex() else 1
            for rank, spot in enumerate(self._spots[i]):
                if not spot.numel:
                    continue
                reals = places[rank][firsts[rank] : firsts[rank] + width * spot.numel]
                firsts[rank] += width * spot.numel
                local = torch.view_as_complex(reals.view(-1, 2)) if whole.is_complex() else reals
                first = spot.first_in(whole.shape)
                if first is not None:
                    whole.view(-1)[first : first + spot.numel].copy_(local)
                    continue
                part = ShardTensor(
                    local, spot.sizes, spot.strides, spot.start, (tuple(whole.shape), spot.global_offset)
                )
                for (offsets, sizes), view in part.regions():
                    region = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
                    whole[region].copy_(view)


def _once(spots: Sequence[RankRegion]) -> list[RankRegion]:
    """What several ranks have, on several meshes, is sent by the first of them."""
    seen: set[RankRegion] = set()
    kept = []
    for spot in spots:
        kept.append(spot._replace(numel=0) if spot in seen else spot)
        seen.add(spot)
    return kept


def runs_of(tensors: Sequence[DTensor]) -> Iterator[range]:
    """Consecutive tensors of one dtype and device, to be brought together; the same on all ranks."""
    first, nbytes = 0, 0
    for i, tensor in enumerate(tensors):
        size = tensor.numel() * tensor.dtype.itemsize
        alike = (tensor.dtype, tensor.device) == (tensors[first].dtype, tensors[first].device)
        if i > first and not (alike and nbytes + size <= MAX_BYTES):
            yield range(first, i)
            first, nbytes = i, 0
        nbytes += size
    if tensors:
        yield range(first, len(tensors))
