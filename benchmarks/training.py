"""A model in training: the module that is called, the optimizer, and how a step is taken with them.

``Training`` is a step as torch writes it. Libraries that take one in another way have classes of their own here, which
import them when they begin, so that they are needed only where they are measured.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

BUCKET_BYTES = 25 * 2**20


class Training:
    """A wrapped model and its optimizer."""

    def __init__(self, module: nn.Module, optimizer: Optimizer) -> None:
        self.module = module
        self.optimizer = optimizer

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Run backward. Collective."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Take the optimizer's step. Collective."""
        self.optimizer.step()

    def state(self) -> Iterator[Tensor]:
        """The tensors that the optimizer keeps on this rank beside parameters and gradients."""
        inner = self.optimizer.optim if isinstance(self.optimizer, ZeroRedundancyOptimizer) else self.optimizer
        yield from state_tensors(inner)

    def gradients(self, parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
        """The tensors that hold gradients on this rank between backward and step, as far as Python sees them."""
        yield from (p.grad for p in parameters if p.grad is not None)


def state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """The tensors of an optimizer's state."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


class FairScale(Training):
    """``ShardedDataParallel``, which sends each gradient to the rank that updates it, and ``OSS``."""

    def __init__(self, model: nn.Module, optimizer_class: type[Optimizer], options: Mapping[str, Any]) -> None:
        from fairscale.nn.data_parallel import ShardedDataParallel
        from fairscale.optim.oss import OSS

        optimizer = OSS(model.parameters(), optim=optimizer_class, **options)
        self._wrapped = ShardedDataParallel(model, optimizer)
        super().__init__(self._wrapped, optimizer)

    def zero_grad(self) -> None:
        # Its gradients lie in buckets, from which the optimizer's zero_grad() would cut them off.
        self.module.zero_grad()

    def state(self) -> Iterator[Tensor]:
        yield from state_tensors(self.optimizer.optim)  # type: ignore[attr-defined]

    def gradients(self, parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
        yield from super().gradients(parameters)
        yield from (bucket.buffer for bucket in self._wrapped._bucket_list if bucket.buffer is not None)


class DeepSpeed(Training):
    """DeepSpeed's engine around the model, with ZeRO of ``stage`` 1 or 2 and an optimizer of the user's."""

    def __init__(self, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer], stage: int) -> None:
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, DS_ACCELERATOR="cpu")
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # DeepSpeed calls collectives by names that torch is about to give up.
        warnings.simplefilter("ignore", FutureWarning)
        # The all-reduce that this would compile is for inference.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            # Its default is 1, where the others do not clip.
            "gradient_clipping": 0.0,
            "zero_optimization": {
                "stage": stage,
                # Elements. Its default, 5e8, is all gradients at once.
                "reduce_bucket_size": BUCKET_BYTES // 4,
                "allgather_bucket_size": BUCKET_BYTES // 4,
            },
        }
        optimizer = make_optimizer(model)
        self._engine, wrapping, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        super().__init__(self._engine, wrapping)

    def zero_grad(self) -> None:
        """Do nothing: the engine's ``step()`` has cleared them."""

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        self._engine.step()

    def state(self) -> Iterator[Tensor]:
        # Beside the state of the optimizer, the engine keeps a copy of the parameters that this rank updates.
        yield from state_tensors(self.optimizer.optimizer)  # type: ignore[attr-defined]
        yield from self.optimizer.single_partition_of_fp32_groups  # type: ignore[attr-defined]

    def gradients(self, parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
        yield from super().gradients(parameters)
        averaged = self.optimizer.averaged_gradients.values()  # type: ignore[attr-defined]
        yield from (g for group in averaged if group is not None for g in group if isinstance(g, torch.Tensor))
