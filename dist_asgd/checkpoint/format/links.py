"""Links to the files of a checkpoint in the caches of tools that keep every version of a file once.

A checkpoint holds its own files, and a link could lead anywhere: none is followed but those into the part of such a
cache that lies beside the checkpoint. Whatever is read there is checked like any other file of the checkpoint.
"""

from __future__ import annotations

from pathlib import Path

# Of the Hugging Face Hub (snapshots/<revision>/<file> leads to blobs/<hash>), of DVC, and of git-annex.
_CACHES = ("blobs", ".dvc/cache", ".git/annex/objects")


def cached_file(directory: Path, name: str) -> Path | None:
    """Return the file in a cache that the link ``directory/name`` leads to; None if it leads anywhere else.

    The cache is one of the folders named above, in a folder above the checkpoint's directory, and itself no link.
    """
    try:
        target = (directory / name).resolve(strict=True)
        here = directory.resolve(strict=True)
    except (OSError, RuntimeError):
        return None
    for above in here.parents:
        for cache in _CACHES:
            # Both sides are free of links, so the file lies where its name says.
            if target.is_relative_to(above / cache) and (cache != "blobs" or above / "snapshots" in here.parents):
                return target
    return None
