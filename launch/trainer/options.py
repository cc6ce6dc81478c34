"""The options of the transformer's trainer: one frozen dataclass, from which typer makes the command line."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, ClassVar

import typer

from parallel import WITH_FULLY_SHARD, WITH_REPLICAS, Mode
from run_options import RunOptions, option


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


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """Train a byte-level transformer language model with ShardedASGD, under torchrun or as one process."""

    fixed_by_checkpoint: ClassVar[tuple[str, ...]] = (
        *("d_model", "layers", "heads", "context", "tie_embedding", "dtype", "lambd", "alpha"),
        *RunOptions.fixed_by_checkpoint,
    )

    d_model: Annotated[int, option("Model", "Width.", minimum=1)] = 256
    layers: Annotated[int, option("Model", "Transformer blocks.", minimum=1)] = 6
    heads: Annotated[int, option("Model", "Attention heads; divides the width.", minimum=1)] = 4
    context: Annotated[int, option("Model", "Bytes that a prediction can look back on.", minimum=1)] = 256
    tie_embedding: Annotated[bool, option("Model", "Output layer = input embedding.")] = False
    dtype: Annotated[
        Precision,
        option(
            "Model",
            "float32; bfloat16: parameters, gradients and activations (updates below half a unit in the last "
            "place are lost); autocast: float32 parameters, gradients and average, bfloat16 matrix products.",
        ),
    ] = Precision.FLOAT32
    parallel: Annotated[
        Mode | None,
        option(
            "Ranks",
            "ddp: nothing is sharded; zero1: the optimizer's state (gradients by DDP); zero2: gradients too; fsdp2: "
            "parameters too; hybrid and hsdp: as zero2 and fsdp2 within each of --replicas. Default: zero1.",
        ),
    ] = None
    replicas: Annotated[
        int | None,
        option("Ranks", "hybrid, hsdp: number of replicas. Default: of nodes; on a single node 2.", minimum=1),
    ] = None
    tensor_parallel: Annotated[
        int,
        option("Ranks", "fsdp2, hsdp: ranks that share each layer, attention by heads, on the same data.", minimum=1),
    ] = 1
    overlap_forward: Annotated[
        bool, option("Ranks", "Gather parameters while the next step's forward runs (zero1, zero2, hybrid).")
    ] = False
    lambd: Annotated[float, option("Optimizer", "ASGD's decay term.", minimum=0)] = 1e-4
    alpha: Annotated[float, option("Optimizer", "ASGD's power for the decay of eta.", minimum=0)] = 0.75
    schedule: Annotated[Schedule, option("Optimizer", "Learning rate after the warm-up.")] = Schedule.CONSTANT
    warmup: Annotated[int, option("Optimizer", "Steps of linear warm-up.", minimum=0)] = 0
    t0: Annotated[int | None, option("Optimizer", "Averaging begins after this step.", minimum=0)] = None
    t0_share: Annotated[
        float | None, option("Optimizer", "The same as a share of --steps. Default: 0.5.", minimum=0)
    ] = None
    foreach: Annotated[bool | None, option("Optimizer", "Form of the update. Default: the optimizer's.")] = None
    accumulation: Annotated[int, option("Run", "Backward passes per optimizer step.", minimum=1)] = 1
    eval_windows: Annotated[int, option("Run", "Held-out windows, over all ranks.", minimum=1)] = 256

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if self.t0 is not None and self.t0_share is not None:
            raise typer.BadParameter("--t0 and --t0-share are two ways to say one thing: give one of them")

    @property
    def mode(self) -> Mode:
        """The mode that --parallel or --stage selects."""
        return self.parallel or super().mode

    @property
    def first_average_step(self) -> int:
        """t0 in steps, which --t0 gives directly and --t0-share as a share of --steps."""
        if self.t0 is not None:
            return self.t0
        return round((0.5 if self.t0_share is None else self.t0_share) * self.steps)

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
