"""``update_batch_norm()``: BatchNorm's running statistics for averaged parameters, re-estimated on all ranks together.

Statistics are buffers of the last iterate, and fit the averages badly. This is torch.optim.swa_utils.update_bn over the
batches of all ranks: the mean over batches of what each batch has, kept in float64 until it is complete.

Vocabulary
    layer   a BatchNorm module that tracks running statistics
    round   one batch on each rank that has one left; before it, all ranks say whether they do, or have failed
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from .comm import CollectiveCall, Communicator, Communicators, public_call
from .comm.agreement import NO_FINGERPRINT, Agreement, Fingerprint
from .optimizer import ShardedASGD
from .placements import fsdp1
from .placements.dtensor import is_dtensor
from .sharded_average import ShardedAverage
from .sharded_state import ShardedState

# ``agree(fingerprint, problem)`` raises on all ranks if any has a problem, or another fingerprint.
Agree = Callable[[Fingerprint, Exception | None], object]


@dataclass
class Layer:
    """One layer, what it had before, and the sums of the statistics of its batches on this rank."""

    name: str
    module: _BatchNorm
    mean: Tensor  # (features,), the module's own buffers
    var: Tensor  # (features,)
    sums: Tensor  # (2, features), float64: of means and of variances
    num_batches: int = 0
    # A rank that has no batches left runs its last one for the sake of others' gathers, and does not count it.
    is_counting: bool = True

    @classmethod
    def of(cls, name: str, module: _BatchNorm) -> Layer | None:
        """Return the layer of ``module``; None if it tracks no statistics. ValueError if it has no shape yet."""
        if isinstance(module.running_mean, nn.UninitializedBuffer):
            raise ValueError(
                f"dist_asgd: update_batch_norm(): {name} is a {type(module).__name__} that has seen no batch, so it "
                f"has no statistics yet. Run the model once, on every rank, before the optimizer is constructed."
            )
        mean, var = module.running_mean, module.running_var
        if not module.track_running_stats or mean is None or var is None:
            return None
        return cls(name, module, mean, var, torch.zeros(2, mean.numel(), dtype=torch.float64, device=mean.device))

    def add(self, *_: Any) -> None:
        """Add the statistics of one batch, which the module has just taken; a hook after its forward."""
        if self.is_counting:
            self.sums += torch.stack([self.mean, self.var])
            self.num_batches += 1

    @contextmanager
    def estimating(self) -> Iterator[None]:
        """Inside the block, the module takes over the statistics of each batch, and they are added up.

        Afterwards its momentum is back, and if an exception leaves the block, its statistics are.
        """
        module = self.module
        kept = [buffer.clone() for buffer in self._buffers()]
        momentum = module.momentum
        # Statistics that are not finite would survive a factor of 0.
        module.reset_running_stats()
        module.momentum = 1.0
        hook = module.register_forward_hook(self.add)
        try:
            yield
        except BaseException:
            for buffer, before in zip(self._buffers(), kept, strict=True):
                buffer.copy_(before)
            raise
        finally:
            hook.remove()
            module.momentum = momentum

    def _buffers(self) -> list[Tensor]:
        tracked = self.module.num_batches_tracked
        return [self.mean, self.var] + ([] if tracked is None else [tracked])

    def write(self, sums: Tensor, num_batches: int) -> None:
        """Write the statistics that ``num_batches`` have together; ``sums`` ``(2, features)`` are over all ranks."""
        mean, var = (sums / num_batches).to(self.mean.device)
        self.mean.copy_(mean)
        self.var.copy_(var)
        if self.module.num_batches_tracked is not None:
            self.module.num_batches_tracked.fill_(num_batches)


@public_call
@torch.no_grad()
def update_batch_norm(
    loader: Iterable[Any],
    model: nn.Module,
    average: ShardedASGD | ShardedAverage | None = None,
    *,
    device: torch.device | str | int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> int:
    """Re-estimate the running statistics of all BatchNorm layers of ``model`` from batches. Collective.

    With ``average`` this happens inside ``average.averaged_parameters()``, so that the statistics fit the averages;
    without it they fit the parameters as they are, which inside such a block are the averages too. The statistics stay
    in the model's buffers, where ``export_averaged()`` finds them; training goes on to update them, and does not depend
    on them.

    Each layer gets the mean over all batches of all ranks, each batch with the same weight whatever its size, as
    torch.optim.swa_utils.update_bn has it for one process, and ``num_batches_tracked`` is their number. All ranks get
    the same bits. Ranks pass batches of their own, and may have different numbers of them: they go through their
    loaders batch by batch together. If the forward is collective (FSDP2, tensor parallelism), ranks whose batches have
    ended repeat the last one, without counting it.

    The model runs in training mode, as in torch. Afterwards each of its modules has its mode and its momentum back, and
    after an exception also its statistics. An error on one rank is raised on all of them before the next batch; ranks
    that are inside a collective forward at that time wait for the process group's timeout first.

    Args:
        loader: this rank's batches: tensors, or tuples or lists whose first item is what the model takes.
        model: the model, whatever it is wrapped in.
        average: a ShardedAverage, or a ShardedASGD, of the model's parameters. Its ranks are those that take part.
        device: where batches are moved to first; None leaves them where they are.
        process_group: the ranks that take part, without ``average``; None is the default group.

    Returns:
        The number of layers whose statistics were re-estimated. If there are none, the loader is not read, and a
        UserWarning says so.

    Raises:
        ValueError: an argument is not supported, no rank has a batch, a rank that never had one is needed for the
            forward of others, numbers of batches differ with SyncBatchNorm, or ranks have different layers; on every
            rank.
        TypeError: ``average`` is neither of the two classes; on every rank.
        Exception: the loader or the model raised; on every rank, where it names the ranks.
        PeerError: a rank died.
    """
    ours = average if isinstance(average, ShardedState) else None
    communicators = Communicators(process_group) if ours is None else ours.communicators
    agree = _agreement(ours, communicators)
    layers: list[Layer] = []
    problem = communicators.problem
    try:
        _check_arguments(model, average, process_group)
        layers = _layers(model)
    except Exception as error:
        problem = problem or error
    entries = [(f"layer {i}", (layer.name, layer.mean.numel())) for i, layer in enumerate(layers)]
    remedy = "Pass the same model on every rank."
    agree(Fingerprint("BatchNorm layers of update_batch_norm()", entries, remedy), problem)
    if not layers:
        warnings.warn(
            f"dist_asgd: update_batch_norm(): {type(model).__name__} has no BatchNorm layer that tracks running "
            f"statistics. Nothing was done.",
            stacklevel=3,
        )
        return 0
    # Called inside the block already, the parameters are the averages.
    enters = ours is not None and not ours.averages.is_swapped
    with ours.averaged_parameters() if ours is not None and enters else nullcontext(), ExitStack() as stack:
        stack.enter_context(_in_training(model))
        for layer in layers:
            stack.enter_context(layer.estimating())
        rounds = _Rounds(loader, model, layers, device, communicators.host, partial(agree, NO_FINGERPRINT))
        rounds.run()
        _combine(layers, communicators.host)
    return len(layers)


def _agreement(average: ShardedState | None, communicators: Communicators) -> Agree:
    if average is not None:
        return partial(average.gradients.agree, CollectiveCall.UPDATE_BATCH_NORM)
    agreement = Agreement(communicators.host)

    def agree(fingerprint: Fingerprint, problem: Exception | None) -> object:
        return agreement.agree(CollectiveCall.UPDATE_BATCH_NORM, fingerprint, problem=problem)

    return agree


def _check_arguments(model: nn.Module, average: object, process_group: object) -> None:
    """Raise TypeError or ValueError if an argument is not supported. No communication."""
    if average is None:
        return
    if not isinstance(average, ShardedState):
        raise TypeError(
            f"dist_asgd: update_batch_norm(): average must be a ShardedAverage or a ShardedASGD, got "
            f"{type(average).__name__}. Leave it out, and call update_batch_norm() when the model has its averages."
        )
    if process_group is not None:
        raise ValueError(
            "dist_asgd: update_batch_norm(): process_group with average, whose ranks take part. Leave one of them out."
        )
    if "buffers" in average.state:
        raise ValueError(
            "dist_asgd: update_batch_norm(): the average keeps buffers of its own, and would put them in the place of "
            "the new statistics. Construct it with buffers='keep', or leave average out and call update_batch_norm() "
            "inside averaged_parameters(), for statistics that last until the end of the block."
        )
    averaged = {id(param) for group in average.param_groups for param in group["params"]}
    if not any(id(param) in averaged for param in model.parameters()):
        raise ValueError(
            "dist_asgd: update_batch_norm(): the model has none of the average's parameters. Pass the model whose "
            "parameters the average was constructed with."
        )


def _layers(model: nn.Module) -> list[Layer]:
    """Return the layers of ``model`` in the order of its modules; ValueError if one cannot be updated."""
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    return [layer for name, module in named if (layer := Layer.of(name, module)) is not None]


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in training mode, runs uncompiled, and DDP sends none of its buffers."""
    modes = {module: module.training for module in model.modules()}
    # DDP would replace the statistics of this rank by those of rank 0, and wait for ranks that have no batches left.
    wrappers = {ddp: ddp.require_forward_param_sync for ddp in modes if isinstance(ddp, DistributedDataParallel)}
    try:
        model.train()
        for ddp in wrappers:
            ddp.require_forward_param_sync = False
        # Compiled code has the momentum and the hooks that layers had when it was traced. Whoever has compiled a model
        # has loaded the compiler, which takes seconds.
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        with eager:
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for ddp, syncs in wrappers.items():
            ddp.require_forward_param_sync = syncs


class _Rounds:
    """The rounds of one call on one rank; ``run()`` is collective."""

    def __init__(
        self,
        loader: Iterable[Any],
        model: nn.Module,
        layers: list[Layer],
        device: torch.device | str | int | None,
        host: Communicator,
        agree: Callable[[Exception | None], object],
    ) -> None:
        self._loader, self._model, self._layers, self._device = loader, model, layers, device
        self._host, self._agree = host, agree
        self._sync = next((layer for layer in layers if isinstance(layer.module, nn.SyncBatchNorm)), None)
        self._is_collective = any(is_dtensor(p) or fsdp1.is_managed(p) for p in model.parameters())
        self._iterator: Iterator[Any] | None = None
        self._has_ended = False
        self._last: Any = None
        self._num_batches = 0

    def run(self) -> None:
        """Go through the loaders of all ranks. Raises on all ranks what one of them raises."""
        while True:
            problem: BaseException | None = None
            has_batch = False
            try:
                has_batch = self._take()
            except BaseException as error:
                problem = error
            if not self._goes_on(has_batch, problem):
                return
            try:
                self._forward(has_batch)
            except BaseException as error:
                # The other ranks hear of it in place of this rank's word on its next batch.
                self._goes_on(False, error)

    def _take(self) -> bool:
        """Take the next batch of this rank's loader; False if there is none."""
        if self._iterator is None:
            self._iterator = iter(self._loader)
        # Not asked again once it has ended: workers of a DataLoader are gone then.
        if not self._has_ended:
            for batch in self._iterator:
                value = batch[0] if isinstance(batch, list | tuple) else batch
                self._last = value if self._device is None else value.to(self._device)
                return True
        self._has_ended = True
        return False

    def _forward(self, counts: bool) -> None:
        """Run the model on the last batch; a rank that has none left takes part only for the sake of the others."""
        if not counts and not self._is_collective:
            return
        for layer in self._layers:
            layer.is_counting = counts
        self._model(self._last)
        self._num_batches += counts

    def _goes_on(self, has_batch: bool, problem: BaseException | None) -> bool:
        """Tell all ranks whether this one has a batch, or has failed; return whether any has one. Collective."""
        without = not has_batch and self._num_batches == 0
        words = [int(problem is not None), int(has_batch), int(not has_batch), int(without)]
        failed, anyone, not_all, not_ever = self._host.largest(words)
        found = _as_exception(problem)
        if not failed and anyone and not_all and self._sync is not None:
            failed, found = 1, self._unequal(self._sync, has_batch)
        elif not failed and anyone and not_ever and self._is_collective:
            failed, found = 1, self._no_batch() if without else None
        elif not failed and not anyone and self._host.largest([self._num_batches])[0] == 0:
            failed, found = (
                1,
                ValueError(
                    "dist_asgd: update_batch_norm(): no rank has a batch. Pass a loader that has some: an "
                    "iterator that was used before is empty."
                ),
            )
        if failed:
            try:
                self._agree(found)
            except BaseException as error:
                # What is no Exception (KeyboardInterrupt, say) goes on as it is on the rank that has it.
                if problem is not None and not isinstance(problem, Exception):
                    raise problem from None
                raise error
        return bool(anyone)

    def _unequal(self, layer: Layer, has_batch: bool) -> ValueError:
        more = "has batches left, and others have none" if has_batch else f"has {self._num_batches} batches only"
        return ValueError(
            f"dist_asgd: update_batch_norm(): {layer.name} is a SyncBatchNorm, whose forward is collective, and this "
            f"rank {more}. Pass as many batches on every rank."
        )

    def _no_batch(self) -> ValueError:
        return ValueError(
            "dist_asgd: update_batch_norm(): this rank has no batch, and the forward of the others needs it. Pass at "
            "least one batch on every rank."
        )


def _as_exception(problem: BaseException | None) -> Exception | None:
    if problem is None or isinstance(problem, Exception):
        return problem
    return RuntimeError(f"dist_asgd: update_batch_norm() was interrupted on this rank by {type(problem).__name__}.")


def _combine(layers: list[Layer], host: Communicator) -> None:
    """Write the statistics of all ranks' batches on every rank, with the same bits. Collective."""
    # One message for all layers: (layers * (1 + 2 * features),), the number of batches and the sums of each layer.
    values = torch.cat(
        [
            part
            for layer in layers
            for part in (torch.tensor([float(layer.num_batches)], dtype=torch.float64), layer.sums.flatten().cpu())
        ]
    )
    host.all_reduce(values, tag=0)()
    means = torch.split(values, [1 + layer.sums.numel() for layer in layers])
    for layer, mean in zip(layers, means, strict=True):
        # The mean over ranks, times their number, is a whole number but for rounding.
        num_batches = round(float(mean[0]) * host.world_size)
        if num_batches:
            layer.write((mean[1:] * host.world_size).view(2, -1), num_batches)
