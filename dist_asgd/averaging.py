"""The averaged weights in place of the parameters, without a second copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .comm import PeerError
from .comm.agreement import CallsDiffer
from .gather import Gatherer
from .storage.buffers import ShardedParam, StateBuffer
from .update.operators import Updater
from .update.schedule import Cohort


class Averages:
    """Exchanges, shard by shard, the parameters and ``ax`` of every parameter whose averaging has begun."""

    def __init__(self, updater: Updater, gatherer: Gatherer) -> None:
        self._updater = updater
        self._gatherer = gatherer
        self._swapped: list[tuple[StateBuffer, list[ShardedParam]]] = []
        self._kept: dict[int, Tensor] = {}
        self.is_swapped = False

    def refuse(self, call: str) -> None:
        """RuntimeError while the averages are in place of the parameters."""
        if self.is_swapped:
            raise RuntimeError(
                f"dist_asgd: {call} inside averaged_parameters(): the parameters are the averages there, and the "
                f"state holds the parameters. Call it after the with block."
            )

    @contextmanager
    def in_place(
        self, stores: Sequence[StateBuffer], cohort_of: dict[int, Cohort], leave: Callable[[], object]
    ) -> Iterator[None]:
        """Inside, ``ax`` is the parameters. ``leave`` is what ranks agree by on the way out; it may raise on all."""
        try:
            self._swap_in(stores, cohort_of)
            yield
        finally:
            try:
                leave()
            except (CallsDiffer, PeerError):
                raise
            except Exception:
                # Raised on all ranks alike: nothing keeps them from swapping back first.
                self._swap_back()
                raise
            self._swap_back()

    @torch.no_grad()
    def _swap_in(self, stores: Sequence[StateBuffer], cohort_of: dict[int, Cohort]) -> None:
        """Collective: ``ax`` becomes the parameters on every rank, and the parameters wait where ``ax`` was."""
        self.is_swapped = True
        for store in stores:
            begun = [member for member in store.members if cohort_of[member.index].begun]
            if begun:
                self._swapped.append((store, [member for member in begun if member.fragment.numel]))
                for member in self._swapped[-1][1]:
                    self._put_average(member)
                self._gatherer.launch(store)
                store.on_params_written()
        self._gatherer.wait()

    @torch.no_grad()
    def _swap_back(self) -> None:
        """Collective: undo ``_swap_in``, bit for bit."""
        swapped, self._swapped = self._swapped, []
        for store, members in swapped:
            for member in members:
                kept = self._kept.pop(member.index, None)
                if kept is None:
                    self._exchange(member)
                else:
                    member.param_range(member.fragment.start, member.fragment.stop).copy_(kept)
            self._gatherer.launch(store)
            store.on_params_written()
        self._gatherer.wait()
        self.is_swapped = False

    def _put_average(self, member: ShardedParam) -> None:
        average = member.bucket.average
        if average.dtype == member.bucket.dtype:
            self._exchange(member)
            return
        # A wider average cannot hold the parameters and come back: keep this rank's part of them beside it.
        start, stop = member.fragment.start, member.fragment.stop
        param = member.param_range(start, stop)
        self._kept[member.index] = param.clone()
        param.copy_(average[start:stop])

    def _exchange(self, member: ShardedParam) -> None:
        first, last = member.fragment.start, member.fragment.stop
        step = self._updater.scratch_numel(member.bucket)
        for start in range(first, last, step):
            stop = min(start + step, last)
            param, average = member.param_range(start, stop), member.bucket.average[start:stop]
            scratch = self._updater.scratch(param)
            scratch.copy_(param)
            param.copy_(average)
            average.copy_(scratch)
