"""Two hosts on one machine: network namespaces with a cable between them whose rate can be set. It needs root on Linux.

A rate holds in each direction, as on a switched link. What ranks of one host send to each other goes through that
host's own loopback, at the speed of the machine.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType

INTERFACE = "cable"
ADDRESSES = ("10.213.9.1", "10.213.9.2")
NUM_HOSTS = 2
# Gloo listens on this interface's address, and does not look for one by the host's name.
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": INTERFACE}
# Processes of one machine could share memory, whatever network they have: these ranks never do.
MESSAGES = {**ENVIRONMENT, "DIST_ASGD_SHARED_MEMORY": "0"}
_CLONE_NEWNET = 0x40000000


class Hosts:
    """The two hosts. A context manager, which removes them.

    Raises RuntimeError where no namespaces can be made.
    """

    def __init__(self) -> None:
        self.names = [f"dist-asgd-{os.getpid()}-{index}" for index in range(len(ADDRESSES))]
        self._cleanup = ExitStack()
        try:
            self._make()
        except BaseException:
            self._cleanup.close()
            raise

    def _make(self) -> None:
        for name in self.names:
            _run("ip", "netns", "add", name)
            # The cable goes with its namespaces.
            self._cleanup.callback(_run, "ip", "netns", "delete", name)
        first, second = self.names
        _run("ip", "-n", first, "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", second)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _run("ip", "-n", name, "link", "set", interface, "up")

    def set_rate(self, gbit: float) -> None:
        """Limit the cable to ``gbit`` Gbit/s in each direction."""
        # What passes at once has to be a few packets of the kernel's largest size, and a millisecond of a fast link.
        burst = max(1 << 18, int(gbit * 1e9 / 8 * 1e-3))
        for name in self.names:
            limit = ("rate", f"{gbit * 1000:.0f}mbit", "burst", str(burst), "latency", "50ms")
            _run("tc", "-n", name, "qdisc", "replace", "dev", INTERFACE, "root", "tbf", *limit)

    def entrance(self, ranks_per_host: int) -> partial[None]:
        """What a rank calls with its number to move to its host; ranks fill one host after the other."""
        return partial(_enter, tuple(self.names), ranks_per_host)

    def __enter__(self) -> Hosts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()


def _enter(names: tuple[str, ...], ranks_per_host: int, rank: int) -> None:
    """Move this thread, and threads that it starts from now on, to the namespace of a rank."""
    # Linux shares processors out by session: a rank gets one of its own, as torchrun makes it.
    os.setsid()
    # Ranks of one host share memory, and those of the other do not.
    os.environ.setdefault("DIST_ASGD_SHARED_MEMORY", names[rank // ranks_per_host])
    with Path("/var/run/netns", names[rank // ranks_per_host]).open() as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
