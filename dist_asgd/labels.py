"""The labels of the optimizer's phases in traces of ``torch.profiler``. ``docs/trace.md`` says what each of them means.

Whoever runs a phase puts it into ``with label(Label.PACK):``, or decorates its function with ``labelled``: once for
each bucket, transfer, call or checkpoint, and never for each parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

from torch.autograd import profiler

P = ParamSpec("P")
R = TypeVar("R")


class Label:
    """The name of each phase in a trace. A wait is the time in which the host goes no further."""

    # No Enum: before Python 3.12 reading a member costs more than all the rest of a label that nobody records.

    EXCHANGE = "dist_asgd::exchange"
    EXCHANGE_WAIT = "dist_asgd::exchange_wait"
    PACK = "dist_asgd::pack"
    REDUCE_SCATTER = "dist_asgd::reduce_scatter"
    REDUCE_SCATTER_WAIT = "dist_asgd::reduce_scatter_wait"
    ALL_REDUCE = "dist_asgd::all_reduce"
    ALL_REDUCE_WAIT = "dist_asgd::all_reduce_wait"
    MEAN = "dist_asgd::mean"
    UNSCALE = "dist_asgd::unscale"
    CLIP = "dist_asgd::clip"
    UPDATE = "dist_asgd::update"
    ALL_GATHER = "dist_asgd::all_gather"
    ALL_GATHER_WAIT = "dist_asgd::all_gather_wait"
    UNPACK = "dist_asgd::unpack"
    SWAP = "dist_asgd::swap"
    GATHER = "dist_asgd::gather"
    GATHER_WAIT = "dist_asgd::gather_wait"
    SAVE_STATE = "dist_asgd::save_state"
    SAVE_COPY = "dist_asgd::save_copy"
    SAVE_WRITE = "dist_asgd::save_write"
    SAVE_FINISH = "dist_asgd::save_finish"
    LOAD_OPEN = "dist_asgd::load_open"
    LOAD_READ = "dist_asgd::load_read"
    LOAD_APPLY = "dist_asgd::load_apply"


LABELS = tuple(value for name, value in vars(Label).items() if name.isupper())
_OFF = nullcontext()


def label(name: str) -> AbstractContextManager[object]:
    """Return a context that a running profiler records under ``name``; without a profiler it does nothing."""
    # record_function() costs microseconds when nobody records: as much as the update of a small bucket.
    return profiler.record_function(name) if profiler._is_profiler_enabled else _OFF


def labelled(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function whose calls a running profiler records under ``name``."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with label(name):
                return function(*args, **kwargs)

        return call

    return decorate
