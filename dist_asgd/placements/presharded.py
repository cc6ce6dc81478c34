"""Parameters that are sharded already and stay where they are: DTensors, and what FSDP1 leaves of a parameter.

Only their state is kept here, for local tensors of one group, dtype and device together. Gradients arrive reduced, and
whoever sharded a parameter gathers it. Where several ranks hold the same local tensors (HSDP, replicated parameters of
tensor parallelism) these replicas share the work: each has the state of a shard, updates that, and gets the others'.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..comm import Communicators
from ..comm.agreement import describe_ranks
from ..storage.buffers import Precision, ShardedParam, StateBuffer
from ..storage.layout import MIN_BUCKETS, Slot, bucket_cap_bytes, fill_buckets, lay_out
from ..storage.memory_order import flattened, memory_strides, same_strides
from ..storage.snapshots import TensorSnapshot
from . import dtensor, fsdp1
from .replicas import ReplicaGroup, ReplicaSharding

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

NamedParam = tuple[int, str, Tensor]


def is_presharded(param: Tensor) -> bool:
    """Whether ``param`` is sharded already, and stays where it is."""
    return dtensor.is_dtensor(param) or fsdp1.is_part(param)


def _local_tensor_of(param: Tensor) -> Tensor:
    """The local tensor of a presharded parameter of either kind; only while it has no ``PreshardedParam`` yet."""
    return dtensor.local_tensor(param) if dtensor.is_dtensor(param) else param


@dataclass(frozen=True, slots=True)
class GradientReport:
    """The gradients of one ``PreshardedState`` on this rank, as one look at each has shown them.

    present    a bit for each parameter that has a gradient
    misplaced  a bit for each parameter that needs ``align_gradient``
    doubtful   (parameter, its gradient) pairs that the look did not find right: the caller has to check them
    """

    present: int
    misplaced: int
    doubtful: tuple[tuple[PreshardedParam, Tensor], ...]


class PreshardedParam(ShardedParam):
    """A parameter that is sharded already, of whose local tensor this rank updates all, or with replicas its piece."""

    __slots__ = ("_flat", "_pointer", "_shape")

    bucket: PreshardedState

    def __init__(self, param: Tensor, name: str, index: int, bucket: PreshardedState, slot: Slot) -> None:
        local = _local_tensor_of(param)
        fragment = bucket.layout.fragment(slot, 0 if bucket.replicas is None else bucket.replicas.rank)
        super().__init__(param, name, index, slot, fragment, memory_strides(local))
        self.bucket = bucket
        self._shape = local.shape
        self._take(local)

    def _take(self, local: Tensor) -> None:
        self._pointer = local.data_ptr()
        self._flat = flattened(local, self.strides)

    @property
    @abstractmethod
    def local(self) -> Tensor:
        """The local tensor as it is now: the object itself, so that it can be compared by identity."""

    @property
    def flat(self) -> Tensor:
        """The local tensor as it was when last followed, 1-D and real: ``(slot_numel,)``; a view."""
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
        if local.data_ptr() == self._pointer:
            return False
        self._take(local)
        return True

    def param_range(self, start: int, stop: int) -> Tensor:
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
    def align_gradient(self, have: Sequence[int], misplaced: Sequence[int], num_ranks: int) -> None:
        """Make ``p.grad`` usable by this parameter's update, or raise the same RuntimeError on every rank.

        Called on all ranks between the agreement and the update, if any rank's report is not plain. Collective on the
        parameter's mesh if the gradient is ``misplaced`` on all ``num_ranks`` ranks. ``have``: the ranks that have a
        gradient; ``misplaced``: the ranks on which ``is_misplaced``.
        """


class DTensorParam(PreshardedParam):
    """A DTensor."""

    __slots__ = ("counted", "first")

    param: DTensor

    def __init__(self, param: DTensor, name: str, index: int, bucket: PreshardedState, slot: Slot) -> None:
        super().__init__(param, name, index, bucket, slot)
        self.first = (dtensor.row_major_start(param) or 0) + self.fragment.param_start
        leads = bucket.replicas is not None or dtensor.is_first_copy(param)
        self.counted = dtensor.mesh_number(param) if leads and self.fragment.numel else 0

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

    def align_gradient(self, have: Sequence[int], misplaced: Sequence[int], num_ranks: int) -> None:
        if 0 < len(have) < num_ranks:
            raise RuntimeError(
                f"dist_asgd: parameter {self.name} has a gradient on {describe_ranks(have)} of {num_ranks} only. "
                f"Gradients of DTensors arrive reduced, on all ranks or on none: run the same modules on every rank."
            )
        if 0 < len(misplaced) < num_ranks:
            raise RuntimeError(
                f"dist_asgd: the gradient of parameter {self.name} is placed as the parameter is, but not on "
                f"{describe_ranks(misplaced)} of {num_ranks}. A DTensor has the same placements on all ranks."
            )
        if misplaced:
            dtensor.redistribute_gradient(self.param)

    @property
    def rng_offset(self) -> int:
        return self.first

    def fragment_of(self, whole: Tensor) -> Tensor:
        flat = flattened(dtensor.local_like(whole, self.param), self.strides)
        return flat[self.fragment.param_start : self.fragment.param_start + self.fragment.numel]

    def state_entry(self, slice_: Tensor) -> DTensor:
        # The same memory with storage of its own: a DTensor takes on the offset of its local tensor, by which
        # copy.deepcopy takes it for a tensor that has storage (torch/_tensor.py, __deepcopy__).
        local = torch.utils.dlpack.from_dlpack(slice_) if slice_.numel() else slice_.new_empty(0)
        replicas = self.bucket.replicas
        if replicas is None or not self.param.numel():
            return dtensor.dtensor_like(self.param, local.as_strided(self._shape, self.strides))
        from .shard_dtensor import fragment_of_dtensor

        start = self.fragment.param_start // (2 if self.dtype.is_complex else 1)
        share = ReplicaSharding(replicas, self.bucket.layout, self.slot)
        return fragment_of_dtensor(self.param, local, start, self.local, self.strides, share)

    @property
    def norm_owner(self) -> int:
        return self.counted


class FSDP1Param(PreshardedParam):
    """What FSDP1 leaves of a parameter on this rank between steps, 1-D; on many ranks nothing."""

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

    def align_gradient(self, have: Sequence[int], misplaced: Sequence[int], num_ranks: int) -> None:
        if have and misplaced:
            raise RuntimeError(
                f"dist_asgd: parameter {self.name} has a gradient on {describe_ranks(have)} of {num_ranks}, and none "
                f"on {describe_ranks(misplaced)}, which hold parts of it too. FSDP1 reduces gradients on all ranks: "
                f"run the same modules on every rank."
            )

    @property
    def rng_offset(self) -> int:
        return 0

    def fragment_of(self, whole: Tensor) -> Tensor:
        return flattened(whole, self.strides)

    def state_entry(self, slice_: Tensor) -> Tensor:
        return slice_.as_strided(self._shape, self.strides)

    @property
    def norm_owner(self) -> int:
        # Ranks do not know which others hold the same, nor does anything but a norm ask.
        raise fsdp1.refusal("clip_grad_norm_()", "Call clip_grad_norm_() of that module")


class PreshardedState(StateBuffer):
    """The state of such parameters of one group, dtype and device, in one flat buffer of each kind.

    ``replicas`` share it: each has a shard of it, and all get each other's parameters after an update. None: the
    others, if there are any, have the same state, and nothing is sent.
    """

    def __init__(
        self, params: Sequence[NamedParam], group_index: int, precision: Precision, replicas: ReplicaGroup | None
    ) -> None:
        self.replicas = replicas
        like = _local_tensor_of(params[0][2])
        numels, itemsize = [_numel(param) for _, _, param in params], like.dtype.to_real().itemsize
        layout = lay_out(numels, itemsize, 1 if replicas is None else len(replicas.ranks))
        super().__init__(layout, like, group_index, precision)
        self.members: list[PreshardedParam] = [
            DTensorParam(param, name, index, self, slot)
            if dtensor.is_dtensor(param)
            else FSDP1Param(param, name, index, self, slot)
            for (index, name, param), slot in zip(params, self.layout.slots, strict=True)
        ]
        self._follow_all([member.local for member in self.members])
        self.reset_masters()

    def follow(self) -> bool:
        """Look at every local tensor once, and take up those that were put elsewhere since the last call.

        Returns whether there were any: what was planned with their addresses is void then. Called at the beginning of
        each step. RuntimeError if a local tensor has another shape, dtype, device or strides than it had at
        construction; then none is taken up.
        """
        locals_ = [member.local for member in self.members]
        if self._is_current(locals_):
            return False
        # All are checked before any is followed: whoever catches the error still has the plan that fits.
        for member in self.members:
            member.check_unmoved()
        return self._follow_all(locals_)

    def _is_current(self, locals_: list[Tensor]) -> bool:
        """Whether ``locals_`` are the tensors that were last taken up, where and what they were then."""
        return all(map(is_, locals_, self._locals)) and self._snapshot.is_current()

    def _follow_all(self, locals_: list[Tensor]) -> bool:
        moved = [member.follow(local) for member, local in zip(self.members, locals_, strict=True)]
        self._locals, self._snapshot = locals_, TensorSnapshot.of(locals_)
        return any(moved)

    def inspect_gradients(self, was_followed: bool) -> GradientReport:
        """Look once at every ``p.grad``; no communication. Called before the agreement of a call that reads gradients.

        ``was_followed``: ``follow`` was called just before, so that local tensors need no second look. Otherwise the
        gradients of all parameters are doubtful if any local tensor is not as it was when last taken up.
        """
        is_known = was_followed or self._is_current([member.local for member in self.members])
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


def _numel(param: Tensor) -> int:
    """Real elements of the local tensor."""
    return _local_tensor_of(param).numel() * (2 if param.is_complex() else 1)


def build_presharded(
    params: Sequence[NamedParam],
    group_index: int,
    precision: Precision,
    bucket_cap_mb: float,
    communicators: Communicators | None,
) -> list[PreshardedState]:
    """The stores of one group's presharded, (index, name, parameter) each.

    With ``communicators`` replicas share what they hold, in stores of limited size, so that one is sent while the next
    is updated; without, each has all of it.
    """
    classes: dict[tuple[torch.dtype, torch.device, tuple[int, ...]], list[NamedParam]] = {}
    for entry in params:
        param = entry[2]
        local = _local_tensor_of(param)
        shared = communicators is not None and dtensor.is_dtensor(param)
        ranks = dtensor.replica_ranks(cast("DTensor", param)) if shared else ()
        classes.setdefault((local.dtype, local.device, ranks if len(ranks) > 1 else ()), []).append(entry)
    stores: list[PreshardedState] = []
    for (dtype, device, ranks), alike in classes.items():
        if communicators is None or not ranks:
            stores.append(PreshardedState(alike, group_index, precision, None))
            continue
        replicas = ReplicaGroup(ranks, ranks.index(communicators.ranks[communicators.rank]), communicators)
        # All of them make their group now, in one order: a step must not find out that there can be none.
        replicas.on(device)
        itemsize = dtype.to_real().itemsize
        numels = [_numel(param) for _, _, param in alike]
        cap_bytes = bucket_cap_bytes(bucket_cap_mb, sum(numels) * itemsize, MIN_BUCKETS[2])
        for chosen in fill_buckets(numels, itemsize, cap_bytes):
            stores.append(PreshardedState([alike[i] for i in chosen], group_index, precision, replicas))
    return stores
