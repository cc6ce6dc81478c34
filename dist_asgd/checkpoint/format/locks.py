"""Locks that tell two writers of one path from a writer and what a crashed one has left.

A writer holds a lock (``flock``) on a file inside the directory, or on the unfinished file, that it writes. The system
gives the lock up when the process ends, however it ends, so a file whose lock is free was left by a crash. Nothing here
is collective: only the rank that makes a directory or a file holds its lock.

owner file   ``.writer`` in a directory that is being written. Its first line says which process writes; each further
             line was added by a process that wanted to write to the same path, and was refused
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

OWNER_NAME = ".writer"
# An owner file has one line for its writer and one for each that was refused.
MAX_OWNER_BYTES = 1 << 16
# Whoever looks at a lock holds it for a moment.
_TRIES, _PAUSE_S = 20, 0.01


def this_writer() -> str:
    """Return how another writer may tell its user of this process."""
    return f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"


@dataclass(frozen=True, slots=True)
class OwnerLock:
    """The lock of the process that writes a directory, from ``acquire`` to ``release``."""

    descriptor: int

    @classmethod
    def acquire(cls, directory: Path) -> OwnerLock:
        """Make the owner file of a new directory and lock it.

        Raises FileNotFoundError if the directory is not there any more, or if another process is removing it.
        """
        descriptor = os.open(directory / OWNER_NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            os.write(descriptor, owner_record())
            for _ in range(_TRIES):
                if _lock(descriptor) is not False:
                    break
                time.sleep(_PAUSE_S)
            else:
                raise FileNotFoundError(errno.ENOENT, "another process is removing it", str(directory))
            # The remover may have finished while this waited for its lock; then stat() finds no file.
            if not os.path.samestat(os.fstat(descriptor), os.stat(directory / OWNER_NAME)):
                raise FileNotFoundError(errno.ENOENT, "another process has removed it", str(directory))
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def release(self) -> None:
        """Give the lock up. Called once."""
        os.close(self.descriptor)

    def refused(self) -> list[str]:
        """Return the other writers that wanted to write to the same path while the lock was held."""
        return _writers(os.pread(self.descriptor, MAX_OWNER_BYTES, 0))[1:]


@contextlib.contextmanager
def lock_to_remove(directory: Path) -> Iterator[bool]:
    """Hold the lock of a leftover during the block, so that its writer cannot take it meanwhile.

    Yields False if a writer has it already, or the directory is gone: then it is not to be removed.
    """
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(directory / OWNER_NAME, flags, 0o666)
    except FileNotFoundError:
        yield False
        return
    try:
        # Another process may have removed the file between open() and lock, and a writer made its own in its place.
        yield _lock(descriptor) is not False and _is_at(descriptor, directory / OWNER_NAME)
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def owner_record(*, has_ended: bool = False) -> bytes:
    """Return the line of an owner file that says which process this is, or was if it ``has_ended`` to write."""
    pid = None if has_ended else os.getpid()
    record = {"writer": this_writer(), "host": socket.gethostname(), "pid": pid, "started": _start_of(os.getpid())}
    return json.dumps(record).encode() + b"\n"


def _start_of(pid: int) -> str | None:
    """Return when a process of this host has begun, in the system's own unit; None if the system does not tell.

    It tells a process from a later one of the same number: in containers numbers come again at every restart.
    """
    try:
        # The name of the program, in brackets, may hold anything. The start is the 20th word after it.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _lock(descriptor: int) -> bool | None:
    """Lock a file; returns False if another holds the lock, and None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _records(data: bytes) -> list[dict[str, object]]:
    records = []
    for line in data.splitlines():
        # A process that was killed may have written half a line.
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def _writers(data: bytes) -> list[str]:
    return [str(record.get("writer"))[:200] for record in _records(data)]


def writer_of(directory: Path) -> str | None:
    """Return which process is writing ``directory`` now, and let it know of this one; None if a crash has left it.

    On a file system without locks a writer on this host is recognised by its process; others are taken for crashed.
    """
    try:
        descriptor = os.open(directory / OWNER_NAME, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        locked = _lock(descriptor)
        if locked:
            return None
        data = os.pread(descriptor, MAX_OWNER_BYTES, 0)
        here, alive = _owner_state(data)
        # A process that was forked from the writer keeps the lock, also after the writer has died.
        if (here and not alive) or (locked is None and not here):
            return None
        with contextlib.suppress(OSError):
            os.write(descriptor, owner_record())
        return _owner_of(data)
    finally:
        os.close(descriptor)


def living_owner(data: bytes) -> str | None:
    """Return which process wrote an owner file, if it runs on this host; None if it has ended, or cannot be seen."""
    return _owner_of(data) if all(_owner_state(data)) else None


def _owner_of(data: bytes) -> str:
    return next(iter(_writers(data)), "another process")


def _owner_state(data: bytes) -> tuple[bool, bool]:
    """Whether the owner is a process of this host, and whether there is such a process now."""
    owner = next(iter(_records(data)), {})
    return owner.get("host") == socket.gethostname(), _is_alive(owner.get("pid"), owner.get("started"))


def _is_alive(pid: object, started: object) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return started is None or started == _start_of(pid)


def open_alone(path: Path) -> BinaryIO:
    """Open an unfinished file for writing from its beginning, locked until it is closed.

    What a crash has left there is overwritten. Raises ValueError if another process, or thread, is writing the file.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if _lock(descriptor) is False:
                raise ValueError(
                    f"dist_asgd: another process is writing {path} at the same time. Give each writer an output of its "
                    f"own, or wait until the other has finished."
                )
            # Between open() and lock the other writer may have given the file its final name.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    os.ftruncate(descriptor, 0)
                    return os.fdopen(descriptor, "wb")
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
