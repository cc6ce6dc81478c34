"""Trains a byte-level language model with ShardedASGD, under torchrun or as `python launch/trainer/train.py`.

This is an example of every mode: `options.py` has the command line, `parallel.py` distributes the model, and
`training.py` has the training step. `launch/torchrun.sh` and `launch/demo.sh` start it.
"""

from rich.console import Console

from command import carry_out, check_same_text, start
from corpus import read_corpus
from options import TrainOptions
from processes import Processes
from stopping import StopRequest
from training import Training


def train(options: TrainOptions, processes: Processes, stop: StopRequest) -> None:
    """Train from the beginning or from a checkpoint, and report the outcome. Collective."""
    corpus = processes.together(lambda: read_corpus(options.data, options.context))
    check_same_text(corpus.fingerprint, processes)
    training = Training(options, processes, corpus, Console() if processes.is_first else None)
    text = f"{len(corpus.train) / 1e6:.1f} MB to train on and {len(corpus.held_out) / 1e6:.1f} MB held out of "
    carry_out(training, options, processes, stop, f"{text}{corpus.num_files} files")


if __name__ == "__main__":
    start(TrainOptions, train)
