"""``step``, ``eta`` and ``mu`` of parameters, as state dicts have them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..buffers import Member
from ..update.schedule import Cohort


def snapshots_of(members: Sequence[Member], cohort_of: dict[int, Cohort]) -> dict[int, dict[str, Tensor]]:
    """Copies for each parameter index, on the host; where scalars are on a device, it is waited for once a cohort.

    Parameters share none: whoever loads into them must not write one through another.
    """
    together: dict[int, list[Member]] = {}
    for member in members:
        together.setdefault(id(cohort_of[member.index]), []).append(member)
    snapshots: dict[int, dict[str, Tensor]] = {member.index: {} for member in members}
    for alike in together.values():
        for key, scalar in cohort_of[alike[0].index].snapshot().items():
            # A tensor each, made at once.
            for member, copied in zip(alike, scalar.expand(len(alike)).clone().unbind(), strict=True):
                # As any other tensor, and no view to autograd.
                snapshots[member.index][key] = copied.data
    return snapshots
