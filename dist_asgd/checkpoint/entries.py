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
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..placements import fsdp1
from ..placements.dtensor import is_dtensor
from ..placements.shard_tensor import ShardTensor, shard_tensor_of
from ..state_dict.sharded import AVERAGE, FragmentMark, ShardTensorCache
from .format.archives import load_object
from .format.writer import Serialized

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


class _PlainNames:
    """Names without the parts that wrappers have added; modules are walked through once."""

    def __init__(self, model: nn.Module) -> None:
        self._prefixes: dict[str, tuple[str, Any]] = {"": ("", model)}

    def of(self, name: str) -> str:
        """The plain name of a parameter, a buffer, or an entry of ``state_dict()``."""
        prefix, _, last = name.rpartition(".")
        plain, module = self._prefix(prefix)
        return plain if _is_wrapper(module, last) else plain + last

    def _prefix(self, name: str) -> tuple[str, Any]:
        """What a module's own names begin with, and the module."""
        if name not in self._prefixes:
            above, _, last = name.rpartition(".")
            plain, module = self._prefix(above)
            own = plain if _is_wrapper(module, last) else f"{plain}{last}."
            self._prefixes[name] = own, getattr(module, last, None)
        return self._prefixes[name]


def _is_wrapper(module: Any, attribute: str) -> bool:
    return (
        (attribute == "module" and isinstance(module, DistributedDataParallel))
        or (attribute == "_orig_mod" and type(module).__name__ == "OptimizedModule")
        or attribute == _CHECKPOINT_WRAPPER
    )


def names_of(model: nn.Module, optimizer: Optimizer, state_keys: Iterable[str] | None = None) -> Names:
    """Match the optimizer's parameters with the model's by identity; ValueError where the model lacks one.

    ``state_keys``: the keys of ``model.state_dict()``, for whoever has them.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    remedy = "Save and load get_state_dict(model, optimizer) with torch.distributed.checkpoint"
    fsdp1.refuse("a checkpoint of this package", params, remedy)
    plain = _PlainNames(model)
    by_param: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        by_param.setdefault(id(param), []).append(plain.of(name))
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
    of_model = {key: plain.of(key) for key in (model.state_dict() if state_keys is None else state_keys)}
    if len(set(of_model.values())) != len(of_model):
        raise ValueError("dist_asgd: two entries of the model's state_dict() have the same name without wrappers.")
    return Names(of_model, of_params)


# Also in inference mode, where a DTensor cannot be detached.
@torch.inference_mode(False)
@torch.no_grad()
def describe(
    model: nn.Module,
    optimizer: Optimizer,
    extra: Any,
    rank: int,
    replica: int = 0,
    known: ShardTensorCache | None = None,
) -> dict[str, dict[str, Any]]:
    """What this rank has to save of ``model`` and ``optimizer``, and its ``extra``; tensors are the live ones.

    ``replica``: which copy of the shards it holds, in hybrid sharding; the first is saved. ``known``: of parameters.
    """
    live = model.state_dict(keep_vars=True)
    names = names_of(model, optimizer, live)
    saved = optimizer.state_dict()
    parts = param_parts(optimizer, saved, {} if known is None else known)
    model_state: dict[str, Any] = {}
    for key, value in live.items():
        # Every rank has the whole parameter and writes the part that it updates.
        part = parts.get(id(value))
        if part is not None:
            value = part
        elif isinstance(value, Tensor):
            value = value.detach()
        # What all ranks have alike is rank 0's to write.
        if not rank or _is_own(value, replica):
            model_state[names.of_model[key]] = value
    optim: dict[str, Any] = {}
    for index, entry in saved["state"].items():
        stem = f"{STATE}.{names.of_params[index][0]}."
        for key, value in entry.items():
            if not rank or _is_own(value, replica):
                optim[stem + key] = value
    for group in () if rank else saved["param_groups"]:
        values = {key: _plain(value) for key, value in group.items() if key not in NOT_SAVED}
        for index in group["params"]:
            stem = f"{GROUPS}.{names.of_params[index][0]}."
            for key, value in values.items():
                optim[stem + key] = value
    state: dict[str, dict[str, Any]] = {MODEL: model_state, OPTIM: optim}
    if extra is not None:
        state[EXTRA] = {str(rank): serialize(extra)}
    return state


def param_parts(optimizer: Optimizer, state_dict: dict[str, Any], known: ShardTensorCache) -> dict[int, ShardTensor]:
    """What this rank updates of each parameter that is whole on every rank, by its ``id``; shares memory with it.

    ``state_dict``: the optimizer's.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    found = {}
    for index, entry in state_dict["state"].items():
        param = params[index]
        part = None if is_dtensor(param) else shard_tensor_of(entry.get(AVERAGE))
        if part is None:
            continue
        own = known.get(index)
        if own is None or not own.is_like(part, param):
            slice_ = part.fragment_view(param)
            if slice_ is None:
                known.pop(index, None)
                continue
            own = known[index] = part.like(slice_)
        found[id(param)] = own
    return found


def _is_own(value: Any, replica: int) -> bool:
    return not replica if isinstance(value, ShardTensor) else is_dtensor(value)


def _plain(value: Any) -> Any:
    return False if isinstance(value, FragmentMark) else value


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


def by_parent(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Keys of a checkpoint by what stands before their last dot, and then by what stands after it."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        parent, _, last = key.rpartition(".")
        found.setdefault(parent, {})[last] = key
    return found
