"""What is in a checkpoint, by names, without a process group: one tensor in memory at a time.

Keys are DCP's: ``model.<name>``, ``optim.state.<name>.<step|eta|mu|ax|master>``, and plain values under
``optim.param_groups.<name>.<option>``, where ``<name>`` is a parameter's fully qualified name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from ..format.manifest import CheckpointError
from ..format.reader import OpenCheckpoint

MODEL = "model."
STATE = "optim.state."
GROUPS = "optim.param_groups."
SCALARS = ("step", "eta", "mu")

Progress = Callable[[int], None]
"""Called with the number of bytes of tensors that were just dealt with."""


def no_progress(num_bytes: int) -> None:
    """Where nobody watches."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in the checkpoint, unread."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_chunks: int

    @property
    def bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class CheckpointContents:
    """A checkpoint that ``save_checkpoint`` wrote, or FSDP2 with ``torch.optim.ASGD`` and ``dcp.save``.

    CheckpointError where it is damaged, hostile, or of another layout. Not collective.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.opened = OpenCheckpoint(path, verify=verify)
        entries = self.opened.metadata.state_dict_metadata
        self.tensors: dict[str, StoredTensor] = {
            key: StoredTensor(key, entry.properties.dtype, tuple(entry.size), len(entry.chunks))
            for key in self._in_order(entries)
            if isinstance(entry := entries[key], TensorStorageMetadata)
        }
        self.objects: list[str] = [key for key in self._in_order(entries) if key not in self.tensors]

    def _in_order(self, keys: Iterable[str]) -> list[str]:
        """In the order in which they were saved, which the planner's data keeps; storage is in another."""
        planned = self.opened.metadata.planner_data or {}
        known = set(keys)
        return [key for key in planned if key in known] + sorted(known - planned.keys())

    @cached_property
    def model(self) -> dict[str, StoredTensor]:
        """The model's tensors by name: parameters and buffers."""
        return {key.removeprefix(MODEL): stored for key, stored in self.tensors.items() if key.startswith(MODEL)}

    @cached_property
    def state(self) -> dict[str, dict[str, StoredTensor]]:
        """The optimizer's tensors: by parameter name, then by state key. In the order of the model's names."""
        state: dict[str, dict[str, StoredTensor]] = {}
        for key, stored in self.tensors.items():
            if key.startswith(STATE):
                name, _, part = key.removeprefix(STATE).rpartition(".")
                state.setdefault(name, {})[part] = stored
        for name, parts in state.items():
            missing = {"step", "eta", "mu", "ax"} - parts.keys()
            if missing:
                raise CheckpointError(
                    f"dist_asgd: {self.opened.path} has no {', '.join(sorted(missing))} of parameter {name}: this is "
                    f"not the state of an ASGD optimizer."
                )
            ax, param = parts["ax"], self.model.get(name)
            if param is not None and param.shape != ax.shape:
                raise CheckpointError(
                    f"dist_asgd: {self.opened.path}: parameter {name} is {list(param.shape)}, its ax {list(ax.shape)}."
                )
        return {name: state[name] for name in self._by_model(state)}

    def tensor(self, key: str) -> Tensor:
        """One whole tensor, on the CPU, put together from its chunks."""
        stored = self.tensors[key]
        sizes = {MetadataIndex(key, chunk.offsets): chunk.sizes for chunk in self.opened.regions(key)}
        whole: Tensor | None = None
        for index, data in self.opened.chunks(list(sizes)):
            piece = self.opened.tensor(index, data)
            del data
            if tuple(piece.shape) == stored.shape:
                return piece
            if whole is None:
                whole = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
            place = whole
            for dim, (offset, size) in enumerate(zip(index.offset or (), sizes[index], strict=True)):
                place = place.narrow(dim, offset, size)
            place.copy_(piece)
        return torch.empty(stored.shape, dtype=stored.dtype, device="cpu") if whole is None else whole

    def value(self, key: str) -> Any:
        """One plain value."""
        ((index, data),) = self.opened.chunks([MetadataIndex(key)])
        return self.opened.value(index, data)

    @cached_property
    def scalars(self) -> dict[str, dict[str, Tensor]]:
        """``step``, ``eta`` and ``mu`` of every parameter with state, each 0-dim."""
        scalars: dict[str, dict[str, Tensor]] = {}
        for name, parts in self.state.items():
            scalars[name] = {key: self.tensor(parts[key].key) for key in SCALARS}
            for key, value in scalars[name].items():
                if value.numel() != 1 or value.is_complex():
                    raise CheckpointError(
                        f"dist_asgd: {self.opened.path}: {key} of parameter {name} is {list(value.shape)} "
                        f"{value.dtype}, wanted one number."
                    )
        return scalars

    def begun(self, name: str) -> bool:
        """Whether the averaging of a parameter has begun: its ``ax`` is a mean of iterates, and mu is not 1."""
        return name in self.state and self.scalars[name]["mu"].item() != 1

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups: hyperparameters, and parameter names under ``params``.

        Where the checkpoint keeps hyperparameters by parameter (``flatten_optimizer_state_dict=True``) it does not
        say what the groups were: parameters with equal hyperparameters make one, in the order of the optimizer.
        """
        planned = self.opened.metadata.planner_data or {}
        nested: dict[int, dict[str, Any]] = {}
        flat: dict[str, dict[str, Any]] = {}
        for key in (*self.objects, *self.tensors):
            if key.startswith(GROUPS):
                value = self.tensor(key) if key in self.tensors else self.value(key)
                path = planned.get(key, ())
                if len(path) == 4 and type(path[2]) is int:
                    nested.setdefault(path[2], {})[path[3]] = value
                else:
                    name, _, option = key.removeprefix(GROUPS).rpartition(".")
                    flat.setdefault(name, {})[option] = value
        groups = [group for _, group in sorted(nested.items())]
        for group in groups:
            names = group.get("params")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise CheckpointError(f"dist_asgd: {self.opened.path} has a parameter group without parameter names.")
        alike: dict[str, dict[str, Any]] = {}
        for name, options in flat.items():
            group = alike.setdefault(repr(sorted(options.items())), {**options, "params": []})
            group["params"].append(name)
        return groups + list(alike.values())

    @cached_property
    def optimized(self) -> set[str]:
        """Names of the parameters that the optimizer has."""
        return {name for group in self.groups for name in group["params"]} | self.state.keys()

    def _by_model(self, names: Iterable[str]) -> list[str]:
        order = {name: place for place, name in enumerate(self.model)}
        return sorted(names, key=lambda name: order.get(name, len(order)))

    @cached_property
    def tied(self) -> dict[str, str]:
        """Names under which the model holds a parameter that the optimizer knows by another name.

        DCP stores a tied parameter under each of its names, but its state under one. Recognised by values: a tensor
        without state that equals, to the bit, one with state whose averaging has begun.
        """
        tied = {}
        for name, stored in self.model.items():
            if name in self.optimized or not stored.bytes:
                continue
            for other in self.state:
                twin = self.model.get(other)
                if twin is None or (twin.shape, twin.dtype) != (stored.shape, stored.dtype) or not self.begun(other):
                    continue
                if same_bits(self.tensor(stored.key), self.tensor(twin.key)):
                    tied[name] = other
                    break
        return tied

    def read(self, keys: Iterable[str], progress: Progress = no_progress) -> Iterator[tuple[str, Tensor]]:
        """These tensors, one after the other."""
        for key in keys:
            yield key, self.tensor(key)
            progress(self.tensors[key].bytes)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit: NaNs equal themselves, and -0.0 is not 0.0. Same shape and dtype."""
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
