"""Object stores, and other file systems that fsspec reaches: what checkpoints and exports do with them.

A *store* holds *objects*. An object appears whole when its writer closes it, and then never changes. Stores have no
locks, no links, no folders that are empty, and no renaming in one step. All functions raise OSError, whatever the
store's library raises, with the path as ``filename``. Nothing here is collective.
"""

from __future__ import annotations

import contextlib
import errno
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO, cast

if TYPE_CHECKING:
    from pathlib import Path

    from upath import UPath

# Small chunks that follow each other, and blocks of a whole object, are read with few requests.
_READ_AHEAD_BYTES = 1 << 23
# How many requests remove_all() has under way.
_NUM_REQUESTS = 32
_NUMBERS = ((FileNotFoundError, errno.ENOENT), (FileExistsError, errno.EEXIST), (PermissionError, errno.EACCES))


@contextlib.contextmanager
def _as_os_error(path: UPath) -> Iterator[None]:
    """Raise every error of the block as an OSError about ``path``."""
    try:
        yield
    except Exception as error:
        number = next((number for kind, number in _NUMBERS if isinstance(error, kind)), errno.EIO)
        raise OSError(number, f"{type(error).__name__}: {error}", str(path)) from error


class StoreFile:
    """An object that is being read or written, with the methods of a file that checkpoints use."""

    def __init__(self, path: UPath, mode: str) -> None:
        self._path = path
        with _as_os_error(path):
            options = {"block_size": _READ_AHEAD_BYTES} if mode == "rb" else {}
            self._file: Any = path.fs.open(path.path, mode, **options)

    def __enter__(self) -> StoreFile:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def read(self, length: int = -1) -> bytes:
        """Return the next ``length`` bytes, or fewer at the object's end."""
        with _as_os_error(self._path):
            return cast(bytes, self._file.read(length))

    def write(self, data: Any) -> int:
        """Write all of ``data``; returns its length in bytes."""
        with _as_os_error(self._path):
            return cast(int, self._file.write(data))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to ``offset``, in bytes, and return it."""
        with _as_os_error(self._path):
            return cast(int, self._file.seek(offset, whence))

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return cast(int, self._file.tell())

    def close(self) -> None:
        """Close the object. One that was written is in the store when this returns. May be called again."""
        with _as_os_error(self._path):
            self._file.close()

    def abort(self) -> None:
        """Give up an object that was being written: it does not get into the store. Raises no error."""
        with contextlib.suppress(Exception):
            self._file.discard()
        # Deleting an open file would write what it still holds.
        with contextlib.suppress(Exception):
            self._file.closed = True
        with contextlib.suppress(OSError):
            remove([self._path])


def open_object(path: UPath) -> tuple[BinaryIO, int]:
    """Open an object for reading and return it with its size in bytes."""
    with _as_os_error(path):
        info = path.fs.info(path.path)
    if info["type"] != "file" or not isinstance(info["size"], int):
        raise OSError(errno.EINVAL, "the store does not have it as a file of known size", str(path))
    return cast(BinaryIO, StoreFile(path, "rb")), info["size"]


def put(path: UPath, data: bytes) -> None:
    """Write a small object that is not there yet; FileExistsError if it is.

    Of two writers at the same moment one gets the error, if the store can refuse to replace an object, as those of
    Amazon, Google and Azure can.
    """
    try:
        with _as_os_error(path):
            path.fs.pipe_file(path.path, data, mode="create")
    except FileExistsError:
        raise
    except OSError:
        # The store's library may not be able to refuse. It raises the same error again if this was another.
        if path.name in sizes_in(path.parent, missing_ok=True):
            raise OSError(errno.EEXIST, "it is there already", str(path)) from None
        with _as_os_error(path):
            path.fs.pipe_file(path.path, data)


def read(path: UPath, max_bytes: int) -> bytes:
    """Return the bytes of an object, the first ``max_bytes`` of them if it has more."""
    with _as_os_error(path):
        return cast(bytes, path.fs.cat_file(path.path, start=0, end=max_bytes))


def exists(path: UPath) -> bool:
    """Whether there is an object at ``path`` now."""
    with _as_os_error(path):
        path.fs.invalidate_cache()
        return bool(path.fs.isfile(path.path))


def sizes_in(directory: UPath, *, missing_ok: bool = False) -> dict[str, int]:
    """Return the names and bytes of all objects right inside ``directory``; FileNotFoundError if there is none."""
    return {name: size for name, (kind, size) in _listing(directory, missing_ok).items() if kind == "file"}


def folders_in(directory: UPath) -> list[UPath]:
    """List the folders right inside ``directory``; empty if it does not exist."""
    listing = _listing(directory, missing_ok=True)
    return [directory / name for name, (kind, _) in sorted(listing.items()) if kind == "directory"]


def _listing(directory: UPath, missing_ok: bool) -> dict[str, tuple[str, int]]:
    try:
        with _as_os_error(directory):
            # Libraries keep listings, and other processes write too.
            directory.fs.invalidate_cache()
            entries = directory.fs.ls(directory.path, detail=True)
    except FileNotFoundError:
        if missing_ok:
            return {}
        raise
    found = {}
    # Some stores list the folder itself, or the object of that name.
    own = directory.path.strip("/")
    for entry in entries:
        path = str(entry["name"]).strip("/")
        if path != own:
            found[path.rpartition("/")[2]] = str(entry["type"]), int(entry.get("size") or 0)
    return found


def remove(paths: Iterable[UPath]) -> None:
    """Remove objects, in this order; those that are not there are passed over."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError), _as_os_error(path):
            path.fs.rm_file(path.path)


def remove_all(paths: Iterable[UPath]) -> None:
    """Remove objects in any order, many at a time: a checkpoint has one for each rank."""
    with ThreadPoolExecutor(_NUM_REQUESTS) as threads:
        for _ in threads.map(lambda path: remove([path]), paths):
            pass


def move(source: UPath, target: UPath) -> None:
    """Give a folder another name: the store copies every object, and then the old ones are removed.

    A crash leaves every object under its old name, or under the new one; some may be under both.
    """
    # Not mv() of the store's library: that of s3fs takes the folder itself for an object, and does not find it.
    with _as_os_error(source):
        source.fs.invalidate_cache()
        below = f"{source.path.strip('/')}/"
        found = [str(name) for name in source.fs.find(source.path)]
        names = [name.strip("/")[len(below) :] for name in found if name.strip("/").startswith(below)]
        for name in names:
            source.fs.cp_file(f"{source.path}/{name}", f"{target.path}/{name}")
    remove(source / name for name in names)


def upload(source: Path, target: UPath) -> None:
    """Write a local file to an object, which replaces one that is there."""
    with _as_os_error(target):
        target.fs.put_file(str(source), target.path)
