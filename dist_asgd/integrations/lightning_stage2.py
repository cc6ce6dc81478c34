"""Lightning: the strategy for ``ShardedASGD(stage=2)``, which ``integrations.lightning`` hands on."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy

from dist_asgd import ShardedASGD


class Stage2Strategy(DDPStrategy):
    """Runs as ``strategy="ddp"`` does, without DDP: ``ShardedASGD(stage=2)`` reduces the gradients.

    Each rank has buffers of its own, such as BatchNorm's statistics; checkpoints have those of rank 0.
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)

    def configure_ddp(self) -> None:
        """Give all ranks the parameters and buffers of rank 0, as DDP does. Collective."""
        assert self.lightning_module is not None
        for tensor in (*self.lightning_module.parameters(), *self.lightning_module.buffers()):
            tensor.detach().copy_(self.broadcast(tensor.detach().cpu()))

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """ValueError on all ranks if an optimizer would step with gradients that nobody has averaged."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if not (isinstance(optimizer, ShardedASGD) and optimizer.reduces_gradients):
                raise ValueError(
                    f"dist_asgd: Stage2Strategy with a {type(optimizer).__name__} that does not reduce gradients. "
                    f"Return ShardedASGD(..., stage=2) in configure_optimizers(), or pass strategy='ddp'."
                )

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulate on each rank; Lightning enters it for all but the last batch of ``accumulate_grad_batches``."""
        with ExitStack() as stack:
            for optimizer in self.optimizers:
                assert isinstance(optimizer, ShardedASGD)
                stack.enter_context(optimizer.no_sync())
            yield
