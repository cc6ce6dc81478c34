"""The links between ranks, as a latency and a bandwidth each, and how long one collective call takes on them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..comm.dissemination import num_hops
from .setup import Setup
from .traffic import across_bytes_of

# The bytes per second of 1 Gbit/s.
GBIT = 1e9 / 8
# With Gloo this package's own calls take this many times the processor time of their messages: gradients are packed
# before, and summed after. benchmarks/links.py measures both.
_OWN_WORK = 1.75


@dataclass(frozen=True, slots=True)
class Links:
    """The links of a job, as they were given to ``plan`` or assumed by it.

    Attributes:
        link_gbit: What a node sends to the others for all of its ranks, in Gbit/s, while it receives as much.
        latency_us: The latency of a message between nodes, in microseconds.
        node_gbit: What a rank sends to the others of its node, in Gbit/s.
        node_latency_us: The latency of a message inside a node.
        host_gbit: At which rate the processor that computes passes messages on while it does nothing else; None if
            messages take nothing from it.
    """

    link_gbit: float
    latency_us: float
    node_gbit: float
    node_latency_us: float
    host_gbit: float | None = None


# What is assumed where nothing is given. NCCL: NVLink at two thirds of what an H100 has, and the latencies of a ring's
# step in NCCL's own tuning model. Gloo: loopback.
DEFAULTS = {
    "nccl": Links(math.inf, 14.0, 2400.0, 3.4, None),
    "gloo": Links(math.inf, 100.0, 16.0, 50.0, 12.0),
}


@dataclass(frozen=True, slots=True)
class Call:
    """One collective call, as seconds of what it needs: a link is busy for a time, and latency comes on top.

    inside   the rank's link to the others of its node
    across   the node's link to other nodes
    latency  of the messages that wait for one another
    host     the processor that also computes
    """

    inside: float = 0.0
    across: float = 0.0
    latency: float = 0.0
    host: float = 0.0

    @property
    def alone(self) -> float:
        """The seconds that it takes while nothing else happens: links and processor work at once."""
        return max(self.inside, self.across, self.host) + self.latency

    def half(self) -> Call:
        """One of the two passes of an all-reduce."""
        return Call(self.inside / 2, self.across / 2, self.latency / 2, self.host / 2)


def timed(
    links: Links, setup: Setup, ranks: int, spacing: int, sent_bytes: int, in_ring: bool, passes: int = 1
) -> Call:
    """A call of ``ranks`` ranks that are ``spacing`` numbers apart, in which each of them sends ``sent_bytes``.

    All ranks of a node make such calls at once, and share its link. In a ring messages wait for one another, once
    around; without one (Gloo's messages of this package) they leave all at once. An all-reduce has two ``passes``, for
    which NCCL takes trees between many nodes.
    """
    if ranks == 1 or not sent_bytes:
        return Call()
    in_node = max(1, min(ranks, setup.ranks_per_node // spacing))
    nodes = math.ceil(ranks / in_node)
    leaving = across_bytes_of(sent_bytes, ranks, spacing, setup, in_ring)
    # A ring passes all bytes on through every rank; those of the ranks at its ends leave the node, too.
    inside = 0 if in_node == 1 else sent_bytes if in_ring else sent_bytes - leaving
    # As NCCL's own tuning model counts them.
    hops_across, hops_inside = nodes - 1, ranks - nodes
    if not in_ring:
        hops_across, hops_inside = min(hops_across, 1), int(nodes == 1)
    elif setup.contiguous and passes == 2:
        hops_across, hops_inside = num_hops(nodes), in_node - 1
    host = 0.0 if links.host_gbit is None else sent_bytes / (links.host_gbit * GBIT)
    return Call(
        inside / (links.node_gbit * GBIT),
        leaving * setup.ranks_per_node / (links.link_gbit * GBIT),
        passes * (hops_across * links.latency_us + hops_inside * links.node_latency_us) * 1e-6,
        host if in_ring else host * _OWN_WORK,
    )


def exchanged(links: Links, setup: Setup) -> float:
    """The seconds of one control exchange, whose messages wait for one another."""
    hops = num_hops(setup.ranks)
    leaving = sum(1 << hop >= setup.ranks_per_node for hop in range(hops))
    return (leaving * links.latency_us + (hops - leaving) * links.node_latency_us) * 1e-6
