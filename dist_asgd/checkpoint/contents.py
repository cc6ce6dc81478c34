"""What a checkpoint holds of a model and its optimizer, by name, in the layout of ``get_state_dict``.

``model.<name>``                      parameters and buffers, under their true shape
``optim.state.<name>.<key>``          step, eta, mu, ax (and whatever else the optimizer shards) of each parameter
``optim.param_groups.<name>.<key>``   the hyperparameters of its group, for each parameter
``extra.<rank>``                      what the caller adds on each rank

*Names* are those of ``named_parameters()`` without what wrappers (DDP, torch.compile, activation checkpointing) add.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .objects import load_object
from .sharded import PartMark
from .tensors import ShardTensor
from .writer import Serialized

MODEL, OPTIM, EXTRA = "model", "optim", "extra"
STATE, GROUPS = "state", "param_groups"
SCALARS = ("step", "eta", "mu")
# Keys of groups that say how a process runs, or which parameters there are.
NOT_SAVED = ("params", "fused")
_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module"


@dataclass(frozen=True, slots=True)
class Names:
    """``of_model``: the name of each key of ``model.state_dict()``. ``of_params``: all names of each parameter of the
    optimizer, in its order, the one that checkpoints are written with first."""

    of_model: dict[str, str]
    of_params: list[tuple[str, ...]]


def plain_name(model: nn.Module, name: str) -> str:
    """``name`` without the parts that wrappers have added."""
    parts = []
    module: Any = model
    for part in name.split("."):
        wrapped = (
            (part == "module" and isinstance(module, DistributedDataParallel))
            or (part == "_orig_mod" and type(module).__name__ == "OptimizedModule")
            or part == _CHECKPOINT_WRAPPER
        )
        if not wrapped:
            parts.append(part)
        module = getattr(module, part, None)
    return ".".join(parts)


def names_of(model: nn.Module, optimizer: Optimizer) -> Names:
    """Match the optimizer's parameters with the model's by identity; ValueError where the model lacks one."""
    by_param: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        by_param.setdefault(id(param), []).append(plain_name(model, name))
    of_params = []
    for index, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            if id(param) not in by_param:
                raise ValueError(
                    f"dist_asgd: param_groups[{index}]['params'][{position}] of the optimizer, of shape "
                    f"{tuple(param.shape)}, is no parameter of the model. Pass the model whose parameters the "
                    f"optimizer was given (wrapped or not)."
                )
            of_params.append(tuple(by_param[id(param)]))
    of_model = {key: plain_name(model, key) for key in model.state_dict()}
    if len(set(of_model.values())) != len(of_model):
        raise ValueError("dist_asgd: two entries of the model's state_dict() have the same name without wrappers.")
    return Names(of_model, of_params)


def describe(model: nn.Module, optimizer: Optimizer, extra: Any, rank: int) -> dict[str, dict[str, Any]]:
    """The state of ``model`` and ``optimizer`` and this rank's ``extra``, for DCP; tensors are the live ones."""
    names = names_of(model, optimizer)
    saved = optimizer.state_dict()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    parts = {
        id(params[index]): part
        for index, entry in saved["state"].items()
        for part in entry.values()
        if isinstance(part, ShardTensor)
    }
    model_state: dict[str, Any] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        part = parts.get(id(value))
        # Every rank has the whole parameter and writes the part that it updates.
        slice_ = None if part is None else part.slice_of(value)
        if slice_ is not None and part is not None:
            value = part.like(slice_)
        model_state[names.of_model[key]] = value.detach() if isinstance(value, Tensor) else value
    optim: dict[str, Any] = {}
    for index, entry in saved["state"].items():
        for key, value in entry.items():
            optim[f"{STATE}.{names.of_params[index][0]}.{key}"] = value
    for group in saved["param_groups"]:
        values = {key: _plain(value) for key, value in group.items() if key not in NOT_SAVED}
        for index in group["params"]:
            for key, value in values.items():
                optim[f"{GROUPS}.{names.of_params[index][0]}.{key}"] = value
    state: dict[str, dict[str, Any]] = {MODEL: model_state, OPTIM: optim}
    if rank:
        # What all ranks have alike is rank 0's to write.
        state = {part: {k: v for k, v in entries.items() if _is_sharded(v)} for part, entries in state.items()}
    if extra is not None:
        state[EXTRA] = {str(rank): serialize(extra)}
    return state


def _is_sharded(value: Any) -> bool:
    return isinstance(value, ShardTensor) or hasattr(value, "device_mesh")


def _plain(value: Any) -> Any:
    return False if isinstance(value, PartMark) else value


def serialize(extra: Any) -> Serialized:
    """The caller's own values as they are written; ValueError where reading them would have to run code."""
    stream = io.BytesIO()
    try:
        # In a tuple: DCP takes dicts and lists apart.
        torch.save((extra,), stream)
        load_object(stream.getvalue(), "extra")
    except Exception as error:
        raise ValueError(
            f"dist_asgd: extra cannot be saved so that it loads safely: use tensors, numbers, strings, None, and "
            f"dicts, lists and tuples of them (state_dict() of what is more). torch said: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    return Serialized(stream.getvalue())


class Stage:
    """Host memory to which states are copied, so that training can go on; kept for the next one."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, state: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """``state`` with every tensor copied; overwrites what the last call returned."""
        with torch.no_grad():
            return {
                part: {key: self._copied(f"{part}.{key}", value) for key, value in entries.items()}
                for part, entries in state.items()
            }

    def _copied(self, key: str, value: Any) -> Any:
        if isinstance(value, ShardTensor):
            return value.like(self._copied(key, value.to_local()))
        if _is_sharded(value):
            return BlockingAsyncStager().stage({key: value})[key]
        if not isinstance(value, Tensor):
            return value
        if value.dim() == 0:
            return value.detach().cpu().clone()
        buffer = self._buffers.get(key)
        fits = buffer is not None and (buffer.shape, buffer.dtype, buffer.stride()) == (
            value.shape,
            value.dtype,
            value.stride(),
        )
        if buffer is None or not fits:
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(value)


def by_parent(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Keys of a checkpoint by what stands before their last dot, and then by what stands after it."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        parent, _, last = key.rpartition(".")
        found.setdefault(parent, {})[last] = key
    return found
