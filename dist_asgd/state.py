"""The sharded state of one optimizer on this rank: where parameters are kept, and who shares which scalars."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .comm import Communicators
from .placements.presharded import PreshardedState, build_presharded, is_presharded
from .storage.buffers import Bucket, Precision, ShardedParam, StateBuffer, build_buckets, reduce_order
from .storage.layout import bucket_cap_bytes
from .storage.snapshots import PublishedState, TensorSnapshot
from .update import cpu
from .update.plan import Batch, DeviceBatch, KernelBatch, has_kernel, plan_bucket, plan_kernel
from .update.scalars import ScalarTable
from .update.schedule import Cohort, Implementation, StepHyperparameters

KEYS = ("step", "eta", "mu", "ax")

NamedParams = Sequence[tuple[str, Tensor]]
Batches = list[Batch | KernelBatch | DeviceBatch]
Plan = list[tuple[StateBuffer, Batches]]


class ParamShards:
    """Houses plain parameters in buckets, leaves DTensors where they are, and keeps ``optimizer.state`` up to date.

    ``buckets`` are in reduce order, ``presharded`` keep the state of what is sharded already, ``members`` are all
    parameters in registration order, so that ``members[i].index == i``.
    ``shown`` is the optimizer's ``state``: a view for users, and checked for replaced entries at each step.
    """

    def __init__(
        self,
        communicators: Communicators,
        shown: dict[Any, Any],
        bucket_cap_mb: float,
        min_buckets: int,
        precision: Precision,
        shard_replicated: bool,
    ) -> None:
        self._communicators = communicators
        self._shown = shown
        self._bucket_cap_mb = bucket_cap_mb
        self._min_buckets = min_buckets
        self._precision = precision
        self._shard_replicated = shard_replicated
        self._group_sizes: list[int] = []
        self.buckets: list[Bucket] = []
        self.presharded: list[PreshardedState] = []
        self.members: list[ShardedParam] = []
        self.cohorts: list[list[Cohort]] = []
        self.cohort_of: dict[int, Cohort] = {}
        self._plan: tuple[object, Plan] | None = None
        # What parameters in buckets are there: those that came together.
        self._snapshots: list[TensorSnapshot] = []
        # What ``shown`` has of each member's average, in registration order; and all of it, once looked up.
        self._averages: list[Tensor] = []
        self._published: PublishedState | None = None
        # What the last step updated, if cohorts are still the same since.
        self._settled: frozenset[int] | None = None
        self._tables: dict[int, ScalarTable] = {}
        self._on_cuda = False

    def add_groups(self, groups: Sequence[tuple[NamedParams, float | Tensor]]) -> None:
        """Move new groups, (named parameters, lr) each, into buckets, and give them fresh state."""
        total_bytes = sum(p.nbytes for named, _ in groups for _, p in named if not is_presharded(p))
        total_bytes += sum(member.param.nbytes for bucket in self.buckets for member in bucket.members)
        known = len(self.buckets)
        for named, lr in groups:
            first_index = sum(self._group_sizes)
            placed = [(first_index + i, name, param) for i, (name, param) in enumerate(named)]
            presharded = build_presharded(
                [(i, name, param) for i, name, param in placed if is_presharded(param)],
                len(self._group_sizes),
                self._precision,
                self._bucket_cap_mb,
                self._communicators if self._shard_replicated else None,
            )
            buckets = build_buckets(
                [entry for entry in placed if not is_presharded(entry[2])],
                group_index=len(self._group_sizes),
                rank=self._communicators.shard_rank,
                world_size=self._communicators.num_shards,
                replica=self._communicators.replica,
                cap_bytes=bucket_cap_bytes(self._bucket_cap_mb, total_bytes, self._min_buckets),
                precision=self._precision,
            )
            self.buckets += buckets
            self.presharded += presharded
            self.members += [member for store in (*buckets, *presharded) for member in store.members]
            self._group_sizes.append(len(named))
            self.cohorts.append([])
            if named:
                self._add_cohort(Cohort.new(lr, range(first_index, first_index + len(named))), len(self.cohorts) - 1)
        self._snapshots.append(
            TensorSnapshot.of([member.param for bucket in self.buckets[known:] for member in bucket.members])
        )
        self.members.sort(key=lambda member: member.index)
        first_indices = [sum(self._group_sizes[:i]) for i in range(len(self._group_sizes))]
        self.buckets = reduce_order(self.buckets, self._group_sizes, first_indices)
        self._publish()

    @property
    def state_buffers(self) -> list[StateBuffer]:
        """All that parameters have their state in: buckets in reduce order, then the presharded'."""
        return [*self.buckets, *self.presharded]

    def devices_of(self, group_index: int) -> set[torch.device]:
        """Where the parameters of a group are."""
        return {store.device for store in self.state_buffers if store.group_index == group_index}

    def replace_cohorts(self, cohorts: Sequence[Cohort]) -> None:
        """Take the scalars of a loaded state dict, and show averages that may have moved to wider storage."""
        self.cohorts = [[] for _ in self.cohorts]
        self._tables.clear()
        for cohort in cohorts:
            self._add_cohort(cohort, self.members[min(cohort.indices)].bucket.group_index)
        self._publish()

    def _add_cohort(self, cohort: Cohort, group_index: int) -> None:
        self.cohorts[group_index].append(cohort)
        for index in cohort.indices:
            self.cohort_of[index] = cohort
        self._settled = None

    def _publish(self) -> None:
        self._plan = self._published = None
        self._on_cuda = any(store.device.type == "cuda" for store in self.state_buffers)
        self._averages = [member.state_entry(member.average) for member in self.members]
        for member in self.members:
            self._shown[member.param] = self._entries(member)

    def _entries(self, member: ShardedParam) -> dict[str, Tensor]:
        cohort = self.cohort_of[member.index]
        return {"step": cohort.step, "eta": cohort.eta, "mu": cohort.mu, "ax": self._averages[member.index]}

    def check_unchanged(self) -> None:
        """RuntimeError if a parameter or its state on this rank is not what the shards were built for.

        Called at the beginning of each step, and before other calls that use the state. Does not communicate: the
        caller hands the error to the agreement, which raises on every rank. Local tensors of presharded parameters
        that were put elsewhere are followed, and the plan of the update is made anew.
        """
        if not all(homes.is_current() for homes in self._snapshots):
            for member in self.members:
                member.check_unmoved()
        for state_buffer in self.presharded:
            if state_buffer.follow():
                self._plan = None
        if self._published is None:
            self._published = PublishedState(KEYS, {member.param: self._entries(member) for member in self.members})
        if not self._published.matches(self._shown):
            self._raise_replaced()

    def _raise_replaced(self) -> None:
        for member in self.members:
            own, kept = self._shown.get(member.param, {}), self._entries(member)
            if any(own.get(key) is not value for key, value in kept.items()):
                raise RuntimeError(
                    f"dist_asgd: the state of parameter {member.name} was replaced. Change it in place, or through "
                    f"load_state_dict()."
                )

    def check_capture(self, groups: Sequence[dict[str, Any]]) -> None:
        """RuntimeError where a CUDA graph is captured, which would repeat one step's host scalars for ever."""
        if not self._on_cuda or not torch.cuda.is_current_stream_capturing():
            return
        for index, group in enumerate(groups):
            if not group["capturable"]:
                raise RuntimeError(
                    f"dist_asgd: step() in a CUDA graph, but param_groups[{index}] has capturable=False. Pass "
                    f"capturable=True and fused=True to the constructor."
                )

    def begin_update(self, active: frozenset[int], hypers: Sequence[StepHyperparameters]) -> None:
        """Split cohorts of which only a part steps; a first step takes its eta from the lr of now.

        Scalars move to the device or back where the group's implementation has changed.
        """
        for group_index, hyper in enumerate(hypers):
            for cohort in list(self.cohorts[group_index]) if active is not self._settled else ():
                stepping = cohort.indices & active
                if stepping and stepping != cohort.indices:
                    self._add_cohort(cohort.split(stepping), group_index)
                    self._show(stepping)
            for cohort in self.cohorts[group_index]:
                if not cohort.indices.isdisjoint(active):
                    self._place(cohort, group_index, hyper)
                    cohort.prepare(hyper.lr)
        self._settled = active

    def _place(self, cohort: Cohort, group_index: int, hyper: StepHyperparameters) -> None:
        if (hyper.device is not None) == (cohort.row is not None):
            return
        if hyper.device is None:
            cohort.come_home()
        else:
            if group_index not in self._tables:
                self._tables[group_index] = ScalarTable(self._group_sizes[group_index], hyper.device)
            self._tables[group_index].adopt(cohort)
        self._show(cohort.indices)

    def _show(self, indices: Iterable[int]) -> None:
        """Let ``state`` have the scalars of these parameters, which are other tensors now."""
        self._plan = self._published = None
        for index in indices:
            member = self.members[index]
            self._shown[member.param].update(self._entries(member))

    def end_update(self, active: frozenset[int], hypers: Sequence[StepHyperparameters]) -> None:
        """Advance the scalars of everything that stepped."""
        for cohorts, hyper in zip(self.cohorts, hypers, strict=True):
            for cohort in cohorts:
                if cohort.row is None and not cohort.indices.isdisjoint(active):
                    cohort.advance(hyper)

    def planned(self, active: frozenset[int], hypers: Sequence[StepHyperparameters]) -> Plan:
        """Stores that hold a stepping parameter, and what this rank updates of them; kept while nothing changes."""
        key = (active, [(hyper.implementation, hyper.device, hyper.maximize, hyper.weight_decay) for hyper in hypers])
        if self._plan is None or self._plan[0] != key:
            plan = [
                (bucket, self._batches(bucket, active, hypers[bucket.group_index]))
                for bucket in self.state_buffers
                if any(member.index in active for member in bucket.members)
            ]
            self._plan = (key, plan)
        return self._plan[1]

    def _batches(self, bucket: StateBuffer, active: frozenset[int], hyper: StepHyperparameters) -> Batches:
        unavailable = (
            cpu.why_unavailable() if hyper.implementation is Implementation.FUSED and hyper.device is None else None
        )
        if unavailable is not None:
            cpu.log_fallback(unavailable)
        if hyper.device is not None:
            lines = {id(cohort): cohort.row for cohort in self._all_cohorts() if cohort.row is not None}
            return [plan_kernel(bucket, self.cohort_of, active, hyper, lines, False)]
        if hyper.implementation is not Implementation.FUSED or not has_kernel(bucket):
            return list(plan_bucket(bucket, self.cohort_of, active))
        rows = {id(cohort): row for row, cohort in enumerate(self._all_cohorts())}
        streamed = sum(b.average.nbytes for b in self.state_buffers) > cpu.STREAMED_BYTES
        return [plan_kernel(bucket, self.cohort_of, active, hyper, rows, streamed)]

    def _all_cohorts(self) -> list[Cohort]:
        return [cohort for cohorts in self.cohorts for cohort in cohorts]

    def rows(self, hypers: Sequence[StepHyperparameters]) -> array[float]:
        """The scalars of every cohort for this step, in the order of the plan's rows; those on the device left out."""
        rows = array("d")
        for cohorts, hyper in zip(self.cohorts, hypers, strict=True):
            for cohort in cohorts:
                rows.extend(cohort.factors(hyper) if cohort.row is None else (0.0,) * 4)
        return rows

    def advance_on_devices(
        self, active: frozenset[int], hypers: Sequence[StepHyperparameters], found_inf: Tensor | None
    ) -> dict[int, Tensor]:
        """Advance scalars that are on a device; this step's factors by group, see ``ScalarTable``."""
        tables = {group: table for group, table in self._tables.items() if hypers[group].device is not None}
        for group, table in tables.items():
            table.advance(hypers[group], active, found_inf)
        return {group: table.factors for group, table in tables.items()}
