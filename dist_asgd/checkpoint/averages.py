"""The averages beside an optimizer that a call saves or loads: their names, and what all ranks agree on.

``Saver`` and ``load`` call it with what users pass as ``averages=``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch.optim import Optimizer

from ..comm import Communicators
from ..sharded_average import ShardedAverage
from .sections import OPTIM, root_of

Averages = ShardedAverage | Mapping[str, ShardedAverage] | None
"""What users pass as ``averages=``: one average, which is then called ``average``, or several by name."""
DEFAULT_NAME = "average"
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def named(averages: Averages, optimizer: Optimizer) -> dict[str, ShardedAverage]:
    """Return the averages by name, sorted; raises TypeError or ValueError if they cannot be saved beside ``optimizer``.

    No communication.
    """
    if averages is None:
        return {}
    if isinstance(averages, ShardedAverage):
        averages = {DEFAULT_NAME: averages}
    if not isinstance(averages, Mapping) or not all(isinstance(a, ShardedAverage) for a in averages.values()):
        kinds = [type(a).__name__ for a in averages.values()] if isinstance(averages, Mapping) else averages
        raise TypeError(
            f"dist_asgd: averages must be a ShardedAverage, or a dict of names and ShardedAverages, got "
            f"{kinds if isinstance(averages, Mapping) else type(averages).__name__}. The average of a ShardedASGD is "
            f"saved with it."
        )
    for name, average in averages.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name == OPTIM:
            raise ValueError(
                f"dist_asgd: an average cannot be called {name!r}: its name is a part of keys and of command lines. "
                f"Use letters, digits, '_' and '-', and another word than {OPTIM!r}."
            )
        twin = next((other for other in averages if other != name and averages[other] is average), None)
        if twin is not None or average is optimizer:
            what = "the optimizer" if twin is None else f"the average {twin!r}"
            raise ValueError(f"dist_asgd: the average {name!r} is {what} as well: pass it once.")
    return {name: averages[name] for name in sorted(averages)}


def check_ranks(averages: Mapping[str, ShardedAverage], communicators: Communicators) -> None:
    """Raise ValueError if an average is sharded over other ranks than those that save or load together."""
    for name, average in averages.items():
        theirs = average.communicators
        if theirs.ranks != communicators.ranks:
            raise ValueError(
                f"dist_asgd: the average {name!r} ({root_of(name)}) is sharded over {theirs.world_size} ranks, and the "
                f"optimizer saves and loads on {communicators.world_size}: a checkpoint is written by all of them. "
                f"Give the average the process group, or a mesh of all ranks, of the optimizer."
            )
