"""A DTensor of which replicas hold a part each: what ``optimizer.state`` and state dicts show of shared state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from ..storage.memory_order import in_memory_order, memory_strides
from .dtensor import dtensor_like, global_offset_of, is_first_copy, local_tensor
from .replicas import ReplicaSharding
from .shard_tensor import ShardTensor, refuse


class ReplicaShardDTensor(DTensor):
    """DTensorParam like its parameter, but of its local tensor this rank holds a part: ``to_local()``, 1-D in memory order.

    ``redistribute`` and ``full_tensor`` gather the parts first; collective on the mesh. It can be copied, pickled, and
    saved and loaded by ``torch.distributed.checkpoint``; arithmetic is refused.
    """

    _part: ShardTensor
    _share: ReplicaSharding | None

    @staticmethod
    def __new__(cls, part: ShardTensor, spec: DTensorSpec, share: ReplicaSharding | None) -> ReplicaShardDTensor:
        """``part`` of a local tensor; ``share`` is None for one that was pickled, which cannot be gathered any more."""
        meta = TensorMeta(spec.shape, spec.stride, part.dtype)
        spec = DTensorSpec(spec.mesh, spec.placements, tensor_meta=meta)
        portion = cast(ReplicaShardDTensor, DTensor.__new__(cls, part.to_local(), spec, requires_grad=False))
        portion._part = part
        portion._share = share
        return portion

    @property
    def part(self) -> ShardTensor:
        """This rank's part, with its place in the local tensor and in the whole one; shares memory."""
        # Stagers of torch.distributed.checkpoint put copies into ``_local_tensor``.
        return self._part.like(self._local_tensor)

    def to_local(self, *, grad_placements: Sequence[Placement] | None = None) -> Tensor:
        """This rank's part ``(numel,)``, without communication; shares memory."""
        local = self._local_tensor.detach().as_subclass(_FragmentTensor)
        local.part = self.part
        return local

    def like(self, local: Tensor) -> ReplicaShardDTensor:
        """The same part of another tensor of this shape and placement, held in ``local`` ``(numel,)``."""
        return self._holding(self._part.like(local))

    def _holding(self, part: ShardTensor) -> ReplicaShardDTensor:
        return ReplicaShardDTensor(part, self._spec, self._share)

    def together(self) -> DTensor:
        """Collective on the replicas: a DTensor with the same placements and its local tensor complete."""
        if self._share is None:
            raise RuntimeError(
                "dist_asgd: this is one replica's part of a DTensor and was pickled, so its ranks are not known any "
                "more. Pass the state dict to load_state_dict(), and take consolidated_state_dict() for the whole."
            )
        shape, strides, _, _ = self._part.extent
        return dtensor_like(self, self._share.gather(self._local_tensor).as_strided(shape, strides))

    def redistribute(
        self,
        device_mesh: DeviceMesh | None = None,
        placements: Sequence[Placement] | None = None,
        **options: Any,
    ) -> DTensor:
        """Collective on the mesh: as DTensor's, from complete local tensors."""
        return self.together().redistribute(device_mesh, placements, **options)

    # --- for torch.distributed.checkpoint ------------------------------------------------------------------

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        return self.part.__create_write_items__(fqn, object)

    def __create_chunk_list__(self) -> list[Any]:
        return self.part.__create_chunk_list__()

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return self.part.__get_tensor_shard__(index)

    # --- as a tensor ---------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Refuses what loaders of whole tensors begin with, also where it would be a no-op; moving is none of it."""
        if func is torch.Tensor.to and (kwargs or {}).get("dtype") is not None:
            refuse("Tensor.to(dtype=...)")
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
        """As the part does: it takes copies, and refuses arithmetic."""
        parts = [arg.part if isinstance(arg, ReplicaShardDTensor) else arg for arg in args]
        found = func(*parts, **(kwargs or {}))
        first = args[0]
        if not isinstance(first, ReplicaShardDTensor) or not isinstance(found, ShardTensor):
            return found
        return first if found is parts[0] else first._holding(found)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplicaShardDTensor:
        """A copy of the part."""
        return self._holding(copy.deepcopy(self.part, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as the part and its place."""
        return rebuild_portion, (self.part, self._spec)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ReplicaShardDTensor(part={self.part}, device_mesh={self.device_mesh}, placements={self.placements})"


class _FragmentTensor(torch.Tensor):
    """A part ``(numel,)`` into which all of its local tensor can be copied: it takes what is its own.

    So do loaders of full state dicts, in ``torch.distributed.checkpoint.state_dict``.
    """

    part: ShardTensor

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Results are plain tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.copy_ and isinstance(args[0], cls) and args[1].shape == args[0].part.shape:
                args[0].part.copy_(args[1])
                return args[0]
            return func(*args, **(kwargs or {}))


def fragment_of_dtensor(
    param: DTensor, local: Tensor, start: int, like: Tensor, strides: Sequence[int], share: ReplicaSharding
) -> ReplicaShardDTensor:
    """``local`` ``(numel,)``, placed like ``param``: the elements from ``start`` on of what ``like`` is of that."""
    within = tuple(param.shape), global_offset_of(param)
    return ReplicaShardDTensor(ShardTensor(local, like.shape, strides, start, within), param._spec, share)


def replicated_fragment(mesh: DeviceMesh, part: ShardTensor, share: ReplicaSharding) -> ReplicaShardDTensor:
    """``part`` of a plain tensor of which each rank of ``mesh`` has one, as of a DTensor that is replicated there."""
    meta = TensorMeta(part.shape, part.stride(), part.dtype)
    return ReplicaShardDTensor(part, DTensorSpec(mesh, (Replicate(),), tensor_meta=meta), share)


def written_fragment(tensor: DTensor) -> ShardTensor | None:
    """The part of ``tensor`` that this rank answers for, shares memory if it is dense there.

    None where another rank of its mesh holds the same and comes first, and outside of the mesh.
    """
    if isinstance(tensor, ReplicaShardDTensor):
        return tensor.part
    if not is_first_copy(tensor):
        return None
    local = local_tensor(tensor)
    strides = memory_strides(local)
    return ShardTensor(
        in_memory_order(local, strides), local.shape, strides, 0, (tuple(tensor.shape), global_offset_of(tensor))
    )


def rebuild_portion(part: ShardTensor, spec: DTensorSpec) -> ReplicaShardDTensor:
    """What a pickled ``ReplicaShardDTensor`` is made of."""
    return ReplicaShardDTensor(part, spec, None)


# Files name the function by this path, since version 0.1 and for ever.
rebuild_portion.__module__ = "dist_asgd.portions"
# torch.load(weights_only=True), the default, loads files that hold a ReplicaShardDTensor.
torch.serialization.add_safe_globals([rebuild_portion])
