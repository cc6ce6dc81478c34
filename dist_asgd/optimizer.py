"""``ShardedASGD``: the optimizer that users construct, and its ``step()``: reduce, update, gather.

Attributes without an underscore (``shards``, say) are for the rooms above it, ``checkpoint`` and ``amp``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import memory
from .averaging import Averages, average_from_now, refuse_differentiable
from .backward_checks import check_step_in_backward
from .backward_step import BackwardStep, check_whole
from .comm import CollectiveCall, Communicators, describe_mesh
from .comm.agreement import NO_FINGERPRINT, Agreement, public_call
from .fingerprints import Hyperparameters, checked_fingerprint, groups_fingerprint
from .forward import ForwardOverlap
from .gather import Gatherer
from .gradients import clip
from .gradients.in_backward import gradients_of
from .gradients.joined import shadow
from .gradients.loss_scaling import ScalerInfo
from .joining import JoinableOptimizer, method_of_torch, refuse_pickling, share_step
from .placements import fsdp1
from .placements.leaves import naming_non_leaves
from .registry import ParamRegistry
from .state import ParamShards
from .state_dict.state_dicts import StateDicts
from .stats import StepCounts, stats
from .step_context import begin_update
from .storage.buffers import Precision
from .storage.frozen import is_held
from .storage.layout import min_buckets
from .update import differentiable
from .update.batch import run_batches
from .update.operators import Updater
from .validation import check_new_group, check_options, check_precision_fits, params_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ShardedASGD(torch.optim.Optimizer, JoinableOptimizer):
    """``torch.optim.ASGD`` with its state, and in stage 2 its gradients, sharded over the ranks of a process group.

    For one element x with gradient g, at step t = 1, 2, ... with eta = lr and mu = 1 at first
    (torch/optim/asgd.py; Polyak & Juditsky, Acceleration of stochastic approximation by averaging, 1992)::

        g  <- -g if maximize;  g <- g + weight_decay * x
        x  <- x * (1 - lambd * eta);  x <- x - eta * g
        ax <- x if mu = 1 else ax + (x - ax) * mu
        eta <- lr / (1 + lambd * lr * t)^alpha;  mu <- 1 / max(1, t - t0)

    An lr change acts one step late (eta is stored), and averaging starts one step after t0 (mu is stored), both
    as in torch. For the same reduced gradients, parameters and state are bit for bit torch's.

    Collective: construction, ``add_param_group``, ``step``, ``clip_grad_norm_``, ``consolidated_state_dict``,
    ``load_state_dict``, entering and leaving ``averaged_parameters``; in stage 2 also backward. All ranks of the group
    make these calls in the same order; if they do not, every rank raises.

    Args:
        params, lr, lambd, alpha, t0, weight_decay, foreach, maximize, differentiable, capturable: as in
            ``torch.optim.ASGD``. ``foreach=False`` is torch's for-loop form, ``foreach=True`` its foreach form, each to
            the bit. ``None`` means the fused kernel on CPUs and the foreach form elsewhere. ``differentiable`` needs a
            single process, ``capturable`` one process, stage 1 and ``fused=True`` on CUDA.
        fused: True updates in one pass over memory by a compiled kernel, with the bits of the for-loop form. On CPUs
            torch operators give the same bits if the kernel was not compiled or torch runs without AVX2, and the log
            says so. On CUDA devices it is a Triton kernel; scalars live on the device, and an lr may. False never uses
            a kernel.
        stage: 1 if gradients arrive already averaged on every rank (DDP). 2 if this optimizer reduce-scatters them
            during backward and keeps only its shard: do not wrap the model in DDP then.
        process_group: the ranks to shard over. None is the default group, or one process if there is none.
        mesh: a DeviceMesh instead of ``process_group``. With dimensions ("replicate", "shard") parameters are sharded
            along the second (inside a node, say), with equal replicas along the first: in stage 2 gradients are
            reduce-scattered inside and this rank's shard of them is all-reduced across; parameters are gathered inside.
            A mesh of one dimension is its ranks, all of which hold shards.
        bucket_cap_mb: the largest flat bucket, in MiB, at up to 400 ranks; a larger parameter has one of its own.
        average_dtype: the dtype of ``ax``, never narrower than the parameter. None is the parameter's dtype, and
            float32 for 16-bit ones. (For complex parameters it is that of the real and imaginary parts.)
        master_weights: 16-bit parameters are roundings of float32 masters, which are sharded and updated: 2 bytes an
            element for bfloat16, 4 for float16. Averages are those of the masters.
        stochastic_rounding: a seed. bfloat16 parameters are updated in float32 and rounded up or down at random, so
            that the mean is exact, and alike for every sharding. None rounds to nearest after every operation.
        reduce_dtype: in stage 2, the dtype that gradients are sent in. On NCCL it is also that of the sum; Gloo never
            sums below float32. 16-bit parameters keep the sum in float32 if this is not their own dtype.
        shard_replicated: True lets each rank of a replica group (HSDP, replicated parameters of tensor parallelism)
            update a fragment and keep the state of that; parameters are gathered among them. False lets each update
            and keep all of it, as torch does. The bits are the same.
        shared_memory: False: ranks of one host share no memory on CPUs, as with DIST_ASGD_SHARED_MEMORY=0.
        step_in_backward: True: in stage 2, on CPUs, backward updates and gathers each bucket as soon as it is reduced,
            and ``step()`` ends the step. Gradients cannot be clipped, scaled, read, nor added to by another backward.

    Raises:
        ValueError: an argument or a combination is not supported, or ranks disagree; on every rank.
    """

    # True for trainers that save on rank 0 alone: several ranks then need consolidate_state_dict() before state_dict().
    whole_state_dicts_only = False
    __getstate__ = refuse_pickling
    stats = stats

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
        fused: bool | None = None,
        stage: int = 1,
        process_group: dist.ProcessGroup | None = None,
        mesh: DeviceMesh | None = None,
        bucket_cap_mb: float = 25.0,
        average_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: int | None = None,
        reduce_dtype: torch.dtype | None = None,
        shard_replicated: bool = True,
        shared_memory: bool = True,
        step_in_backward: bool = False,
    ) -> None:
        JoinableOptimizer.__init__(self)
        self.communicators = Communicators(process_group, mesh, shared_memory)
        self._agreement = Agreement(self.communicators.host)
        self._updater = Updater()
        self.gatherer = Gatherer(self.communicators)
        self.averages = Averages(self._updater, self.gatherer, self.communicators.rank == 0)
        self.is_differentiable = differentiable is True
        self._stage = stage
        self._precision = Precision(average_dtype, master_weights, stochastic_rounding, reduce_dtype)
        flags = {"shard_replicated": shard_replicated, "shared_memory": shared_memory}
        flags["step_in_backward"] = step_in_backward
        self._options = {"stage": stage, "mesh": describe_mesh(mesh), "bucket_cap_mb": bucket_cap_mb, **flags}
        self._options |= self._precision.options()
        self.gradients = gradients_of(stage, step_in_backward is True, self._agreement, self.communicators)
        self._hyperparameters = Hyperparameters()
        defaults: dict[str, Any] = {"lr": lr, "lambd": lambd, "alpha": alpha, "t0": t0, "weight_decay": weight_decay}
        defaults |= {"foreach": foreach, "maximize": maximize, "differentiable": differentiable}
        defaults |= {"capturable": capturable, **({} if fused is None else {"fused": fused})}
        self._constructed = False
        problem = self.communicators.problem
        try:
            check_options(stage, bucket_cap_mb, flags, self._precision, self.is_differentiable)
            super().__init__(params, defaults)
            check_precision_fits(self._precision, self.param_groups)
        except Exception as error:
            problem = problem or error
        try:
            # Every rank raises here if any has a problem or other arguments; nothing has been moved or made yet.
            self._agree_on_groups(CollectiveCall.CONSTRUCT, 0, problem)
        finally:
            del problem  # its traceback refers to this frame
        self._constructed = True
        self.communicators.share_control()
        at_least = min_buckets(stage, step_in_backward)
        self.shards = ParamShards(
            self.communicators, self.state, bucket_cap_mb, at_least, self._precision, shard_replicated
        )
        check = partial(checked_fingerprint, self._options, self.communicators, self._precision, stage)
        self.registry = ParamRegistry(self.state, self.shards, self.gradients, self.gatherer, self._updater, check)
        self._backward_step = BackwardStep.of(self, self._updater, self._hyperparameters)
        self._add_storage(0)
        self._forward = ForwardOverlap(self.shards, self.communicators, self.gatherer)
        self._state_dicts = StateDicts(self, None if differentiable else self.shards, self.communicators, self.gatherer)
        self.counts = StepCounts(self.communicators)

    # --- construction --------------------------------------------------------------------------------------

    @public_call
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with hyperparameters of its own. Collective; if any rank raises, all do and nothing changes."""
        if not self._constructed:
            # The base constructor adds the first groups one by one; ranks compare them all at once, later.
            self._add_checked(param_group)
            return
        self.averages.refuse_inside("add_param_group()")
        self.adopt_params()
        first, problem = len(self.param_groups), None
        try:
            try:
                self._add_checked(param_group)
            except Exception as error:
                problem = error
            self._agree_on_groups(CollectiveCall.ADD_PARAM_GROUP, first, problem)
        except BaseException:
            del self.param_groups[first:]
            raise
        self._add_storage(first)

    def _add_checked(self, param_group: dict[str, Any]) -> None:
        with naming_non_leaves(param_group, len(self.param_groups)):
            method_of_torch("add_param_group")(self, param_group)
        options = self.communicators, self._precision, self.is_differentiable, self._stage
        check_new_group(self.param_groups, *options, partial(is_held, state=self.state))
        check_step_in_backward(self._options, self.param_groups)

    @public_call
    def _agree_on_groups(self, call: CollectiveCall, first: int, problem: Exception | None) -> None:
        fingerprint = groups_fingerprint(self._options, [] if problem else self.param_groups, first)
        self.gradients.agree(call, fingerprint, problem)

    def _add_storage(self, first_group: int) -> None:
        """Give the groups from ``first_group`` on their buckets and their state."""
        if not self.is_differentiable:
            self.registry.add_groups(self.param_groups, first_group)
            return
        differentiable.init_states(self.param_groups[first_group:], self.state)

    def adopt_params(self) -> None:
        """Take parameters and ``param_groups`` as they are now; see ``registry.py``. Collective if they were changed.

        Called first in every call that uses the parameters, also by ``checkpoint``.
        """
        self.gatherer.wait()
        if self.is_differentiable or self.averages.is_swapped or self.shards.hold(self.param_groups):
            return
        self._state_dicts.forget_averages()
        self.registry.adopt(self.param_groups)

    # --- the step ------------------------------------------------------------------------------------------

    @public_call
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Reduce gradients, update this rank's shards, gather the parameters. Collective.

        A parameter without a gradient (in stage 2: on no rank) is skipped: no decay, no step. ``closure``
        re-evaluates the model and returns the loss; every rank calls it.
        """
        loss = None
        if closure is not None:
            if self._backward_step is not None:
                self._backward_step.refuse_closure()
            with torch.enable_grad():
                loss = closure()
        if self.is_differentiable:
            self.counts.add_whole(differentiable.step(self.param_groups, self.state))
            return loss
        self._step()
        return loss

    def _step(self, has_joined: bool = False) -> None:
        # Reduce: all ranks agree on which parameters have a gradient. In stage 2 the last ones are in flight.
        active, scaler = self._reduce(ScalerInfo.of(self) if hasattr(self, "found_inf") else None, has_joined)
        # Update: one state buffer after the other, as soon as its gradient is reduced.
        self._forward.agree(active)
        if self._backward_step is not None:
            step = self._backward_step.end(active)  # all buckets are updated, most of them during backward
        elif step := begin_update(self.shards, self.gradients, self._updater, self.param_groups, active, scaler):
            self.shards.torn_by = "step()"
            for buffer, batches in self._forward.in_order(self.shards.plan(active, step.hypers)):
                self.gradients.wait_for(buffer)
                run_batches(batches, step)
                # Gather: its parameters travel to the other ranks while the next buffer is updated.
                self.gatherer.launch(buffer)
            self.shards.cohorts.end_step(active, step.hypers)
        self.gradients.end_step()
        self._forward.end_step()
        self.counts.add(active, step)
        self.shards.torn_by = None

    def _reduce(self, scaler: ScalerInfo | None, has_joined: bool) -> tuple[frozenset[int], ScalerInfo | None]:
        """The parameters that step, once every rank agrees that nothing is wrong. Collective; raises on all ranks."""
        self.averages.refuse_inside("step()")
        self.adopt_params()
        self._state_dicts.consolidated = None
        if self.shards.on_cuda:
            self.shards.check_capture(self.param_groups)
        problem = self._problem(ends_step=True) or (None if scaler is None else scaler.problem(self._stage))
        if self._backward_step is not None:
            problem = problem or self._backward_step.problem(by_scaler=scaler is not None)
        hypers = self._hyperparameters
        fingerprint = NO_FINGERPRINT if problem else hypers.fingerprint(self.param_groups, scaler is not None)
        self._agreement.rebound = bool(self.shards.rebound)
        agree = partial(shadow, self.gradients) if has_joined else partial(self.gradients.agree, CollectiveCall.STEP)
        if (reports := agree(fingerprint, problem)) is None:
            return frozenset(), None
        if self._agreement.joined:
            scaler = share_step(self.gradients, reports, self.param_groups, scaler)
        if reports.rebound or not self.registry.values_compared:
            self.registry.compare_values(reports)
        return self.gradients.active(reports), scaler

    def _problem(self, before_load: bool = False, ends_step: bool = False) -> Exception | None:
        """What is wrong on this rank with parameters, state or (before a load replaces them) hyperparameters."""
        try:
            self.shards.check_unchanged(self.state)
            if not before_load:
                check_whole(self.shards, self._backward_step, ends_step)
                self._hyperparameters.check(self.param_groups, self.shards.devices_of)
        except Exception as error:
            return error
        return None

    @public_call
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, those that stage 2 has reduced included.

        In stage 2 it is collective if a backward has run since the last step: all ranks have to skip the same steps.
        """
        self.gradients.clear(set_to_none)
        method_of_torch("zero_grad")(self, set_to_none)

    def keep_gradients(self) -> None:
        """Let the backward after a ``step()`` add to the gradients of that step in stage 2; called on every rank."""
        self.gradients.keep()

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate locally in stage 2, at the cost of memory; the next backward outside, or ``step()``, reduces."""
        return self.gradients.no_sync()

    @public_call
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scale all gradients so that their global norm is at most ``max_norm``; returns the norm before, 0-dim.

        Collective. In stage 2 it reads the gradients' shards once, and the update scales them. In stage 1 without
        DTensors it is torch's function, bit for bit.
        """
        self.adopt_params()
        if self.is_differentiable or not (self.reduces_gradients or self.gradients.presharded):
            return torch.nn.utils.clip_grad_norm_(params_of(self.param_groups), max_norm, norm_type, error_if_nonfinite)
        self.averages.refuse_inside("clip_grad_norm_()")
        return clip.clip_grad_norm(self.gradients, max_norm, norm_type, error_if_nonfinite)

    @public_call
    def overlap_forward(self, module: torch.nn.Module) -> None:
        """Let ``step()`` return while parameters travel; calls of ``module`` and its parts wait for what they need.

        So does whoever else reads a parameter from a module, and the next call of this optimizer. Tensors that were
        taken from the modules before have to be read after ``wait_for_parameters()``. Collective; may be called once
        more, for other modules too. ``step()`` still waits for parameters in none of them, for DTensors of replica
        groups, and among ranks that share memory. ValueError if ``module`` has no parameter of this optimizer.
        """
        self.adopt_params()
        problem = self._forward.problem(module, params_of(self.param_groups))
        self.gradients.agree(CollectiveCall.OVERLAP_FORWARD, NO_FINGERPRINT, problem)
        self._forward.add(module)

    @public_call
    def wait_for_parameters(self) -> None:
        """Wait until all parameters have arrived here, for those who read them past the modules. Not collective."""
        self.gatherer.wait()

    # --- the average ---------------------------------------------------------------------------------------

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Put the averaged weights ``ax`` in place of the parameters inside the block, on every rank.

        Afterwards the parameters are back, bit for bit. Collective on entry and on exit, also when an exception leaves
        the block. There is no second copy of the model: parameters and averages change places. If ``ax`` is wider than
        the parameters (16-bit ones), each rank sets its own shard of them aside. Parameters whose averaging has not
        begun (step <= t0) stay, and so do buffers of modules. Inside, calls that read the state are refused.
        """
        if self.is_differentiable:
            refuse_differentiable()
        self.adopt_params()
        fsdp1.refuse("averaged_parameters()", params_of(self.param_groups), fsdp1.LOAD_AVERAGES)
        with self.averages.in_place(self.shards, self.param_groups, self.gradients.agree, self._problem):
            yield

    def start_averaging(self) -> None:
        """Set ``t0`` of every group to its current step, so that averaging begins now.

        No communication; call it at the same step on every rank. The next step still copies the parameters (mu is
        stored), and ``ax`` is the mean of the iterates from the step after it on.
        """
        self.averages.refuse_inside("start_averaging()")
        average_from_now(self.param_groups, self.state)

    # --- state ---------------------------------------------------------------------------------------------

    @public_call
    def state_dict(self) -> dict[str, Any]:
        """Hand out this rank's fragments of the state, without communication and without a copy of ``ax``.

        On several ranks ``state[i]["ax"]`` is a ``ShardTensor``: it has the parameter's shape, and ``to_local()`` is
        this rank's fragment, which goes on changing as the optimizer steps. ``torch.distributed.checkpoint`` saves and
        loads it at any world size; it refuses to be taken for a whole tensor. Of a DTensor ``ax`` is a DTensor. Beside
        parameters of FSDP1, whose helpers take all else for whole, it is collective and the other state is whole.
        """
        if not self._state_dicts.for_fsdp1():
            self.shards.check_whole()
        gathered = self._state_dicts.take_consolidated(self.whole_state_dicts_only)
        return self.live_state() if gathered is None else gathered

    def live_state(self, fresh: bool = False) -> dict[str, Any]:
        """This rank's fragments, torn or not, with ``fresh`` also of frozen parameters that never stepped."""
        self.averages.refuse_inside("state_dict()")
        self.adopt_params()
        return self._state_dicts.sharded(partial(self.gradients.agree, CollectiveCall.STATE_DICT), fresh)

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Make the next ``state_dict()`` on rank ``to`` the whole, unless a step or load comes before. Collective."""
        self._state_dicts.consolidated = self.consolidated_state_dict(to)

    @public_call
    def consolidated_state_dict(self, to: int | None = 0) -> dict[str, Any]:
        """Gather the whole state in ``torch.optim.ASGD``'s own layout, on the CPU. Collective.

        It is returned on rank ``to`` of the process group (None: on all ranks), where state-dict hooks run; the other
        ranks get ``{}``. Rank ``to`` holds the result and one bucket, the others what they already had.
        """
        self.averages.refuse_inside("consolidated_state_dict()")
        self.adopt_params()
        fsdp1.refuse("consolidated_state_dict()", params_of(self.param_groups), fsdp1.CALL_FSDP1)
        if not self.is_differentiable:
            fingerprint, problem = self._state_dicts.before_full(to)
            self.gradients.agree(CollectiveCall.CONSOLIDATED_STATE_DICT, fingerprint, problem)
        return self._state_dicts.full(to)

    @public_call
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` gave this rank, a consolidated dict, or one of ``torch.optim.ASGD``. Collective.

        Whole dicts load at any world size and on any layout; every rank passes the same. Nothing is cast to a
        narrower dtype, and ``state_dict`` is not changed. If any rank raises, all do, and nothing changes.
        Hyperparameters come from the dict, as in torch; ``capturable`` and ``differentiable`` stay this optimizer's.
        """
        self.averages.refuse_inside("load_state_dict()")
        self.adopt_params()
        problem = self._problem(before_load=True)
        loaded, fingerprint, unreadable = self._state_dicts.parse(state_dict)
        self.gradients.agree(CollectiveCall.LOAD_STATE_DICT, fingerprint, problem or unreadable)
        if loaded is not None and self.registry.take_in(self.param_groups, loaded.stepped):
            loaded, fingerprint, unreadable = self._state_dicts.parse(loaded.source, run_hooks=False)
            self.gradients.agree(CollectiveCall.LOAD_STATE_DICT, fingerprint, unreadable)
        if loaded is not None:
            agree = partial(self.gradients.agree, CollectiveCall.LOAD_STATE_DICT, NO_FINGERPRINT)
            self._state_dicts.load(loaded, agree)

    def memory_report(self) -> memory.MemoryReport:
        """Count the bytes held on this rank, beside those that ``torch.optim.ASGD`` would hold. Not collective."""
        in_flight = self._updater.scratch_bytes + self.communicators.scratch_bytes() + self.gatherer.scratch_bytes
        return memory.report(self.shards.state_buffers, in_flight + self.gradients.in_flight_bytes)
