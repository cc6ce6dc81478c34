"""``ShardedASGD``: parameter groups, state, and a ``step()`` that reads as the algorithm: reduce, update, gather."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import clip, differentiable, memory
from .agreement import Agreement, Kind, digest_of
from .averaging import Averages
from .buffers import Bucket, Member, build_buckets, flattened, reduce_order
from .checkpoint import consolidated, loading
from .checkpoint.shard import MARK_KEY, AverageShard, ShardMark
from .comm import Communicators
from .gather import Gatherer
from .gradients import Arrived, Gradients, compare_values
from .reduce import Reducer
from .update.plan import Batch, Updater, plan_bucket
from .update.schedule import Cohort, Rule
from .validation import (
    check_hyperparameters,
    check_mode,
    check_params,
    describe_group,
    hyperparameters,
)


class ShardedASGD(torch.optim.Optimizer):
    """``torch.optim.ASGD`` with its state, and in stage 2 its gradients, sharded over the ranks of a process group.

    For one element x with gradient g, at step t = 1, 2, ... with eta = lr and mu = 1 at first
    (torch/optim/asgd.py; Polyak & Juditsky, Acceleration of stochastic approximation by averaging, 1992)::

        g  <- -g if maximize;  g <- g + weight_decay * x
        x  <- x * (1 - lambd * eta);  x <- x - eta * g
        ax <- x if mu = 1 else ax + (x - ax) * mu
        eta <- lr / (1 + lambd * lr * t)^alpha;  mu <- 1 / max(1, t - t0)

    An lr change acts one step late (eta is stored), and averaging starts one step after t0 (mu is stored), both
    as in torch. Given the same reduced gradients, parameters and state are bit for bit torch's.

    Collective: construction, ``add_param_group``, ``step``, ``clip_grad_norm_``, ``consolidated_state_dict``,
    ``load_state_dict`` and entering and leaving ``averaged_parameters``; in stage 2 also backward. All ranks of
    the group make these calls in the same order; where they do not, every rank raises.

    Args:
        params, lr, lambd, alpha, t0, weight_decay, foreach, maximize, differentiable, capturable: as in
            ``torch.optim.ASGD``. ``foreach=None`` is the for-loop form on CPUs and the foreach form elsewhere.
            ``differentiable`` needs a single process; ``capturable=True`` is refused, since the scalars live on
            the host (a step makes no device synchronisation).
        stage: 1, gradients arrive already averaged on every rank (DDP); 2, this optimizer reduce-scatters them
            during backward and keeps only its shard: do not wrap the model in DDP.
        process_group: the ranks to shard over; None is the default group, or one process where there is none.
        bucket_cap_mb: largest flat bucket, in MiB; a larger parameter has a bucket of its own.

    Raises:
        ValueError: an argument or a combination is not supported, or ranks disagree; on every rank.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        stage: int = 1,
        process_group: dist.ProcessGroup | None = None,
        bucket_cap_mb: float = 25.0,
    ) -> None:
        self._communicators = Communicators(process_group)
        self._agreement = Agreement(self._communicators.host)
        self._updater = Updater()
        self._gatherer = Gatherer(self._communicators)
        self._averages = Averages(self._updater, self._gatherer)
        self._averaging = False
        self._differentiable = differentiable is True
        self._stage = stage
        self._bucket_cap_mb = bucket_cap_mb
        self._gradients: Gradients = (Reducer if stage == 2 else Arrived)(self._agreement, self._communicators)
        self._buckets: list[Bucket] = []
        self._members: list[Member] = []
        self._cohorts: dict[int, list[Cohort]] = {}
        self._cohort_of: dict[int, Cohort] = {}
        self._plan: tuple[frozenset[int], list[tuple[Bucket, list[Batch]]]] | None = None
        self._digest: tuple[object, int] = ((), 0)
        self._values_checked = self._communicators.world_size == 1
        defaults = {
            "lr": lr,
            "lambd": lambd,
            "alpha": alpha,
            "t0": t0,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        self._constructed = False
        problem: Exception | None = None
        try:
            self._check_options()
            super().__init__(params, defaults)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            problem = error
        groups = [] if problem else self.param_groups
        self._agree_on_groups(Kind.CONSTRUCT, 0, groups, problem)
        self._constructed = True
        self._house(0)

    # --- construction --------------------------------------------------------------------------------------

    def _check_options(self) -> None:
        if self._stage not in (1, 2) or isinstance(self._stage, bool):
            raise ValueError(
                f"dist_asgd: stage must be 1 (gradients arrive averaged, as from DDP) or 2 (this optimizer "
                f"reduce-scatters them), got {self._stage!r}."
            )
        cap = self._bucket_cap_mb
        if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not 0 < cap < float("inf"):
            raise ValueError(f"dist_asgd: bucket_cap_mb must be a positive number of MiB, got {cap!r}.")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with hyperparameters of its own. Collective; nothing changes where any rank raises.

        In stage 2 gradients of the other groups stay as they are.
        """
        if not self._constructed:
            # The base constructor adds the first groups one by one; ranks compare them all at once, later.
            self._add_checked(param_group)
            return
        self._refuse_while_averaging("add_param_group()")
        first = len(self.param_groups)
        problem: Exception | None = None
        try:
            self._add_checked(param_group)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            problem = error
        try:
            self._agree_on_groups(Kind.ADD_PARAM_GROUP, first, self.param_groups[first:], problem)
        except Exception:
            del self.param_groups[first:]
            raise
        self._house(first)

    def _add_checked(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        group = self.param_groups[index]
        where = f"param_groups[{index}]"
        try:
            check_hyperparameters(group, where)
            check_mode(group, where, self._communicators.world_size, self._differentiable, self._stage)
            if not self._differentiable:
                known = [pair for i in range(index) for pair in self._named(i)]
                check_params(self._named(index), known)
                for _, param in self._named(index):
                    self._communicators.on(param.device)
        except Exception:
            del self.param_groups[index]
            raise

    def _named(self, group_index: int) -> list[tuple[str, Tensor]]:
        """A group's parameters with the user's names, or with their place where they have none."""
        group = self.param_groups[group_index]
        names = group.get("param_names")
        if names is None:
            names = [f"param_groups[{group_index}]['params'][{i}]" for i in range(len(group["params"]))]
        return list(zip(names, group["params"], strict=True))

    def _agree_on_groups(
        self, kind: Kind, first: int, groups: list[dict[str, Any]], problem: Exception | None
    ) -> None:
        described: list[tuple[str, object]] = [("stage", self._stage), ("bucket_cap_mb", self._bucket_cap_mb)]
        for i, group in enumerate(groups):
            described += describe_group(first + i, group, self._named(first + i))
        digest = digest_of(described)
        answer = self._gradients.settle(kind, digest, problem)
        if len(set(answer.column(3))) > 1:
            self._agreement.compare(
                "parameters or hyperparameters",
                described,
                "Build the same model and optimizer, in the same order, on every rank.",
            )

    def _house(self, first_group: int) -> None:
        """Give the groups from ``first_group`` on their buckets and their state."""
        self._plan = None
        total_bytes = sum(p.nbytes for group in self.param_groups for p in group["params"])
        for index in range(first_group, len(self.param_groups)):
            named = self._named(index)
            first_index = sum(len(group["params"]) for group in self.param_groups[:index])
            lr = self.param_groups[index]["lr"]
            if self._differentiable:
                for _, param in named:
                    self.state[param] = differentiable.init_state(param, lr)
                continue
            buckets = build_buckets(
                named,
                group_index=index,
                first_index=first_index,
                rank=self._communicators.rank,
                world_size=self._communicators.world_size,
                bucket_cap_mb=self._bucket_cap_mb,
                total_bytes=total_bytes,
            )
            self._buckets += buckets
            self._members += [member for bucket in buckets for member in bucket.members]
            self._cohorts[index] = []
            if named:
                self._set_cohort(index, Cohort.new(lr, range(first_index, first_index + len(named))))
        self._members.sort(key=lambda member: member.index)
        sizes = [len(group["params"]) for group in self.param_groups]
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._buckets = reduce_order(self._buckets, sizes, firsts)
        self._gradients.extend(self._buckets)
        self._agreement.resize(len(self._members))
        self._updater.reserve(self._buckets)
        self._values_checked = self._communicators.world_size == 1
        self._publish_state()

    def _set_cohort(self, group_index: int, cohort: Cohort) -> None:
        self._cohorts[group_index].append(cohort)
        for index in cohort.indices:
            self._cohort_of[index] = cohort

    def _publish_state(self) -> None:
        """Let ``state[p]`` show the shared scalars and this rank's slice of ``ax``."""
        for member in self._members:
            cohort = self._cohort_of[member.index]
            self.state[member.param] = {
                "step": cohort.step,
                "eta": cohort.eta,
                "mu": cohort.mu,
                "ax": member.average,
            }

    # --- the step ------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Reduce gradients, update this rank's shards, gather the parameters. Collective.

        A parameter without a gradient (in stage 2: on no rank) is skipped: no decay, no step. ``closure``
        re-evaluates the model and returns the loss; every rank calls it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._differentiable:
            differentiable.step(self.param_groups, self.state)
            return loss
        self._refuse_while_averaging("step()")
        with torch.no_grad():
            active = self._reduce()
            rules = self._begin_update(active)
            for bucket, batches in self._planned(active):
                for batch in batches:
                    self._updater.run(batch, rules[batch.group_index], _flat_gradient)
                self._gatherer.launch(bucket)
            self._end_update(active, rules)
            self._gatherer.wait()
        return loss

    def _reduce(self) -> set[int]:
        """Which parameters step, once their gradients are reduced and every rank agrees that all is well."""
        problem: Exception | None = None
        try:
            self._check_unchanged()
        except (ValueError, RuntimeError) as error:
            problem = error
        digest = self._hyperparameter_digest() if problem is None else 0
        answer = self._gradients.settle(Kind.STEP, digest, problem)
        if len(set(answer.column(3))) > 1:
            described = [
                (f"param_groups[{i}][{key!r}]", value)
                for i, group in enumerate(self.param_groups)
                for key, value in hyperparameters(group)
            ]
            self._agreement.compare("hyperparameters", described, "Use the same lr schedule on every rank.")
        if not self._values_checked:
            compare_values(self._gradients, self._communicators)
            self._values_checked = True
        return self._gradients.active(answer)

    def _check_unchanged(self) -> None:
        """Raise where a parameter, its state or a hyperparameter is not what the shards were built for."""
        state = self.state
        for member in self._members:
            if not member.at_home:
                param = member.param
                raise RuntimeError(
                    f"dist_asgd: parameter {member.name} was moved, re-cast or re-bound after the optimizer was "
                    f"constructed (it was {member.dtype} on {member.bucket.device}, it is {param.dtype} on "
                    f"{param.device}). Change parameters in place (p.copy_()), or convert the model first and then "
                    f"construct the optimizer."
                )
            own, cohort = state[member.param], self._cohort_of[member.index]
            if own.get("step") is not cohort.step or own.get("eta") is not cohort.eta or own.get("mu") is not cohort.mu:
                raise RuntimeError(
                    f"dist_asgd: the state of parameter {member.name} was replaced. Change it in place, or through "
                    f"load_state_dict()."
                )
        for index, group in enumerate(self.param_groups):
            check_hyperparameters(group, f"param_groups[{index}]")

    def _hyperparameter_digest(self) -> int:
        values = tuple(hyperparameters(group) for group in self.param_groups)
        if values != self._digest[0]:
            self._digest = (values, digest_of(values))
        return self._digest[1]

    def _begin_update(self, active: set[int]) -> list[Rule]:
        """The rules of this step; cohorts of which only a part steps are split."""
        rules = []
        for index, group in enumerate(self.param_groups):
            first = next(iter(group["params"]), None)
            on_cpu = first is None or first.device.type == "cpu"
            rules.append(Rule.of(group, not on_cpu if group["foreach"] is None else group["foreach"]))
            for cohort in list(self._cohorts[index]):
                stepping = cohort.indices & active
                if stepping and stepping != cohort.indices:
                    self._set_cohort(index, cohort.split(stepping))
                    self._plan = None
                    for i in stepping:
                        moved = self._cohort_of[i]
                        self.state[self._members[i].param].update(step=moved.step, eta=moved.eta, mu=moved.mu)
            for cohort in self._cohorts[index]:
                if cohort.indices & active:
                    cohort.prepare(rules[index].lr)
        return rules

    def _end_update(self, active: set[int], rules: list[Rule]) -> None:
        for index, rule in enumerate(rules):
            for cohort in self._cohorts[index]:
                if cohort.indices & active:
                    cohort.advance(rule)

    def _planned(self, active: set[int]) -> list[tuple[Bucket, list[Batch]]]:
        """The buckets that hold a stepping parameter, with what this rank updates of them; kept while nothing changes."""
        if self._plan is None or self._plan[0] != active:
            plan = [
                (bucket, plan_bucket(bucket, self._cohort_of, active, self._gradients.reduced))
                for bucket in self._buckets
                if any(member.index in active for member in bucket.members)
            ]
            self._plan = (frozenset(active), plan)
        return self._plan[1]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those that stage 2 has reduced included.

        In stage 2 ``model.zero_grad()`` does not see the gradients: call this one. Communicates only where a
        backward left parameters without a gradient.
        """
        if isinstance(self._gradients, Reducer):
            if set_to_none:
                self._gradients.discard()
            else:
                self._gradients.zero()
        super().zero_grad(set_to_none)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients locally: backwards inside do not communicate (stage 2).

        The next backward outside, or ``step()``, reduces the sum. Costs the memory of unsharded gradients meanwhile.
        """
        if not isinstance(self._gradients, Reducer):
            raise RuntimeError(
                "dist_asgd: no_sync() is for stage=2. With stage=1 gradients are averaged by DDP: use the no_sync() "
                "of the DistributedDataParallel module."
            )
        with self._gradients.no_sync():
            yield

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """Scale all gradients so that their global norm is at most ``max_norm``; returns the norm before, 0-dim.

        Collective. In stage 2 this is the one to call: ``torch.nn.utils.clip_grad_norm_`` sees no gradients there.
        In stage 1 and with one process's own gradients it is torch's function, bit for bit.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        if self._differentiable or not isinstance(self._gradients, Reducer):
            return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite)
        self._refuse_while_averaging("clip_grad_norm_()")
        digest = digest_of((float(max_norm), float(norm_type), error_if_nonfinite))
        with torch.no_grad():
            answer = self._gradients.settle(Kind.CLIP_GRAD_NORM, digest)
            if len(set(answer.column(3))) > 1:
                described = [("max_norm", float(max_norm)), ("norm_type", float(norm_type))]
                self._agreement.compare("arguments of clip_grad_norm_()", described, "Pass the same on every rank.")
            active = self._gradients.present(answer)
            return clip.clip(
                self._buckets, active, max_norm, norm_type, error_if_nonfinite, self._communicators
            )

    # --- the average ---------------------------------------------------------------------------------------

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Inside, the parameters are the averaged weights ``ax``, on every rank; afterwards they are back, bit for bit.

        Collective on entry and on exit, also when leaving by an exception. Makes no second copy of the model.
        Parameters whose averaging has not begun (step <= t0) stay as they are. Buffers of modules (BatchNorm's
        statistics) are not averaged. ``step()``, ``state_dict()`` and whatever else reads the state are refused inside.
        """
        if self._differentiable:
            raise RuntimeError(
                "dist_asgd: averaged_parameters() with differentiable=True would cut autograd's graph. Read "
                "optimizer.state[p]['ax'], which has the parameter's shape in this mode."
            )
        self._refuse_while_averaging("averaged_parameters()")
        self._confer(Kind.AVERAGED_PARAMETERS)
        self._averaging = True
        try:
            with torch.no_grad():
                self._averages.swap_in(self._buckets, self._cohort_of)
            yield
        finally:
            self._confer(Kind.END_OF_AVERAGED_PARAMETERS)
            with torch.no_grad():
                self._averages.swap_back()
            self._averaging = False

    def _confer(self, kind: Kind) -> None:
        problem: Exception | None = None
        try:
            self._check_unchanged()
        except (ValueError, RuntimeError) as error:
            problem = error
        self._gradients.settle(kind, problem=problem)

    def _refuse_while_averaging(self, call: str) -> None:
        if self._averaging:
            raise RuntimeError(
                f"dist_asgd: {call} inside averaged_parameters(): the parameters are the averages there, and the "
                f"state holds the parameters. Call it after the with block."
            )

    def start_averaging(self) -> None:
        """Set ``t0`` of every group to its current step, so that averaging begins now.

        No communication; call it at the same step on every rank. As mu is stored, the next step still copies
        the parameters and ``ax`` is the mean of the iterates from the step after it on.
        """
        self._refuse_while_averaging("start_averaging()")
        for group in self.param_groups:
            steps = [self.state[param]["step"].item() for param in group["params"]]
            group["t0"] = max(steps, default=0.0)

    # --- state ---------------------------------------------------------------------------------------------

    def _mark(self) -> ShardMark:
        layout = [
            (member.name if "[" not in member.name else "", tuple(member.param.shape), str(member.dtype))
            + (self._buckets.index(member.bucket), member.slot.offset, member.bucket.layout.shard_numel)
            for member in self._members
        ]
        return ShardMark(self._communicators.rank, self._communicators.world_size, digest_of(layout))

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the state; no communication.

        ``state[i]["ax"]`` is this rank's slice, 1-D in memory order. Every group is marked with the rank, the world
        size and a digest of the layout, which ``load_state_dict`` checks. The slices share the optimizer's memory.
        They cannot be written by ``torch.distributed.checkpoint`` or loaded by ``torch.optim.ASGD``, which would
        take them for whole tensors: that is what ``consolidated_state_dict`` is for.
        """
        self._refuse_while_averaging("state_dict()")
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        groups = consolidated.pack_groups(self.param_groups)
        state: dict[int, dict[str, Tensor]] = {}
        if self._differentiable:
            params = [param for group in self.param_groups for param in group["params"]]
            state = {i: dict(self.state[param]) for i, param in enumerate(params)}
        else:
            mark = self._mark()
            for group in groups:
                group[MARK_KEY] = mark
            for member in self._members:
                cohort = self._cohort_of[member.index]
                state[member.index] = {
                    "step": cohort.step.clone(),
                    "eta": cohort.eta.clone(),
                    "mu": cohort.mu.clone(),
                    "ax": AverageShard.of(member.average),
                }
        return self._after_state_dict({"state": state, "param_groups": groups})

    def _after_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        return state_dict

    def consolidated_state_dict(self, to: int | None = 0) -> dict[str, Any]:
        """The whole state in ``torch.optim.ASGD``'s own layout, on the CPU. Collective.

        On rank ``to`` of the process group (None: on all ranks); the other ranks get ``{}``. Collected a bucket
        at a time: rank ``to`` holds the result and one bucket, the others what they already had. State-dict hooks
        run where the result is.
        """
        self._refuse_while_averaging("consolidated_state_dict()")
        if self._differentiable:
            return self.state_dict()
        world_size = self._communicators.world_size
        problem: Exception | None = None
        if to is not None and (isinstance(to, bool) or not isinstance(to, int) or not 0 <= to < world_size):
            problem = ValueError(
                f"dist_asgd: consolidated_state_dict(to={to!r}): wanted a rank of the process group, 0 to "
                f"{world_size - 1}, or None for all ranks."
            )
        answer = self._gradients.settle(Kind.CONSOLIDATED_STATE_DICT, digest_of(to), problem)
        if len(set(answer.column(3))) > 1:
            self._agreement.compare("targets of consolidated_state_dict()", [("to", to)], "Pass the same rank.")
        with torch.no_grad():
            here = to is None or to == self._communicators.rank
            if here:
                for pre_hook in self._optimizer_state_dict_pre_hooks.values():
                    pre_hook(self)
            state = consolidated.collect_state(self._buckets, self._cohort_of, self._communicators, to)
        if not here:
            return {}
        return self._after_state_dict(
            {"state": state, "param_groups": consolidated.pack_groups(self.param_groups)}
        )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this rank's own shard, a consolidated dict, or a plain ``torch.optim.ASGD`` one. Collective.

        Whole dicts load at any world size and on any layout; every rank passes the same. Nothing is cast to a
        narrower dtype, and ``state_dict`` is not changed. Nothing changes where any rank raises. Hyperparameters
        come from the dict, as in torch; ``capturable`` and ``differentiable`` stay this optimizer's.
        """
        self._refuse_while_averaging("load_state_dict()")
        state_dict = state_dict.copy() if isinstance(state_dict, dict) else state_dict
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        if self._differentiable:
            self._load_differentiable(state_dict)
        else:
            self._load_shards(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load_shards(self, state_dict: dict[str, Any]) -> None:
        loaded: loading.Loaded | None = None
        problem: Exception | None = None
        scalars: list[tuple[str, object]] = []
        try:
            self._check_unchanged()
            loaded = loading.parse(state_dict, self.param_groups, self._members, self._mark(), self.defaults)
            for index, group in enumerate(loaded.groups):
                check_hyperparameters(group, f"param_groups[{index}] of the loaded state dict")
                scalars += [(f"param_groups[{index}][{key!r}]", value) for key, value in hyperparameters(group)]
            scalars += [
                (f"step, eta, mu, dtype of parameter {self._members[i].name}", (*entry.key, str(entry.average.dtype)))
                for i, entry in sorted(loaded.entries.items())
            ]
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            problem = error
        answer = self._gradients.settle(Kind.LOAD_STATE_DICT, digest_of(scalars), problem)
        if loaded is None or len(set(answer.column(3))) > 1:
            self._agreement.compare("loaded state dicts", scalars, "Load the same checkpoint on every rank.")
            return
        for group, values in zip(self.param_groups, loaded.groups, strict=True):
            params = group["params"]
            group.clear()
            group.update(values, params=params)
        loading.load_averages(loaded, self._buckets)
        self._cohorts = {index: [] for index in range(len(self.param_groups))}
        for cohort in loading.make_cohorts(loaded, self._members, self.param_groups):
            self._set_cohort(self._members[min(cohort.indices)].bucket.group_index, cohort)
        self._plan = None
        self._publish_state()

    def _load_differentiable(self, state_dict: dict[str, Any]) -> None:
        pairs = [pair for index in range(len(self.param_groups)) for pair in self._named(index)]
        saved = state_dict["state"]
        if any(len(a["params"]) != len(b["params"]) for a, b in zip(state_dict["param_groups"], self.param_groups, strict=True)):
            raise ValueError("dist_asgd: the state dict has parameter groups of other sizes than the optimizer.")
        states = {
            param: differentiable.load_state(saved[i], param, name)
            if i in saved
            else differentiable.init_state(param, self.defaults["lr"])
            for i, (name, param) in enumerate(pairs)
        }
        for group, values in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in values.items() if k not in ("params", "differentiable", "capturable")})
        self.state.update(states)

    # --- what else users ask -------------------------------------------------------------------------------

    def memory_report(self) -> memory.MemoryReport:
        """What the optimizer holds on this rank, in bytes, beside what ``torch.optim.ASGD`` would; no communication."""
        in_flight = self._updater.scratch_bytes + self._communicators.scratch_bytes()
        if isinstance(self._gradients, Reducer):
            in_flight += self._gradients.in_flight_bytes
        return memory.report(self._buckets, in_flight)

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "dist_asgd: ShardedASGD cannot be pickled or deep-copied: it holds a process group and views of the model's "
            "storage. Save consolidated_state_dict() and load it into a new optimizer."
        )


def _flat_gradient(member: Member) -> Tensor:
    return flattened(cast(Tensor, member.param.grad), member.strides)
