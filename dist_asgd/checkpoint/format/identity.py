"""What tells one checkpoint from another, in a few bytes: ranks that do not read its metadata compare it."""

from __future__ import annotations

from .descriptions import description_names
from .manifest import MANIFEST_NAME, CheckpointError, hash_of, names_in, open_confined, read_range
from .metadata import METADATA_NAME
from .nearby import hint_at
from .paths import AnyPath, UserPath, as_path

_TAIL_BYTES = 256


def identity_of(path: UserPath, *, verify: bool) -> str | None:
    """Return what tells the checkpoint at ``path`` from those of other saves; None if nothing does.

    It is a hash of the last bytes of the manifest, where its own hash is, or without ``verify`` of ``.metadata``, where
    DCP's identifier of the save is. Ranks that do not read these files compare it. Raises CheckpointError.
    """
    directory, name = as_path(path), MANIFEST_NAME if verify else METADATA_NAME
    try:
        file, size = open_confined(directory, name)
    except CheckpointError:
        # A directory that is not there, or has no such file, is another error than a file that cannot be opened.
        if name in names_in(directory):
            raise
        if verify:
            raise needs_manifest(directory) from None
        return None
    with file:
        length = min(size, _TAIL_BYTES)
        return hash_of(read_range(file, directory / name, size - length, length))


def needs_manifest(path: AnyPath) -> CheckpointError:
    """Return the error for a directory without a manifest: another program's checkpoint, or none at all."""
    if not description_names(names_in(path)):
        return CheckpointError(
            f"dist_asgd: {path} is no checkpoint: it has neither {MANIFEST_NAME} nor {METADATA_NAME}.{hint_at(path)}"
        )
    return CheckpointError(
        f"dist_asgd: {path} has no {MANIFEST_NAME}, so there are no hashes to verify. If something else than dist_asgd "
        f"wrote it (FSDP2 with dcp.save, say), pass verify=False (--no-verify): then damage to the data is not seen."
    )
