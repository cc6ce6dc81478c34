"""Memory that the ranks of one host share: a file without a name, which each of them has mapped, and signals in it.

page    memory of the file; the kernel frees it once no process has it, also after SIGKILL
signal  a counter in the file that one rank writes and the others wait for (``pages.c``)

Ranks never guess by names that they share a host: each opens the file of the first one through the first one's process,
and finds a random number there that only that file has.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import secrets
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

ABI = 3
# The file begins with its proof and the signals, each in two cache lines of its own, because processors fetch lines in
# pairs.
LINE_BYTES = 128
_PROOF_BYTES = 16
# A rank that waits spins for so long before it sleeps: about what waking it up takes.
SPIN_NS = 50_000
# So often a rank that sleeps looks whether the one that it waits for has ended.
SLICE_NS = 50_000_000


@cache
def library() -> ctypes.CDLL | str:
    """Load the compiled functions of ``pages.c``; returns why there are none if they cannot be used."""
    folder = Path(__file__).parent
    found = next((file for suffix in EXTENSION_SUFFIXES if (file := folder / f"_pages{suffix}").exists()), None)
    if found is None:
        return "comm/pages.c was not compiled when dist_asgd was installed: install a C compiler, and dist_asgd again"
    try:
        loaded = ctypes.CDLL(str(found))
        word = ctypes.c_uint32
        loaded.dist_asgd_pages_abi.restype = ctypes.c_int64
        loaded.dist_asgd_memory_file.restype = ctypes.c_int64
        loaded.dist_asgd_process_descriptor.argtypes = [ctypes.c_int64]
        loaded.dist_asgd_process_descriptor.restype = ctypes.c_int64
        loaded.dist_asgd_signal.argtypes = [ctypes.c_void_p, word]
        loaded.dist_asgd_signal.restype = None
        loaded.dist_asgd_reached.argtypes = [ctypes.c_void_p, word]
        loaded.dist_asgd_reached.restype = ctypes.c_int64
        loaded.dist_asgd_await.argtypes = [ctypes.c_void_p, word, ctypes.c_int64, ctypes.c_int64]
        loaded.dist_asgd_await.restype = ctypes.c_int64
        for fold in (loaded.dist_asgd_fold_float32, loaded.dist_asgd_fold_float64):
            fold.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
            fold.restype = None
        abi = loaded.dist_asgd_pages_abi()
    except (OSError, AttributeError) as error:
        return f"{found.name} does not load ({error})"
    return loaded if abi == ABI else f"{found.name} is of another version of dist_asgd: install it again"


def _compiled() -> ctypes.CDLL:
    loaded = library()
    if isinstance(loaded, str):
        raise OSError(errno.ENOSYS, loaded)
    return loaded


def _opened(found: int) -> int:
    """The descriptor that a call has returned, which is not inherited by other programs; OSError if it failed."""
    if found < 0:
        raise OSError(-found, os.strerror(-found))
    return found


def memory_file() -> int:
    """Make a file without a name, of no bytes, and return its descriptor. OSError if the system forbids that."""
    return _opened(_compiled().dist_asgd_memory_file())


def host_of_this_process() -> str:
    """What processes have in common if they may see each other's memory: the kernel's boot, and the names of processes.

    OSError if the system does not tell.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


@dataclass(frozen=True)
class PageFile:
    """How other ranks find the file that a rank has made: its process, its descriptor there, and the file's proof."""

    process: int
    descriptor: int
    proof: bytes


class Pages:
    """A mapped file; ``memory`` is all of it, ``(nbytes,)`` uint8."""

    def __init__(self, descriptor: int, nbytes: int) -> None:
        """Map the file and close the descriptor, unless mapping fails: OSError then, and the caller closes it."""
        # torch keeps the mapping for as long as a tensor has memory in it.
        self.memory: Tensor = torch.frombuffer(mmap.mmap(descriptor, nbytes), dtype=torch.uint8)
        self.descriptor = descriptor

    @classmethod
    def new(cls, nbytes: int) -> tuple[Pages, PageFile]:
        """Make a file of ``nbytes`` bytes, none of which takes memory before it is written. OSError if that fails."""
        descriptor = memory_file()
        try:
            os.ftruncate(descriptor, nbytes)
            pages = cls(descriptor, nbytes)
        except BaseException:
            os.close(descriptor)
            raise
        proof = secrets.token_bytes(_PROOF_BYTES)
        pages.memory[:_PROOF_BYTES] = torch.frombuffer(bytearray(proof), dtype=torch.uint8)
        return pages, PageFile(os.getpid(), descriptor, proof)

    @classmethod
    def of(cls, file: PageFile, nbytes: int) -> Pages:
        """Map the file that another rank has made. OSError if it cannot be opened, or is another one."""
        descriptor = os.open(f"/proc/{file.process}/fd/{file.descriptor}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_size != nbytes:
                raise OSError(errno.ESTALE, "another file is there")
            pages = cls(descriptor, nbytes)
        except BaseException:
            os.close(descriptor)
            raise
        if bytes(pages.memory[:_PROOF_BYTES].tolist()) != file.proof:
            pages.close()
            raise OSError(errno.ESTALE, "another file is there")
        return pages

    def close(self) -> None:
        """Close the descriptor, once all ranks have mapped the file; the memory stays."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _process_descriptor(number: int) -> int:
    return _opened(_compiled().dist_asgd_process_descriptor(number))


class Processes:
    """The processes of the other ranks, of which this one learns when they end."""

    def __init__(self, numbers: Sequence[int], ranks: Sequence[int]) -> None:
        """``numbers`` are those of all ranks, and ``ranks`` how errors name them. OSError if one cannot be watched."""
        self.ranks = ranks
        self._descriptors: list[int] = []
        try:
            for number in numbers:
                self._descriptors.append(-1 if number == os.getpid() else _process_descriptor(number))
        except BaseException:
            self.close()
            raise

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Watch them no longer."""
        for descriptor in self._descriptors:
            if descriptor >= 0:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        self._descriptors = []

    def has_ended(self, rank: int) -> bool:
        """Whether the process of ``rank`` has ended, also if nobody has asked for its status yet."""
        if self._descriptors[rank] < 0:
            return False
        poll = select.poll()
        poll.register(self._descriptors[rank], select.POLLIN)
        return bool(poll.poll(0))


class Signals:
    """Counters in pages: each rank has one of each kind, which it alone sends; a number never decreases."""

    def __init__(
        self,
        pages: Pages,
        first_byte: int,
        processes: Processes,
        timeout_s: float,
        abandoned: Signals | None = None,
    ) -> None:
        """The counter of rank r lies ``r * LINE_BYTES`` after ``first_byte``.

        ``abandoned`` has a 1 of each rank for which nobody should wait any more.
        """
        self._library = _compiled()
        self._pages = pages  # whose mapping the addresses are in
        self._address = pages.memory.data_ptr() + first_byte
        self._processes = processes
        self._timeout_s = timeout_s
        self._abandoned = abandoned

    def send(self, rank: int, number: int) -> None:
        """Set this rank's counter; what it has written before can be read by whoever sees the number."""
        self._library.dist_asgd_signal(self._address + rank * LINE_BYTES, number & 0xFFFFFFFF)

    def has(self, rank: int, number: int) -> bool:
        """Whether the counter of ``rank`` has reached ``number``."""
        return bool(self._library.dist_asgd_reached(self._address + rank * LINE_BYTES, number & 0xFFFFFFFF))

    def wait_for(self, rank: int, number: int) -> None:
        """Wait until ``has``. RuntimeError if ``rank`` ends or abandons it, or the group's timeout passes."""
        line, wanted = self._address + rank * LINE_BYTES, number & 0xFFFFFFFF
        if self._library.dist_asgd_await(line, wanted, SPIN_NS, SLICE_NS):
            return
        deadline = time.monotonic() + self._timeout_s
        name = f"rank {self._processes.ranks[rank]}"
        # In slices, because a signal of Python (Ctrl-C) is handled only in between.
        while not self._library.dist_asgd_await(line, wanted, 0, SLICE_NS):
            # Whoever has ended may have sent its last signal just before.
            if self._processes.has_ended(rank) and not self.has(rank, number):
                raise RuntimeError(f"the process of {name} has ended")
            if self._abandoned is not None and self._abandoned.has(rank, 1) and not self.has(rank, number):
                raise RuntimeError(f"{name} was interrupted, or has failed, in such a call")
            if time.monotonic() > deadline:
                raise RuntimeError(f"timed out after {self._timeout_s:.0f} s of waiting for {name}")
