"""``StateDicts``: the optimizer's entry to this package."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch.optim import Optimizer

from ..comm import Communicators, PeerError
from ..comm.agreement import NO_FINGERPRINT, CallsDiffer, Fingerprint
from ..gather import Gatherer
from ..interruption import LOAD_CHECKPOINT
from ..placements import fsdp1
from ..placements.dtensor import reshard_modules
from ..state import ParamShards
from ..storage.buffers import ShardedParam
from ..storage.frozen import FrozenParam
from ..storage.snapshots import mark_written
from ..validation import check_hyperparameters, named_params, params_of
from . import beside_fsdp1, fragments, full, load, own_entries, sharded, unsharded
from .backup import OptimizerBackup, find_unequal
from .load import ParsedStateDict
from .whole_tensors import whole_dtensors


class StateDicts:
    """Makes and loads the state dicts of one optimizer, and runs the user's hooks at the right moments."""

    def __init__(
        self, optimizer: Optimizer, shards: ParamShards | None, communicators: Communicators, gatherer: Gatherer
    ) -> None:
        """``shards`` is None if nothing is sharded (``differentiable=True``). No communication."""
        # Weak, because the optimizer keeps this object: a deleted optimizer must be freed at once.
        self._weak_optimizer = weakref.ref(optimizer)
        self._shards = shards
        self._communicators = communicators
        self._gatherer = gatherer
        self._cache: sharded.ShardTensorCache = {}
        # What the next state_dict() returns: the whole on one rank, {} on the others; None if nothing was gathered.
        self.consolidated: dict[str, Any] | None = None

    @property
    def _optimizer(self) -> Optimizer:
        return cast(Optimizer, self._weak_optimizer())

    def forget_averages(self) -> None:
        """Let go of the tensors that show averages; called when the averages have moved."""
        self._cache.clear()

    def take_consolidated(self, whole_only: bool) -> dict[str, Any] | None:
        """Return what was gathered for the next ``state_dict()``, once; None if that is this rank's fragments.

        RuntimeError if ``whole_only``, and nothing was gathered for several ranks. No communication.
        """
        gathered, self.consolidated = self.consolidated, None
        if self._communicators.world_size == 1:
            return gathered or None
        if fsdp1.is_collecting_state():
            # FSDP1 makes the whole state dict, and on all ranks.
            return None
        if not whole_only:
            return gathered or None
        if gathered is None:
            remedy = "Call consolidate_state_dict(to=0) on every rank before it, or use save_checkpoint()."
            if any(fsdp1.is_managed(param) for param in params_of(self._optimizer.param_groups)):
                remedy = f"{fsdp1.CALL_FSDP1}, which has parameters of FSDP1 whole too."
            raise RuntimeError(
                f"dist_asgd: state_dict() on {self._communicators.names.place(self._communicators.rank)} would "
                f"be one rank's part, and whole_state_dicts_only is set. {remedy}"
            )
        return gathered

    def for_fsdp1(self) -> bool:
        """Whether a state dict of now is for FSDP1's helpers, and all but their own state is whole in it."""
        return self._shards is not None and beside_fsdp1.needs_whole(self._shards, self._communicators)

    def sharded(self, agree: beside_fsdp1.Agree, fresh: bool = False) -> dict[str, Any]:
        """Return this rank's fragments, for ``state_dict()``; see ``sharded.pack``.

        No communication, unless ``for_fsdp1()``. Then it is collective: all ranks ``agree`` first, and state that
        FSDP1 does not hold is whole.
        """
        optimizer, shards, for_fsdp1 = self._optimizer, self._shards, self.for_fsdp1()
        groups, state = optimizer.param_groups, optimizer.state
        params = params_of(groups)
        if shards is None:
            _before_state_dict(optimizer)
            packed = unsharded.pack(groups, state)
            own_entries.add(packed["state"], state, params)
            return _after_state_dict(optimizer, packed)
        members: list[ShardedParam] = []
        problem: Exception | None = None
        try:
            if for_fsdp1:
                shards.check_whole()
            _before_state_dict(optimizer)
            shards.follow_state()
            if shards.presharded:
                # Helpers of torch look for the optimizer's parameters in the model next.
                reshard_modules()
            members = sharded.members_with_entry(shards, fresh, own_entries.of_params(state, params).keys())
            if for_fsdp1:
                own_entries.check_whole(state, shards.members, self._communicators)
        except Exception as error:
            if not for_fsdp1:
                raise
            problem = error
        whole = beside_fsdp1.gather(members, self._communicators, agree, problem) if for_fsdp1 else {}
        packed = sharded.pack(groups, shards, self._communicators, self._cache, members, whole)
        own_entries.add(packed["state"], state, params)
        return _after_state_dict(optimizer, packed)

    def before_full(self, to: int | None) -> tuple[Fingerprint, Exception | None]:
        """Get ready for ``full(to)``; return what ranks have to agree on before it, and this rank's problem.

        No communication. Hooks that come before a state dict run here, on the ranks that get it.
        """
        fingerprint, problem = full.fingerprint_of(to, self._communicators.names)
        if self._shards is None or problem is not None:
            return fingerprint, problem
        try:
            self._shards.check_whole()
            self._shards.follow_state()
            if to is None or to == self._communicators.rank:
                _before_state_dict(self._optimizer)
            state, members = self._optimizer.state, self._shards.members
            own_entries.check_whole(state, members, self._communicators)
            described = own_entries.descriptions(state, members)
            fingerprint = replace(fingerprint, entries=[*fingerprint.entries, *described])
        except Exception as error:
            problem = error
        return fingerprint, problem

    @torch.no_grad()
    def full(self, to: int | None) -> dict[str, Any]:
        """Return the whole state on rank ``to`` (None: on all ranks), and {} on the others. Collective.

        ``consolidated_state_dict()`` calls it, once all ranks agree on ``before_full(to)``. Hooks run only on ranks
        that get it.
        """
        if self._shards is None:
            return self.sharded(lambda _fingerprint, _problem: None)
        shards, communicators = self._shards, self._communicators
        groups, live = self._optimizer.param_groups, self._optimizer.state
        whole = full.collect_state(shards, communicators, to)
        placed = own_entries.sharded(live, shards.members)
        gathered = list(whole_dtensors([value for *_, value in placed], communicators, to))
        if to is not None and to != communicators.rank:
            return {}
        state: dict[Any, Any] = dict(whole)
        for index in own_entries.of_params(live, params_of(groups)).keys() - whole.keys():
            member = shards.members[index]
            if isinstance(member, FrozenParam):
                continue
            scalars = sharded.snapshots_of([member], shards.cohort_of)[index]
            state[index] = own_entries.fresh_entry(member, scalars, groups[member.bucket.group_index]["lr"])
        own_entries.add_copies(state, live, params_of(groups))
        for position, tensor in gathered:
            index, key, _ = placed[position]
            state[index][key] = tensor
        in_order = sorted(key for key in state if type(key) is int and key < len(shards.members))
        state = {key: state[key] for key in in_order} | state
        packed = {"state": state, "param_groups": sharded.pack_groups(groups)}
        return _after_state_dict(self._optimizer, packed)

    def parse(
        self, state_dict: dict[str, Any], run_hooks: bool = True
    ) -> tuple[ParsedStateDict | None, Fingerprint, Exception | None]:
        """Parse and check ``state_dict``. No communication, and nothing changes but what pre-hooks do.

        Returns the parsed state and its fingerprint, which all ranks compare before any of them applies the state. If
        the dict does not fit, the state is None and the third value is the error, for all ranks to raise.
        """
        groups = self._optimizer.param_groups
        try:
            targets = self._targets()
            if run_hooks:
                state_dict = _before_load(self._optimizer, state_dict)
            loaded = load.parse(state_dict, groups, targets, self._optimizer.defaults, self._optimizer.state)
            for index, group in enumerate(loaded.groups):
                check_hyperparameters(group, f"param_groups[{index}] of the loaded state dict")
            if self._shards is not None:
                fragments.find_memory(loaded, self._shards.state_buffers)
            return loaded, load.fingerprint(loaded, targets), None
        except Exception as error:
            return None, NO_FINGERPRINT, error

    def _targets(self) -> list[load.ParamTarget]:
        """Return what the state of each parameter must fit, in index order."""
        if self._shards is not None:
            return [load.ParamTarget.of(member) for member in self._shards.members]
        groups = self._optimizer.param_groups
        named = [pair for index in range(len(groups)) for pair in named_params(groups, index)]
        return [load.ParamTarget.of_whole(name, param) for name, param in named]

    def load(self, loaded: ParsedStateDict, agree: Callable[[Exception | None], object]) -> None:
        """Replace the optimizer's state by the one that ``parse`` returned, and run the hooks after it. Collective.

        All ranks have agreed on it before: from here on only a lost peer or a hook stops them. If a hook raises on any
        rank, everything is put back, and ``agree`` raises its error on all. Inside ``load_checkpoint()``, which puts
        more back, the error is left to that.
        """
        shards, backup = self._shards, None
        outermost = shards is None or shards.torn_by != LOAD_CHECKPOINT
        if shards is not None:
            shards.load_has_begun = True
        if outermost and self._have_load_hooks():
            # Only masters change parameters.
            buckets = [] if shards is None else shards.buckets
            has_masters = any(bucket.master is not None for bucket in buckets)
            whole = find_unequal(buckets, self._communicators) if has_masters else ()
            problem: Exception | None = None
            try:
                backup = OptimizerBackup(self._optimizer, shards, self._gatherer, whole)
            except Exception as error:
                problem = error
            agree(problem)
        with nullcontext() if shards is None else shards.loading():
            self._apply(loaded)
            if backup is None:
                _after_load(self._optimizer)
                return
            problem = None
            try:
                _after_load(self._optimizer)
            except Exception as error:
                problem = error
            try:
                agree(problem)
            except (CallsDiffer, PeerError):
                # Other ranks do not put anything back.
                raise
            except Exception:
                backup.put_back(self._optimizer)
                raise

    def _have_load_hooks(self) -> bool:
        """Whether a hook will run after the load on any rank: ranks may have registered other ones. Collective."""
        has_hooks = bool(self._optimizer._optimizer_load_state_dict_post_hooks)
        if self._communicators.world_size == 1:
            return has_hooks
        return self._communicators.host.any_of(has_hooks)

    @torch.no_grad()
    def _apply(self, loaded: ParsedStateDict) -> None:
        groups = self._optimizer.param_groups
        self.consolidated = None
        # Averages may move to wider storage, so the cached tensors may show memory that is no longer used.
        self._cache.clear()
        for group, values in zip(groups, loaded.groups, strict=True):
            # The group keeps its parameters at every moment: a load that is interrupted here can be repeated.
            for key in group.keys() - values.keys() - {"params"}:
                del group[key]
            group.update(values)
        own_entries.replace(self._optimizer.state, params_of(groups), loaded.own, loaded.shared)
        if self._shards is None:
            unsharded.apply(loaded, groups, self._optimizer.state)
        else:
            # Loaded masters change this rank's shard of the parameters, so the other ranks need it.
            for buffer in fragments.load_shards(loaded, self._shards.state_buffers):
                mark_written([member.param for member in buffer.members])
                self._gatherer.launch(buffer)
                buffer.on_params_written()
            self._gatherer.wait()
            self._shards.rename(groups)
            self._shards.replace_cohorts(load.make_cohorts(loaded, self._shards.members, groups))


# --- the user's hooks ------------------------------------------------------------------------------------


def _before_state_dict(optimizer: Optimizer) -> None:
    """Run the state_dict pre-hooks."""
    for hook in optimizer._optimizer_state_dict_pre_hooks.values():
        hook(optimizer)


def _after_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Run the state_dict post-hooks on ``state_dict``; return the dict, or the one that a hook returned instead."""
    for hook in optimizer._optimizer_state_dict_post_hooks.values():
        replaced = hook(optimizer, state_dict)
        if replaced is not None:
            state_dict = replaced
    return state_dict


def _before_load(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Run the load_state_dict pre-hooks on a shallow copy, as torch does; return the dict to load."""
    state_dict = state_dict.copy() if isinstance(state_dict, dict) else state_dict
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = hook(optimizer, state_dict)
        if replaced is not None:
            state_dict = replaced
    return state_dict


def _after_load(optimizer: Optimizer) -> None:
    """Run the load_state_dict post-hooks."""
    for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        hook(optimizer)
