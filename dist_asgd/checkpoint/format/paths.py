"""Paths as users give them: files of this machine, ``~`` and ``file://``, or addresses of object stores.

Every public function and command that takes a path passes it through ``as_path`` first. All code below them has either
a ``Path`` or, for a store, a ``UPath`` (universal_pathlib), which has the methods of a ``Path``; ``is_store`` tells
them apart. Nothing here opens a file or asks a store.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast
from urllib.parse import unquote

if TYPE_CHECKING:
    from typing_extensions import TypeIs
    from upath import UPath

    AnyPath: TypeAlias = Path | UPath
    """A path of this machine's file system, or of a store."""
    UserPath: TypeAlias = str | os.PathLike[str] | UPath
    """A path as users give it."""
else:
    # universal_pathlib need not be installed, and annotations can be read without it.
    AnyPath = Path
    UserPath = str | os.PathLike[str]

# pathlib makes one slash of two. Windows' drives have one letter, and so no scheme has.
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]+):/(?P<slashes>/*)(?P<rest>.*)", re.DOTALL)
_CHAIN = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*::")


def as_path(path: UserPath) -> AnyPath:
    """Return ``path`` as a ``Path``, or as a ``UPath`` if it is the address of a store (``s3://bucket/run``).

    A relative path stays relative to the working directory.

    Raises:
        ValueError: the library of the store is not installed, or ``path`` has no meaning as a path.
        TypeError: ``path`` is no path.
    """
    if not isinstance(path, str | os.PathLike) and hasattr(path, "fs") and hasattr(path, "protocol"):
        return _in_store(path)
    try:
        text = os.fsdecode(cast(str, path))
    except TypeError:
        raise TypeError(
            f"dist_asgd: wanted a path (str, os.PathLike, or UPath for an object store), got {type(path).__name__}: "
            f"{path!r:.200}."
        ) from None
    if "\0" in text:
        raise ValueError(f"dist_asgd: a path cannot hold a null character: {text!r:.200}.")
    if _CHAIN.match(text):
        raise ValueError(
            f"dist_asgd: {text} is a chain of file systems. Give the address of the store itself, without '::'."
        )
    match = _SCHEME.fullmatch(text)
    if match is None:
        return _expanded(Path(text))
    if match["scheme"].lower() not in ("file", "local"):
        return _store_path(match["scheme"].lower(), match["rest"], text)
    host, slash, below = match["rest"].partition("/") if match["slashes"] == "/" else ("", "/", match["rest"])
    if host not in ("", "localhost") or not slash:
        raise ValueError(
            f"dist_asgd: {text} names the host {host!r}: wanted file:///..., with an absolute path on this machine."
        )
    return Path("/" + unquote(below).lstrip("/"))


def is_store(path: AnyPath) -> TypeIs[UPath]:
    """Whether ``path`` is in a store, and not in this machine's file system."""
    return not isinstance(path, Path)


def absolute(path: AnyPath) -> AnyPath:
    """Return ``path`` as an absolute one; links are not followed. Addresses of stores are absolute."""
    return path if is_store(path) else Path(os.path.abspath(path))


def _store_path(scheme: str, rest: str, text: str) -> AnyPath:
    try:
        from upath import UPath
    except ImportError:
        raise ValueError(
            f"dist_asgd: {text} is the address of an object store: install 'dist_asgd[stores]' to use it, with the "
            f"store's own library (s3fs, gcsfs, adlfs, ...). (A local folder of that name is reached by its absolute "
            f"path.)"
        ) from None
    try:
        path = UPath(f"{scheme}://{rest}")
    except Exception as error:
        raise ValueError(
            f"dist_asgd: {text} is no path of this machine, and no address that fsspec knows: {error}. Object stores "
            f"have addresses such as s3://bucket/run. (A local folder of that name is reached by its absolute path.)"
        ) from error
    return _in_store(path)


def _in_store(path: UPath) -> AnyPath:
    """Return ``path`` if its store can be used here; a local one as a ``Path``."""
    if path.protocol in ("", "file", "local"):
        return Path(path.path)
    try:
        # Made here, so that a library that is missing is an error before anything is done.
        _ = path.fs
    except Exception as error:
        raise ValueError(
            f"dist_asgd: {path} cannot be used: {type(error).__name__}: {error}. Stores are reached through fsspec: "
            f"install the store's library (s3fs for s3://, gcsfs for gs://, adlfs for abfs://), and see to its "
            f"credentials."
        ) from error
    if not path.name:
        raise ValueError(
            f"dist_asgd: {path} names a store and nothing in it: wanted a path, such as {str(path).rstrip('/')}/run."
        )
    return path


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"dist_asgd: {path}: {error} Give the path in full.") from None
