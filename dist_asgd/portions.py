"""The path by which users' files name what rebuilds a ``ReplicaShardDTensor``. It never changes."""

from .placements.shard_dtensor import FragmentTensor, rebuild_portion

# The class of a fragment that ``to_local()`` of such a DTensor gave, as torch.save of version 0.1 named it.
_Taker = FragmentTensor

__all__ = ["_Taker", "rebuild_portion"]
