"""Flat storage on a layout: parameters become views of it, so an all-gather is in place and copies nothing.

A ``Bucket`` owns the storage of its parameters (whole), of their average ``ax`` (this rank's shard) and, in
stage 2, of their reduced gradient (this rank's shard). A ``Member`` is one parameter at home in a bucket.
Complex parameters are stored as pairs of reals; every count here is in real elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from . import masters
from .layout import BucketLayout, Piece, Slot, fill_buckets, lay_out


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


def memory_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides a parameter keeps in its bucket: its own where it is dense in memory, else contiguous ones."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return torch.empty(tensor.shape, device="meta").stride()
            expected *= size
    return tensor.stride()


def same_strides(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether ``tensor`` lies in memory as ``strides`` say; strides of dimensions of size 1 do not count."""
    own = tensor.stride()
    return own == strides or all(size == 1 or a == b for size, a, b in zip(tensor.shape, own, strides, strict=True))


def _real(flat: Tensor) -> Tensor:
    """A 1-D tensor as reals: itself, or the (re, im) pairs of a complex one."""
    return torch.view_as_real(flat).view(-1) if flat.is_complex() else flat


def flattened(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``tensor`` as 1-D reals in the memory order of ``strides``: a view where it already lies so, else a copy."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if not same_strides(tensor, strides):
        tensor = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return _real(tensor.as_strided((tensor.numel(),), (1,)))


class Member:
    """One parameter at home in a bucket, and the piece of it in this rank's shard.

    ``index`` counts all parameters of the optimizer in registration order; it names the parameter's bit in what
    ranks tell each other. ``name`` is the user's where parameters were given with names. ``pointer`` and
    ``view_strides`` are of the view that the parameter became.
    """

    __slots__ = ("_shape", "bucket", "index", "name", "param", "piece", "pointer", "slot", "strides", "view_strides")

    def __init__(self, param: Tensor, name: str, index: int, bucket: Bucket, slot: Slot, rank: int) -> None:
        self.param = param
        self.name = name
        self.index = index
        self.bucket = bucket
        self.slot = slot
        self.piece: Piece = bucket.layout.piece(slot, rank)
        self.strides = memory_strides(param)
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
    def at_home(self) -> bool:
        """Whether the parameter still is the view of the bucket that construction made it."""
        param = self.param
        return (
            param.data_ptr() == self.pointer
            and param.dtype == self.bucket.param_dtype
            and param.shape == self._shape
            and param.stride() == self.view_strides
        )

    def check_at_home(self) -> None:
        """RuntimeError unless ``at_home``."""
        if not self.at_home:
            raise RuntimeError(
                f"dist_asgd: parameter {self.name} was moved, re-cast or re-bound after the optimizer was constructed "
                f"(it was {self.dtype} on {self.bucket.device}, it is {self.param.dtype} on {self.param.device}). "
                f"Change parameters in place (p.copy_()), or convert the model first and then construct the optimizer."
            )

    @property
    def dtype(self) -> torch.dtype:
        """The parameter's dtype; the bucket's is its real counterpart."""
        return self.bucket.param_dtype

    @property
    def average(self) -> Tensor:
        """This rank's 1-D slice of ``ax``, in memory order: ``(piece_numel,)``, complex for a complex parameter."""
        real = self.bucket.average[self.piece.start : self.piece.stop]
        return torch.view_as_complex(real.view(-1, 2)) if self.bucket.param_dtype.is_complex else real

    def slices(self) -> dict[str, Tensor]:
        """The sharded state of this parameter by its key in state dicts: this rank's 1-D slice of each.

        ``ax`` is the live one, ``master`` a new float32 tensor.
        """
        slices = {"ax": self.average}
        if self.bucket.master is not None:
            slices["master"] = self.bucket.masters(self.piece.start, self.piece.stop)
        return slices


class Bucket:
    """The storage of one bucket on this rank.

    flat      (world_size * shard_numel,)  the parameters, whole
    shard     (shard_numel,)               this rank's part of ``flat``
    average   (shard_numel,)               ``ax`` of the shard, in ``average_dtype`` or, after a load, a wider one
    master    (shard_numel,) or None       what is kept beside the shard for float32 masters; see ``masters.py``
    gradient  (shard_numel,) or None       stage 2: the reduced gradient of the shard, kept between steps

    ``seed`` is that of stochastic rounding, None without it. Gradients are sent in ``wire_dtype`` and kept in
    ``gradient_dtype``.
    """

    __slots__ = (
        "average",
        "average_dtype",
        "device",
        "dtype",
        "flat",
        "gradient",
        "gradient_dtype",
        "group_index",
        "layout",
        "master",
        "members",
        "param_dtype",
        "seed",
        "shard",
        "trainable",
        "wire_dtype",
    )

    def __init__(self, layout: BucketLayout, like: Tensor, group_index: int, rank: int, precision: Precision) -> None:
        self.layout = layout
        self.group_index = group_index
        self.param_dtype = like.dtype
        self.dtype = like.real.dtype if like.is_complex() else like.dtype
        self.device = like.device
        self.trainable = like.requires_grad
        self.flat = torch.empty(layout.numel, dtype=self.dtype, device=self.device)
        self.shard = self.flat.view(layout.world_size, layout.shard_numel)[rank]
        narrow = self.dtype.itemsize == 2
        asked = precision.average_dtype or (torch.float32 if narrow else self.dtype)
        self.average_dtype = torch.promote_types(self.dtype, asked)
        self.average = torch.zeros(layout.shard_numel, dtype=self.average_dtype, device=self.device)
        self.master: Tensor | None = None
        if narrow and precision.master_weights:
            self.master = torch.zeros(layout.shard_numel, dtype=masters.held_dtype(self.dtype), device=self.device)
        self.seed = precision.stochastic_rounding if self.dtype == torch.bfloat16 else None
        self.wire_dtype = precision.reduce_dtype or self.dtype
        # A sum that is wider than a 16-bit parameter stays so; float32 and float64 ones need no wider.
        self.gradient_dtype = torch.float32 if narrow and self.wire_dtype != self.dtype else self.dtype
        self.gradient: Tensor | None = None
        self.members: list[Member] = []
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

    @property
    def updates_in_float32(self) -> bool:
        """Whether 16-bit parameters are updated in float32 and rounded once: with masters, or stochastically."""
        return self.master is not None or self.seed is not None

    def masters(self, start: int, stop: int) -> Tensor:
        """A copy of the float32 masters of ``shard[start:stop]``; only where there are masters."""
        assert self.master is not None
        out = torch.empty(stop - start, dtype=torch.float32, device=self.device)
        return masters.read(self.shard[start:stop], self.master[start:stop], out)

    def shards(self) -> dict[str, Tensor]:
        """This rank's shard ``(shard_numel,)`` of all state, by its key in state dicts; a new tensor for masters."""
        shards = {"ax": self.average}
        if self.master is not None:
            shards["master"] = self.masters(0, self.layout.shard_numel)
        return shards

    def set_masters(self, start: int, values: Tensor) -> None:
        """Set masters, and parameters with them, to float32 ``values`` ``(n,)`` from ``shard[start]`` on."""
        assert self.master is not None
        stop = start + values.numel()
        masters.write(values, self.shard[start:stop], self.master[start:stop])

    def forget_masters(self) -> None:
        """Let the parameters be their own masters."""
        if self.master is not None:
            self.set_masters(0, self.shard.float())

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
    named_params: Sequence[tuple[str, Tensor]],
    *,
    group_index: int,
    first_index: int,
    rank: int,
    world_size: int,
    cap_bytes: int,
    precision: Precision,
) -> list[Bucket]:
    """Move one parameter group into buckets, bucket by bucket: at most one bucket is held twice meanwhile.

    Parameters of a bucket share dtype, device and ``requires_grad``; they are taken in reverse registration
    order, which is about the order in which backward produces their gradients.
    """
    classes: dict[tuple[torch.dtype, torch.device, bool], list[int]] = {}
    for position in reversed(range(len(named_params))):
        param = named_params[position][1]
        classes.setdefault((param.dtype, param.device, param.requires_grad), []).append(position)
    buckets: list[Bucket] = []
    for (dtype, _, _), positions in classes.items():
        reals = 2 if dtype.is_complex else 1
        itemsize = dtype.itemsize // reals
        numels = [named_params[position][1].numel() * reals for position in positions]
        for chosen in fill_buckets(numels, itemsize, cap_bytes):
            layout = lay_out([numels[i] for i in chosen], itemsize, world_size)
            bucket = Bucket(layout, named_params[positions[chosen[0]]][1], group_index, rank, precision)
            for i, slot in zip(chosen, layout.slots, strict=True):
                name, param = named_params[positions[i]]
                member = Member(param, name, first_index + positions[i], bucket, slot, rank)
                bucket.members.append(member)
            bucket.forget_masters()
            buckets.append(bucket)
    return buckets


def reduce_order(buckets: Sequence[Bucket], group_sizes: Sequence[int], first_indices: Sequence[int]) -> list[Bucket]:
    """Buckets in the order in which backward is expected to fill them, the same on every rank.

    A bucket is full when its earliest-registered parameter has its gradient; where groups were registered side
    by side (weights and biases, say), a parameter's place is taken relative to its group.
    """

    def place(bucket: Bucket) -> float:
        size, first = group_sizes[bucket.group_index], first_indices[bucket.group_index]
        return min((member.index - first + 0.5) / size for member in bucket.members)

    return sorted(buckets, key=place, reverse=True)
