"""``NonMonotonicTrigger``: validation losses decide when averaging begins, in the same call on all ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .comm import CollectiveCall, public_call
from .comm.agreement import Fingerprint
from .optimizer import ShardedASGD
from .placements.dtensor import is_dtensor
from .sharded_average import ShardedAverage

_KEYS = frozenset(("patience", "losses", "triggered"))


class NonMonotonicTrigger:
    """Begins averaging once the validation loss has stopped falling (NT-ASGD).

    With the losses v_1, ..., v_k of earlier calls of ``update()`` and the loss v of this one, averaging begins in the
    first call with::

        k > patience  and  v > min(v_1, ..., v_(k - patience))

    which is algorithm 1 of Merity, Keskar & Socher, Regularizing and Optimizing LSTM Language Models (arXiv
    1708.02182), as the authors' program computes it. So one of the last ``patience`` losses may be the lowest of all,
    and averaging begins if v is above the lowest of those before them.

    Until then ``t0`` (of a ``ShardedAverage``, ``start``) has to lie beyond the end of the run, as the default of
    ``ShardedASGD`` does: averaging that has begun already begins anew. Making a trigger sends nothing. ``update()`` is
    collective on the ranks of the optimizer.

    Args:
        optimizer: the ``ShardedASGD`` or ``ShardedAverage`` whose ``start_averaging()`` the trigger calls.
        patience: n in the algorithm, in calls of ``update()``; at least 1, and the same on all ranks.

    Raises:
        TypeError: the optimizer is neither of these, or ``patience`` no integer.
        ValueError: ``patience`` is below 1.
    """

    def __init__(self, optimizer: ShardedASGD | ShardedAverage, patience: int = 5) -> None:
        if not isinstance(optimizer, ShardedASGD | ShardedAverage):
            raise TypeError(
                f"dist_asgd: NonMonotonicTrigger calls start_averaging() of a ShardedASGD or ShardedAverage, and got "
                f"{type(optimizer).__qualname__}. Pass one of them itself, not what wraps it."
            )
        self._optimizer = optimizer
        self._patience = _checked_patience(patience)
        self._losses: list[float] = []
        self._triggered = False

    @property
    def patience(self) -> int:
        """How many of the last losses the minimum leaves out."""
        return self._patience

    @property
    def losses(self) -> tuple[float, ...]:
        """The losses of all calls of ``update()`` so far, each the mean over the ranks; the same on all ranks."""
        return tuple(self._losses)

    @property
    def triggered(self) -> bool:
        """Whether averaging has begun, in this run or in the one whose state was loaded."""
        return self._triggered

    @public_call
    def update(self, loss: float | Tensor) -> bool:
        """Log a validation loss, and begin averaging if the losses ask for it. Collective.

        Call it after each evaluation of the last iterate, outside of ``averaged_parameters()``. Ranks may pass
        different losses (each of its own share of the validation data, say): what counts is their mean, with equal
        weights. A mean that is not a number counts as infinity, so that a loss that has diverged is above all others.
        Once averaging has begun, losses are logged and change nothing.

        Args:
            loss: lower is better; a number, or a tensor with one element, which is read to the host.

        Returns:
            True in the call that begins averaging, and False in all others, on all ranks alike. ``triggered`` is True
            from that call on.

        Raises:
            TypeError, ValueError: ``loss`` is no real number on some rank, or ranks have logged other losses or have
                another ``patience``. Every rank raises, and nothing is logged.
            RuntimeError: the call is made inside ``averaged_parameters()``, or ranks make different calls.
            PeerError: a rank does not call it within the process group's timeout.
        """
        optimizer = self._optimizer
        optimizer.averages.refuse_inside(CollectiveCall.UPDATE_TRIGGER.text)
        optimizer.adopt_params()
        problem, value = None, 0.0
        try:
            value = _value_of(loss)
        except Exception as error:
            problem = error
        optimizer.gradients.agree(CollectiveCall.UPDATE_TRIGGER, self._fingerprint(), problem)
        words = torch.tensor([value], dtype=torch.float64, device="cpu").view(torch.int64)
        values = optimizer.communicators.host.exchange(words).view(torch.float64).flatten().tolist()
        # It is exact until it is rounded once: the mean of equal losses is that loss, for any number of ranks.
        mean = float(statistics.mean(values))
        mean = math.inf if math.isnan(mean) else mean
        earlier = self._losses[: -self._patience]
        begins = not self._triggered and bool(earlier) and mean > min(earlier)
        if begins:
            optimizer.start_averaging()
        self._losses.append(mean)
        self._triggered = self._triggered or begins
        return begins

    def _fingerprint(self) -> Fingerprint:
        entries = [("patience", self._patience), ("triggered", self._triggered), ("losses", tuple(self._losses))]
        remedy = "Give every rank the same patience, and load the same state_dict() on every rank, or on none."
        return Fingerprint("the states of NonMonotonicTrigger", entries, remedy)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values, the same on all ranks: ``extra=`` of ``save_checkpoint()`` takes it.

        Its keys are ``patience``, ``losses`` (a list of floats) and ``triggered``. No communication.
        """
        return {"patience": self._patience, "losses": list(self._losses), "triggered": self._triggered}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the state that ``state_dict()`` gave; ``patience`` comes from there too, as options of optimizers do.

        No communication: call it with the same state on every rank, which ``load_checkpoint()`` returns. The
        optimizer's ``t0`` is in its own state. ValueError if it is no such state; then nothing changes.
        """
        keys = set(state_dict) if isinstance(state_dict, Mapping) else None
        if keys != _KEYS:
            raise ValueError(
                f"dist_asgd: a state of NonMonotonicTrigger has the keys {sorted(_KEYS)}, and this one has "
                f"{type(state_dict).__qualname__ if keys is None else sorted(map(str, keys))}. Pass what state_dict() "
                f"has returned."
            )
        patience, triggered = state_dict["patience"], state_dict["triggered"]
        try:
            losses = [_value_of(loss) for loss in state_dict["losses"]]
            patience = _checked_patience(patience)
        except (TypeError, ValueError) as error:
            raise ValueError(f"dist_asgd: no state of NonMonotonicTrigger: {error}") from error
        if not isinstance(triggered, bool) or any(map(math.isnan, losses)):
            raise ValueError(
                f"dist_asgd: no state of NonMonotonicTrigger: triggered is {triggered!r}, losses are {losses}. Pass "
                f"what state_dict() has returned."
            )
        self._patience, self._losses, self._triggered = patience, losses, triggered


def _checked_patience(patience: object) -> int:
    if isinstance(patience, bool) or not isinstance(patience, int):
        raise TypeError(f"dist_asgd: patience is a number of calls of update(), an int, and not {patience!r}.")
    if patience < 1:
        raise ValueError(
            f"dist_asgd: patience is {patience}, and must be at least 1: the loss is compared with those before the "
            f"last `patience` ones."
        )
    return patience


def _value_of(loss: object) -> float:
    """The loss as a float; TypeError or ValueError if it is no real number."""
    if is_dtensor(loss):
        raise ValueError("dist_asgd: the loss is a DTensor, of which a rank may hold a share: pass loss.full_tensor().")
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(
                f"dist_asgd: the loss has shape {tuple(loss.shape)}, and must have one element: pass its mean."
            )
        loss = loss.item()
    if isinstance(loss, bool) or not isinstance(loss, Real):
        raise TypeError(f"dist_asgd: the loss is {loss!r}, and must be a real number or a tensor with one element.")
    return float(loss)
