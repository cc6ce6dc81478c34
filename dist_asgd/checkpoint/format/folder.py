"""Folders of checkpoints, one per saved step, on a file system or in an object store; ``CheckpointManager`` has one.

On a file system a link ``latest`` leads to the newest checkpoint. A store has no links: there the newest is found by
its name. Nothing here is collective, and only rank 0 calls what changes something.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX

from . import directory, store_directory, stores
from .directory import NewDirectory, sync_directory
from .locks import OWNER_NAME
from .manifest import MANIFEST_NAME
from .metadata import METADATA_NAME
from .paths import AnyPath, is_store
from .store_directory import StoreDirectory

if TYPE_CHECKING:
    from pathlib import Path

    from upath import UPath

LATEST_NAME = "latest"
_STEP_NAME = re.compile(r"step-(\d{8,18})")

NewCheckpoint: TypeAlias = NewDirectory | StoreDirectory
"""A checkpoint that is being written, by ``begin``."""


def begin(path: AnyPath) -> NewCheckpoint:
    """Make what a checkpoint at ``path`` is written in; removes leftovers of earlier saves to ``path``.

    Raises ValueError if ``path`` is taken or has no parent directory, or if another save is writing to it.
    """
    return store_directory.begin(path) if is_store(path) else directory.begin(path)


def put_in_place(new: NewCheckpoint) -> None:
    """Give a checkpoint whose files are written its name; raises ValueError if something has it by now."""
    new.put_in_place()


def clear(folder: AnyPath) -> None:
    """Remove what crashed saves have left in ``folder``; raises ValueError if one of these saves still runs."""
    if is_store(folder):
        store_directory.remove_leftovers(folder, _is_step)
        return
    # First the check that nobody else writes here, and then all that it could disturb.
    directory.remove_leftovers(folder, _is_step)
    for leftover in directory.leftovers(folder):
        if leftover.is_symlink():
            leftover.unlink()


def _is_step(name: str) -> bool:
    return name.startswith("step-")


def remove(path: AnyPath) -> None:
    """Remove a checkpoint. A crash in between leaves no part of it that a reader takes for a checkpoint."""
    if is_store(path):
        store_directory.remove(path)
    else:
        directory.remove(path)


def point_latest(folder: AnyPath, name: str) -> None:
    """Make ``folder/latest`` a link to ``name``; an earlier link is replaced in one step. Stores have no links."""
    if is_store(folder):
        return
    # symlink_to() does not replace, and rename() does: the link is made under another name first.
    beside = directory.beside(folder / LATEST_NAME, "tmp")
    beside.symlink_to(name, target_is_directory=True)
    try:
        beside.replace(folder / LATEST_NAME)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_directory(folder)


def step_name(step: int) -> str:
    """Return the directory's name of the checkpoint of ``step``: ``step-00000012``."""
    return f"step-{step:08d}"


def steps_in(folder: AnyPath, *, with_damaged: bool = False) -> list[tuple[int, AnyPath]]:
    """Return step and path of every whole checkpoint in ``folder``, oldest first.

    ``with_damaged`` also returns directories of a step that hold data or metadata, and have lost their manifest.
    """
    entries = stores.folders_in(folder) if is_store(folder) else folder.iterdir()
    steps = [(int(match[1]), entry) for entry in entries if (match := _STEP_NAME.fullmatch(entry.name))]
    # The manifest is written last, so a directory with a manifest is whole.
    found = [pair for pair in steps if _has_manifest(pair[1]) or (with_damaged and _has_data(pair[1]))]
    return sorted(found, key=lambda pair: pair[0])


def _has_manifest(path: AnyPath) -> bool:
    return stores.exists(path / MANIFEST_NAME) if is_store(path) else (path / MANIFEST_NAME).is_file()


def _has_data(path: AnyPath) -> bool:
    if is_store(path):
        names = list(stores.sizes_in(path, missing_ok=True))
        # What a crash has left in a store lies under the name that the checkpoint would have had.
        return OWNER_NAME not in names and any(n == METADATA_NAME or n.endswith(DEFAULT_SUFFIX) for n in names)
    return path.is_dir() and any(e.name == METADATA_NAME or e.suffix == DEFAULT_SUFFIX for e in path.iterdir())


def set_aside(folder: AnyPath, damaged: Sequence[AnyPath]) -> None:
    """Rename checkpoints that cannot be read to ``damaged-step-...``, and let ``latest`` lead to the newest other."""
    for path in damaged:
        if is_store(path):
            _move_in_store(path)
        else:
            _rename(path)
    found = steps_in(folder)
    if found:
        point_latest(folder, found[-1][1].name)
    if not is_store(folder):
        sync_directory(folder)


def _rename(path: Path) -> None:
    if os.path.lexists(path):
        path.rename(next(aside for aside in map(path.with_name, _names_aside(path.name)) if not os.path.lexists(aside)))


def _move_in_store(path: UPath) -> None:
    taken = {entry.name for entry in stores.folders_in(path.parent)}
    if path.name in taken:
        stores.move(path, path.with_name(next(name for name in _names_aside(path.name) if name not in taken)))


def _names_aside(name: str) -> Iterator[str]:
    yield f"damaged-{name}"
    yield from (f"damaged-{name}-{number}" for number in itertools.count(2))
