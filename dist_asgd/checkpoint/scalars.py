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
    cohorts = {id(cohort_of[member.index]): cohort_of[member.index] for member in members}
    snapshots = {key: cohort.snapshot() for key, cohort in cohorts.items()}
    return {
        member.index: {key: scalar.clone() for key, scalar in snapshots[id(cohort_of[member.index])].items()}
        for member in members
    }
