"""Runs the training: steps, evaluations, checkpoints and, at the end, a summary."""

import math
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from corpus import Corpus
from dist_asgd import CheckpointManager, PeerError, ShardedASGD, load_checkpoint, read_extra
from metrics import MetricsLog
from model import ByteTransformer, ModelShape
from options import FIXED_BY_CHECKPOINT, Precision, TrainOptions
from parallel import spread
from processes import Processes, TrainingError
from progress import ProgressDisplay
from report import Evaluation, Facts, Memory, Summary, averaging_text, iterates_text
from stopping import StopRequest

_FORMAT = "byte-transformer training checkpoint 3"
# Options that say how a run starts, and may differ when it is resumed.
_START_OPTIONS = ("resume", "resume_from", "overwrite")
# Options that say when averaging begins: a checkpoint has the step itself.
_T0_OPTIONS = ("t0", "t0_share")
_NUM_ASGD_SCALARS = 3  # step, eta and mu, which torch.optim.ASGD keeps for each parameter as float32 tensors


class Training:
    """A model, its optimizer, and the number of steps they have taken.

    Construction and all public methods are collective: every rank calls them, in the same order.
    """

    def __init__(self, options: TrainOptions, processes: Processes, corpus: Corpus, console: Console | None) -> None:
        self._options = options
        self._processes = processes
        self._corpus = corpus
        self._console = console
        self._step = 0
        self._checkpoints = processes.together(lambda: CheckpointManager(options.checkpoint_folder, keep=options.keep))
        self._saved_step: int | None = None
        self._train_loss: float | None = None
        self._evaluation: Evaluation | None = None
        self._t0_options: dict[str, Any] = {name: getattr(options, name) for name in _T0_OPTIONS}
        self._num_timed_steps = 0
        self._timed_seconds = 0.0

        torch.manual_seed(options.seed)
        shape = ModelShape(**{field.name: getattr(options, field.name) for field in fields(ModelShape)})
        self._model = ByteTransformer(shape).to(processes.device)
        if options.dtype is Precision.BFLOAT16:
            self._model.to(torch.bfloat16)
        if options.step_in_backward and processes.device.type != "cpu":
            raise TrainingError(
                f"--step-in-backward with parameters on {processes.device.type}: so far only parameters on CPUs are "
                "updated in backward; leave it out"
            )
        processes.broadcast_parameters(self._model)  # ranks may draw different random numbers

        self._spread = spread(self._model, options.mode, options.replicas, options.tensor_parallel, processes)
        self._optimizer = ShardedASGD(
            self._model.named_parameters(),
            lr=options.lr,
            lambd=options.lambd,
            alpha=options.alpha,
            t0=options.first_average_step,
            weight_decay=options.weight_decay,
            foreach=options.foreach,
            bucket_cap_mb=options.bucket_cap_mb,
            step_in_backward=options.step_in_backward,
            **self._spread.optimizer_options,
        )
        if options.overlap_forward:
            self._optimizer.overlap_forward(self._model)
        self._scheduler = LambdaLR(self._optimizer, options.lr_factor)

    @property
    def description(self) -> str:
        """The way in which the model is distributed, for people."""
        return self._spread.description

    @property
    def num_parameters(self) -> int:
        """The number of elements of all parameters."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    @property
    def facts(self) -> Facts:
        """What the closing report and the picture say about the run."""
        options, processes = self._options, self._processes
        return Facts(
            num_parameters=self.num_parameters,
            parallel=self.description + ", step in backward" * options.step_in_backward,
            num_ranks=processes.world_size,
            device=processes.device.type,
            steps=options.steps,
            lr=options.lr,
            schedule=str(options.schedule),
            first_average_step=self.first_average_step,
        )

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
        content = self._processes.together(lambda: self._checked(read_extra(path)))
        with _for_the_user():
            load_checkpoint(path, self._model, self._optimizer)
        self._scheduler.load_state_dict(content["scheduler"])
        self._step = content["step"]
        self._keep_t0(content["options"])
        if path == str(self._checkpoints.path_of(self._step)):
            self._saved_step = self._step
        if self._console is not None:
            self._console.print(
                f"resumed after step {self._step:,} with the run's t0 of {self.first_average_step:,}: "
                + averaging_text(self.first_average_step, self._optimizer.averaged_steps())
                + "".join(f"; {change}" for change in self._changes(content, self._options.plain())),
                highlight=False,
                soft_wrap=True,
            )

    def _keep_t0(self, saved_options: dict[str, Any]) -> None:
        """Go on with the t0 that the checkpoint has restored; raises TrainingError if an option asks for another.

        The options that the run began with may be given once more, also where another --steps makes --t0-share
        another step.
        """
        now = {name: getattr(self._options, name) for name in _T0_OPTIONS}
        self._t0_options = {name: saved_options[name] for name in _T0_OPTIONS}
        is_given = any(value is not None for value in now.values())
        if is_given and now != self._t0_options and self._options.first_average_step != self.first_average_step:
            option = "--t0" if self._options.t0 is not None else "--t0-share"
            raise TrainingError(
                f"{option} asks for averaging after step {self._options.first_average_step:,}, but the run that goes "
                f"on has t0 {self.first_average_step:,}, and its average may hold iterates since then: leave {option} "
                "out, or start anew without --resume"
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
                    with _for_the_user():
                        self._checkpoints.async_save(self._model, self._optimizer, **self._position())
                    self._saved_step = self._step
            if signal_name is None and (self._evaluation is None or self._evaluation.step < self._step):
                self._evaluate(log, progress)
        with _for_the_user():
            if self._saved_step != self._step:
                self._checkpoints.save(self._model, self._optimizer, **self._position())
            self._checkpoints.wait()
        return self._summary(signal_name)

    def _train_step(self) -> Tensor:
        """Take one optimizer step after `accumulation` backward passes; returns this rank's mean loss, 0-dim."""
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

    def _loss(self, network: nn.Module, windows: Tensor) -> Tensor:
        device = self._processes.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._options.dtype is Precision.AUTOCAST):
            loss: Tensor = network(windows.to(device, non_blocking=True))
        return loss

    def _log_step(self, log: MetricsLog | None, loss: Tensor) -> None:
        (loss_sum,) = self._processes.total(loss.item())
        self._train_loss = loss_sum / self._processes.world_size
        if not math.isfinite(self._train_loss):
            raise TrainingError(
                f"the training loss of step {self._step} is {self._train_loss}: lower --lr or --clip; "
                "the last checkpoint, if there is one, is untouched"
            )
        if log is not None:
            log.write(self._step, train_loss=self._train_loss, lr=float(self._scheduler.get_last_lr()[0]))

    def _agreed_signal(self, stop: StopRequest) -> str | None:
        (num_stopped,) = self._processes.total(float(stop.signal_name is not None))
        if not num_stopped:
            return None
        return next(name for name in self._processes.gather(stop.signal_name) if name is not None)

    def _is_due(self, every: int) -> bool:
        return self._step % every == 0 and self._step < self._options.steps

    def _evaluate(self, log: MetricsLog | None, progress: ProgressDisplay) -> None:
        last = self._held_out_loss()
        values = {"held_out_last": last}
        averaged_steps = self._optimizer.averaged_steps()
        note = averaging_text(self.first_average_step, averaged_steps)
        if averaged_steps:
            with self._optimizer.averaged_parameters():
                values["held_out_average"] = self._held_out_loss()
            note = f"of the average {values['held_out_average']:.4f} ({iterates_text(averaged_steps)})"
        self._evaluation = Evaluation(self._step, last, values.get("held_out_average"), averaged_steps)
        if log is not None:
            log.write(self._step, **values, averaged_steps=averaged_steps, tokens_per_second=self._speed())
        progress.note(f"step {self._step}: held-out loss {last:.4f}, {note}")

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

    def _position(self) -> dict[str, Any]:
        """The arguments for a checkpoint besides model and optimizer. The data of a step follows from its number."""
        options = self._options.plain() | self._t0_options
        extra = {"step": self._step, "options": options, "scheduler": self._scheduler.state_dict()}
        return {"step": self._step, "extra": {"format": _FORMAT, **extra}}

    def _checked(self, content: Any) -> dict[str, Any]:
        """Return `content`; raises ValueError if the checkpoint is of another program or would overrule an option."""
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"not a checkpoint of this trainer: wanted the format {_FORMAT!r}")
        changes = self._changes(content, FIXED_BY_CHECKPOINT)
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
            if name not in (*_START_OPTIONS, *_T0_OPTIONS) and now[name] != then.get(name)
        ]

    def _summary(self, signal_name: str | None) -> Summary:
        held = self._optimizer.memory_report()
        memory = Memory(**{field.name: getattr(held, field.name) for field in fields(Memory)})
        parameters = list(self._model.parameters())
        parameter_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        return Summary(
            facts=self.facts,
            step=self._step,
            stopped_by=signal_name,
            train_loss=self._train_loss,
            evaluation=self._evaluation,
            tokens_per_second=self._speed(),
            averaged_steps=self._optimizer.averaged_steps(),
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
        """Add the time of the block to the training time, which leaves out evaluations and checkpoints."""
        start = time.perf_counter()
        yield
        self._timed_seconds += time.perf_counter() - start
        self._num_timed_steps += 1

    def _speed(self) -> float:
        """Tokens (bytes) per second, over all ranks."""
        options = self._options
        step_tokens = options.batch * options.accumulation * options.context * self._spread.num_data_ranks
        return step_tokens * self._num_timed_steps / self._timed_seconds if self._num_timed_steps else 0.0

    def _progress_text(self) -> str:
        loss = "" if self._train_loss is None else f"loss {self._train_loss:.3f}  "
        return f"{loss}{self._speed():,.0f} tokens/s"


@contextmanager
def _for_the_user() -> Iterator[None]:
    """Turn an error that a collective call raises on every rank into a TrainingError with the same message."""
    try:
        yield
    except PeerError:
        raise
    except (ValueError, RuntimeError) as failure:
        raise TrainingError(str(failure)) from failure
