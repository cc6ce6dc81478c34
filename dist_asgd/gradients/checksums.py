"""Checksums of bits: by them ranks compare gradients (stage 1) and starting values before the first step."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import Tensor

from ..comm import Communicators
from ..comm.reports import digest_of
from ..placements.presharded import PreshardedState, is_presharded
from ..storage.buffers import BucketParam
from ..storage.frozen import FrozenParam
from ..storage.memory_order import flattened, memory_strides
from ..validation import has_memory
from .base import Gradients

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PRIME = 1_000_003
# Elements that are hashed at a time, each with three temporary int64: they fit a CPU core's cache; on accelerators they
# bound the memory.
_CPU_NUMEL, _ACCELERATOR_NUMEL = 1 << 16, 1 << 22


def _numel_at_a_time(flat: Tensor) -> int:
    return _CPU_NUMEL if flat.is_cpu else _ACCELERATOR_NUMEL


def checksum(flat: Tensor) -> Tensor:
    """Hash the bits of a 1-D real tensor, order included: a weighted sum modulo 2^64, as 0-dim int64 on its device."""
    integers = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    step = _numel_at_a_time(flat)
    for start in range(0, integers.numel(), step):
        part = integers[start : start + step].long()
        weights = torch.arange(start + 1, start + 1 + part.numel(), device=flat.device)
        total += (part * (weights * _PRIME + 1)).sum()
    return total


def on_host(values: Sequence[Tensor]) -> Tensor:
    """Bring 0-dim int64 ``values`` to the host, ``(n,)`` in their order; waits once for each device."""
    by_device: dict[torch.device, list[int]] = {}
    for position, value in enumerate(values):
        by_device.setdefault(value.device, []).append(position)
    found = torch.zeros(len(values), dtype=torch.int64, device="cpu")
    for positions in by_device.values():
        found[positions] = torch.stack([values[position] for position in positions]).cpu()
    return found


def digest(flats: Sequence[Tensor]) -> int:
    """Hash the bits of 1-D real tensors, order included, in few passes on their devices; waits once for each device.

    Ranks with equal tensors on devices of one kind get equal digests.
    """
    # Small tensors are hashed together: a model has hundreds, and each pass takes several launches.
    batches: list[list[Tensor]] = []
    last_kind, left = None, 0
    for flat in flats:
        kind = (flat.device, flat.element_size())
        left -= flat.numel()
        if kind != last_kind or left < 0:
            batches.append([])
            last_kind, left = kind, _numel_at_a_time(flat) - flat.numel()
        batches[-1].append(flat)
    return digest_of(on_host([_checksum_of_all(batch) for batch in batches]).tolist())


def _checksum_of_all(flats: Sequence[Tensor]) -> Tensor:
    """The checksum of tensors of one device and element size, one after the other."""
    if len(flats) == 1:
        return checksum(flats[0])
    return checksum(torch.cat([flat.view(_INTEGERS[flat.element_size()]) for flat in flats]))


def hexadecimal(checksum_value: int) -> str:
    """Write a checksum for an error, all 64 bits of it: two that differ may have equal halves."""
    return f"{checksum_value & 0xFFFFFFFFFFFFFFFF:016x}"


def compare_values(
    gradients: Gradients,
    frozen: Sequence[FrozenParam],
    communicators: Communicators,
    indices: Container[int] | None = None,
) -> None:
    """Raise on every rank if parameters do not have the same values on all. Collective.

    Called at the first step; and at a step after some bucket parameters were rebound, with their ``indices``, the same
    on all ranks. ``frozen`` has the parameters that lie in no state buffer.
    """
    _compare_plain(gradients, frozen, communicators, indices)
    if indices is None:
        _compare_replicas(gradients, communicators)


def _compare_replicas(gradients: Gradients, communicators: Communicators) -> None:
    """Raise if the ranks of a replica group, each of which updates a fragment, do not hold the same local tensor."""
    if not gradients.presharded:
        return
    # Replicas compare one digest first, and all ranks hear whether any of these differ. A row for each parameter is
    # exchanged only to say which one does.
    differs = [not _replicas_agree(buffer) for buffer in gradients.presharded_states if buffer.replicas is not None]
    if not communicators.host.any_of(any(differs)):
        return
    # A replica group is named by its first rank: ranks outside of its mesh know nothing of it, and raise all the same.
    zero = torch.zeros((), dtype=torch.int64, device="cpu")
    shared = [-1 if m.bucket.replicas is None else m.bucket.replicas.ranks[0] for m in gradients.presharded]
    sums = on_host([zero if m.bucket.replicas is None else checksum(m.flat) for m in gradients.presharded])
    rows = torch.stack((torch.tensor(shared, device="cpu"), sums), dim=1)
    table = communicators.host.exchange(rows.flatten()).view(communicators.world_size, -1, 2).tolist()
    for position, member in enumerate(gradients.presharded):
        by_group: dict[int, dict[int, int]] = {}
        for rank, row in enumerate(table):
            first, value = row[position]
            by_group.setdefault(first, {})[rank] = value
        for values in by_group.values():
            if len(set(values.values())) > 1:
                raise RuntimeError(
                    f"dist_asgd: parameter {member.name} does not start from the same values on "
                    f"{communicators.names.describe(list(values))}, which hold the same part of it: checksums "
                    f"{', '.join(map(hexadecimal, values.values()))}. Seed these ranks alike "
                    f"before building the model, or broadcast its parameters from one of them."
                )


def _replicas_agree(buffer: PreshardedState) -> bool:
    """Whether all ranks of a replica group have the same local tensors in ``buffer``. Collective on these ranks."""
    assert buffer.replicas is not None
    own = digest([member.flat for member in buffer.members])
    # The largest digest and, as the complement, the smallest.
    both = torch.full((2,), own, dtype=torch.int64, device=buffer.device)
    both[1].bitwise_not_()
    largest, complement = buffer.replicas.on(buffer.device).reduce_scalars(both, "max").tolist()
    return bool(largest == ~complement)


def _values(member: BucketParam | FrozenParam) -> Tensor:
    """The values of a plain parameter as 1-D reals; of a frozen one none, if it has none that can be compared."""
    if isinstance(member, BucketParam):
        return member.bucket.flat[member.slot.offset : member.slot.stop]
    param = member.param
    # Ranks have other parts of a presharded one, and quantised weights have no memory of their own.
    if is_presharded(param) or not has_memory(param):
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return flattened(param, memory_strides(param))


def _compare_plain(
    gradients: Gradients, frozen: Sequence[FrozenParam], communicators: Communicators, indices: Container[int] | None
) -> None:
    """Raise if a plain parameter, of ``indices`` if given, does not have the same values on all ranks."""
    every: list[BucketParam | FrozenParam] = [*gradients.members, *frozen]
    plain = (member for member in every if indices is None or member.index in indices)
    members = sorted(plain, key=lambda m: m.index)
    if not members:
        return
    values = [_values(member) for member in members]
    # One word first: the others are sent only to say which parameter differs.
    if not communicators.host.differing(torch.tensor([digest(values)], device="cpu")):
        return
    sums = on_host([checksum(value) for value in values])
    differing = communicators.host.differing(sums)
    if not differing:
        return
    first = differing[0]
    column = communicators.host.exchange(sums[first : first + 1]).flatten().tolist()
    shown = [f"checksum {hexadecimal(value)}" for value in column]
    verb = "does not start from" if indices is None else "was re-bound (p.data = ...), and does not have"
    raise RuntimeError(
        f"dist_asgd: parameter {members[first].name} {verb} the same values on all ranks: "
        f"{communicators.names.by_value(shown)}. Seed every rank alike before building the model, or broadcast its "
        f"parameters from one rank."
    )
