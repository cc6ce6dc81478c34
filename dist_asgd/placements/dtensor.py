"""All that this package knows of DTensors, which FSDP2 (``fully_shard``) and ``parallelize_module`` make of parameters.

Every other module asks here, so that the torch internals of DTensors are read in this file and in ``shard_dtensor.py``
only. Nothing here communicates unless its docstring says so.

local tensor   the plain tensor that a rank holds of a DTensor: its shard, or a copy if the DTensor is replicated
copy           a rank holds a copy if another rank of the mesh has the same local tensor
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is a DTensor."""
    # Importing DTensors takes a second: only a subclass of Tensor is worth it.
    if type(tensor) in (Tensor, torch.nn.Parameter) or not isinstance(tensor, Tensor):
        return False
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_tensor(tensor: DTensor) -> Tensor:
    """The local tensor itself, once it has arrived; ``to_local()`` of a parameter would make a new tensor."""
    local = tensor._local_tensor
    if type(local) is not Tensor and hasattr(local, "wait"):
        # A redistribution returns before its collective has ended.
        local = local.wait()
    return local


def plain_tensor(tensor: Tensor) -> Tensor:
    """The local tensor if ``tensor`` is a DTensor, else ``tensor`` itself."""
    return local_tensor(tensor) if is_dtensor(tensor) else tensor


def same_placement(tensor: DTensor, other: DTensor) -> bool:
    """Whether both lie on one mesh with the same placements, so that their local tensors hold the same elements."""
    return tensor.device_mesh == other.device_mesh and tensor.placements == other.placements


def has_spec_of(tensor: DTensor, param: DTensor) -> bool:
    """Whether both have one spec: mesh, placements and shape. Called for every DTensor in every step."""
    spec, own = tensor._spec, param._spec
    # FSDP2 gives a gradient the very spec of its parameter.
    return spec is own or (spec.placements == own.placements and spec.mesh == own.mesh and spec.shape == own.shape)


def dtensor_like(param: DTensor, local: Tensor) -> DTensor:
    """``local`` as the local tensor of a DTensor with the shape, mesh and placements of ``param``; shares memory."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    # from_local() would copy to the mesh's device, but offloaded parameters and staged copies are on the host.
    meta = TensorMeta(param.shape, param.stride(), local.dtype)
    spec = DTensorSpec(param.device_mesh, param.placements, tensor_meta=meta)
    return DTensor(local.detach(), spec, requires_grad=False)  # type: ignore[no-untyped-call]


def local_like(whole: Tensor, param: DTensor) -> Tensor:
    """The local tensor that this rank would have of ``whole``, a plain tensor, if it were placed as ``param`` is.

    All ranks pass the same ``whole``.
    """
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank=None: each rank cuts its local tensor out of its own ``whole``, nothing is sent.
    placed = distribute_tensor(whole.detach(), param.device_mesh, param.placements, src_data_rank=None)
    return local_tensor(placed)


def describe_placement(param: DTensor) -> str:
    """The placements and the mesh as a text that is the same on all ranks, for fingerprints and errors."""
    mesh = param.device_mesh
    return (
        f"{', '.join(map(repr, param.placements))} on a mesh of shape {tuple(mesh.shape)} {mesh.mesh_dim_names or ''}"
    )


def chunk_of(size: int, count: int, rank: int) -> tuple[int, int]:
    """The first index and the length of the chunk of ``rank`` in a dimension that ``Shard`` cuts into ``count``."""
    # torch cuts a dimension into equal chunks, rounded up: the last ones may be shorter or empty.
    chunk = -(-size // count)
    first = min(rank * chunk, size)
    return first, min(chunk, size - first)


def row_major_start(param: DTensor) -> int | None:
    """The index of the first local element in the whole tensor, flattened in row-major order; 0 outside of the mesh.

    None if the local tensor is not one contiguous range of the flattened tensor.
    """
    from torch.distributed.tensor import Replicate, Shard

    sizes, start = list(param.shape), 0
    coordinates = param.device_mesh.get_coordinate()
    if coordinates is None:
        return 0
    for rank, count, placement in zip(coordinates, param.device_mesh.shape, param.placements, strict=True):
        if type(placement) is Shard:
            dim = placement.dim
            # Cut along an inner dimension, the local tensor is one range for each index of the outer ones.
            if math.prod(sizes[:dim]) > 1:
                return None
            first, length = chunk_of(sizes[dim], count, rank)
            start += first * math.prod(sizes[dim + 1 :])
            sizes[dim] = length
        elif not isinstance(placement, Replicate):
            return None
    local = local_tensor(param)
    # A local tensor that somebody made by from_local() may have any shape and strides.
    whole_strides = torch.empty(param.shape, device="meta").stride()
    if tuple(local.shape) != tuple(sizes) or not local.is_contiguous() or param.stride() != whole_strides:
        return None
    return start


def is_first_copy(tensor: DTensor) -> bool:
    """Whether this rank is the first of those that hold the same local tensor; False outside of the mesh."""
    coordinates = tensor.device_mesh.get_coordinate()
    if coordinates is None:
        return False
    return not any(c for c, placement in zip(coordinates, tensor.placements, strict=True) if placement.is_replicate())


def replica_ranks(param: DTensor) -> tuple[int, ...]:
    """The ranks of the default group that hold the same local tensor as this one, which is among them, in order.

    None outside of the mesh.
    """
    mesh = param.device_mesh
    coordinates = mesh.get_coordinate()
    if coordinates is None:
        return ()
    copies = tuple(
        slice(None) if placement.is_replicate() else coordinate
        for coordinate, placement in zip(coordinates, param.placements, strict=True)
    )
    return tuple(sorted(mesh.mesh[copies].flatten().tolist()))


def mesh_number(param: DTensor) -> int:
    """A positive number of the mesh of ``param``. Meshes without a common rank have different numbers."""
    # Ranks do not know each other's meshes, but each knows the lowest rank of its own.
    return 1 + int(param.device_mesh.mesh.min())


def global_offset_of(param: DTensor) -> tuple[int, ...]:
    """The offset of the local tensor in the whole tensor along each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return tuple(offsets)


def placement_problem(name: str, param: DTensor, ranks: Sequence[int], rounds_stochastically: bool) -> str | None:
    """The reason why ``param`` cannot be updated where it is, with a remedy; None if it can.

    Called by the checks of the constructor and of ``add_param_group``. ``ranks`` are those of the process group.
    """
    strange = [placement for placement in param.placements if not (placement.is_replicate() or _shards(placement))]
    if strange:
        return (
            f"parameter {name} is a DTensor placed as {strange[0]!r}: its elements are not there before a reduction. "
            f"redistribute() it to Shard or Replicate before constructing the optimizer."
        )
    outside = sorted(set(param.device_mesh.mesh.flatten().tolist()) - set(ranks))
    if outside:
        return (
            f"parameter {name} is a DTensor on a mesh with ranks {outside}, which are not in the process group. Pass a "
            f"process_group with all ranks of its mesh."
        )
    if rounds_stochastically and param.dtype == torch.bfloat16 and row_major_start(param) is None:
        return (
            f"stochastic_rounding of parameter {name}, a DTensor placed as {list(param.placements)}: random numbers go "
            f"by an element's place in the whole parameter, and this rank's part is not one stretch of it. Pass "
            f"master_weights=True instead, or shard it along dimension 0 only."
        )
    return None


def _shards(placement: object) -> bool:
    # _StridedShard is a subclass of Shard in some releases of torch only, and is_shard() is False for it in others.
    return type(placement).__name__ in ("Shard", "_StridedShard")


def gradient_problem(name: str, param: Tensor, gradient: Tensor) -> str | None:
    """The reason why ``gradient`` cannot be used for ``param``, with a remedy; None if it can.

    Either or both may be DTensors. A gradient with other placements on the parameter's mesh can be used, after
    ``redistribute_gradient``: sequence parallelism makes such gradients for replicated parameters.
    """
    if is_dtensor(param) and is_dtensor(gradient):
        if param.device_mesh == gradient.device_mesh:
            return None
        return (
            f"the gradient of parameter {name} lies on {gradient.device_mesh}, the parameter on {param.device_mesh}. "
            f"Place a gradient as its parameter: distribute_tensor(gradient, p.device_mesh, p.placements)."
        )
    if is_dtensor(param) or is_dtensor(gradient):
        kinds = ("a DTensor", "a plain tensor")
        mine, other = kinds if is_dtensor(gradient) else kinds[::-1]
        return (
            f"the gradient of parameter {name} is {mine}, the parameter is {other}. Place a gradient as its parameter: "
            f"distribute_tensor(gradient, p.device_mesh, p.placements) for a DTensor, .full_tensor() for a plain one."
        )
    return None


def redistribute_gradient(param: DTensor) -> None:
    """Give ``p.grad`` the placements of its parameter. Collective on the mesh."""
    gradient = cast("DTensor", param.grad)
    param.grad = gradient.redistribute(param.device_mesh, param.placements)


def reshard(model: torch.nn.Module) -> None:
    """Make the parameters of ``model`` the DTensors again that FSDP2 made of them.

    After a forward without a backward, as in an evaluation, a module may still have its gathered parameters, which
    nobody else knows. The next forward or backward gathers them again.
    """
    # Whoever has FSDP2 modules has loaded it; others need not.
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reshard_modules() -> None:
    """Make every FSDP2 module of this process gather its parameters again before it uses them.

    Called after parameters were written outside of a step, and before a state dict, for those who match its parameters
    with the model's. A module that keeps its gathered parameters after forward,
    as the root does by default, would otherwise go on with the values from before.
    """
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    # The mapping is weak: a copy of its keys cannot change while modules reshard.
    for module in list(_module_state_mapping):
        if isinstance(module, FSDPModule):
            module.reshard()
