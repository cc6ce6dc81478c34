"""Iterations of ranks that still have inputs, and how ranks without (torch's ``Join``) learn that one begins.

A rank that has joined waits until the others begin an iteration, and only then takes part in their exchanges. So the
message that ends its wait has to leave before any other of the iteration, be that in backward (stage 2) or in a call.
"""

from __future__ import annotations

from collections.abc import Callable, Container


class Iterations:
    """Sees all exchanges of one optimizer inside a ``Join`` context, and announces each iteration before its first.

    announce          sends the message of ``Join``; collective, and waits for nobody
    begun_by_joined   the calls by which a rank that has joined opens its own exchanges
    within, last      the calls that may lie within an iteration, and those of them that end it
    """

    def __init__(
        self,
        announce: Callable[[], None],
        begun_by_joined: Container[int],
        within: Container[int],
        last: Container[int],
    ) -> None:
        self._announce = announce
        self._begun_by_joined = begun_by_joined
        self._within, self._last = within, last
        self._is_open = False
        # The call that began the iteration, although it is none that an iteration has.
        self._other: int | None = None

    def before(self, call: int) -> None:
        """Begin an iteration with the exchange of ``call``, unless one is open. RuntimeError if ``Join`` throws."""
        if self._is_open or call in self._begun_by_joined:
            return
        self._announce()
        self._is_open = True
        self._other = None if call in self._within else call

    def after(self, call: int) -> None:
        """End the iteration if the exchange of ``call``, in which no rank has opened a round, is its last."""
        if call in self._last or call == self._other:
            self._is_open = False
