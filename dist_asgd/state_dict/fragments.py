"""This rank's fragments of a loaded state dict: the memory that they need, and their values in the shards.

``StateDicts`` calls ``find_memory`` before the ranks agree on a load, and ``load_shards`` after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..storage.buffers import ShardedParam, StateBuffer
from ..storage.memory_order import as_real
from .load import ParsedStateDict


def _widest(loaded: ParsedStateDict, buffers: Sequence[StateBuffer]) -> dict[tuple[int, torch.dtype], torch.dtype]:
    """Return the dtypes of the averages that ``load_shards`` writes, by group and dtype of parameters."""
    widest: dict[tuple[int, torch.dtype], torch.dtype] = {}
    for buffer in buffers:
        key = (buffer.group_index, buffer.param_dtype)
        for member in buffer.members:
            entry = loaded.entries.get(member.index)
            own = buffer.average_dtype if entry is None else entry.average.dtype.to_real()
            widest[key] = torch.promote_types(widest.get(key, buffer.average_dtype), own)
    return widest


def find_memory(loaded: ParsedStateDict, buffers: Sequence[StateBuffer]) -> None:
    """Make the memory that averages need for a load, before ranks agree on it. No communication.

    Raises:
        RuntimeError: there is none.
    """
    widest = _widest(loaded, buffers)
    for buffer in buffers:
        dtype = widest[buffer.group_index, buffer.param_dtype]
        if buffer.lacks_memory(dtype):
            try:
                loaded.memory[id(buffer)] = buffer.new_average(dtype)
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise RuntimeError(
                    f"dist_asgd: there is no memory for the averages of a load, {buffer.layout.shard_numel:,} elements "
                    f"of {dtype} for parameter {buffer.members[0].name} and those beside it. Nothing was changed. Free "
                    f"some, or load on more ranks. ({error})"
                ) from None


def load_shards(loaded: ParsedStateDict, buffers: Sequence[StateBuffer]) -> list[StateBuffer]:
    """Write this rank's fragments of ``ax`` and of masters. No communication.

    Returns the state buffers in which loaded masters changed parameters; the caller gathers those. A parameter without
    a loaded master becomes its own master. If a loaded ``ax`` is wider than ``average_dtype``, the averages of all
    parameters of that group and dtype are kept in the wider dtype, so that the result does not depend on which of them
    share a buffer.
    """
    widest = _widest(loaded, buffers)
    for buffer in buffers:
        dtype = widest[buffer.group_index, buffer.param_dtype]
        buffer.overwrite_average(dtype, loaded.memory.get(id(buffer)))
        for member in buffer.members:
            entry = loaded.entries.get(member.index)
            average = buffer.average[member.fragment.start : member.fragment.stop]
            if entry is None:
                average.zero_()
            else:
                average.copy_(_fragment(entry.average, member, entry.sharded))
    return [buffer for buffer in buffers if _load_masters(loaded, buffer)]


def _fragment(value: Tensor, member: ShardedParam, sharded: bool) -> Tensor:
    """Return this rank's fragment of a loaded tensor, 1-D and real."""
    if sharded:
        reals = value.resolve_conj()
        return as_real(reals) if reals.is_complex() else reals
    return member.fragment_of(value)


def _load_masters(loaded: ParsedStateDict, buffer: StateBuffer) -> bool:
    """Write the loaded masters of a state buffer; return whether there were any, which is the same on all ranks."""
    buffer.reset_masters()
    found = False
    for member in buffer.members:
        entry = loaded.entries.get(member.index)
        if entry is not None and entry.master is not None:
            found = True
            member.set_masters(_fragment(entry.master, member, entry.sharded).float())
    return found
