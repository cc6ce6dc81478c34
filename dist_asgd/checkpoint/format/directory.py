"""Checkpoint directories as a whole: a crash at any moment leaves every one that was there, and none in part.

A checkpoint is written under a temporary name beside its own, and renamed once all of it is on disk. One that is to go
is renamed first. Whatever bears such a name is a leftover of a crash: no reader takes it for a checkpoint, and the
next save removes it. All functions are local; only one rank calls those that change something.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from .manifest import MANIFEST_NAME

LATEST_NAME = "latest"
_STEP_NAME = re.compile(r"step-(\d{8,18})")
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(tmp|old)-[0-9a-f]{12}")


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{uuid.uuid4().hex[:12]}")


def sync_directory(folder: Path) -> None:
    """Make the names in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin(path: Path) -> Path:
    """Make an empty directory beside ``path``, to write in; removes leftovers of earlier saves to ``path``."""
    if not path.parent.is_dir():
        raise ValueError(
            f"dist_asgd: cannot save a checkpoint at {path}: {path.parent} is not a folder. Make it first; it must be "
            f"one that all ranks share."
        )
    if path.is_symlink() or path.exists():
        what = "already exists" if path.is_dir() else "is a file"
        raise ValueError(
            f"dist_asgd: cannot save a checkpoint at {path}: it {what}. A checkpoint is a directory of its own, and "
            f"none is overwritten: choose another name, or remove it first."
        )
    for leftover in leftovers(path.parent):
        if leftover_of(leftover) == path.name:
            shutil.rmtree(leftover)
    temporary = _beside(path, "tmp")
    temporary.mkdir()
    return temporary


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a directory whose files are on disk its name."""
    sync_directory(temporary)
    temporary.rename(path)
    sync_directory(path.parent)


def discard(temporary: Path) -> None:
    """Remove what a failed save wrote, as far as that can be done."""
    shutil.rmtree(temporary, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a checkpoint: at once under its name, then its files."""
    if path.is_symlink():
        path.unlink()
        return
    old = _beside(path, "old")
    path.rename(old)
    sync_directory(path.parent)
    shutil.rmtree(old)


def leftovers(folder: Path) -> list[Path]:
    """What crashed saves and removals left in ``folder``."""
    return [entry for entry in sorted(folder.iterdir()) if _LEFTOVER.fullmatch(entry.name)]


def leftover_of(leftover: Path) -> str | None:
    """The name of the checkpoint that was being written or removed, or None for another kind of file."""
    found = _LEFTOVER.fullmatch(leftover.name)
    return found["name"] if found else None


def point_latest(folder: Path, name: str) -> None:
    """Let ``folder/latest`` be a link to ``name``, replaced in one step."""
    beside = _beside(folder / LATEST_NAME, "tmp")
    beside.symlink_to(name, target_is_directory=True)
    try:
        beside.replace(folder / LATEST_NAME)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_directory(folder)


def step_name(step: int) -> str:
    """``step-00000012``."""
    return f"step-{step:08d}"


def steps_in(folder: Path) -> Iterator[tuple[int, Path]]:
    """Step and path of every checkpoint in ``folder`` that is whole, oldest first."""
    entries = [(_STEP_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir()]
    found = [(int(match[1]), entry) for match, entry in entries if match]
    return iter(sorted(pair for pair in found if (pair[1] / MANIFEST_NAME).is_file()))
