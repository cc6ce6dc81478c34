"""Checksums of bits: by them ranks compare gradients (stage 1) and starting values before the first step."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import Tensor

from ..comm import Communicators
from ..comm.reports import digest_of
from ..placements.presharded import is_presharded
from ..storage.buffers import BucketParam
from ..storage.frozen import FrozenParam
from ..storage.memory_order import flattened, memory_strides
from ..validation import has_memory
from .base import Gradients

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PRIME = 1_000_003


def checksum(flat: Tensor) -> Tensor:
    """Hash the bits of a 1-D real tensor, order included: a weighted sum modulo 2^64, as 0-dim int64 on its device."""
    integers = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, integers.numel(), 1 << 16):
        part = integers[start : start + (1 << 16)].long()
        weights = torch.arange(start + 1, start + 1 + part.numel(), device=flat.device)
        total += (part * (weights * _PRIME + 1)).sum()
    return total


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
    # A replica group is named by its first rank: ranks outside of its mesh know nothing of it, and raise all the same.
    rows = [
        torch.stack((torch.tensor(m.bucket.replicas.ranks[0], device="cpu"), checksum(m.flat).cpu()))
        if m.bucket.replicas is not None
        else torch.tensor([-1, 0], device="cpu")
        for m in gradients.presharded
    ]
    table = communicators.host.exchange(torch.cat(rows)).view(communicators.world_size, -1, 2).tolist()
    for position, member in enumerate(gradients.presharded):
        sums: dict[int, dict[int, int]] = {}
        for rank, row in enumerate(table):
            first, value = row[position]
            sums.setdefault(first, {})[rank] = value
        for values in sums.values():
            if len(set(values.values())) > 1:
                raise RuntimeError(
                    f"dist_asgd: parameter {member.name} does not start from the same values on "
                    f"{communicators.names.describe(list(values))}, which hold the same part of it: checksums "
                    f"{', '.join(map(hexadecimal, values.values()))}. Seed these ranks alike "
                    f"before building the model, or broadcast its parameters from one of them."
                )


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
    values = [checksum(_values(m)) for m in members]
    # On one device, in order to wait for it once.
    sums = torch.stack([value.to(values[0].device) for value in values]).cpu()
    # One word first: the others are sent only to say which parameter differs.
    if not communicators.host.differing(torch.tensor([digest_of(sums.tolist())], device="cpu")):
        return
    first = communicators.host.differing(sums)[0]
    column = communicators.host.exchange(sums[first : first + 1]).flatten().tolist()
    shown = [f"checksum {hexadecimal(value)}" for value in column]
    verb = "does not start from" if indices is None else "was re-bound (p.data = ...), and does not have"
    raise RuntimeError(
        f"dist_asgd: parameter {members[first].name} {verb} the same values on all ranks: "
        f"{communicators.names.by_value(shown)}. Seed every rank alike before building the model, or broadcast its "
        f"parameters from one rank."
    )
