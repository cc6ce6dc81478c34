"""What wrappers of modules add to names: DDP, ``torch.compile``, activation checkpointing and FSDP1.

Loading a state dict compares ``param_names`` without these parts. Checkpoints and exports, which know the model, ask
it which module is a wrapper (``checkpoint/names.py``), and use this file for names whose model is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# No module has a child of these names for a reason of its own.
CERTAIN_PARTS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
# DDP and DataParallel say "module", and so may anybody else.
PARTS = CERTAIN_PARTS | {"module"}


def without_parts(name: str, parts: frozenset[str] = PARTS) -> str:
    """Return ``name`` without the ``parts``, wherever in it they are; its last word stays."""
    *modules, last = name.split(".")
    return ".".join([*(word for word in modules if word not in parts), last])


def wrappers_of(model: nn.Module) -> str:
    """Return what the wrappers around ``model`` put before all names in it, such as ``"module._orig_mod."``."""
    before = ""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            part, model = "module", model.module
        else:
            found = next(((p, m) for p, m in model.named_children() if p in CERTAIN_PARTS), None)
            if found is None:
                return before
            part, model = found
        before += f"{part}."


def name_below(before: str, name: str) -> str:
    """Return ``name`` without what ``wrappers_of`` has returned, and without the parts that are certainly wrappers'."""
    return without_parts(name.removeprefix(before), CERTAIN_PARTS)


def check_order(index: int, names: Sequence[Any], own_names: Sequence[Any]) -> None:
    """Raise ValueError if parameters of a group are known under the names of others.

    As in torch the order counts, so other names are no error: another wrapper or another module may have given them.
    """
    saved, own = ([without_parts(str(name)) for name in given] for given in (names, own_names))
    position_of = {name: position for position, name in enumerate(own)}
    for position, name in enumerate(saved):
        if position_of.get(name, position) != position and name != own[position]:
            raise ValueError(
                f"dist_asgd: param_groups[{index}] of the state dict has {names[position]!r} where the optimizer has "
                f"{own_names[position]!r} (entry {position}), and the optimizer has that at entry {position_of[name]}. "
                f"Pass the parameters in the order in which they were saved."
            )
