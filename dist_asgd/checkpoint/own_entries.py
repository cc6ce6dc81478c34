"""Own entries in a checkpoint: what users keep in ``optimizer.state`` beside step, eta, mu, ax and masters.

Tensors and plain numbers of a parameter lie under ``optim.state.<name>.<key>``, as DCP puts them there, so that FSDP2
with ``torch.optim.ASGD`` reads and writes the same. Everything else (entries of the optimizer, containers, keys that
would not be the last word of such a name) is one object, ``optim.own``: a pair of dicts, the entries of the optimizer,
and those of parameters by name. Rank 0 saves whatever is no DTensor. Saving calls ``to_save`` and loading the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..placements.dtensor import is_dtensor
from ..state import KEYS, MASTER_KEY
from ..state import own_entries as own_of
from ..state_dict.own_entries import on_host
from .format.archives import serialized
from .format.writer import Serialized
from .values import CONSTANTS, plain, savable_tensor, tensors_in

if TYPE_CHECKING:
    from .keys import CheckpointKeys

OBJECTS = "own"
OBJECTS_KEY = f"optim.{OBJECTS}"
# The last words of keys that are no own entries.
RESERVED = (*KEYS, MASTER_KEY)


class OwnEntries(NamedTuple):
    """``of_params``, by the parameter's index, have keys of their own; ``objects`` is the rest, None if all have."""

    of_params: dict[int, dict[str, Any]]
    objects: Serialized | None


def to_save(state: Mapping[Any, Any], names: Sequence[str]) -> OwnEntries:
    """Return the own entries in ``state``, that of a state dict; ``names`` are those of the parameters.

    Raises:
        ValueError: an entry cannot be saved so that it loads safely; the error names it.
    """
    direct: dict[int, dict[str, Any]] = {}
    of_params: dict[str, dict[Any, Any]] = {}
    for index, name in enumerate(names):
        for key, value in own_of(state.get(index, {})).items():
            what = f"state[p][{key!r}] of parameter {name}"
            value = plain(value)
            has_place = isinstance(key, str) and key and "." not in key
            if has_place and (isinstance(value, Tensor) or type(value) in CONSTANTS):
                direct.setdefault(index, {})[key] = (
                    savable_tensor(value, what).detach() if isinstance(value, Tensor) else value
                )
            else:
                of_params.setdefault(name, {})[key] = _checked(key, value, what)
    shared = {}
    for key, value in state.items():
        if type(key) is int and 0 <= key < len(names):
            continue
        if isinstance(value, dict) and value.keys() >= set(KEYS):
            raise ValueError(
                f"dist_asgd: the state dict has the state of a parameter under {key!r}, and a checkpoint needs it "
                f"under the parameter's number: a state-dict hook has renamed it. Remove that hook to save."
            )
        shared[key] = _checked(key, plain(value), f"optimizer.state[{key!r}]")
    objects = None
    if shared or of_params:
        objects = Serialized(serialized((shared, of_params), "own entries"))
    return OwnEntries(direct, objects)


def _checked(key: Any, value: Any, what: str) -> Any:
    """Return a copy of ``value`` to serialize; ValueError if it would not load safely, or ranks hold parts of it."""
    if any(map(is_dtensor, tensors_in(value))):
        raise ValueError(
            f"dist_asgd: {what} has a DTensor inside a container, or under a key that is not one word: each rank has "
            f"its part, and only entries state[p]['one_word'] are saved in parts. Keep it under such a key."
        )
    try:
        copied = on_host(value)
        serialized((key, copied), what)
    except Exception as error:
        raise ValueError(
            f"dist_asgd: {what} ({type(value).__qualname__}) cannot be saved so that it loads safely: use tensors, "
            f"numbers, strings, None, and dicts, lists and tuples of them, or remove it while you save. torch said: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    return copied


# --- loading ---------------------------------------------------------------------------------------------


def of_params(
    checkpoint: CheckpointKeys,
    keys: Mapping[int, Mapping[str, str]],
    names: Mapping[int, str],
    params: Sequence[Tensor],
    live: Mapping[int, Mapping[Any, Any]],
) -> dict[int, dict[Any, Any]]:
    """Return the own entries of the parameters in ``keys``, by index; their tensors are read later.

    Args:
        keys: of each parameter, the checkpoint's keys of its state by their last word.
        names: what the checkpoint calls each parameter.
        params: all parameters of the optimizer.
        live: the ``state`` of now, which says how own DTensors are placed.
    """
    own: dict[int, dict[Any, Any]] = {}
    objects = [
        (index, last, key)
        for index, below in keys.items()
        for last, key in below.items()
        if last not in RESERVED and not isinstance(checkpoint.keys[key], TensorStorageMetadata)
    ]
    values = checkpoint.values([key for *_, key in objects]) if objects else {}
    _, by_name = shared_and_by_name(_read_objects(checkpoint))
    for index, below in keys.items():
        entries: dict[Any, Any] = dict(by_name.get(names[index], {}))
        for last, key in below.items():
            if last not in RESERVED and isinstance(checkpoint.keys[key], TensorStorageMetadata):
                like = _placed_like(live.get(index, {}).get(last), params[index])
                entries[last] = checkpoint.target_as_saved(key, like)
        if entries:
            own[index] = entries
    for index, last, key in objects:
        own.setdefault(index, {})[last] = values[key]
    return own


def _placed_like(live: Any, param: Tensor) -> Tensor | None:
    """Return the DTensor that an own tensor is placed like, if it has its shape; None if it is whole."""
    if is_dtensor(live):
        return live
    return param.detach() if live is None and is_dtensor(param) else None


def of_optimizer(checkpoint: CheckpointKeys, kept: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the own entries of the optimizer: those of the checkpoint, and of the state dict ``kept`` the others."""
    shared, _ = shared_and_by_name(_read_objects(checkpoint))
    return {key: value for key, value in kept.items() if type(key) is not int} | shared


def _read_objects(checkpoint: CheckpointKeys) -> Any:
    return checkpoint.values([OBJECTS_KEY])[OBJECTS_KEY] if OBJECTS_KEY in checkpoint.keys else None


def shared_and_by_name(value: Any) -> tuple[dict[Any, Any], dict[str, dict[Any, Any]]]:
    """Return the two dicts in ``value``, which was read from ``OBJECTS_KEY``; both are empty if it is no such pair."""
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, dict) for part in value):
        return value[0], {name: own for name, own in value[1].items() if isinstance(own, dict)}
    return {}, {}
