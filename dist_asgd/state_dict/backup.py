"""Backups of an optimizer, with which a load that is refused after it has begun to write is undone.

Hooks that users register run while a load writes, and may raise on some ranks only. ``StateDicts.load`` and
``load_checkpoint()`` take a backup before they write, let all ranks agree afterwards, and put the backup back on every
rank if any has raised. A backup of a ``ShardedASGD`` is a copy, on the host, of this rank's shards of parameters,
averages and masters. Other optimizers replace their state when they load, so that it is enough to keep what they had.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..comm import Communicators
from ..gather import Gatherer
from ..gradients.checksums import checksum, on_host
from ..placements.presharded import PreshardedState
from ..state import ParamShards, own_entries
from ..storage.buffers import Bucket, StateBuffer
from ..storage.snapshots import mark_written
from ..update.schedule import Cohort


def find_unequal(buffers: Sequence[StateBuffer], communicators: Communicators) -> set[int]:
    """Return the ``id()`` of those ``buffers`` whose parameters are not the same on all ranks. Collective.

    They are buffers of parameters that every rank has whole, in the same order on all ranks.

    Ranks that have not stepped together may have started from other values. Each then keeps a whole copy of them, as
    the shards of all ranks would not bring its own values back.
    """
    if communicators.world_size == 1 or not buffers:
        return set()
    sums = [checksum(whole) for buffer in buffers for whole in _params_in(buffer, whole=True)]
    owners = [id(buffer) for buffer in buffers for _ in _params_in(buffer, whole=True)]
    return {owners[position] for position in communicators.host.differing(on_host(sums))}


class _BufferBackup:
    """A copy on the host of what a state buffer holds on this rank: average, masters, and parameters.

    Of parameters that every rank has whole it has this rank's shard, or all of them if ``whole``; none unless
    ``with_params``.
    """

    def __init__(self, buffer: StateBuffer, whole: bool, with_params: bool) -> None:
        self._buffer = buffer
        self._params_stand = buffer.params_stand
        self._average_dtype = buffer.average.dtype
        has_values = buffer.average_has_address and not buffer.params_stand
        self._average = _on_host(buffer.average) if has_values else None
        self._master = None if buffer.master is None else _on_host(buffer.master)
        self._pairs = [(live, _on_host(live)) for live in _params_in(buffer, whole) if with_params]

    def put_back(self) -> None:
        """Write everything back. No communication: the shards of other ranks have to be gathered afterwards."""
        buffer = self._buffer
        mark_written([member.param for member in buffer.members])
        for live, copy in self._pairs:
            live.copy_(copy)
        if self._average is None:
            buffer.forget_average(self._average_dtype)
        else:
            # The load may have made a wider one.
            buffer.overwrite_average(self._average_dtype)
            buffer.average.copy_(self._average)
        buffer.params_stand = self._params_stand
        if buffer.master is not None and self._master is not None:
            buffer.master.copy_(self._master)


def _params_in(buffer: StateBuffer, whole: bool) -> list[Tensor]:
    """Return the memory of the parameters in ``buffer`` that a backup copies."""
    if isinstance(buffer, Bucket):
        return [buffer.flat if whole else buffer.shard]
    assert isinstance(buffer, PreshardedState)
    return [
        member.param_range(member.fragment.start, member.fragment.stop)
        if member.is_whole and not whole
        else member.flat
        for member in buffer.members
    ]


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


class OptimizerBackup:
    """What an optimizer has before a load: parameters of its own, state, hyperparameters and own entries.

    Args:
        optimizer: any optimizer.
        shards: those of a ``ShardedASGD``; None for another optimizer, whose parameters the backup does not have.
        gatherer: that of the ``ShardedASGD``.
        whole: the ``id()`` of state buffers whose parameters are copied whole.
        with_params: False for an average whose parameters another backup has.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        shards: ParamShards | None = None,
        gatherer: Gatherer | None = None,
        whole: Collection[int] = (),
        with_params: bool = True,
    ) -> None:
        self._shards, self._gatherer = shards, gatherer
        self._torn_by = None if shards is None else shards.torn_by
        self._group_list = optimizer.param_groups
        self._groups = [(group, dict(group)) for group in self._group_list]
        self._state = optimizer.state
        # The dict of an entry and what it has: a load may change the one or replace it.
        self._entries = [(key, entry, _copy_of(entry, shards)) for key, entry in optimizer.state.items()]
        self._buffers: list[_BufferBackup] = []
        self._to_gather: list[StateBuffer] = []
        self._cohorts: list[Cohort] = []
        if shards is not None:
            self._buffers = [_BufferBackup(buffer, id(buffer) in whole, with_params) for buffer in shards.state_buffers]
            if with_params:
                self._to_gather = [buffer for buffer in shards.whole_buffers if id(buffer) not in whole]
            self._cohorts = [_as_now(c) for c in {id(c): c for c in shards.cohort_of.values()}.values()]

    @torch.no_grad()
    def put_back(self, optimizer: Optimizer) -> None:
        """Make the optimizer what it was. Collective for a ``ShardedASGD``: shards of parameters are gathered."""
        for group, values in self._groups:
            group.clear()
            group.update(values)
        self._group_list[:] = [group for group, _ in self._groups]
        optimizer.param_groups = self._group_list
        shards = self._shards
        if shards is None or self._gatherer is None:
            for _, entry, values in self._entries:
                if isinstance(entry, dict):
                    entry.clear()
                    entry.update(values)
            self._state.clear()
            self._state.update((key, entry) for key, entry, _ in self._entries)
            optimizer.state = self._state
            return
        for backup in self._buffers:
            backup.put_back()
        for buffer in self._to_gather:
            self._gatherer.launch(buffer)
        self._gatherer.wait()
        for buffer in shards.state_buffers:
            buffer.on_params_written()
        shards.rename(optimizer.param_groups)
        shards.replace_cohorts(self._cohorts)
        held = {id(member.param) for member in shards.held}
        state = optimizer.state
        # Published entries show the averages as they lie now; everything else is as it was.
        entries = {key: state[key] if id(key) in held else values for key, _, values in self._entries}
        for key, _, values in self._entries:
            if id(key) in held:
                entries[key].update(own_entries(values))
        state.clear()
        state.update(entries)
        shards.torn_by = self._torn_by


def _copy_of(entry: Any, shards: ParamShards | None) -> Any:
    """Return a copy of an entry of ``optimizer.state``; without the state of a ``ShardedASGD``, which is not read."""
    if not isinstance(entry, dict):
        return entry
    return dict(entry) if shards is None else own_entries(entry)


def _as_now(cohort: Cohort) -> Cohort:
    """Return a cohort that keeps the scalars of now when a load replaces all cohorts: the same one on the host."""
    if cohort.row is None:
        return cohort
    scalars = cohort.snapshot()
    fresh = cohort.initial and scalars["step"].item() == 0
    return Cohort(scalars["step"], scalars["eta"], scalars["mu"], cohort.indices, fresh)
