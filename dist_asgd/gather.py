"""The updated shards become everyone's parameters: in place, a bucket at a time, while others are still updated."""

from __future__ import annotations

from .buffers import Store
from .comm import Communicators, Wait


class Gatherer:
    """All-gathers buckets; every rank launches the same buckets in the same order."""

    def __init__(self, communicators: Communicators) -> None:
        self._communicators = communicators
        self._in_flight: list[Wait] = []

    def launch(self, bucket: Store) -> None:
        """Collective: start filling ``bucket.flat`` from every rank's shard; nothing where there is none to fill."""
        if bucket.flat is None:
            return
        self._in_flight.append(self._communicators.on(bucket.device).all_gather(bucket.flat))

    def wait(self) -> None:
        """Wait for every gather launched so far."""
        waits, self._in_flight = self._in_flight, []
        for wait in waits:
            wait()
