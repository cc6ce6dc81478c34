"""Reads a checkpoint's contents by name, without a process group, and holds one tensor in memory at a time.

The commands of ``dist_asgd/cli.py`` use it through the other modules of this folder. Keys are DCP's:
``model.<name>``, ``optim.state.<name>.<step|eta|mu|ax|master>`` and own entries of users beside them, ``optim.own``
with own entries of other kinds (see ``checkpoint/own_entries.py``), and plain values under
``optim.param_groups.<name>.<option>``, where ``<name>`` is a parameter's fully qualified name. An average beside the
optimizer has the same below ``averages.<average>`` in place of ``optim``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from ...averaging_start import averaged_steps
from ...state_dict.wrapper_names import CERTAIN_PARTS, without_parts
from ...update.weights import AVERAGE_KEY
from ..containers import CONTAINERS, Containers
from ..format.layouts import Prefix, described
from ..format.manifest import CheckpointError
from ..format.paths import UserPath
from ..format.reader import CheckedReader
from ..keys import CheckpointKeys, KeyMismatch
from ..options import is_numbered, option_values, options_by_owner
from ..own_entries import OBJECTS, RESERVED, shared_and_by_name
from ..sections import AVERAGES, CLASS, EXTRA, OPTIM, SCALARS, STATE, average_names, root_of
from ..source_record import SOURCES_KEY, SourceRecord
from ..values import bytes_of

MODEL = "model."

Progress = Callable[[int], None]
"""A function that is called with the number of bytes of tensors that were processed since its last call."""


def no_progress(num_bytes: int) -> None:
    """Ignore the number: the ``Progress`` of callers that display none."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the checkpoint, as the metadata describes it. Its data has not been read."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_chunks: int

    @property
    def bytes(self) -> int:
        """The bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class CheckpointContents:
    """A checkpoint that was written by ``save_checkpoint``, or by FSDP2 with ``torch.optim.ASGD`` and ``dcp.save``.

    Construction and every method raise CheckpointError if the checkpoint is damaged, hostile or laid out in another
    way. Nothing here is collective.
    """

    def __init__(self, path: UserPath, *, verify: bool = True, prefix: Prefix = "") -> None:
        self._read(CheckedReader(path, verify=verify, prefix=prefix), OPTIM)

    def _read(self, reader: CheckedReader, root: str) -> None:
        self._reader = reader
        self.root = root
        self.state_prefix = f"{root}.{STATE}."
        self.opened = reader.opened
        self._keys = CheckpointKeys(reader, KeyMismatch())
        entries = self.opened.metadata.state_dict_metadata
        self.tensors: dict[str, TensorEntry] = {
            key: TensorEntry(key, entry.properties.dtype, tuple(entry.size), len(entry.chunks))
            for key in self._in_order(entries)
            if isinstance(entry := entries[key], TensorStorageMetadata)
        }
        self.objects: list[str] = [key for key in self._in_order(entries) if key not in self.tensors]

    def average(self, name: str) -> CheckpointContents:
        """Return the checkpoint with the average ``name``, one of ``average_names``, in the optimizer's place."""
        contents = object.__new__(CheckpointContents)
        contents._read(self._reader, root_of(name))
        return contents

    @cached_property
    def average_names(self) -> list[str]:
        """The names of the averages beside the optimizer."""
        return average_names(self.opened.metadata.state_dict_metadata)

    @cached_property
    def optimizer_class(self) -> str | None:
        """The class of an optimizer that is no ASGD; None for an ASGD, and if the checkpoint does not say."""
        key = f"{self.root}.{CLASS}"
        found = self.value(key) if key in self.objects else None
        return found if isinstance(found, str) else None

    def _in_order(self, keys: Iterable[str]) -> list[str]:
        """``keys`` in the order in which they were saved. The planner's data keeps that order, the storage does not."""
        planned = self.opened.metadata.planner_data or {}
        known = set(keys)
        return [key for key in planned if key in known] + sorted(known - planned.keys())

    @cached_property
    def model(self) -> dict[str, TensorEntry]:
        """The model's tensors by name: parameters and buffers, and extra states of modules that are one tensor.

        Parts that wrappers added to names are left out.
        """
        inside = {leaf for key in self._containers.extra_states() for leaf in self._containers.leaves(key)}
        tensors = ((key, entry) for key, entry in self.tensors.items() if key.startswith(MODEL))
        entries = {key.removeprefix(MODEL): entry for key, entry in tensors if key not in inside}
        params = {_split(key, self.state_prefix)[0] for key in self.tensors if key.startswith(self.state_prefix)}
        model: dict[str, TensorEntry] = {}
        for name, entry in entries.items():
            plain, param = without_parts(name, CERTAIN_PARTS), without_parts(name)
            # "module" is a part of a wrapper only if that is how the optimizer knows the parameter.
            plain = param if plain not in params and param in params else plain
            model[name if name in params or plain in entries or plain in model else plain] = entry
        return model

    @cached_property
    def _containers(self) -> Containers:
        return Containers(self._keys)

    def model_objects(self) -> dict[str, Any]:
        """Read what the model's state dict has beside tensors, by name; containers with their tensors."""
        apart = self._containers.extra_states()
        inside = {leaf for key in apart for leaf in self._containers.leaves(key)}
        found = {key: self.value(key) for key in self.objects if key.startswith(MODEL) and key not in inside}
        found |= self._containers.read(dict.fromkeys(apart), lambda key, _like: self.tensor(key))
        return {key.removeprefix(MODEL): value for key, value in found.items()}

    @cached_property
    def is_asgd(self) -> bool:
        """Whether the optimizer's state, if there is any, is that of ASGD: others have no averages."""
        states = [key for key in self.tensors if key.startswith(self.state_prefix)]
        return not states or any(key.endswith(".ax") for key in states)

    def other_keys(self, knows_optimizer: bool = False) -> str:
        """Return a sentence about the keys that are no model, no ASGD state and nothing else of this package, or "".

        ``knows_optimizer`` says that the caller knows what the state of an optimizer that is no ASGD is, too.
        """
        known = ("model", AVERAGES, EXTRA, CONTAINERS, *((OPTIM,) if self.is_asgd or knows_optimizer else ()))
        return described(self.opened.metadata.state_dict_metadata, known)

    @cached_property
    def sources(self) -> SourceRecord | None:
        """The parameters that entries of the model come from, as recorded; None if nothing is."""
        if SOURCES_KEY not in self.objects:
            return None
        return SourceRecord.parse(self.value(SOURCES_KEY), self.opened.path)

    @cached_property
    def state(self) -> dict[str, dict[str, TensorEntry]]:
        """The tensors of an ASGD by parameter name, in the order of the model, and then by state key.

        It is empty for an optimizer of another class, whose tensors are in ``own_tensors``.
        """
        state: dict[str, dict[str, TensorEntry]] = {}
        for key, entry in self.tensors.items():
            if key.startswith(self.state_prefix) and self.is_asgd:
                name, state_key = _split(key, self.state_prefix)
                state.setdefault(name, {})[state_key] = entry
        wanted = {"step", "eta", "mu", "ax"}
        if any(entries.keys() >= wanted for entries in state.values()):
            # Of a frozen parameter there may be own entries of the user, and no state.
            state = {name: entries for name, entries in state.items() if entries.keys() & wanted}
        for name, entries in state.items():
            missing = wanted - entries.keys()
            if missing:
                raise CheckpointError(
                    f"dist_asgd: {self.opened.path} has no {', '.join(sorted(missing))} of parameter {name}: this is "
                    f"not the state of an ASGD optimizer."
                )
            ax, param = entries["ax"], self.model.get(name)
            if param is not None and param.shape != ax.shape and name not in (self.sources or ()):
                raise CheckpointError(
                    f"dist_asgd: {self.opened.path}: parameter {name} is {list(param.shape)}, its ax {list(ax.shape)}."
                )
        return {name: state[name] for name in self._by_model(state)}

    def tensor(self, key: str) -> Tensor:
        """Read one whole tensor, on the CPU."""
        return self.opened.whole_tensor(key)

    def value(self, key: str) -> Any:
        """Read one plain value."""
        ((index, data),) = self.opened.chunks([MetadataIndex(key)])
        return self.opened.value(index, data)

    def values(self, keys: Iterable[str]) -> dict[str, Any]:
        """Read plain values together, by key: those that share a chunk are read once, and are one object."""
        return self.opened.values(list(keys))

    @cached_property
    def scalars(self) -> dict[str, dict[str, Tensor]]:
        """``step``, ``eta`` and ``mu`` of every parameter with state, by name; each has one element."""
        scalars: dict[str, dict[str, Tensor]] = {}
        single = [
            entries[key].key
            for entries in self.state.values()
            for key in SCALARS
            if entries[key].num_chunks == 1 and math.prod(entries[key].shape) == 1
        ]
        # Read together, because parameters share the chunks of equal scalars.
        read = self.opened.values(single)
        for name, entries in self.state.items():
            keys = {key: entries[key].key for key in SCALARS}
            scalars[name] = {key: read[full] if full in read else self.tensor(full) for key, full in keys.items()}
            for key, value in scalars[name].items():
                if value.numel() != 1 or value.is_complex():
                    raise CheckpointError(
                        f"dist_asgd: {self.opened.path}: {key} of parameter {name} is {list(value.shape)} "
                        f"{value.dtype}, wanted one number."
                    )
        return scalars

    @cached_property
    def own_tensors(self) -> dict[str, dict[str, TensorEntry]]:
        """Tensors that users, or an optimizer that is no ASGD, keep in its state, by parameter name and by key."""
        own: dict[str, dict[str, TensorEntry]] = {}
        for key, entry in self.tensors.items():
            name, state_key = _split(key, self.state_prefix)
            if key.startswith(self.state_prefix) and (name not in self.state or state_key not in RESERVED):
                own.setdefault(name, {})[state_key] = entry
        return own

    @cached_property
    def own_objects(self) -> tuple[dict[Any, Any], dict[str, dict[Any, Any]]]:
        """What users keep in the optimizer's state that is no tensor: of the optimizer, and of parameters by name."""
        whole = f"{self.root}.{OBJECTS}"
        shared, by_name = shared_and_by_name(self.value(whole) if whole in self.objects else None)
        for key in self.objects:
            if key.startswith(self.state_prefix):
                name, state_key = _split(key, self.state_prefix)
                by_name.setdefault(name, {})[state_key] = self.value(key)
        return shared, by_name

    def has_begun_averaging(self, name: str) -> bool:
        """Whether ``ax`` of a parameter is a mean of iterates, which it is once ``mu`` is not 1."""
        return name in self.state and self.scalars[name]["mu"].item() != 1

    @cached_property
    def first_average_steps(self) -> dict[str, float]:
        """``t0`` of every parameter whose group has it, by name; another program's groups may lack it."""
        return {
            name: float(group["t0"])
            for name, group in self._group_of.items()
            if isinstance(group.get("t0"), int | float)
            or (isinstance(group.get("t0"), Tensor) and group["t0"].numel() == 1)
        }

    def averaged_steps(self, name: str) -> int | None:
        """How many iterates ``ax`` of a parameter holds: 0 before averaging has begun, None if unknown."""
        if not self.has_begun_averaging(name):
            return 0
        step, mu = (self.scalars[name][key].item() for key in ("step", "mu"))
        return averaged_steps(step, mu, self.first_average_steps.get(name), self.average_rule(name))

    def average_rule(self, name: str) -> Any:
        """The options of the rule by which a parameter is averaged; None for the mean of ``torch.optim.ASGD``."""
        return self._group_of.get(name, {}).get(AVERAGE_KEY)

    @cached_property
    def _group_of(self) -> dict[str, dict[str, Any]]:
        return {name: group for group in self.groups for name in group["params"]}

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups: their hyperparameters, and parameter names under ``params``.

        A checkpoint that keeps hyperparameters by parameter (``flatten_optimizer_state_dict=True``) does not record
        the groups. In this case parameters with equal hyperparameters make one group, in the order of the optimizer.
        """
        nested: dict[int, dict[str, Any]] = {}
        flat: dict[str, dict[str, Any]] = {}
        below_of = options_by_owner(self._keys, self.root)
        values = option_values(self._keys, below_of)
        for owner, below in below_of.items():
            options = {option: values[key] for option, key in below.items()}
            if is_numbered(self._keys, below):
                nested[int(owner)] = options
            else:
                flat[without_parts(owner, CERTAIN_PARTS)] = options
        groups = [group for _, group in sorted(nested.items())]
        for group in groups:
            names = group.get("params")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise CheckpointError(f"dist_asgd: {self.opened.path} has a parameter group without parameter names.")
            group["params"] = [without_parts(name, CERTAIN_PARTS) for name in names]
        by_options: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
        # All parameters of a group share one list of their names, which is written out once.
        texts: dict[int, str] = {}
        for name, options in flat.items():
            for value in options.values():
                if id(value) not in texts:
                    texts[id(value)] = repr(value)
            shown = tuple(sorted((option, texts[id(value)]) for option, value in options.items()))
            group = by_options.setdefault(shown, {**options, "params": []})
            group["params"].append(name)
        return groups + list(by_options.values())

    @cached_property
    def optimized(self) -> set[str]:
        """The names of the parameters that the optimizer has, whichever optimizer it is."""
        names = {name for group in self.groups for name in group["params"]}
        if self.is_asgd:
            return names | self.state.keys()
        prefix = self.state_prefix
        return names | {_split(key, prefix)[0] for key in self.tensors if key.startswith(prefix)}

    def _by_model(self, names: Iterable[str]) -> list[str]:
        """``names`` in the order of the model; names that the model lacks come last."""
        order = {name: index for index, name in enumerate(self.model)}
        return sorted(names, key=lambda name: order.get(name, len(order)))

    @cached_property
    def tied_by_value(self) -> dict[str, str]:
        """Entries of the model that have the values of a parameter, to the bit, each with the parameter's name.

        Version 0.1, and torch's own recipe, save a tied parameter under each of its names and do not record that it is
        tied. It has no state under the further names. Empty if there is a record.
        """
        if self.sources is not None:
            return {}
        params = [name for name in self._by_model(self.optimized) if name in self.model]
        others = [name for name, entry in self.model.items() if name not in self.optimized and entry.bytes]
        kinds = {(self.model[name].shape, self.model[name].dtype) for name in others}
        by_digest: dict[tuple[Any, ...], str] = {}
        # Those whose averaging has begun come first, as they are what a tie makes a difference for.
        for name in sorted(params, key=lambda name: self.is_asgd and not self.has_begun_averaging(name)):
            if (self.model[name].shape, self.model[name].dtype) in kinds:
                by_digest.setdefault(self._hash_of(self.model[name]), name)
        found = ((name, by_digest.get(self._hash_of(self.model[name]))) for name in others if by_digest)
        return {name: param for name, param in found if param is not None}

    def _hash_of(self, entry: TensorEntry) -> tuple[object, ...]:
        """Return shape and dtype of a tensor and a hash of its bits, which is that of no other tensor."""
        content: Any = bytes_of(self.tensor(entry.key)).numpy()
        return entry.shape, entry.dtype, hashlib.blake2b(content).digest()

    def read(self, keys: Iterable[str], progress: Progress = no_progress) -> Iterator[tuple[str, Tensor]]:
        """Read the tensors of ``keys``, one after the other; yields each with its key."""
        for key in keys:
            yield key, self.tensor(key)
            progress(self.tensors[key].bytes)


def _split(key: str, prefix: str) -> tuple[str, str]:
    """The parameter's name, without what wrappers add, and the last word of a key below ``prefix``."""
    name, _, last = key.removeprefix(prefix).rpartition(".")
    return without_parts(name, CERTAIN_PARTS), last
