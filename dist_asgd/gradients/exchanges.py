"""The exchanges by which ranks learn which parameters of a bucket have a gradient, with ``step_in_backward=True``.

A round of stage 2 has one exchange, its header. If buckets are updated during backward, each has an exchange of its
own: it begins when a rank launches the bucket, and the rank waits for it before the update. So the ranks know of all
problems, and of the gradients that others have, before they write any parameter of the bucket.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass

from ..comm.agreement import Agreement, Fingerprint
from ..comm.reports import CollectiveCall, RankReports
from ..storage.buffers import Bucket
from .round import Header
from .transfers import Transfers


@dataclass(slots=True)
class BucketExchange:
    """The exchange of one launched bucket.

    ``mask`` has the bits of the bucket's parameters whose gradients this rank sends, ``problem`` says whether anything
    is wrong on it, and ``reports`` are those of all ranks once they have arrived.
    """

    bucket: Bucket
    mask: int
    fingerprint: Fingerprint
    problem: bool
    reports: RankReports | None = None


class BucketExchanges(Header):
    """The exchanges of launched buckets, one after the other: each starts when the one before has been waited for."""

    def __init__(self, agreement: Agreement) -> None:
        super().__init__(agreement)
        self._queue: deque[BucketExchange] = deque()
        self._transfers: weakref.ref[Transfers] | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether an exchange was begun, or has to be, and was not waited for."""
        return bool(self._queue)

    def follow(self, transfers: Transfers) -> None:
        """Wait in ``wait`` for what these ``transfers`` need."""
        # Weak, because the transfers keep this object.
        self._transfers = weakref.ref(transfers)

    def add(self, exchange: BucketExchange) -> None:
        """Start ``exchange`` as soon as those before it have been waited for; nobody waits here."""
        self._queue.append(exchange)
        self._start()

    def _start(self) -> None:
        if self._queue and self._pending is None:
            first = self._queue[0]
            masks = first.mask, 0
            self._pending = self._agreement.start(CollectiveCall.ROUND, first.fingerprint, masks, first.problem)

    def take_up_to(self, exchange: BucketExchange) -> None:
        """Wait for ``exchange``, and for all that were added before it. PeerError if one fails."""
        while exchange.reports is None:
            self._take_first()

    def _take_first(self) -> None:
        assert self._pending is not None
        # The exchange stays the first one if the wait is interrupted.
        self._queue[0].reports = self._pending()
        self._pending = None
        self._queue.popleft()
        self._start()

    def wait(self) -> None:
        """Wait for the exchange of the bucket whose gradients this rank is about to wait for.

        All ranks wait for the exchange of a bucket before they wait for its gradients: so the rank that has come least
        far never waits for one that waits for it.
        """
        transfers = None if self._transfers is None else self._transfers()
        oldest = None if transfers is None else transfers.oldest
        while any(exchange.bucket is oldest for exchange in self._queue):
            self._take_first()

    def complete(self) -> None:
        while self._queue:
            self._take_first()

    def forget(self) -> None:
        """Forget all exchanges; called when the ranks cannot go on together."""
        self._queue.clear()
        self._pending = None
