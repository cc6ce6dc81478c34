"""Parameters that are sharded already and stay where they are: DTensors, and what FSDP1 leaves of a parameter.

Only their state is kept here, for local tensors of one group, dtype and device together. Gradients arrive reduced, and
whoever sharded a parameter gathers it. Where several ranks hold the same local tensors (HSDP, replicated parameters of
tensor parallelism) these replicas share the work: each has the state of a shard, updates that, and gets the others'.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..comm import Communicators
from ..comm.agreement import describe_ranks
from ..storage.buffers import Precision, ShardedParam, StateBuffer
from ..storage.layout import MIN_BUCKETS, Slot, bucket_cap_bytes, fill_buckets, lay_out
from ..storage.memory_order import flattened, memory_strides, same_strides
from . import dtensor, fsdp1
from .replicas import ReplicaGroup, ReplicaSharding

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

NamedParam = tuple[int, str, Tensor]


def is_presharded(param: Tensor) -> bool:
    """Whether ``param`` is sharded already, and stays where it is."""
    return dtensor.is_dtensor(param) or fsdp1.is_part(param)


def local_of(param: Tensor) -> Tensor:
    """What this rank holds of it."""
    return dtensor.local_of(param) if dtensor.is_dtensor(param) else param.detach()


class PreshardedParam(ShardedParam):
    """A parameter that is sharded already, of whose local tensor this rank updates all, or with replicas its piece."""

    __slots__ = ("_flat", "_pointer", "_shape")

    bucket: PreshardedState

    def __init__(self, param: Tensor, name: str, index: int, bucket: PreshardedState, slot: Slot) -> None:
        local = local_of(param)
        fragment = bucket.layout.fragment(slot, 0 if bucket.replicas is None else bucket.replicas.rank)
        super().__init__(param, name, index, slot, fragment, memory_strides(local))
        self.bucket = bucket
        self._shape = local.shape
        self._take(local)

    def _take(self, local: Tensor) -> None:
        self._pointer = local.data_ptr()
        self._flat = flattened(local, self.strides)

    @property
    def local(self) -> Tensor:
        """The local tensor, as it is now."""
        return local_of(self.param)

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

    def follow(self) -> bool:
        """Take up the local tensor where it was put elsewhere, as FSDP2 does to pad or pin it; whether it was."""
        local = self.local
        if local.data_ptr() == self._pointer or not self.is_unmoved:
            return False
        self._take(local)
        return True

    def param_range(self, start: int, stop: int) -> Tensor:
        shift = self.fragment.param_start - self.fragment.start
        return self._flat[start + shift : stop + shift]

    @property
    @abstractmethod
    def gradient_misplaced(self) -> bool:
        """Whether this rank has something to say about the gradient beside that it is there."""

    @abstractmethod
    def align_gradient(self, have: Sequence[int], gradient_misplaced: Sequence[int], num_ranks: int) -> None:
        """Collective where all ranks found it ``gradient_misplaced``: put the gradient right, or raise a RuntimeError, on all alike.

        ``have``: the ranks that have a gradient.
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
    def gradient(self) -> Tensor | None:
        gradient = self.param.grad
        return None if gradient is None else dtensor.local_of(cast("DTensor", gradient))

    @property
    def gradient_misplaced(self) -> bool:
        # DTensorParam otherwise, say as partial sums.
        gradient = self.param.grad
        return gradient is not None and not dtensor.same_placement(self.param, cast("DTensor", gradient))

    def align_gradient(self, have: Sequence[int], gradient_misplaced: Sequence[int], num_ranks: int) -> None:
        if 0 < len(have) < num_ranks:
            raise RuntimeError(
                f"dist_asgd: parameter {self.name} has a gradient on {describe_ranks(have)} of {num_ranks} only. Gradients "
                f"of DTensors arrive reduced, on all ranks or on none: run the same modules on every rank."
            )
        if 0 < len(gradient_misplaced) < num_ranks:
            raise RuntimeError(
                f"dist_asgd: the gradient of parameter {self.name} is placed as the parameter is, but not on "
                f"{describe_ranks(gradient_misplaced)} of {num_ranks}. A DTensor has the same placements on all ranks."
            )
        if gradient_misplaced:
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
    def gradient(self) -> Tensor | None:
        return self.param.grad

    @property
    def gradient_misplaced(self) -> bool:
        # Ranks that hold nothing of it have no gradient, and nothing to say.
        return self.param.numel() > 0 and self.param.grad is None

    def align_gradient(self, have: Sequence[int], gradient_misplaced: Sequence[int], num_ranks: int) -> None:
        if have and gradient_misplaced:
            raise RuntimeError(
                f"dist_asgd: parameter {self.name} has a gradient on {describe_ranks(have)} of {num_ranks}, and none on "
                f"{describe_ranks(gradient_misplaced)}, which hold parts of it too. FSDP1 reduces gradients on all ranks: run the same "
                f"modules on every rank."
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
        like = local_of(params[0][2])
        numels, itemsize = [_numel(param) for _, _, param in params], like.dtype.to_real().itemsize
        layout = lay_out(numels, itemsize, 1 if replicas is None else len(replicas.ranks))
        super().__init__(layout, like, group_index, precision)
        self.members: list[PreshardedParam] = [
            DTensorParam(param, name, index, self, slot)
            if dtensor.is_dtensor(param)
            else FSDP1Param(param, name, index, self, slot)
            for (index, name, param), slot in zip(params, self.layout.slots, strict=True)
        ]
        self.reset_masters()

    def follow(self) -> bool:
        """Whether any local tensor was put elsewhere since the last call."""
        followed = [member.follow() for member in self.members]
        return any(followed)

    def on_params_written(self) -> None:
        dtensor.reshard_modules()


def _numel(param: Tensor) -> int:
    """Real elements of the local tensor."""
    return local_of(param).numel() * (2 if param.is_complex() else 1)


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
        local = local_of(param)
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
