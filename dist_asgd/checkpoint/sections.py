"""The first words of a checkpoint's keys, and the keys of the optimizer and of each average below them.

The state of an optimizer lies under a *root*: ``optim``, or ``averages.<name>`` for an average beside an optimizer.
Below every root the keys are the same (``state.<parameter>.<key>``, ``param_groups.<parameter>.<option>``, ``own``), so
that one code writes, reads and prints both.
"""

from __future__ import annotations

from collections.abc import Iterable

MODEL, OPTIM, AVERAGES, EXTRA = "model", "optim", "averages", "extra"
STATE, GROUPS = "state", "param_groups"
# The class of an optimizer that is no ASGD, by which a load into another one is refused.
CLASS = "class"
SCALARS = ("step", "eta", "mu")
# Keys of groups that say how a process runs, or which parameters there are: no load takes them, and no ASGD has them.
NOT_SAVED = ("params", "fused")


def root_of(name: str) -> str:
    """Return the root of the average ``name``."""
    return f"{AVERAGES}.{name}"


def average_names(keys: Iterable[str]) -> list[str]:
    """Return the names of the averages among the keys of a checkpoint, sorted."""
    before = f"{AVERAGES}."
    return sorted({key.split(".", 2)[1] for key in keys if key.startswith(before)})
