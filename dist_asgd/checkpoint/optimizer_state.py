"""Reading the state of one optimizer, or of one average beside it, for its ``load_state_dict()``.

``load`` calls ``read_optimizer`` for each root of a checkpoint (see ``sections``). Nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..state import MASTER_KEY
from ..state import own_entries as own_of
from ..state_dict.sharded import AVERAGE
from . import own_entries
from .format.manifest import CheckpointError
from .keys import CheckpointKeys, KeyMismatch, PlainNameIndex
from .names import Names
from .optimizer_entries import ASGD, class_of, is_of_class, refuse
from .options import group_options, option_keys_of, option_values
from .sections import CLASS, GROUPS, MODEL, SCALARS, STATE


class OptimizerState(NamedTuple):
    """What a checkpoint gives one optimizer or average.

    ``state_dict`` is for its ``load_state_dict()``; ``same_dtype`` are the parameters, by index, that have the dtype of
    the checkpoint and no average.
    """

    state_dict: dict[str, Any]
    same_dtype: frozenset[int]

    @property
    def with_average(self) -> list[int]:
        """The parameters of which ``state_dict`` has an average."""
        state = self.state_dict[STATE]
        return [key for key, entry in state.items() if type(key) is int and AVERAGE in entry]


def read_optimizer(
    checkpoint: CheckpointKeys,
    names: Names,
    optimizer: Optimizer,
    live: dict[str, Any],
    mismatch: KeyMismatch,
    root: str,
    strict: bool,
) -> OptimizerState:
    """Read what ``checkpoint`` has below ``root``; ``live`` is the state dict of now. Tensors are read later.

    Raises ValueError, if ``strict``, for the state of an optimizer of another class. Otherwise that is kept as it is.
    """
    refuse(optimizer)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    options_of = option_keys_of(checkpoint, root)
    state_prefix = f"{root}.{STATE}."
    below_of = {
        parent.removeprefix(state_prefix): below
        for parent, below in checkpoint.parents.items()
        if parent.startswith(state_prefix)
    }
    saved_class = _class_in(checkpoint, root, below_of, options_of)
    if saved_class is not None and not is_of_class(optimizer, saved_class):
        text = f"{root} has the state of {saved_class}, and the optimizer is {class_of(optimizer)}"
        if strict:
            raise ValueError(
                f"dist_asgd: {text}. Build the optimizer that was saved, or pass strict=False, which loads the model "
                f"and leaves the optimizer as it is."
            )
        mismatch.unexpected.append(text)
        return OptimizerState(live, frozenset())
    by_plain_name = PlainNameIndex(options_of.keys() | below_of.keys())
    used: set[str] = set()
    used_name: dict[int, str] = {}
    state_keys: dict[int, dict[str, str]] = {}
    option_keys: dict[int, dict[str, str]] = {}
    for index, aliases in enumerate(names.of_params):
        # Of a shared parameter any name will do: another wrapping may have put another one first.
        name = next((found for n in aliases if (found := by_plain_name.find(n)) is not None), None)
        if name is None:
            mismatch.missing.append(state_prefix + aliases[0])
            continue
        used.add(state_prefix + name)
        used_name[index] = name
        state_keys[index] = checkpoint.parents.get(state_prefix + name, {})
        option_keys[index] = options_of.get(name, {})
    # Of parameters without an average there may be own entries of the user, which are nothing to miss.
    mismatch.unexpected += [
        parent
        for name, below in below_of.items()
        if (AVERAGE in below or saved_class not in (ASGD, None)) and (parent := state_prefix + name) not in used
    ]
    mismatch.num_matches += len(used_name)
    with_average = [below for below in state_keys.values() if AVERAGE in below]
    scalar_keys = [key for below in with_average for last, key in below.items() if last in SCALARS]
    scalars = checkpoint.values(scalar_keys)
    own = own_entries.of_params(checkpoint, state_keys, used_name, params, live["state"], root)
    state: dict[Any, Any] = {}
    same_dtype: set[int] = set()
    for index, param in enumerate(params):
        entry = live["state"].get(index)
        if index in state_keys:
            model_keys = (checkpoint.find(f"{MODEL}.{name}") for name in names.of_params[index])
            model_key = next((key for key in model_keys if key is not None), None)
            entry = _param_state(checkpoint, state_keys[index], scalars, entry, param, model_key)
            entry = {**(entry or {}), **own.get(index, {})} or None
            if model_key is not None and checkpoint.dtype_of(model_key) == param.dtype:
                same_dtype.add(index)
        if entry is not None:
            state[index] = entry
    options = option_values(checkpoint, option_keys, live["param_groups"])
    groups = [group_options(group, option_keys, options) for group in live["param_groups"]]
    for group in groups:
        for index in group["params"]:
            # As in torch: a parameter that has never stepped has no state.
            entry = state.get(index, {})
            if index not in state_keys or AVERAGE not in entry or not _never_stepped(entry, group["lr"]):
                continue
            # Own entries are kept, and with them all others: torch makes none beside them.
            if not own_of(entry):
                del state[index]
    state |= own_entries.of_optimizer(checkpoint, {} if strict else live["state"], root)
    indices = frozenset(index for index in same_dtype if AVERAGE not in state.get(index, {}))
    return OptimizerState({STATE: state, GROUPS: groups}, indices)


def _class_in(
    checkpoint: CheckpointKeys, root: str, below_of: Mapping[str, Mapping[str, str]], options_of: Mapping[str, Any]
) -> str | None:
    """Return the class of the optimizer that was saved; None if nothing tells, as of what torch's helpers write."""
    key = f"{root}.{CLASS}"
    if key in checkpoint.keys:
        found = checkpoint.values([key])[key]
        return found if isinstance(found, str) else None
    if any(AVERAGE in below for below in below_of.values()) or any("lambd" in below for below in options_of.values()):
        return ASGD
    return None


def _param_state(
    checkpoint: CheckpointKeys,
    keys: dict[str, str],
    scalars: dict[str, Tensor],
    live: dict[str, Any] | None,
    param: Tensor,
    model_key: str | None,
) -> dict[str, Any] | None:
    """Return the entry of one parameter, from its keys by their last word; None if the checkpoint has no ``ax``.

    ``live`` is the entry of now, whose ``ax`` and master say how the loaded ones are sharded. ``model_key`` is the key
    of the parameter itself.
    """
    if AVERAGE not in keys:
        return None
    absent = [key for key in SCALARS if key not in keys]
    if absent:
        raise CheckpointError(f"dist_asgd: {keys[AVERAGE]} is there without {absent}: this is no state of ASGD.")
    live = live or {AVERAGE: param.detach()}
    # Cloned: equal values were read once, and torch's optimizer keeps the tensors that it is given.
    entry: dict[str, Any] = {key: scalars[keys[key]].reshape(()).clone() for key in SCALARS}
    for key in (AVERAGE, MASTER_KEY):
        # Without a saved master the saved parameter is one: it is read before it is rounded to this model's dtype.
        source = keys.get(key, model_key if key == MASTER_KEY else None)
        if key in live and source is not None:
            entry[key] = checkpoint.target_for(source, live[key], widen=True)
    return entry


def _never_stepped(entry: dict[str, Any], lr: Any) -> bool:
    eta = entry["eta"]
    return bool(entry["step"] == 0 and eta == torch.as_tensor(lr, dtype=eta.dtype, device=eta.device).reshape(()))
