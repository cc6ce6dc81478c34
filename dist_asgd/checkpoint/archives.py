"""Tensors in the form of ``torch.save``, which takes longer over a small one than writing it.

An archive is a *frame* around the elements, and frames are equal for all tensors of one dtype, shape and strides: the
first is made by ``torch.save``, the others are that one around their own elements.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO, Protocol, cast

import torch
from torch import Tensor
from torch.utils.serialization import config

Frame = tuple[bytes, bytes]
Frames = dict[tuple[torch.dtype, torch.Size, tuple[int, ...]], Frame | None]
# What is looked at to recognise the elements of a tensor among what is written.
_ENDS = slice(0, 64), slice(-64, None)


class Sink(Protocol):
    """What is written to."""

    def write(self, data: Any) -> int: ...


class Archives:
    """Writes tensors to ``sink``; ``frames`` are kept, for others too."""

    def __init__(self, sink: Sink, frames: Frames) -> None:
        self._sink = sink
        self._frames = frames

    def write(self, tensor: Tensor) -> None:
        """The archive of a tensor on the CPU; no copy where it is dense in memory."""
        tensor = _dense(tensor)
        key = (tensor.dtype, tensor.shape, tensor.stride())
        frame = self._frames.get(key)
        if frame is not None:
            for part in (frame[0], elements_of(tensor), frame[1]):
                self._sink.write(part)
            return
        recorder = _Recorder(self._sink, tensor)
        # The manifest's hash does what the archive's checksum would, at a tenth of the time.
        with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            torch.save(tensor, cast(BinaryIO, recorder))
        self._frames[key] = recorder.frame


def elements_of(tensor: Tensor) -> memoryview:
    """The bytes of a dense tensor, in memory order; shares memory."""
    return memoryview(cast(Any, _flat(tensor).numpy()))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _dense(tensor: Tensor) -> Tensor:
    """``tensor`` on storage of its own size, as ``torch.save`` writes whole storages; no copy where it is dense."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0 or extent != tensor.numel() or tensor.is_conj() or tensor.is_neg():
        return tensor.clone()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return torch.from_numpy(_flat(tensor).numpy()).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


class _Recorder(io.RawIOBase):
    """Passes on what is written, and keeps what stands before and after the elements of ``tensor``."""

    def __init__(self, sink: Sink, tensor: Tensor) -> None:
        super().__init__()
        self._sink = sink
        self._elements = elements_of(tensor)
        self._parts = [bytearray()]

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) == len(self._elements) and all(view[end] == self._elements[end] for end in _ENDS):
            self._parts.append(bytearray())
        else:
            self._parts[-1] += view
        return self._sink.write(view)

    @property
    def frame(self) -> Frame | None:
        """Before and after; None where it is not plain which of what was written are the elements."""
        return (bytes(self._parts[0]), bytes(self._parts[1])) if len(self._parts) == 2 else None
