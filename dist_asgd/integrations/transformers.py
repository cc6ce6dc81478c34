"""ShardedASGD in the ``Trainer`` of Transformers: a callback for checkpoints and the average, a mixin for stage 2."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments

from .accelerate import prepare_model_stage2
from .wrappers import saves_shards, sharded_asgd


class ShardedASGDCallback(TrainerCallback):
    """Makes ``optimizer.pt`` of the Trainer's checkpoints whole; pass it as the last callback.

    ``evaluate_average``: evaluations during training see the average. ``save_average``: it is written to
    ``checkpoint-N/averaged``, where ``load_best_model_at_end`` finds it; training resumes from the last iterate.
    """

    def __init__(self, evaluate_average: bool = False, save_average: bool = False) -> None:
        self._evaluates, self._saves = evaluate_average, save_average
        self._averages: AbstractContextManager[None] | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on a part of the state cannot be saved. With FSDP the Trainer saves by shards."""
        if saves_shards() and self._saves:
            raise ValueError("dist_asgd: save_average=True does not work with FSDP. Call export_averaged() instead.")
        sharded_asgd(kwargs["optimizer"]).whole_state_dicts_only = not saves_shards()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Gather the state before a save, and put the averages in place before an evaluation."""
        if self._averages is None and control.should_save and not args.save_only_model and not saves_shards():
            sharded_asgd(kwargs["optimizer"]).consolidate_state_dict(to=0)
        if self._averages is None and control.should_evaluate and self._evaluates:
            self._averages = sharded_asgd(kwargs["optimizer"]).averaged_parameters()
            self._averages.__enter__()

    on_epoch_end = on_step_end

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the parameters back, and gather the state if a better result may now be saved."""
        averages, self._averages = self._averages, None
        if averages is not None:
            averages.__exit__(None, None, None)
        if args.save_strategy == "best" and not args.save_only_model and not saves_shards() and kwargs.get("optimizer"):
            sharded_asgd(kwargs["optimizer"]).consolidate_state_dict(to=0)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the average beside the checkpoint."""
        if self._saves:
            with sharded_asgd(kwargs["optimizer"]).averaged_parameters():
                if args.should_save:
                    kwargs["model"].save_pretrained(
                        Path(args.output_dir, f"checkpoint-{state.global_step}", "averaged")
                    )

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the average of the best checkpoint, whose last iterate the Trainer has loaded."""
        if self._saves and args.load_best_model_at_end and state.best_model_checkpoint:
            model, folder = kwargs["model"], Path(state.best_model_checkpoint, "averaged")
            if hasattr(model, "load_adapter") and hasattr(model, "active_adapter"):
                model.load_adapter(folder, model.active_adapter)
            else:
                model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())


class Stage2Mixin(Trainer):
    """For ``class MyTrainer(Stage2Mixin, Trainer)`` and a ``ShardedASGD(stage=2)``: the model is not wrapped in DDP."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare the model before the Trainer does. Collective."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if not sharded_asgd(optimizer).reduces_gradients:
            raise ValueError("dist_asgd: Stage2Mixin is for ShardedASGD(stage=2).")
        if self.args.torch_compile:
            raise ValueError("dist_asgd: torch_compile=True does not work in stage 2. Call model.compile() instead.")
        prepare_model_stage2(self.accelerator, self.model, sharded_asgd(optimizer))
        return optimizer
