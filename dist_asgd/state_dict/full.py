"""The full state dict, in ``torch.optim.ASGD``'s own layout: ``consolidated_state_dict()`` builds it here."""

from __future__ import annotations

from torch import Tensor

from ..comm import Communicators
from ..comm.agreement import Fingerprint
from ..comm.rank_names import RankNames
from ..state import ParamShards
from .sharded import snapshots_of
from .whole_tensors import whole_state


def fingerprint_of(to: object, names: RankNames) -> tuple[Fingerprint, Exception | None]:
    """Return the fingerprint of the receiving rank, and a ValueError unless ``to`` is a rank or None.

    ``names`` are those of the optimizer's ranks, among which ``to`` is counted.
    """
    fingerprint = Fingerprint("targets of consolidated_state_dict()", [("to", to)], "Pass the same rank on every rank.")
    if to is None or (isinstance(to, int) and not isinstance(to, bool) and 0 <= to < len(names)):
        return fingerprint, None
    counted = "" if names.total == str(len(names)) else f" (counted inside the group, which has {names.total})"
    return fingerprint, ValueError(
        f"dist_asgd: consolidated_state_dict(to={to!r}): wanted a rank of the process group, 0 to {len(names) - 1}"
        f"{counted}, or None for all ranks."
    )


def collect_state(shards: ParamShards, communicators: Communicators, to: int | None) -> dict[int, dict[str, Tensor]]:
    """Return torch's ``state`` on rank ``to`` (None: on all ranks), on the CPU, and an empty dict on the others.

    Collective. Parameters that never stepped have no entry, as in torch. Rank ``to`` holds the result and one bucket,
    or one batch of DTensors; the other ranks hold what they send of it.
    """
    here = to is None or to == communicators.rank
    stepped = [member for member in shards.members if not shards.cohort_of[member.index].fresh]
    state = snapshots_of(stepped, shards.cohort_of) if here else {}
    for member, key, whole in whole_state(stepped, communicators, to, masters=True, one_by_one=False):
        state[member.index][key] = whole
    return state
