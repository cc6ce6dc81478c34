"""What is known here of DTensors: parameters that FSDP2 (``fully_shard``) or ``parallelize_module`` have sharded.

local   the plain tensor that a rank holds of a DTensor: its shard, or a copy where the DTensor is replicated
same_placement   two DTensors on one mesh with the same placements: their local tensors lie on each other
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is a DTensor. Imports DTensors only where there is a subclass of some kind."""
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


def same_placement(tensor: DTensor, other: DTensor) -> bool:
    """Whether both lie on one mesh with the same placements."""
    return tensor.device_mesh == other.device_mesh and tensor.placements == other.placements


def has_spec_of(tensor: DTensor, param: DTensor) -> bool:
    """Whether both have one spec: mesh, placements and shape. Called for every DTensor in every step."""
    spec, own = tensor._spec, param._spec
    # FSDP2 gives a gradient the very spec of its parameter.
    return spec is own or (spec.placements == own.placements and spec.mesh == own.mesh and spec.shape == own.shape)


def dtensor_like(param: DTensor, local: Tensor) -> DTensor:
    """``local`` as a DTensor of the shape, mesh and placements of ``param``; shares memory, no communication."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    # Not from_local(), which copies to the mesh's device: offloaded parameters, and staged ones, are on the host.
    meta = TensorMeta(param.shape, param.stride(), local.dtype)
    spec = DTensorSpec(param.device_mesh, param.placements, tensor_meta=meta)
    return DTensor(local.detach(), spec, requires_grad=False)  # type: ignore[no-untyped-call]


def local_like(whole: Tensor, param: DTensor) -> Tensor:
    """What this rank would hold of a plain tensor placed like ``param``; no communication."""
    from torch.distributed.tensor import distribute_tensor

    # ReplicaGroup keep what they are given, so all ranks must pass the same.
    placed = distribute_tensor(whole.detach(), param.device_mesh, param.placements, src_data_rank=None)
    return local_tensor(placed)


def describe_placement(param: DTensor) -> str:
    """Placements and mesh, as they are the same on all ranks."""
    mesh = param.device_mesh
    return (
        f"{', '.join(map(repr, param.placements))} on a mesh of shape {tuple(mesh.shape)} {mesh.mesh_dim_names or ''}"
    )


def row_major_start(param: DTensor) -> int | None:
    """Where the local tensor begins in the whole one, which is contiguous; None unless it is one stretch of it."""
    from torch.distributed.tensor import Replicate, Shard

    sizes, start = list(param.shape), 0
    coordinates = param.device_mesh.get_coordinate()
    if coordinates is None:
        return 0
    for rank, count, placement in zip(coordinates, param.device_mesh.shape, param.placements, strict=True):
        if type(placement) is Shard:
            dim = placement.dim
            if math.prod(sizes[:dim]) > 1:
                return None
            chunk = -(-sizes[dim] // count)
            first = min(rank * chunk, sizes[dim])
            start += first * math.prod(sizes[dim + 1 :])
            sizes[dim] = min(chunk, sizes[dim] - first)
        elif not isinstance(placement, Replicate):
            return None
    local = local_tensor(param)
    whole_strides = torch.empty(param.shape, device="meta").stride()
    if tuple(local.shape) != tuple(sizes) or not local.is_contiguous() or param.stride() != whole_strides:
        return None
    return start


def is_first_copy(tensor: DTensor) -> bool:
    """True on one of the ranks of the mesh that hold the same elements; False on ranks outside of it."""
    coordinates = tensor.device_mesh.get_coordinate()
    if coordinates is None:
        return False
    return not any(c for c, placement in zip(coordinates, tensor.placements, strict=True) if placement.is_replicate())


def replica_ranks(param: DTensor) -> tuple[int, ...]:
    """The ranks that hold the same local tensor as this one, itself among them, in order; none outside of the mesh."""
    mesh = param.device_mesh
    coordinates = mesh.get_coordinate()
    if coordinates is None:
        return ()
    same_placement = tuple(
        slice(None) if placement.is_replicate() else coordinate
        for coordinate, placement in zip(coordinates, param.placements, strict=True)
    )
    return tuple(sorted(mesh.mesh[same_placement].flatten().tolist()))


def mesh_number(param: DTensor) -> int:
    """A number above 0 that tells meshes apart unless they have ranks in common."""
    return 1 + int(param.device_mesh.mesh.min())


def global_offset_of(param: DTensor) -> tuple[int, ...]:
    """Where the local tensor lies in the whole one: the offset along every dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return tuple(offsets)


def placement_problem(name: str, param: DTensor, ranks: Sequence[int], rounds_stochastically: bool) -> str | None:
    """Why ``param`` cannot be updated where it is, with the remedy; None if it can. ``ranks``: of the process group."""
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
    # _StridedShard is no Shard in some releases, and no sharding in others.
    return type(placement).__name__ in ("Shard", "_StridedShard")


def gradient_problem(name: str, param: Tensor, gradient: Tensor) -> str | None:
    """Why ``gradient`` is not one of ``param``, either or both of which may be DTensors; None if it is.

    It may be placed otherwise on the mesh, as sequence parallelism leaves those of replicated parameters.
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
    """Collective on the mesh: place ``p.grad`` as its parameter; torch's operators do so one by one."""
    gradient = cast("DTensor", param.grad)
    param.grad = gradient.redistribute(param.device_mesh, param.placements)


def reshard_modules() -> None:
    """Make every FSDP2 module of this process gather its parameters anew before it uses them.

    A module that keeps its parameters after forward (the root does by default) would go on with the gathered ones.
    """
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    for module in list(_module_state_mapping):
        if isinstance(module, FSDPModule):
            module.reshard()
