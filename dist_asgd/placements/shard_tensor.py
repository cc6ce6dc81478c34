"""``ShardTensor``: one rank's fragment of a tensor, as ``torch.distributed.checkpoint`` (DCP) writes and reads it.

A fragment is a range of a parameter's elements in memory order, 1-D on its rank; checkpoints know tensors by their true
shape. In that shape a range of an N-D tensor is at most 2·N - 1 regions, and each region is a view of the 1-D fragment.
A checkpoint of fragments is therefore a checkpoint of the tensor, which loads under any sharding. The tensor may itself
be a region of a larger one, as the local tensor of a DTensor is: checkpoints know the larger one.

region   an N-d box of a tensor, as (offsets, sizes): one number for each dimension in both
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..storage.memory_order import in_memory_order
from . import savers

Region = tuple[tuple[int, ...], tuple[int, ...]]


def row_major_regions(start: int, stop: int, shape: Sequence[int]) -> list[Region]:
    """The regions that make up the elements ``[start, stop)`` of a contiguous tensor: in order, as few as possible."""
    inner = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    regions: list[Region] = []
    while start < stop:
        # The outermost dimension along which a whole step fits; then as many steps as fit.
        dim = next((d for d, numel in enumerate(inner) if start % numel == 0 and start + numel <= stop), None)
        if dim is None:
            return [((), ())]  # a 0-dim tensor has no dimension to cut
        index = tuple(start // inner[d] % shape[d] for d in range(dim + 1))
        count = min(shape[dim] - index[dim], (stop - start) // inner[dim])
        offsets = index + (0,) * (len(shape) - dim - 1)
        regions.append((offsets, (1,) * dim + (count,) + tuple(shape[dim + 1 :])))
        start += count * inner[dim]
    return regions


def memory_order(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The dimensions of a tensor that is dense in memory, from the outermost to the innermost there."""
    return sorted(range(len(shape)), key=lambda dim: (-strides[dim], -shape[dim], dim))


def refuse(what: str) -> NoReturn:
    """Raise the RuntimeError of an operation, ``what``, that would take a fragment for the whole tensor."""
    raise RuntimeError(
        f"dist_asgd: this is one rank's part of a sharded tensor: {what} would take it for the whole. For the whole "
        f"use optimizer.consolidated_state_dict(), which has torch.optim.ASGD's own layout; to save parts, "
        f"save_checkpoint() or torch.distributed.checkpoint."
    )


class ShardTensor(torch.Tensor):
    """A tensor of which this rank holds the elements ``[start, start + fragment_numel)`` in memory order.

    Shape, dtype and device are those of the whole tensor; ``to_local()`` is the fragment ``(fragment_numel,)`` and
    shares memory with the tensor that was passed in. It can be copied, pickled, and saved and loaded by DCP; arithmetic
    raises a RuntimeError. ``within`` is (shape of the larger tensor of which this tensor is a region, offsets in it);
    None if there is no larger tensor.
    """

    _local: Tensor
    # The same as ``shape``, which takes several times as long to read on a subclass of Tensor.
    _shape: torch.Size
    _strides: tuple[int, ...]
    _start: int
    _within: Region | None
    _regions: list[tuple[Region, Tensor]] | None

    @staticmethod
    def __new__(
        cls, local: Tensor, shape: Sequence[int], strides: Sequence[int], start: int, within: Region | None = None
    ) -> ShardTensor:
        """Make the tensor whose elements from ``start`` on are ``local`` ``(fragment_numel,)``; no copy.

        The whole tensor is dense in memory with ``strides``. ``start`` counts elements, complex ones once.
        """
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
        """This rank's fragment ``(fragment_numel,)``, in memory order; shares memory."""
        return self._local

    @property
    def extent(self) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
        """Shape and strides of the whole tensor, and start and number of elements of the fragment."""
        return tuple(self._shape), self._strides, self._start, self._local.numel()

    @property
    def global_shape(self) -> tuple[int, ...]:
        """The shape of the larger tensor if there is one, else of this tensor; regions are counted in it."""
        return tuple(self._shape) if self._within is None else self._within[0]

    @property
    def global_offset(self) -> tuple[int, ...]:
        """The offsets of this tensor in the larger one; zeros if there is none."""
        return (0,) * len(self._shape) if self._within is None else self._within[1]

    def like(self, local: Tensor) -> ShardTensor:
        """The same fragment of another tensor with this shape: ``local`` ``(fragment_numel,)``."""
        return ShardTensor(local, self._shape, self._strides, self._start, self._within)

    def shares_memory_with(self, fragment: Tensor) -> bool:
        """Whether ``to_local()`` and ``fragment`` ``(fragment_numel,)`` are the same memory, read as the same dtype."""
        local = self._local
        return (local.data_ptr(), local.numel(), local.dtype) == (fragment.data_ptr(), fragment.numel(), fragment.dtype)

    def is_like(self, other: ShardTensor, whole: Tensor) -> bool:
        """Whether this tensor is ``other.like(other.fragment_view(whole))``: the same fragment, the same memory."""
        local = self._local
        return (
            (self._start, local.numel(), self._strides) == (other._start, other._local.numel(), other._strides)
            and local.dtype == whole.dtype
            and local.data_ptr() in (0, whole.data_ptr() + self._start * local.element_size())
            and whole.shape == self._shape
            and _lies_as(whole, self._strides)
        )

    def fragment_view(self, whole: Tensor) -> Tensor | None:
        """The same fragment of ``whole``, a plain tensor, as a view ``(fragment_numel,)``.

        None if ``whole`` has another shape or other strides, so that a view would have other elements.
        """
        if whole.shape != self._shape or not _lies_as(whole, self._strides):
            return None
        first = whole.storage_offset() + self._start
        return whole.detach().as_strided((self._local.numel(),), (1,), first)

    # --- regions ---------------------------------------------------------------------------------------------

    def regions(self) -> list[tuple[Region, Tensor]]:
        """The fragment as (region in ``global_shape``, view of the fragment with the region's sizes) pairs."""
        # DCP asks several times in each save or load, and regions never change.
        if self._regions is None:
            self._regions = self._cut_regions()
        return self._regions

    def _cut_regions(self) -> list[tuple[Region, Tensor]]:
        order = memory_order(self._shape, self._strides)
        back = [order.index(dim) for dim in range(len(order))]
        # Regions are cut in memory order, where the fragment is one range, and turned back to the tensor's dimensions.
        corner, regions, first = self.global_offset, [], 0
        for offsets, sizes in row_major_regions(
            self._start, self._start + self._local.numel(), [self._shape[dim] for dim in order]
        ):
            numel = math.prod(sizes)
            view = self._local[first : first + numel].view(sizes).permute(back)
            global_offsets = tuple(at + offsets[d] for at, d in zip(corner, back, strict=True))
            regions.append(((global_offsets, tuple(sizes[d] for d in back)), view))
            first += numel
        return regions

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        """Called by DCP to plan a save: one item for each region."""
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
        """Called by DCP to plan a load: the regions that this rank has to fill."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            for (offsets, sizes), _ in self.regions()
        ]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        """Called by DCP for the data of one region, to read or to fill. ValueError if this rank does not have it."""
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
        """Refuse to convert the tensor, even to its present dtype; moving it to a device is allowed.

        Loaders of whole tensors, ``torch.optim``'s among them, begin with a conversion. An error is better there than
        a fragment that is taken for the whole tensor later. Trainers move state dicts to a device.
        """
        if func in _CONVERSIONS and not _is_move(args, kwargs or {}):
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
        """Copy the fragment if ``func`` copies, as DCP's stagers do; any other operator raises a RuntimeError.

        ``copy_`` also accepts a plain tensor with the whole shape, as loaders pass it, and takes the fragment out of
        it. Arithmetic is refused because it would not act on the fragments of the other ranks.
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
            target._local.copy_(source._local if isinstance(source, ShardTensor) else target._fragment_of(source))
            return target
        refuse(str(func))

    def _fragment_of(self, whole: Tensor) -> Tensor:
        if whole.shape != self.shape:
            refuse(f"copying a tensor of shape {tuple(whole.shape)} into one of shape {tuple(self.shape)}")
        flat = in_memory_order(whole, self._strides)
        return flat[self._start : self._start + self._local.numel()]

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardTensor:
        """Copy the fragment."""
        return self.like(copy.deepcopy(self._local, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the fragment and its place in the whole tensor; RuntimeError for some trainers (see ``savers``)."""
        savers.check()
        return rebuild_shard, (self._local, tuple(self.shape), self._strides, self._start, self._within)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        start, numel = self._start, self._local.numel()
        return f"ShardTensor(shape={tuple(self.shape)}, elements [{start}, {start + numel}) = {self._local})"


def _is_move(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``Tensor.to`` was called as trainers do to move: the device by position, and no dtype.

    torch.optim's loader passes the device by name, for complex parameters without a dtype.
    """
    is_device = len(args) > 1 and isinstance(args[1], (torch.device, str, int)) and not isinstance(args[1], bool)
    return is_device and not any(isinstance(one, torch.dtype) for one in (*args, *kwargs.values()))


def shard_tensor_of(value: object) -> ShardTensor | None:
    """``value`` as a ``ShardTensor``: itself, or the fragment of a ``ReplicaShardDTensor``; None if it is neither."""
    # By attribute: importing shard_dtensor.py imports DTensors, which takes a second.
    fragment = getattr(value, "fragment", value)
    return fragment if isinstance(fragment, ShardTensor) else None


def rebuild_shard(
    local: Tensor, shape: Sequence[int], strides: Sequence[int], start: int, within: Region | None = None
) -> ShardTensor:
    """Make a ``ShardTensor`` from its pickled state; called by ``torch.load``.

    ValueError if the fragment's place does not fit the shape: the file is not trusted.
    """
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


# torch.optim's loaders cast and move state with these, and take every tensor for a whole one.
_CONVERSIONS = (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda)

# Users' files name the function by this path since version 0.1, so it never changes.
rebuild_shard.__module__ = "dist_asgd.parts"
# torch.load(weights_only=True), the default, calls only functions that are listed here.
torch.serialization.add_safe_globals([rebuild_shard])
