"""The text to train on: files are read as bytes and split into blocks, of which some are held out for evaluation.

The same files give the same split everywhere, and the batch of a step depends on the seed, the step and the rank
only. A resumed run therefore trains on the same batches as an uninterrupted one.
"""

import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]

_FILE_SEPARATOR = b"\0"
_BLOCKS_PER_HELD_OUT = 20
_LARGEST_BLOCK_BYTES = 65536


@dataclass(frozen=True)
class Corpus:
    """The bytes to train on, and the bytes that are held out for evaluation."""

    train: Bytes  # (train_bytes,)
    held_out: Bytes  # (held_out_bytes,)
    num_files: int
    fingerprint: int  # a checksum of the text and its split, which has to be equal on all ranks

    def batch(self, *, seed: int, step: int, batch_index: int, num_batches: int, windows: int, context: int) -> Tensor:
        """Draw the windows of one backward pass, (windows, context + 1).

        A step has `num_batches` of these, one for each backward pass of each rank, numbered by `batch_index`.
        """
        random = np.random.default_rng((seed, step))
        starts = random.integers(len(self.train) - context, size=(num_batches, windows))[batch_index]
        return _windows(self.train, starts, context)

    def held_out_windows(self, *, windows: int, context: int) -> Tensor:
        """At most `windows` windows, (windows, context + 1), spread evenly over the held-out bytes."""
        fitting = (len(self.held_out) - 1) // context
        starts = np.linspace(0, fitting - 1, min(windows, fitting)).astype(np.int64) * context
        return _windows(self.held_out, starts, context)


def _windows(text: Bytes, starts: npt.NDArray[np.int64], context: int) -> Tensor:
    """The windows that begin at `starts`, (len(starts), context + 1)."""
    return torch.from_numpy(text[starts[:, None] + np.arange(context + 1)].astype(np.int64))


def read_corpus(paths: Sequence[Path] | None, context: int) -> Corpus:
    """Read and split the files under `paths`, or Python's own library sources if `paths` is None.

    Raises ValueError if there are no files, or too few bytes for a window of `context` bytes.
    """
    files = list(_standard_library_files() if paths is None else _files_under(paths))
    if not files:
        raise ValueError("no files to train on: wanted at least one under " + ", ".join(map(str, paths or [])))
    text = np.frombuffer(_FILE_SEPARATOR.join(file.read_bytes() for file in files), dtype=np.uint8)
    train, held_out = _split(text)
    if min(len(train), len(held_out)) <= context:
        raise ValueError(
            f"{len(text)} bytes of text are too few for a context of {context}: "
            f"the held-out part of {len(held_out)} bytes holds no window"
        )
    fingerprint = zlib.crc32(held_out.tobytes(), zlib.crc32(train.tobytes()))
    return Corpus(train=train, held_out=held_out, num_files=len(files), fingerprint=fingerprint)


def _split(text: Bytes) -> tuple[Bytes, Bytes]:
    """Split into bytes to train on and held-out bytes: every 20th block. Blocks of a short text are short, too."""
    block_bytes = max(1, min(_LARGEST_BLOCK_BYTES, len(text) // (2 * _BLOCKS_PER_HELD_OUT)))
    block = np.arange(len(text)) // block_bytes
    is_held_out = block % _BLOCKS_PER_HELD_OUT == _BLOCKS_PER_HELD_OUT // 2
    return text[~is_held_out], text[is_held_out]


def _standard_library_files() -> Iterator[Path]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages"}  # installed packages differ between machines
    for file in sorted(folder.rglob("*.py")):
        if installed.isdisjoint(file.relative_to(folder).parts):
            yield file


def _files_under(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from (file for file in sorted(path.rglob("*")) if file.is_file())
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"no such file or folder: {path}")
