"""No gradients: ``ShardedAverage`` reads none, and agrees with the other ranks all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from torch import Tensor

from ..comm import Communicators
from ..comm.agreement import NO_FINGERPRINT, Agreement, Fingerprint
from ..comm.reports import CollectiveCall, RankReports
from ..storage.buffers import StateBuffer
from .base import Gradients

# The calls that make or replace the state, whatever it is now.
_BEFORE_STATE = (
    CollectiveCall.CONSTRUCT,
    CollectiveCall.LOAD_STATE_DICT,
    CollectiveCall.LOAD_CHECKPOINT,
    CollectiveCall.RESTORE_CHECKPOINT,
)


class NoGradients(Gradients):
    """The gradients of an optimizer that takes none: a way to agree, and nothing to reduce, clip or scale."""

    def __init__(
        self, agreement: Agreement, communicators: Communicators, entries: Callable[[], list[tuple[str, object]]]
    ) -> None:
        """``entries`` are what updates, which send nothing, go by and lead to: ranks compare them in other calls."""
        super().__init__(agreement, communicators)
        self._entries = entries

    def agree(
        self, call: CollectiveCall, fingerprint: Fingerprint = NO_FINGERPRINT, problem: Exception | None = None
    ) -> RankReports:
        if call not in _BEFORE_STATE and problem is None:
            remedy = fingerprint.remedy or "Call update() equally often on every rank, with the same t0 and rule."
            fingerprint = Fingerprint(fingerprint.what or "averages", [*self._entries(), *fingerprint.entries], remedy)
        return self.agreement.agree(call, fingerprint, problem=problem)

    def present(self, reports: RankReports) -> frozenset[int]:
        return frozenset()

    def active(self, reports: RankReports) -> frozenset[int]:
        return frozenset()

    def wait_for(self, buffer: StateBuffer) -> None:
        """Do nothing: no gradient is on its way."""

    def end_step(self) -> None:
        """Do nothing: no gradient is kept."""

    def clear(self, set_to_none: bool) -> None:
        """Do nothing: gradients are those of another optimizer."""

    def keep(self) -> None:
        """Do nothing: gradients are those of another optimizer."""

    def apply_pending(self) -> None:
        """Do nothing: no factor is ever pending."""

    def unscale(self, inverse: Tensor) -> NoReturn:
        raise RuntimeError("dist_asgd: a ShardedAverage has no gradients to unscale: pass the optimizer that steps.")

    def held(self) -> list[Tensor]:
        return []
