"""Where an export or a consolidated file is written: in place, or in a temporary folder and then into a store.

Tensors are written in any order, and objects of a store only from their beginning on. So what goes into a store is
first written to this machine's disk, under ``tempfile.gettempdir()``, and uploaded when it is whole. Nothing here is
collective.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import stores
from .paths import AnyPath, is_store


def check_free(out: AnyPath, taken: Sequence[AnyPath], overwrite: bool) -> None:
    """Raise ValueError if ``out`` has no directory, is one, or would replace one of the files ``taken``."""
    if not is_store(out):
        if not out.parent.is_dir():
            raise ValueError(f"dist_asgd: there is no directory {out.parent} to write {out.name} into.")
        if out.is_dir():
            raise ValueError(f"dist_asgd: {out} is a directory: name a file.")
    if taken and not overwrite:
        raise ValueError(f"dist_asgd: {taken[0]} exists. Choose another name, or pass overwrite=True (--force).")


def siblings(out: AnyPath) -> list[AnyPath]:
    """List what lies in the folder of ``out``; empty if there is no such folder."""
    if is_store(out):
        return [out.with_name(name) for name in sorted(stores.sizes_in(out.parent, missing_ok=True))]
    return sorted(out.parent.iterdir()) if out.parent.is_dir() else []


class Output:
    """The place to write ``out`` in: ``local`` is its path on this machine, beside which further files may be written.

    Whoever writes calls ``publish`` at the end, and ``discard`` in every case.
    """

    def __init__(self, out: AnyPath) -> None:
        self._out = out
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.local = Path(out.name) if is_store(out) else out

    def open(self) -> None:
        """Make the temporary folder, if there is to be one."""
        if is_store(self._out):
            self._folder = tempfile.TemporaryDirectory(prefix="dist_asgd-")
            self.local = Path(self._folder.name) / self._out.name

    def publish(self, names: Iterable[str], stale: Iterable[str] = ()) -> None:
        """Upload the files of these names, in this order, and then remove the objects ``stale`` beside them."""
        if is_store(self._out):
            for name in names:
                stores.upload(self.local.with_name(name), self._out.with_name(name))
            stores.remove(self._out.with_name(name) for name in stale)

    def discard(self) -> None:
        """Remove the temporary folder."""
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.cleanup()
