"""Applying a checkpoint that was read: it changes model, optimizer and averages on all ranks, or on none.

Code of users runs while a checkpoint is applied: hooks on state dicts, ``set_extra_state()``, and ``load_state_dict()``
of their own modules. It may raise on some ranks only, when half is written. So ``apply`` first takes a backup; after
the optimizer, each average and the model, the ranks agree, and if any has a problem all of them put the backup back.
"""

from __future__ import annotations

import copy
import io
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..comm import PeerError
from ..comm.agreement import NO_FINGERPRINT, RAISED, CallsDiffer, is_on_all_ranks, text_of
from ..comm.reports import CollectiveCall
from ..interruption import LOAD_CHECKPOINT
from ..labels import Label, labelled
from ..placements.dtensor import is_dtensor, local_tensor
from ..sharded_average import ShardedAverage
from ..sharded_state import ShardedState
from ..state_dict.backup import OptimizerBackup, find_unequal
from ..update.offload import Offload
from .format.paths import UserPath
from .optimizer_entries import restore_dtypes
from .save import Saver
from .sections import STATE
from .values import deep_copy

if TYPE_CHECKING:
    from .load import CheckpointState
    from .optimizer_state import OptimizerState

# Below this size a tensor is copied without comparing it first.
_SMALL_BYTES = 1 << 16


@labelled(Label.LOAD_APPLY)
@torch.no_grad()
def apply(
    loaded: CheckpointState,
    path: UserPath,
    saver: Saver,
    call: CollectiveCall,
    model: nn.Module,
    optimizer: Optimizer,
    averages: Mapping[str, ShardedAverage],
) -> None:
    """Write everything that was read into ``model``, ``optimizer`` and ``averages``. Collective.

    If code of the user raises on any rank, every rank raises it, and has what it had before. An interruption
    (KeyboardInterrupt) is this rank's own: the next call of the optimizer says that it may be torn.
    """
    backup = _Backup.agreed(loaded, saver, call, model, optimizer, averages)
    Offload.before_write()
    try:
        _agree_on(lambda: _load_optimizer(optimizer, loaded.optimizer), "the optimizer", path, saver, call)
        for name, state in loaded.averages.items():
            load = partial(_load_optimizer, averages[name], state)
            _agree_on(load, f"the average {name!r}", path, saver, call)
        for live, fragment in loaded.fragments:
            live.copy_(fragment)
        if isinstance(optimizer, ShardedState):
            # Before the model's own loading, which hands each live parameter to itself.
            for buffer in optimizer.shards.whole_buffers:
                optimizer.gatherer.launch(buffer)
            optimizer.gatherer.wait()
        strict = not loaded.mismatch
        _agree_on(lambda: model.load_state_dict(loaded.model, strict=strict), "the model", path, saver, call)
    except (CallsDiffer, PeerError):
        # The other ranks do not put anything back, so that this one cannot gather parameters.
        raise
    except Exception as error:
        problems = backup.put_back(optimizer)
        if problems:
            error.add_note(f"dist_asgd: not everything could be put back: {'; '.join(problems)}")
        raise
    for owner in (optimizer, *(averages[name] for name in loaded.averages)):
        if isinstance(owner, ShardedState):
            owner.shards.torn_by = None


def _load_optimizer(optimizer: Optimizer, loaded: OptimizerState) -> None:
    """Call ``load_state_dict()`` of the optimizer, which may be a subclass with one of its own. Collective."""
    state_dict = loaded.state_dict
    if not isinstance(optimizer, ShardedState):
        optimizer.load_state_dict(state_dict)
        restore_dtypes(optimizer, state_dict[STATE], loaded.same_dtype)
        return
    shards = optimizer.shards
    shards.torn_by, shards.load_has_begun = LOAD_CHECKPOINT, False
    try:
        optimizer.load_state_dict(state_dict)
    except Exception as error:
        if not (shards.load_has_begun or is_on_all_ranks(error) or isinstance(error, (CallsDiffer, PeerError))):
            # It has not got as far as ShardedASGD.load_state_dict(), in which the other ranks wait for this one.
            optimizer.gradients.agree(CollectiveCall.LOAD_STATE_DICT, NO_FINGERPRINT, error)
        raise


def _agree_on(load: Callable[[], object], what: str, path: UserPath, saver: Saver, call: CollectiveCall) -> None:
    """Run ``load``, and raise on all ranks if it raises on any. Collective."""
    problem: Exception | None = None
    try:
        load()
    except (CallsDiffer, PeerError):
        raise
    except Exception as error:
        problem = error if is_on_all_ranks(error) else _refusal(error, what, path)
    try:
        saver.agree(call, NO_FINGERPRINT, problem)
    except (CallsDiffer, PeerError):
        raise
    except Exception as error:
        if is_on_all_ranks(problem):
            raise problem from error  # type: ignore[misc]
        raise


def _refusal(error: Exception, what: str, path: UserPath) -> Exception:
    """Return ``error`` of the user's code as all ranks raise it."""
    kind = next((kind for kind in RAISED if isinstance(error, kind)), RuntimeError)
    text = text_of(error)
    refusal = kind(
        f"dist_asgd: {what} refused the checkpoint {path} while it was applied: {type(error).__name__}: "
        f"{text}. Model and optimizer are as they were before, on every rank. The error comes from load_state_dict() "
        f"of {what}: from a hook on it, {'set_extra_state(), ' if what == 'the model' else ''}or a method of your own; "
        f"correct that, or load a checkpoint that it takes."
    )
    refusal.__cause__ = error
    return refusal


class _Backup:
    """What model, optimizer and averages have before a checkpoint is applied."""

    def __init__(
        self,
        loaded: CheckpointState,
        model: nn.Module,
        optimizer: Optimizer,
        averages: Mapping[str, ShardedAverage],
        whole: set[int],
    ) -> None:
        held: set[int] = set()
        if isinstance(optimizer, ShardedState) and not optimizer.is_differentiable:
            self._optimizer = OptimizerBackup(optimizer, optimizer.shards, optimizer.gatherer, whole)
            held = {id(member.param) for member in optimizer.shards.held}
        else:
            self._optimizer = OptimizerBackup(optimizer)
        # Their parameters are those of the optimizer and the model, which are put back from there.
        self._averages = [
            (average, OptimizerBackup(average, average.shards, average.gatherer, with_params=False))
            for average in (averages[name] for name in loaded.averages)
        ]
        self._model = ModelBackup(model, held, loaded.model)

    @classmethod
    def agreed(
        cls,
        loaded: CheckpointState,
        saver: Saver,
        call: CollectiveCall,
        model: nn.Module,
        optimizer: Optimizer,
        averages: Mapping[str, ShardedAverage],
    ) -> _Backup:
        """Take a backup on every rank. Collective; raises on all ranks, and nothing is changed, if one cannot."""
        whole: set[int] = set()
        if isinstance(optimizer, ShardedState) and not optimizer.registry.values_compared:
            whole = find_unequal(optimizer.shards.whole_buffers, saver.communicators)
        backup: _Backup | None = None
        problem: Exception | None = None
        try:
            backup = cls(loaded, model, optimizer, averages, whole)
        except Exception as error:
            problem = error
        saver.agree(call, NO_FINGERPRINT, problem)
        assert backup is not None
        return backup

    def put_back(self, optimizer: Optimizer) -> list[str]:
        """Put everything back; returns what could not be. Collective for a ShardedASGD."""
        self._optimizer.put_back(optimizer)
        for average, backup in self._averages:
            backup.put_back(average)
        return self._model.put_back()


class ModelBackup:
    """What the modules of a model have: attributes, tensors and extra state, as far as a load may change them.

    Args:
        model: on this rank; it may be wrapped.
        held: the parameters, by ``id()``, that the backup of the optimizer has.
        loaded: the state dict that is about to be loaded. A large tensor in it that equals the live one is the copy;
            the live one takes its place in the dict.
    """

    def __init__(self, model: nn.Module, held: set[int], loaded: dict[str, Any]) -> None:
        modules = dict(model.named_modules())
        self._containers = _contents_of([vars(module) for module in modules.values()])
        live = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        spare: dict[int, Tensor] = {}
        for key, value in loaded.items():
            tensor = live.get(key)
            if tensor is not None and value is not tensor and id(tensor) not in held and _same_bits(tensor, value):
                spare[id(tensor)], loaded[key] = value, tensor
        self._tensors: list[tuple[Tensor, Tensor]] = []
        for tensor in {id(tensor): tensor for tensor in live.values()}.values():
            if id(tensor) not in held and not tensor.is_meta and not is_lazy(tensor):
                own = local_tensor(tensor) if is_dtensor(tensor) else tensor
                copied = spare.get(id(tensor))
                self._tensors.append((own, own.detach().clone().cpu() if copied is None else copied))
        self._extra = {
            name: (module, deep_copy(module.get_extra_state()))
            for name, module in modules.items()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        }

    @torch.no_grad()
    def put_back(self) -> list[str]:
        """Put everything back; returns a sentence for each module whose extra state could not be. Not collective."""
        # Attributes of modules are among them: each module has a dict of these.
        for container, content in self._containers:
            _refill(container, content)
        for tensor, copied in self._tensors:
            tensor.copy_(copied)
        problems = []
        for name, (module, extra) in self._extra.items():
            # Only what lies in no attribute, such as memory of an extension, is not back yet.
            try:
                if not _is_equal(module.get_extra_state(), extra):
                    module.set_extra_state(extra)
            except Exception as error:
                problems.append(f"the extra state of module {name!r} ({type(error).__name__}: {error})")
        return problems


def _same_bits(tensor: Tensor, value: Any) -> bool:
    """Whether ``value`` is a large plain tensor with the bits of ``tensor``."""
    if type(value) is not Tensor or type(tensor) not in (Tensor, nn.Parameter) or tensor.nbytes < _SMALL_BYTES:
        return False
    if tensor.layout != torch.strided or value.layout != torch.strided:
        return False
    alike = (tensor.shape, tensor.dtype, tensor.device) == (value.shape, value.dtype, value.device)
    contiguous = tensor.dim() > 0 and tensor.is_contiguous() and value.is_contiguous()
    if not alike or not contiguous or tensor.is_conj() or tensor.is_neg():
        return False
    return bool(torch.equal(tensor.detach().view(torch.uint8), value.view(torch.uint8)))


_CONTAINERS = (dict, OrderedDict, list, set, deque, bytearray)


def _contents_of(values: list[Any]) -> list[tuple[Any, Any]]:
    """Return all plain containers in ``values``, however deep, each with a shallow copy of its content."""
    found: dict[int, tuple[Any, Any]] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if type(value) in _CONTAINERS and id(value) not in found:
            found[id(value)] = value, copy.copy(value)
            if not isinstance(value, bytearray):
                waiting += value.values() if isinstance(value, dict) else value
        elif type(value) is tuple:
            waiting += value
    return list(found.values())


def _refill(container: Any, content: Any) -> None:
    """Give ``container`` the ``content`` that it had, unless it still has it."""
    values = list(container.items() if isinstance(container, dict) else container)
    wanted = list(content.items() if isinstance(content, dict) else content)
    unchanged = len(values) == len(wanted) and all(
        a is b or (isinstance(container, dict) and a[0] is b[0] and a[1] is b[1])
        for a, b in zip(values, wanted, strict=True)
    )
    if unchanged:
        return
    if isinstance(container, bytearray):
        container[:] = content
        return
    container.clear()
    if isinstance(container, list | deque):
        container.extend(content)
    else:
        container.update(content)


def _is_equal(a: Any, b: Any) -> bool:
    """Whether two values of ``get_extra_state()`` are certainly equal."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_is_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_is_equal, a, b))
    if isinstance(a, io.BytesIO):
        return bool(a.getvalue() == b.getvalue())
    return bool(a == b)
