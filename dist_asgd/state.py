"""The parameters and sharded state of one optimizer on this rank: where they lie, and what a step updates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from .comm import Communicators
from .interruption import LOAD_CHECKPOINT, torn_problem
from .placements.copies import put_back
from .placements.presharded import FSDP1Param, PreshardedState, is_presharded
from .placements.presharded_buffers import build_presharded
from .placements.shown_averages import ShownAverages
from .storage import room
from .storage.average import StateEntry
from .storage.bucketing import build_buckets, reduce_order
from .storage.buffers import Bucket, ShardedParam, StateBuffer
from .storage.frozen import FrozenBuffer, FrozenParam, any_trained, is_held
from .storage.layout import bucket_cap_bytes
from .storage.precision import Precision
from .storage.snapshots import PublishedState, TensorSnapshot, are_same
from .update.batch import Batch
from .update.plan import Plan, Plans
from .update.schedule import Cohort, Cohorts, StepHyperparameters
from .update.stand import HasGradient, Hypers, about_to_write
from .validation import check_apart, named_params

_LOG = logging.getLogger(__name__)
KEYS = ("step", "eta", "mu", "ax")
MASTER_KEY = "master"


NamedParams = Sequence[tuple[str, Tensor]]
NamedParam = tuple[int, str, Tensor]


def own_entries(entry: Mapping[Any, Any]) -> dict[Any, Any]:
    """What users keep in the ``entry`` of a parameter in ``optimizer.state`` beside what the optimizer keeps there."""
    # Only these are read: whoever reads the average is shown it, and may keep it.
    return {key: entry[key] for key in entry if key not in (*KEYS, MASTER_KEY)}


class ParamShards:
    """Moves plain parameters into buckets, leaves presharded and frozen ones where they are, and plans each step.

    buckets     in reduce order: about the order in which backward fills them, the same on all ranks
    presharded  the state of DTensors and FSDP1 parameters, one state buffer for each group, dtype and device
    members     all parameters in registration order, so that ``members[i].index == i``
    held        those of them that are in state buffers, in this order
    frozen      the others: they have no state, and no entry in ``state``
    leads       the first held parameter of each group, or None: its device decides how the group is updated
    cohorts     the scalars step, eta and mu of all parameters
    params      the parameters of each group, in their order

    With ``moves_params`` False no parameter is moved: plain ones belong to another optimizer, and are averaged only.
    ``state`` is the optimizer's own dict, by parameter. Its entries are published here for users to read; each step
    checks that nobody has replaced one.
    """

    def __init__(
        self,
        communicators: Communicators,
        state: dict[Any, Any],
        bucket_cap_mb: float,
        min_buckets: int,
        precision: Precision,
        shard_replicated: bool,
        moves_params: bool = True,
    ) -> None:
        self._communicators = communicators
        self._state = state
        self._bucket_cap_mb = bucket_cap_mb
        self._min_buckets = min_buckets
        self._precision = precision
        self._shard_replicated = shard_replicated
        self._moves_params = moves_params
        # Indices of parameters that were rebound on this rank; cleared once ranks have compared their values.
        self.rebound: set[int] = set()
        self._logged = False
        # The call that writes parameters and state now, or that was interrupted while it did.
        self.torn_by: str | None = None
        # Whether ranks have agreed on the load that ``load_checkpoint()`` has asked for.
        self.load_has_begun = False
        # The call that builds shards, or was interrupted while it did; None if they are complete.
        self.built_by: str | None = None
        self.clear()

    # --- construction ---------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget all groups: before the first ones are added, and before all are added anew. No communication.

        ``state`` stays as it is.
        """
        self._group_sizes: list[int] = []
        self.params: list[list[Tensor]] = []
        self.buckets: list[Bucket] = []
        self.presharded: list[PreshardedState] = []
        self.members: list[ShardedParam] = []
        self.held: list[ShardedParam] = []
        self.frozen: list[FrozenParam] = []
        self.leads: list[Tensor | None] = []
        self._frozen_params: list[Tensor] = []
        # One for each group, kept here because members refer to them weakly.
        self._frozen_buffers: list[FrozenBuffer] = []
        self.cohorts = Cohorts()
        self.cohort_of = self.cohorts.by_index
        self._plans = Plans(self.cohorts)
        # The parameters that the last step wrote, by index and as a list.
        self._last_written: tuple[frozenset[int], list[Tensor]] = (frozenset(), [])
        # Where bucket parameters lay when they were moved there, one snapshot for each call of add_groups.
        self._snapshots: list[TensorSnapshot] = []
        # ax of each held parameter as ``state`` has it, and all published entries.
        self._shown = ShownAverages()
        self._published: PublishedState | None = None
        self.on_cuda = False

    def add_groups(self, groups: Sequence[tuple[NamedParams, float | Tensor]]) -> None:
        """Move new groups, (named parameters, lr) each, into buckets, and give them fresh state.

        Collective where replica groups make their communicators.
        """
        indexed: list[list[NamedParam]] = []
        for named, lr in groups:
            first_index = sum(self._group_sizes)
            indexed.append([(first_index + i, name, param) for i, (name, param) in enumerate(named)])
            self._group_sizes.append(len(named))
            self.params.append([param for _, param in named])
            self.cohorts.add_group(lr, len(named))
            self._frozen_buffers.append(FrozenBuffer(len(self._frozen_buffers)))
        num_known = len(self._group_sizes) - len(groups)
        held = [[entry for entry in group if is_held(entry[2], self._state)] for group in indexed]
        for buffer, group, held_of_group in zip(self._frozen_buffers[num_known:], indexed, held, strict=True):
            taken = {index for index, _, _ in held_of_group}
            buffer.members += [FrozenParam(p, name, index, buffer) for index, name, p in group if index not in taken]
        self._hold_in_groups(held, num_known)

    def take_in(self, indices: Iterable[int]) -> None:
        """Give frozen parameters buckets or state buffers, and fresh state; what others have stays as it is.

        Collective where replica groups make their communicators.
        """
        taken = {index for index in indices if isinstance(self.members[index], FrozenParam)}
        held: list[list[NamedParam]] = []
        for buffer in self._frozen_buffers:
            held.append([(m.index, m.name, m.param) for m in buffer.members if m.index in taken])
            buffer.members = [member for member in buffer.members if member.index not in taken]
        # Entries of the user's own stay, as in torch.
        own = {param: dict(self._state.get(param, ())) for group in held for _, _, param in group}
        self._hold_in_groups(held, 0)
        for param, entries in own.items():
            self._state[param].update(entries)

    def _hold_in_groups(self, held: Sequence[Sequence[NamedParam]], first_group: int) -> None:
        """Move parameters into state buffers of their groups, from ``first_group`` on, and publish their state."""
        total_bytes = sum(p.nbytes for group in held for _, _, p in group if not is_presharded(p))
        total_bytes += sum(member.param.nbytes for bucket in self.buckets for member in bucket.members)
        cap_bytes = bucket_cap_bytes(
            self._bucket_cap_mb, total_bytes, self._min_buckets, self._communicators.num_shards
        )
        num_buckets, known = len(self.buckets), {member.index for member in self.held}
        for group_index, indexed in enumerate(held, first_group):
            self._hold(indexed, group_index, cap_bytes)
        moved = [member.param for bucket in self.buckets[num_buckets:] for member in bucket.members]
        self._snapshots.append(TensorSnapshot.of(moved))
        self.frozen = [member for buffer in self._frozen_buffers for member in buffer.members]
        self._frozen_params = [member.param for member in self.frozen]
        self.held = [member for buffer in self.state_buffers for member in buffer.members]
        self.held.sort(key=lambda member: member.index)
        self.members = sorted([*self.held, *self.frozen], key=lambda member: member.index)
        leads = {member.bucket.group_index: member.param for member in reversed(self.held)}
        self.leads = [leads.get(index) for index in range(len(self._group_sizes))]
        first_indices = [sum(self._group_sizes[:i]) for i in range(len(self._group_sizes))]
        self.buckets = reduce_order(self.buckets, self._group_sizes, first_indices)
        self._publish([buffer for buffer in self.state_buffers if buffer.members[0].index not in known])

    def _hold(self, indexed: Sequence[NamedParam], group_index: int, cap_bytes: int) -> None:
        stays = [not self._moves_params or is_presharded(param) for _, _, param in indexed]
        self.presharded += build_presharded(
            list(compress(indexed, stays)),
            group_index,
            self._precision,
            self._bucket_cap_mb,
            self._communicators if self._shard_replicated else None,
        )
        self.buckets += build_buckets(
            [entry for entry, stay in zip(indexed, stays, strict=True) if not stay],
            group_index=group_index,
            rank=self._communicators.shard_rank,
            world_size=self._communicators.num_shards,
            replica=self._communicators.replica,
            cap_bytes=cap_bytes,
            precision=self._precision,
            max_stripe_bytes=lambda device: self._communicators.on(device).max_send_bytes,
        )

    @property
    def state_buffers(self) -> list[StateBuffer]:
        """All state buffers: buckets in reduce order, then presharded state."""
        return [*self.buckets, *self.presharded]

    @property
    def whole_buffers(self) -> list[StateBuffer]:
        """The state buffers of parameters that every rank has whole."""
        return [buffer for buffer in self.state_buffers if any(member.is_whole for member in buffer.members)]

    def devices_of(self, group_index: int) -> set[torch.device]:
        """The devices of a group's parameters."""
        return {buffer.device for buffer in self.state_buffers if buffer.group_index == group_index}

    # --- what users see in optimizer.state ------------------------------------------------------------------

    def replace_cohorts(self, cohorts: Sequence[Cohort]) -> None:
        """Take the scalars of a loaded state dict, and publish averages, which may have moved to wider buffers."""
        self.cohorts.replace(cohorts)
        self._publish(self.state_buffers)

    def rename(self, groups: Sequence[dict[str, Any]]) -> None:
        """Take the names of ``groups``, which a load may have replaced, for errors and for later changes of groups."""
        names = [name for index in range(len(groups)) for name, _ in named_params(groups, index)]
        for member, name in zip(self.members, names, strict=True):
            member.name = name

    def _publish(self, buffers: Sequence[StateBuffer]) -> None:
        """Publish the state in ``buffers``, whose averages are new or have moved; the tensors of others stay."""
        self._forget_plans()
        self.on_cuda = any(buffer.device.type == "cuda" for buffer in self.state_buffers)
        for buffer in buffers:
            buffer.belong_to(self)
            self._shown.show(buffer)
        # In registration order, which is that of the entries in ``state``.
        for member in sorted((m for buffer in buffers for m in buffer.members), key=lambda member: member.index):
            own = own_entries(self._state.get(member.param, {}))
            self._state[member.param] = StateEntry({**self._entries(member), **own}, member.bucket, member)

    def on_average_moved(self, buffer: StateBuffer) -> None:
        """See ``StateOwner``."""
        self._forget_plans()
        for member, before in zip(buffer.members, self._shown.show(buffer), strict=True):
            # What somebody has put there instead is noticed by the next step.
            if isinstance(entry := self._state.get(member.param), dict) and dict.get(entry, "ax") is before:
                entry["ax"] = self._shown.by_index[member.index]

    def published_average(self, index: int) -> Tensor:
        """See ``StateOwner``."""
        return self._shown.by_index[index]

    def on_scalars_shown(self, index: int) -> None:
        """See ``StateOwner``."""
        self.cohort_of[index].note_shown()

    def _forget_plans(self) -> None:
        """Forget plans and published entries, because scalars or averages have become others."""
        self._published = None
        self._plans.forget()

    def _publish_scalars(self, indices: Iterable[int]) -> None:
        """Publish the scalars of these parameters, which have become other tensors."""
        self._forget_plans()
        for index in indices:
            member = self.members[index]
            self._state[member.param].update(self._entries(member))

    def _entries(self, member: ShardedParam) -> dict[str, Tensor]:
        cohort = self.cohort_of[member.index]
        return {"step": cohort.step, "eta": cohort.eta, "mu": cohort.mu, "ax": self._shown.by_index[member.index]}

    def check_unchanged(self, state: object) -> None:
        """Raise RuntimeError if a parameter or its state on this rank is not what the shards were built for.

        ``state`` is what the optimizer has as its state now. Called before anything reads an address. Not collective:
        the caller hands the error to the agreement, which raises on every rank.
        """
        if state is not self._state:
            raise RuntimeError(
                "dist_asgd: optimizer.state was replaced by another dict, which would be ignored: the state lies in "
                "flat memory. To start anew construct a new optimizer; to go on from other state load_state_dict()."
            )
        if not all(snapshot.is_current() for snapshot in self._snapshots):
            self._follow_rebound()
        self.follow_presharded()
        if self.torn_by is not None:
            # Entries may be replaced by half; whatever reads them is refused, and a load publishes them anew.
            return
        if self._published is None:
            self._published = PublishedState(KEYS, {member.param: self._entries(member) for member in self.held})
        if not self._published.matches(self._state):
            # Trainers move and copy state. Steps go on with the own tensors: a copy is of no effect afterwards.
            for member in self.held:
                entry, entries = self._state.get(member.param, {}), partial(self._entries, member)
                put_back(entry, entries, member.bucket.show_average, member.name)
        self.follow_state()

    def follow_presharded(self) -> None:
        """Follow local tensors of DTensors that were put elsewhere; RuntimeError if one has become another kind."""
        for buffer in self.presharded:
            # FSDP2 may put local tensors elsewhere between steps: the plan has their old addresses.
            if buffer.follow():
                self._plans.forget()

    def follow_state(self) -> None:
        """Follow published state that was moved to other memory. Called before state is read; not collective.

        RuntimeError if it has another shape, dtype or device now.
        """
        if self.torn_by is None:
            self.cohorts.follow(lambda index: self.members[index].name)
            self._shown.follow()

    def _follow_rebound(self) -> None:
        """Copy the values of parameters that were rebound to their slots; RuntimeError if one cannot be followed."""
        # The first in registration order is named, as elsewhere.
        for member in self.held:
            if not member.is_rebound:
                member.check_unmoved()
        moved = [member for bucket in self.buckets for member in bucket.members if not member.is_unmoved]
        # As at construction: memory that two parameters share would be two parameters from here on.
        check_apart(*([(member.name, member.param) for member in members] for members in (self.held, self.frozen)))
        # Values that lie in a bucket (two parameters may have changed places) must not be overwritten while others are
        # brought home.
        flats = [(bucket.flat.data_ptr(), bucket.flat.data_ptr() + bucket.flat.nbytes) for bucket in self.buckets]
        for member in moved:
            if any(start <= member.param.data_ptr() < stop for start, stop in flats):
                member.param.data = member.param.detach().clone()
        for member in moved:
            member.bring_home()
        # Before the first step nothing is lost: trainers move a model after its optimizer was built, and construction
        # moves parameters, too.
        if moved and not self._logged and not self.cohorts.is_fresh:
            self._logged = True
            _LOG.warning(
                "parameter %s was re-bound (p.data = ...): its values were copied back to the optimizer's memory, and "
                "it shares no memory with what it was bound to. p.copy_() does the same faster. This is said once.",
                moved[0].name,
            )
        self.rebound.update(member.index for member in moved)

    def hold(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether complete shards were built for the parameters of ``groups``; before the first step, as these are now.

        They are incomplete if a frozen parameter is trained now. Called first in every call that uses the parameters;
        False asks for ``ParamRegistry.adopt``.
        """
        if self.built_by is not None or (self._frozen_params and any_trained(self._frozen_params)):
            return False
        return self.is_of(groups)

    def is_of(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether shards were built for the parameters of ``groups``; before the first step, as these are now."""
        if len(groups) != len(self.params):
            return False
        for group, known in zip(groups, self.params, strict=True):
            if not are_same(group["params"], known):
                return False
        return not self.cohorts.is_fresh or (self.converted() is None and not self._communicators.predates_group)

    def converted(self) -> ShardedParam | None:
        """The first parameter that has another shape, dtype or device than its shards were built for, if any has.

        Those of FSDP1 do not count: inside ``summon_full_params()`` they are whole for a moment only.
        """
        suspects: Iterable[ShardedParam] = [member for buffer in self.presharded for member in buffer.members]
        if not all(snapshot.is_current() for snapshot in self._snapshots):
            suspects = self.held
        lasting = (member for member in suspects if not isinstance(member, FSDP1Param))
        return next((member for member in lasting if not (member.is_unmoved or member.is_rebound)), None)

    def check_whole(self) -> None:
        """Raise RuntimeError if a call was interrupted while it wrote parameters and state."""
        if self.torn_by is not None:
            raise torn_problem(self.torn_by)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Inside, a load writes; it has torn parameters and state if it does not come to its end."""
        # Inside load_checkpoint(), which goes on to write parameters, that is not the end yet.
        torn_by = LOAD_CHECKPOINT if self.torn_by == LOAD_CHECKPOINT else None
        self.torn_by = torn_by or "load_state_dict()"
        yield
        self.torn_by = torn_by

    # --- what a step updates --------------------------------------------------------------------------------

    def begin_update(self, active: frozenset[int], hypers: Sequence[StepHyperparameters]) -> None:
        """Let cohorts get ready for a step of the ``active`` parameters, which are about to be written.

        Publishes scalars that became other tensors.
        """
        self.prepare_step(active, hypers)
        self.decide_writes(active, hypers)
        if self._last_written[0] is not active:
            self._last_written = (active, [self.members[index].param for index in active])
        # Before the flat memory under them is written, of which autograd sees nothing.
        torch.autograd.graph.increment_version(self._last_written[1])

    def prepare_step(self, active: frozenset[int], hypers: Sequence[StepHyperparameters]) -> None:
        """Let cohorts get ready for a step of the ``active`` parameters, which this does not say are written."""
        for indices in self.cohorts.begin_step(active, hypers):
            self._publish_scalars(indices)

    def make_room(self, hypers: Callable[[], Hypers], has_gradient: HasGradient | None = None) -> None:
        """Find memory for the averages that a step may write, see ``about_to_write``; RuntimeError if there is none.

        Called before ranks agree on the step, and before anything is changed. Most steps need none.
        """
        buffers: Sequence[StateBuffer] = [buffer for buffer in self.state_buffers if not buffer.average_is_reserved]
        if buffers and (buffers := about_to_write(buffers, self.cohorts, hypers(), has_gradient)):
            room.make_room(buffers, self._communicators.ranks_on_host)

    def decide_writes(self, active: frozenset[int], hypers: Sequence[StepHyperparameters]) -> None:
        """Decide which averages the step of the ``active`` parameters writes, before their scalars advance."""
        self._plans.decide_writes(self.state_buffers, active, hypers)

    def are_in_place(self) -> bool:
        """Whether all bucket parameters lie where they were moved, and ranks know all that were rebound."""
        return not self.rebound and all(snapshot.is_current() for snapshot in self._snapshots)

    def plan(self, active: frozenset[int], hypers: Sequence[StepHyperparameters]) -> Plan:
        """The state buffers that have an active parameter, and the batches by which this rank updates each."""
        return self._plans.of_step(self.state_buffers, active, hypers)

    def plan_of(self, bucket: Bucket, active: frozenset[int], hypers: Sequence[StepHyperparameters]) -> Sequence[Batch]:
        """The batches that update the ``active`` parameters of one bucket from where its gradient shard lies now."""
        return self._plans.of_buffer(bucket, self.state_buffers, active, hypers)
