"""Files of one checkpoint directory: names that stay inside it, and sizes known before memory is taken."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

_NAME = re.compile(r"[A-Za-z0-9._\-]{1,255}")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, incomplete, or holds what no checkpoint of this kind holds."""


def check_name(name: object) -> str:
    """``name`` if it is that of a file right inside the directory: no folders, no ``..``, nothing to quote.

    ValueError otherwise, to be said with the place where the name was found.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (".", ".."):
        shown = repr(name[:80]) if isinstance(name, str) else type(name).__name__
        raise ValueError(
            f"a file named {shown}; files of a checkpoint lie right inside its directory, with names of letters, "
            f"digits, '.', '_' and '-'"
        )
    return name


def open_confined(directory: Path, name: str) -> tuple[BinaryIO, int]:
    """Open ``directory/name`` for reading, and say how many bytes it has; CheckpointError where it cannot.

    ``name`` has passed ``check_name``. Links, devices and pipes are refused, whatever they lead to.
    """
    path = directory / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"dist_asgd: {path} is missing: the checkpoint is not whole.") from None
    except OSError as error:
        if path.is_symlink():
            raise CheckpointError(
                f"dist_asgd: {path} is a symbolic link. A checkpoint holds its own files: copy them into a directory."
            ) from None
        raise CheckpointError(f"dist_asgd: cannot open {path}: {error.strerror}.") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise CheckpointError(f"dist_asgd: {path} is not a regular file.")
    return os.fdopen(descriptor, "rb"), status.st_size


def read_range(file: BinaryIO, path: Path, offset: int, length: int) -> bytes:
    """Exactly ``length`` bytes from ``offset`` on; the caller knows that the file is at least that long."""
    try:
        file.seek(offset)
        data = file.read(length)
    except OSError as error:
        raise CheckpointError(f"dist_asgd: cannot read {path}: {error.strerror}.") from error
    if len(data) != length:
        raise CheckpointError(f"dist_asgd: {path} ends {length - len(data)} bytes early: it is truncated.")
    return data


def read_whole(directory: Path, name: str, max_bytes: int) -> bytes:
    """The whole of a small file; CheckpointError where it has more than ``max_bytes``."""
    file, size = open_confined(directory, name)
    with file:
        if size > max_bytes:
            raise CheckpointError(
                f"dist_asgd: {directory / name} has {size} bytes, more than the {max_bytes} that such a file may have."
            )
        return read_range(file, directory / name, 0, size)


def names_in(directory: Path) -> list[str]:
    """Everything that lies right inside the directory, sorted; CheckpointError where it is none."""
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        raise CheckpointError(f"dist_asgd: there is no checkpoint at {directory}.") from None
    except NotADirectoryError:
        raise CheckpointError(f"dist_asgd: {directory} is not a directory; a checkpoint is one.") from None
    except OSError as error:
        raise CheckpointError(f"dist_asgd: cannot read {directory}: {error.strerror}.") from error
