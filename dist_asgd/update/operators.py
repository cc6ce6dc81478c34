"""The update in torch operators: tiles that fit a CPU core's cache, each a few calls of the for-loop or foreach form.

tile  consecutive elements of one shard whose parameters step together, updated by one call of the rule
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from ..storage import masters
from ..storage.buffers import ShardedParam, StateBuffer
from ..storage.memory_order import flattened
from . import backend, cpu, foreach, reference, rounding
from .batch import Batch, StepContext
from .offload import Offload
from .schedule import Cohort, Implementation, StepHyperparameters
from .segments import Scaling

# A few arrays of so many elements fit the cache of a CPU core.
CPU_TILE_NUMEL = 1 << 19
# On accelerators a tile only bounds the scratch memory.
ACCELERATOR_TILE_NUMEL = 1 << 24


@dataclass(frozen=True, slots=True)
class GradientRange:
    """Elements of one parameter's gradient that belong to a tile.

    ``scratch[at:at + numel]`` of the tile's scratch takes ``gradient[start:start + numel]`` in memory order.
    """

    member: ShardedParam
    start: int
    at: int
    numel: int

    @property
    def is_whole(self) -> bool:
        """Whether the range is all of the parameter's gradient."""
        return self.numel == self.member.slot.numel


@dataclass(frozen=True, slots=True)
class Tile:
    """Views of one tile's parameters, averages, masters and, if the optimizer reduced it, their gradient; 1-D or 0-dim.

    ranges     without ``gradient`` (stage 1): the gradients that fill the tile, in order
    gaps       (start, stop) of elements that no range fills: padding between slots
    rounds_by  (key, offset of the first element in its parameter) if the update is rounded stochastically
    targets    made at the first step: (scratch memory, the view of it for each range)
    """

    param: Tensor
    average: Tensor
    gradient: Tensor | None
    ranges: tuple[GradientRange, ...] = ()
    gaps: tuple[tuple[int, int], ...] = ()
    master: Tensor | None = None
    rounds_by: tuple[int, int] | None = None
    targets: list[tuple[Tensor | None, list[Tensor]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class OperatorBatch(Batch):
    """All tiles of one cohort in one state ``buffer``, updated in torch operators."""

    buffer: StateBuffer
    cohort: Cohort
    group_index: int
    tiles: tuple[Tile, ...]

    def run(self, step: StepContext) -> None:
        is_reduced = self.tiles[0].gradient is not None
        scaling = step.reduced_scaling if is_reduced else step.param_scaling
        step.updater.run(self, step.hypers[self.group_index], scaling)


def tile_numel(device: torch.device) -> int:
    """The most elements that a tile has on ``device``."""
    return CPU_TILE_NUMEL if device.type == "cpu" else ACCELERATOR_TILE_NUMEL


def scratch_uses(buffer: StateBuffer, by_kernel: bool) -> set[tuple[torch.dtype, bool]]:
    """The scratch memory that updates of ``buffer`` need: its dtypes, each with whether it has widened parameters.

    ``by_kernel``: whether the compiled kernel of the CPU updates it. ``averaging.py`` needs scratch then, too.
    """
    if by_kernel:
        return {(buffer.dtype, False)}
    uses = {(dtype, False) for dtype in (buffer.dtype, buffer.average.dtype, buffer.gradient_dtype)}
    if buffer.updates_in_float32:
        uses |= {(torch.float32, False), (torch.float32, True)}
    return uses


class Updater:
    """Runs the rule over tiles, and keeps their scratch memory: one tile per device, dtype and use.

    The optimizer has one; ``averaging.py`` borrows its scratch for swapping parameters and averages.
    """

    def __init__(self) -> None:
        # By device, dtype, and whether it has widened parameters, which are needed beside the gradient's scratch.
        self._scratch: dict[tuple[torch.device, torch.dtype, bool], Tensor] = {}
        self._offloads: dict[torch.device, Offload] = {}

    def offload(self, device: torch.device) -> Offload:
        """What updates averages in host memory of parameters on ``device``."""
        if device not in self._offloads:
            self._offloads[device] = Offload(device)
        return self._offloads[device]

    @property
    def offloads(self) -> list[Offload]:
        """Those of all devices."""
        return list(self._offloads.values())

    def reserve(self, buffers: Sequence[StateBuffer]) -> None:
        """Allocate the scratch of these state buffers, once, so that no step allocates any.

        The Triton kernel needs none. If a group that it can update is updated in torch operators after all, the
        first such step allocates.
        """
        for buffer in buffers:
            if buffer.is_offloaded:
                self.offload(buffer.device).reserve(buffer)
            if backend.of(buffer.device) is backend.TRITON:
                continue
            numel = self.scratch_numel(buffer)
            for dtype, widened in scratch_uses(buffer, by_kernel=cpu.can_update(buffer)):
                self._reserve((buffer.device, dtype, widened), numel)

    def _reserve(self, key: tuple[torch.device, torch.dtype, bool], numel: int) -> Tensor:
        if key not in self._scratch or self._scratch[key].numel() < numel:
            self._scratch[key] = torch.empty(numel, dtype=key[1], device=key[0])
        return self._scratch[key]

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch memory that are kept between steps."""
        own = sum(scratch.nbytes for scratch in self._scratch.values())
        return own + sum(offload.scratch_bytes for offload in self.offloads)

    def scratch_numel(self, buffer: StateBuffer) -> int:
        """Elements of the longest tile of ``buffer``."""
        return min(tile_numel(buffer.device), buffer.layout.shard_numel)

    def scratch(self, like: Tensor, dtype: torch.dtype | None = None, widened: bool = False) -> Tensor:
        """Scratch with the shape and device of ``like``, and its dtype or ``dtype``.

        Two calls with equal devices, dtypes and ``widened`` return the same memory.
        """
        key = (like.device, dtype or like.dtype, widened)
        return self._reserve(key, like.numel())[: like.numel()].view(like.shape)

    def run(self, batch: OperatorBatch, hyper: StepHyperparameters, scaling: Scaling) -> None:
        """Update every tile of ``batch``, with gradients multiplied by ``scaling``."""
        if not batch.tiles:
            return
        implementation = foreach if hyper.implementation is Implementation.FOREACH else reference
        eta, mu = batch.cohort.eta, batch.cohort.mu
        device = batch.tiles[0].param.device
        if hyper.implementation is Implementation.FOREACH and device.type != "cpu":
            # Filled on the device from host values: a launch, not a synchronisation.
            eta = torch.full((), eta.item(), dtype=eta.dtype, device=device)
            mu = torch.full((), mu.item(), dtype=mu.dtype, device=device)
        factors = [factor.to(device) for factor in scaling]
        for tile in batch.tiles:
            is_narrow = tile.master is None and tile.rounds_by is None
            x = tile.param if is_narrow else self._widened(tile)
            # With equal dtypes these are one memory: the gradient is used up when the average is taken.
            scratch, difference = self.scratch(x), self.scratch(tile.average)
            implementation.descend(x, self._gradient(tile, scratch, factors), eta, hyper, scratch)
            if tile.rounds_by is not None:
                key, first = tile.rounds_by
                step = int(batch.cohort.step.item()) + 1
                random = rounding.random_16(key, step, first, x.numel(), device)
                rounding.round_stochastically(x, tile.param, random)
                # The average takes what the parameter has become, not what it was rounded from.
                x.copy_(tile.param)
            if not batch.buffer.params_stand:
                implementation.take_average(x, tile.average, mu, difference)
            if tile.master is not None:
                masters.write(x, tile.param, tile.master)

    def _widened(self, tile: Tile) -> Tensor:
        """The tile's parameters, or their masters, in float32 scratch."""
        out = self.scratch(tile.param, torch.float32, widened=True)
        return out.copy_(tile.param) if tile.master is None else masters.read(tile.param, tile.master, out)

    def _gradient(self, tile: Tile, scratch: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """The tile's gradient times ``factors`` in the dtype of ``scratch``: in ``scratch``, or a view of the original.

        Factors are applied in the wider of the two dtypes, so that a product is rounded once.
        """
        gradient = tile.gradient if tile.gradient is not None else _gathered(tile, self.scratch(tile.param))
        if gradient.dtype.itemsize < scratch.dtype.itemsize:
            gradient = scratch.copy_(gradient)
        for factor in factors:
            gradient = torch.mul(gradient, factor, out=self.scratch(gradient))
        return gradient if gradient.dtype == scratch.dtype else scratch.copy_(gradient)


def _flat_gradient(one: GradientRange) -> Tensor:
    flat = flattened(cast(Tensor, one.member.gradient), one.member.strides)
    return flat[one.start : one.start + one.numel]


def _target(one: GradientRange, scratch: Tensor) -> Tensor:
    """The view of ``scratch`` that a range is copied to.

    It has the parameter's shape if the range is the whole gradient, so that the gradient is copied without being
    flattened first.
    """
    target = scratch[one.at : one.at + one.numel]
    if not one.is_whole:
        return target
    member = one.member
    if member.dtype.is_complex:
        target = torch.view_as_complex(target.view(-1, 2))
    return target.as_strided(member.param.shape, member.strides)


def _gathered(tile: Tile, scratch: Tensor) -> Tensor:
    """The tile's gradient from ``p.grad``: a view if one range is all of it, else gathered in ``scratch``."""
    if len(tile.ranges) == 1 and not tile.gaps:
        return _flat_gradient(tile.ranges[0]).view(scratch.shape)
    # Views are made once, and again when the scratch has been allocated anew for a longer tile.
    if not tile.targets or tile.targets[0][0] is not scratch._base:
        tile.targets[:] = [(scratch._base, [_target(one, scratch) for one in tile.ranges])]
    gradients = [cast(Tensor, one.member.gradient) if one.is_whole else _flat_gradient(one) for one in tile.ranges]
    torch._foreach_copy_(tile.targets[0][1], gradients)
    if tile.gaps:
        torch._foreach_zero_([scratch[start:stop] for start, stop in tile.gaps])
    return scratch
