"""One checkpoint file: the whole model and optimizer state, in torch's own layouts, written by rank 0."""

import io
import os
from pathlib import Path
from typing import Any

import torch

_FILE_NAME = "checkpoint.pt"
_FORMAT = "byte-transformer training checkpoint 1"


def checkpoint_file(folder: Path) -> Path:
    """Where the checkpoint of a folder is."""
    return folder / _FILE_NAME


def write_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    """Replaces the folder's checkpoint: whoever looks, also after a crash, finds one that is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / (_FILE_NAME + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            torch.save({"format": _FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(checkpoint_file(folder))
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_folder(folder)  # the new name itself must survive a power cut


def read_checkpoint(folder: Path) -> bytes:
    """The checkpoint file's bytes, for all ranks to decode."""
    file = checkpoint_file(folder)
    if not file.is_file():
        raise ValueError(f"no checkpoint to resume from: wanted {file}; leave out --resume to start anew")
    return file.read_bytes()


def decode_checkpoint(encoded: bytes) -> dict[str, Any]:
    """The content of a checkpoint file; executes nothing from it."""
    try:
        content = torch.load(io.BytesIO(encoded), map_location="cpu", weights_only=True)
    except Exception as failure:  # torch.load has no error type of its own for a damaged file
        raise ValueError(
            f"the checkpoint is damaged ({len(encoded)} bytes, {type(failure).__name__}): "
            "restore it from a copy, or leave out --resume to start anew"
        ) from failure
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"not a checkpoint of this trainer: wanted the format {_FORMAT!r}")
    return content


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
