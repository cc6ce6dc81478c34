"""A round: one pass over all trainable buckets of stage 2, in one fixed order on every rank."""

from __future__ import annotations

from collections.abc import Sequence

from ..comm import Communicator
from ..comm.agreement import Agreement, PendingReports
from ..comm.rank_names import RankNames
from ..comm.reports import DISCARDS, CollectiveCall, RankReports
from ..storage.buffers import Bucket


class Round:
    """Which bucket the reducer launches next, and for how many gradients each bucket waits; no communication.

    ``position`` is that of the next bucket; the round is open if it is not 0. Buckets wait for the parameters in
    ``expected``, which took part in the last step: an unused one delays nothing for long. From the first step on
    ``buckets`` are in the order in which the first backward filled them on rank 0.
    """

    def __init__(self) -> None:
        self.buckets: list[Bucket] = []
        self.expected: frozenset[int] = frozenset()
        self.position = 0
        # The parameters that are ready, and for how many each bucket still waits.
        self._ready: set[int] = set()
        self._waiting_for: dict[int, int] = {}
        # The ids of buckets that are full, in the order in which they became so; None once ranks have agreed on one.
        self._filled: dict[int, None] | None = None

    def extend(self, buckets: Sequence[Bucket]) -> None:
        """Take all buckets, in reduce order; each waits for all its parameters until a step has shown which come."""
        self.buckets = [bucket for bucket in buckets if bucket.trainable]
        self.expected = frozenset(member.index for bucket in self.buckets for member in bucket.members)
        self._filled = {}
        self.begin()

    def begin(self) -> None:
        """Wait for every gradient anew; called when a round is complete, and when gradients are dropped."""
        self._ready = set()
        self._waiting_for = {
            id(bucket): sum(member.index in self.expected for member in bucket.members) for bucket in self.buckets
        }
        self.position = 0

    def follow(self, active: frozenset[int], host: Communicator) -> None:
        """Wait for the ``active`` parameters, which take part in this step, from now on.

        Called in every step, with the same parameters on all ranks; collective in the first one that has any, in which
        the ranks take over the order of buckets from rank 0.
        """
        if not active:
            return
        if self._filled is not None:
            position = {id(bucket): i for i, bucket in enumerate(self.buckets)}
            # Buckets that no backward has filled come last, in the order in which they were.
            order = [position[key] for key in dict.fromkeys((*self._filled, *position))]
            self._filled = None
            # The others have nothing to say: the largest is that of rank 0.
            agreed = host.largest(order if host.rank == 0 else [-1] * len(order))
            # In a group that moves nothing (torch's `fake` backend) no rank hears of rank 0, and each keeps its own.
            self.buckets = [self.buckets[i] for i in (order if -1 in agreed else agreed)]
        if active is not self.expected:
            changed = active != self.expected
            self.expected = active
            if changed:
                self.begin()

    @property
    def next(self) -> tuple[Bucket, int]:
        """The bucket to be launched next, and its position in the round."""
        return self.buckets[self.position], self.position

    def note_ready(self, index: int, bucket: Bucket) -> bool:
        """Note that the gradient of parameter ``index`` is complete; False if that is known, or not waited for."""
        if index in self._ready:
            return False
        self._ready.add(index)
        if index not in self.expected:
            return False
        self._waiting_for[id(bucket)] -= 1
        if self._filled is not None and not self._waiting_for[id(bucket)]:
            self._filled[id(bucket)] = None
        return True

    def next_is_full(self) -> bool:
        """Whether the next bucket waits for nothing; a full one waits until those before it are full too."""
        return not self._waiting_for[id(self.buckets[self.position])]

    def advance(self) -> None:
        """Go on to the next bucket, once this one is launched; after the last one a new round begins."""
        self.position += 1
        if self.position == len(self.buckets):
            self.begin()


class Header:
    """The exchange by which a rank that opens a round tells the others. Nobody waits for it when it is sent."""

    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement
        self._pending: PendingReports | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether an exchange was sent and not taken yet."""
        return self._pending is not None

    def send(self) -> None:
        """Start the exchange; the one before has been taken."""
        self._pending = self._agreement.start(CollectiveCall.ROUND)

    def poll(self) -> None:
        """Send on what has arrived: ranks that wait for the exchange later find it complete."""
        if self._pending is not None:
            self._pending.poll()

    def wait(self) -> None:
        """Wait until every rank has heard of the round; called before this rank waits for their gradients."""
        if self._pending is not None:
            self._pending()

    def complete(self) -> None:
        """Wait for all that this rank has begun; called by a thread once the optimizer is deleted."""
        self.wait()

    def take(self) -> RankReports | None:
        """Wait, and return the reports of all ranks; None if there is no exchange to wait for."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending()


def mispairing(reports: RankReports, names: RankNames) -> RuntimeError:
    """The error of a round that was paired with one from before another rank's ``zero_grad()``.

    Such a round has mixed gradients of two steps, and every rank sees that in the ``reports`` that opened it; ``names``
    are those of the ranks.
    """
    return RuntimeError(
        f"dist_asgd: ranks ran different numbers of backwards before zero_grad(), so that gradients of different steps "
        f"were reduced together; zero_grad() calls so far: {names.by_value(reports.column(DISCARDS))}. Call "
        f"zero_grad() on every rank to go on, and run the same number of backwards on all of them."
    )
