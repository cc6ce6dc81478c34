"""Flat storage on a layout: parameters become views of it, so an all-gather is in rng_offset and copies nothing.

A ``StateBuffer`` keeps what belongs to parameters of one group, dtype and device on this rank: their average ``ax`` and what
masters need. A ``Bucket`` is the store that also owns the storage of its parameters (whole) and, in stage 2, of their
reduced gradient (this rank's shard). A ``ShardedParam`` is one parameter of a store, ``BucketParam`` where it is at home in a
bucket. Complex parameters are stored as pairs of reals; every count here is in real elements.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from . import masters
from .layout import BucketLayout, Fragment, Slot, fill_buckets, lay_out
from .memory_order import flattened, memory_strides


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtypes that are kept and sent beside the parameters' own, as the constructor's options name them."""

    average_dtype: torch.dtype | None = None
    master_weights: bool = False
    stochastic_rounding: int | None = None
    reduce_dtype: torch.dtype | None = None

    def options(self) -> dict[str, str]:
        """By name, as plain values."""
        return {key: str(value) for key, value in asdict(self).items()}


class ShardedParam(ABC):
    """One parameter of a store, and the piece of it that this rank updates.

    ``index`` counts all parameters of the optimizer in registration order; it names the parameter's bit in what
    ranks tell each other. ``name`` is the user's where parameters were given with names. ``piece`` says where the
    store has its elements, and where in the gradient they begin; ``strides`` are those of the memory order in which
    elements are counted.
    """

    __slots__ = ("bucket", "fragment", "index", "name", "param", "slot", "strides")

    bucket: StateBuffer

    def __init__(
        self, param: Tensor, name: str, index: int, slot: Slot, fragment: Fragment, strides: tuple[int, ...]
    ) -> None:
        self.param = param
        self.name = name
        self.index = index
        self.slot = slot
        self.fragment = fragment
        self.strides = strides

    @property
    @abstractmethod
    def is_unmoved(self) -> bool:
        """Whether the parameter still is where and what construction made it."""

    def check_unmoved(self) -> None:
        """RuntimeError unless ``is_unmoved``."""
        if not self.is_unmoved:
            raise RuntimeError(
                f"dist_asgd: parameter {self.name} was moved, re-cast or re-bound after the optimizer was constructed "
                f"(it was {self.dtype} on {self.bucket.device}, it is {self.param.dtype} on {self.param.device}). "
                f"Change parameters in place (p.copy_()), or convert the model first and then construct the optimizer."
            )

    @property
    @abstractmethod
    def gradient(self) -> Tensor | None:
        """What ``p.grad`` holds on this rank: a plain tensor, laid out as ``strides`` or otherwise."""

    @property
    @abstractmethod
    def rng_offset(self) -> int:
        """Where the piece begins in the whole parameter, in memory order: what random numbers are drawn by."""

    @abstractmethod
    def param_range(self, start: int, stop: int) -> Tensor:
        """The parameter's elements ``[start, stop)`` of the store, 1-D: a view, of neighbours' too in a bucket."""

    @abstractmethod
    def fragment_of(self, whole: Tensor) -> Tensor:
        """This rank's piece of a tensor of the parameter's shape, 1-D and real."""

    @abstractmethod
    def state_entry(self, slice_: Tensor) -> Tensor:
        """``slice_`` ``(piece_numel,)``, this rank's part of sharded state, as ``optimizer.state`` shows it; a view."""

    @property
    @abstractmethod
    def norm_owner(self) -> int:
        """Ranks that name the same number hold, together and each once, the whole parameter; 0: nothing to count."""

    @property
    def dtype(self) -> torch.dtype:
        """The parameter's dtype; the store's is its real counterpart."""
        return self.bucket.param_dtype

    @property
    def average(self) -> Tensor:
        """This rank's 1-D slice of ``ax``, in memory order: ``(piece_numel,)``, complex for a complex parameter."""
        reals = self.bucket.average[self.fragment.start : self.fragment.stop]
        return torch.view_as_complex(reals.view(-1, 2)) if self.bucket.param_dtype.is_complex else reals

    def state_fragments(self) -> dict[str, Tensor]:
        """The sharded state of this parameter by its key in state dicts: this rank's 1-D slice of each.

        ``ax`` is the live one, ``master`` a new float32 tensor.
        """
        slices = {"ax": self.average}
        if self.bucket.master is not None:
            slices["master"] = self.masters()
        return slices

    def masters(self) -> Tensor:
        """A copy of the float32 masters of the piece; only where there are masters."""
        assert self.bucket.master is not None
        start, stop = self.fragment.start, self.fragment.stop
        out = torch.empty(stop - start, dtype=torch.float32, device=self.bucket.device)
        return masters.read(self.param_range(start, stop), self.bucket.master[start:stop], out)

    def set_masters(self, values: Tensor) -> None:
        """Set the masters of the piece, and the parameter with them, to float32 ``values`` ``(piece_numel,)``."""
        assert self.bucket.master is not None
        start, stop = self.fragment.start, self.fragment.stop
        masters.write(values, self.param_range(start, stop), self.bucket.master[start:stop])


class BucketParam(ShardedParam):
    """A parameter that was moved into a bucket: whole on every rank, which updates the piece in its shard.

    ``pointer`` and ``view_strides`` are of the view that the parameter became.
    """

    __slots__ = ("_shape", "pointer", "view_strides")

    bucket: Bucket

    def __init__(self, param: Tensor, name: str, index: int, bucket: Bucket, slot: Slot, rank: int) -> None:
        super().__init__(param, name, index, slot, bucket.layout.fragment(slot, rank), memory_strides(param))
        self.bucket = bucket
        home = bucket.flat[slot.offset : slot.stop]
        if param.is_complex():
            home = torch.view_as_complex(home.view(-1, 2))
        home = home.as_strided(param.shape, self.strides)
        home.copy_(param.detach())
        param.data = home
        self.pointer = param.data_ptr()
        self._shape = param.shape
        self.view_strides = param.stride()

    @property
    def is_unmoved(self) -> bool:
        param = self.param
        return (
            param.data_ptr() == self.pointer
            and param.dtype == self.bucket.param_dtype
            and param.shape == self._shape
            and param.stride() == self.view_strides
        )

    @property
    def gradient(self) -> Tensor | None:
        return self.param.grad

    @property
    def rng_offset(self) -> int:
        return self.fragment.param_start

    def param_range(self, start: int, stop: int) -> Tensor:
        return self.bucket.shard[start:stop]

    def fragment_of(self, whole: Tensor) -> Tensor:
        return flattened(whole, self.strides)[
            self.fragment.param_start : self.fragment.param_start + self.fragment.numel
        ]

    def state_entry(self, slice_: Tensor) -> Tensor:
        return slice_

    @property
    def norm_owner(self) -> int:
        return int(self.fragment.numel > 0 and self.bucket.replica == 0)


class StateBuffer:
    """What is kept on this rank for parameters of one group, dtype and device.

    average   (shard_numel,)            ``ax`` of what this rank updates, in ``average_dtype`` or, after a load, wider
    master    (shard_numel,) or None    what is kept beside the parameters for float32 masters; see ``masters.py``

    ``seed`` is that of stochastic rounding, None without it. ``gradient_dtype`` is what the update reads.
    """

    # The parameters, whole, where every rank has to get them after an update; None where nobody does.
    flat: Tensor | None = None
    # Whether every member's parameter is a tensor of its own.
    separate_params = True

    members: Sequence[ShardedParam]

    def __init__(self, layout: BucketLayout, like: Tensor, group_index: int, precision: Precision) -> None:
        self.layout = layout
        self.group_index = group_index
        self.param_dtype = like.dtype
        self.dtype = like.dtype.to_real() if like.dtype.is_complex else like.dtype
        self.gradient_dtype = self.dtype
        self.device = like.device
        narrow = self.dtype.itemsize == 2
        asked = precision.average_dtype or (torch.float32 if narrow else self.dtype)
        self.average_dtype = torch.promote_types(self.dtype, asked)
        self.average = torch.zeros(layout.shard_numel, dtype=self.average_dtype, device=self.device)
        self.master: Tensor | None = None
        if narrow and precision.master_weights:
            self.master = torch.zeros(layout.shard_numel, dtype=masters.held_dtype(self.dtype), device=self.device)
        self.seed = precision.stochastic_rounding if self.dtype == torch.bfloat16 else None

    @property
    def updates_in_float32(self) -> bool:
        """Whether 16-bit parameters are updated in float32 and rounded once: with masters, or stochastically."""
        return self.master is not None or self.seed is not None

    def reset_masters(self) -> None:
        """Let the parameters be their own masters."""
        if self.master is not None:
            for member in self.members:
                member.set_masters(member.param_range(member.fragment.start, member.fragment.stop).float())

    def reduced_gradient(self) -> Tensor | None:
        """The reduced gradient ``(shard_numel,)``, where it is kept here; None where it stands on the parameters."""
        return None

    def on_params_written(self) -> None:
        """Called where parameters were changed outside of a step: whoever keeps copies of them drops those."""


class Bucket(StateBuffer):
    """The storage of one bucket on this rank.

    flat      (world_size * shard_numel,)  the parameters, whole
    shard     (shard_numel,)               this rank's part of ``flat``
    gradient  (shard_numel,) or None       stage 2: the reduced gradient of the shard, kept between steps

    Gradients are sent in ``wire_dtype`` and kept in ``gradient_dtype``. ``replica`` numbers equal copies of all shards.
    """

    separate_params = False

    flat: Tensor

    def __init__(
        self, layout: BucketLayout, like: Tensor, group_index: int, rank: int, replica: int, precision: Precision
    ) -> None:
        super().__init__(layout, like, group_index, precision)
        self.replica = replica
        self.trainable = like.requires_grad
        self.flat = torch.empty(layout.numel, dtype=self.dtype, device=self.device)
        self.shard = self.flat.view(layout.world_size, layout.shard_numel)[rank]
        self.wire_dtype = precision.reduce_dtype or self.dtype
        # A sum that is wider than a 16-bit parameter stays so; float32 and float64 ones need no wider.
        narrow = self.dtype.itemsize == 2
        self.gradient_dtype = torch.float32 if narrow and self.wire_dtype != self.dtype else self.dtype
        self.gradient: Tensor | None = None
        self.members: list[BucketParam] = []
        self._clear_padding()

    def _clear_padding(self) -> None:
        offset = 0
        for slot in self.layout.slots:
            self.flat[offset : slot.offset].zero_()
            offset = slot.stop
        self.flat[offset:].zero_()

    def gradient_shard(self) -> Tensor:
        """The gradient shard, allocated on first use and kept: ``(shard_numel,)``."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.shard, dtype=self.gradient_dtype)
        return self.gradient

    def reduced_gradient(self) -> Tensor | None:
        return self.gradient

    def state_shards(self) -> dict[str, Tensor]:
        """This rank's shard ``(shard_numel,)`` of all state, by its key in state dicts; a new tensor for masters."""
        shards = {"ax": self.average}
        if self.master is not None:
            out = torch.empty_like(self.average, dtype=torch.float32)
            shards["master"] = masters.read(self.shard, self.master, out)
        return shards

    def reset_masters(self) -> None:
        if self.master is not None:
            masters.write(self.shard.float(), self.shard, self.master)

    def pack(self, gradients: Sequence[Tensor | None], packed: Sequence[tuple[int, int]], out: Tensor) -> None:
        """Copy gradients to ``out``: (member, offset) pairs, in order. Zeros for None and wherever nothing goes."""
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        zeros: list[Tensor] = []
        filled = 0
        for position, offset in packed:
            member, gradient = self.members[position], gradients[position]
            stop = offset + member.slot.numel
            if offset > filled:
                zeros.append(out[filled:offset])
            if gradient is None:
                zeros.append(out[offset:stop])
            else:
                targets.append(out[offset:stop])
                sources.append(flattened(gradient, member.strides))
            filled = stop
        if filled < out.numel():
            zeros.append(out[filled:])
        if targets:
            torch._foreach_copy_(targets, sources)
        if zeros:
            torch._foreach_zero_(zeros)


def build_buckets(
    params: Sequence[tuple[int, str, Tensor]],
    *,
    group_index: int,
    rank: int,
    world_size: int,
    replica: int,
    cap_bytes: int,
    precision: Precision,
) -> list[Bucket]:
    """Move plain parameters of one group, (index, name, parameter) each, into buckets.

    Bucket by bucket: at most one is held twice meanwhile. Parameters of a bucket share dtype, device and
    ``requires_grad``; they are taken in reverse registration order, which is about the order in which backward
    produces their gradients.
    """
    classes: dict[tuple[torch.dtype, torch.device, bool], list[int]] = {}
    for position in reversed(range(len(params))):
        param = params[position][2]
        classes.setdefault((param.dtype, param.device, param.requires_grad), []).append(position)
    buckets: list[Bucket] = []
    for (dtype, _, _), positions in classes.items():
        reals = 2 if dtype.is_complex else 1
        itemsize = dtype.itemsize // reals
        numels = [params[position][2].numel() * reals for position in positions]
        for chosen in fill_buckets(numels, itemsize, cap_bytes):
            layout = lay_out([numels[i] for i in chosen], itemsize, world_size)
            bucket = Bucket(layout, params[positions[chosen[0]]][2], group_index, rank, replica, precision)
            for i, slot in zip(chosen, layout.slots, strict=True):
                index, name, param = params[positions[i]]
                bucket.members.append(BucketParam(param, name, index, bucket, slot, rank))
            bucket.reset_masters()
            buckets.append(bucket)
    return buckets


def reduce_order(buckets: Sequence[Bucket], group_sizes: Sequence[int], first_indices: Sequence[int]) -> list[Bucket]:
    """Buckets in the order in which backward is expected to fill them, the same on every rank.

    A bucket is full when its earliest-registered parameter has its gradient; where groups were registered side
    by side (weights and biases, say), a parameter's rng_offset is taken relative to its group.
    """

    def rng_offset(bucket: Bucket) -> float:
        size, first = group_sizes[bucket.group_index], first_indices[bucket.group_index]
        return min((member.index - first + 0.5) / size for member in bucket.members)

    return sorted(buckets, key=rng_offset, reverse=True)
