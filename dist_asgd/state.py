"""The sharded state of one optimizer on this rank: where parameters are kept, and who shares which scalars."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .buffers import Bucket, Member, Precision, Store, build_buckets, reduce_order
from .comm import Communicators
from .dtensor import is_dtensor
from .layout import bucket_cap_bytes
from .residents import Residents, settle_residents
from .update import cpu
from .update.plan import Batch, KernelBatch, has_kernel, plan_bucket, plan_kernel
from .update.schedule import Cohort, Form, Rule

Named = Sequence[tuple[str, Tensor]]
Plan = list[tuple[Store, list[Batch | KernelBatch]]]


class ShardedState:
    """Houses plain parameters in buckets, leaves DTensors where they are, and keeps ``optimizer.state`` up to date.

    ``buckets`` are in reduce order, ``residents`` keep the state of DTensors, ``members`` are all parameters in
    registration order, so that ``members[i].index == i``.
    ``shown`` is the optimizer's ``state``: a view for users, and checked for replaced entries at each step.
    """

    def __init__(
        self,
        communicators: Communicators,
        shown: dict[Any, Any],
        bucket_cap_mb: float,
        min_buckets: int,
        precision: Precision,
    ) -> None:
        self._communicators = communicators
        self._shown = shown
        self._bucket_cap_mb = bucket_cap_mb
        self._min_buckets = min_buckets
        self._precision = precision
        self._group_sizes: list[int] = []
        self.buckets: list[Bucket] = []
        self.residents: list[Residents] = []
        self.members: list[Member] = []
        self.cohorts: list[list[Cohort]] = []
        self.cohort_of: dict[int, Cohort] = {}
        self._plan: tuple[object, Plan] | None = None

    def house(self, groups: Sequence[tuple[Named, float | Tensor]]) -> None:
        """Move new groups, (named parameters, lr) each, into buckets, and give them fresh state."""
        total_bytes = sum(p.nbytes for named, _ in groups for _, p in named if not is_dtensor(p))
        total_bytes += sum(member.param.nbytes for bucket in self.buckets for member in bucket.members)
        for named, lr in groups:
            first_index = sum(self._group_sizes)
            placed = [(first_index + i, name, param) for i, (name, param) in enumerate(named)]
            residents = settle_residents(
                [(i, name, param) for i, name, param in placed if is_dtensor(param)],
                len(self._group_sizes),
                self._precision,
            )
            buckets = build_buckets(
                [entry for entry in placed if not is_dtensor(entry[2])],
                group_index=len(self._group_sizes),
                rank=self._communicators.rank,
                world_size=self._communicators.world_size,
                cap_bytes=bucket_cap_bytes(self._bucket_cap_mb, total_bytes, self._min_buckets),
                precision=self._precision,
            )
            self.buckets += buckets
            self.residents += residents
            self.members += [member for store in (*buckets, *residents) for member in store.members]
            self._group_sizes.append(len(named))
            self.cohorts.append([])
            if named:
                self._add_cohort(Cohort.new(lr, range(first_index, first_index + len(named))), len(self.cohorts) - 1)
        self.members.sort(key=lambda member: member.index)
        first_indices = [sum(self._group_sizes[:i]) for i in range(len(self._group_sizes))]
        self.buckets = reduce_order(self.buckets, self._group_sizes, first_indices)
        self._publish()

    @property
    def stores(self) -> list[Store]:
        """All that parameters have their state in: buckets in reduce order, then the residents'."""
        return [*self.buckets, *self.residents]

    def replace_cohorts(self, cohorts: Sequence[Cohort]) -> None:
        """Take the scalars of a loaded state dict, and show averages that may have moved to wider storage."""
        self.cohorts = [[] for _ in self.cohorts]
        for cohort in cohorts:
            self._add_cohort(cohort, self.members[min(cohort.indices)].bucket.group_index)
        self._publish()

    def _add_cohort(self, cohort: Cohort, group_index: int) -> None:
        self.cohorts[group_index].append(cohort)
        for index in cohort.indices:
            self.cohort_of[index] = cohort

    def _publish(self) -> None:
        self._plan = None
        for member in self.members:
            self._shown[member.param] = {**self._scalars(member), "ax": member.shown(member.average)}

    def _scalars(self, member: Member) -> dict[str, Tensor]:
        cohort = self.cohort_of[member.index]
        return {"step": cohort.step, "eta": cohort.eta, "mu": cohort.mu}

    def check_unchanged(self) -> None:
        """RuntimeError where a parameter or its state is not what the shards were built for."""
        shown = self._shown
        followed = [store.follow() for store in self.residents]
        if any(followed):
            self._plan = None
        for member in self.members:
            if not member.at_home:
                param = member.param
                raise RuntimeError(
                    f"dist_asgd: parameter {member.name} was moved, re-cast or re-bound after the optimizer was "
                    f"constructed (it was {member.dtype} on {member.bucket.device}, it is {param.dtype} on "
                    f"{param.device}). Change parameters in place (p.copy_()), or convert the model first and then "
                    f"construct the optimizer."
                )
            own, cohort = shown.get(member.param, {}), self.cohort_of[member.index]
            if own.get("step") is not cohort.step or own.get("eta") is not cohort.eta or own.get("mu") is not cohort.mu:
                raise RuntimeError(
                    f"dist_asgd: the state of parameter {member.name} was replaced. Change it in place, or through "
                    f"load_state_dict()."
                )

    def begin_update(self, active: set[int], rules: Sequence[Rule]) -> None:
        """Split cohorts of which only a part steps; a first step takes its eta from the lr of now."""
        for group_index, rule in enumerate(rules):
            for cohort in list(self.cohorts[group_index]):
                stepping = cohort.indices & active
                if stepping and stepping != cohort.indices:
                    self._add_cohort(cohort.split(stepping), group_index)
                    self._plan = None
                    for index in stepping:
                        member = self.members[index]
                        self._shown[member.param].update(self._scalars(member))
            for cohort in self.cohorts[group_index]:
                if cohort.indices & active:
                    cohort.prepare(rule.lr)

    def end_update(self, active: set[int], rules: Sequence[Rule]) -> None:
        """Advance the scalars of everything that stepped."""
        for cohorts, rule in zip(self.cohorts, rules, strict=True):
            for cohort in cohorts:
                if cohort.indices & active:
                    cohort.advance(rule)

    def planned(self, active: set[int], rules: Sequence[Rule]) -> Plan:
        """Stores that hold a stepping parameter, and what this rank updates of them; kept while nothing changes."""
        key = (active, [(rule.form, rule.maximize, rule.weight_decay) for rule in rules])
        if self._plan is None or self._plan[0] != key:
            plan = [
                (bucket, self._batches(bucket, active, rules[bucket.group_index]))
                for bucket in self.stores
                if any(member.index in active for member in bucket.members)
            ]
            self._plan = ((set(active), key[1]), plan)
        return self._plan[1]

    def _batches(self, bucket: Store, active: set[int], rule: Rule) -> list[Batch | KernelBatch]:
        unavailable = cpu.why_unavailable() if rule.form is Form.FUSED else None
        if unavailable is not None:
            cpu.log_fallback(unavailable)
        if rule.form is not Form.FUSED or not has_kernel(bucket):
            return list(plan_bucket(bucket, self.cohort_of, active))
        rows = {id(cohort): row for row, cohort in enumerate(self._all_cohorts())}
        streamed = sum(b.average.nbytes for b in self.stores) > cpu.STREAMED_BYTES
        return [plan_kernel(bucket, self.cohort_of, active, rule, rows, streamed)]

    def _all_cohorts(self) -> list[Cohort]:
        return [cohort for cohorts in self.cohorts for cohort in cohorts]

    def rows(self, rules: Sequence[Rule]) -> array[float]:
        """The scalars of every cohort for this step, in the order of the plan's rows."""
        rows = array("d")
        for cohorts, rule in zip(self.cohorts, rules, strict=True):
            for cohort in cohorts:
                rows.extend(cohort.factors(rule))
        return rows
