"""``ShardedAverage``: the average of parameters that any optimizer trains, sharded over ranks."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .comm import CollectiveCall, Communicators, describe_mesh, public_call
from .comm.agreement import NO_FINGERPRINT, Agreement
from .gather import Arrivals
from .gradients.absent import NoGradients
from .interruption import A_WRITE
from .module_buffers import ModuleBuffers, check_buffers
from .sharded_state import ShardedState
from .state_dict.wrapper_names import name_below, wrappers_of
from .storage.precision import Precision
from .storage.snapshots import NO_GRADIENTS
from .update.batch import StepContext, run_batches
from .update.offload import Offload
from .update.schedule import Implementation, StepHyperparameters
from .update.segments import UNSCALED
from .update.weights import (
    AVERAGE_KEY,
    ONLY_AVERAGE_KEY,
    AverageRule,
    ExponentialMean,
    UniformMean,
    as_rule,
    with_every,
)
from .validation import check_options

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ShardedAverage(ShardedState):
    """An average of parameters, beside any optimizer that trains them: each rank has, and updates, a shard of it.

    For the iterates x that ``update()`` sees, numbered n = 1, 2, ... from ``start`` on (torch/optim/swa_utils.py)::

        ax <- x if n = 1 else ax + (x - ax) * weight(n)

    with 1 / n for the mean, 1 - decay for an exponential one, or any other rule of ``dist_asgd``. Parameters may be
    plain (DDP, or a single process), of FSDP2, of tensor parallelism and of HSDP; they stay where they are, so that
    several averages, and a ``ShardedASGD``, can have the same ones. ``update()`` sends nothing: it reads this rank's
    shard of the parameters, and writes that of the average. ``average.state[p]["ax"]``, ``averaged_parameters()``,
    state dicts, ``save_checkpoint``, ``export_averaged`` and the command line are those of ``ShardedASGD``: the state
    is that of an ASGD with lr 0 that has stepped as often as ``update()`` was called.

    Collective: construction, ``consolidated_state_dict``, ``load_state_dict``, entering and leaving
    ``averaged_parameters``, and whatever follows a change of parameters. ``update()`` is not, but is called on every
    rank alike: a rank that has called it more often than others is an error in the next collective call.

    Args:
        named_params: ``model.named_parameters()``, parameters, groups of them, or the model itself, which ``buffers``
            needs. Parameters that require no gradient are left alone.
        decay: that of an exponential average, between 0 and 1. None, without ``weight``: the mean.
        start: the first ``update()`` that counts is number start + 1; until then there is no average. A number
            between 0 and 1 is a share of ``total_updates``.
        every: only each ``every``-th update counts, the first one included.
        weight: a rule of averaging instead of ``decay``, or a function n -> weight of iterate n, from 0 to 1.
        buffers: what becomes of the buffers of a module: ``"keep"`` leaves those of the last iterate in place also in
            ``averaged_parameters()``, ``"copy"`` puts those of the last counted update there, and ``"average"``
            averages those of floating-point dtypes by the same rule and copies others. Ranks keep their own.
        average_dtype: the dtype of ``ax``, never narrower than the parameter. None is the parameter's, and float32 for
            16-bit ones.
        average_device: None is the device that the parameters are on. ``"cpu"`` keeps the averages of parameters on
            CUDA devices in page-locked host memory, with the same bits: ``update()`` brings them to the device in
            pieces of 16 MiB, and back, beside the next forward and backward. Write parameters in between by nothing but
            ``torch.optim`` optimizers, or after ``wait_for_parameters()``.
        process_group, mesh: the ranks to shard over, as in ``ShardedASGD``.
        foreach: None and True have the bits of torch's get_ema_multi_avg_fn and get_swa_multi_avg_fn, which is one pass
            over memory. False has those of get_ema_avg_fn and get_swa_avg_fn.
        total_updates: how many times ``update()`` will be called in all; only for a ``start`` that is a share.
        bucket_cap_mb: how many MiB of plain parameters are gathered at once in ``averaged_parameters()``.
        shared_memory: as in ``ShardedASGD``.

    Raises:
        ValueError: an argument or a combination is not supported, or ranks disagree; on every rank.
    """

    _moves_params = False
    _constructed = False
    # The parameters that updates take: all that have state.
    _active: frozenset[int] | None = None

    def __init__(
        self,
        named_params: torch.nn.Module | Iterable[tuple[str, Tensor]] | Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        decay: float | None = None,
        start: float = 0,
        every: int = 1,
        weight: AverageRule | Callable[[int], float] | None = None,
        buffers: str = "keep",
        average_dtype: torch.dtype | None = None,
        average_device: torch.device | str | None = None,
        process_group: dist.ProcessGroup | None = None,
        mesh: DeviceMesh | None = None,
        foreach: bool | None = None,
        total_updates: int | None = None,
        bucket_cap_mb: float = 25.0,
        shared_memory: bool = True,
    ) -> None:
        communicators = Communicators(process_group, mesh, shared_memory)
        precision = Precision(average_dtype, average_device=_device(average_device))
        flags = {"shard_replicated": True, "shared_memory": shared_memory, "step_in_backward": False}
        options = {"stage": 1, "mesh": describe_mesh(mesh), "bucket_cap_mb": bucket_cap_mb, **flags}
        options |= {"buffers": buffers, **precision.options()}
        # An ASGD that moves nothing: its state is what checkpoints, exports and commands know.
        defaults: dict[str, Any] = {"lr": 0.0, "lambd": 0.0, "alpha": 0.0, "t0": 0.0, "weight_decay": 0.0}
        defaults |= {"foreach": foreach, "maximize": False, "differentiable": False, "capturable": False}
        defaults[ONLY_AVERAGE_KEY] = True
        model = named_params if isinstance(named_params, nn.Module) else None
        params: Any = list(named_params.named_parameters() if isinstance(named_params, nn.Module) else named_params)

        def check() -> None:
            _check_device(average_device)
            check_options(1, bucket_cap_mb, flags, precision, False)
            defaults[AVERAGE_KEY] = _rule(decay, weight, every)
            defaults["t0"] = _first(start, total_updates) - 1
            check_buffers(buffers, model)
            for group in params:
                _check_keys(group)

        gradients = NoGradients(Agreement(communicators.host), communicators, self._compared)
        self._construct(params, defaults, gradients, precision, options, check)
        plain_name = str if model is None else partial(name_below, wrappers_of(model))
        self._buffers = ModuleBuffers(model, buffers, self.state, plain_name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose iterates are counted from its first update on. Collective; see ``ShardedASGD``."""
        _check_keys(param_group)
        super().add_param_group(param_group)

    # --- the update ------------------------------------------------------------------------------------------

    @public_call
    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters as they are now into the average; call it after each step of the optimizer, on all ranks.

        Sends nothing and waits for no device, also if averages lie in host memory. Before ``start``, and between two
        updates that count, it only counts.

        Raises:
            RuntimeError: parameters were replaced or converted, or are averages now; or, with averages in host memory,
                were written while those may have taken them. On this rank only.
        """
        self._refuse_capture()
        self._adopt_read_only()
        self.averages.refuse_swapped("update()", (param for group in self.param_groups for param in group["params"]))
        problem = self._step_problem(by_gradients=False)
        if problem is not None:
            raise problem
        active = self._active
        if active is None or len(active) != len(self.shards.held):
            active = self._active = frozenset(member.index for member in self.shards.held)
        hypers = self._step_hyperparameters()
        self.shards.prepare_step(active, hypers)
        self.shards.decide_writes(active, hypers)
        context = StepContext(self._updater, hypers, array("d"), {}, UNSCALED, UNSCALED, NO_GRADIENTS, None)
        self.shards.torn_by = "update()"
        for _, batches in self.shards.plan(active, hypers):
            run_batches(batches, context)
        self._buffers.update(hypers[0], self._num_updates() + 1)
        self.shards.cohorts.end_step(active, hypers)
        self._state_dicts.consolidated = None
        self.shards.torn_by = None

    def _step_hyperparameters(self) -> list[StepHyperparameters]:
        return [StepHyperparameters.of(group, _implementation(group)) for group in self.param_groups]

    def _compared(self) -> list[tuple[str, object]]:
        """What must be equal on all ranks for their shards to be one average; collective calls compare it."""
        entries: list[tuple[str, object]] = [("number of calls of update()", self._num_updates())]
        for index, group in enumerate(self.param_groups):
            rule = group.get(AVERAGE_KEY)
            entries.append((f"param_groups[{index}]['t0']", float(group["t0"])))
            entries.append((f"param_groups[{index}]['average']", str(rule.options() if rule is not None else None)))
        # Which parameters are exchanged and gathered goes by these; a function of weights may differ between ranks.
        return [*entries, ("(step, mu) of the parameters", self.shards.cohorts.scalar_values())]

    def _num_updates(self) -> int:
        """How many updates were made, of the parameter that has seen most. No communication."""
        return int(self.shards.cohorts.num_steps()) if self._constructed else 0

    def adopt_params(self) -> None:
        """Take parameters and ``param_groups`` as they are now; as ``ShardedASGD`` does. Collective if they differ."""
        Offload.before_write()
        self._settle()
        self._adopt_read_only()

    def _settle(self) -> None:
        """Let the host wait until averages in host memory are up to date."""
        for buffer in self.shards.state_buffers:
            buffer.settle()

    def _adopt_read_only(self) -> None:
        """Do so without a wait for averages in host memory, of which others may be in the middle of an update."""
        # update() reads parameters past the modules, which may be in flight with overlap_forward().
        Arrivals.wait_for_deferred()
        self._adopt()
        for offload in self._updater.offloads:
            overtaken = offload.take_overtaken()
            if overtaken is not None and self.shards.torn_by is None:
                self.shards.torn_by = f"{A_WRITE} to parameter {overtaken}"

    def _refuse_capture(self) -> None:
        """Raise RuntimeError if a CUDA graph is being captured, which would repeat the weight of one update."""
        if self.shards.on_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("dist_asgd: update() in a CUDA graph would repeat one update. Call it after the replay.")

    def state_dict(self) -> dict[str, Any]:
        """Hand out this rank's fragments of the averages; as ``ShardedASGD`` does."""
        self.averages.refuse_inside("state_dict()")
        # First, as it finds parameters that were written too early.
        self.adopt_params()
        return super().state_dict()

    @public_call
    def wait_for_parameters(self) -> None:
        """Wait until the parameters have been read, and averages in host memory are up to date. Not collective.

        Called before parameters are written by anything else than an optimizer's step, and by whoever has kept ``ax``.
        """
        Offload.before_write()
        self._settle()
        super().wait_for_parameters()

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Put the averages, and with them the kept buffers, in place of the module's own, as ``ShardedASGD`` does.

        Collective on entry and on exit.

        Steps of any optimizer of these parameters are refused inside.
        """
        if not self.registry.values_compared:
            self.adopt_params()
            problem = self._problem()
            reports = self.gradients.agree(CollectiveCall.AVERAGED_PARAMETERS, NO_FINGERPRINT, problem)
            self.registry.compare_values(reports)
        with super().averaged_parameters(), self._buffers.in_place():
            yield

    def start_averaging(self) -> None:
        """Begin anew with the next ``update()``: it is iterate 1. No communication; the same update on every rank."""
        self.averages.refuse_inside("start_averaging()")
        for group in self.param_groups:
            group["t0"] = self._num_updates() - 1.0

    # --- what an average cannot do -----------------------------------------------------------------------------

    def step(self, closure: Any = None) -> NoReturn:
        """Refuse: an average trains nothing."""
        raise RuntimeError("dist_asgd: step() of a ShardedAverage: step the optimizer, and call update() after it.")

    def zero_grad(self, set_to_none: bool = True) -> NoReturn:
        """Refuse: gradients are those of another optimizer."""
        raise RuntimeError("dist_asgd: zero_grad() of a ShardedAverage: call that of the optimizer.")


def _implementation(group: dict[str, Any]) -> Implementation:
    return Implementation.MEAN if group["foreach"] is False else Implementation.LERP


def _device(average_device: torch.device | str | None) -> torch.device | None:
    """Return ``average_device`` as a device; None if it is none, which ``_check_device`` refuses on all ranks."""
    try:
        return None if average_device is None else torch.device(average_device)
    except (RuntimeError, TypeError):
        return None


def _check_device(average_device: torch.device | str | None) -> None:
    """Raise ValueError unless ``average_device`` is None or a device."""
    if average_device is not None and _device(average_device) is None:
        raise ValueError(f"dist_asgd: average_device must be None, 'cpu' or another device, got {average_device!r}.")


def _rule(decay: float | None, weight: AverageRule | Callable[[int], float] | None, every: int) -> AverageRule:
    """Return the rule that the arguments of the constructor ask for; ValueError if they contradict each other."""
    if decay is not None and weight is not None:
        raise ValueError(
            f"dist_asgd: decay={decay} with weight: two rules of averaging. Pass one of them; an exponential mean with "
            f"a warm-up is weight=ExponentialMean({decay}, warmup=10)."
        )
    if weight is not None:
        return with_every(as_rule(weight), every)
    return UniformMean(every=every) if decay is None else ExponentialMean(decay, every=every)


def _first(start: float, total_updates: int | None) -> float:
    """Return how many updates come before the first one that counts; ValueError if ``start`` does not say so."""
    if isinstance(start, bool) or not isinstance(start, Real) or not 0 <= start < math.inf:
        raise ValueError(f"dist_asgd: start must be a number of updates >= 0, or a share of them, got {start!r}.")
    if float(start).is_integer():
        if total_updates is not None:
            raise ValueError(
                f"dist_asgd: total_updates={total_updates} with start={start}, which is a number of updates. Leave "
                f"total_updates out, or pass a share between 0 and 1."
            )
        return float(start)
    if start > 1:
        raise ValueError(f"dist_asgd: start={start} is no whole number of updates, and no share between 0 and 1.")
    if isinstance(total_updates, bool) or not isinstance(total_updates, int) or total_updates < 1:
        raise ValueError(
            f"dist_asgd: start={start} is a share of the run, so total_updates must say how many updates that has; got "
            f"{total_updates!r}. Pass it, or a whole number of updates."
        )
    return math.floor(start * total_updates)


def _check_keys(group: Any) -> None:
    """Raise ValueError if a group has options that an average does not read."""
    known = {"params", "param_names", AVERAGE_KEY}
    unknown = [key for key in group if key not in known] if isinstance(group, dict) else []
    if unknown:
        raise ValueError(
            f"dist_asgd: a parameter group of a ShardedAverage has {unknown}, which it would ignore. A group may have "
            f"'params' and {AVERAGE_KEY!r}, a rule of averaging; the rest are arguments of the constructor."
        )
