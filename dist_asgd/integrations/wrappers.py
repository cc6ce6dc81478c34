"""The ``ShardedASGD`` inside what trainers wrap around an optimizer."""

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
