"""Checkpoint directories as a whole: a crash at any moment leaves every earlier checkpoint whole, and no partial one.

A save calls ``begin``, then every rank writes its file, then ``finish`` and ``put_in_place`` of what ``begin`` has
returned (or ``discard``), and at last ``close``. The directory has a temporary name beside its own until all of it is
on disk, and is then renamed; a checkpoint that is to go is renamed before its files are removed. A *leftover* is a
directory with such a temporary name after a crash: no reader takes it for a checkpoint, and the next save removes it. A
directory that another process is still writing has such a name too, and is told apart by its lock (see ``locks``). All
functions are local, and only rank 0 calls those that change something. Checkpoints in object stores, where nothing can
be renamed or locked, are the matter of ``store_directory``.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from .file_report import Described, FileReport
from .index import INDEX_NAME
from .locks import OWNER_NAME, OwnerLock, lock_to_remove, writer_of
from .manifest import FileEntry, Manifest, write_manifest
from .metadata import METADATA_NAME
from .writer import HashedFile

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(tmp|old|new)-[0-9a-f]{12}")
_LOG = logging.getLogger("dist_asgd")
_TRIES = 20


def beside(path: Path, kind: str) -> Path:
    """Return a temporary path of this ``kind`` beside ``path``, which names it and is no other process's."""
    return path.with_name(f".{path.name}.{kind}-{uuid.uuid4().hex[:12]}")


def sync_directory(folder: Path) -> None:
    """Wait until the names in ``folder`` are on disk: fsync of a file does not cover its name."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- one checkpoint --------------------------------------------------------------------------------------


class NewDirectory:
    """The directory of a checkpoint that is being written, and its lock; rank 0 has it until the save ends.

    ``path`` is the directory's temporary path. Its data files have no ``tag`` in their names.
    """

    tag = ""

    def __init__(self, target: Path) -> None:
        self._target = target
        # The lock is held before the directory has a name by which another save could take it for a leftover.
        for attempt in range(_TRIES):
            fresh = beside(target, "new")
            fresh.mkdir()
            try:
                lock = OwnerLock.acquire(fresh)
            except FileNotFoundError:
                # Another save to the same path has taken it for a leftover.
                if attempt == _TRIES - 1:
                    raise
                continue
            try:
                self.path = beside(target, "tmp")
                fresh.rename(self.path)
            except BaseException:
                lock.release()
                raise
            break
        self._lock: OwnerLock | None = lock

    def close(self) -> list[str]:
        """Give the lock up, and return the other writers that it has kept away. Every save ends with this call."""
        lock, self._lock = self._lock, None
        if lock is None:
            return []
        refused = lock.refused()
        lock.release()
        return refused

    def finish(self, step: int, reports: Sequence[FileReport], found: Described, here: str) -> None:
        """Add the index, ``.metadata`` and the manifest; called when the files of all ranks are on disk.

        ``here`` names this rank in errors.
        """
        files = {report.name: report.file for report in reports if report.file is not None}
        self._check_visible(files, here)
        for name, data in ((INDEX_NAME, found.index), (METADATA_NAME, found.metadata)):
            with HashedFile(self.path / name) as file:
                file.write(data)
                files[name] = file.end()
                file.sync()
        write_manifest(self.path, Manifest(step, len(reports), files))

    def _check_visible(self, files: dict[str, FileEntry], here: str) -> None:
        """Raise RuntimeError unless this rank sees every file as its rank wrote it."""
        for name, entry in files.items():
            path = self.path / name
            if not path.is_file() or path.stat().st_size != entry.bytes:
                raise RuntimeError(
                    f"dist_asgd: {here} does not see {path} as it was written. The folder has vanished, or not all "
                    f"ranks share it: save to one that they share."
                )

    def put_in_place(self) -> None:
        """Rename the directory, whose files are on disk; raises ValueError if something has its name by now."""
        # The names of the files must be on disk before the rename is, and the rename before anyone relies on it.
        sync_directory(self.path)
        check_untaken(self._target)
        try:
            self.path.rename(self._target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                check_untaken(self._target)
            raise
        # Closed before it is removed: NFS would keep an open file under another name. A crash leaves it: no harm is
        # done.
        refused = self.close()
        (self._target / OWNER_NAME).unlink(missing_ok=True)
        sync_directory(self._target.parent)
        if refused:
            _LOG.warning(
                "another writer wanted to save to %s at the same time, and was refused: %s", self._target, refused[0]
            )

    def discard(self) -> None:
        """Remove what a failed save wrote, as far as the system lets it be removed."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()


def begin(path: Path) -> NewDirectory:
    """Make and return an empty directory beside ``path`` to write in; removes leftovers of earlier saves to ``path``.

    Raises ValueError if ``path`` is taken or has no parent directory, or if another save is writing to it.
    """
    if not path.parent.is_dir():
        raise ValueError(
            f"dist_asgd: cannot save a checkpoint at {path}: {path.parent} is not a folder. Make it first; it must be "
            f"one that all ranks share."
        )
    check_untaken(path)
    # Of this path only: another job may be writing beside it.
    remove_leftovers(path.parent, lambda name: name == path.name)
    new = NewDirectory(path)
    try:
        # Another save may have begun since: whoever sees the other gives way.
        check_alone(path.parent, lambda name: name == path.name, new.path)
    except ValueError:
        new.discard()
        raise
    return new


def check_untaken(path: Path) -> None:
    """Raise ValueError if something is at ``path``."""
    if path.is_symlink() or path.exists():
        what = "already exists" if path.is_dir() else "is a file"
        raise ValueError(
            f"dist_asgd: cannot save a checkpoint at {path}: it {what}. A checkpoint is a directory of its own, and "
            f"none is overwritten: choose another name, or remove it first. Jobs and stages of a pipeline that save at "
            f"the same time need paths of their own."
        )


def check_alone(folder: Path, is_wanted: Callable[[str], bool], own: Path | None = None) -> None:
    """Raise ValueError if a process writes a checkpoint of a wanted name in ``folder``; ``own`` is not looked at."""
    for leftover in leftovers(folder):
        name = leftover_of(leftover) or ""
        writer = writer_of(leftover) if is_wanted(name) and leftover != own else None
        if writer is not None:
            raise ValueError(
                f"dist_asgd: another save is writing {folder / name} at this moment ({writer}). Two jobs cannot save "
                f"to one path, nor to one manager's folder: give each its own, and each stage of a pipeline too. If "
                f"the other is to go on, nothing of it was changed."
            )


def remove_leftovers(folder: Path, is_wanted: Callable[[str], bool]) -> None:
    """Remove what crashed saves of a wanted name have left; raises ValueError if one of these saves still runs."""
    check_alone(folder, is_wanted)
    for leftover in leftovers(folder):
        if not is_wanted(leftover_of(leftover) or ""):
            continue
        if leftover.is_symlink():
            leftover.unlink(missing_ok=True)
            continue
        with lock_to_remove(leftover) as is_free:
            if is_free:
                _remove_tree(leftover)


def _remove_tree(leftover: Path) -> None:
    try:
        shutil.rmtree(leftover)
    except OSError as error:
        # Another save has removed it too, or has made its owner file in it meanwhile: then it is that save's.
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise


def remove(path: Path) -> None:
    """Remove a checkpoint: first its name, in one step, then its files."""
    if path.is_symlink():
        path.unlink()
        return
    old = beside(path, "old")
    path.rename(old)
    sync_directory(path.parent)
    shutil.rmtree(old)


def leftovers(folder: Path) -> list[Path]:
    """List what crashed saves and removals left in ``folder``."""
    return [entry for entry in sorted(folder.iterdir()) if _LEFTOVER.fullmatch(entry.name)]


def leftover_of(leftover: Path) -> str | None:
    """Return the name of the checkpoint that was being written or removed; None if the path is no leftover."""
    match = _LEFTOVER.fullmatch(leftover.name)
    return match["name"] if match else None
