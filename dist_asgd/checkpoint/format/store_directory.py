"""Checkpoints in object stores: written in place, and whole once their manifest is there.

A store can neither rename a directory in one step nor lock it. So the data files of a save get names that no other save
uses (``__0_0-<tag>.distcp``), the index, ``.metadata`` and ``manifest.json`` are created only if they are not there
yet, and the manifest comes last. What a crash leaves has no manifest and an owner file (see ``locks``): it is no
checkpoint, and the next save removes it. All functions are local, and only rank 0 calls those that change something.
"""

from __future__ import annotations

import contextlib
import logging
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX

from . import stores
from .file_report import Described, FileReport
from .index import INDEX_NAME
from .locks import MAX_OWNER_BYTES, OWNER_NAME, living_owner, owner_record
from .manifest import MANIFEST_NAME, FileEntry, Manifest, checked_bytes, hash_of
from .metadata import METADATA_NAME

if TYPE_CHECKING:
    from upath import UPath

_OWN_FILE = re.compile(rf"__\d+_0-[0-9a-f]{{12}}{re.escape(DEFAULT_SUFFIX)}")
_APART = "Two jobs, or stages of a pipeline, cannot save to one path, nor to one manager's folder: give each its own."
_LOG = logging.getLogger("dist_asgd")


class StoreDirectory:
    """A checkpoint that is being written to a store; rank 0 has it until the save ends.

    ``path`` is its final path. ``tag`` is a part of the names of its data files.
    """

    def __init__(self, path: UPath) -> None:
        self.path = path
        self.tag = f"-{uuid.uuid4().hex[:12]}"
        # The objects that every save has under the same name, by name. The tag makes this save's owner file its own.
        self._objects = {OWNER_NAME: owner_record() + self.tag.encode()}
        self._files: dict[str, FileEntry] = {}
        self._has_ended = False
        self._create(OWNER_NAME, "that has begun at the same moment")

    def _create(self, name: str, what: str) -> None:
        data = self._objects[name]
        try:
            stores.put(self.path / name, data)
        except FileExistsError:
            # If an answer is lost, the store's library tries again, and then meets the object of its first try.
            if stores.read(self.path / name, len(data) + 1) != data:
                raise ValueError(
                    f"dist_asgd: another save {what} writes to {self.path}. {_APART} Nothing of the other was changed."
                ) from None

    def finish(self, step: int, reports: Sequence[FileReport], found: Described, here: str) -> None:
        """Add the index and ``.metadata`` when the files of all ranks are in the store.

        ``here`` names this rank in errors.
        """
        self._files = {report.name: report.file for report in reports if report.file is not None}
        self._check_visible(here)
        described = {INDEX_NAME: found.index, METADATA_NAME: found.metadata}
        files = self._files | {name: FileEntry(len(data), hash_of(data)) for name, data in described.items()}
        self._objects[MANIFEST_NAME] = checked_bytes(self.path, Manifest(step, len(reports), files))
        self._objects |= described
        for name in described:
            self._create(name, "that is about to finish")

    def _check_visible(self, here: str) -> None:
        """Raise RuntimeError unless this rank sees every file as its rank wrote it."""
        sizes = stores.sizes_in(self.path)
        for name, entry in self._files.items():
            if sizes.get(name) != entry.bytes:
                raise RuntimeError(
                    f"dist_asgd: {here} does not see {self.path / name} as it was written. Another save to this path "
                    f"has removed it, or not all ranks write to the same store."
                )

    def put_in_place(self) -> None:
        """Write the manifest, with which the checkpoint is whole; raises ValueError if there is one by now."""
        self._create(MANIFEST_NAME, "that has finished first")
        # A save on another host may have taken this one for crashed just before the manifest was there.
        self._check_visible("the rank that writes the manifest")
        self._has_ended = True
        # If this fails, readers ignore the owner file, as they do every file that no manifest names.
        with contextlib.suppress(OSError):
            stores.remove([self.path / OWNER_NAME])

    def discard(self) -> None:
        """Remove what a failed save wrote, as far as the store lets it be removed."""
        with contextlib.suppress(OSError):
            sizes = stores.sizes_in(self.path, missing_ok=True)
            data = [self.path / name for name in sizes if f"{self.tag}." in name]
            # The manifest first. Another save that has taken the path over keeps what is its own.
            stores.remove(self._own(MANIFEST_NAME, sizes))
            stores.remove_all([*data, *self._own(METADATA_NAME, sizes), *self._own(INDEX_NAME, sizes)])
            stores.remove(self._own(OWNER_NAME, sizes))
            self._has_ended = True

    def _own(self, name: str, sizes: Mapping[str, int]) -> list[UPath]:
        """Return the path of an object if it is there, and this save wrote it."""
        data = self._objects.get(name)
        is_own = (
            data is not None
            and name in sizes
            and sizes[name] == len(data)
            and stores.read(self.path / name, len(data)) == data
        )
        return [self.path / name] if is_own else []

    def close(self) -> None:
        """End the save. What is left of one that has failed, the next save to this path may remove."""
        if not self._has_ended:
            self._has_ended = True
            with contextlib.suppress(OSError):
                for path in self._own(OWNER_NAME, stores.sizes_in(self.path, missing_ok=True)):
                    stores.remove([path])
                    stores.put(path, owner_record(has_ended=True))


def begin(path: UPath) -> StoreDirectory:
    """Return a checkpoint to write at ``path``; removes what a crashed save has left there.

    Raises ValueError if something else is at ``path``, or if a process of this host is saving to it.
    """
    names = stores.sizes_in(path, missing_ok=True)
    folders = stores.folders_in(path)
    if OWNER_NAME in names and MANIFEST_NAME not in names:
        _remove_leftover(path)
        names = stores.sizes_in(path, missing_ok=True)
    if names or folders:
        first = next(iter(names), folders[0].name if folders else "")
        what = "it already exists" if MANIFEST_NAME in names else f"there is something already ({first})"
        raise ValueError(
            f"dist_asgd: cannot save a checkpoint at {path}: {what}. A checkpoint is a directory of its own, and none "
            f"is overwritten: choose another name, or remove it first. Jobs and stages of a pipeline that save at the "
            f"same time need paths of their own."
        )
    return StoreDirectory(path)


def _remove_leftover(path: UPath) -> None:
    """Remove the files that a crashed save has left; raises ValueError if a process of this host is writing them."""
    owner = stores.read(path / OWNER_NAME, MAX_OWNER_BYTES)
    alive = living_owner(owner)
    if alive is not None:
        raise ValueError(
            f"dist_asgd: another save is writing {path} at this moment ({alive}). {_APART} If the other is to go on, "
            f"nothing of it was changed."
        )
    names = stores.sizes_in(path, missing_ok=True)
    own = [name for name in names if _OWN_FILE.fullmatch(name) or name in (METADATA_NAME, INDEX_NAME)]
    _LOG.warning("removing what a save to %s that did not end has left: %d files", path, len(own))
    # The owner file last: until then the next save knows what the rest is.
    stores.remove_all(path / name for name in own)
    stores.remove([path / OWNER_NAME])


def remove_leftovers(folder: UPath, is_wanted: Callable[[str], bool]) -> None:
    """Remove what crashed saves of a wanted name have left in ``folder``; ValueError if one still runs on this host."""
    for path in stores.folders_in(folder):
        if is_wanted(path.name):
            names = stores.sizes_in(path, missing_ok=True)
            if OWNER_NAME in names and MANIFEST_NAME not in names:
                _remove_leftover(path)
            elif OWNER_NAME in names:
                # The save has died after its last object.
                stores.remove([path / OWNER_NAME])


def remove(path: UPath) -> None:
    """Remove a checkpoint: first its manifest, with which it is no checkpoint any more, and then its files."""
    names = stores.sizes_in(path, missing_ok=True)
    if OWNER_NAME not in names:
        # A crash after this leaves what the next save recognises, and removes.
        stores.put(path / OWNER_NAME, owner_record())
    first = [path / MANIFEST_NAME] if MANIFEST_NAME in names else []
    rest = [path / name for name in names if name not in (MANIFEST_NAME, OWNER_NAME)]
    stores.remove(first)
    stores.remove_all(rest)
    stores.remove([path / OWNER_NAME])
