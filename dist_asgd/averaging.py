"""Puts the averages in place of the parameters, and back, without a second copy of the model.

``ShardedASGD.averaged_parameters()`` does so with an ``Averages``. Each rank exchanges ``ax`` and the parameters in its
own shards, and gathers the parameters as after a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from .comm import PeerError
from .comm.agreement import CallsDiffer
from .gather import Gatherer
from .storage.buffers import ShardedParam, StateBuffer
from .update.operators import Updater
from .update.schedule import Cohort


class Averages:
    """Exchanges ``ax`` with every parameter whose averaging has begun, and remembers what was exchanged."""

    def __init__(self, updater: Updater, gatherer: Gatherer) -> None:
        self._updater = updater
        self._gatherer = gatherer
        # The state buffers that were gathered, each with the members of which this rank exchanged a fragment.
        self._swapped: list[tuple[StateBuffer, list[ShardedParam]]] = []
        # Copies of this rank's fragments of parameters whose ax has another dtype, by the member's index.
        self._kept: dict[int, Tensor] = {}
        self.is_swapped = False

    def refusal(self, call: str) -> RuntimeError:
        """The error of a call that is made while the averages are in place of the parameters."""
        return RuntimeError(
            f"dist_asgd: {call} inside averaged_parameters(): the parameters are the averages there, and the "
            f"state holds the parameters. Call it after the with block."
        )

    @contextmanager
    def in_place(
        self, state_buffers: Sequence[StateBuffer], cohort_of: dict[int, Cohort], leave: Callable[[], object]
    ) -> Iterator[None]:
        """Inside the block, the parameters are the averages. Entering and leaving are collective.

        ``cohort_of`` maps the index of each member to its cohort. ``leave`` is called on the way out, in order to make
        all ranks agree that they leave; it may raise on all of them.
        """
        try:
            self._swap_in(state_buffers, cohort_of)
            yield
        finally:
            try:
                leave()
            except (CallsDiffer, PeerError):
                # Other ranks are not on their way out: a gather would hang, so the averages stay.
                raise
            except Exception:
                # The other errors are raised on all ranks alike, so all can swap back before they raise.
                self._swap_back()
                raise
            self._swap_back()

    @torch.no_grad()
    def _swap_in(self, state_buffers: Sequence[StateBuffer], cohort_of: dict[int, Cohort]) -> None:
        """Put the averages in place of the parameters on every rank; ``ax`` keeps the parameters. Collective."""
        self.is_swapped = True
        for buffer in state_buffers:
            # Cohorts are the same on all ranks, and so is the decision which state buffers are gathered.
            begun = [member for member in buffer.members if cohort_of[member.index].begun]
            if begun:
                self._swapped.append((buffer, [member for member in begun if member.fragment.numel]))
                for member in self._swapped[-1][1]:
                    self._put_average(member)
                # This gather runs while the next state buffer is exchanged.
                self._gatherer.launch(buffer)
                buffer.on_params_written()
        self._gatherer.wait()

    @torch.no_grad()
    def _swap_back(self) -> None:
        """Undo ``_swap_in``, bit for bit. Collective."""
        swapped, self._swapped = self._swapped, []
        for buffer, members in swapped:
            for member in members:
                kept = self._kept.pop(member.index, None)
                if kept is None:
                    self._exchange(member)
                else:
                    member.param_range(member.fragment.start, member.fragment.stop).copy_(kept)
            self._gatherer.launch(buffer)
            buffer.on_params_written()
        self._gatherer.wait()
        self.is_swapped = False

    def _put_average(self, member: ShardedParam) -> None:
        """Put the average in place of this rank's fragment of a parameter."""
        average = member.bucket.average
        if average.dtype == member.bucket.dtype:
            self._exchange(member)
            return
        # An exchange would round a wider ax for good, so this rank's fragment of the parameter is copied instead.
        start, stop = member.fragment.start, member.fragment.stop
        param = member.param_range(start, stop)
        self._kept[member.index] = param.clone()
        param.copy_(average[start:stop])

    def _exchange(self, member: ShardedParam) -> None:
        """Exchange this rank's fragments of a parameter and of its ``ax``, through the update's scratch memory."""
        first, last = member.fragment.start, member.fragment.stop
        step = self._updater.scratch_numel(member.bucket)
        for start in range(first, last, step):
            stop = min(start + step, last)
            param, average = member.param_range(start, stop), member.bucket.average[start:stop]
            scratch = self._updater.scratch(param)
            scratch.copy_(param)
            param.copy_(average)
            average.copy_(scratch)


def refuse_differentiable() -> NoReturn:
    """Raise the RuntimeError of ``averaged_parameters()`` with ``differentiable=True``."""
    raise RuntimeError(
        "dist_asgd: averaged_parameters() with differentiable=True would cut autograd's graph. Read "
        "optimizer.state[p]['ax'], which has the parameter's shape in this mode."
    )


def average_from_now(groups: Sequence[dict[str, Any]], state: dict[Any, Any]) -> None:
    """Set ``t0`` of every group to its current step; ``start_averaging()`` does so."""
    for group in groups:
        steps = [state[param]["step"].item() for param in group["params"]]
        group["t0"] = max(steps, default=0.0)
