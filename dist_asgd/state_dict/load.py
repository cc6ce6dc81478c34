"""Loading a state dict: it is parsed and checked as a whole, agreed on by all ranks, and only then applied.

``StateDicts`` first calls ``parse`` and ``fingerprint``, which change nothing, and after the agreement ``load_shards``
of ``fragments.py`` and ``make_cohorts``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..comm.agreement import Fingerprint
from ..placements.dtensor import is_dtensor, local_tensor, same_placement
from ..placements.fsdp1 import LOAD_BY_FSDP1, is_managed
from ..placements.presharded import DTensorParam, FSDP1Param
from ..placements.shard_tensor import ShardTensor, shard_tensor_of
from ..state import KEYS, MASTER_KEY
from ..storage.buffers import ShardedParam
from ..storage.frozen import FrozenParam
from ..storage.memory_order import in_memory_order
from ..update.schedule import Cohort, scalar_dtype
from ..update.weights import AVERAGE_KEY, ONLY_AVERAGE_KEY, AverageRule, rule_of
from ..validation import hyperparameters
from . import own_entries
from .wrapper_names import check_order

STATE_KEYS = KEYS


@dataclass(frozen=True, slots=True)
class ParamState:
    """The loaded state of one parameter.

    step, eta, mu  0-dim, on the host
    average        ``ax``: this rank's fragment ``(numel,)`` if ``sharded``, else whole with the parameter's shape
    master         the float32 master in the same form; None if the dict has none
    fresh          whether the parameter has never stepped. ``state_dict()`` has entries for such parameters, and
                   torch.optim.ASGD's has none
    """

    step: Tensor
    eta: Tensor
    mu: Tensor
    average: Tensor
    master: Tensor | None
    sharded: bool
    fresh: bool

    @property
    def key(self) -> tuple[float, float, float, bool]:
        """The values that parameters of one cohort have in common."""
        return (self.step.item(), self.eta.item(), self.mu.item(), self.fresh)


@dataclass(frozen=True, slots=True)
class ParsedStateDict:
    """A parsed state dict, ``source``: the entries by parameter index, and the new values of all groups.

    ``own`` are own entries of parameters, by index, and ``shared`` those of the optimizer; see ``own_entries.py``.
    ``memory`` has averages that have to be made for it, by the ``id()`` of their state buffers; see ``fragments.py``.
    """

    entries: dict[int, ParamState]
    groups: list[dict[str, Any]]
    source: dict[str, Any]
    own: dict[int, dict[Any, Any]] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)
    memory: dict[int, Tensor] = field(default_factory=dict)

    @property
    def stepped(self) -> list[int]:
        """The parameters that have the state of a step."""
        return [index for index, entry in self.entries.items() if not entry.fresh]


@dataclass(frozen=True, slots=True)
class ParamTarget:
    """One parameter, as the state in a dict must fit it: this rank holds ``numel`` elements of it from ``start`` on.

    Elements are counted in the memory order of ``strides``, complex ones once. If ``param`` is a DTensor, ``strides``,
    ``start`` and ``numel`` describe its local tensor.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    numel: int
    has_master: bool
    param: Tensor
    is_dtensor: bool = False
    is_fsdp1: bool = False
    is_frozen: bool = False

    @classmethod
    def of(cls, member: ShardedParam) -> ParamTarget:
        """Return the target for a parameter that is sharded here or was before, or frozen."""
        if isinstance(member, FrozenParam):
            # Which elements this rank will have is not known yet: the dict is parsed once more when it is.
            fsdp1_too = is_managed(member.param)
            return cls(
                member.name,
                member.dtype,
                tuple(member.param.shape),
                (),
                0,
                0,
                True,
                member.param,
                is_dtensor(member.param),
                fsdp1_too,
                is_frozen=True,
            )
        return cls(
            member.name,
            member.dtype,
            tuple(member.param.shape),
            member.strides,
            member.fragment_start,
            member.average.numel(),
            member.bucket.master is not None,
            member.param,
            isinstance(member, DTensorParam),
            isinstance(member, FSDP1Param),
        )

    @classmethod
    def of_whole(cls, name: str, param: Tensor) -> ParamTarget:
        """Return the target for a parameter that is not sharded."""
        return cls(name, param.dtype, tuple(param.shape), param.stride(), 0, param.numel(), False, param)


def parse(
    state_dict: dict[str, Any],
    groups: Sequence[dict[str, Any]],
    targets: Sequence[ParamTarget],
    defaults: dict[str, Any],
    live: Mapping[Any, Any] = MappingProxyType({}),
) -> ParsedStateDict:
    """Parse and check ``state_dict``, and change nothing. No communication.

    Args:
        state_dict: a sharded, full or plain ``torch.optim.ASGD`` state dict.
        groups: the optimizer's ``param_groups``.
        targets: one per parameter, in index order.
        defaults: the optimizer's defaults, for options that an older torch did not save.
        live: ``optimizer.state`` as it is, which says how own entries of DTensors are placed.

    Raises:
        ValueError: the dict does not fit the optimizer.
    """
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        empty = isinstance(state_dict, dict) and not state_dict
        raise ValueError(
            "dist_asgd: load_state_dict() got "
            + (
                "an empty dict: consolidated_state_dict(to=RANK) returns one on every rank but RANK. Use "
                "consolidated_state_dict(to=None), or load the same file on every rank."
                if empty
                else "no state dict: wanted a dict with the keys 'state' and 'param_groups'."
            )
        )
    saved_groups = state_dict["param_groups"]
    sizes, wanted = [len(g["params"]) for g in saved_groups], [len(g["params"]) for g in groups]
    if sizes != wanted:
        remedy = "Build the optimizer with the same groups as the one that was saved."
        if any(target.is_fsdp1 for target in targets):
            remedy = f"{LOAD_BY_FSDP1}. Otherwise: {remedy}"
        raise ValueError(
            f"dist_asgd: the state dict has parameter groups of sizes {sizes}, the optimizer has {wanted}. {remedy}"
        )
    ids = [identity for group in saved_groups for identity in group["params"]]
    index_of = {identity: index for index, identity in enumerate(ids)}
    state = state_dict["state"]
    unlisted = {key: value for key, value in state.items() if key not in index_of}
    unknown = [key for key, value in unlisted.items() if own_entries.names_a_param(key, value)]
    if unknown:
        raise ValueError(f"dist_asgd: the state dict has state for {unknown[:3]}, which no parameter group lists.")
    lr_of = {identity: group.get("lr") for group in saved_groups for identity in group["params"]}
    # An empty entry is none: reading state[p] of torch's optimizers makes one.
    saved_of = {
        index_of[identity]: state[identity] for identity in ids if not own_entries.is_absent(state.get(identity))
    }
    of_asgd = any(own_entries.is_state(saved) for saved in saved_of.values())
    entries = {
        index: _entry(targets[index], saved, lr_of[ids[index]])
        for index, saved in saved_of.items()
        if not (own_entries.is_all(saved) and (of_asgd or _needs_no_state(targets[index])))
    }
    own = {
        index: own_entries.cast_as_torch(targets[index].param, saved, live.get(targets[index].param, {}))
        for index, saved in saved_of.items()
    }
    new_groups = [
        _group(i, saved, group, defaults) for i, (saved, group) in enumerate(zip(saved_groups, groups, strict=True))
    ]
    return ParsedStateDict(entries, new_groups, state_dict, own, unlisted)


def _needs_no_state(target: ParamTarget) -> bool:
    """Whether a dict has no state for the parameter: it is frozen, or this rank holds nothing of an FSDP1 parameter."""
    return target.is_frozen or (target.is_fsdp1 and not target.numel)


def _entry(target: ParamTarget, saved: Any, lr: Any) -> ParamState:
    """Check the state of one parameter; ``lr`` is that of its group in the dict."""
    if not isinstance(saved, dict) or not saved.keys() >= set(STATE_KEYS):
        got = sorted(map(str, saved)) if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(
            f"dist_asgd: the state of parameter {target.name} has {got}, wanted {list(STATE_KEYS)} at least: this is "
            f"not the state of an ASGD optimizer."
        )
    for key in ("step", "eta", "mu"):
        value = saved[key]
        if (isinstance(value, Tensor) and value.numel() != 1) or not isinstance(value, (Tensor, int, float)):
            raise ValueError(f"dist_asgd: {key} of parameter {target.name} must be a number or a 1-element tensor.")
    average, sharded = _tensor(target, saved, "ax")
    if average.is_complex() != target.dtype.is_complex or not (average.is_complex() or average.is_floating_point()):
        raise ValueError(
            f"dist_asgd: ax of parameter {target.name} has dtype {average.dtype}, the parameter has {target.dtype}."
        )
    master, master_sharded = _master(target, saved)
    if master is not None and sharded != master_sharded:
        raise ValueError(f"dist_asgd: of ax and master of parameter {target.name} one is whole and one is a part.")
    step, eta, mu = (_scalar(saved[key]) for key in ("step", "eta", "mu"))
    fresh = step.item() == 0 and _is_lr(eta, lr)
    return ParamState(step, eta, mu, average, master, sharded, fresh)


def _tensor(target: ParamTarget, saved: dict[str, Any], key: str) -> tuple[Tensor, bool]:
    """Return the tensor ``key``: this rank's fragment ``(numel,)`` and True, or the whole tensor and False."""
    value = saved[key]
    if not isinstance(value, Tensor):
        raise ValueError(f"dist_asgd: {key} of parameter {target.name} must be a tensor, got {type(value).__name__}.")
    if tuple(value.shape) != target.shape:
        whole = "consolidated_state_dict() gives the whole"
        if target.is_fsdp1:
            whole = f"FSDP.optim_state_dict(model, optimizer) gives the whole. {LOAD_BY_FSDP1}"
        raise ValueError(
            f"dist_asgd: {key} of parameter {target.name} has shape {tuple(value.shape)}, wanted {target.shape}. The "
            f"state dict was saved from another model, or is one rank's part: {whole}."
        )
    if target.is_frozen:
        return value, False
    shard = shard_tensor_of(value)
    distributed = type(value) not in (Tensor, ShardTensor) and is_dtensor(value)
    if distributed and (target.is_dtensor or shard is None):
        return _local_fragment(target, key, value)
    if shard is None:
        return value, False
    if target.is_dtensor:
        raise ValueError(
            f"dist_asgd: {key} of parameter {target.name} is one rank's part of a flat bucket, and the parameter is a "
            f"DTensor. Load consolidated_state_dict(), or a checkpoint through torch.distributed.checkpoint."
        )
    return _own_fragment(target, key, shard), True


def _local_fragment(target: ParamTarget, key: str, value: Tensor) -> tuple[Tensor, bool]:
    """Return this rank's fragment of a DTensor and True.

    For a plain parameter the DTensor must be replicated; its local tensor, which is whole, and False are returned.
    """
    assert is_dtensor(value)
    if not is_dtensor(target.param) and all(placement.is_replicate() for placement in value.placements):
        return local_tensor(value), False
    if not is_dtensor(target.param) or not same_placement(value, target.param):
        wanted = list(target.param.placements) if is_dtensor(target.param) else "a plain parameter"
        raise ValueError(
            f"dist_asgd: {key} of parameter {target.name} is a DTensor placed as {list(value.placements)}, for "
            f"{wanted} of the optimizer. Load whole tensors (full_tensor(), or full_state_dict=True), or a checkpoint "
            f"through torch.distributed.checkpoint, which load under any sharding."
        )
    shard = shard_tensor_of(value)
    if shard is not None:
        return _own_fragment(target, key, shard), True
    return in_memory_order(local_tensor(value), target.strides)[target.start : target.start + target.numel], True


def _master(target: ParamTarget, saved: dict[str, Any]) -> tuple[Tensor | None, bool]:
    """Return the master, if the dict has one, and whether it is this rank's fragment."""
    if MASTER_KEY not in saved:
        return None, False
    if not target.has_master:
        raise ValueError(
            f"dist_asgd: the state dict has a float32 master of parameter {target.name}, and this optimizer keeps none "
            f"for it. Pass master_weights=True and 16-bit parameters, or delete the {MASTER_KEY!r} entries to go on "
            f"from the rounded parameters."
        )
    master, sharded = _tensor(target, saved, MASTER_KEY)
    if master.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dist_asgd: the master of parameter {target.name} must be float32, got {master.dtype}.")
    return master, sharded


def _own_fragment(target: ParamTarget, key: str, value: ShardTensor) -> Tensor:
    """Return the fragment ``(numel,)`` that ``value`` holds; ValueError unless it has exactly this rank's elements."""
    shape, strides, start, numel = value.extent
    same_order = all(size == 1 or a == b for size, a, b in zip(shape, strides, target.strides, strict=True))
    if (numel and not same_order) or (numel, start if numel else 0) != (target.numel, target.start if numel else 0):
        raise ValueError(
            f"dist_asgd: {key} of parameter {target.name} is elements {start} to {start + numel} of "
            f"{tuple(value.shape)} with strides {strides}; this rank holds elements {target.start} to "
            f"{target.start + target.numel} with strides {target.strides}. The state dict is another rank's part, or "
            f"of other buckets: load what this rank saved, on the same number of ranks with the same bucket_cap_mb and "
            f"shard_replicated, or use consolidated_state_dict(), save_checkpoint() or torch.distributed.checkpoint, "
            f"whose files load on any."
        )
    return value.to_local()


def _is_lr(eta: Tensor, lr: Any) -> bool:
    """Whether ``eta`` is the group's lr, as it is before the first step."""
    return isinstance(lr, (Tensor, float, int)) and eta.item() == _scalar(lr).to(eta.dtype).item()


def _scalar(value: Tensor | float) -> Tensor:
    """Return a 0-dim host tensor of at least the scalars' dtype; old releases of torch saved Python floats."""
    if isinstance(value, Tensor):
        dtype = torch.promote_types(value.dtype, scalar_dtype())
        return value.detach().reshape(()).to(device="cpu", dtype=dtype).clone()
    return torch.tensor(float(value), dtype=scalar_dtype(), device="cpu")


def _group(index: int, saved: dict[str, Any], own: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the new values of a group; ValueError if the dict names its parameters differently."""
    names, own_names = saved.get("param_names"), own.get("param_names")
    if names is not None and len(names) != len(own["params"]):
        raise ValueError(
            f"dist_asgd: param_groups[{index}] of the state dict has {len(own['params'])} parameters and {len(names)} "
            f"param_names. Delete the names, or give one for each parameter."
        )
    if names is not None and own_names is not None:
        check_order(index, names, own_names)
    loaded = {key: copy.deepcopy(value) for key, value in saved.items() if key != "params"}
    for key, value in defaults.items():
        # A release of torch that did not have an option behaved as its default does.
        loaded.setdefault(key, value)
    # These options say how this process runs, and a dict that was saved elsewhere does not change that.
    for key in ("capturable", "differentiable", "fused"):
        loaded.pop(key, None)
        if key in own:
            loaded[key] = own[key]
    if bool(saved.get(ONLY_AVERAGE_KEY)) != bool(own.get(ONLY_AVERAGE_KEY)):
        kinds = ("an optimizer", "a ShardedAverage")
        raise ValueError(
            f"dist_asgd: param_groups[{index}] of the state dict is that of {kinds[ONLY_AVERAGE_KEY in saved]}, and "
            f"this is {kinds[ONLY_AVERAGE_KEY in own]}: their hyperparameters differ. Load it into what saved it."
        )
    if AVERAGE_KEY in loaded and not isinstance(loaded[AVERAGE_KEY], AverageRule):
        loaded[AVERAGE_KEY] = rule_of(loaded[AVERAGE_KEY], own.get(AVERAGE_KEY))
    # As in torch, names in the dict replace those of the group.
    if names is None and own_names is not None:
        loaded["param_names"] = own_names
    return loaded


def fingerprint(loaded: ParsedStateDict, targets: Sequence[ParamTarget]) -> Fingerprint:
    """Return the fingerprint of a loaded dict: all of it but the values of ``ax`` and masters, which may be sharded."""
    entries: list[tuple[str, object]] = []
    for index, group in enumerate(loaded.groups):
        entries += [(f"param_groups[{index}][{key!r}]", value) for key, value in hyperparameters(group)]
        entries.append((f"param_groups[{index}]['param_names']", group.get("param_names")))
    for index, entry in sorted(loaded.entries.items()):
        if targets[index].is_fsdp1:
            # Ranks that hold nothing of an FSDP1 parameter have no entry for it.
            continue
        label = (
            f"(step, eta, mu, never stepped), dtype of ax, whether it has a master, of parameter {targets[index].name}"
        )
        entries.append((label, (entry.key, str(entry.average.dtype), entry.master is not None)))
    return Fingerprint("loaded state dicts", entries, "Load the same checkpoint on every rank.")


def make_cohorts(
    loaded: ParsedStateDict, members: Sequence[ShardedParam], groups: Sequence[dict[str, Any]]
) -> list[Cohort]:
    """Return new cohorts: parameters of a group with equal scalars share one, and those without an entry start anew."""
    cohorts: dict[object, Cohort] = {}
    for member in members:
        entry = loaded.entries.get(member.index)
        group_index = member.bucket.group_index
        if entry is None or entry.fresh:
            key: object = (group_index, None)
            if key not in cohorts:
                cohorts[key] = Cohort.new(groups[group_index]["lr"], ())
        else:
            dtypes = (entry.step.dtype, entry.eta.dtype, entry.mu.dtype)
            key = (group_index, entry.key, dtypes)
            if key not in cohorts:
                cohorts[key] = Cohort(entry.step, entry.eta, entry.mu, ())
        cohorts[key].indices.add(member.index)
    return list(cohorts.values())
