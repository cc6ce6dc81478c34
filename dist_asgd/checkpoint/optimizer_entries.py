"""What a checkpoint holds of one optimizer, or of one average beside it, below its root (see ``sections``).

The optimizer may be any of ``torch.optim``. Its state is saved by parameter, as ``get_optimizer_state_dict`` with
``flatten_optimizer_state_dict=True`` has it, so that torch's own helpers read it: ``step``, ``eta``, ``mu``, ``ax`` and
a master of an ASGD, and of others whatever they keep. Nothing of it is left out: what cannot be saved is refused.
``entries.state_to_save`` calls ``entries_of``; loading uses the class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from ..placements.dtensor import is_dtensor
from ..placements.shard_tensor import ShardTensor
from ..sharded_state import ShardedState
from ..state import MASTER_KEY
from ..state_dict.sharded import AVERAGE, NotGatherable
from . import own_entries
from .names import Names
from .sections import CLASS, GROUPS, NOT_SAVED, SCALARS, STATE
from .values import check_option

ASGD = "ASGD"
# Optimizers that keep no state of each parameter, and what to do instead.
_REFUSED = {
    "LBFGS": (
        "its state is of all parameters at once, in their order, so it has no place under their names",
        "Pass its state_dict() in extra, and load that on as many ranks",
    ),
    "ZeroRedundancyOptimizer": (
        "each rank has the state of other parameters",
        "Use the optimizer itself on parameters of FSDP2, which are saved sharded",
    ),
}


def class_of(optimizer: Optimizer) -> str:
    """Return the name of the optimizer's class, or of the class of ``torch.optim`` that it is derived from.

    ``ShardedASGD`` and ``ShardedAverage`` have the state of an ASGD. Wrappers of trainers are what they wrap.
    """
    optimizer = _unwrapped(optimizer)
    if isinstance(optimizer, ShardedState):
        return ASGD
    known = (kind for kind in type(optimizer).__mro__ if kind.__module__.startswith("torch.optim."))
    name = next(known).__name__
    return type(optimizer).__name__ if name == Optimizer.__name__ else name


def is_of_class(optimizer: Optimizer, name: str) -> bool:
    """Whether the optimizer is of the class that ``class_of`` has called ``name``, or derived from it."""
    return name in {class_of(optimizer), *(kind.__name__ for kind in type(_unwrapped(optimizer)).__mro__)}


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def refuse(optimizer: Optimizer) -> None:
    """Raise ValueError if the optimizer is of a class whose state has no place in a checkpoint."""
    for kind in type(_unwrapped(optimizer)).__mro__:
        if kind.__name__ in _REFUSED:
            why, remedy = _REFUSED[kind.__name__]
            raise ValueError(
                f"dist_asgd: a checkpoint cannot hold the state of {type(optimizer).__name__}: {why}. {remedy}."
            )


def entries_of(optimizer: Optimizer, saved: Mapping[str, Any], names: Names, rank: int, replica: int) -> dict[str, Any]:
    """Return what this rank has to save of ``optimizer``, by key below its root; tensors are the live ones.

    Not collective. ``saved`` is the optimizer's state dict. Rank 0 saves whatever all ranks hold alike.

    Raises:
        ValueError: something in the state dict cannot be saved so that it loads; the error names it.
    """
    _check(optimizer, saved, names)
    entries: dict[str, Any] = {}
    first_names = [aliases[0] for aliases in names.of_params]
    own = own_entries.to_save(saved["state"], first_names)
    if own.objects is not None and not rank:
        entries[own_entries.OBJECTS] = own.objects
    name = class_of(optimizer)
    entry_of = [saved["state"].get(index, {}) for index in range(len(first_names))]
    is_asgd = name == ASGD or any(AVERAGE in entry for entry in entry_of)
    if not is_asgd and not rank:
        entries[CLASS] = name
    for index, (param_name, entry) in enumerate(zip(first_names, entry_of, strict=True)):
        kept = {key: entry[key] for key in (*SCALARS, AVERAGE, MASTER_KEY) if AVERAGE in entry and key in entry}
        for key, value in (kept | own.of_params.get(index, {})).items():
            if not rank or is_own(value, replica):
                entries[f"{STATE}.{param_name}.{key}"] = value
    # torch's readers ask for every option that their optimizer has: torch.optim.ASGD has no ``fused``, and AdamW has.
    not_saved = NOT_SAVED if is_asgd else ("params",)
    for group in () if rank else saved["param_groups"]:
        # NotGatherable is written as the False that it stands for.
        options = {
            key: False if isinstance(value, NotGatherable) else value
            for key, value in group.items()
            if key not in not_saved
        }
        for key in options:
            if not isinstance(key, str) or not key or "." in key:
                raise ValueError(
                    f"dist_asgd: param_groups has an option {key!r:.80}, and a checkpoint could not tell it from the "
                    f"names of parameters: use a name without dots."
                )
            check_option(options[key], f"the option {key!r:.80} of param_groups")
        for index in group["params"]:
            prefix = f"{GROUPS}.{names.of_params[index][0]}."
            for key, value in options.items():
                entries[prefix + key] = value
    return entries


def _check(optimizer: Optimizer, saved: Mapping[str, Any], names: Names) -> None:
    """Raise ValueError if the state dict has something that has no place in a checkpoint."""
    kind = type(optimizer).__name__
    others = [] if isinstance(optimizer, ShardedState) else sorted(map(str, saved.keys() - {"state", "param_groups"}))
    if others:
        raise ValueError(
            f"dist_asgd: state_dict() of {kind} has {others} beside 'state' and 'param_groups', and a checkpoint would "
            f"lose it. Pass it in extra, and leave it out of state_dict() while you save."
        )
    for index, aliases in enumerate(names.of_params):
        entry = saved["state"].get(index, {})
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"dist_asgd: the state of parameter {aliases[0]} in {kind} is a {type(entry).__name__}, and a "
                f"checkpoint holds dicts of named values. Keep it as state[p]['one_word']."
            )
        absent = [key for key in SCALARS if AVERAGE in entry and key not in entry]
        if absent:
            raise ValueError(
                f"dist_asgd: the state of parameter {aliases[0]} in {kind} has {AVERAGE!r} without {absent}, which a "
                f"load would take for a damaged ASGD. Keep it under another key than {AVERAGE!r}."
            )


def is_own(value: Any, replica: int) -> bool:
    """Whether a rank other than 0 may have to write ``value``: it is sharded, and of the first replica.

    A container is if it holds something that is.
    """
    if isinstance(value, Mapping | list):
        return any(is_own(item, replica) for item in (value.values() if isinstance(value, Mapping) else value))
    return not replica if isinstance(value, ShardTensor) else is_dtensor(value)


def restore_dtypes(optimizer: Optimizer, loaded: Mapping[Any, Any], indices: frozenset[int]) -> None:
    """Give the parameters in ``indices`` the state in ``loaded`` in the dtypes that it was saved in.

    ``Optimizer.load_state_dict`` casts state to the dtype of its parameter, which would lose bits of state that is
    wider. ``indices`` are the parameters that have the dtype of the checkpoint.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index in indices:
        entry: Any = optimizer.state.get(params[index])
        for key, value in loaded.get(index, {}).items() if isinstance(entry, dict) else ():
            live = entry.get(key)
            if not (isinstance(live, torch.Tensor) and isinstance(value, torch.Tensor)):
                continue
            if key != "step" and live.dtype != value.dtype and live.shape == value.shape:
                entry[key] = value.to(live.device)
