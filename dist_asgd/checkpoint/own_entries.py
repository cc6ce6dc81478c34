"""Own entries in a checkpoint: what users keep in ``optimizer.state`` beside step, eta, mu, ax and masters.

Tensors and plain numbers of a parameter lie under ``optim.state.<name>.<key>``, as DCP puts them there, so that FSDP2
with ``torch.optim.ASGD`` reads and writes the same. So does the state of other optimizers, such as AdamW, all of which
this file treats as own entries. Everything else (entries of the optimizer, containers, keys that
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
from ..state_dict.sharded import AVERAGE
from .format.archives import serialized
from .format.writer import Serialized
from .values import CONSTANTS, plain, savable_tensor, tensors_in

if TYPE_CHECKING:
    from .keys import CheckpointKeys

OBJECTS = "own"
# The last words of keys that are no own entries, of parameters that have an average.
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
        entry = state.get(index, {})
        # Without an average it is the state of another optimizer, such as AdamW's, and all of it is saved here.
        for key, value in (own_of(entry) if AVERAGE in entry else entry).items():
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
    root: str,
) -> dict[int, dict[Any, Any]]:
    """Return the own entries of the parameters in ``keys``, by index; their tensors are read later.

    Of a parameter without an average they are all that the checkpoint has of its state.

    Args:
        keys: of each parameter, the checkpoint's keys of its state by their last word.
        names: what the checkpoint calls each parameter.
        params: all parameters of the optimizer.
        live: the ``state`` of now, which says how own DTensors are placed.
        root: the root of the keys.
    """
    own: dict[int, dict[Any, Any]] = {}
    wanted = [
        (index, last, key)
        for index, below in keys.items()
        for last, key in below.items()
        if AVERAGE not in below or last not in RESERVED
    ]
    # Numbers are read at once, with the objects: many parameters share the chunk of one.
    at_once = [(index, last, key) for index, last, key in wanted if _is_number(checkpoint, key)]
    values = checkpoint.values([key for *_, key in at_once]) if at_once else {}
    _, by_name = shared_and_by_name(_read_objects(checkpoint, root))
    for index in keys:
        entries: dict[Any, Any] = dict(by_name.get(names[index], {}))
        if entries:
            own[index] = entries
    for index, last, key in wanted:
        if key in values:
            value = values[key]
            own.setdefault(index, {})[last] = value.reshape(()).clone() if isinstance(value, Tensor) else value
            continue
        now = live.get(index, {}).get(last)
        if AVERAGE not in keys[index]:
            _check_placement(checkpoint, key, now, params[index])
        own.setdefault(index, {})[last] = checkpoint.target_as_saved(key, _placed_like(now, params[index]))
    return own


def _is_number(checkpoint: CheckpointKeys, key: str) -> bool:
    """Whether ``key`` is an object, or a tensor without dimensions in one chunk."""
    entry = checkpoint.keys[key]
    return not isinstance(entry, TensorStorageMetadata) or (not len(entry.size) and checkpoint.is_single(key))


def _check_placement(checkpoint: CheckpointKeys, key: str, now: Any, param: Tensor) -> None:
    """Raise ValueError if nothing says how the tensor ``key`` is to be placed beside a DTensor."""
    shape = tuple(checkpoint.shape_of(key))
    known = now if isinstance(now, Tensor) else param
    if is_dtensor(param) and shape and tuple(known.shape) != shape:
        raise ValueError(
            f"dist_asgd: {key} is {shape} in the checkpoint, and its parameter is a DTensor of shape "
            f"{tuple(param.shape)}: nothing says how to place it. Load it into an optimizer that has taken a step on "
            f"the same model, or on parameters that are not sharded."
        )


def _placed_like(live: Any, param: Tensor) -> Tensor | None:
    """Return the DTensor that an own tensor is placed like, if it has its shape; None if it is whole."""
    if is_dtensor(live):
        return live
    return param.detach() if live is None and is_dtensor(param) else None


def of_optimizer(checkpoint: CheckpointKeys, kept: Mapping[Any, Any], root: str) -> dict[Any, Any]:
    """Return the own entries of the optimizer: those of the checkpoint, and of the state dict ``kept`` the others."""
    shared, _ = shared_and_by_name(_read_objects(checkpoint, root))
    return {key: value for key, value in kept.items() if type(key) is not int} | shared


def _read_objects(checkpoint: CheckpointKeys, root: str) -> Any:
    key = f"{root}.{OBJECTS}"
    return checkpoint.values([key])[key] if key in checkpoint.keys else None


def shared_and_by_name(value: Any) -> tuple[dict[Any, Any], dict[str, dict[Any, Any]]]:
    """Return the two dicts in ``value``, which was read from the key ``own``; both are empty if it is no such pair."""
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, dict) for part in value):
        return value[0], {name: own for name, own in value[1].items() if isinstance(own, dict)}
    return {}, {}
