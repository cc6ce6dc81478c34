"""The options of the word-level trainer: one frozen dataclass, from which typer makes the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from run_options import RunOptions, option


@dataclass(frozen=True, kw_only=True)
class WordOptions(RunOptions):
    """Train a word-level LSTM language model with NT-ASGD: ShardedASGD, which averages once validation asks for it."""

    fixed_by_checkpoint: ClassVar[tuple[str, ...]] = (
        *("vocabulary", "train_words", "width", "hidden", "layers", "bptt", "batch", "seed", "patience"),
        *RunOptions.fixed_by_checkpoint,
    )

    vocabulary: Annotated[
        int, option("Data", "Words that have a number of their own; others share one.", minimum=2)
    ] = 2000
    train_words: Annotated[int, option("Data", "Words to train on, from the beginning of the text.", minimum=2)] = (
        400_000
    )
    eval_words: Annotated[int, option("Data", "Held-out words, over all ranks.", minimum=2)] = 20_000

    width: Annotated[int, option("Model", "Width of the embedding, which is the decoder, too.", minimum=1)] = 96
    hidden: Annotated[int, option("Model", "Width of the LSTM layers but the last.", minimum=1)] = 192
    layers: Annotated[int, option("Model", "LSTM layers.", minimum=1)] = 2
    drop: Annotated[
        float, option("Model", "Share of features that are dropped, the same ones at all times.", minimum=0, maximum=1)
    ] = 0.1
    weight_drop: Annotated[
        float, option("Model", "Share of the recurrent matrices' elements that are dropped.", minimum=0, maximum=1)
    ] = 0.2

    lr: Annotated[float, option("Optimizer", "Learning rate of a window of --bptt words.", minimum=0)] = 10.0
    clip: Annotated[float, option("Optimizer", "Largest global gradient norm; 0: no clipping.", minimum=0)] = 0.25
    weight_decay: Annotated[float, option("Optimizer", "L2 penalty.", minimum=0)] = 1.2e-6
    patience: Annotated[
        int, option("Optimizer", "Latest evaluations that may stay above the lowest loss before.", minimum=1)
    ] = 5

    steps: Annotated[int, option("Run", "Optimizer steps in all.", minimum=1)] = 1500
    eval_every: Annotated[int, option("Run", "Steps between evaluations.", minimum=1)] = 25
    log_every: Annotated[int, option("Run", "Steps between lines of metrics.", minimum=1)] = 5
    bptt: Annotated[int, option("Run", "Words of a window, about: its length is drawn anew each step.", minimum=2)] = 35
    batch: Annotated[int, option("Run", "Columns of text per rank.", minimum=1)] = 16
    out: Annotated[Path, option("Files", "Metrics, TensorBoard events, picture and summary.")] = Path("runs/words")
