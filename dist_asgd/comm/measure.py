"""What one optimizer has sent, and how long it has waited: counted where backends start messages and wait for them.

Each backend starts all of its messages in one method and waits for them in another. These two report to the ``Meter``
of the optimizer, and the profiler's labels are there too. Nothing is counted for each parameter.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Literal, get_args

from ..labels import Label, label

# What is sent or waited for: gradients that are reduced, parameters that are gathered after an update, the words by
# which ranks agree, and all else.
Kind = Literal["gradients", "parameters", "control", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Action:
    """A collective: its name in a PeerError, the kind of what it sends, and its labels in a trace."""

    text: str
    kind: Kind
    launch: str
    wait: str

    # All that there are. (An Enum of Python 3.11 would take longer to read a member than to count.)
    REDUCE_SCATTER: ClassVar[Action]
    ALL_REDUCE: ClassVar[Action]
    ALL_GATHER: ClassVar[Action]
    GATHER: ClassVar[Action]
    EXCHANGE: ClassVar[Action]
    REDUCE_SCALARS: ClassVar[Action]
    EXCHANGE_OBJECTS: ClassVar[Action]
    GATHER_OBJECTS: ClassVar[Action]

    def __str__(self) -> str:
        return self.text


Action.REDUCE_SCATTER = Action("a reduce-scatter", "gradients", Label.REDUCE_SCATTER, Label.REDUCE_SCATTER_WAIT)
Action.ALL_REDUCE = Action("an all-reduce", "gradients", Label.ALL_REDUCE, Label.ALL_REDUCE_WAIT)
Action.ALL_GATHER = Action("an all-gather", "parameters", Label.ALL_GATHER, Label.ALL_GATHER_WAIT)
Action.GATHER = Action("a gather", "other", Label.GATHER, Label.GATHER_WAIT)
Action.EXCHANGE = Action("a control exchange", "control", Label.EXCHANGE, Label.EXCHANGE_WAIT)
Action.REDUCE_SCALARS = Action("a reduction of norms", "control", Label.EXCHANGE, Label.EXCHANGE_WAIT)
Action.EXCHANGE_OBJECTS = Action("an exchange of messages", "control", Label.EXCHANGE, Label.EXCHANGE_WAIT)
Action.GATHER_OBJECTS = Action("a gather of messages", "control", Label.EXCHANGE, Label.EXCHANGE_WAIT)


class Meter:
    """The counters of one optimizer on this rank. They only grow, and nothing here communicates.

    sent_bytes  payload bytes that this rank has handed to other ranks, by kind: what goes to three ranks counts three
                times. Collectives of other backends than Gloo, whose messages nobody sees, count as a ring sends them
    waited_s    seconds by kind in which this rank's host stood still in waits. On GPUs a wait stops a stream instead
    """

    def __init__(self) -> None:
        self.sent_bytes: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self.waited_s: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)

    def launching(self, action: Action, sent_bytes: int) -> AbstractContextManager[object]:
        """Count what this rank sends for ``action``, and label the block that starts the messages."""
        self.sent_bytes[action.kind] += sent_bytes
        return label(action.launch)

    def waiting(self, action: Action, clock: Callable[[], float] = time.perf_counter) -> AbstractContextManager[object]:
        """Label the block that waits for ``action``, and count its seconds by ``clock``."""
        return _Wait(self.waited_s, action, clock)


class _Wait:
    """The block of one wait. A class, because a generator would cost more than many waits."""

    __slots__ = ("_action", "_clock", "_label", "_started", "_waited_s")

    def __init__(self, waited_s: dict[Kind, float], action: Action, clock: Callable[[], float]) -> None:
        self._waited_s, self._action, self._clock = waited_s, action, clock

    def __enter__(self) -> None:
        self._label = label(self._action.wait)
        self._label.__enter__()
        self._started = self._clock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waited_s[self._action.kind] += self._clock() - self._started
        self._label.__exit__(kind, error, trace)
