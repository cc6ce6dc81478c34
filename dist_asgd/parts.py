"""The path by which users' files name the function that rebuilds a ``ShardTensor``. It never changes."""

from .placements.shard_tensor import rebuild_shard

__all__ = ["rebuild_shard"]
