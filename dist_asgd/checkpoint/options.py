"""The options of parameter groups in a checkpoint: found by parameter, read, and compared within each group.

``load`` calls ``option_keys_of``, ``option_values`` and ``group_options`` in this order. An option is what
``param_groups`` has beside the parameters: the hyperparameters, and whatever users add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .containers import CONTAINERS, Containers
from .format.writer import KeyPath
from .keys import CheckpointKeys
from .sections import GROUPS, NOT_SAVED
from .values import deep_copy, same_values

NOT_LOADED = (*NOT_SAVED, "param_names")


def option_keys_of(checkpoint: CheckpointKeys, root: str) -> dict[str, dict[str, str]]:
    """Return, by parameter name, the keys of its group's hyperparameters below ``root``, by hyperparameter.

    In a flattened state dict they stand under the parameter's name; else under the group's number, beside the list of
    the group's parameter names. The key of a container is the one that it would have as a whole.
    """
    below_of = options_by_owner(checkpoint, root)
    numbered = [below for below in below_of.values() if below.get("params") in checkpoint.keys]
    lists = checkpoint.values([below["params"] for below in numbered])
    options = {
        name: below
        for below in numbered
        if isinstance(lists[below["params"]], list)
        for name in lists[below["params"]]
        if isinstance(name, str)
    }
    options.update(below_of)
    loaded = {
        name: {last: key for last, key in below.items() if last not in NOT_LOADED} for name, below in options.items()
    }
    return {name: keys for name, keys in loaded.items() if keys}


def options_by_owner(checkpoint: CheckpointKeys, root: str) -> dict[str, dict[str, str]]:
    """Return the keys of options below ``root``, by the parameter's name or the group's number, and by option."""
    prefix = f"{root}.{GROUPS}."
    below_of: dict[str, dict[str, str]] = {}
    for key in checkpoint.keys:
        if key.startswith(prefix):
            whole = _option_key(checkpoint.path_of(key), key, prefix)
        elif key.startswith(f"{CONTAINERS}.{prefix}"):
            whole = key.removeprefix(f"{CONTAINERS}.")
        else:
            continue
        owner, _, option = whole.removeprefix(prefix).rpartition(".")
        below_of.setdefault(owner, {})[option] = whole
    return below_of


def is_numbered(checkpoint: CheckpointKeys, below: Mapping[str, str]) -> bool:
    """Whether the options in ``below`` stand under a group's number, as DCP writes state dicts that are not flat."""
    paths = [checkpoint.path_of(key) for key in below.values() if key in checkpoint.keys]
    return any(len(path) > 3 and path[1] == GROUPS and isinstance(path[2], int) for path in paths)


def _option_key(path: KeyPath, key: str, prefix: str) -> str:
    """Return the key of the whole option that ``key`` lies in, by DCP's path of it."""
    if len(path) > 2 and f"{path[0]}.{path[1]}".startswith(prefix):
        return f"{path[0]}.{path[1]}"
    if len(path) > 4 and path[1] == GROUPS and isinstance(path[2], int):
        return ".".join(map(str, path[:4]))
    return key


def option_values(
    checkpoint: CheckpointKeys, option_keys: Mapping[Any, Mapping[str, str]], live: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Return the values of all options by key. They are read at once, because those of a group are compared.

    ``live`` are the groups of now, of the parameters that ``option_keys`` has.
    """
    group_of = {index: group for group in live for index in group["params"]}
    now = {
        key: group_of.get(index, {}).get(option)
        for index, below in option_keys.items()
        for option, key in below.items()
    }
    single = [key for key in now if key in checkpoint.keys and not checkpoint.is_tensor(key)]
    tensors = [key for key in now if key in checkpoint.keys and checkpoint.is_tensor(key)]
    numbers = [key for key in tensors if checkpoint.is_single(key)]
    options = checkpoint.values(single + numbers)
    options |= {key: checkpoint.tensor(key) for key in tensors if key not in options}
    apart = {key: value for key, value in now.items() if key not in checkpoint.keys}
    if apart:
        options |= Containers(checkpoint).read(apart, lambda key, _like: checkpoint.tensor(key))
    return options


def group_options(
    live: dict[str, Any], option_keys: dict[int, dict[str, str]], options: dict[str, Any]
) -> dict[str, Any]:
    """Return the group with the hyperparameters of the checkpoint, which must be equal for all its parameters."""
    first: dict[str, Any] | None = None
    for index in live["params"]:
        if not option_keys.get(index):
            continue
        values = {last: options[key] for last, key in option_keys[index].items()}
        if first is None:
            first = values
        for key in first.keys() | values.keys():
            if not _are_alike(first.get(key), values.get(key)):
                raise ValueError(
                    f"dist_asgd: the parameters of one group were saved with different {key}: {first.get(key)} and "
                    f"{values.get(key)} ({option_keys[index].get(key)}). Build the optimizer with the groups that were "
                    f"saved."
                )
    # Copied: groups with equal options were given the same objects.
    return {**live, **deep_copy(first or {})}


def _are_alike(a: Any, b: Any) -> bool:
    # 1 and 1.0 are alike, as they are for torch.
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return same_values(a, b) or (numbers and bool(a == b))
