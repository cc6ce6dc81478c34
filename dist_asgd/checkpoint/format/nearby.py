"""What lies at a path that is no checkpoint, and which checkpoint its user may have meant: for errors only.

Readers of checkpoints add ``hint_at(path)`` to an error about a directory that is none. Nothing is opened but folders.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from . import stores
from .locks import OWNER_NAME
from .paths import AnyPath, is_store

if TYPE_CHECKING:
    from upath import UPath

# A directory with one of these is a checkpoint, or was meant to be one.
MARKS = ("manifest.json", ".metadata", "__0.metadata")
_LEFTOVER = re.compile(r"\..+\.(tmp|old|new)-[0-9a-f]{12}")
_MAX_ENTRIES = 10_000
_MAX_LISTED = 5


def is_marked(path: AnyPath) -> bool:
    """Whether ``path`` is a directory with files that checkpoints have; links to directories count."""
    if is_store(path):
        return any(stores.exists(path / mark) for mark in MARKS)
    return any(os.path.isfile(path / mark) for mark in MARKS)


def checkpoints_in(folder: AnyPath) -> list[AnyPath]:
    """List the checkpoints right inside ``folder``, the newest last: by the numbers in their names.

    Links (such as ``latest``) and leftovers of crashed saves are left out.
    """
    try:
        entries = _folders_in(folder)
        found = [entry for entry in entries if not _LEFTOVER.fullmatch(entry.name) and is_marked(entry)]
    except OSError:
        return []
    return sorted(found, key=lambda entry: [int(word) if word.isdigit() else -1 for word in _words(entry.name)])


def _folders_in(folder: AnyPath) -> Sequence[AnyPath]:
    if is_store(folder):
        return stores.folders_in(folder)
    return [Path(entry.path) for entry in islice(os.scandir(folder), _MAX_ENTRIES) if not entry.is_symlink()]


def _words(name: str) -> list[str]:
    return re.findall(r"\d+", name)


def hint_at(path: AnyPath) -> str:
    """Return sentences about what is at ``path`` or near it, with a space before the first; empty if nothing is."""
    if is_store(path):
        return _hint_in_store(path)
    if _LEFTOVER.fullmatch(path.name):
        return " It is what a save that crashed, or that still runs, has written so far: load another checkpoint."
    if path.is_symlink() and not path.exists():
        return f" It is a link to {os.readlink(path)}, which is not there any more.{_others_in(path.parent)}"
    if not path.exists():
        return _others_in(path.parent)
    if not path.is_dir():
        if is_marked(path.parent):
            return f" It is a file of the checkpoint {path.parent}: pass that directory."
        return ""
    found = checkpoints_in(path)
    if not found:
        above = next((folder for folder in list(path.absolute().parents)[:2] if is_marked(folder)), None)
        return "" if above is None else f" It is a folder inside the checkpoint {above}: pass that directory."
    if (path / "latest").exists():
        return (
            f" It is a folder of checkpoints, the newest of which is {found[-1].name}: pass {path / 'latest'}, or call "
            f"CheckpointManager({str(path)!r}).restore()."
        )
    return _choice(found)


def _choice(found: Sequence[AnyPath]) -> str:
    if len(found) == 1:
        return f" The checkpoint is the folder in it: pass {found[0]}."
    return f" It is a folder of checkpoints: pass one of them, such as {found[-1]}."


def _hint_in_store(path: UPath) -> str:
    try:
        names = stores.sizes_in(path, missing_ok=True)
    except OSError:
        return ""
    if OWNER_NAME in names:
        return " It is what a save that crashed, or that still runs, has written so far: load another checkpoint."
    found = checkpoints_in(path)
    if found:
        return _choice(found)
    if not names and path.parent.name:
        return _others_in(path.parent)
    return ""


def _others_in(folder: AnyPath) -> str:
    found = checkpoints_in(folder)
    if not found:
        return ""
    more = f", and {len(found) - _MAX_LISTED} earlier" if len(found) > _MAX_LISTED else ""
    names = ", ".join(entry.name for entry in found[-_MAX_LISTED:])
    return f" In {folder} there {'is' if len(found) == 1 else 'are'} {names}{more}."


def refuse_as_folder(folder: AnyPath) -> None:
    """Raise ValueError if ``folder``, which is to hold checkpoints, is itself one."""
    if is_marked(folder):
        raise ValueError(
            f"dist_asgd: {folder} is a checkpoint, and no folder of checkpoints: give CheckpointManager the folder "
            f"that it lies in, or load it with load_checkpoint()."
        )
