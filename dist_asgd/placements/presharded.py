"""Presharded parameters: DTensors and FSDP1 parameters, which were sharded before and are updated where they are.

A ``PreshardedState`` is the state buffer of presharded parameters of one group, dtype and device: their local tensors
stay with whoever sharded them, who also reduces their gradients and gathers them for the forward. Ranks that hold the
same local tensors (HSDP, replicated parameters of tensor parallelism) form a replica group and share the work: each has
the state of its shard, updates that, and receives the others' shards after the update. Plain parameters of
``ShardedAverage``, which are another optimizer's, stay where they are too: all ranks are one replica group of theirs.

Each step looks at them twice, in one pass each: ``PreshardedState.follow`` at every local tensor, before anything else,
and ``PreshardedState.inspect_gradients`` at every gradient, before the ranks agree.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..comm.rank_names import RankNames
from ..storage.buffers import ShardedParam, StateBuffer
from ..storage.layout import Slot, lay_out
from ..storage.memory_order import flattened, memory_strides, same_strides
from ..storage.precision import Precision
from ..storage.published import as_strided, own_storage
from ..storage.snapshots import TensorSnapshot
from . import dtensor, fsdp1
from .replicas import ReplicaGroup, ReplicaSharding

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

NamedParam = tuple[int, str, Tensor]
_LOCAL_OF = attrgetter("local")


def is_presharded(param: Tensor) -> bool:
    """Whether ``param`` was sharded by FSDP1, FSDP2 or tensor parallelism, and is updated where it is."""
    return dtensor.is_dtensor(param) or fsdp1.is_managed(param)


def local_tensor_of(param: Tensor) -> Tensor:
    """The local tensor of a presharded parameter of either kind; only while it has no ``PreshardedParam`` yet."""
    return dtensor.local_tensor(param) if dtensor.is_dtensor(param) else param


@dataclass(frozen=True, slots=True)
class GradientReport:
    """The result of ``PreshardedState.inspect_gradients``: the gradients of one state buffer on this rank.

    present    a bit mask: the parameters that have a gradient, bit ``index`` for each
    misplaced  a bit mask: the parameters that need ``align_gradient``
    doubtful   (parameter, its gradient) pairs that did not ``fit``: the caller checks them, and makes the errors
    """

    present: int
    misplaced: int
    doubtful: tuple[tuple[PreshardedParam, Tensor], ...]


class PreshardedParam(ShardedParam):
    """A parameter that stays where it is. This rank updates its whole local tensor, or in a replica group a fragment.

    Memory order and ``slot`` are those of the local tensor.
    """

    __slots__ = ("_address", "_flat", "_shape")

    def __init__(self, param: Tensor, name: str, index: int, bucket: PreshardedState, slot: Slot) -> None:
        local = local_tensor_of(param)
        fragment = bucket.layout.fragment(slot, 0 if bucket.replicas is None else bucket.replicas.rank)
        super().__init__(param, name, index, bucket, slot, fragment, memory_strides(local))
        self._shape = local.shape
        self._point_at(local)

    @property
    def bucket(self) -> PreshardedState:
        return cast(PreshardedState, self._bucket())

    def _point_at(self, local: Tensor) -> None:
        self._address = local.data_ptr()
        self._flat = flattened(local, self.strides)

    @property
    @abstractmethod
    def local(self) -> Tensor:
        """The local tensor as it is now: the object itself, so that it can be compared by identity."""

    @property
    def flat(self) -> Tensor:
        """The local tensor that was last followed, as 1-D reals in memory order: ``(slot_numel,)``, a view."""
        return self._flat

    @property
    def is_unmoved(self) -> bool:
        local = self.local
        return (
            local.shape == self._shape
            and local.dtype == self.bucket.param_dtype
            and local.device == self.bucket.device
            and same_strides(local, self.strides)
        )

    def follow(self, local: Tensor) -> bool:
        """Take ``local``, the present local tensor, as this parameter's memory; returns whether its address changed.

        FSDP2 replaces the local tensor by a copy when it pads or pins it.
        """
        if local.data_ptr() == self._address:
            return False
        self._point_at(local)
        return True

    def param_range(self, start: int, stop: int) -> Tensor:
        # Positions in the state buffer's shard become positions in the local tensor.
        shift = self.fragment.param_start - self.fragment.start
        return self._flat[start + shift : stop + shift]

    @abstractmethod
    def fits(self, gradient: Tensor) -> bool:
        """Whether ``gradient``, which ``p.grad`` is, can be used as it is.

        It has the parameter's type, shape, dtype, device and placement then. False asks for a closer look.
        """

    @abstractmethod
    def is_misplaced(self, gradient: Tensor | None) -> bool:
        """Whether ``gradient``, which ``p.grad`` is, needs ``align_gradient``; False for one that ``fits``."""

    @abstractmethod
    def align_gradient(self, have: Sequence[int], misplaced: Sequence[int], names: RankNames) -> None:
        """Make ``p.grad`` usable by this parameter's update, or raise the same RuntimeError on every rank.

        Called on all ranks between the agreement and the update, if any rank's report is not plain. Collective on the
        parameter's mesh if the gradient is ``misplaced`` on all ranks. ``have``: the ranks that have a gradient;
        ``misplaced``: those on which it is misplaced; both are positions among the ranks that ``names`` names.
        """


class DTensorParam(PreshardedParam):
    """A parameter that is a DTensor, as FSDP2 and tensor parallelism make it."""

    __slots__ = ("_norm_owner", "_rng_offset")

    param: DTensor

    def __init__(self, param: DTensor, name: str, index: int, bucket: PreshardedState, slot: Slot) -> None:
        super().__init__(param, name, index, bucket, slot)
        # validation.py refuses stochastic rounding, which reads the offset, if the local tensor is no one range.
        self._rng_offset = (dtensor.row_major_start(param) or 0) + self.fragment.param_start
        # Fragments of a replica group are disjoint; of whole copies the first is counted.
        is_counted = bucket.replicas is not None or dtensor.is_first_copy(param)
        self._norm_owner = dtensor.mesh_number(param) if is_counted and self.fragment.numel else 0

    @property
    def local(self) -> Tensor:
        return dtensor.local_tensor(self.param)

    @property
    def gradient(self) -> Tensor | None:
        gradient = self.param.grad
        return None if gradient is None else dtensor.local_tensor(cast("DTensor", gradient))

    def fits(self, gradient: Tensor) -> bool:
        # Attributes are read from the local tensor: each costs a DTensor three times as much.
        if type(gradient) is not type(self.param) or not dtensor.has_spec_of(gradient, self.param):
            return False
        local, bucket = dtensor.local_tensor(gradient), self.bucket
        return local.dtype is bucket.param_dtype and local.layout is torch.strided and local.device == bucket.device

    def is_misplaced(self, gradient: Tensor | None) -> bool:
        # Sequence parallelism leaves partial sums as the gradients of replicated parameters.
        return dtensor.is_dtensor(gradient) and not dtensor.same_placement(self.param, gradient)

    def align_gradient(self, have: Sequence[int], misplaced: Sequence[int], names: RankNames) -> None:
        if 0 < len(have) < len(names):
            raise RuntimeError(
                f"dist_asgd: parameter {self.name} has a gradient on {names.describe(have)} of {names.total} only. "
                f"Gradients of DTensors arrive reduced, on all ranks or on none: run the same modules on every rank."
            )
        if 0 < len(misplaced) < len(names):
            raise RuntimeError(
                f"dist_asgd: the gradient of parameter {self.name} is placed as the parameter is, but not on "
                f"{names.describe(misplaced)} of {names.total}. A DTensor has the same placements on all ranks."
            )
        if misplaced:
            dtensor.redistribute_gradient(self.param)

    @property
    def rng_offset(self) -> int:
        return self._rng_offset

    def fragment_of(self, whole: Tensor) -> Tensor:
        flat = flattened(dtensor.local_like(whole, self.param), self.strides)
        return flat[self.fragment.param_start : self.fragment.param_start + self.fragment.numel]

    def state_entry(self, fragment: Tensor) -> DTensor:
        # The same memory in a storage of its own, which begins at offset 0. A DTensor reports the offset of its local
        # tensor, and copy.deepcopy copies a tensor with an offset through its storage, which a DTensor has not
        # (torch/_tensor.py, __deepcopy__).
        local = own_storage(fragment)
        replicas = self.bucket.replicas
        if replicas is None or not self.param.numel():
            return dtensor.dtensor_like(self.param, as_strided(local, self._shape, self.strides))
        from .shard_dtensor import fragment_of_dtensor

        sharding = ReplicaSharding(replicas, self.bucket.layout, self.slot)
        return fragment_of_dtensor(self.param, local, self.fragment_start, self.local, self.strides, sharding)

    @property
    def norm_owner(self) -> int:
        return self._norm_owner


class FSDP1Param(PreshardedParam):
    """A parameter that FSDP1 manages: between steps 1-D, of any length, and empty on many ranks."""

    __slots__ = ()

    def check_unmoved(self) -> None:
        if not self.is_unmoved:
            raise RuntimeError(
                f"dist_asgd: parameter {self.name} has shape {tuple(self.param.shape)}, dtype {self.param.dtype} and "
                f"lies on {self.param.device}; between steps FSDP1 had left {tuple(self._shape)} of it on this rank, "
                f"{self.dtype} on {self.bucket.device}. Step after a backward, outside of summon_full_params(), and "
                f"convert or move the module before constructing the optimizer."
            )

    @property
    def local(self) -> Tensor:
        return self.param

    @property
    def gradient(self) -> Tensor | None:
        return self.param.grad

    def fits(self, gradient: Tensor) -> bool:
        bucket = self.bucket
        return (
            type(gradient) is Tensor
            and gradient.shape == self._shape
            and gradient.dtype is bucket.param_dtype
            and gradient.layout is torch.strided
            and gradient.device == bucket.device
        )

    def is_misplaced(self, gradient: Tensor | None) -> bool:
        # A rank that holds no element of the parameter never has a gradient of it.
        return gradient is None and self.param.numel() > 0

    def align_gradient(self, have: Sequence[int], misplaced: Sequence[int], names: RankNames) -> None:
        if have and misplaced:
            raise RuntimeError(
                f"dist_asgd: parameter {self.name} has a gradient on {names.describe(have)} of {names.total}, and none "
                f"on {names.describe(misplaced)}, which hold parts of it too. FSDP1 reduces gradients on all ranks: "
                f"run the same modules on every rank."
            )

    @property
    def rng_offset(self) -> int:
        # Never used: validation.py refuses stochastic rounding of these parameters.
        return 0

    def fragment_of(self, whole: Tensor) -> Tensor:
        return flattened(whole, self.strides)

    def state_entry(self, fragment: Tensor) -> Tensor:
        return as_strided(own_storage(fragment), self._shape, self.strides)

    @property
    def norm_owner(self) -> int:
        # Only the module knows which ranks hold the same elements. Nothing but the global norm asks for the owner.
        raise fsdp1.refusal("clip_grad_norm_()", "Call clip_grad_norm_() of that module")


class PlainParam(PreshardedParam):
    """A plain parameter of another optimizer: whole on every rank, and averaged where it lies."""

    __slots__ = ()

    is_whole = True

    @property
    def local(self) -> Tensor:
        return self.param

    @property
    def gradient(self) -> Tensor | None:
        return self.param.grad

    def fits(self, gradient: Tensor) -> bool:
        # Nobody reads gradients of parameters that are only averaged.
        return True

    def is_misplaced(self, gradient: Tensor | None) -> bool:
        return False

    def align_gradient(self, have: Sequence[int], misplaced: Sequence[int], names: RankNames) -> None:
        raise AssertionError("gradients of parameters that are only averaged are never misplaced")

    @property
    def rng_offset(self) -> int:
        return self.fragment.param_start

    def fragment_of(self, whole: Tensor) -> Tensor:
        flat = flattened(whole, self.strides)
        return flat[self.fragment.param_start : self.fragment.param_start + self.fragment.numel]

    def state_entry(self, fragment: Tensor) -> Tensor:
        return own_storage(fragment)

    @property
    def norm_owner(self) -> int:
        return int(self.fragment.numel > 0)


class PreshardedState(StateBuffer):
    """The state buffer of presharded parameters of one group, dtype and device.

    ``replicas`` is the replica group that shares it: each rank has one shard, and the parameters are gathered inside
    the group after an update. None: this rank has the state of its whole local tensors, and nothing is sent; ranks with
    the same local tensors, if there are any, make the same update.
    """

    def __init__(
        self, params: Sequence[NamedParam], group_index: int, precision: Precision, replicas: ReplicaGroup | None
    ) -> None:
        self.replicas = replicas
        like = local_tensor_of(params[0][2])
        numels, itemsize = [num_reals(param) for _, _, param in params], like.dtype.to_real().itemsize
        layout = lay_out(numels, itemsize, 1 if replicas is None else len(replicas.ranks))
        super().__init__(layout, like, group_index, precision)
        self.members: list[PreshardedParam] = [
            _member(param, name, index, self, slot)
            for (index, name, param), slot in zip(params, self.layout.slots, strict=True)
        ]
        # The local tensor of a plain parameter is itself: no other object takes its place.
        self._has_same_objects = all(isinstance(member, PlainParam) for member in self.members)
        self._has_dtensors_only = all(isinstance(member, DTensorParam) for member in self.members)
        self._follow_all(self._read_locals())
        self.reset_masters()

    @property
    def params_can_stand(self) -> bool:
        # FSDP1 frees and moves its memory between steps.
        return super().params_can_stand and self._has_dtensors_only

    def follow(self) -> bool:
        """Look once at every local tensor, and follow those that lie elsewhere since the last call.

        Returns whether any does: a plan that has their addresses is void then. Called at the beginning of each step
        and of other calls that use the parameters; no communication. RuntimeError if a local tensor has another shape,
        dtype, device or strides than at construction; then none is followed.
        """
        if self._is_current():
            return False
        # All are checked before any is followed: after an error the caller's plan still has the addresses in use.
        for member in self.members:
            member.check_unmoved()
        return self._follow_all(self._read_locals())

    def _read_locals(self) -> list[Tensor]:
        return list(map(_LOCAL_OF, self.members))

    def _is_current(self) -> bool:
        """Whether local tensors are the objects that were last followed, with the same memory, shape and dtype."""
        same_objects = self._has_same_objects or all(map(is_, self._read_locals(), self._locals))
        return same_objects and self._snapshot.is_current()

    def _follow_all(self, locals_: list[Tensor]) -> bool:
        moved = [member.follow(local) for member, local in zip(self.members, locals_, strict=True)]
        self._locals, self._snapshot = locals_, TensorSnapshot.of(locals_)
        return any(moved)

    def inspect_gradients(self, was_followed: bool) -> GradientReport:
        """Look once at every ``p.grad``. Called before the agreement of a call that reads gradients; no communication.

        ``was_followed``: ``follow`` was called in the same call, so that local tensors need no second look. Otherwise
        all gradients are doubtful if any local tensor has changed since it was last followed.
        """
        is_known = was_followed or self._is_current()
        present, misplaced = 0, 0
        doubtful: list[tuple[PreshardedParam, Tensor]] = []
        for member in self.members:
            gradient = member.param.grad
            if gradient is not None:
                present |= 1 << member.index
                if is_known and member.fits(gradient):
                    continue
                doubtful.append((member, gradient))
            if member.is_misplaced(gradient):
                misplaced |= 1 << member.index
        return GradientReport(present, misplaced, tuple(doubtful))

    def on_params_written(self) -> None:
        dtensor.reshard_modules()


def _member(param: Tensor, name: str, index: int, buffer: PreshardedState, slot: Slot) -> PreshardedParam:
    if dtensor.is_dtensor(param):
        return DTensorParam(param, name, index, buffer, slot)
    kind = FSDP1Param if fsdp1.is_managed(param) else PlainParam
    return kind(param, name, index, buffer, slot)


def num_reals(param: Tensor) -> int:
    """The number of real elements of the local tensor of a presharded parameter."""
    return local_tensor_of(param).numel() * (2 if param.is_complex() else 1)
