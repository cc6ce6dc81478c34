"""Pages that all ranks of one host have in common, made by all of them together, and what is logged if they cannot."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import torch

from .gloo import Gloo
from .pages import PageFile, Pages, Processes, host_of_this_process, library
from .reports import digest_of

# The environment variable that turns sharing off. Any other value than these names a host: ranks with different names
# share no memory, as if they lay on different hosts.
ENVIRONMENT = "DIST_ASGD_SHARED_MEMORY"
_OFF = ("0", "false", "off", "no")
_ON = ("", "1", "true", "on", "yes")


@cache
def _log_once(reason: str) -> None:
    logging.getLogger("dist_asgd").warning(
        "ranks of one host do not share memory: %s. What they would exchange there goes through Gloo's messages, with "
        "the same bits; on CPUs a step that is mostly communication takes about 1.4 times as long. With %s=0 in the "
        "environment nobody asks for shared memory.",
        reason,
        ENVIRONMENT,
    )


@dataclass(frozen=True, slots=True)
class HostGrid:
    """On which hosts ranks lie: ``num_hosts`` of them, one after the other, with ``ranks_per_host`` ranks each.

    The ranks of a host have the numbers 0, 1, ... there, and a column of the grid is those with the same number.
    """

    num_hosts: int
    ranks_per_host: int

    def place(self, rank: int) -> tuple[int, int]:
        """Return the host of ``rank``, and its number there."""
        return divmod(rank, self.ranks_per_host)

    def rank(self, host: int, number: int) -> int:
        """Return the rank with this number on ``host``."""
        return host * self.ranks_per_host + number

    def on(self, host: int) -> range:
        """Return the ranks of ``host``."""
        return range(self.rank(host, 0), self.rank(host + 1, 0))

    def column(self, number: int) -> range:
        """Return the ranks with this number, in the order of their hosts."""
        return range(number, self.num_hosts * self.ranks_per_host, self.ranks_per_host)


def host_grid(messages: Gloo) -> HostGrid | None:
    """Return the hosts of the ranks of ``messages``; None if those of one host may not share memory.

    Collective, and the same on all of them. None also if every host has one rank, or if hosts have different numbers
    of ranks, or ranks of several hosts alternate: the log says the latter once.
    """
    problem = _why_not()
    host = "" if problem is not None else _name_of_host()
    words = torch.tensor([digest_of(host) >> 1], device="cpu")
    if messages.any_of(problem is not None):
        if problem:
            _log_once(problem)
        return None
    if not messages.differing(words):
        return HostGrid(1, messages.world_size)
    hosts = messages.exchange(words).flatten().tolist()
    counts = [len(list(ranks)) for _, ranks in groupby(hosts)]
    if max(counts) == 1 and len(set(hosts)) == len(hosts):
        return None
    if len(set(counts)) > 1 or len(counts) > len(set(hosts)):
        if messages.rank == 0:
            _log_once(
                f"it takes equally many ranks of the process group on each host, one host after the other; here "
                f"{len(set(hosts))} hosts have {_described(Counter(hosts))} of the {len(hosts)} ranks"
            )
        return None
    return HostGrid(len(counts), counts[0])


def _described(counts: Counter[int]) -> str:
    """How many ranks the hosts have: ``8``, or ``4 to 8``."""
    least, most = min(counts.values()), max(counts.values())
    return f"{least}" if least == most else f"{least} to {most}"


def _name_of_host() -> str:
    """What the ranks of one host have in common. OSError if the system does not tell."""
    named = os.environ.get(ENVIRONMENT, "").lower()
    return f"{host_of_this_process()} {'' if named in _ON else named}"


def on_one_host(messages: Gloo) -> bool:
    """Whether the ranks of ``messages`` lie on one host and may share memory. Collective; the same on all of them."""
    grid = host_grid(messages)
    return grid is not None and grid.num_hosts == 1


def _why_not() -> str | None:
    """Why this rank cannot share memory; empty if nobody wants it to; None if it can."""
    if os.environ.get(ENVIRONMENT, "").lower() in _OFF:
        return ""
    loaded = library()
    if isinstance(loaded, str):
        return loaded
    try:
        host_of_this_process()
    except OSError as error:
        return f"the system does not tell which host this is ({error})"
    return None


def shared_pages(messages: Gloo, nbytes: int) -> tuple[Pages, Processes] | None:
    """Make a file of ``nbytes`` bytes that the ranks of ``messages``, all on one host, have mapped, and watch them.

    Collective on these ranks, and None on all of them if one cannot. The log says once what does not work.
    """
    pages: Pages | None = None
    file: PageFile | None = None
    problem: str | None = None
    if messages.rank == 0:
        try:
            pages, file = Pages.new(nbytes)
        except OSError as error:
            problem = f"no memory file can be made ({error})"
    rows = messages.exchange_objects((os.getpid(), file))
    numbers, found = [number for number, _ in rows], rows[0][1]
    processes: Processes | None = None
    if found is not None:
        try:
            if pages is None:
                pages = Pages.of(found, nbytes)
            processes = Processes(numbers, messages.ranks)
        except OSError as error:
            problem = f"memory of rank {messages.ranks[0]} cannot be opened ({error})"
    failed = messages.any_of(processes is None)
    # Only now all ranks have opened the file.
    if pages is not None:
        pages.close()
    if failed and problem:
        _log_once(problem)
    return None if failed or pages is None or processes is None else (pages, processes)
