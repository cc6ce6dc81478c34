"""Reading tensors and objects in the form of ``torch.save`` from bytes that may be damaged or hostile.

archive   the bytes that ``torch.save`` writes: a zip file with a pickle and the elements of each tensor, uncompressed
frame     the bytes of an archive before and after the elements of its only tensor. Frames are equal for all tensors of
          one dtype, shape and strides, so an archive in a known frame is read without unpickling it again
cost      an upper bound for the number of values that a pickle makes

The reader calls ``load_tensor`` and ``load_object`` with the bytes of one chunk each, after checking their hash.
"""

from __future__ import annotations

import io
import pickletools
import struct
import sys
import zipfile
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorProperties

from .manifest import CheckpointError

# Modules may keep bytes in one (get_extra_state), and reading it runs no code of the file.
torch.serialization.add_safe_globals([io.BytesIO])
# Deeper values are refused, because pickle, copy and repr recurse and would overflow the stack.
MAX_DEPTH = 64


class FrameCache:
    """The frames of archives that were loaded and found sound, by dtype, shape and length of the archive.

    One per open checkpoint. An archive with the same frame is the same archive around other elements.
    """

    def __init__(self) -> None:
        self._frames: dict[tuple[torch.dtype, torch.Size, int], tuple[bytes, bytes, tuple[int, ...]]] = {}

    def tensor_in(self, data: bytes, dtype: torch.dtype, shape: torch.Size) -> Tensor | None:
        """Return the tensor in ``data``, in memory of its own; None if no archive with this frame was loaded."""
        before, after, strides = self._frames.get((dtype, shape, len(data)), (b"", b"", ()))
        if not before or not (data.startswith(before) and data.endswith(after)):
            return None
        # Copied: a view of ``data`` would be read-only, and not aligned.
        tensor = torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
        flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        memoryview(cast(Any, flat.numpy()))[:] = memoryview(data)[len(before) : len(data) - len(after)]
        return tensor

    def learn(self, data: bytes, tensor: Tensor) -> None:
        """Keep the frame of ``data``, which ``tensor`` was loaded from, if that is its only tensor and dense."""
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            # Names begin with the archive's own name, which torch takes from the file's.
            ranges = [(record.filename.partition("/")[2], _byte_range(data, record)) for record in archive.infolist()]
        elements, records = [range_ for name, range_ in ranges if name.startswith("data/")], dict(ranges)
        # empty_like() keeps the strides of dense tensors, and only of these.
        kept = torch.empty_like(tensor, device="meta").stride() == tensor.stride()
        dense = kept and not (tensor.is_conj() or tensor.is_neg())
        if not dense or len(elements) != 1 or not 0 < tensor.nbytes == elements[0].stop - elements[0].start:
            return
        # Torch swaps the bytes of archives of the other byte order, which copying them would not do.
        if data[records.get("byteorder", slice(0))] != sys.byteorder.encode():
            return
        frame = data[: elements[0].start], data[elements[0].stop :], tensor.stride()
        self._frames[tensor.dtype, tensor.shape, len(data)] = frame


def load_tensor(data: bytes, shape: torch.Size, properties: TensorProperties, what: str, frames: FrameCache) -> Tensor:
    """Return the tensor in ``data``, on the CPU.

    Raises CheckpointError, whose text begins with ``what``, unless it has this shape and the dtype of ``properties``.
    """
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
    """Return the object in ``data``, plain values and tensors; raises CheckpointError, which begins with ``what``."""
    value = _load(data, what)
    if _depth(value) > MAX_DEPTH:
        raise CheckpointError(f"dist_asgd: {what} is nested more than {MAX_DEPTH} deep.")
    return value


def serialized(value: Any, what: str) -> bytes:
    """Return ``value`` in the form of ``torch.save``; raises CheckpointError if ``load_object`` would not load it."""
    stream = io.BytesIO()
    torch.save(value, stream)
    data = stream.getvalue()
    load_object(data, what)
    return data


def dump_object(value: Any) -> io.BytesIO:
    """Serialize ``value`` anew, for DCP's planners, which unpickle whatever they are given."""
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream


def _depth(value: Any) -> int:
    """Return how deep containers lie in containers; stops counting just beyond ``MAX_DEPTH``."""
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
        # Any error of zipfile or torch means that the bytes are damaged: nothing else went into the call.
        text = str(error).splitlines()
        raise CheckpointError(
            f"dist_asgd: {what} is damaged, or holds more than tensors and plain values; nothing of it was run: "
            f"{text[0][:300] if text else type(error).__name__}"
        ) from error


def _check_archive(data: bytes) -> None:
    """Raise ValueError unless every record is stored uncompressed and has room in ``data`` (no zip bombs, no legacy
    formats), and there is one pickle, which takes no more time and memory than its length allows."""
    if not data.startswith(b"PK\x03\x04"):
        raise ValueError("it does not begin as a torch.save archive")
    total, pickles = 0, 0
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for record in archive.infolist():
            # Uncompressed, a record takes as many bytes as it has: the memory that is asked for is bounded by the file.
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise ValueError(f"its record {record.filename[:80]!r} is compressed")
            total += record.file_size
            if record.filename.endswith("data.pkl") and total <= len(data):
                pickles += 1
                check_cost(data[_byte_range(data, record)])
    if total > len(data):
        raise ValueError(f"its records claim {total} bytes, it has {len(data)}")
    # torch reads one; a second one could be another program's, and hide the content from this check.
    if pickles != 1:
        raise ValueError(f"it has {pickles} records data.pkl, wanted one")


def _byte_range(data: bytes, record: zipfile.ZipInfo) -> slice:
    """Return the byte range of an uncompressed record. ``zipfile`` would insist on a checksum, which torch may omit."""
    lengths = record.header_offset + 26
    if lengths + 4 > len(data):
        raise ValueError(f"its record {record.filename[:80]!r} is not there")
    name_length, extra_length = struct.unpack_from("<HH", data, lengths)
    start = lengths + 4 + name_length + extra_length
    return slice(start, start + record.file_size)


# --- the cost of reading a pickle ------------------------------------------------------------------------

_COST_MARK = -1
_FREE_SIZE = 1 << 20
# How many values an opcode pops; those of _MAKES push one value, those of _ADDS add to the value below.
_MAKES: Mapping[str, int] = {
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "REDUCE": 2,
    "NEWOBJ": 2,
    "BINPERSID": 1,
}
_ADDS: Mapping[str, int] = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}
_PUTS = ("BINPUT", "LONG_BINPUT")
_GETS = ("BINGET", "LONG_BINGET")
_NOTHING = ("PROTO", "STOP")
# Called with a number they allocate as many bytes, a size of the attacker's choice.
_REFUSED_NAMES = ("builtins bytearray", "__builtin__ bytearray", "builtins bytes", "__builtin__ bytes")


def check_cost(pickle: bytes) -> None:
    """Raise ValueError if reading ``pickle`` could cost more than its length allows, or if torch did not write it.

    The stack and the memo hold the cost of each value instead of the value: values that are referred to again count
    again, so that a short pickle cannot stand for exponentially many.
    """
    limit = _FREE_SIZE + 4 * len(pickle)
    stack: list[int] = []
    memo: dict[int, int] = {}

    def pop_to_mark() -> int:
        total = 0
        while (size := stack.pop()) != _COST_MARK:
            total += size
        return total

    try:
        for opcode, arg, _ in pickletools.genops(pickle):
            name = opcode.name
            if name in _NOTHING:
                continue
            if name == "MARK":
                stack.append(_COST_MARK)
                continue
            if name in _PUTS:
                memo[int(arg or 0)] = stack[-1]
                continue
            if name in _GETS:
                stack.append(memo[int(arg or 0)])
            elif name in _MAKES:
                stack.append(1 + sum(stack.pop() for _ in range(_MAKES[name])))
            elif name in _ADDS:
                added = sum(stack.pop() for _ in range(_ADDS[name]))
                stack[-1] += added
            elif name == "TUPLE":
                stack.append(1 + pop_to_mark())
            elif name in ("APPENDS", "SETITEMS"):
                added = pop_to_mark()
                stack[-1] += added
            elif not opcode.stack_before and len(opcode.stack_after) == 1:
                if name == "GLOBAL" and arg in _REFUSED_NAMES:
                    raise ValueError(f"it calls {arg}, which takes any number of bytes")
                stack.append(1)
            else:
                raise ValueError(f"it has the opcode {name}, which torch does not write")
            if stack[-1] > limit:
                raise ValueError("its values hold each other so often that reading them would take for ever")
    except (IndexError, KeyError) as error:
        raise ValueError("its pickle takes what it has not put") from error
