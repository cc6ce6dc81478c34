"""What adapters ask of trainers: the ``ShardedASGD`` inside what they wrap around it, and how they save its state."""

from __future__ import annotations

from dist_asgd import ShardedASGD


def sharded_asgd(optimizer: object) -> ShardedASGD:
    """Return the ``ShardedASGD`` that ``optimizer`` is or wraps, in an attribute ``optimizer`` at any depth.

    TypeError if there is none.
    """
    inner: object = optimizer
    while not isinstance(inner, ShardedASGD):
        if not hasattr(inner, "optimizer"):
            raise TypeError(f"dist_asgd: wanted a ShardedASGD or a wrapper of one, got {type(optimizer).__name__}.")
        inner = inner.optimizer
    return inner


def saves_shards() -> bool:
    """Whether Accelerate saves by shards, which is with FSDP. Asked after an ``Accelerator`` was made.

    Neither argument nor variable tells: on CPUs Accelerate ignores them, and then saves as with DDP.
    """
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    return bool(AcceleratorState().distributed_type == DistributedType.FSDP)
