"""Whether a checkpoint is small enough to be loaded: checked before anything of it is written.

A load reads ``.metadata`` and the index up to a size. Both grow with the number of chunks, and so with the
number of ranks times that of buckets. Each rank adds up the least that its chunks take in them, and ``Saver`` passes
the sums over all ranks to ``check_room``. The files themselves are measured when they are made.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .index import INDEX_NAME, MAX_INDEX_BYTES, least_bytes_of_rows
from .metadata import MAX_METADATA_BYTES, METADATA_NAME
from .paths import AnyPath
from .writer import ChunkToWrite

# What DCP's metadata has at least of a chunk: its index and its byte range, all numbers being short.
_METADATA_CHUNK_BYTES = 18


def least_bytes(chunks: Sequence[ChunkToWrite]) -> tuple[int, int, int]:
    """Return the number of ``chunks``, and how many bytes they take at least in the index and in the metadata.

    Values, of which equal ones share a chunk, are not counted.
    """
    lengths = [chunk.data.nbytes for chunk in chunks if isinstance(chunk.data, Tensor) and chunk.data.dim()]
    count = len(lengths)
    index_bytes = least_bytes_of_rows(count, sum(lengths[:-1]), max(lengths, default=0))
    return count, index_bytes, _METADATA_CHUNK_BYTES * count


def check_room(path: AnyPath, count: int, index_bytes: int, metadata_bytes: int) -> None:
    """Raise ValueError if a checkpoint of these sizes would not be loaded."""
    for name, needed, most in (
        (INDEX_NAME, index_bytes, MAX_INDEX_BYTES),
        (METADATA_NAME, metadata_bytes, MAX_METADATA_BYTES),
    ):
        if needed > most:
            pieces = f" for {count:,} pieces of tensors" if count else ""
            raise ValueError(
                f"dist_asgd: {path} cannot be saved: its {name} would need {needed:,} bytes{pieces}, more than the "
                f"{most:,} that can be loaded. Every rank writes a piece of each bucket: build the optimizer with a "
                f"larger bucket_cap_mb, or save from fewer ranks."
            )
