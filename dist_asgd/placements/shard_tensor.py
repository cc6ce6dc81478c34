"""One rank's part of a sharded tensor, as ``torch.distributed.checkpoint`` (DCP) writes and reads it.

A piece is a range of a parameter's elements in memory order: 1-D on its rank, but checkpoints know tensors by
their true shape. In that shape a range of an N-D tensor is at most 2·N - 1 regions, and a region of the range is a view of
the 1-D piece. So a checkpoint of pieces is the checkpoint of the tensor: it loads under any sharding. The tensor may
itself be a region of a larger one, as the local tensor of a DTensor is: checkpoints know the larger one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..storage.memory_order import in_memory_order

Region = tuple[tuple[int, ...], tuple[int, ...]]


def row_major_regions(start: int, stop: int, shape: Sequence[int]) -> list[Region]:
    """Elements ``[start, stop)`` of a contiguous tensor as (offsets, sizes), in order; as few as there can be."""
    inner = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    regions: list[Region] = []
    while start < stop:
        # The outermost dimension along which whole steps fit, then as many as fit.
        dim = next((d for d, numel in enumerate(inner) if start % numel == 0 and start + numel <= stop), None)
        if dim is None:
            return [((), ())]  # 0-dim
        index = tuple(start // inner[d] % shape[d] for d in range(dim + 1))
        count = min(shape[dim] - index[dim], (stop - start) // inner[dim])
        offsets = index + (0,) * (len(shape) - dim - 1)
        regions.append((offsets, (1,) * dim + (count,) + tuple(shape[dim + 1 :])))
        start += count * inner[dim]
    return regions


def memory_order(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Dimensions from the outermost to the innermost in memory, of a tensor that is dense there."""
    return sorted(range(len(shape)), key=lambda dim: (-strides[dim], -shape[dim], dim))


def refuse(what: str) -> NoReturn:
    """RuntimeError: ``what`` is not for a part."""
    raise RuntimeError(
        f"dist_asgd: this is one rank's part of a sharded tensor: {what} would take it for the whole. For the whole "
        f"use optimizer.consolidated_state_dict(), which has torch.optim.ASGD's own layout; to save parts, "
        f"save_checkpoint() or torch.distributed.checkpoint."
    )


class ShardTensor(torch.Tensor):
    """A tensor of which this rank holds elements ``[start, start + numel)`` in memory order; the rest is elsewhere.

    Shape, dtype and device are those of the whole tensor; ``to_local()`` is the part, ``(numel,)``, and shares memory
    with what it was made of. It can be copied, pickled, and saved and loaded by DCP; arithmetic is refused.
    ``within``: shape of the larger tensor of which this one is a region, and where in it; None where there is none.
    """

    _local: Tensor
    # Also known as ``shape``, which takes longer to ask for.
    _shape: torch.Size
    _strides: tuple[int, ...]
    _start: int
    _within: Region | None
    _regions: list[tuple[Region, Tensor]] | None

    @staticmethod
    def __new__(
        cls, local: Tensor, shape: Sequence[int], strides: Sequence[int], start: int, within: Region | None = None
    ) -> ShardTensor:
        """Elements from ``start`` on of a tensor that is dense in memory with these strides; no copy."""
        whole: ShardTensor = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), strides=tuple(strides), dtype=local.dtype, device=local.device
        )
        whole._local = local.detach()
        whole._shape = torch.Size(shape)
        whole._strides = tuple(strides)
        whole._start = start
        whole._within = within
        whole._regions = None
        return whole

    def to_local(self) -> Tensor:
        """This rank's part, 1-D in memory order; shares memory."""
        return self._local

    @property
    def extent(self) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
        """Shape and strides of the whole, start and number of elements of the part."""
        return tuple(self._shape), self._strides, self._start, self._local.numel()

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the largest tensor that this is a part of, in which regions are placed."""
        return tuple(self._shape) if self._within is None else self._within[0]

    @property
    def global_offset(self) -> tuple[int, ...]:
        """Where in the largest tensor this one's region begins."""
        return (0,) * len(self._shape) if self._within is None else self._within[1]

    def like(self, local: Tensor) -> ShardTensor:
        """The same part of another tensor of this shape, held in ``local`` ``(numel,)``."""
        return ShardTensor(local, self._shape, self._strides, self._start, self._within)

    def shares_memory_with(self, slice_: Tensor) -> bool:
        """Whether this is the part that ``slice_`` ``(numel,)`` is: the same memory."""
        local = self._local
        return (local.data_ptr(), local.numel(), local.dtype) == (slice_.data_ptr(), slice_.numel(), slice_.dtype)

    def is_like(self, other: ShardTensor, whole: Tensor) -> bool:
        """Whether this is ``other.like(other.fragment_of(whole))``: the same memory."""
        local = self._local
        return (
            (self._start, local.numel(), self._strides) == (other._start, other._local.numel(), other._strides)
            and local.dtype == whole.dtype
            and local.data_ptr() in (0, whole.data_ptr() + self._start * local.element_size())
            and whole.shape == self._shape
            and _lies_as(whole, self._strides)
        )

    def fragment_of(self, whole: Tensor) -> Tensor | None:
        """The same part of ``whole``, which has this shape, as a 1-D view; None where it lies otherwise in memory."""
        if whole.shape != self._shape or not _lies_as(whole, self._strides):
            return None
        first = whole.storage_offset() + self._start
        return whole.detach().as_strided((self._local.numel(),), (1,), first)

    # --- regions ---------------------------------------------------------------------------------------------

    def regions(self) -> list[tuple[Region, Tensor]]:
        """The part as regions of the true, largest shape: (offsets, sizes) and a view of the part in that shape."""
        if self._regions is None:
            self._regions = self._cut_regions()
        return self._regions

    def _cut_regions(self) -> list[tuple[Region, Tensor]]:
        order = memory_order(self._shape, self._strides)
        back = [order.index(dim) for dim in range(len(order))]
        corner, found, first = self.global_offset, [], 0
        for offsets, sizes in row_major_regions(
            self._start, self._start + self._local.numel(), [self._shape[dim] for dim in order]
        ):
            numel = math.prod(sizes)
            view = self._local[first : first + numel].view(sizes).permute(back)
            place = tuple(at + offsets[d] for at, d in zip(corner, back, strict=True))
            found.append(((place, tuple(sizes[d] for d in back)), view))
            first += numel
        return found

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        """Called by DCP to save: one item a region."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties(dtype=self.dtype)
        size = torch.Size(self.global_shape)
        return [
            WriteItem(
                index=MetadataIndex(fqn, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes)),
                    properties=properties,
                    size=size,
                ),
            )
            for (offsets, sizes), _ in self.regions()
        ]

    def __create_chunk_list__(self) -> list[Any]:
        """Called by DCP to load: the regions that this rank wants."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            for (offsets, sizes), _ in self.regions()
        ]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        """Called by DCP for the data of one region, to read or to fill."""
        for (offsets, _), view in self.regions():
            if tuple(index.offset) == offsets:
                return view
        raise ValueError(f"dist_asgd: this rank has no region of {index.fqn} at {tuple(index.offset)}.")

    # --- as a tensor ---------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Refuses what loaders of whole tensors begin with, also where it would be a no-op."""
        if func in _CONVERSIONS:
            refuse(f"Tensor.{func.__name__}()")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Copies act on the part, as DCP's stagers need; arithmetic would not know of the other parts.

        A plain tensor of this shape can be copied into it, as loaders of whole tensors do: it takes its part.
        """
        aten, options = torch.ops.aten, dict(kwargs or {})
        if func in (aten.detach.default, aten.alias.default):
            return args[0].like(args[0]._local)
        if func is aten.clone.default:
            return args[0].like(args[0]._local.clone())
        if func in (aten.empty_like.default, aten.zeros_like.default, aten.new_empty.default):
            device = options.get("device") or args[0].device
            return args[0].like(torch.zeros_like(args[0]._local, device=device))
        if func is aten._to_copy.default and options.get("dtype") in (None, args[0].dtype):
            return args[0].like(args[0]._local.to(options.get("device"), copy=True))
        if func is aten.is_pinned.default:
            return args[0]._local.is_pinned()
        if func is aten.copy_.default and isinstance(args[0], ShardTensor):
            target, source = args[:2]
            target._local.copy_(source._local if isinstance(source, ShardTensor) else target._part_of(source))
            return target
        refuse(str(func))

    def _part_of(self, whole: Tensor) -> Tensor:
        if whole.shape != self.shape:
            refuse(f"copying a tensor of shape {tuple(whole.shape)} into one of shape {tuple(self.shape)}")
        flat = in_memory_order(whole, self._strides)
        return flat[self._start : self._start + self._local.numel()]

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardTensor:
        """A copy of the part."""
        return self.like(copy.deepcopy(self._local, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as the part and its place."""
        return rebuild_shard, (self._local, tuple(self.shape), self._strides, self._start, self._within)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        start, numel = self._start, self._local.numel()
        return f"ShardTensor(shape={tuple(self.shape)}, elements [{start}, {start + numel}) = {self._local})"


def shard_tensor_of(value: object) -> ShardTensor | None:
    """The part that this rank holds of ``value``: itself, or that of a DTensor that replicas share; else None."""
    held = getattr(value, "part", value)
    return held if isinstance(held, ShardTensor) else None


def rebuild_shard(
    local: Tensor, shape: Sequence[int], strides: Sequence[int], start: int, within: Region | None = None
) -> ShardTensor:
    """What a pickled ``ShardTensor`` is made of; ValueError where the place does not fit the shape."""
    numel = math.prod(shape)
    if len(strides) != len(shape) or local.dim() != 1 or not 0 <= start <= start + local.numel() <= numel:
        raise ValueError(f"dist_asgd: {local.numel()} elements from {start} on do not fit a tensor of shape {shape}.")
    if within is not None and not (len(within[0]) == len(within[1]) == len(shape)):
        raise ValueError(
            f"dist_asgd: a tensor of shape {shape} is no region at {within[1]} of one of shape {within[0]}."
        )
    return ShardTensor(local, shape, strides, start, within)


def _lies_as(tensor: Tensor, strides: Sequence[int]) -> bool:
    return all(size == 1 or a == b for size, a, b in zip(tensor.shape, tensor.stride(), strides, strict=True))


# With these torch.optim's loaders cast and move state, of which they take every tensor for a whole one.
_CONVERSIONS = (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda)

# Files name the function by this path, since version 0.1 and for ever.
rebuild_shard.__module__ = "dist_asgd.parts"
# torch.load(weights_only=True), the default, loads files that hold a ShardTensor.
torch.serialization.add_safe_globals([rebuild_shard])
