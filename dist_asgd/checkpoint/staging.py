"""Host memory to which a state is copied, so that training can go on while it is written.

stretch   tensors that lie near each other in one storage, as the parts in a bucket do: they are copied at once, with
          what is between them
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..placements.dtensor import dtensor_like, is_dtensor, local_tensor
from ..placements.shard_tensor import shard_tensor_of
from ..update.cpu import copy_bytes
from .chunks import State

Key = tuple[str, str]
# So many bytes between two tensors are copied with them.
_GAP_BYTES = 1 << 12
# Stretches begin at multiples of it, so that every element in them is aligned.
_ALIGNMENT = 64


class _Source(NamedTuple):
    """A tensor to copy. ``local``: what of it lies on this rank; ``lies``: how; ``around``: a copy as the whole."""

    local: Tensor
    lies: tuple[object, ...]
    around: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Staged:
    """Room for a tensor that lies like this. ``pointer`` is its address, None where it is copied by itself."""

    lies: tuple[object, ...]
    pointer: int | None
    local: Tensor
    whole: Tensor


class CopyRange(NamedTuple):
    """Bytes from ``start`` on of the storage (address, size) that all of ``keys`` lie in, and room for them."""

    keys: list[Key]
    storage: tuple[int, int]
    start: int
    room: Tensor


class StagingArea:
    """Copies of states; memory is kept from one to the next."""

    def __init__(self) -> None:
        self._staged: dict[Key, _Staged] = {}
        self._stretches: list[CopyRange] = []

    # Tensors made in inference mode could not be written to outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def copy(self, state: State) -> State:
        """``state`` with every tensor copied; overwrites what the last call returned."""
        copied: State = {part: dict(entries) for part, entries in state.items()}
        sources: dict[Key, _Source] = {}
        scalars: dict[tuple[torch.dtype, torch.device], dict[Key, Tensor]] = {}
        for part, entries in state.items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    source = _source_of(value)
                    if source is None:
                        scalars.setdefault((value.dtype, value.device), {})[part, key] = value
                    else:
                        sources[part, key] = source
        misfits = self._misfits(sources)
        if misfits:
            self._make_room_for(sources, misfits)
        self._fill(sources)
        for (part, key), staged in self._staged.items():
            copied[part][key] = staged.whole
        for alike in scalars.values():
            for (part, key), scalar in zip(alike, torch.stack(list(alike.values())).cpu().unbind(), strict=True):
                copied[part][key] = scalar
        return copied

    def _misfits(self, sources: Mapping[Key, _Source]) -> set[Key]:
        """For which there is no room, or which are gone; with one of a stretch all that are copied with it."""
        misfits = {key for key, source in sources.items() if not self._fits(key, source)}
        misfits.update(self._staged.keys() - sources.keys())
        for stretch in self._stretches:
            # With the first all others are in this storage: it is what is at their addresses.
            fits = misfits.isdisjoint(stretch.keys) and _extent(sources[stretch.keys[0]].local) == stretch.storage
            if not fits:
                misfits.update(stretch.keys)
        return misfits

    def _fits(self, key: Key, source: _Source) -> bool:
        staged = self._staged.get(key)
        return (
            staged is not None
            and staged.lies == source.lies
            and (staged.pointer is None or staged.pointer == source.local.data_ptr())
        )

    def _make_room_for(self, sources: Mapping[Key, _Source], misfits: set[Key]) -> None:
        # What was there goes first.
        self._stretches = [stretch for stretch in self._stretches if misfits.isdisjoint(stretch.keys)]
        for key in misfits:
            self._staged.pop(key, None)
        shared: dict[tuple[int, int], dict[Key, Tensor]] = {}
        for key, source in sources.items():
            if key in self._staged:
                continue
            if _is_among_others(source.local):
                shared.setdefault(_extent(source.local), {})[key] = source.local
            else:
                room = torch.empty_like(source.local, device="cpu", pin_memory=source.local.is_cuda)
                self._staged[key] = _Staged(source.lies, None, room, source.around(room))
        for storage, neighbours in shared.items():
            for start, stop, keys in _stretches_of(neighbours):
                pinned = neighbours[keys[0]].is_cuda
                stretch = torch.empty(stop - start, dtype=torch.uint8, device="cpu", pin_memory=pinned)
                self._stretches.append(CopyRange(keys, storage, start, stretch))
                for key in keys:
                    local, lies = neighbours[key], sources[key].lies
                    first = _first_byte(local) - start
                    room = stretch[first : first + local.nbytes].view(local.dtype).view(local.shape)
                    self._staged[key] = _Staged(lies, local.data_ptr(), room, sources[key].around(room))

    def _fill(self, sources: Mapping[Key, _Source]) -> None:
        for keys, _, start, room in self._stretches:
            storage = sources[keys[0]].local.untyped_storage()
            stretch = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, start, room.shape, (1,))
            if stretch.is_cpu:
                copy_bytes(room, stretch)
            else:
                room.copy_(stretch)
        for key, staged in self._staged.items():
            if staged.pointer is None and staged.local.numel():
                staged.local.copy_(sources[key].local)


def _source_of(value: Any) -> _Source | None:
    """None for a plain scalar."""
    plain = type(value) is Tensor
    if plain and not value.dim():
        return None
    part = None if plain else shard_tensor_of(value)
    if part is not None:
        mesh = value.device_mesh if is_dtensor(value) else None
        local = part.to_local()
        return _Source(local, (part.extent, part.global_shape, part.global_offset, local.dtype, mesh), value.like)
    if not plain and is_dtensor(value):
        local = local_tensor(value)
        of_whole = (value.shape, value.stride(), value.device_mesh, value.placements)
        return _Source(local, (*_lies(local), *of_whole), lambda room: dtensor_like(value, room))
    if value.dim() == 0:
        return None
    return _Source(value, _lies(value), lambda room: room)


def _lies(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()


def _is_among_others(local: Tensor) -> bool:
    """Whether there is more in its storage, and its bytes are all there is to know of it."""
    return (
        type(local) in (Tensor, torch.nn.Parameter)
        and local.layout is torch.strided
        and local.untyped_storage().nbytes() > local.nbytes > 0
        and local.is_contiguous()
        and not (local.is_conj() or local.is_neg())
    )


def _extent(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _first_byte(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def _stretches_of(neighbours: Mapping[Key, Tensor]) -> Iterator[tuple[int, int, list[Key]]]:
    """The first byte of each stretch in one storage, the one after its last, and what is there."""
    start, stop, together = 0, 0, list[Key]()
    for key in sorted(neighbours, key=lambda key: _first_byte(neighbours[key])):
        first = _first_byte(neighbours[key])
        if together and first > stop + _GAP_BYTES:
            yield start, stop, together
            together = []
        if not together:
            start, stop = first // _ALIGNMENT * _ALIGNMENT, first
        together.append(key)
        stop = max(stop, first + neighbours[key].nbytes)
    yield start, stop, together
