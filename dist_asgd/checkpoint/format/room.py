"""Whether a checkpoint is small enough to be loaded: checked before anything of it is written.

A load reads ``.metadata`` and ``manifest.json`` up to a size. Both grow with the number of chunks, and so with the
number of ranks times that of buckets. Each rank adds up the least that its chunks take in them, and ``Saver`` passes
the sums over all ranks to ``check_room``. The files themselves are measured when they are made.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES
from .metadata import MAX_METADATA_BYTES, METADATA_NAME
from .paths import AnyPath
from .writer import ChunkToWrite

# What the manifest has of a chunk, [offset,length,"hash"], beside the digits of both numbers.
_MANIFEST_CHUNK_BYTES = 37
# What DCP's metadata has at least of a region: the region itself, its index, and the byte range.
_METADATA_CHUNK_BYTES = 72


def least_bytes(chunks: Sequence[ChunkToWrite]) -> tuple[int, int, int]:
    """Return the number of ``chunks``, and how many bytes they take at least in the manifest and in the metadata.

    Values, of which equal ones share a chunk, are not counted.
    """
    count, offset, manifest_bytes = 0, 0, 0
    for chunk in chunks:
        if isinstance(chunk.data, Tensor) and chunk.data.dim():
            count += 1
            length = chunk.data.nbytes
            manifest_bytes += _MANIFEST_CHUNK_BYTES + len(str(offset)) + len(str(length))
            offset += length
    return count, manifest_bytes, _METADATA_CHUNK_BYTES * count


def check_room(path: AnyPath, count: int, manifest_bytes: int, metadata_bytes: int) -> None:
    """Raise ValueError if a checkpoint of these sizes would not be loaded."""
    for name, needed, most in (
        (MANIFEST_NAME, manifest_bytes, MAX_MANIFEST_BYTES),
        (METADATA_NAME, metadata_bytes, MAX_METADATA_BYTES),
    ):
        if needed > most:
            pieces = f" for {count:,} pieces of tensors" if count else ""
            raise ValueError(
                f"dist_asgd: {path} cannot be saved: its {name} would need {needed:,} bytes{pieces}, more than the "
                f"{most:,} that can be loaded. Every rank writes a piece of each bucket: build the optimizer with a "
                f"larger bucket_cap_mb, or save from fewer ranks."
            )
