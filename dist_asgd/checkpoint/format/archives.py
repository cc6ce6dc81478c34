"""Tensors in the form of ``torch.save``, which takes longer over a small one than writing it.

An archive is a *frame* around the elements, and frames are equal for all tensors of one dtype, shape and strides: the
first is made by ``torch.save``, the others are that one around their own elements.
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from typing import Any, BinaryIO, Protocol, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.utils.serialization import config

from ...storage.memory_order import memory_strides
from .files import CheckpointError
from .pickles import check_cost

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


# --- reading ---------------------------------------------------------------------------------------------

# Deeper values are refused: those who walk them (pickle, copy, repr) recurse.
MAX_DEPTH = 64


class KnownFrames:
    """What stands around the elements in archives that were loaded and found sound, by dtype, shape and length.

    Whatever has the same around its elements is the like archive of these: it need not be unpickled again.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[torch.dtype, torch.Size, int], tuple[bytes, bytes, tuple[int, ...]]] = {}

    def tensor_in(self, data: bytes, dtype: torch.dtype, shape: torch.Size) -> Tensor | None:
        """The tensor in ``data``, in memory of its own; None where nothing like it was loaded."""
        before, after, strides = self._known.get((dtype, shape, len(data)), (b"", b"", ()))
        if not before or not (data.startswith(before) and data.endswith(after)):
            return None
        tensor = torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
        elements_of(tensor)[:] = memoryview(data)[len(before) : len(data) - len(after)]
        return tensor

    def learn(self, data: bytes, tensor: Tensor) -> None:
        """``tensor`` was in ``data``: the only one, dense, and as it lies there, or it is not remembered."""
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found = [(record.filename.partition("/")[2], _place(data, record)) for record in archive.infolist()]
        stored, records = [place for name, place in found if name.startswith("data/")], dict(found)
        dense = memory_strides(tensor) == tensor.stride() and not (tensor.is_conj() or tensor.is_neg())
        if not dense or len(stored) != 1 or not 0 < tensor.nbytes == stored[0].stop - stored[0].start:
            return
        # Others are turned around by torch.
        if data[records.get("byteorder", slice(0))] != sys.byteorder.encode():
            return
        around = data[: stored[0].start], data[stored[0].stop :], tensor.stride()
        self._known[tensor.dtype, tensor.shape, len(data)] = around


def load_tensor(data: bytes, shape: torch.Size, properties: TensorProperties, what: str, frames: KnownFrames) -> Tensor:
    """The tensor in ``data``, on the CPU: of this shape and dtype, or CheckpointError, which ``what`` begins."""
    known = frames.tensor_in(data, properties.dtype, shape)
    if known is not None:
        return known
    tensor = _load(data, what)
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise CheckpointError(f"dist_asgd: {what} holds {type(tensor).__name__}, no plain tensor.")
    if tensor.shape != shape or tensor.dtype != properties.dtype:
        raise CheckpointError(
            f"dist_asgd: {what} holds a tensor {list(tensor.shape)} {tensor.dtype}, the metadata says {list(shape)} "
            f"{properties.dtype}."
        )
    frames.learn(data, tensor)
    return tensor


def load_object(data: bytes, what: str) -> Any:
    """The object in ``data``: plain values and tensors, or CheckpointError, which ``what`` begins."""
    value = _load(data, what)
    if _depth(value) > MAX_DEPTH:
        raise CheckpointError(f"dist_asgd: {what} is nested more than {MAX_DEPTH} deep.")
    return value


def dump_object(value: Any) -> io.BytesIO:
    """``value`` serialized anew, for a reader that would unpickle whatever it is given."""
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream


def _depth(value: Any) -> int:
    """How deep containers lie in containers; counts to a little beyond ``MAX_DEPTH`` only."""
    level, seen, depth = [value], set[int](), 0
    while level and depth <= MAX_DEPTH:
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict | list | tuple | set) and id(item) not in seen:
                seen.add(id(item))
                inner += [*item, *item.values()] if isinstance(item, dict) else item
        level = inner
        depth += bool(level)
    return depth


def _load(data: bytes, what: str) -> Any:
    try:
        _check_archive(data)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # Whatever the bytes make zipfile and torch stumble over, it is the bytes.
        text = str(error).splitlines()
        raise CheckpointError(
            f"dist_asgd: {what} is damaged, or holds more than tensors and plain values; nothing of it was run: "
            f"{text[0][:300] if text else type(error).__name__}"
        ) from error


def _check_archive(data: bytes) -> None:
    """ValueError unless every record is stored as it is and has room in ``data``: no zip bombs, no legacy formats.

    Nor is there a pickle in it that would take longer, or more memory, than its length allows.
    """
    if not data.startswith(b"PK\x03\x04"):
        raise ValueError("it does not begin as a torch.save archive")
    total, pickles = 0, 0
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise ValueError(f"its record {record.filename[:80]!r} is compressed")
            total += record.file_size
            if record.filename.endswith("data.pkl") and total <= len(data):
                pickles += 1
                check_cost(data[_place(data, record)])
    if total > len(data):
        raise ValueError(f"its records claim {total} bytes, it has {len(data)}")
    if pickles != 1:
        raise ValueError(f"it has {pickles} records data.pkl, wanted one")


def _place(data: bytes, record: zipfile.ZipInfo) -> slice:
    """Where an uncompressed record lies, as it is: torch need not have given it a checksum."""
    lengths = record.header_offset + 26
    if lengths + 4 > len(data):
        raise ValueError(f"its record {record.filename[:80]!r} is not there")
    name_length, extra_length = struct.unpack_from("<HH", data, lengths)
    start = lengths + 4 + name_length + extra_length
    return slice(start, start + record.file_size)
