"""Text for training: files read as bytes, split into blocks of which some are held out.

The same files give the same split everywhere, and the batch of a step depends on nothing but the seed, the
step and the rank: a resumed run sees what an uninterrupted one would have seen.
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
    """The bytes to train on and those held out."""

    train: Bytes  # (train_bytes,)
    held_out: Bytes  # (held_out_bytes,)
    num_files: int
    fingerprint: int  # of the text and its split: equal on all ranks, or they train on different data

    def batch(self, *, seed: int, step: int, slot: int, num_slots: int, windows: int, context: int) -> Tensor:
        """Training windows, (windows, context + 1); each rank and accumulation of a step is one slot."""
        random = np.random.default_rng((seed, step))
        starts = random.integers(len(self.train) - context, size=(num_slots, windows))[slot]
        return _windows(self.train, starts, context)

    def held_out_windows(self, *, windows: int, context: int) -> Tensor:
        """Windows spread evenly over the held-out bytes, at most `windows`, (windows, context + 1)."""
        fitting = (len(self.held_out) - 1) // context
        starts = np.linspace(0, fitting - 1, min(windows, fitting)).astype(np.int64) * context
        return _windows(self.held_out, starts, context)


def _windows(text: Bytes, starts: npt.NDArray[np.int64], context: int) -> Tensor:
    return torch.from_numpy(text[starts[:, None] + np.arange(context + 1)].astype(np.int64))


def read_corpus(paths: Sequence[Path] | None, context: int) -> Corpus:
    """Reads and splits the files under `paths`, or Python's own library sources where there are none."""
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
    """Every 20th block is held out; a short text has short blocks, so that both parts see all of it."""
    block_bytes = max(1, min(_LARGEST_BLOCK_BYTES, len(text) // (2 * _BLOCKS_PER_HELD_OUT)))
    block = np.arange(len(text)) // block_bytes
    is_held_out = block % _BLOCKS_PER_HELD_OUT == _BLOCKS_PER_HELD_OUT // 2
    return text[~is_held_out], text[is_held_out]


def _standard_library_files() -> Iterator[Path]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages"}  # what somebody installed differs between machines
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
