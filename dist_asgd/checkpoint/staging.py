"""Host memory to which a state is copied, so that training can go on while it is written.

``Saver`` calls ``StagingArea.copy`` in an asynchronous save, before it returns to the training loop.

copy range   tensors that lie near each other in one storage, as the fragments in a bucket do: their bytes, and those
             between them, are copied at once
layout       shape, strides, dtype and placement of a tensor; its buffer is used again while they are equal
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..placements.dtensor import dtensor_like, is_dtensor, local_tensor
from ..placements.shard_tensor import shard_tensor_of
from ..storage.pinned import PinnedMemory
from ..update.cpu import copy_bytes
from .entries import State

Key = tuple[str, str]
"""The section of the state, and the key in it."""
# So many bytes between two tensors are copied with them: that is cheaper than a second copy.
_GAP_BYTES = 1 << 12
# Copy ranges begin at multiples of it, so that every element in them is aligned.
_ALIGNMENT = 64


class _Source(NamedTuple):
    """A tensor to stage.

    Attributes:
        local: its data on this rank.
        layout: shape, strides, dtype and placement; the buffer is reused while these are equal.
        wrap: makes of a copy of ``local`` a tensor of the original kind.
    """

    local: Tensor
    layout: tuple[object, ...]
    wrap: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Host memory for one tensor of this layout.

    Attributes:
        layout: as in ``_Source``.
        memory: what keeps page-locked memory locked; None for other memory.
        pointer: the address of the tensor in its copy range; None if the tensor is copied by itself.
        local: the memory, in the shape of ``_Source.local``.
        tensor: ``local`` as a tensor of the original kind, which is what gets saved.
    """

    layout: tuple[object, ...]
    memory: PinnedMemory | None
    pointer: int | None
    local: Tensor
    tensor: Tensor


class CopyRange(NamedTuple):
    """Bytes of one storage that are copied at once.

    Attributes:
        keys: the tensors in it.
        storage: address and size of the storage, in bytes.
        start: the first byte in the storage.
        buffer: host memory, (num_bytes,) uint8.
    """

    keys: list[Key]
    storage: tuple[int, int]
    start: int
    buffer: Tensor


class StagingArea:
    """Copies states to host memory, which is kept from one copy to the next. One per ``Saver``."""

    def __init__(self) -> None:
        self._buffers: dict[Key, _Buffer] = {}
        self._ranges: list[CopyRange] = []

    # inference_mode(False): tensors made in inference mode could not be written to outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def copy(self, state: State) -> State:
        """Return ``state`` with every tensor copied to the host. Overwrites the tensors of the last call's result."""
        copied: State = {section: dict(entries) for section, entries in state.items()}
        sources: dict[Key, _Source] = {}
        # Plain scalars by dtype and device: stacked they take one transfer from a device instead of one each.
        scalars: dict[tuple[torch.dtype, torch.device], dict[Key, Tensor]] = {}
        for section, entries in state.items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    source = _source_of(value)
                    if source is None:
                        scalars.setdefault((value.dtype, value.device), {})[section, key] = value
                    else:
                        sources[section, key] = source
        misfits = self._misfits(sources)
        if misfits:
            self._allocate(sources, misfits)
        self._fill(sources)
        for (section, key), buffer in self._buffers.items():
            copied[section][key] = buffer.tensor
        for same_kind in scalars.values():
            values = torch.stack(list(same_kind.values())).cpu().unbind()
            for (section, key), scalar in zip(same_kind, values, strict=True):
                copied[section][key] = scalar
        return copied

    def _misfits(self, sources: Mapping[Key, _Source]) -> set[Key]:
        """Return the keys whose staging buffer cannot be reused.

        These are new, changed or removed tensors, and every tensor that shares a copy range with one of those.
        """
        misfits = {key for key, source in sources.items() if not self._fits(key, source)}
        misfits.update(self._buffers.keys() - sources.keys())
        for copy_range in self._ranges:
            # All tensors of the range are at their old addresses. If the first one's storage is the old one, these
            # addresses lie in it, and so do the other tensors.
            fits = (
                misfits.isdisjoint(copy_range.keys)
                and _storage_of(sources[copy_range.keys[0]].local) == copy_range.storage
            )
            if not fits:
                misfits.update(copy_range.keys)
        return misfits

    def _fits(self, key: Key, source: _Source) -> bool:
        buffer = self._buffers.get(key)
        return (
            buffer is not None
            and buffer.layout == source.layout
            and (buffer.pointer is None or buffer.pointer == source.local.data_ptr())
        )

    def _allocate(self, sources: Mapping[Key, _Source], misfits: set[Key]) -> None:
        """Drop the buffers of ``misfits``, and make new ones for all sources that have none."""
        # The old memory is freed before new memory is taken, so that both are never held at once.
        self._ranges = [copy_range for copy_range in self._ranges if misfits.isdisjoint(copy_range.keys)]
        for key in misfits:
            self._buffers.pop(key, None)
        alone: list[Key] = []
        shared: dict[tuple[int, int], dict[Key, Tensor]] = {}
        for key, source in sources.items():
            if key in self._buffers:
                continue
            if _shares_storage(source.local):
                shared.setdefault(_storage_of(source.local), {})[key] = source.local
            elif _is_on_gpu(source.local) and _is_plain(source.local):
                alone.append(key)
            else:
                local = torch.empty_like(source.local, device="cpu", pin_memory=source.local.is_cuda)
                self._buffers[key] = _Buffer(source.layout, None, None, local, source.wrap(local))
        ranges = [(storage, *found) for storage, neighbours in shared.items() for found in _copy_ranges(neighbours)]
        takers = [sources[key].local for key in alone] + [sources[keys[0]].local for *_, keys in ranges]
        sizes_bytes = [sources[key].local.nbytes for key in alone] + [stop - start for _, start, stop, _ in ranges]
        memory, buffers = _host_memory(takers, sizes_bytes)
        for key, buffer in zip(alone, buffers, strict=False):
            source = sources[key]
            strides = torch.empty_like(source.local, device="meta").stride()
            local = buffer.view(source.local.dtype).as_strided(source.local.shape, strides)
            self._buffers[key] = _Buffer(source.layout, memory, None, local, source.wrap(local))
        for (storage, start, _, keys), buffer in zip(ranges, buffers[len(alone) :], strict=True):
            self._ranges.append(CopyRange(keys, storage, start, buffer))
            for key in keys:
                tensor, layout = sources[key].local, sources[key].layout
                first = _first_byte(tensor) - start
                local = buffer[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                self._buffers[key] = _Buffer(layout, memory, tensor.data_ptr(), local, sources[key].wrap(local))

    def _fill(self, sources: Mapping[Key, _Source]) -> None:
        """Copy every source into its buffer."""
        for keys, _, start, buffer in self._ranges:
            storage = sources[keys[0]].local.untyped_storage()
            source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, start, buffer.shape, (1,))
            if source.is_cpu:
                copy_bytes(buffer, source)
            else:
                buffer.copy_(source)
        for key, target in self._buffers.items():
            if target.pointer is None and target.local.numel():
                target.local.copy_(sources[key].local)


def _host_memory(takers: Sequence[Tensor], sizes_bytes: Sequence[int]) -> tuple[PinnedMemory | None, list[Tensor]]:
    """Host memory, 1-D uint8, of these sizes for copies of ``takers``: page-locked for those on a GPU.

    Returned beside what keeps it locked, None if nothing is.
    """
    pinned = [position for position, taker in enumerate(takers) if _is_on_gpu(taker)]
    memory = PinnedMemory([sizes_bytes[position] for position in pinned]) if pinned else None
    given = dict(zip(pinned, memory.tensors, strict=True)) if memory is not None else {}
    return memory, [
        given[position] if position in given else torch.empty(size_bytes, dtype=torch.uint8, device="cpu")
        for position, size_bytes in enumerate(sizes_bytes)
    ]


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _source_of(value: Any) -> _Source | None:
    """Return how to stage a tensor; None for a plain scalar."""
    plain = type(value) is Tensor
    if plain and not value.dim():
        return None
    fragment = None if plain else shard_tensor_of(value)
    if fragment is not None:
        mesh = value.device_mesh if is_dtensor(value) else None
        local = fragment.to_local()
        layout = (fragment.extent, fragment.global_shape, fragment.global_offset, local.dtype, mesh)
        return _Source(local, layout, value.like)
    if not plain and is_dtensor(value):
        local = local_tensor(value)
        whole_layout = (value.shape, value.stride(), value.device_mesh, value.placements)
        return _Source(local, (*_layout(local), *whole_layout), lambda copy: dtensor_like(value, copy))
    if value.dim() == 0:
        return None
    return _Source(value, _layout(value), lambda copy: copy)


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()


def _shares_storage(local: Tensor) -> bool:
    """Whether other data lies in its storage, and the tensor can be copied as bytes."""
    return _is_plain(local) and local.untyped_storage().nbytes() > local.nbytes > 0 and local.is_contiguous()


def _is_plain(local: Tensor) -> bool:
    """Whether the tensor's memory has its elements as they are: it is no subclass, and not lazily conjugated."""
    plain = type(local) in (Tensor, torch.nn.Parameter) and local.layout is torch.strided
    return plain and not (local.is_conj() or local.is_neg())


def _storage_of(tensor: Tensor) -> tuple[int, int]:
    """Return address and size of the tensor's storage, in bytes."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _first_byte(tensor: Tensor) -> int:
    """Return where the tensor begins in its storage."""
    return int(tensor.storage_offset()) * tensor.element_size()


def _copy_ranges(neighbours: Mapping[Key, Tensor]) -> Iterator[tuple[int, int, list[Key]]]:
    """Yield, for the tensors of one storage, the first byte of each copy range, the end of it, and its keys."""
    start, stop, keys = 0, 0, list[Key]()
    for key in sorted(neighbours, key=lambda key: _first_byte(neighbours[key])):
        first = _first_byte(neighbours[key])
        if keys and first > stop + _GAP_BYTES:
            yield start, stop, keys
            keys = []
        if not keys:
            start, stop = first // _ALIGNMENT * _ALIGNMENT, first
        keys.append(key)
        stop = max(stop, first + neighbours[key].nbytes)
    yield start, stop, keys
