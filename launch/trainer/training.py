"""Trains the byte-level transformer: its steps, its evaluations, and what its checkpoints add to those of a `Run`."""

from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from corpus import Corpus
from dist_asgd import ShardedASGD
from model import ByteTransformer, ModelShape
from options import Precision, TrainOptions
from parallel import Spread, spread
from processes import Processes
from run import Run


class Training(Run[TrainOptions]):
    """A transformer that is trained on windows of bytes, with warm-up and a schedule of the learning rate."""

    _format = "byte-transformer training checkpoint 3"
    _unit = "byte"
    _model: ByteTransformer

    def __init__(self, options: TrainOptions, processes: Processes, corpus: Corpus, console: Console | None) -> None:
        super().__init__(options, processes, console)
        self._corpus = corpus
        if options.overlap_forward:
            self._optimizer.overlap_forward(self._model)
        self._scheduler = LambdaLR(self._optimizer, options.lr_factor)

    def _make_model(self) -> ByteTransformer:
        options = self._options
        shape = ModelShape(**{field.name: getattr(options, field.name) for field in fields(ModelShape)})
        model = ByteTransformer(shape).to(self._processes.device)
        return model.to(torch.bfloat16) if options.dtype is Precision.BFLOAT16 else model

    def _spread_model(self) -> Spread:
        options = self._options
        return spread(self._model, options.mode, options.replicas, options.tensor_parallel, self._processes)

    def _make_optimizer(self) -> ShardedASGD:
        options = self._options
        return ShardedASGD(
            self._model.named_parameters(),
            lr=options.lr,
            lambd=options.lambd,
            alpha=options.alpha,
            t0=options.first_average_step,
            weight_decay=options.weight_decay,
            foreach=options.foreach,
            bucket_cap_mb=options.bucket_cap_mb,
            **self._spread.optimizer_options,
        )

    def _train_step(self) -> Tensor:
        options, spread = self._options, self._spread
        self._optimizer.zero_grad()
        losses = torch.zeros((), device=self._processes.device)
        for accumulated in range(options.accumulation):
            windows = self._corpus.batch(
                seed=options.seed,
                step=self._step,
                batch_index=accumulated * spread.num_data_ranks + spread.data_rank,
                num_batches=options.accumulation * spread.num_data_ranks,
                windows=options.batch,
                context=options.context,
            )
            # Only the last backward pass reduces gradients; it reduces the sum of all of them.
            is_last = accumulated == options.accumulation - 1
            with nullcontext() if is_last else spread.no_sync(self._optimizer):
                loss = self._loss(spread.network, windows) / options.accumulation
                loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation for it
            losses += loss.detach()
        if options.clip:
            self._optimizer.clip_grad_norm_(options.clip)
        self._optimizer.step()
        self._scheduler.step()
        return losses

    def _step_tokens(self) -> int:
        options = self._options
        return options.batch * options.accumulation * options.context * self._spread.num_data_ranks

    def _learning_rate(self) -> float:
        return float(self._scheduler.get_last_lr()[0])

    def _loss(self, network: nn.Module, windows: Tensor) -> Tensor:
        device = self._processes.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._options.dtype is Precision.AUTOCAST):
            loss: Tensor = network(windows.to(device, non_blocking=True))
        return loss

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """The mean loss over the held-out windows, which the ranks divide among them, in nats per byte."""
        options, ranks = self._options, self._spread.num_data_ranks
        windows = self._corpus.held_out_windows(windows=options.eval_windows, context=options.context)
        loss_sum, num_windows = 0.0, 0
        # Sharded parameters are gathered for each batch, so all ranks need equally many: some repeat a window, which
        # does not count.
        for first in range(0, len(windows), options.batch * ranks):
            batch = windows[first : first + options.batch * ranks][self._spread.data_rank :: ranks]
            loss = self._loss(self._model, batch if len(batch) else windows[:1]).item()
            loss_sum += loss * len(batch)
            num_windows += len(batch)
        total, count = self._processes.total(loss_sum, num_windows)
        return total / count

    def _kept(self) -> dict[str, Any]:
        return {"scheduler": self._scheduler.state_dict()}

    def _take(self, content: dict[str, Any]) -> None:
        self._scheduler.load_state_dict(content["scheduler"])
