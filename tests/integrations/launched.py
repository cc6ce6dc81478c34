"""What a launcher gives a script that uses Accelerate."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import AcceleratorState, GradientState, PartialState


@contextmanager
def launched(rank: int, world_size: int) -> Iterator[None]:
    """The environment that torchrun sets; afterwards Accelerate has forgotten it."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    before = dict(os.environ)
    if world_size > 1:
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="localhost")
    try:
        yield
    finally:
        for shared in (AcceleratorState, PartialState, GradientState):
            shared._reset_state()
        os.environ.clear()
        os.environ.update(before)
