"""Own entries: what users keep in ``optimizer.state`` beside the state of ASGD. They travel in state dicts as in torch.

An own entry belongs to a parameter (``state[p]["grad_ema"]``), or to the optimizer (``state["samples_seen"]``) if its
key there is no parameter. Sharded state dicts refer to the values, as torch's do; full ones have copies on the host.
Loading casts tensors of parameters as torch does. ``StateDicts`` calls this module, and ``checkpoint`` saves the same
entries. Nothing but ``gather`` communicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..comm import Communicators
from ..placements.dtensor import describe_placement, dtensor_like, is_dtensor, local_like
from ..state import KEYS, MASTER_KEY, own_entries
from ..storage.buffers import ShardedParam

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

State = Mapping[Any, Any]
_CONTAINERS = (list, tuple, set, frozenset)


def of_params(state: State, params: Sequence[Tensor]) -> dict[int, dict[Any, Any]]:
    """Return the own entries of the parameters that have any, by the parameter's index."""
    found = ((index, own_entries(state[param])) for index, param in enumerate(params) if param in state)
    return {index: own for index, own in found if own}


def of_optimizer(state: State, num_params: int) -> dict[Any, Any]:
    """Return the entries whose key is no parameter; ValueError if a state dict has the number of one in its place.

    The state that a parameter has left behind when it was removed from its group is not among them.
    """
    own = {key: value for key, value in state.items() if not isinstance(key, Tensor)}
    taken = next((key for key in range(num_params) if key in own), None)
    if taken is not None:
        raise ValueError(
            f"dist_asgd: optimizer.state[{taken}] is an entry of yours, and a state dict has the state of parameter "
            f"{taken} under this key. Use a string, optimizer.state['name']."
        )
    return own


def add(packed: dict[Any, Any], state: State, params: Sequence[Tensor]) -> None:
    """Add all own entries to ``packed``, the ``state`` of a state dict. The values stay the ones that users have."""
    own = of_optimizer(state, len(params))
    for index, entries in of_params(state, params).items():
        packed.setdefault(index, {}).update(entries)
    packed.update(own)


# --- full state dicts ------------------------------------------------------------------------------------


def check_whole(state: State, members: Sequence[ShardedParam], communicators: Communicators) -> None:
    """Raise ValueError if one rank's own entries would not be all there is: for full state dicts and checkpoints."""
    of_optimizer(state, len(members))
    for member in members:
        for key, value in own_entries(state.get(member.param, {})).items():
            if not isinstance(value, Tensor) or communicators.num_shards == 1 or not member.is_whole:
                continue
            fragment, shape = tuple(member.average.shape), tuple(member.param.shape)
            # One element is more often a number.
            if tuple(value.shape) == fragment != shape and value.numel() != 1:
                raise ValueError(
                    f"dist_asgd: state[p][{key!r}] of parameter {member.name} is as large as this rank's fragment of "
                    f"ax, {fragment}, and that of one rank would be saved for all. Keep a tensor of the parameter's "
                    f"shape {shape}, the same on every rank, or leave the entry out while you save."
                )


def sharded(state: State, members: Sequence[ShardedParam]) -> list[tuple[int, Any, DTensor]]:
    """Return (parameter's index, key, value) of the own entries that are DTensors, in one order on all ranks."""
    found = [
        (member.index, key, value)
        for member in members
        for key, value in own_entries(state.get(member.param, {})).items()
        if is_dtensor(value)
    ]
    return sorted(found, key=lambda entry: (entry[0], repr(entry[1])))


def descriptions(state: State, members: Sequence[ShardedParam]) -> list[tuple[str, object]]:
    """Return the part of a fingerprint that says which own entries ranks have to gather."""
    return [
        (f"state[p][{key!r}] of parameter {members[index].name}", f"{tuple(v.shape)}, {describe_placement(v)}")
        for index, key, v in sharded(state, members)
    ]


def add_copies(packed: dict[Any, Any], state: State, params: Sequence[Tensor]) -> None:
    """Add copies of all own entries but DTensors to ``packed``, the ``state`` of a full state dict; on the host."""
    own = of_optimizer(state, len(params))
    for index, entries in of_params(state, params).items():
        copies = {key: on_host(value) for key, value in entries.items() if not is_dtensor(value)}
        packed.setdefault(index, {}).update(copies)
    packed.update((key, on_host(value)) for key, value in own.items())


def on_host(value: Any) -> Any:
    """Return ``value`` with copies on the host of all tensors in it; objects of other kinds stay the same."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return _mapped(value, lambda _key, inner: on_host(inner))


# --- loading ---------------------------------------------------------------------------------------------


def is_state(saved: Any) -> bool:
    """Whether ``saved`` has the state that ASGD keeps of a parameter."""
    return isinstance(saved, dict) and saved.keys() >= set(KEYS)


def is_all(saved: Any) -> bool:
    """Whether ``saved`` has own entries and nothing of the state of a parameter, as torch has it before a step.

    In a dict of another optimizer all entries may be so, but not in one that also has ``is_state`` entries.
    """
    return isinstance(saved, dict) and not saved.keys() & {*KEYS, MASTER_KEY}


def is_absent(saved: Any) -> bool:
    """Whether a dict has no entry: reading ``state[p]`` of torch's optimizers makes an empty one."""
    return saved is None or (isinstance(saved, dict) and not saved)


def names_a_param(key: object, value: object) -> bool:
    """Whether an entry that no group lists is the state of a parameter, and no own entry of the optimizer."""
    if not isinstance(value, dict):
        return isinstance(key, Tensor)
    return isinstance(key, int | Tensor) or is_state(value)


def cast_as_torch(param: Tensor, saved: Mapping[Any, Any], live: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the own entries in ``saved``, the loaded state of ``param``, as torch's ``load_state_dict()`` casts them.

    That is, tensors take the parameter's device, and its dtype if that is a floating-point one. A whole tensor of the
    shape of a DTensor is placed like it, unless the entry of now, in ``live``, is whole too.
    """
    cast_entries = {}
    for key, value in own_entries(saved).items():
        value = _cast(param, value, key)
        if is_dtensor(param) and type(value) is Tensor and value.dim() and value.shape == param.shape:
            before = live.get(key)
            if before is None or is_dtensor(before):
                value = dtensor_like(param, local_like(value, param))
        cast_entries[key] = value
    return cast_entries


def _cast(param: Tensor, value: Any, key: Any) -> Any:
    if isinstance(value, Tensor):
        if key == "step":
            return value
        return value.to(device=param.device, dtype=param.dtype if param.is_floating_point() else value.dtype)
    return _mapped(value, lambda inner_key, inner: _cast(param, inner, inner_key))


def _mapped(value: Any, function: Any) -> Any:
    """Return a container with ``function(key, item)`` in place of each item; what is no container is returned as is.

    Unlike torch, which passes every iterable to its own type, this leaves strings, arrays and named tuples alone.
    """
    if isinstance(value, dict):
        return {key: function(key, item) for key, item in value.items()}
    if type(value) in _CONTAINERS:
        return type(value)(function(None, item) for item in value)
    return value


def replace(
    state: dict[Any, Any], params: Sequence[Tensor], of_param: Mapping[int, dict[Any, Any]], shared: Mapping[Any, Any]
) -> None:
    """Make these the own entries: ``of_param`` by the parameter's index, ``shared`` those of the optimizer.

    All others are dropped, as in torch, which makes the loaded state the only one.
    """
    for key in _dropped(state, params):
        del state[key]
    for index, param in enumerate(params):
        entry = state.get(param)
        if entry is not None:
            for key in own_entries(entry):
                del entry[key]
            entry.update(of_param.get(index, {}))
            if not entry:
                # Frozen parameters have no state beside own entries.
                del state[param]
        elif index in of_param:
            state[param] = dict(of_param[index])
    state.update(shared)


def _dropped(state: State, params: Sequence[Tensor]) -> Iterator[Any]:
    known = set(map(id, params))
    return iter([key for key in state if not (isinstance(key, Tensor) and id(key) in known)])


def fresh_entry(member: ShardedParam, scalars: Mapping[str, Tensor], lr: float | Tensor) -> dict[str, Tensor]:
    """Return the whole state of a parameter that never stepped; beside own entries torch would not make it later.

    ``scalars`` are copies of its step, eta and mu.
    """
    eta = scalars["eta"]
    eta.copy_(torch.as_tensor(lr, dtype=eta.dtype, device="cpu").detach().reshape(()))
    dtype = member.average.dtype
    dtype = dtype.to_complex() if member.dtype.is_complex else dtype
    shape, strides = tuple(member.param.shape), member.strides
    if is_dtensor(member.param):
        average = torch.zeros(shape, dtype=dtype, device="cpu")
    else:
        average = torch.empty_strided(shape, strides, dtype=dtype, device="cpu").zero_()
    return {**scalars, "ax": average}
