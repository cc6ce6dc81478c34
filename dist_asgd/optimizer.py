"""``ShardedASGD``: the optimizer that users construct, and its ``step()``: reduce, update, gather.

Attributes without an underscore (``shards``, say) are for the rooms above it, ``checkpoint`` and ``amp``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .backward_step import BackwardStep, check_whole
from .comm import CollectiveCall, Communicators, describe_mesh
from .comm.agreement import NO_FINGERPRINT, Agreement, public_call
from .forward import ForwardOverlap
from .gradients import clip
from .gradients.in_backward import gradients_of
from .gradients.joined import shadow
from .gradients.loss_scaling import ScalerInfo
from .joining import JoinableOptimizer, method_of_torch, share_step
from .sharded_state import ShardedState
from .stats import StepCounts, stats
from .step_context import begin_update, check_capture
from .storage.layout import min_buckets
from .storage.precision import Precision
from .update import differentiable
from .update.batch import run_batches
from .update.weights import AVERAGE_KEY, AverageRule, as_rule
from .validation import check_options, params_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ShardedASGD(ShardedState, JoinableOptimizer):
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
        average: a rule of averaging (``UniformMean``, ``ExponentialMean``, ``HalfLife``, ``PowerMean``), or a function
            n -> weight of the n-th iterate after t0: mu of that step. None is the mean of ``torch.optim.ASGD``.
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
        average: AverageRule | Callable[[int], float] | None = None,
        average_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: int | None = None,
        reduce_dtype: torch.dtype | None = None,
        shard_replicated: bool = True,
        shared_memory: bool = True,
        step_in_backward: bool = False,
    ) -> None:
        JoinableOptimizer.__init__(self)
        communicators = Communicators(process_group, mesh, shared_memory)
        self._agreement = Agreement(communicators.host)
        self.is_differentiable = differentiable is True
        self._stage = stage
        precision = Precision(average_dtype, master_weights, stochastic_rounding, reduce_dtype)
        flags = {"shard_replicated": shard_replicated, "shared_memory": shared_memory}
        flags["step_in_backward"] = step_in_backward
        options = {"stage": stage, "mesh": describe_mesh(mesh), "bucket_cap_mb": bucket_cap_mb, **flags}
        defaults: dict[str, Any] = {"lr": lr, "lambd": lambd, "alpha": alpha, "t0": t0, "weight_decay": weight_decay}
        defaults |= {"foreach": foreach, "maximize": maximize, "differentiable": differentiable}
        defaults |= {"capturable": capturable, **({} if fused is None else {"fused": fused})}
        gradients = gradients_of(stage, step_in_backward is True, self._agreement, communicators)

        def check() -> None:
            check_options(stage, bucket_cap_mb, flags, precision, self.is_differentiable)
            defaults.update({} if average is None else {AVERAGE_KEY: as_rule(average)})

        self._construct(params, defaults, gradients, precision, options | precision.options(), check)
        self._backward_step = BackwardStep.of(self, self._updater, self._hyperparameters)
        self._forward = ForwardOverlap(self.shards, self.communicators, self.gatherer)
        self.counts = StepCounts(self.communicators)

    def _min_buckets(self) -> int:
        return min_buckets(self._stage, self._options["step_in_backward"])

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
            check_capture(self.param_groups)
        problem = self._step_problem(by_gradients=True) or (None if scaler is None else scaler.problem(self._stage))
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

    def _check_whole(self, ends_step: bool) -> None:
        check_whole(self.shards, self._backward_step, ends_step)

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
