"""Exceptions that let go of the optimizer: they leave no reference cycle behind.

An error of one rank is kept in a local variable until all ranks have agreed to raise it. Its traceback refers to the
frames that it was raised through, and so to that variable and to the optimizer: a deleted optimizer would stay until
the cyclic garbage collector runs. Public calls (``agreement.public_call``) therefore clear such frames on their way
out.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import FrameType

_PACKAGE = __name__.partition(".")[0]


def release_frames(error: BaseException) -> None:
    """Clear the finished frames of this package that ``error`` went through and that hold an exception themselves.

    Frames of users stay as they are, and so do all other frames of this package: a debugger still shows them.
    """
    running = set(_callers(inspect.currentframe()))
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        waiting += (one.__cause__, one.__context__)
        traceback = one.__traceback__
        while traceback is not None:
            frame, traceback = traceback.tb_frame, traceback.tb_next
            if frame in running or frame.f_globals.get("__name__", "").partition(".")[0] != _PACKAGE:
                continue
            held = [value for value in frame.f_locals.values() if isinstance(value, BaseException)]
            if held:
                waiting += held
                frame.clear()
                # Before Python 3.13, f_locals is a copy that the frame keeps: reading it again empties it.
                _ = frame.f_locals


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    # Without ``frame`` itself: a variable of it that refers to it would be another cycle.
    while frame is not None and frame.f_back is not None:
        frame = frame.f_back
        yield frame
