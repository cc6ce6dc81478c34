"""Whether there is memory for averages, before the step that takes it: a lack of it is an error that all can react to.

Linux promises memory to everybody and finds it when it is written; if there is none then, it ends a process. So a step
that is about to write averages for the first time asks beforehand what is left. On other devices it makes the memory.
Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .average import AverageMemory

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
REMEDY = (
    "Nothing was changed, and the step can be tried again, with a later t0, for example. More ranks need less each, as "
    "do averages with an average_dtype as narrow as the parameters"
)


def make_room(buffers: Sequence[AverageMemory], ranks_on_host: int) -> None:
    """Find memory for the averages of ``buffers``, in none of which a step has written yet.

    Args:
        buffers: on any devices.
        ranks_on_host: how many ranks of this host do the same now; 1 if it is not known.

    Raises:
        RuntimeError: there is none; nothing is made then.
    """
    _ask_host([buffer for buffer in buffers if buffer.is_offloaded or not buffer.defers_average], ranks_on_host)
    deferred = [buffer for buffer in buffers if buffer.defers_average]
    made: list[Tensor] = []
    try:
        for buffer in deferred:
            made.append(buffer.new_average(buffer.average.dtype))
    except (torch.OutOfMemoryError, MemoryError) as error:
        got = sum(memory.nbytes for memory in made)
        del made
        wanted = sum(buffer.average.nbytes for buffer in deferred)
        raise RuntimeError(
            f"dist_asgd: averages begin to take memory with this step, and there is not enough on "
            f"{deferred[0].device}: wanted {_mib(wanted)}, got {_mib(got)} of it. {REMEDY}; a ShardedAverage with "
            f"average_device='cpu' needs none there. ({error})"
        ) from None
    for buffer, memory in zip(deferred, made, strict=True):
        buffer.reserve_average(memory=memory)
    for buffer in buffers:
        buffer.reserve_average()


def _ask_host(buffers: Sequence[AverageMemory], ranks_on_host: int) -> None:
    """Raise RuntimeError if the host cannot have the memory for averages on CPUs."""
    # Ranks have equally many elements of whole parameters, and of local tensors perhaps not.
    whole = sum(b.average.nbytes for b in buffers if all(member.is_whole for member in b.members))
    own = sum(buffer.average.nbytes for buffer in buffers)
    if not own:
        return
    others = f" with the {ranks_on_host - 1} other ranks of this host"
    # Ranks of one host may be in control groups of their own.
    for wanted, whose, left in (
        (own, "", available_bytes()),
        (own + whole * (ranks_on_host - 1), others, available_bytes(in_groups=False) if ranks_on_host > 1 else None),
    ):
        if left is not None and wanted > left:
            raise RuntimeError(
                f"dist_asgd: averages begin to take memory with this step, and this host has not enough: wanted "
                f"{_mib(wanted)}{whose}, and {_mib(left)} are left, swap included. {REMEDY}."
            )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def available_bytes(in_groups: bool = True) -> int | None:
    """How many bytes this process could still write, at most: of the host, and ``in_groups`` of its control groups.

    None if the system does not say so.
    """
    meminfo = _fields(_PROC / "meminfo", 1024)
    if "MemAvailable" not in meminfo:
        return None
    swap = meminfo.get("SwapFree", 0)
    return min([meminfo["MemAvailable"] + swap, *(left + swap for left in (_left_in_groups() if in_groups else ()))])


def _left_in_groups() -> list[int]:
    """The bytes below the limit of each control group that this process is in, without swap."""
    found = []
    for line in _text(_PROC / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, is_line, path = rest.partition(":")
        if not is_line:
            continue
        is_second = controllers == ""
        if not (is_second or "memory" in controllers.split(",")):
            continue
        root = _CGROUPS if is_second else _CGROUPS / "memory"
        names = ("memory.max", "memory.current") if is_second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        # Inside of a container the path may be one that only the host knows.
        for folder in {root, *(root.joinpath(*Path(path).parts[1:end]) for end in range(2, len(Path(path).parts) + 1))}:
            limit, usage = (_text(folder / name).strip() for name in names)
            if limit.isdecimal() and usage.isdecimal():
                # What files and their names have in memory is given back when others need it.
                stat = _fields(folder / "memory.stat", 1)
                files = "inactive_file", "active_file"
                kinds = (*files, "slab_reclaimable") if is_second else tuple(f"total_{kind}" for kind in files)
                found.append(max(0, int(limit) - int(usage) + sum(stat.get(kind, 0) for kind in kinds)))
    return found


def _fields(path: Path, unit: int) -> dict[str, int]:
    """The numbers in a file of lines like ``MemFree: 12 kB`` or ``file 12``, times ``unit``."""
    rows = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) * unit for row in rows if len(row) > 1 and row[1].isdecimal()}


def _text(path: Path) -> str:
    """What a file has; "" if it cannot be read, as on other systems than Linux."""
    try:
        return path.read_text(errors="surrogateescape")
    except OSError:
        return ""
