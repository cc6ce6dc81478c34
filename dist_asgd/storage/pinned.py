"""Page-locked host memory of just the size that is asked for: only such memory is filled at the speed of the bus.

torch's own allocator of pinned memory rounds each tensor up to a power of two bytes. Here all tensors of a state share
one mapping, which is locked as a whole and unlocked before it is freed. Copies for asynchronous saves and averages in
host memory lie in it.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)
# Every tensor begins at a multiple of it, so that its elements are aligned.
_ALIGNMENT = 64


class HostWait(Protocol):
    """A stream, as far as it is needed here."""

    def synchronize(self) -> None:
        """Let the host wait until all work so far is done."""


class PinnedMemory:
    """One page-locked mapping. ``tensors`` are 1-D uint8 views of it, of the sizes that the constructor got.

    The memory stays locked as long as this object lives, and lives as long as any of its views.

    Raises:
        MemoryError: the system has none.
    """

    def __init__(self, sizes_bytes: Sequence[int]) -> None:
        # Streams that may still copy to the memory when it is let go of; the finalizer has the list, too.
        self._users: list[HostWait] = []
        starts, total_bytes = [], 0
        for size_bytes in sizes_bytes:
            starts.append(total_bytes)
            total_bytes += -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = -(-total_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.tensors = [torch.empty(0, dtype=torch.uint8, device="cpu") for _ in sizes_bytes]
        if not self.nbytes:
            return
        # Anonymous memory begins at a page, so that no page is locked twice.
        try:
            memory = mmap.mmap(-1, self.nbytes)
        except OSError as error:
            raise MemoryError(f"no {self.nbytes:,} bytes of host memory ({error})") from error
        for position, (start, size_bytes) in enumerate(zip(starts, sizes_bytes, strict=True)):
            if size_bytes:
                self.tensors[position] = torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=size_bytes)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = int(runtime.cudaHostRegister(whole.data_ptr(), self.nbytes, 0))
        if status:
            # Copies from the device are right all the same, and slower.
            _take_last_error()
            _LOG.warning(
                "%d bytes of host memory for copies from a device could not be page-locked (CUDA error %d): training "
                "waits longer for them. Raise the limit on locked memory (ulimit -l).",
                self.nbytes,
                status,
            )
        else:
            # The finalizer has the last reference, so that memory is unlocked before it is unmapped.
            # A collector of cycles calls it before any __del__, so that it has to wait for copies itself.
            weakref.finalize(self, _unlock, runtime, whole, self._users).atexit = False

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` begins where one of ``tensors`` does."""
        return any(own.data_ptr() == tensor.data_ptr() for own in self.tensors)

    def used_by(self, streams: Sequence[HostWait]) -> None:
        """Note the ``streams``, in place of those of an earlier call, whose work ends before the memory is unlocked."""
        self._users[:] = streams


def _unlock(runtime: Any, whole: Tensor, users: Sequence[HostWait]) -> None:
    for stream in users:
        stream.synchronize()
    runtime.cudaHostUnregister(whole.data_ptr())


def _take_last_error() -> None:
    """Take away the error that CUDA keeps of a refused call: torch would raise it at the next launch of a kernel."""
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda")
