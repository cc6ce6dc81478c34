"""A pause of Python's garbage collector, for work that makes as many objects as a checkpoint has chunks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collections_paused() -> Iterator[None]:
    """Keep Python from looking for cycles inside the block, which makes many objects that stay, and no cycles.

    It would look at all of them again and again, which takes as long as to make them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
