"""The sharded state of one optimizer on this rank: where parameters are kept, and who shares which scalars."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .comm import Communicators
from .placements.presharded import PreshardedState, build_presharded, is_presharded
from .storage.buffers import Bucket, Precision, ShardedParam, StateBuffer, build_buckets, reduce_order
from .storage.layout import bucket_cap_bytes
from .storage.snapshots import PublishedState, TensorSnapshot
from .update.batch import Batch
from .update.plan import plan_batches
from .update.schedule import Cohort, Cohorts, StepHyperparameters

KEYS = ("step", "eta", "mu", "ax")

NamedParams = Sequence[tuple[str, Tensor]]
Plan = list[tuple[StateBuffer, Sequence[Batch]]]


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
        self.cohorts = Cohorts()
        self.cohort_of = self.cohorts.by_index
        self._last_plan: tuple[object, Plan] | None = None
        # What parameters in buckets are there: those that came together.
        self._snapshots: list[TensorSnapshot] = []
        # What ``shown`` has of each member's average, in registration order; and all of it, once looked up.
        self._averages: list[Tensor] = []
        self._published: PublishedState | None = None
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
            self.cohorts.add_group(lr, len(named))
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
        self.cohorts.replace(cohorts)
        self._publish()

    def _publish(self) -> None:
        self._last_plan = self._published = None
        self._on_cuda = any(store.device.type == "cuda" for store in self.state_buffers)
        self._averages = [member.state_entry(member.average) for member in self.members]
        for member in self.members:
            self._shown[member.param] = self._entries(member)

    def _entries(self, member: ShardedParam) -> dict[str, Tensor]:
        cohort = self.cohort_of[member.index]
        return {"step": cohort.step, "eta": cohort.eta, "mu": cohort.mu, "ax": self._averages[member.index]}

    def check_unchanged(self) -> None:
        """RuntimeError where a parameter or its state is not what the shards were built for.

        A parameter that was only cut short may be found by the gradients that it gets then.
        """
        if not all(homes.is_current() for homes in self._snapshots):
            for member in self.members:
                member.check_unmoved()
        for store in self.presharded:
            if store.follow():
                self._last_plan = None
            for presharded_param in store.members:
                presharded_param.check_unmoved()
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
        """``Cohorts.begin_step``; ``state`` follows where scalars became other tensors."""
        for indices in self.cohorts.begin_step(active, hypers):
            self._show(indices)

    def _show(self, indices: Iterable[int]) -> None:
        """Let ``state`` have the scalars of these parameters, which are other tensors now."""
        self._last_plan = self._published = None
        for index in indices:
            member = self.members[index]
            self._shown[member.param].update(self._entries(member))

    def plan(self, active: frozenset[int], hypers: Sequence[StepHyperparameters]) -> Plan:
        """Stores that hold a stepping parameter, and what this rank updates of them; kept while nothing changes."""
        key = (active, [(hyper.implementation, hyper.device, hyper.maximize, hyper.weight_decay) for hyper in hypers])
        if self._last_plan is None or self._last_plan[0] != key:
            average_bytes = sum(bucket.average.nbytes for bucket in self.state_buffers)
            plan = [
                (bucket, plan_batches(bucket, self.cohorts, active, hypers[bucket.group_index], average_bytes))
                for bucket in self.state_buffers
                if any(member.index in active for member in bucket.members)
            ]
            self._last_plan = (key, plan)
        return self._last_plan[1]
