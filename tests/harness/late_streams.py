"""Streams of an imagined device on the CPU: what they are given runs as late as it may, or at once.

Inside ``offloaded_on_cpus`` averages with ``average_device="cpu"`` are handled as if their parameters lay on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from dist_asgd.comm.streams import Stream
from dist_asgd.storage import average
from dist_asgd.update import offload


class LateStream(Stream):
    """Runs the updates of tiles when the host waits for them, with the parameters that they read as late as they may.

    That is when the computing stream waits, after which parameters are others.
    """

    def __init__(self, _: torch.device) -> None:
        self._work: list[partial[None]] = []
        # The values of the parameters that a piece of work reads, once the computing stream has waited for it.
        self._read: list[list[Tensor]] = []

    @property
    def waiting(self) -> list[partial[None]]:
        """The updates of tiles that have not run."""
        return self._work

    @property
    def num_reads(self) -> int:
        """How many of them have read their parameters."""
        return len(self._read)

    def run(self, work: Callable[[], None], reads: Iterable[Tensor] = ()) -> None:
        """Keep ``work``, the update of a tile, for later."""
        assert isinstance(work, partial)
        self._work.append(work)

    def mark(self) -> Callable[[], None]:
        """A call that lets all work so far read its parameters."""
        return self._read_params

    def _read_params(self) -> None:
        for work in self._work[len(self._read) :]:
            self._read.append([param.clone() for param in work.args[0].params])

    @torch.no_grad()
    def synchronize(self) -> None:
        """Run all work so far."""
        self._read_params()
        while self._work:
            work, read = self._work.pop(0), self._read.pop(0)
            # With version counters of their own: the values come back, so that nobody has written the parameters.
            params: list[Tensor] = [param.data for param in work.args[0].params]
            now = [param.clone() for param in params]
            torch._foreach_copy_(params, read)
            work()
            torch._foreach_copy_(params, now)


class Runtime:
    """The calls of CUDA's runtime that lock and unlock memory; ``num_late`` counts memory unlocked while tiles wait."""

    def __init__(self) -> None:
        self.streams: list[LateStream] = []
        self.num_unlocked = self.num_late = 0

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        """Lock nothing."""
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        """Note what may still write the memory."""
        self.num_unlocked += 1
        self.num_late += any(tile.args[0].host.data_ptr() == address for s in self.streams for tile in s.waiting)
        return 0


@contextmanager
def offloaded_on_cpus(late: bool = True, tile_bytes: int = 256) -> Iterator[Runtime]:
    """Inside, ``average_device="cpu"`` has the effect on parameters on CPUs that it has on those on GPUs."""
    runtime = Runtime()

    def stream(device: torch.device) -> Stream:
        if not late:
            return Stream()
        runtime.streams.append(LateStream(device))
        return runtime.streams[-1]

    with (
        mock.patch.object(average, "is_offloaded", lambda _, asked: asked is not None),
        mock.patch.object(torch.cuda, "cudart", return_value=runtime),
        mock.patch.object(offload, "SideStream", stream),
        mock.patch.object(offload, "TILE_BYTES", tile_bytes),
    ):
        yield runtime
