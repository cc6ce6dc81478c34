"""Flat memory on CPUs in huge pages: an entry of the processor's address tables stands for 2 MiB in place of 4 KiB.

An update reads and writes memory from one end to the other, so that small pages cost it a look-up every 4 KiB, and a
page fault each at the first time. Linux hands out huge pages where a program asks for them (its mode ``madvise``).
State buffers, buckets, gradient shards and send buffers are made here. Nothing here communicates.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# Less memory is left alone.
MIN_BYTES = 4 << 20
_FOLDER = Path("/sys/kernel/mm/transparent_hugepage")
# From so many bytes on zeros are fresh memory of the system, which takes memory when it is written.
MAPPED_BYTES = 1 << 18
_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14


def empty(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a tensor ``(numel,)`` of any values; on CPUs of huge pages, if it is large and the system has them."""
    size = page_bytes() if device.type == "cpu" and numel * dtype.itemsize >= MIN_BYTES else 0
    if not size:
        return torch.empty(numel, dtype=dtype, device=device)
    longer = torch.empty(numel + size // dtype.itemsize, dtype=dtype, device=device)
    # A tensor of a subclass may have no memory of its own.
    return _advised(longer, numel, size) if type(longer) is Tensor else longer[:numel]


def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a tensor ``(numel,)`` of zeros as ``empty`` does. On CPUs a large one takes memory when it is written."""
    num_bytes = numel * dtype.itemsize
    if device.type != "cpu" or num_bytes < MAPPED_BYTES or sys.platform != "linux":
        return torch.zeros(numel, dtype=dtype, device=device)
    size = page_bytes() if num_bytes >= MIN_BYTES else 0
    # Fresh memory of the system, which is zero. That of torch.zeros() is touched before anything can be asked for.
    memory = mmap.mmap(-1, num_bytes + size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    longer = torch.frombuffer(memory, dtype=dtype)
    return _advised(longer, numel, size) if size and type(longer) is Tensor else longer[:numel]


def let_go(tensor: Tensor) -> None:
    """Give the memory of ``tensor``, which no other process has and whose values nobody needs, back to the system.

    On Linux its whole pages take no memory until they are written again, and are zero; elsewhere nothing happens.
    """
    if tensor.device.type != "cpu" or type(tensor) is not Tensor or sys.platform != "linux":
        return
    begin, page = tensor.data_ptr(), mmap.PAGESIZE
    start, stop = -(-begin // page) * page, (begin + tensor.nbytes) // page * page
    if tensor.nbytes >= MAPPED_BYTES:
        _libc().madvise(start, stop - start, _MADV_DONTNEED)


@cache
def page_bytes() -> int:
    """The size of a huge page; 0 if this system has none, or does not hand them out to programs that ask."""
    if sys.platform != "linux":
        return 0
    try:
        mode = (_FOLDER / "enabled").read_text()
        size = int((_FOLDER / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0
    return size if "[madvise]" in mode or "[always]" in mode else 0


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


def _advised(longer: Tensor, numel: int, size: int) -> Tensor:
    """``numel`` elements of ``longer`` that begin at a huge page, of ``size`` bytes.

    What lies before and behind them is never touched, so that it takes addresses and no memory. Only whole huge pages
    are asked for: the last part of one stays in small pages.
    """
    begin = longer.data_ptr()
    start = -(-begin // size) * size
    tensor = longer[(start - begin) // longer.itemsize :][:numel]
    # A system that does not know the request answers with an error, and goes on with small pages.
    _libc().madvise(start, tensor.nbytes // size * size, _MADV_HUGEPAGE)
    return tensor
