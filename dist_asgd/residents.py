"""Parameters that are sharded already and stay where they are: DTensors.

Only their state is kept here, for the local tensors of all of one group, dtype and device together. Nothing is
reduced or gathered: gradients arrive reduced, and whoever sharded a parameter gathers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from . import dtensor
from .buffers import Member, Precision, Store, flattened, memory_strides, same_strides
from .layout import Slot, lay_out

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Resident(Member):
    """A DTensor, of which this rank updates its local tensor."""

    __slots__ = ("_flat", "_pointer", "_shape", "counted", "first")

    bucket: Residents
    param: DTensor

    def __init__(self, param: DTensor, name: str, index: int, bucket: Residents, slot: Slot) -> None:
        local = dtensor.local_of(param)
        piece = bucket.layout.piece(slot, 0)
        super().__init__(param, name, index, slot, piece, memory_strides(local))
        self.bucket = bucket
        self.first = dtensor.first_element(param) or 0
        self.counted = dtensor.counted_as(param)
        self._shape = local.shape
        self._take(local)

    def _take(self, local: Tensor) -> None:
        self._pointer = local.data_ptr()
        self._flat = flattened(local, self.strides)

    @property
    def local(self) -> Tensor:
        """The local tensor, as it is now."""
        return dtensor.local_of(self.param)

    @property
    def at_home(self) -> bool:
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
        if local.data_ptr() == self._pointer:
            return False
        self._take(local)
        return True

    @property
    def gradient(self) -> Tensor | None:
        gradient = self.param.grad
        return None if gradient is None else dtensor.local_of(cast("DTensor", gradient))

    @property
    def misplaced(self) -> bool:
        """Whether the parameter has a gradient that is placed otherwise, say as partial sums."""
        gradient = self.param.grad
        return gradient is not None and not dtensor.alike(self.param, cast("DTensor", gradient))

    def place_gradient(self) -> None:
        """Collective on the mesh: place the gradient as the parameter."""
        dtensor.place_gradient(self.param)

    @property
    def place(self) -> int:
        return self.first

    def part(self, start: int, stop: int) -> Tensor:
        return self._flat[start - self.piece.start : stop - self.piece.start]

    def piece_of(self, whole: Tensor) -> Tensor:
        return flattened(dtensor.part_of(whole, self.param), self.strides)

    def shown(self, slice_: Tensor) -> DTensor:
        # The same memory with storage of its own: a DTensor takes on the offset of its local tensor, by which
        # copy.deepcopy takes it for a tensor that has storage (torch/_tensor.py, __deepcopy__).
        local = torch.utils.dlpack.from_dlpack(slice_) if slice_.numel() else slice_.new_empty(0)
        return dtensor.placed_as(self.param, local.as_strided(self._shape, self.strides))

    @property
    def counted_as(self) -> int:
        return self.counted


class Residents(Store):
    """The state of all DTensors of one group, dtype and device, in one flat buffer of each kind."""

    def __init__(self, params: Sequence[tuple[int, str, DTensor]], group_index: int, precision: Precision) -> None:
        like = dtensor.local_of(params[0][2])
        reals = 2 if like.is_complex() else 1
        numels = [dtensor.local_of(param).numel() * reals for _, _, param in params]
        super().__init__(lay_out(numels, like.dtype.itemsize // reals, 1), like, group_index, precision)
        self.members: list[Resident] = [
            Resident(param, name, index, self, slot)
            for (index, name, param), slot in zip(params, self.layout.slots, strict=True)
        ]
        self.forget_masters()

    def follow(self) -> bool:
        """Whether any local tensor was put elsewhere since the last call."""
        followed = [member.follow() for member in self.members]
        return any(followed)

    def changed(self) -> None:
        dtensor.reshard_modules()


def settle_residents(
    params: Sequence[tuple[int, str, DTensor]], group_index: int, precision: Precision
) -> list[Residents]:
    """The stores of one group's DTensors, (index, name, parameter) each."""
    classes: dict[tuple[torch.dtype, torch.device], list[tuple[int, str, DTensor]]] = {}
    for entry in params:
        local = dtensor.local_of(entry[2])
        classes.setdefault((local.dtype, local.device), []).append(entry)
    return [Residents(alike, group_index, precision) for alike in classes.values()]
