"""Text as words: the vocabulary, the columns that ranks read, and how long the window of each step is.

column  one contiguous stretch of the text; a rank trains on several side by side, each window after the one before
window  the words of all columns that one step trains on, and the word after each of them
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from corpus import Bytes, Corpus

# Identifiers, numbers, ends of lines, and every other byte that is no space.
_WORD = re.compile(rb"[A-Za-z_][A-Za-z_0-9]*|[0-9]+|\n|[^\s]")
UNKNOWN = 0  # the number of all words that are not in the vocabulary

# As in the program of Merity et al. 2017: a window is half as long now and then, and its length varies by some words.
_FULL_LENGTH_SHARE = 0.95
_LENGTH_DEVIATION = 5.0
_SHORTEST = 5


@dataclass(frozen=True)
class WordCorpus:
    """The numbers of the words to train on, and of those that are held out; both are 1-D."""

    train: Tensor
    held_out: Tensor
    num_words: int  # of the vocabulary, with the unknown word
    fingerprint: int


def read_words(corpus: Corpus, num_words: int, num_train: int, num_held_out: int) -> WordCorpus:
    """Cut the first words out of both texts; the vocabulary has the words that occur most often in training.

    Raises ValueError if there are fewer than two words in one of the texts.
    """
    train = list(islice(_words_of(corpus.train), num_train))
    held_out = list(islice(_words_of(corpus.held_out), num_held_out))
    if min(len(train), len(held_out)) < 2:
        raise ValueError(f"{len(train)} words to train on and {len(held_out)} held out are too few: give more text")
    # Words that occur equally often come in the order of the text, which is the same on all ranks.
    numbers = {word: 1 + number for number, (word, _) in enumerate(Counter(train).most_common(num_words - 1))}
    return WordCorpus(_numbered(train, numbers), _numbered(held_out, numbers), 1 + len(numbers), corpus.fingerprint)


def _words_of(text: Bytes) -> Iterator[bytes]:
    return (match.group() for match in _WORD.finditer(text.tobytes()))


def _numbered(words: list[bytes], numbers: dict[bytes, int]) -> Tensor:
    return torch.tensor([numbers.get(word, UNKNOWN) for word in words])


def columns_of(words: Tensor, num_columns: int, first: int, last: int) -> Tensor:
    """The columns from `first` up to `last` of `num_columns` equal ones, (time, last - first); a rest is left out.

    Raises ValueError if a column would have no word and the word after it.
    """
    length = len(words) // num_columns
    if length < 2:
        raise ValueError(f"{len(words)} words are too few for {num_columns} columns: give more text, or lower --batch")
    return words[: length * num_columns].view(num_columns, length)[first:last].t().contiguous()


@dataclass(frozen=True)
class Window:
    """The words of one step: rows `start` up to `start + length` of the columns."""

    start: int
    length: int


def windows(seed: int, num_steps: int, num_rows: int, bptt: int) -> list[Window]:
    """The window of each step: about `bptt` rows that follow those of the step before, or begin at the top again.

    Its length is drawn anew in each step, so that the text is cut elsewhere in each pass over it (section 5 of Merity
    et al. 2017). It is the same on all ranks. `num_rows` are those of the columns.
    """
    random: np.random.Generator = np.random.default_rng(seed)
    drawn: list[Window] = []
    start = 0
    for _ in range(num_steps):
        mean = bptt if random.random() < _FULL_LENGTH_SHARE else bptt / 2
        length = max(min(_SHORTEST, bptt), int(random.normal(mean, min(_LENGTH_DEVIATION, bptt / 4))))
        if start + 2 > num_rows:
            start = 0
        length = min(length, num_rows - 1 - start)
        drawn.append(Window(start, length))
        start += length
    return drawn


def rows(columns: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """The words of a window and those that follow them, (length, columns) each."""
    stop = window.start + window.length
    return columns[window.start : stop], columns[window.start + 1 : stop + 1]
