"""Pages that all ranks of one host have in common, made by all of them together, and what is logged if they cannot."""

from __future__ import annotations

import logging
import os
from functools import cache

import torch

from .gloo import Gloo
from .pages import PageFile, Pages, Processes, host_of_this_process, library
from .reports import digest_of

ENVIRONMENT = "DIST_ASGD_SHARED_MEMORY"


@cache
def _log_once(reason: str) -> None:
    logging.getLogger("dist_asgd").warning(
        "ranks of one host do not share memory: %s. What they would exchange there goes through Gloo's messages, with "
        "the same bits; on CPUs a step that is mostly communication takes about 1.4 times as long. With %s=0 in the "
        "environment nobody asks for shared memory.",
        reason,
        ENVIRONMENT,
    )


def on_one_host(messages: Gloo) -> bool:
    """Whether the ranks of ``messages`` lie on one host and may share memory. Collective; the same on all of them."""
    problem = _why_not()
    host = "" if problem is not None else host_of_this_process()
    words = torch.tensor([digest_of(host) >> 1], device="cpu")
    if messages.any_of(problem is not None):
        if problem:
            _log_once(problem)
        return False
    return not messages.differing(words)


def _why_not() -> str | None:
    """Why this rank cannot share memory; empty if nobody wants it to; None if it can."""
    if os.environ.get(ENVIRONMENT, "1").lower() in ("0", "false", "off", "no"):
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
