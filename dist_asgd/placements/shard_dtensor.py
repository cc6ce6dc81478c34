"""``ReplicaShardDTensor``: a DTensor whose local tensor is shared out over a replica group, a fragment on each rank.

``optimizer.state`` and state dicts show the sharded state of DTensors in this form if replicas share it. Checkpoints
write its fragments, and ``torch.distributed.checkpoint``'s helpers for full state dicts gather it as any DTensor.
"""

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
    """A DTensor placed as its parameter is, of whose local tensor this rank holds only a fragment.

    ``to_local()`` is that fragment, 1-D in memory order. ``redistribute`` and ``full_tensor`` are collective on the
    mesh: they gather the fragments of the replica group first. The tensor can be copied, pickled, and saved and loaded
    by ``torch.distributed.checkpoint``; arithmetic raises a RuntimeError.
    """

    _fragment: ShardTensor
    _sharding: ReplicaSharding | None

    @staticmethod
    def __new__(cls, fragment: ShardTensor, spec: DTensorSpec, sharding: ReplicaSharding | None) -> ReplicaShardDTensor:
        """Make the DTensor of ``spec`` that has ``fragment`` on this rank; shares memory.

        ``sharding`` is None if the tensor was unpickled: its replica group is not known then, so it cannot be gathered.
        """
        # The state's dtype may be another than the parameter's, whose spec this is.
        meta = TensorMeta(spec.shape, spec.stride, fragment.dtype)
        spec = DTensorSpec(spec.mesh, spec.placements, tensor_meta=meta)
        tensor = cast(ReplicaShardDTensor, DTensor.__new__(cls, fragment.to_local(), spec, requires_grad=False))
        tensor._fragment = fragment
        tensor._sharding = sharding
        return tensor

    @property
    def fragment(self) -> ShardTensor:
        """This rank's fragment, with its place in the local tensor and in the whole tensor; shares memory."""
        # The stagers of torch.distributed.checkpoint replace ``_local_tensor`` by a copy.
        return self._fragment.like(self._local_tensor)

    def to_local(self, *, grad_placements: Sequence[Placement] | None = None) -> Tensor:
        """This rank's fragment ``(fragment_numel,)``; shares memory, no communication."""
        local = self._local_tensor.detach().as_subclass(FragmentTensor)
        local.fragment = self.fragment
        return local

    def like(self, local: Tensor) -> ReplicaShardDTensor:
        """The same fragment of another tensor with this shape and placement: ``local`` ``(fragment_numel,)``."""
        return self._with_fragment(self._fragment.like(local))

    def _with_fragment(self, fragment: ShardTensor) -> ReplicaShardDTensor:
        return ReplicaShardDTensor(fragment, self._spec, self._sharding)

    def unshard(self) -> DTensor:
        """Gather the local tensor; returns a plain DTensor with the same placements. Collective on the replica group.

        RuntimeError if this tensor was unpickled.
        """
        if self._sharding is None:
            raise RuntimeError(
                "dist_asgd: this is one replica's part of a DTensor and was pickled, so its ranks are not known any "
                "more. Pass the state dict to load_state_dict(), and take consolidated_state_dict() for the whole."
            )
        shape, strides, _, _ = self._fragment.extent
        return dtensor_like(self, self._sharding.gather(self._local_tensor).as_strided(shape, strides))

    def redistribute(
        self,
        device_mesh: DeviceMesh | None = None,
        placements: Sequence[Placement] | None = None,
        **options: Any,
    ) -> DTensor:
        """Gather the local tensor and redistribute it as DTensor does. Collective on the mesh."""
        return self.unshard().redistribute(device_mesh, placements, **options)

    # --- for torch.distributed.checkpoint ------------------------------------------------------------------

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        return self.fragment.__create_write_items__(fqn, object)

    def __create_chunk_list__(self) -> list[Any]:
        return self.fragment.__create_chunk_list__()

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return self.fragment.__get_tensor_shard__(index)

    # --- as a tensor ---------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Refuse to change the dtype, even to the present one; a move to another device is allowed.

        Loaders of whole tensors, ``torch.optim``'s among them, begin by changing dtypes. An error is better there than
        a fragment that is taken for the whole tensor later.
        """
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
        """Let ``func`` act on the fragments, as ``ShardTensor`` allows: copies do, arithmetic raises a RuntimeError."""
        fragments = [arg.fragment if isinstance(arg, ReplicaShardDTensor) else arg for arg in args]
        result = func(*fragments, **(kwargs or {}))
        first = args[0]
        if not isinstance(first, ReplicaShardDTensor) or not isinstance(result, ShardTensor):
            return result
        # An in-place operator returns its argument.
        return first if result is fragments[0] else first._with_fragment(result)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplicaShardDTensor:
        """Copy the fragment; the replica group is shared."""
        return self._with_fragment(copy.deepcopy(self.fragment, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the fragment and the spec, but not the replica group, which holds process groups."""
        return rebuild_portion, (self.fragment, self._spec)

    def __repr__(self) -> str:  # type: ignore[override]
        where = f"device_mesh={self.device_mesh}, placements={self.placements}"
        return f"ReplicaShardDTensor(fragment={self.fragment}, {where})"


class FragmentTensor(torch.Tensor):
    """This rank's fragment, ``(fragment_numel,)``, whose ``copy_()`` also accepts the whole local tensor.

    ``torch.distributed.checkpoint.state_dict`` loads full state dicts by copying whole local tensors to
    ``to_local()``: the fragment is taken out of them here.
    """

    fragment: ShardTensor

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Take the fragment out of a whole tensor in ``copy_``. All results are plain tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.copy_ and isinstance(args[0], cls) and args[1].shape == args[0].fragment.shape:
                args[0].fragment.copy_(args[1])
                return args[0]
            return func(*args, **(kwargs or {}))


def fragment_of_dtensor(
    param: DTensor, fragment: Tensor, start: int, local: Tensor, strides: Sequence[int], sharding: ReplicaSharding
) -> ReplicaShardDTensor:
    """Sharded state of ``param`` as a DTensor with its placement; shares memory with ``fragment``.

    ``fragment`` ``(fragment_numel,)`` has the elements from ``start`` on of a tensor with the shape of ``local``, the
    parameter's local tensor, in the memory order of ``strides``.
    """
    within = tuple(param.shape), global_offset_of(param)
    return ReplicaShardDTensor(ShardTensor(fragment, local.shape, strides, start, within), param._spec, sharding)


def replicated_fragment(mesh: DeviceMesh, fragment: ShardTensor, sharding: ReplicaSharding) -> ReplicaShardDTensor:
    """``fragment`` of a plain tensor, as the fragment of a DTensor that is replicated on ``mesh``; shares memory.

    Each rank of ``mesh`` has one fragment. State dicts show parameters in buckets in this form beside DTensors.
    """
    meta = TensorMeta(fragment.shape, fragment.stride(), fragment.dtype)
    return ReplicaShardDTensor(fragment, DTensorSpec(mesh, (Replicate(),), tensor_meta=meta), sharding)


def written_fragment(tensor: DTensor) -> ShardTensor | None:
    """The fragment of ``tensor`` that this rank writes to files and sends; shares memory if it is dense in memory.

    None outside of the mesh, and if a rank with a lower coordinate holds the same elements.
    """
    if isinstance(tensor, ReplicaShardDTensor):
        return tensor.fragment
    if not is_first_copy(tensor):
        return None
    local = local_tensor(tensor)
    strides = memory_strides(local)
    return ShardTensor(
        in_memory_order(local, strides), local.shape, strides, 0, (tuple(tensor.shape), global_offset_of(tensor))
    )


def rebuild_portion(part: ShardTensor, spec: DTensorSpec) -> ReplicaShardDTensor:
    """Make a ``ReplicaShardDTensor`` from its pickled state; called by ``torch.load``."""
    return ReplicaShardDTensor(part, spec, None)


# Users' files name the function by this path since version 0.1, so it never changes.
rebuild_portion.__module__ = "dist_asgd.portions"
# torch.load(weights_only=True), the default, calls only functions that are listed here.
torch.serialization.add_safe_globals([rebuild_portion])
