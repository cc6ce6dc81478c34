"""Page-locked host memory of just the size that is asked for: only such memory is filled at the speed of the bus.

torch's own allocator of pinned memory rounds each tensor up to a power of two bytes. Here all tensors of a state share
one mapping, which is locked as a whole and unlocked before it is freed. Copies for asynchronous saves and averages in
host memory lie in it.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)
# Every tensor begins at a multiple of it, so that its elements are aligned.
_ALIGNMENT = 64


class PinnedMemory:
    """One page-locked mapping. ``tensors`` are 1-D uint8 views of it, of the sizes that the constructor got.

    The memory stays locked as long as this object lives, and lives as long as any of its views.
    """

    def __init__(self, sizes_bytes: Sequence[int]) -> None:
        starts, total_bytes = [], 0
        for size_bytes in sizes_bytes:
            starts.append(total_bytes)
            total_bytes += -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = -(-total_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.tensors = [torch.empty(0, dtype=torch.uint8, device="cpu") for _ in sizes_bytes]
        if not self.nbytes:
            return
        # Anonymous memory begins at a page, so that no page is locked twice.
        memory = mmap.mmap(-1, self.nbytes)
        for position, (start, size_bytes) in enumerate(zip(starts, sizes_bytes, strict=True)):
            if size_bytes:
                self.tensors[position] = torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=size_bytes)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        error = int(runtime.cudaHostRegister(whole.data_ptr(), self.nbytes, 0))
        if error:
            # Copies from the device are right all the same, and slower.
            _LOG.warning(
                "%d bytes of host memory for copies from a device could not be page-locked (CUDA error %d): training "
                "waits longer for them. Raise the limit on locked memory (ulimit -l).",
                self.nbytes,
                error,
            )
        else:
            # The finalizer has the last reference, so that memory is unlocked before it is unmapped.
            weakref.finalize(self, _unlock, runtime, whole).atexit = False


def _unlock(runtime: Any, whole: Tensor) -> None:
    runtime.cudaHostUnregister(whole.data_ptr())
