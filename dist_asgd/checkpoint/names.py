"""The names of a model's entries and of an optimizer's parameters in checkpoints and exports.

A *name* is the one that ``named_parameters()`` gives, without what wrappers (DDP, ``torch.compile``, activation
checkpointing) add to it at any place. Saving, loading and exporting call ``names_of``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from ..placements import fsdp1
from ..placements.dtensor import reshard
from ..placements.presharded import FSDP1Param
from ..sharded_state import ShardedState
from ..state_dict.wrapper_names import CERTAIN_PARTS
from ..storage.frozen import FrozenParam


@dataclass(frozen=True, slots=True)
class Names:
    """Names of a model's entries and of an optimizer's parameters.

    Attributes:
        of_model: the name of each key of ``model.state_dict()``.
        of_params: all names of each parameter of the optimizer, in its order. A parameter that modules share has
            several; checkpoints are written with the first one.
    """

    of_model: dict[str, str]
    of_params: list[tuple[str, ...]]


class PlainNames:
    """Removes what wrappers add to names. Each module is looked up once, however many names begin with it."""

    def __init__(self, model: nn.Module) -> None:
        # By path. A wrapper has the attributes of what it wraps, so asking modules would find too many children.
        self._modules = dict(model.named_modules(remove_duplicate=False))
        # The plain prefix of the names inside a module, and the module's path, None if there is no such module.
        self._prefixes: dict[str, tuple[str, str | None]] = {"": ("", "")}

    def of(self, name: str) -> str:
        """Return the plain name of a parameter, a buffer, or an entry of ``state_dict()``."""
        prefix, _, last = name.rpartition(".")
        plain, path = self._prefix(prefix)
        return plain if path is not None and last == self._wrapped_child(path) else plain + last

    def _prefix(self, name: str) -> tuple[str, str | None]:
        """Return the plain prefix of the names inside the module called ``name``, and the module's path."""
        if name not in self._prefixes:
            above, _, last = name.rpartition(".")
            plain, path = self._prefix(above)
            path = self._holder(path, last)
            is_part = last in CERTAIN_PARTS or (path is not None and last == self._wrapped_child(path))
            child = None if path is None else _below(path, last)
            child = child if child in self._modules else None
            # A hook may have made up the name: what is no module adds nothing to the modules that are known.
            inner = path if child is None else child
            self._prefixes[name] = (plain, inner) if is_part else (f"{plain}{last}.", child)
        return self._prefixes[name]

    def _holder(self, path: str | None, child: str) -> str | None:
        """Return the path of the module with the ``child``: ``path``, or one in that wrapper.

        Hooks of activation checkpointing leave the wrapper out of keys.
        """
        inner = path
        while inner is not None and _below(inner, child) not in self._modules:
            wrapped = self._wrapped_child(inner)
            inner = None if wrapped is None else _below(inner, wrapped)
        return path if inner is None else inner

    def _wrapped_child(self, path: str) -> str | None:
        """The name under which the module at ``path`` has the one that it wraps; None if it is no wrapper."""
        if isinstance(self._modules[path], (DistributedDataParallel, DataParallel)):
            return "module"
        return next((part for part in CERTAIN_PARTS if _below(path, part) in self._modules), None)


def _below(path: str, child: str) -> str:
    return f"{path}.{child}" if path else child


def names_of(model: nn.Module, optimizer: Optimizer, state_keys: Iterable[str] | None = None) -> Names:
    """Match the optimizer's parameters with the model's by identity; raises ValueError if the model lacks one.

    ``state_keys`` are the keys of ``model.state_dict()``; callers that have made it pass them. Parameters of FSDP2 that
    an evaluation has left gathered are sharded again. No communication.
    """
    reshard(model)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    members = optimizer.shards.members if isinstance(optimizer, ShardedState) else None
    if members is None or any(isinstance(member, (FSDP1Param, FrozenParam)) for member in members):
        fsdp1.refuse("a checkpoint of this package", params, fsdp1.USE_DCP)
    plain = PlainNames(model)
    by_param: dict[int, list[str]] = {}
    by_name: dict[str, tuple[str, int]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        by_param.setdefault(id(param), []).append(plain.of(name))
        other, known = by_name.setdefault(by_param[id(param)][-1], (name, id(param)))
        if known != id(param):
            raise _same_name("parameters of the model", other, name, by_param[id(param)][-1])
    of_params = []
    for index, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            if id(param) not in by_param:
                raise ValueError(
                    f"dist_asgd: param_groups[{index}]['params'][{position}] of the optimizer, of shape "
                    f"{tuple(param.shape)}, is no parameter of the model. Pass the model whose parameters the "
                    f"optimizer was given (wrapped or not)."
                )
            of_params.append(tuple(dict.fromkeys(by_param[id(param)])))
    of_model: dict[str, str] = {}
    key_of: dict[str, str] = {}
    for key in model.state_dict() if state_keys is None else state_keys:
        name = of_model[key] = plain.of(key)
        if key_of.setdefault(name, key) != key:
            raise _same_name("entries of the model's state_dict()", key_of[name], key, name)
    return Names(of_model, of_params)


def _same_name(what: str, first: str, second: str, name: str) -> ValueError:
    return ValueError(
        f"dist_asgd: two {what}, {first!r} and {second!r}, have the same name without wrappers, {name!r}. Rename one "
        f"of the modules, or register the wrapper and what it wraps under one name only."
    )
