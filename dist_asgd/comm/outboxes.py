"""The rings of ranks on one host: how large their outboxes are, and how they are made.

Gradients are packed, sent and summed stripe by stripe: a stripe is a send buffer, and an outbox holds a few of them.
"""

from __future__ import annotations

from .gloo import Gloo
from .ring import Ring, file_bytes
from .shared_pages import shared_pages

# Of gathers so many bytes are published at a time, so that they are read while they are in a cache.
PIECE_BYTES = 1 << 19
# The least that an outbox holds: some pieces of a gather.
OUTBOX_BYTES = 2 * PIECE_BYTES
# Gradients are packed and summed in stripes of this size: they stay in caches in between, and outboxes stay small.
STRIPE_BYTES = 1 << 21
# With several hosts a stripe costs messages between them: a longer one has fewer.
HOSTS_STRIPE_BYTES = 1 << 23
# How many send buffers an outbox holds: two in flight, and one whose end does not fit before that of the outbox.
SEND_BUFFERS = 3


def make_ring(messages: Gloo, outbox_bytes: int, timeout_s: float) -> Ring | None:
    """Make a ring for the ranks of ``messages``, which lie on one host; None on all of them if one cannot.

    Collective on these ranks. The log says once what does not work.
    """
    found = shared_pages(messages, file_bytes(messages.world_size, outbox_bytes))
    return found and Ring(found[0], messages.rank, found[1], messages.world_size, outbox_bytes, timeout_s)


def ring_for(send_bytes: int, messages: Gloo, ring: Ring, timeout_s: float) -> Ring:
    """Make a ring in place of ``ring``, on which nothing is in flight, for send buffers of ``send_bytes``.

    Collective on the ranks of ``messages``. MemoryError on all of them if one cannot.
    """
    nbytes = outbox_bytes_for(send_bytes)
    made = make_ring(messages, nbytes, timeout_s)
    if made is None:
        raise MemoryError(
            f"dist_asgd: {nbytes:,} bytes of memory that the ranks of this host share cannot be had, although "
            f"{ring.outbox_bytes:,} could. Pass shared_memory=False, or a smaller bucket_cap_mb."
        )
    return made


def outbox_bytes_for(send_bytes: int) -> int:
    """How large an outbox has to be for send buffers of ``send_bytes``."""
    return SEND_BUFFERS * -(-send_bytes // 4096) * 4096
