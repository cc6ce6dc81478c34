"""Dicts and lists among the values of a checkpoint: taken apart as DCP does, and built again as they were saved.

DCP gives every leaf of a dict, and of a list with tensors in it, a key of its own: ``model.enc._extra_state.scale``.
These keys do not tell everything. Keys that are no strings, and containers that are empty, are lost. So a save adds
one object for each such container, its *skeleton*, under ``containers.<key>``: the container itself with None in place
of its tensors, and for each tensor where it was and which key has it. What DCP wrote has no skeletons; it is built from
the keys, and the container that the model or optimizer has now says what these do not.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from .format.archives import MAX_DEPTH
from .format.manifest import CheckpointError
from .format.writer import KeyPath
from .values import deep_copy

if TYPE_CHECKING:
    from .keys import CheckpointKeys

CONTAINERS = "containers"
# Lists that DCP has taken apart lack the positions of what was empty; no list lacks more than so many.
_MAX_ABSENT = 4096
TensorOf = Callable[[str, Tensor | None], Tensor]
"""Returns the tensor of a key, placed like a live one if that has its shape; its data may be read later."""


class TakenApart(NamedTuple):
    """A container: ``leaves`` and their ``paths``, by DCP's keys; ``skeleton`` is None if there was no container."""

    leaves: dict[str, Any]
    paths: dict[str, KeyPath]
    skeleton: Any


def take_apart(section: str, key: str, value: Any) -> TakenApart:
    """Take ``value`` apart as DCP does; it is the one leaf if DCP leaves it whole.

    Raises ValueError, as DCP does, if two leaves have the same key: ``{1: a, "1": b}``.
    """
    full = f"{section}.{key}"
    if not isinstance(value, Mapping | list):
        return TakenApart({full: value}, {full: (section, key)}, None)
    try:
        leaves, paths = flatten_state_dict({section: {key: value}})
    except ValueError as error:
        raise ValueError(
            f"dist_asgd: two entries of {full} have the same name in a checkpoint ({error}): keys of a dict must "
            f"differ as strings."
        ) from error
    except RecursionError:
        raise ValueError(
            f"dist_asgd: {full} ({type(value).__qualname__}) cannot be saved so that it loads safely: it is inside "
            f"itself, or nested more than {MAX_DEPTH} deep."
        ) from None
    if leaves.keys() == {full}:
        return TakenApart(leaves, paths, None)
    tensors: list[tuple[tuple[int, ...], str]] = []
    without = _without_tensors(value, full, (), tensors)
    return TakenApart(leaves, paths, (without, tensors))


def _without_tensors(value: Any, key: str, at: tuple[int, ...], tensors: list[tuple[tuple[int, ...], str]]) -> Any:
    """Return a copy of ``value`` without the tensors that have keys of their own; they are added to ``tensors``."""
    if type(value) in (dict, OrderedDict):
        items = enumerate(value.items())
        return type(value)((k, _without_tensors(v, f"{key}.{k}", (*at, n), tensors)) for n, (k, v) in items)
    if type(value) is list:
        return [_without_tensors(v, f"{key}.{n}", (*at, n), tensors) for n, v in enumerate(value)]
    if isinstance(value, Tensor):
        tensors.append((at, key))
        return None
    return value


# --- loading ---------------------------------------------------------------------------------------------


class Containers:
    """The containers of a checkpoint that is being loaded, by the key that each would have as a whole."""

    def __init__(self, checkpoint: CheckpointKeys) -> None:
        self._checkpoint = checkpoint
        self._sorted = sorted(checkpoint.keys)
        self._order: dict[str, int] | None = None
        prefix = f"{CONTAINERS}."
        self.with_skeleton = {key.removeprefix(prefix) for key in self.leaves(CONTAINERS)}

    def leaves(self, key: str) -> list[str]:
        """Return the keys inside the container ``key``, in order."""
        prefix = f"{key}."
        # "/" is the character after ".".
        return self._sorted[bisect_left(self._sorted, prefix) : bisect_left(self._sorted, f"{key}/")]

    def extra_states(self) -> set[str]:
        """Return the keys of all containers that modules have returned from ``get_extra_state()``."""
        model, suffix = "model", "_extra_state"
        found = {key for key in self.with_skeleton if key.startswith(f"{model}.")}
        for leaf in self.leaves(model):
            path = self._checkpoint.path_of(leaf)
            ends = [place for place, word in enumerate(path[:-1]) if str(word).endswith(suffix)]
            if ends:
                found.add(".".join(map(str, path[: ends[0] + 1])))
        return found

    def __contains__(self, key: str) -> bool:
        return key in self.with_skeleton or bool(self.leaves(key))

    def read(self, live: Mapping[str, Any], tensor_of: TensorOf) -> dict[str, Any]:
        """Return the containers at the keys of ``live``, whose values are those of now.

        Raises CheckpointError if a skeleton is not as ``take_apart`` makes it.
        """
        saved = [key for key in live if key in self.with_skeleton]
        skeletons = self._checkpoint.values([f"{CONTAINERS}.{key}" for key in saved])
        found = {}
        for key in saved:
            found[key] = self._filled(key, deep_copy(skeletons[f"{CONTAINERS}.{key}"]), live[key], tensor_of)
        built = {key: self._in_order(self.leaves(key)) for key in live if key not in self.with_skeleton}
        objects = [k for keys in built.values() for k in keys if not self._checkpoint.is_tensor(k)]
        values = self._checkpoint.values(objects)
        for key, keys in built.items():
            tree = _Node()
            for leaf in keys:
                path = self._path_inside(key, leaf)
                if len(path) > MAX_DEPTH:
                    raise CheckpointError(f"dist_asgd: {leaf} is nested more than {MAX_DEPTH} deep.")
                like = _at_words(live[key], path)
                tree.put(path, tensor_of(leaf, like) if leaf not in values else deep_copy(values[leaf]))
            found[key] = tree.built(live[key], key)
        return found

    def _in_order(self, leaves: list[str]) -> list[str]:
        """Return keys in the order in which they were saved, which is the order of dicts."""
        if self._order is None:
            self._order = {key: place for place, key in enumerate(self._checkpoint.saved_order())}
        return sorted(leaves, key=lambda key: self._order.get(key, 0) if self._order else 0)

    def _filled(self, key: str, skeleton: Any, live: Any, tensor_of: TensorOf) -> Any:
        """Put the tensors into a skeleton."""
        try:
            value, tensors = skeleton
            for at, tensor_key in tensors:
                holder, hint = value, live
                for place in at[:-1]:
                    holder, hint = _nth(holder, place), _nth(hint, place)
                if tensor_key not in self._checkpoint.keys or not self._checkpoint.is_tensor(tensor_key):
                    raise ValueError
                like = _nth(hint, at[-1])
                tensor = tensor_of(tensor_key, like if isinstance(like, Tensor) else None)
                holder[list(holder)[at[-1]] if isinstance(holder, dict) else at[-1]] = tensor
        except (TypeError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"dist_asgd: {CONTAINERS}.{key} is damaged, or was not written by dist_asgd: it does not say how to "
                f"build {key}."
            ) from error
        return value

    def _path_inside(self, key: str, leaf: str) -> KeyPath:
        """Return the words that lead from the container ``key`` to ``leaf``; DCP keeps which of them are indices."""
        path = self._checkpoint.path_of(leaf)
        for count in range(1, len(path)):
            if ".".join(map(str, path[:count])) == key:
                return path[count:]
        return tuple(leaf.removeprefix(f"{key}.").split("."))


def _nth(container: Any, place: int) -> Any:
    """Return the item at a place of a container; None if there is none."""
    if not isinstance(container, dict | list) or not 0 <= place < len(container):
        return None
    return list(container.values())[place] if isinstance(container, dict) else container[place]


def _at_words(live: Any, path: Sequence[str | int]) -> Tensor | None:
    """Return the live tensor that DCP would save under this path; None if there is none."""
    for word in path:
        if isinstance(live, Mapping):
            live = next((value for key, value in live.items() if str(key) == word), None)
        elif isinstance(live, list) and isinstance(word, int) and word < len(live):
            live = live[word]
        else:
            return None
    return live if isinstance(live, Tensor) else None


class _Node:
    """A container that is built from paths: what lies under each word."""

    def __init__(self) -> None:
        self.below: dict[str | int, Any] = {}

    def put(self, path: Sequence[str | int], value: Any) -> None:
        node = self
        for word in path[:-1]:
            below = node.below.setdefault(word, _Node())
            if not isinstance(below, _Node):
                below = node.below[word] = _Node()
            node = below
        node.below[path[-1]] = value

    def built(self, live: Any, key: str) -> Any:
        """Return the container; ``live`` is the one of now, which has the keys' types and what was empty."""
        indices = [word for word in self.below if isinstance(word, int)]
        if not indices or len(indices) < len(self.below):
            keys = {str(k): k for k in live} if isinstance(live, Mapping) else {}
            found = {keys.get(str(w), w): self._at(w, live, keys.get(str(w), w), key) for w in self.below}
            empty = live.items() if isinstance(live, Mapping) else ()
            found |= {k: copy.copy(v) for k, v in empty if k not in found and isinstance(v, Mapping) and not v}
            return type(live)(found) if type(live) in (OrderedDict, Counter) else found
        if max(indices) >= len(indices) + _MAX_ABSENT:
            raise CheckpointError(f"dist_asgd: {key} is a list with an item {max(indices)}, and most of it is missing.")
        known = live if isinstance(live, list | tuple) else ()
        items = []
        for index in range(max(max(indices) + 1, _with_empty_end(known, max(indices) + 1))):
            if index in self.below:
                items.append(self._at(index, known, index, key))
            else:
                items.append(copy.copy(known[index]) if index < len(known) and not _holds(known[index]) else None)
        return items

    def _at(self, word: str | int, live: Any, live_key: Any, key: str) -> Any:
        value = self.below[word]
        if not isinstance(value, _Node):
            return value
        has = (
            live_key in live if isinstance(live, Mapping) else isinstance(live_key, int) and live_key < len(live or ())
        )
        return value.built(live[live_key] if has else None, f"{key}.{word}")


def _holds(value: Any) -> bool:
    return not (isinstance(value, Mapping) and not value)


def _with_empty_end(known: Sequence[Any], stop: int) -> int:
    """Return the length of the live list if everything in it from ``stop`` on is empty, else 0."""
    return len(known) if len(known) > stop and not any(map(_holds, known[stop:])) else 0
