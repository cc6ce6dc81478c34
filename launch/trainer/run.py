"""A run, whatever it trains: steps, evaluations, checkpoints and, at the end, a summary."""

import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Generic

import torch
from rich.console import Console
from torch import Tensor, nn

from dist_asgd import CheckpointManager, PeerError, ShardedASGD, load_checkpoint, read_extra
from metrics import MetricsLog
from parallel import Spread
from processes import Processes, TrainingError
from progress import ProgressDisplay
from report import Evaluation, Memory, Summary
from run_options import OptionsT
from stopping import StopRequest

# Options that say how a run starts, and may differ when it is resumed.
_START_OPTIONS = ("resume", "resume_from", "overwrite")
_NUM_ASGD_SCALARS = 3  # step, eta and mu, which torch.optim.ASGD keeps for each parameter as float32 tensors


class Run(ABC, Generic[OptionsT]):
    """A model, its optimizer, and the number of steps they have taken. Subclasses say what is trained on what.

    Construction and all public methods are collective: every rank calls them, in the same order.
    """

    _format: ClassVar[str]  # of the subclass's checkpoints
    _unit: ClassVar[str]  # what a loss is the mean over: "byte", say

    def __init__(self, options: OptionsT, processes: Processes, console: Console | None) -> None:
        self._options = options
        self._processes = processes
        self._console = console
        self._step = 0
        self._checkpoints = processes.together(lambda: CheckpointManager(options.checkpoint_folder, keep=options.keep))
        self._saved_step: int | None = None
        self._train_loss: float | None = None
        self._evaluation: Evaluation | None = None
        self._num_timed_tokens = 0
        self._timed_seconds = 0.0

        torch.manual_seed(options.seed)
        self._model = self._make_model()
        processes.broadcast_parameters(self._model)  # ranks may draw different random numbers
        self._spread = self._spread_model()
        self._optimizer = self._make_optimizer()

    # --- what is trained ------------------------------------------------------------------------------------

    @abstractmethod
    def _make_model(self) -> nn.Module:
        """Make the model on this rank's device, from torch's random numbers. Not collective."""

    @abstractmethod
    def _spread_model(self) -> Spread:
        """Distribute the model. Collective."""

    @abstractmethod
    def _make_optimizer(self) -> ShardedASGD:
        """Make the optimizer of the distributed model. Collective."""

    @abstractmethod
    def _train_step(self) -> Tensor:
        """Take one optimizer step; returns this rank's mean loss, 0-dim. Collective."""

    @abstractmethod
    def _step_tokens(self) -> int:
        """How many tokens the latest step has trained on, over all ranks."""

    @abstractmethod
    def _held_out_loss(self) -> float:
        """The mean loss over the held-out text, in nats per unit, the same on all ranks. Collective."""

    @abstractmethod
    def _learning_rate(self) -> float:
        """The learning rate of the first parameter group, for the metrics."""

    def _after_evaluation(self, progress: ProgressDisplay) -> None:
        """React to the latest evaluation; nothing by default. Collective."""

    @abstractmethod
    def _kept(self) -> dict[str, Any]:
        """What a checkpoint has beside model, optimizer and options."""

    @abstractmethod
    def _take(self, content: dict[str, Any]) -> None:
        """Go on from `_kept()` of a checkpoint; `_step` is that of the checkpoint already."""

    # --- the run --------------------------------------------------------------------------------------------

    @property
    def description(self) -> str:
        """The way in which the model is distributed, for people."""
        return self._spread.description

    @property
    def num_parameters(self) -> int:
        """The number of elements of all parameters."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    @property
    def first_average_step(self) -> int:
        """The optimizer's t0, which a checkpoint restores."""
        return int(self._optimizer.param_groups[0]["t0"])

    @property
    def checkpoint(self) -> str:
        """Where the latest checkpoint is, for the user to read. Rank 0 calls it."""
        folder = self._checkpoints.folder
        return str(folder / "latest") if isinstance(folder, Path) else str(self._checkpoints.latest())

    def start(self) -> int | None:
        """Restore the checkpoint that the options ask for, and return its step; None for a run from the beginning."""
        path = self._processes.gather(self._processes.on_first(self._find_checkpoint))[0]
        if path is not None:
            self._resume(path)
        self._processes.on_first(self._check_folder)
        return None if path is None else self._step

    def _find_checkpoint(self) -> str | None:
        """The checkpoint to resume from, or None. Removes checkpoints if --overwrite asks for it. Rank 0 calls it."""
        options = self._options
        if options.overwrite:
            for step in self._checkpoints.steps():
                path = self._checkpoints.path_of(step)
                shutil.rmtree(path) if isinstance(path, Path) else path.rmdir(recursive=True)
        if not options.resume:
            return options.resume_from
        latest = self._checkpoints.latest()
        if latest is None:
            raise ValueError(
                f"no checkpoint to resume from: wanted {options.checkpoint_folder}/step-...; leave out --resume to "
                "start anew"
            )
        return str(latest)

    def _check_folder(self) -> None:
        """Raise ValueError if the folder has later checkpoints, which would hide those of this run. Rank 0 calls it."""
        steps = self._checkpoints.steps()
        if steps and steps[-1] > self._step:
            raise ValueError(
                f"{self._checkpoints.folder} has a checkpoint of step {steps[-1]}, later than the start of this run "
                f"after step {self._step}: go on from it with --resume, remove it (all of them: --overwrite), or give "
                "another folder with --checkpoint"
            )

    def _resume(self, path: str) -> None:
        # Before anything is loaded; what is checked is the same on all ranks.
        self._processes.together(lambda: self._checked(read_extra(path)))
        with for_the_user():
            content = load_checkpoint(path, self._model, self._optimizer)
        self._step = content["step"]
        self._take(content)
        if path == str(self._checkpoints.path_of(self._step)):
            self._saved_step = self._step
        if self._console is not None:
            self._console.print(
                f"resumed after step {self._step}, averaging begins after step {self.first_average_step}"
                + "".join(f"; {change}" for change in self._changes(content, self._options.plain())),
                highlight=False,
                soft_wrap=True,
            )

    def run(self, log: MetricsLog | None, stop: StopRequest) -> Summary:
        """Train up to the last step, or to the end of the step in which a signal arrived, and save a checkpoint."""
        options = self._options
        signal_name = None
        self._model.train()
        with ProgressDisplay(self._console, total=options.steps, done=self._step) as progress:
            while self._step < options.steps and signal_name is None:
                with self._timed():
                    loss = self._train_step()
                    self._step += 1
                    if self._step % options.log_every == 0 or self._step == options.steps:
                        self._log_step(log, loss)
                signal_name = self._agreed_signal(stop)
                progress.show(self._step, text=self._progress_text())
                if signal_name is None and self._is_due(options.eval_every):
                    self._evaluate(log, progress)
                if options.checkpoint_every and self._is_due(options.checkpoint_every):
                    with for_the_user():
                        self._checkpoints.async_save(self._model, self._optimizer, **self._position())
                    self._saved_step = self._step
            if signal_name is None and (self._evaluation is None or self._evaluation.step < self._step):
                self._evaluate(log, progress)
        with for_the_user():
            if self._saved_step != self._step:
                self._checkpoints.save(self._model, self._optimizer, **self._position())
            self._checkpoints.wait()
        return self._summary(signal_name)

    def _log_step(self, log: MetricsLog | None, loss: Tensor) -> None:
        (loss_sum,) = self._processes.total(loss.item())
        self._train_loss = loss_sum / self._processes.world_size
        if not math.isfinite(self._train_loss):
            raise TrainingError(
                f"the training loss of step {self._step} is {self._train_loss}: lower --lr or --clip; "
                "the last checkpoint, if there is one, is untouched"
            )
        if log is not None:
            log.write(self._step, train_loss=self._train_loss, lr=self._learning_rate())

    def _agreed_signal(self, stop: StopRequest) -> str | None:
        (num_stopped,) = self._processes.total(float(stop.signal_name is not None))
        if not num_stopped:
            return None
        return next(name for name in self._processes.gather(stop.signal_name) if name is not None)

    def _is_due(self, every: int) -> bool:
        return self._step % every == 0 and self._step < self._options.steps

    def _evaluate(self, log: MetricsLog | None, progress: ProgressDisplay) -> None:
        last = average = self._held_out_loss()
        note = "averaging has not begun"
        # Up to step t0 + 2 the average is the last iterate, because mu is stored and acts in the next step.
        if self._step > self.first_average_step + 2:
            with self._optimizer.averaged_parameters():
                average = self._held_out_loss()
            note = f"of the average {average:.4f}"
        self._evaluation = Evaluation(self._step, last, average)
        if log is not None:
            log.write(self._step, held_out_last=last, held_out_average=average, tokens_per_second=self._speed())
        progress.note(f"step {self._step}: held-out loss {last:.4f}, {note}")
        self._after_evaluation(progress)

    def _position(self) -> dict[str, Any]:
        """The arguments for a checkpoint besides model and optimizer. The data of a step follows from its number."""
        extra = {"format": self._format, "step": self._step, "options": self._options.plain(), **self._kept()}
        return {"step": self._step, "extra": extra}

    def _checked(self, content: Any) -> dict[str, Any]:
        """Return `content`; raises ValueError if the checkpoint is of another program or would overrule an option."""
        if not isinstance(content, dict) or content.get("format") != self._format:
            raise ValueError(f"not a checkpoint of this trainer: wanted the format {self._format!r}")
        changes = self._changes(content, self._options.fixed_by_checkpoint)
        if changes:
            raise ValueError(
                f"the checkpoint belongs to another run: {', '.join(changes)}; "
                "give the options it was made with, or leave out --resume to start anew"
            )
        return content

    def _changes(self, content: dict[str, Any], names: Iterable[str]) -> list[str]:
        now, then = self._options.plain(), content["options"]
        return [
            f"--{name.replace('_', '-')} is {now[name]}, was {then[name]}"
            for name in names
            if name not in _START_OPTIONS and now[name] != then.get(name)
        ]

    def _summary(self, signal_name: str | None) -> Summary:
        held = self._optimizer.memory_report()
        memory = Memory(**{field.name: getattr(held, field.name) for field in fields(Memory)})
        parameters = list(self._model.parameters())
        parameter_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        return Summary(
            step=self._step,
            stopped_by=signal_name,
            train_loss=self._train_loss,
            evaluation=self._evaluation,
            tokens_per_second=self._speed(),
            unit=self._unit,
            first_average_step=self.first_average_step,
            average_dtype=str(self._optimizer.state[parameters[0]]["ax"].dtype).removeprefix("torch."),
            memory_by_rank=self._processes.gather(memory),
            unsharded=Memory(
                parameter_bytes=parameter_bytes,
                state_bytes=parameter_bytes + _NUM_ASGD_SCALARS * 4 * len(parameters),
                gradient_bytes=parameter_bytes,
                in_flight_bytes=0,
                padding_bytes=0,
            ),
            stats_by_rank=self._processes.gather(self._optimizer.stats()),
        )

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Add the time and the tokens of a step to those of training, which leaves out evaluations and checkpoints."""
        start = time.perf_counter()
        yield
        self._timed_seconds += time.perf_counter() - start
        self._num_timed_tokens += self._step_tokens()

    def _speed(self) -> float:
        """Tokens per second, over all ranks."""
        return self._num_timed_tokens / self._timed_seconds if self._timed_seconds else 0.0

    def _progress_text(self) -> str:
        loss = "" if self._train_loss is None else f"loss {self._train_loss:.3f}  "
        return f"{loss}{self._speed():,.0f} tokens/s"


@contextmanager
def for_the_user() -> Iterator[None]:
    """Turn an error that a collective call raises on every rank into a TrainingError with the same message."""
    try:
        yield
    except PeerError:
        raise
    except (ValueError, RuntimeError) as failure:
        raise TrainingError(str(failure)) from failure
