"""Chunks that extensions of DCP have transformed: those of ``ZStandard`` are decompressed, others refused by name.

A *descriptor* names an extension in the metadata, such as ``stream.zstd/1``: a name, and a version after the slash.
``OpenCheckpoint`` calls ``check_extensions`` when it opens a checkpoint, and ``decompressed`` for each chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from .manifest import CheckpointError

ZSTD = "stream.zstd"
# zstd writes a block of equal bytes, 128 KiB at most, with 4 bytes: nothing expands further.
MAX_RATIO = 1 << 15
# What an archive has beside the elements of its tensor: the pickle, names and padding.
MAX_FRAME_BYTES = 1 << 16
# Of objects the metadata gives no size.
MAX_OBJECT_BYTES = 1 << 28
# The largest window that zstd itself accepts unless it is asked for more; a frame may claim gigabytes.
_MAX_WINDOW_BYTES = 1 << 27
_BLOCK_BYTES = 1 << 22
# A transformation of what is transformed already makes it a little longer.
_MAX_GROWTH_BYTES = 1 << 16


def is_compressed(info: _StorageInfo) -> bool:
    """Whether the chunk is transformed, and its length is not that of what it holds."""
    return bool(info.transform_descriptors)


def check_extensions(metadata: Metadata, where: str) -> None:
    """Raise CheckpointError, which names the extension and the remedy, unless every transformed chunk can be read."""
    descriptors = {name for info in metadata.storage_data.values() for name in info.transform_descriptors or ()}
    for descriptor in sorted(descriptors):
        name, _, version = descriptor.partition("/")
        if name != ZSTD or version.partition(".")[0] != "1":
            raise CheckpointError(
                f"dist_asgd: {where} has data that a DCP extension has transformed, {descriptor[:80]!r}; this package "
                f"reads {ZSTD}/1 only. Load it with torch.distributed.checkpoint where the extension is, with "
                f"FileSystemReader(path, _extension_registry=...), and save it again with dcp.save and no extensions."
            )
    if descriptors:
        _zstandard(where)


def _zstandard(where: str) -> Any:
    try:
        import zstandard
    except ImportError:
        raise CheckpointError(
            f"dist_asgd: {where} has data that a DCP extension has compressed ({ZSTD}), and the package zstandard, "
            f"which decompresses it, is not installed: pip install 'dist_asgd[zstd]'. Or convert the checkpoint where "
            f"zstandard is installed: dcp_to_torch_save(path, 'all.pt') and torch_save_to_dcp('all.pt', new_path) of "
            f"torch.distributed.checkpoint.format_utils."
        ) from None
    return zstandard


def decompressed(data: bytes, descriptors: Sequence[str] | None, limit: int, what: str) -> bytes:
    """Return ``data`` as it was before the extensions transformed it.

    It takes no more memory than ``limit`` bytes and a block: CheckpointError, which begins with ``what``, is raised if
    there are more.
    """
    for number in range(len(descriptors or ()), 0, -1):
        data = _decompressed(data, limit if number == 1 else limit + limit // 128 + _MAX_GROWTH_BYTES, what)
    return data


def _decompressed(data: bytes, limit: int, what: str) -> bytes:
    zstandard = _zstandard(what)
    found = bytearray()
    try:
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        with decompressor.stream_reader(data, read_across_frames=True) as stream:
            # Block by block: the memory grows with what is there, and not with what a frame claims.
            while block := stream.read(_BLOCK_BYTES):
                found += block
                if len(found) > limit:
                    raise CheckpointError(
                        f"dist_asgd: {what} expands to more than the {limit} bytes that it may have: the checkpoint "
                        f"is damaged, or is not to be trusted."
                    )
    except zstandard.ZstdError as error:
        raise CheckpointError(f"dist_asgd: {what} is damaged: it cannot be decompressed ({error}).") from None
    return bytes(found)
