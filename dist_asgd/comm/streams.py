"""The stream of a device on which gradients travel, beside the one that computes.

On GPUs a wait for a collective stops the stream that waits. If that is the stream that computes, backward stops until
gradients have arrived that nobody needs yet. So packing, reductions and what becomes of their results run on a stream
of their own, and the stream that computes waits where it reads a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class Stream:
    """Runs work at once, on the stream that computes: for the host, whose waits are those of messages."""

    def run(self, work: Callable[[], None], reads: Iterable[Tensor] = ()) -> None:
        """Run ``work`` after all that the computing stream has been given so far.

        ``reads`` are tensors of the computing stream that may be freed before the work has read them.
        """
        work()

    def mark(self) -> Callable[[], None] | None:
        """A call that lets the computing stream wait for all work so far; None if there is nothing to wait for."""
        return None

    def synchronize(self) -> None:
        """Let the host wait until all work so far is done."""


class SideStream(Stream):
    """Runs work on a stream of its own of a GPU. The host never waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, work: Callable[[], None], reads: Iterable[Tensor] = ()) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
        for tensor in reads:
            # Gradients are freed as soon as they are packed: their memory must not be given to the computing stream
            # before. Keeping references until an event has passed would need somebody to look at the event.
            tensor.record_stream(self._stream)

    def mark(self) -> Callable[[], None] | None:
        event = self._stream.record_event()
        return lambda: torch.cuda.current_stream(self._device).wait_event(event)

    def synchronize(self) -> None:
        self._stream.synchronize()


def stream_for(device: torch.device, contiguous: bool) -> Stream:
    """The stream for transfers of tensors on ``device``; ``contiguous`` is that of their collectives.

    Collectives that send each range by itself run on the host.
    """
    return SideStream(device) if device.type == "cuda" and contiguous else Stream()
