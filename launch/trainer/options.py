"""The trainer's options: one frozen dataclass, from which typer makes the command line."""

import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from parallel import REDUCED_BY_OPTIMIZER, WITH_FULLY_SHARD, WITH_REPLICAS, Mode


class Precision(StrEnum):
    """The number formats of parameters, gradients, averages and activations; the help of --dtype explains each."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    AUTOCAST = "autocast"


class Schedule(StrEnum):
    """The learning rate after its warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"


# Options that a checkpoint fixes: on resuming, another value would be ignored or would not fit.
FIXED_BY_CHECKPOINT = (
    "d_model",
    "layers",
    "heads",
    "context",
    "tie_embedding",
    "dtype",
    "lr",
    "lambd",
    "alpha",
    "weight_decay",
)


def _option(panel: str, text: str, *names: str, minimum: float | None = None) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, min=minimum)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a byte-level transformer language model with ShardedASGD, under torchrun or as one process."""

    data: Annotated[
        list[Path] | None,
        _option("Data", "File or folder to train on; may be repeated. Default: Python's own library sources."),
    ] = None
    seed: Annotated[int, _option("Data", "Seeds the initial parameters and the order of the data.", minimum=0)] = 0

    d_model: Annotated[int, _option("Model", "Width.", minimum=1)] = 256
    layers: Annotated[int, _option("Model", "Transformer blocks.", minimum=1)] = 6
    heads: Annotated[int, _option("Model", "Attention heads; divides the width.", minimum=1)] = 4
    context: Annotated[int, _option("Model", "Bytes that a prediction can look back on.", minimum=1)] = 256
    tie_embedding: Annotated[bool, _option("Model", "Output layer = input embedding.")] = False
    dtype: Annotated[
        Precision,
        _option(
            "Model",
            "float32; bfloat16: parameters, gradients and activations (updates below half a unit in the last "
            "place are lost); autocast: float32 parameters, gradients and average, bfloat16 matrix products.",
        ),
    ] = Precision.FLOAT32

    parallel: Annotated[
        Mode | None,
        _option(
            "Ranks",
            "ddp: nothing is sharded; zero1: the optimizer's state (gradients by DDP); zero2: gradients too; fsdp2: "
            "parameters too; hybrid and hsdp: as zero2 and fsdp2 within each of --replicas. Default: zero1.",
        ),
    ] = None
    stage: Annotated[
        int | None, typer.Option(min=1, max=2, help="Short for zero1 and zero2.", rich_help_panel="Ranks")
    ] = None
    replicas: Annotated[
        int | None,
        _option("Ranks", "hybrid, hsdp: number of replicas. Default: of nodes; on a single node 2.", minimum=1),
    ] = None
    tensor_parallel: Annotated[
        int,
        _option("Ranks", "fsdp2, hsdp: ranks that share each layer, attention by heads, on the same data.", minimum=1),
    ] = 1
    overlap_forward: Annotated[
        bool, _option("Ranks", "Gather parameters while the next step's forward runs (zero1, zero2, hybrid).")
    ] = False
    step_in_backward: Annotated[
        bool,
        _option(
            "Ranks",
            "Update each bucket as soon as backward has reduced its gradients, which nobody keeps then (zero2, hybrid; "
            "on CPUs, with --clip 0).",
            "--step-in-backward",
        ),
    ] = False
    lr: Annotated[float, _option("Optimizer", "Learning rate.", minimum=0)] = 0.3
    lambd: Annotated[float, _option("Optimizer", "ASGD's decay term.", minimum=0)] = 1e-4
    alpha: Annotated[float, _option("Optimizer", "ASGD's power for the decay of eta.", minimum=0)] = 0.75
    weight_decay: Annotated[float, _option("Optimizer", "L2 penalty.", minimum=0)] = 0.0
    schedule: Annotated[Schedule, _option("Optimizer", "Learning rate after the warm-up.")] = Schedule.CONSTANT
    warmup: Annotated[int, _option("Optimizer", "Steps of linear warm-up.", minimum=0)] = 0
    t0: Annotated[int | None, _option("Optimizer", "Averaging begins after this step.", minimum=0)] = None
    t0_share: Annotated[
        float | None, _option("Optimizer", "The same as a share of --steps. Default: 0.5.", minimum=0)
    ] = None
    clip: Annotated[float, _option("Optimizer", "Largest global gradient norm; 0: no clipping.", minimum=0)] = 1.0
    foreach: Annotated[bool | None, _option("Optimizer", "Form of the update. Default: the optimizer's.")] = None
    bucket_cap_mb: Annotated[float, _option("Optimizer", "Bucket size in MiB.")] = 25.0

    steps: Annotated[int, _option("Run", "Optimizer steps in all.", minimum=1)] = 1000
    batch: Annotated[int, _option("Run", "Windows per rank and backward pass.", minimum=1)] = 16
    accumulation: Annotated[int, _option("Run", "Backward passes per optimizer step.", minimum=1)] = 1
    eval_every: Annotated[int, _option("Run", "Steps between evaluations.", minimum=1)] = 100
    eval_windows: Annotated[int, _option("Run", "Held-out windows, over all ranks.", minimum=1)] = 256
    log_every: Annotated[int, _option("Run", "Steps between lines of metrics.", minimum=1)] = 10
    timeout: Annotated[int, _option("Run", "Seconds after which a silent peer counts as lost.", minimum=1)] = 300

    out: Annotated[Path, _option("Files", "Metrics, TensorBoard events, picture and summary.")] = Path("runs/train")
    checkpoint: Annotated[
        str | None,
        _option(
            "Files",
            "Folder of checkpoints, which all nodes share, or its address in an object store (s3://...). Default: the "
            "folder `checkpoint` in --out.",
        ),
    ] = None
    checkpoint_every: Annotated[int, _option("Files", "Steps between checkpoints; 0: only at the end.", minimum=0)] = 0
    keep: Annotated[int, _option("Files", "Checkpoints to keep, the newest.", minimum=1)] = 3
    resume: Annotated[
        bool, _option("Files", "Go on from the latest checkpoint, on any number of ranks, in any mode.", "--resume")
    ] = False
    resume_from: Annotated[
        str | None, _option("Files", "Go on from this checkpoint (a step-... directory) instead of the latest.")
    ] = None
    overwrite: Annotated[
        bool, _option("Files", "Start anew, and remove the folder's checkpoints of an earlier run.", "--overwrite")
    ] = False

    def __post_init__(self) -> None:
        if self.d_model % self.heads:
            raise typer.BadParameter(f"--d-model {self.d_model} is not a multiple of --heads {self.heads}")
        if self.stage is not None and self.parallel is not None:
            raise typer.BadParameter("--stage and --parallel are two ways to say one thing: give one of them")
        if self.replicas is not None and self.mode not in WITH_REPLICAS:
            raise typer.BadParameter(f"--replicas is for --parallel {' and '.join(WITH_REPLICAS)}, not {self.mode}")
        if self.tensor_parallel > 1 and self.mode not in WITH_FULLY_SHARD:
            raise typer.BadParameter(
                f"--tensor-parallel is for --parallel {' and '.join(WITH_FULLY_SHARD)}, not {self.mode}"
            )
        # A divisor of the heads divides every width, too.
        if self.heads % self.tensor_parallel:
            raise typer.BadParameter(
                f"--tensor-parallel {self.tensor_parallel} does not divide --heads {self.heads}, by which attention is "
                "split: give a divisor, or a new model other --heads"
            )
        if self.step_in_backward:
            self._check_step_in_backward()
        if self.t0 is not None and self.t0_share is not None:
            raise typer.BadParameter("--t0 and --t0-share are two ways to say one thing: give one of them")
        if self.overwrite and (self.resume or self.resume_from):
            raise typer.BadParameter("--overwrite starts anew, --resume and --resume-from go on: give one of them")
        if self.resume and self.resume_from:
            raise typer.BadParameter(
                "--resume is for the latest checkpoint, --resume-from for another: give one of them"
            )
        if ":/" in str(self.out):
            raise typer.BadParameter(f"--out {self.out} is no folder of this machine; --checkpoint may be an address")
        for name in ("lr", "lambd", "alpha", "weight_decay", "clip", "bucket_cap_mb"):
            if not math.isfinite(getattr(self, name)):
                raise typer.BadParameter(f"--{name.replace('_', '-')} is not finite")

    def _check_step_in_backward(self) -> None:
        """Raise typer.BadParameter if --step-in-backward cannot be combined with another option."""
        if self.mode not in REDUCED_BY_OPTIMIZER:
            who = "FSDP2" if self.mode in WITH_FULLY_SHARD else "DDP"
            raise typer.BadParameter(
                f"--step-in-backward is for --parallel {' and '.join(REDUCED_BY_OPTIMIZER)}, in which the optimizer "
                f"reduces the gradients; with {self.mode} {who} does: pass --stage 2, or leave it out"
            )
        if self.clip:
            raise typer.BadParameter(
                f"--step-in-backward uses each gradient before the norm of all is known, so they cannot be clipped to "
                f"--clip {self.clip:g}: pass --clip 0"
            )
        if self.overlap_forward:
            raise typer.BadParameter(
                "--step-in-backward gathers parameters during backward, so --overlap-forward has nothing to overlap: "
                "give one of them"
            )

    @property
    def mode(self) -> Mode:
        """The mode that --parallel or --stage selects."""
        return self.parallel or (Mode.ZERO2 if self.stage == 2 else Mode.ZERO1)

    @property
    def first_average_step(self) -> int:
        """t0 in steps, which --t0 gives directly and --t0-share as a share of --steps."""
        if self.t0 is not None:
            return self.t0
        return round((0.5 if self.t0_share is None else self.t0_share) * self.steps)

    @property
    def checkpoint_folder(self) -> str:
        """The folder in which checkpoints are written, and in which --resume looks for one."""
        return str(self.out / "checkpoint") if self.checkpoint is None else self.checkpoint

    def lr_factor(self, step: int) -> float:
        """The factor of the learning rate in the step after `step` steps, for `LambdaLR`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        match self.schedule:
            case Schedule.CONSTANT:
                return 1.0
            case Schedule.LINEAR:
                return max(0.0, 1.0 - done)
            case Schedule.COSINE:
                return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

    def plain(self) -> dict[str, Any]:
        """Every option as a plain value for files; paths and enumeration members become strings."""
        return {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path | StrEnum) else value
