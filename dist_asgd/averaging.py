"""The averaged weights in place of the parameters, without a second copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .agreement import CallsDiffer
from .buffers import Bucket
from .comm import PeerError
from .gather import Gatherer
from .update.plan import Updater
from .update.schedule import Cohort


class Averages:
    """Exchanges, shard by shard, the parameters and ``ax`` of every parameter whose averaging has begun."""

    def __init__(self, updater: Updater, gatherer: Gatherer) -> None:
        self._updater = updater
        self._gatherer = gatherer
        self._swapped: list[tuple[Bucket, list[tuple[int, int]]]] = []
        self._kept: dict[int, Tensor] = {}
        self._inside = False

    def refuse(self, call: str) -> None:
        """RuntimeError while the averages are in place of the parameters."""
        if self._inside:
            raise RuntimeError(
                f"dist_asgd: {call} inside averaged_parameters(): the parameters are the averages there, and the "
                f"state holds the parameters. Call it after the with block."
            )

    @contextmanager
    def in_place(
        self, buckets: Sequence[Bucket], cohort_of: dict[int, Cohort], leave: Callable[[], object]
    ) -> Iterator[None]:
        """Inside, ``ax`` is the parameters. ``leave`` is what ranks agree by on the way out; it may raise on all."""
        try:
            self._swap_in(buckets, cohort_of)
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
    def _swap_in(self, buckets: Sequence[Bucket], cohort_of: dict[int, Cohort]) -> None:
        """Collective: ``ax`` becomes the parameters on every rank, and the parameters wait where ``ax`` was."""
        self._inside = True
        for bucket in buckets:
            begun = [member for member in bucket.members if cohort_of[member.index].begun]
            if not begun:
                continue
            ranges = [(m.piece.start, m.piece.stop) for m in begun if m.piece.numel]
            self._swapped.append((bucket, ranges))
            if bucket.average.dtype == bucket.dtype:
                self._exchange(bucket, ranges)
            else:
                # A wider average cannot hold the parameters and come back: keep this rank's shard beside it.
                self._kept[id(bucket)] = bucket.shard.clone()
                for start, stop in ranges:
                    bucket.shard[start:stop].copy_(bucket.average[start:stop])
            self._gatherer.launch(bucket)
        self._gatherer.wait()

    @torch.no_grad()
    def _swap_back(self) -> None:
        """Collective: undo ``_swap_in``, bit for bit."""
        swapped, self._swapped = self._swapped, []
        for bucket, ranges in swapped:
            kept = self._kept.pop(id(bucket), None)
            if kept is None:
                self._exchange(bucket, ranges)
            else:
                bucket.shard.copy_(kept)
            self._gatherer.launch(bucket)
        self._gatherer.wait()
        self._inside = False

    def _exchange(self, bucket: Bucket, ranges: Sequence[tuple[int, int]]) -> None:
        for first, last in ranges:
            step = self._updater.scratch_numel(bucket)
            for start in range(first, last, step):
                stop = min(start + step, last)
                param, average = bucket.shard[start:stop], bucket.average[start:stop]
                scratch = self._updater.scratch(param)
                scratch.copy_(param)
                param.copy_(average)
                average.copy_(scratch)
