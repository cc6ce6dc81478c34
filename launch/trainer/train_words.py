"""Trains a word-level language model with NT-ASGD, under torchrun or as `python launch/trainer/train_words.py`.

    torchrun --standalone --nproc-per-node 2 launch/trainer/train_words.py --stage 2

`word_options.py` has the command line, `lstm.py` the model, and `word_training.py` the training step.
"""

from rich.console import Console

from command import carry_out, check_same_text, start
from corpus import read_corpus
from processes import Processes
from stopping import StopRequest
from word_options import WordOptions
from word_training import WordTraining
from words import read_words


def train(options: WordOptions, processes: Processes, stop: StopRequest) -> None:
    """Train from the beginning or from a checkpoint, and report the outcome. Collective."""
    corpus = processes.together(
        lambda: read_words(
            read_corpus(options.data, options.bptt), options.vocabulary, options.train_words, options.eval_words
        )
    )
    check_same_text(corpus.fingerprint, processes)
    training = WordTraining(options, processes, corpus, Console() if processes.is_first else None)
    text = f"{len(corpus.train):,} words to train on and {len(corpus.held_out):,} held out, of {corpus.num_words:,}"
    carry_out(training, options, processes, stop, text)


if __name__ == "__main__":
    start(WordOptions, train)
