"""Uneven inputs: ``ShardedASGD`` as a ``Joinable`` of ``torch.distributed.algorithms.join.Join``.

A rank that runs out of inputs has *joined*; ranks that still have some are *active*. ``Join`` runs the main hook of a
joined rank once for each iteration of the others, and the post-hook of all ranks once the last of them has joined.
Torch's own joinable optimizer steps with whatever gradients a joined rank has. Here it gets those of the active ranks,
their hyperparameters and their scale.

iteration  stage 1: a forward and backward of DDP, which tells joined ranks of it, and one ``step()``. Stage 2: what
           lies between two steps; its first message is preceded by that of ``Join``
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from .comm import Communicators, public_call
from .comm.agreement import LAST_CALLS, OF_AN_ITERATION
from .comm.iterations import Iterations
from .comm.reports import DIGEST, UNKNOWN_DISCARDS, CollectiveCall, RankReports
from .gradients import loss_scaling
from .gradients.base import Gradients
from .gradients.in_backward import StepReducer
from .gradients.loss_scaling import ScalerInfo
from .gradients.reducer import Reducer
from .state import ParamShards
from .validation import FLAGS, FORMS, REAL_HYPERPARAMETERS, scalar


class JoinableOptimizer(Joinable):
    """The part of ``ShardedASGD`` that torch's ``Join`` calls, and what gradient scalers and trainers ask of it."""

    param_groups: list[dict[str, Any]]
    communicators: Communicators
    gradients: Gradients
    shards: ParamShards
    is_differentiable: bool
    # Whether ``dist_asgd.GradScaler`` is in its step(), which asks all ranks by itself.
    has_own_scaler = False

    def __init__(self) -> None:
        super().__init__()

    @property
    def reduces_gradients(self) -> bool:
        """Whether this optimizer reduces gradients itself, so that they leave ``p.grad`` (stage 2)."""
        return isinstance(self.gradients, Reducer)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells gradient scalers and trainers that ``step()`` unscales, and skips on overflow, by itself.

        Inside ``Join`` it always does: ranks that have joined wait for a step in each iteration. So it does for
        ``dist_asgd.GradScaler``, and with scalars on a CUDA device, so as not to wait for it, as torch's own fused
        optimizers do.
        """
        if self.is_differentiable or not (self.reduces_gradients or self.gradients.presharded):
            return not self.is_differentiable and (self.is_in_join or loss_scaling.is_needed(self.gradients))
        on_device = self.shards.on_cuda and any(group.get("fused") for group in self.param_groups)
        return self.is_in_join or self.has_own_scaler or on_device or loss_scaling.is_needed(self.gradients)

    @property
    def is_in_join(self) -> bool:
        """Whether this optimizer was passed to a ``Join`` context that has not ended, and that is enabled."""
        return bool(self._join_config.enable)

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """Return the hook of this optimizer for one ``Join`` context, which calls this on every rank. Not collective.

        Stage 1: ``Join([ddp, optimizer])``; stage 2: ``Join([optimizer])``. Between two iterations of the context there
        is one ``step()``.

        Args:
            kwargs: what the user passed to ``Join``. ``divide_by_initial_world_size`` is DDP's; in stage 2 the mean is
                over all ranks, and False is refused.

        Raises:
            ValueError: the optimizer cannot join: there are DTensors, or an option does not fit.
        """
        if self.shards.presharded:
            raise ValueError(
                f"dist_asgd: Join with parameter {self.shards.presharded[0].members[0].name}, a DTensor or a parameter "
                f"of FSDP1: forward and backward of such modules are collective, and have no join hooks. Give every "
                f"rank the same number of batches."
            )
        if isinstance(self.gradients, StepReducer):
            raise ValueError(
                "dist_asgd: Join with step_in_backward=True: ranks without inputs would have to update parameters "
                "during the backward of others. Pass step_in_backward=False, or give every rank as many batches."
            )
        if self.reduces_gradients and not kwargs.get("divide_by_initial_world_size", True):
            raise ValueError(
                "dist_asgd: divide_by_initial_world_size=False with stage=2, which always divides by the number of "
                "all ranks. Use stage=1 with DDP, or leave the option out."
            )
        self.gradients.end_join()
        if self.reduces_gradients:
            own = weakref.ref(self)
            self.gradients.agreement.iterations = Iterations(
                lambda: _notify(own()),
                (CollectiveCall.JOINED, CollectiveCall.END_OF_JOIN),
                (CollectiveCall.ROUND, *OF_AN_ITERATION),
                LAST_CALLS,
            )
        return _OptimizerJoinHook(self)

    @property
    def join_device(self) -> torch.device:
        """The device of the first parameter, for the messages of ``Join`` itself."""
        return next((buffer.device for buffer in self.shards.state_buffers), torch.device("cpu"))

    @property
    def join_process_group(self) -> dist.ProcessGroup | None:
        """The process group over which this optimizer shards.

        ``Join`` asks for it once it knows the order of its joinables, so a wrong one is refused here.

        Raises:
            ValueError: the ranks are no process group, or the order of the joinables does not fit the stage.
        """
        several = self.communicators.world_size > 1
        if several and self.is_in_join and self.reduces_gradients is not self._join_config.is_first_joinable:
            raise ValueError(
                "dist_asgd: a stage=2 optimizer is not the first in the list of Join. Its backward has to tell Join of "
                "an iteration before it sends anything, and only the first may. Pass Join([optimizer]); it cannot be "
                "joined together with another optimizer."
                if self.reduces_gradients
                else "dist_asgd: a stage=1 optimizer is the first in the list of Join. DDP, which reduces its "
                "gradients, comes before it: pass Join([ddp, optimizer])."
            )
        group = self.communicators.group
        if group is None and several:
            raise ValueError(
                f"dist_asgd: Join needs a process group of the optimizer's ranks {self.communicators.ranks}, and there "
                f"is none: the optimizer was given a mesh of some ranks. Pass a mesh of all ranks, or process_group."
            )
        return group

    @public_call
    @torch.no_grad()
    def step_joined(self) -> None:
        """Take part in one iteration of the active ranks; called on a rank that has joined. Collective."""
        # From here on this rank announces no iteration in the context.
        self.gradients.agreement.iterations = None
        self._step(has_joined=True)

    @abstractmethod
    def _step(self, has_joined: bool = False) -> None:
        """Reduce, update and gather; ``has_joined``: in a step of the other ranks, which still have inputs."""

    def end_join(self, is_last_joiner: bool) -> None:
        """Leave a ``Join`` context once all ranks have joined; take the last one's hyperparameters over. Collective."""
        gradients, agreement = self.gradients, self.gradients.agreement
        gradients.end_join()
        self._join_config = self._join_config.construct_disabled_join_config()
        # A zero_grad() after the last step makes no difference, but ranks that have joined did not count it.
        agreement.discards = 0
        agreement.agree(CollectiveCall.END_OF_JOIN)
        values = (is_last_joiner, _hyperparameters(self.param_groups))
        by_rank = gradients.communicators.host.exchange_objects(values)
        if not is_last_joiner:
            _set_hyperparameters(self.param_groups, next(values for last, values in by_rank if last))


def _notify(optimizer: JoinableOptimizer | None) -> None:
    """Tell ``Join`` that this rank begins an iteration. Collective, but waits for nobody.

    RuntimeError on all ranks if one has joined and the context was asked to throw then.
    """
    if optimizer is None:
        return
    try:
        Join.notify_join_context(optimizer)
    except RuntimeError:
        # The rank that ran out of inputs may not have begun this iteration with a zero_grad().
        optimizer.gradients.agreement.discards = UNKNOWN_DISCARDS
        if isinstance(optimizer.gradients, Reducer):
            # The backward is interrupted before it has sent anything: no round has to be completed.
            optimizer.gradients.backward_since_agree = False
        raise


class _OptimizerJoinHook(JoinHook):
    """What ``Join`` calls on the ranks that have joined; it lives as long as the context."""

    def __init__(self, optimizer: JoinableOptimizer) -> None:
        self._optimizer = optimizer

    def main_hook(self) -> None:
        try:
            self._optimizer.step_joined()
        except BaseException:
            self._optimizer.gradients.end_join()
            raise

    def post_hook(self, is_last_joiner: bool) -> None:
        self._optimizer.end_join(is_last_joiner)


def share_step(
    gradients: Gradients, reports: RankReports, groups: list[dict[str, Any]], scaler: ScalerInfo | None
) -> ScalerInfo | None:
    """Give the hyperparameters of this step, and what a gradient scaler handed to it, to ranks that have joined.

    Returns the scaler's values on all ranks. Collective, called if there are joined ranks; sends something only if a
    joined rank has other values.
    """
    digests = set(reports.column(DIGEST))
    on_device = any(isinstance(group["lr"], Tensor) for group in groups)  # such a learning rate is not in the digest
    if len(digests) == 1 and not on_device:
        return scaler
    scaled = None
    if scaler is not None:
        scale = scaler.grad_scale
        scaled = (None if scale is None else float(scale), float(scaler.found_inf))
    values, scaled = gradients.lend(reports, (_hyperparameters(groups), scaled))
    if gradients.communicators.rank in reports.active:
        return scaler
    _set_hyperparameters(groups, values)
    if scaled is None:
        return None
    device = gradients.buckets[0].device
    scale, found_inf = (None if v is None else torch.tensor(v, dtype=torch.float32, device=device) for v in scaled)
    return ScalerInfo(scale, cast(Tensor, found_inf))


def _hyperparameters(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The hyperparameters of each group as plain values; waits for a device that one of them is on."""
    return [
        {key: scalar(group[key]) for key in REAL_HYPERPARAMETERS} | {key: group.get(key) for key in (*FLAGS, *FORMS)}
        for group in groups
    ]


def _set_hyperparameters(groups: list[dict[str, Any]], values: list[dict[str, Any]]) -> None:
    """Take over ``values``; a hyperparameter that is a Tensor stays the same tensor."""
    for group, own, other in zip(groups, _hyperparameters(groups), values, strict=True):
        for key in own.keys() & other.keys():
            if own[key] == other[key]:
                continue
            if isinstance(group.get(key), Tensor):
                group[key].fill_(other[key])
            else:
                group[key] = other[key]


def refuse_pickling(optimizer: object) -> NoReturn:
    """Raise the TypeError of an optimizer that is pickled or copied; its ``__getstate__``."""
    raise TypeError(
        f"dist_asgd: {type(optimizer).__name__} cannot be pickled or deep-copied: it holds a process group and views "
        f"of the model's storage. Save consolidated_state_dict() and load it into a new optimizer."
    )


def method_of_torch(name: str) -> Callable[..., None]:
    """A method of torch's ``Optimizer`` without the wrapper that imports the compiler: 1 s and 70 MB."""
    method = getattr(torch.optim.Optimizer, name)
    return cast(Callable[..., None], getattr(method, "__wrapped__", method))
