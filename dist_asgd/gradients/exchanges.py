"""The exchanges by which ranks learn which parameters of a bucket have a gradient, with ``step_in_backward=True``.

A round of stage 2 has one exchange, its header. If buckets are updated during backward, each has an exchange of its
own: it begins when a rank launches the bucket, and the rank waits for it before the update. So the ranks know of all
problems, and of the gradients that others have, before they write any parameter of the bucket.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..comm.agreement import Agreement, Fingerprint
from ..comm.reports import CollectiveCall, RankReports
from ..storage.buffers import Bucket
from .round import Header


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
    """The exchanges of launched buckets, one after the other.

    After each one the caller may exchange more with the other ranks; the next one starts when it calls ``go_on``.
    """

    def __init__(self, agreement: Agreement) -> None:
        super().__init__(agreement)
        self._queue: deque[BucketExchange] = deque()
        # Whether all ranks know of the round.
        self._is_known = True
        # Whether the last exchange has been waited for, and the caller has not called ``go_on`` yet.
        self._is_held = False

    @property
    def is_under_way(self) -> bool:
        """Whether an exchange was begun, or has to be, and was not waited for."""
        return bool(self._queue)

    def begin_round(self) -> None:
        """Let ``wait`` wait for the next exchange, which tells all ranks of a round; none is under way."""
        self._is_known = False

    def add(self, exchange: BucketExchange) -> None:
        """Start ``exchange`` as soon as the caller has done with those before it; nobody waits here."""
        self._queue.append(exchange)
        self._start()

    def hold(self) -> None:
        """Start no exchange before ``go_on``: the call that joins a round has made that of the first bucket."""
        self._is_held = self._is_known = True

    def go_on(self) -> None:
        """Start the next exchange; called when everything is sent that has to do with the last one."""
        self._is_held = False
        self._start()

    def _start(self) -> None:
        if self._queue and self._pending is None and not self._is_held:
            first = self._queue[0]
            masks = first.mask, 0
            self._pending = self._agreement.start(CollectiveCall.ROUND, first.fingerprint, masks, first.problem)

    def take_reports(self, exchange: BucketExchange) -> None:
        """Wait for ``exchange``, the oldest one, unless its reports are there already. PeerError if it fails."""
        if exchange.reports is None:
            self._take_first()

    def _take_first(self) -> None:
        assert self._pending is not None
        # The exchange stays the first one if the wait is interrupted.
        self._queue[0].reports = self._pending()
        self._pending = None
        self._queue.popleft()
        self._is_held = self._is_known = True

    def wait(self) -> None:
        """Wait until every rank has heard of the round; called before this rank waits for their gradients.

        It waits for no other exchange: ranks that are late with it may wait until this one has read what they send.
        """
        if not self._is_known and self._queue:
            self._take_first()

    def complete(self) -> None:
        while self._queue:
            self.go_on()
            self._take_first()
