"""The parameters that an optimizer was built for, beside those that ``param_groups`` and the process group hold now.

Users and trainers move a model after they have built its optimizer, replace its parameters (FSDP2 does), and edit
``param_groups``. ``ShardedASGD`` asks its ``ParamRegistry`` first in every call that uses the parameters. If something
differs, all ranks agree on it and the shards are built anew from ``param_groups`` as they are, by the same path as at
construction, and every parameter keeps its state, as in torch. Parameters that are not in ``param_groups`` any more
leave their state, whole and on the host, in ``optimizer.state``, as in torch, and take it up again if they come back.
Frozen parameters that are trained now, or are about to be loaded with state, get shards beside those of the others.

converted  a parameter with another shape, dtype or device than its shards were built for
rebound    a parameter whose memory was replaced by other memory of the same shape, dtype and device (``p.data = q``)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .comm.agreement import NO_FINGERPRINT, Fingerprint
from .comm.reports import CollectiveCall, RankReports
from .gather import Gatherer
from .gradients.base import Gradients
from .gradients.checksums import compare_values
from .gradients.unsharding import unshard_gradients
from .placements import fsdp1
from .state import KEYS, MASTER_KEY, ParamShards
from .state_dict import fragments, full, load
from .state_dict.sharded import pack_groups
from .storage.frozen import is_held
from .storage.memory_order import memory_strides
from .update.operators import Updater
from .validation import Held, named_params, params_of

Groups = Sequence[dict[str, Any]]


class ParamRegistry:
    """Builds the shards of an optimizer from ``param_groups``, and notices when these have become others.

    ``state`` is ``optimizer.state``. ``check`` raises unless all groups can be optimized, and returns their
    fingerprint.
    """

    def __init__(
        self,
        state: dict[Any, Any],
        shards: ParamShards,
        gradients: Gradients,
        gatherer: Gatherer,
        updater: Updater,
        check: Callable[[Groups, Held], Fingerprint],
    ) -> None:
        self._state = state
        self._shards = shards
        self._gradients = gradients
        self._gatherer = gatherer
        self._communicators = gradients.communicators
        self._updater = updater
        self._checked_fingerprint = check
        # Whether the ranks have compared the values from which all parameters start.
        self.values_compared = False

    def _check_complete(self) -> None:
        """Raise RuntimeError on this rank alone if a call was interrupted while it built the shards.

        Nothing is sent: messages have the size of complete shards.
        """
        if self._shards.built_by is not None:
            raise RuntimeError(
                f"dist_asgd: {self._shards.built_by} was interrupted while it built the shards, and the optimizer is "
                f"incomplete. Construct a new one and load a checkpoint (load_checkpoint()), or restart the job from "
                f"one."
            )

    @contextmanager
    def _building(self, call: str) -> Iterator[None]:
        """Inside, ``call`` builds shards; they are incomplete if it does not come to its end."""
        outer = self._shards.built_by
        self._shards.built_by = outer or call
        yield
        self._shards.built_by = outer

    def add_groups(self, groups: Groups, first: int) -> None:
        """Build the shards of the groups from ``first`` on. Collective where replica groups make communicators."""
        new = [(named_params(groups, index), groups[index]["lr"]) for index in range(first, len(groups))]
        with self._building("add_param_group()"):
            self._shards.add_groups(new)
            self._gradients.agreement.resize(len(self._shards.members))
            self._on_new_buffers()

    def _on_new_buffers(self) -> None:
        self._gradients.extend(self._shards.buckets, self._shards.presharded)
        self._updater.reserve(self._shards.state_buffers)
        self.values_compared = self._communicators.world_size == 1

    def compare_values(self, reports: RankReports) -> None:
        """Raise on every rank if parameters that are new, or were rebound on a rank, differ between ranks. Collective.

        ``reports`` is what the agreement of this step returned. Called before anything is updated.
        """
        if not self.values_compared:
            compare_values(self._gradients, self._shards.frozen, self._communicators)
            self.values_compared = True
        elif reports.rebound:
            own = sorted(self._shards.rebound)
            rebound = {index for indices in self._communicators.host.exchange_objects(own) for index in indices}
            compare_values(self._gradients, (), self._communicators, rebound)
        if reports.rebound:
            self._shards.rebound.clear()
            self._gradients.agreement.rebound = False

    # --- taking the groups as they are ----------------------------------------------------------------------

    def adopt(self, groups: Groups) -> None:
        """Take ``groups`` and their parameters as they are now.

        Called if ``ParamShards.hold`` says that they are not current. Collective; if any rank raises, all do and
        nothing changes.
        """
        self._check_complete()
        if self._communicators.predates_group:
            # Every rank finds that by itself, so nothing is sent.
            raise RuntimeError(
                f"dist_asgd: the optimizer was constructed before init_process_group(), for one process, and now there "
                f"is a default group of {dist.get_world_size()} ranks: they would drift apart. Call "
                f"init_process_group() first and construct the optimizer afterwards, or pass process_group (a group of "
                f"this rank alone if each rank is to train by itself)."
            )
        if not self._shards.is_of(groups):
            self._rebuild(groups)
        trained = [member.index for member in self._shards.frozen if member.is_trained]
        if trained:
            self._unfreeze(groups, trained)

    def take_in(self, groups: Groups, indices: Iterable[int]) -> bool:
        """Give the frozen ones of these parameters state, as they are about to be loaded; whether there are any.

        Collective if there are frozen parameters; ranks may pass other indices, as with FSDP1 not all have state.
        """
        if not self._shards.frozen:
            return False
        frozen = {member.index for member in self._shards.frozen}
        own = sorted(frozen.intersection(indices))
        every = {index for found in self._communicators.host.exchange_objects(own) for index in found}
        if every:
            self._unfreeze(groups, sorted(every))
        return bool(every)

    def _unfreeze(self, groups: Groups, indices: Sequence[int]) -> None:
        """Give frozen parameters state buffers; nothing of the others moves. Collective; if any rank raises, all do."""
        members = [self._shards.members[index] for index in indices]
        names = [member.name for member in members]
        what = f"parameters that were frozen and are trained now ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
        fingerprint = Fingerprint(
            what, [("parameter", name) for name in names], "Unfreeze the same parameters on every rank, in one step."
        )
        # Only ranks that all take the same parameters in may go on to the checks, which can communicate.
        self._gradients.agree(CollectiveCall.UNFREEZE, fingerprint)
        taken = {id(member.param) for member in members}
        fingerprint, problem = NO_FINGERPRINT, None
        try:
            fingerprint = self._checked_fingerprint(groups, lambda p: id(p) in taken or is_held(p, self._state))
        except Exception as error:
            problem = error
        self._gradients.agree(CollectiveCall.UNFREEZE, fingerprint, problem)
        with self._building("a call after frozen parameters became trained ones"):
            self._shards.take_in(indices)
            self._on_new_buffers()

    def _rebuild(self, groups: Groups) -> None:
        """Build the shards anew from ``groups``; parameters keep their state, and in stage 2 their gradients.

        If a parameter has stepped, every rank holds all state on the host for a moment. Collective.
        """
        call = CollectiveCall.ADOPT
        # Only ranks that all have something to adopt may go on to the checks, which can communicate.
        reports = self._gradients.agree(call, Fingerprint(self._change(groups), (), ""))
        known = {id(member.param): member for member in self._shards.members}

        def held(param: Tensor) -> bool:
            # Frozen parameters that never stepped lose their place in a state buffer.
            member = known.get(id(param))
            fresh = member is not None and self._shards.cohort_of[member.index].fresh
            return param.requires_grad or (is_held(param, self._state) and not fresh)

        fingerprint, problem = NO_FINGERPRINT, None
        try:
            self._check(groups)
            _rename(groups, {id(member.param): member.name for member in self._shards.members})
            fingerprint = self._checked_fingerprint(groups, held)
            # State that is there already for parameters that are new.
            self._parse(groups, {p: e for p in params_of(groups) if id(p) not in known and (e := self._state.get(p))})
        except Exception as error:
            problem = error
        self._gradients.agree(call, fingerprint, problem)
        # From here on only a lost peer or an interruption stops the ranks.
        with self._building("a call after an edit of param_groups"):
            unshard_gradients(self._gradients, self._communicators, reports.union(0))
            self._leave_state()
            kept = {param: dict(self._state[param]) for param in params_of(groups) if self._state.get(param)}
            loaded = self._parse(groups, kept)
            self._gradients.clear(set_to_none=True)
            for buffer in self._shards.state_buffers:
                # Whoever has kept an entry still reads its average there.
                buffer.belong_to(None)
            self._shards.clear()
            self._gatherer.forget_layouts()
            self.add_groups(groups, 0)
            if loaded.entries:
                self._load(loaded, groups)
            for param, entry in kept.items():
                # Entries of the user's own stay.
                self._state[param].update({key: v for key, v in entry.items() if key not in (*KEYS, MASTER_KEY)})

    def _change(self, groups: Groups) -> str:
        """The first difference between ``groups`` and the parameters that the shards were built for, for errors."""
        names = {id(member.param): member.name for member in self._shards.members}
        now = {id(param) for param in params_of(groups)}
        gone = next((name for key, name in names.items() if key not in now), None)
        new = next((name for i in range(len(groups)) for name, p in _positions(groups, i) if id(p) not in names), None)
        if gone is not None and new is not None:
            return f"parameter {gone} was replaced in param_groups ({new} is new)"
        if gone is not None:
            return f"parameter {gone} was removed from param_groups"
        if new is not None:
            return f"{new} was added to param_groups without add_param_group()"
        converted = self._shards.converted() if self._shards.cohorts.is_fresh else None
        if converted is not None:
            param = converted.param
            return (
                f"parameter {converted.name} was moved or re-cast from {converted.dtype} on {converted.bucket.device} "
                f"to {param.dtype} on {param.device}"
            )
        for index, (group, known) in enumerate(zip(groups, self._shards.params, strict=False)):
            for param, before in zip(group["params"], known, strict=False):
                if param is not before:
                    return f"param_groups[{index}] has parameter {names[id(param)]} in the place of {names[id(before)]}"
        return f"there are {len(groups)} groups, and were {len(self._shards.params)}"

    def _check(self, groups: Groups) -> None:
        """Raise on this rank if the state of ``groups`` cannot be adopted."""
        self._shards.check_whole()
        params = params_of(groups)
        seen: dict[int, str] = {}
        for index in range(len(groups)):
            if not isinstance(groups[index]["params"], (list, tuple)):
                raise TypeError(
                    f"dist_asgd: param_groups[{index}]['params'] is a {type(groups[index]['params']).__name__}, wanted "
                    f"a list of parameters."
                )
            for name, param in _positions(groups, index):
                if not isinstance(param, Tensor) or not param.is_leaf:
                    raise TypeError(f"dist_asgd: {name} is no parameter, but {type(param).__name__}.")
                if id(param) in seen:
                    raise ValueError(
                        f"dist_asgd: {name} is {seen[id(param)]}, too. A parameter belongs to one group: remove it "
                        f"from the other."
                    )
                seen[id(param)] = name
        known = {id(member.param): member for member in self._shards.members}
        for param in params:
            member = known.get(id(param))
            if member is None:
                continue
            if member.other_owner() is not None or not (
                self._shards.cohorts.is_fresh or member.is_unmoved or member.is_rebound
            ):
                member.check_unmoved()
            if not self._shards.cohort_of[member.index].fresh and not set(KEYS) <= set(self._state.get(param, ())):
                raise RuntimeError(
                    f"dist_asgd: the state of parameter {member.name} was removed from optimizer.state. Change it in "
                    f"place, or through load_state_dict()."
                )
        if not self._shards.cohorts.is_fresh:
            fsdp1.refuse("an edit of param_groups", [m.param for m in self._shards.members], "Build a new optimizer")

    def _leave_state(self) -> None:
        """Put the whole state of every parameter that has stepped into ``optimizer.state``, on the host. Collective."""
        whole = full.collect_state(self._shards, self._communicators, None)
        for member in self._shards.members:
            entry = self._state.get(member.param)
            if entry:
                own = {key: value for key, value in entry.items() if key not in KEYS}
                self._state[member.param] = {**own, **whole.get(member.index, {})}
                if not self._state[member.param]:
                    del self._state[member.param]

    def _parse(self, groups: Groups, state: dict[Any, dict[str, Any]]) -> load.ParsedStateDict:
        """``state``, whole tensors by parameter, as a state dict of ``groups``. ValueError if it does not fit."""
        params = params_of(groups)
        entries = {
            index: {key: v for key, v in state[param].items() if key in (*KEYS, MASTER_KEY)}
            for index, param in enumerate(params)
            if param in state
        }
        names = [name for index in range(len(groups)) for name, _ in _positions(groups, index)]
        targets = [
            load.ParamTarget(name, p.dtype, tuple(p.shape), _strides(p), 0, p.numel(), True, p)
            for name, p in zip(names, params, strict=True)
        ]
        packed = {"state": {i: entry for i, entry in entries.items() if entry}, "param_groups": pack_groups(groups)}
        return load.parse(packed, groups, targets, {})

    def _load(self, loaded: load.ParsedStateDict, groups: Groups) -> None:
        """Give the new shards this rank's fragments of ``loaded``."""
        for member in self._shards.members:
            entry = loaded.entries.get(member.index)
            if entry is not None and entry.master is not None and member.bucket.master is None:
                loaded.entries[member.index] = replace(entry, master=None)
        fragments.load_shards(loaded, self._shards.state_buffers)
        self._shards.replace_cohorts(load.make_cohorts(loaded, self._shards.members, groups))


def _strides(param: Tensor) -> tuple[int, ...]:
    # Frozen parameters may be sparse: they never have state.
    return memory_strides(param) if param.layout == torch.strided else ()


def _positions(groups: Groups, index: int) -> list[tuple[str, Any]]:
    """The parameters of a group, each with its place in ``param_groups``."""
    return [(f"param_groups[{index}]['params'][{i}]", param) for i, param in enumerate(groups[index]["params"])]


def _rename(groups: Groups, names: dict[int, str]) -> None:
    """Make ``param_names`` follow the parameters in groups that have names; ``names`` are those known, by id."""
    for index, group in enumerate(groups):
        if "param_names" not in group:
            continue
        params, given = group["params"], list(group["param_names"])
        places = [name for name, _ in _positions(groups, index)]
        fallback = given if len(given) == len(params) else places
        group["param_names"] = [names.get(id(p), other) for p, other in zip(params, fallback, strict=True)]
