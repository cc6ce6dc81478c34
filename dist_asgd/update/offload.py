"""Averages in host memory: they are updated on the device of their parameters, beside what computes there.

The averages come to the device tile by tile, take their parameters there, and go back: two words an element over the
bus. Two tiles are on their way at a time, so that one comes while the other goes. The host waits for nothing.

Two things have to wait for an update. Whoever writes parameters calls ``Offload.before_write``, which lets the stream
that computes wait until they are read: a hook does so before the step of every optimizer. Whoever reads averages calls
``AverageMemory.settle``, which lets the host wait until they are back.

lane  a stream with scratch memory of its own. A place in a shard always has the same lane, in any plan, so that its
      updates follow one another without waits between lanes
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from ..comm.streams import SideStream
from ..storage.buffers import ShardedParam, StateBuffer

NUM_LANES = 2
# Some dozen launches take as long as such a tile on the bus.
TILE_BYTES = 16 << 20

Take = Callable[[list[Tensor], list[Tensor], Callable[[Tensor], Tensor]], None]
"""Takes parameters into averages, both on the device; makes scratch memory like a tensor with the third argument."""


@dataclass(frozen=True, slots=True)
class HostTile:
    """Consecutive averages in host memory that are updated together.

    lane     which lane updates them
    host     (numel,) reals: the averages
    params   what they are averages of: 1-D, complex if the parameters are
    ranges   (start, stop) of the average of each of ``params`` in ``host``
    targets  made at the first update: (memory of a lane, the average of each of ``params`` in it)
    """

    lane: int
    host: Tensor
    params: list[Tensor]
    ranges: list[tuple[int, int]]
    targets: list[tuple[Tensor, list[Tensor]]] = field(default_factory=list)

    def averages_in(self, memory: Tensor) -> list[Tensor]:
        """The average of each of ``params`` in ``memory``, to which ``host`` is copied."""
        if not self.targets or self.targets[0][0] is not memory:
            views = [memory[start:stop] for start, stop in self.ranges]
            if self.params[0].is_complex():
                views = [torch.view_as_complex(view.view(-1, 2)) for view in views]
            self.targets[:] = [(memory, views)]
        return self.targets[0][1]


class _Lane:
    """A stream of the device, and the scratch memory of the work on it; both are kept from one update to the next."""

    def __init__(self, device: torch.device) -> None:
        self.stream = SideStream(device)
        self._device = device
        # By dtype, and whether it has averages or widened parameters.
        self._scratch: dict[tuple[torch.dtype, bool], Tensor] = {}

    def reserve(self, dtype: torch.dtype, numel: int, has_averages: bool) -> Tensor:
        """Scratch memory of at least ``numel`` elements."""
        key = (dtype, has_averages)
        if key not in self._scratch or self._scratch[key].numel() < numel:
            self._scratch[key] = torch.empty(numel, dtype=dtype, device=self._device)
        return self._scratch[key]

    def like(self, average: Tensor) -> Tensor:
        """Scratch memory for the parameters of ``average``, in its shape and dtype."""
        return self.reserve(average.dtype, average.numel(), False)[: average.numel()].view(average.shape)

    @property
    def scratch_bytes(self) -> int:
        return sum(scratch.nbytes for scratch in self._scratch.values())

    def update(self, tile: HostTile, take: Take) -> None:
        """Let the averages of ``tile`` take their parameters; called on the lane's stream."""
        memory = self.reserve(tile.host.dtype, tile.host.numel(), True)
        on_device = memory[: tile.host.numel()]
        on_device.copy_(tile.host, non_blocking=True)
        take(tile.params, tile.averages_in(memory), self.like)
        tile.host.copy_(on_device, non_blocking=True)


class Offload:
    """The updates of averages in host memory whose parameters lie on one device; an optimizer's ``Updater`` has it."""

    # Those that have begun an update, over all averages of the process; it keeps none of them alive.
    _begun: ClassVar[weakref.WeakSet[Offload]] = weakref.WeakSet()
    # The hook before the steps of all optimizers of the process, once there is such an average.
    _hook: ClassVar[RemovableHandle | None] = None

    def __init__(self, device: torch.device) -> None:
        self._lanes = [_Lane(device) for _ in range(NUM_LANES)]
        # Each lets the computing stream wait for what a lane has been given so far.
        self._marks: list[Callable[[], None] | None] = []
        # What updates read, until somebody is let write it: parameters with their versions then, and their tiles, which
        # keep the memory of parameters that are put elsewhere meanwhile. By ``id()`` of the tiles of a batch.
        self._reading: dict[int, tuple[Sequence[HostTile], list[tuple[ShardedParam, int]]]] = {}
        self._overtaken: str | None = None
        if Offload._hook is None:
            # It stays: an object that is collected while torch runs such hooks must not remove one.
            Offload._hook = register_optimizer_step_pre_hook(_before_step)

    def reserve(self, buffer: StateBuffer) -> None:
        """Allocate the scratch memory for updates of ``buffer``, so that no update allocates any."""
        for lane in self._lanes:
            for (dtype, has_averages), numel in _scratch_of(buffer).items():
                lane.reserve(dtype, numel, has_averages)

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch memory on the device."""
        return sum(lane.scratch_bytes for lane in self._lanes)

    def update(
        self, buffer: StateBuffer, members: Sequence[ShardedParam], tiles: Sequence[HostTile], take: Take
    ) -> None:
        """Begin to let the averages of ``members``, which lie in ``tiles`` of ``buffer``, take their parameters."""
        # Before anything is in flight: an interruption must leave nothing that nobody waits for.
        self._begun.add(self)
        buffer.begin_update(self.synchronize, [lane.stream for lane in self._lanes])
        self._reading[id(tiles)] = (tiles, [(member, member.param._version) for member in members])
        try:
            for tile in tiles:
                lane = self._lanes[tile.lane]
                lane.stream.run(partial(lane.update, tile, take))
        finally:
            self._marks = [lane.stream.mark() for lane in self._lanes]

    def synchronize(self) -> None:
        """Let the host wait until all updates so far have ended; nobody has to wait for them after that."""
        self._let_write()
        for lane in self._lanes:
            lane.stream.synchronize()
        self._marks = []

    # --- writes of parameters --------------------------------------------------------------------------------

    @classmethod
    def before_write(cls) -> None:
        """Let the current stream wait until no update reads parameters any more; of whatever average.

        Called before parameters are written. The host does not wait.
        """
        # To iterate over a WeakSet takes much longer, with every step of every optimizer.
        if len(cls._begun):
            for offload in list(cls._begun):
                offload._let_write()

    def _let_write(self) -> None:
        for mark in self._marks:
            if mark is not None:
                mark()
        self._look()
        self._reading = {}

    def _look(self) -> None:
        """Look for parameters that were written while an update may have read them."""
        read = (pair for _, pairs in self._reading.values() for pair in pairs)
        overtaken = (member.name for member, version in read if member.param._version != version)
        self._overtaken = self._overtaken or next(overtaken, None)

    def take_overtaken(self) -> str | None:
        """The name of a parameter that was written while an update may have read it, once; None if none was."""
        self._look()
        overtaken, self._overtaken = self._overtaken, None
        if overtaken is not None:
            self._let_write()
            self._overtaken = None
        return overtaken


def _before_step(*_: Any) -> None:
    """The hook before the step of every optimizer, which writes parameters."""
    Offload.before_write()


def _tile_numel(buffer: StateBuffer) -> int:
    return TILE_BYTES // buffer.average.itemsize


def _scratch_of(buffer: StateBuffer) -> dict[tuple[torch.dtype, bool], int]:
    """The elements of scratch memory that a lane needs, by dtype and whether they are averages; else parameters."""
    numel, dtype = min(_tile_numel(buffer), buffer.layout.shard_numel), buffer.average.dtype
    return {(dtype, has_averages): numel for has_averages in (True, False) if has_averages or buffer.dtype != dtype}


def scratch_bytes(buffers: Iterable[StateBuffer]) -> int:
    """The bytes of scratch memory on the device for averages of ``buffers`` in host memory; the planner asks."""
    most: dict[tuple[torch.dtype, bool], int] = {}
    for buffer in buffers:
        for key, numel in _scratch_of(buffer).items():
            most[key] = max(most.get(key, 0), numel)
    return NUM_LANES * sum(numel * dtype.itemsize for (dtype, _), numel in most.items())


def host_tiles(buffer: StateBuffer, chosen: Sequence[ShardedParam]) -> list[HostTile]:
    """Return the tiles of the averages of ``chosen``, members of ``buffer``; parameters between them are left out.

    Tiles end at multiples of one number of elements, whose position says which lane they have.
    """
    numel, indices = _tile_numel(buffer), {member.index for member in chosen}
    # By position of the tile: the parts of parameters in it, as (parameter, start, stop), one list for each run.
    runs: list[tuple[int, list[tuple[ShardedParam, int, int]]]] = []
    is_run = False
    for member in buffer.members:
        start, end = member.fragment.start, member.fragment.stop
        if start < end and member.index not in indices:
            is_run = False
            continue
        while start < end:
            position = start // numel
            stop = min(end, (position + 1) * numel)
            if not is_run or runs[-1][0] != position:
                runs.append((position, []))
            runs[-1][1].append((member, start, stop))
            start, is_run = stop, True
    return [_host_tile(buffer, position, parts) for position, parts in runs]


def _host_tile(buffer: StateBuffer, position: int, parts: list[tuple[ShardedParam, int, int]]) -> HostTile:
    first, last = parts[0][1], parts[-1][2]
    params = [param_part(member, start, stop) for member, start, stop in parts]
    ranges = [(start - first, stop - first) for _, start, stop in parts]
    return HostTile(position % NUM_LANES, buffer.average[first:last], params, ranges)


def param_part(member: ShardedParam, start: int, stop: int) -> Tensor:
    """The elements of a parameter whose averages are ``[start, stop)`` of this rank's shard: 1-D, in its dtype."""
    reals = member.param_range(start, stop)
    return torch.view_as_complex(reals.view(-1, 2)) if member.dtype.is_complex else reals
