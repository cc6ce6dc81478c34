"""The Gloo group that messages on the host go through: the user's own, or one that only this package sees.

Where the user's group has no Gloo (NCCL alone), or must not be blocked (saves in the background), the ranks make one.
It opens a connection when a message first needs it, so that a rank has 2 log2 N of them for control messages, and it is
freed with its communicator.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_process_group_store

from .axes import timeout_of
from .reports import digest_of

DEFAULT_TIMEOUT = timedelta(minutes=30)
# A tag that no communicator uses.
_GREETING = 1


@dataclass(frozen=True)
class HostGroup:
    """A Gloo group: what sends and receives, its ranks as ranks of the default group in order, and its store.

    ``connected`` are the ranks, by position in the group, that this one has a connection to; None: all of them.
    """

    backend: Any
    ranks: Sequence[int]
    store: Store
    connected: set[int] | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> HostGroup:
        """Return the user's ``group``, which has Gloo for the CPU. No communication."""
        return cls(group, dist.get_process_group_ranks(group), _get_process_group_store(group))

    @classmethod
    def new(cls, ranks: Sequence[int], like: dist.ProcessGroup) -> HostGroup:
        """Make a group of ``ranks``, with the timeout of ``like`` and through its store. Collective on ``ranks``."""
        parent = _get_process_group_store(like)
        rank = dist.get_rank()
        key = f"dist_asgd/host/{digest_of(tuple(ranks))}"
        # The ranks of a group make their groups in one order, so each counts its own and all get one number.
        store = PrefixStore(f"{key}/{parent.add(f'{key}/rank{rank}', 1)}", parent)
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in the stub
        # Without it torch would take half an hour, whatever the user chose for `like`.
        options._timeout = timeout_of(like) or DEFAULT_TIMEOUT
        options._devices = [_device()]
        backend = dist.ProcessGroupGloo(store, list(ranks).index(rank), len(ranks), options)
        return cls(backend, list(ranks), store, set())

    def receive(self, tensor: Tensor, position: int, tag: int) -> dist.Work:
        """Start to receive ``tensor`` from the rank at ``position`` in the group. RuntimeError if the backend fails."""
        if self.connected is None:
            return cast(dist.Work, dist.irecv(tensor, self.ranks[position], group=self.backend, tag=tag))
        return cast(dist.Work, self.backend.recv([tensor], position, tag))

    def send(self, tensor: Tensor, position: int, tag: int) -> dist.Work:
        """Start to send ``tensor`` to the rank at ``position`` in the group. RuntimeError if the backend fails."""
        if self.connected is None:
            return cast(dist.Work, dist.isend(tensor, self.ranks[position], group=self.backend, tag=tag))
        return cast(dist.Work, self.backend.send([tensor], position, tag))

    def connect(self, positions: Iterable[int]) -> None:
        """Connect this rank to others, each of which must do the same. RuntimeError if one does not come in time."""
        if self.connected is None:
            return
        new = sorted(set(positions) - self.connected)
        if not new:
            return
        # The first message to a rank waits until that one sends or receives too, so each waits in a thread of its own:
        # one after the other, a circle of ranks would wait for each other.
        with ThreadPoolExecutor(len(new), thread_name_prefix="dist_asgd connect") as threads:
            for _ in threads.map(self._greet, new):
                continue
        self.connected.update(new)

    def _greet(self, position: int) -> None:
        ours, theirs = torch.zeros(1, device="cpu"), torch.zeros(1, device="cpu")
        for work in (self.receive(theirs, position, _GREETING), self.send(ours, position, _GREETING)):
            work.wait()


def _device() -> dist.ProcessGroupGloo.Device:
    """Return the network interface to use: that of ``GLOO_SOCKET_IFNAME``, or the one that leads to ``MASTER_ADDR``.

    torchrun's agents talk over the latter, while Gloo alone would take the host's name, which many containers cannot
    resolve.
    """
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if interfaces:
        return dist.ProcessGroupGloo.create_device(interface=interfaces.split(",")[0], lazy_init=True)
    address = _address_towards(os.environ.get("MASTER_ADDR", ""))
    on_one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if address is not None and (on_one_host or not address.startswith("127.")):
        return dist.ProcessGroupGloo.create_device(hostname=address, lazy_init=True)
    return dist.ProcessGroupGloo.create_default_device(lazy_init=True)


def _address_towards(host: str) -> str | None:
    """Return this host's IPv4 or IPv6 address on the way to ``host``; None if there is none. Sends nothing."""
    try:
        family, _, _, _, target = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return None
