"""Compares two checkpoints key by key, with one tensor of each in memory. The command ``diff`` calls it.

Every difference has a kind, by which the command groups them. Parts that wrappers of modules (DDP, ``torch.compile``)
add to names make no difference: neither in keys nor in ``param_names``, which the optimizer keeps for people to read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest
from reprlib import repr as repr_
from typing import Any

import torch
from torch import Tensor

from ...state import MASTER_KEY
from ...state_dict.wrapper_names import CERTAIN_PARTS, without_parts
from ..sections import AVERAGES, OPTIM, SCALARS
from ..sections import GROUPS as GROUPS_WORD
from ..sections import STATE as STATE_WORD
from ..values import same_bits, same_values
from .contents import MODEL, CheckpointContents, Progress, TensorEntry, no_progress

_EXTRA = "extra."
_STATE, _GROUPS = f"{OPTIM}.{STATE_WORD}.", f"{OPTIM}.{GROUPS_WORD}."
# Options that hold parameters' names.
_NAMES = ("param_names", "params")
# How many places of two values are listed at which they differ.
_MAX_PLACES = 3
_MAX_DEPTH = 5
# Stands for a value that only one of two containers has.
_NOTHING = object()


class Kind(StrEnum):
    """What differs, in the order in which ``diff`` lists it. From ``PARAMETERS`` on it is the values."""

    FIRST_ONLY = "only in the first"
    SECOND_ONLY = "only in the second"
    FORM = "shape or dtype"
    PARAMETERS = "parameters"
    AVERAGES = "ax"
    MASTERS = "masters"
    OPTIMIZER = "state of the optimizer"
    SCALARS = "scalars"
    HYPERPARAMETERS = "hyperparameters"
    BESIDE = "averages beside the optimizer"
    BUFFERS = "other entries of the model"
    EXTRA = "extra"
    OTHERS = "other entries"


@dataclass(frozen=True, slots=True)
class Difference:
    """One key whose values differ.

    ``name`` is the parameter, the entry or the value that the key is of, and ``entry`` what of it: ``step``, or ``lr``;
    it is "" for tensors of the model. The numbers are there only if both values are tensors of the same shape and
    dtype: ``num_different`` counts elements, ``max_abs`` is the largest absolute difference of two elements, and
    ``relative`` is |a - b| / max(|a|, |b|) with the Euclidean norms of the whole tensors.
    """

    kind: Kind
    key: str
    name: str
    entry: str
    description: str
    num_different: int | None = None
    max_abs: float | None = None
    relative: float | None = None


class Comparison:
    """Two checkpoints with their keys matched; ``num_keys`` counts those of each kind that are in either of them."""

    def __init__(self, a: CheckpointContents, b: CheckpointContents) -> None:
        self._a, self._b = a, b
        self._key_in_a, self._key_in_b = _by_plain_key(a), _by_plain_key(b)
        self._params = {_name_of(key)[0] for key in self._keys() if key.startswith((_STATE, _GROUPS))}
        self.num_keys = Counter(map(self._kind_of, self._keys()))

    def _keys(self) -> list[str]:
        """All keys without what wrappers add, those of ``a`` first."""
        return [*self._key_in_a, *(key for key in self._key_in_b if key not in self._key_in_a)]

    def differences(self, progress: Progress = no_progress) -> Iterator[Difference]:
        """Yield a Difference for every key that differs, tensors to the bit; ``progress`` counts bytes of ``a``."""
        shared = [key for key in self._key_in_a if key in self._key_in_b]
        plain = [key for key in shared if self._tensor_of(key) == (None, None)]
        first = self._a.values([self._key_in_a[key] for key in plain])
        second = self._b.values([self._key_in_b[key] for key in plain])
        # Values that keys share are compared once, by identity.
        same: dict[tuple[int, int], bool] = {}
        for key in self._keys():
            if key not in self._key_in_a or key not in self._key_in_b:
                yield self._difference(key, "", Kind.SECOND_ONLY if key in self._key_in_b else Kind.FIRST_ONLY)
                continue
            one_entry, other_entry = self._tensor_of(key)
            if one_entry is not None and other_entry is not None:
                yield from self._compare_tensors(key, one_entry, other_entry)
            elif one_entry is not None or other_entry is not None:
                yield self._difference(key, "a tensor in one, a plain value in the other", Kind.FORM)
            else:
                one, other = first[self._key_in_a[key]], second[self._key_in_b[key]]
                pair = id(one), id(other)
                if pair not in same:
                    same[pair] = same_values(one, other) or (_name_of(key)[1] in _NAMES and _same_names(one, other))
                if not same[pair]:
                    yield self._difference(key, _described(one, other))
            progress(0 if one_entry is None else one_entry.bytes)

    def _tensor_of(self, key: str) -> tuple[TensorEntry | None, TensorEntry | None]:
        return self._a.tensors.get(self._key_in_a[key]), self._b.tensors.get(self._key_in_b[key])

    def _is_tensor(self, key: str) -> bool:
        """Whether ``key`` is a tensor in the checkpoints that have it."""
        sides = ((self._a, self._key_in_a), (self._b, self._key_in_b))
        return all(keys[key] in contents.tensors for contents, keys in sides if key in keys)

    def _kind_of(self, key: str) -> Kind:
        name, entry = _name_of(key)
        if key.startswith(MODEL):
            return Kind.PARAMETERS if name in self._params else Kind.BUFFERS
        if key.startswith(_STATE):
            of_state = {"ax": Kind.AVERAGES, MASTER_KEY: Kind.MASTERS, **dict.fromkeys(SCALARS, Kind.SCALARS)}
            return of_state.get(entry, Kind.OPTIMIZER if self._is_tensor(key) else Kind.OTHERS)
        if key.startswith(_GROUPS):
            return Kind.HYPERPARAMETERS
        if key.startswith(f"{AVERAGES}."):
            return Kind.BESIDE
        return Kind.EXTRA if key.startswith(_EXTRA) else Kind.OTHERS

    def _difference(self, key: str, description: str, kind: Kind | None = None, **numbers: Any) -> Difference:
        name, entry = _name_of(key)
        raw = self._key_in_a.get(key) or self._key_in_b[key]
        return Difference(kind or self._kind_of(key), raw, name, entry, description or str(kind), **numbers)

    def _compare_tensors(self, key: str, one: TensorEntry, other: TensorEntry) -> Iterator[Difference]:
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            forms = f"{list(one.shape)} {_dtype(one)} and {list(other.shape)} {_dtype(other)}"
            yield self._difference(key, forms, Kind.FORM)
            return
        first, second = self._a.tensor(one.key), self._b.tensor(other.key)
        if same_bits(first, second):
            return
        # A difference of two 16-bit numbers would be rounded to 16 bits.
        wide = torch.complex128 if first.is_complex() else torch.float64
        gap = (first.to(wide) - second.to(wide)).abs()
        different = int(((first != second) & ~(first.isnan() & second.isnan())).sum())
        largest = float(gap.nan_to_num(0.0, float("inf"), float("inf")).max())
        if not different:
            description = "equal but for the sign of zeros or NaN payloads"
        elif first.numel() == 1 and not first.is_complex():
            description = f"{first.item():.9g} and {second.item():.9g}"
        else:
            description = f"{different} of {first.numel()} elements"
        norm = max(float(first.to(wide).norm()), float(second.to(wide).norm()))
        relative = float(gap.norm()) / norm if norm else 0.0
        numbers: dict[str, Any] = {"num_different": different, "max_abs": largest, "relative": relative}
        yield self._difference(key, description, **numbers)


def compare(a: CheckpointContents, b: CheckpointContents, progress: Progress = no_progress) -> Iterator[Difference]:
    """Yield the differences of two checkpoints; see ``Comparison.differences``."""
    return Comparison(a, b).differences(progress)


def _by_plain_key(contents: CheckpointContents) -> dict[str, str]:
    """The checkpoint's keys by what they are without the parts of wrappers; a key that is not unique then stays."""
    keys = [*contents.tensors, *contents.objects]
    plain = [without_parts(key, CERTAIN_PARTS) for key in keys]
    count = Counter(plain)
    return {short if count[short] == 1 else key: key for key, short in zip(keys, plain, strict=True)}


def _name_of(key: str) -> tuple[str, str]:
    """The parameter or the entry that a key is of, and the last word if the key has more than that."""
    for prefix in (_STATE, _GROUPS):
        if key.startswith(prefix):
            name, _, entry = key.removeprefix(prefix).rpartition(".")
            return name, entry
    return key.removeprefix(MODEL), ""


def _same_names(one: Any, other: Any) -> bool:
    """Whether two lists of parameters' names are equal but for what wrappers add."""
    return _plain_names(one) == _plain_names(other) is not None


def _plain_names(value: Any) -> list[str] | None:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return None
    return [without_parts(name) for name in value]


def _described(one: Any, other: Any) -> str:
    """How two plain values differ; of dicts at which places."""
    # Values of users are saved as the only item of a tuple.
    while isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other) == 1:
        (one,), (other,) = one, other
    places = list(_places(one, other, ()))
    # The values are of other types, or keys are equal and in another order.
    if not places:
        return f"{repr_(one)} and {repr_(other)}"
    shown = "; ".join(f"{place}: {a} and {b}" if place else f"{a} and {b}" for place, a, b in places[:_MAX_PLACES])
    return shown + f"; and {len(places) - _MAX_PLACES} more" * (len(places) > _MAX_PLACES)


def _places(one: Any, other: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, str, str]]:
    """The places in nested containers at which values differ, as "key.key", each with what is there in both."""
    pairs = None
    # A container may hold itself.
    if len(path) < _MAX_DEPTH and isinstance(one, dict) and isinstance(other, dict):
        pairs = [(key, one.get(key, _NOTHING), other.get(key, _NOTHING)) for key in dict.fromkeys([*one, *other])]
    elif len(path) < _MAX_DEPTH and isinstance(one, list | tuple) and type(one) is type(other):
        pairs = [(index, *pair) for index, pair in enumerate(zip_longest(one, other, fillvalue=_NOTHING))]
    if pairs is None:
        yield ".".join(map(str, path)), _shown(one), _shown(other)
        return
    for key, first, second in pairs:
        if not same_values(first, second):
            yield from _places(first, second, (*path, key))


def _shown(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() > 1:
        return f"a tensor of {value.numel()} elements"
    return "nothing" if value is _NOTHING else repr_(value)


def _dtype(entry: TensorEntry) -> str:
    return str(entry.dtype).removeprefix("torch.")
