"""Counts what an optimizer has done on this rank, for ``ShardedASGD.stats()``: steps, bytes that were sent, and waits.

Bytes and waits come from the meters of ``Communicators``; ``StepCounts`` adds the steps.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import astuple, dataclass
from typing import Protocol

import torch
from torch import Tensor

from .comm import Communicators
from .update.batch import StepContext


@dataclass(frozen=True, slots=True)
class Stats:
    """What this rank has done since the optimizer was constructed, or since the last ``stats(reset=True)``.

    Bytes are payload that this rank has handed to other ranks: what three ranks get counts three times, and what it has
    received does not count. So it is with messages and with shared memory. Collectives of other backends than Gloo
    (NCCL) count as a ring sends them, because nobody sees their messages. In stage 1 gradients are sent by DDP, and do
    not count.

    Seconds are those in which the host stood still until other ranks had come or their messages had arrived. On GPUs a
    wait for gradients or parameters stops a stream and not the host, and takes no time here: a trace shows it.

    Attributes:
        steps: Steps in which parameters were updated. Calls of ``step()`` in which no parameter has a gradient do not
            count, and neither do replays of a CUDA graph.
        skipped_steps: Calls of ``step()`` that changed nothing, because a gradient had overflowed. (A scaler of torch
            that does not call ``step()`` then leaves no trace here.)
        sent_gradient_bytes: Bytes of gradients, for reduce-scatters and, with ``mesh``, for all-reduces across.
        sent_parameter_bytes: Bytes of parameters, for gathers after updates, loads, and in ``averaged_parameters()``.
        sent_control_bytes: Bytes of the words by which ranks agree, and of norms and flags.
        sent_other_bytes: Bytes of all else: state that state dicts gather, gradients for ranks that have joined or for
            shards that are built anew, and everything that is sent for a save.
        waited_gradient_s: Seconds of waits for gradients.
        waited_parameter_s: Seconds of waits for parameters.
        waited_control_s: Seconds of waits for the words by which ranks agree: for the slowest rank.
        waited_other_s: Seconds of waits for all else. Saves in the background wait in a thread of their own.
    """

    steps: int
    skipped_steps: int
    sent_gradient_bytes: int
    sent_parameter_bytes: int
    sent_control_bytes: int
    sent_other_bytes: int
    waited_gradient_s: float
    waited_parameter_s: float
    waited_control_s: float
    waited_other_s: float

    def since(self, before: Stats) -> Stats:
        """Return what was counted after ``before``, which is earlier stats of the same optimizer."""
        return Stats(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))


class StepCounts:
    """The steps of one optimizer, beside what its ``communicators`` have counted. Nothing here communicates."""

    def __init__(self, communicators: Communicators) -> None:
        """Begin now: what was sent before does not count."""
        self._meter, self._background_meter = communicators.meter, communicators.background_meter
        self._steps = self._skipped_steps = 0
        # How many of the steps the device has skipped by itself: 0-dim int64 there, which the host reads on request.
        self._skipped_on_device: Tensor | None = None
        self._before = self._total()

    def add(self, active: Collection[int], step: StepContext | None) -> None:
        """Count a step of the parameters in ``active``; ``step`` is None if it was skipped. Nobody waits for a device.

        Called at the end of each step.
        """
        if not active:
            return
        if step is None:
            self._skipped_steps += 1
            return
        self._steps += 1
        found_inf = step.found_inf
        if found_inf is not None and not (found_inf.is_cuda and torch.cuda.is_current_stream_capturing()):
            skipped = found_inf.ne(0).sum()
            self._skipped_on_device = skipped if self._skipped_on_device is None else self._skipped_on_device + skipped

    def add_whole(self, any_active: bool) -> None:
        """Count a step of ``differentiable=True``, in which nothing is sharded, unless no parameter has a gradient."""
        self._steps += any_active

    def stats(self, reset: bool) -> Stats:
        """Return what was counted since the last ``reset``."""
        now = self._total()
        found = now.since(self._before)
        if reset:
            self._before = now
        return found

    def _total(self) -> Stats:
        on_device = 0 if self._skipped_on_device is None else int(self._skipped_on_device.item())
        sent, waited = self._meter.sent_bytes, self._meter.waited_s
        # Of the threads that save beside training even control words are no part of a step.
        others = self._background_meter
        return Stats(
            steps=self._steps - on_device,
            skipped_steps=self._skipped_steps + on_device,
            sent_gradient_bytes=sent["gradients"],
            sent_parameter_bytes=sent["parameters"],
            sent_control_bytes=sent["control"],
            sent_other_bytes=sent["other"] + sum(others.sent_bytes.values()),
            waited_gradient_s=waited["gradients"],
            waited_parameter_s=waited["parameters"],
            waited_control_s=waited["control"],
            waited_other_s=waited["other"] + sum(others.waited_s.values()),
        )


class HasCounts(Protocol):
    """What ``stats`` needs of an optimizer."""

    counts: StepCounts


def stats(self: HasCounts, reset: bool = False) -> Stats:
    """Count steps, the bytes that this rank has sent, and the seconds that it has waited, since construction.

    Not collective: each rank counts its own. If overflows are found on a CUDA device, it waits for that device.

    Args:
        reset: begin anew: the next call counts from now on.
    """
    return self.counts.stats(reset)
