"""Paths as users give them: ``~`` and ``file://`` are followed, and addresses of object stores are refused.

Every public function and command that takes a path passes it through ``local_path`` first.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

# pathlib makes one slash of two. Windows' drives have one letter, and so no scheme has.
_SCHEME = re.compile(r"(?:[A-Za-z0-9]+::)*(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]+):/(?P<slashes>/*)(?P<rest>.*)", re.DOTALL)
_CHAIN = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*::")


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` as a path of the file system; a relative one stays relative to the working directory.

    Raises:
        ValueError: ``path`` is the address of something else than a file of this machine (``s3://...``), or has no
            meaning as a path.
        TypeError: ``path`` is no path.
    """
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise TypeError(
            f"dist_asgd: wanted a path (str or os.PathLike), got {type(path).__name__}: {path!r:.200}."
        ) from None
    if "\0" in text:
        raise ValueError(f"dist_asgd: a path cannot hold a null character: {text!r:.200}.")
    match = _SCHEME.fullmatch(text)
    if match is None and not _CHAIN.match(text):
        return _expanded(Path(text))
    scheme = "" if match is None else match["scheme"].lower()
    if match is None or scheme != "file" or "::" in text[: match.start("scheme")]:
        raise ValueError(
            f"dist_asgd: {text} is no path of a file system, and checkpoints and exports are written to and read from "
            f"file systems only. Give a path on a file system that all ranks share: mount the store there, or copy "
            f"the files with the store's own tool, after a save and before a load. (A local folder of that name is "
            f"reached by its absolute path.)"
        )
    host, slash, below = match["rest"].partition("/") if match["slashes"] == "/" else ("", "/", match["rest"])
    if host not in ("", "localhost") or not slash:
        raise ValueError(
            f"dist_asgd: {text} names the host {host!r}: wanted file:///..., with an absolute path on this machine."
        )
    return Path("/" + unquote(below).lstrip("/"))


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"dist_asgd: {path}: {error} Give the path in full.") from None
