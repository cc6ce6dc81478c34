"""Safetensors files that are written one tensor at a time; the library's own writer wants all tensors at once.

``export_averaged`` and the commands ``export``, ``average`` and ``consolidate`` write through ``TensorFiles``.

A file begins with 8 bytes, the length of a JSON header. The header gives each tensor's dtype, shape and byte range, and
the tensors' bytes follow, little-endian and row-major. The byte ranges follow from the shapes alone, so tensors may be
written in any order. Large results are several files with an index beside them, as ``transformers`` and others load
them::

    model-00001-of-00002.safetensors  model-00002-of-00002.safetensors  model.safetensors.index.json
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import safetensors
import torch
from torch import Tensor

from .directory import sync_directory
from .locks import open_alone
from .output import Output, check_free, siblings
from .paths import AnyPath

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
DEFAULT_MAX_BYTES = 5_000_000_000
_ALIGNMENT = 8
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype and shape of one tensor that will be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Location:
    """Where a tensor is written: the number of the file, and the offset of its first byte there."""

    file: int
    offset: int


def check_out(out: AnyPath, overwrite: bool) -> None:
    """Raise ValueError unless ``out`` names a safetensors file in an existing directory, and may be written there."""
    if out.suffix != SUFFIX:
        raise ValueError(f"dist_asgd: {out} must end in {SUFFIX}.")
    check_free(out, outputs_at(out), overwrite)


def outputs_at(out: AnyPath) -> list[AnyPath]:
    """List the files that an earlier export to ``out`` has left: one file, or an index and its files."""
    stem = re.escape(out.name.removesuffix(SUFFIX))
    pattern = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors|{stem}\.safetensors\.index\.json")
    return [path for path in siblings(out) if pattern.fullmatch(path.name)]


class TensorFiles:
    """Writes tensors: ``with TensorFiles(out, specs) as files: files.write(name, tensor)``, for all ``specs``.

    Tensors come in any order. They go into one file, or into several with an index if they have more than
    ``max_bytes``. The files have temporary names, and take their own when the block ends; if it ends with an exception
    they are removed. Those of a store are written to a temporary folder, and uploaded at the end. Raises OSError if the
    disk is full or not writable, and ValueError for tensors that the format does not hold.
    """

    def __init__(
        self,
        out: AnyPath,
        specs: Mapping[str, TensorSpec],
        *,
        metadata: Mapping[str, str],
        max_bytes: int = DEFAULT_MAX_BYTES,
        overwrite: bool = False,
    ) -> None:
        check_out(out, overwrite)
        for name, spec in specs.items():
            if spec.dtype not in DTYPE_NAMES:
                raise ValueError(
                    f"dist_asgd: {name} has dtype {spec.dtype}, which safetensors files do not hold. Choose another "
                    f"dtype for the export, or consolidate to a .pt file."
                )
        self._target = out
        self._output = Output(out)
        self._overwrite = overwrite
        self._specs = specs
        self._metadata = {"format": "pt", **metadata}
        self._locations: dict[str, _Location] = {}
        self._waiting = set(specs)
        self._names = self._lay_out(max_bytes)
        self._files: list[BinaryIO] = []

    def _lay_out(self, max_bytes: int) -> list[list[str]]:
        """Return the names of the tensors of each file, in the order in which their bytes follow each other."""
        groups: list[list[str]] = [[]]
        filled = 0
        for name, spec in self._specs.items():
            if groups[-1] and filled + spec.bytes > max_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += spec.bytes
        # Large elements come first: then every tensor is aligned to the size of its elements.
        return [sorted(names, key=lambda name: -self._specs[name].dtype.itemsize) for names in groups]

    @property
    def paths(self) -> list[AnyPath]:
        """The files with tensors, under their final names."""
        return [self._target.with_name(name) for name in self._file_names]

    @property
    def _file_names(self) -> list[str]:
        count, name = len(self._names), self._target.name
        if count == 1:
            return [name]
        return [f"{name.removesuffix(SUFFIX)}-{i + 1:05d}-of-{count:05d}{SUFFIX}" for i in range(count)]

    @property
    def _local_paths(self) -> list[Path]:
        return [self._output.local.with_name(name) for name in self._file_names]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.bytes for spec in self._specs.values())

    def __enter__(self) -> TensorFiles:
        self.open()
        return self

    def open(self) -> None:
        """Create the files under temporary names, and write their headers."""
        try:
            self._output.open()
            for number, (names, path) in enumerate(zip(self._names, self._local_paths, strict=True)):
                self._files.append(open_alone(_partial(path)))
                self._begin(number, names)
        except BaseException:
            self.discard()
            raise

    def _begin(self, number: int, names: Sequence[str]) -> None:
        """Write the header of one file, and give the file its full size."""
        entries: dict[str, object] = {"__metadata__": self._metadata}
        start = 0
        for name in names:
            spec = self._specs[name]
            stop = start + spec.bytes
            entries[name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": spec.shape,
                "data_offsets": [start, stop],
            }
            self._locations[name] = _Location(number, start)
            start = stop
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % _ALIGNMENT)
        for name in names:
            location = self._locations[name]
            self._locations[name] = _Location(location.file, 8 + len(header) + location.offset)
        file = self._files[number]
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + start)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, on any device and with any strides; raises ValueError unless it fits its spec."""
        spec = self._specs[name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype or name not in self._waiting:
            raise ValueError(
                f"dist_asgd: {name} is {list(tensor.shape)} {tensor.dtype}, wanted {list(spec.shape)} {spec.dtype}, "
                f"once."
            )
        location = self._locations[name]
        file = self._files[location.file]
        file.seek(location.offset)
        write_bytes(file, tensor)
        self._waiting.discard(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._files:
                self.commit()
        finally:
            self.discard()

    def commit(self) -> None:
        """Give the files their names; raises ValueError if a tensor is missing. The end of the block calls it, too."""
        if self._waiting:
            raise ValueError(f"dist_asgd: {sorted(self._waiting)[0]} was not written, so neither is {self._target}.")
        paths = self._local_paths
        for file, path, names in zip(self._files, paths, self._names, strict=True):
            file.flush()
            os.fsync(file.fileno())
            with safetensors.safe_open(_partial(path), "pt") as written:
                if set(written.keys()) != set(names):
                    raise RuntimeError(f"dist_asgd: {path} did not come out as it should.")
        # Another export may have come first since this one has begun.
        check_out(self._target, self._overwrite)
        stale = {path.name for path in outputs_at(self._target)} - set(self._file_names)
        for file, path in zip(self._files, paths, strict=True):
            # Closed afterwards: until it has its own name, its lock keeps other writers away.
            _partial(path).replace(path)
            file.close()
        local = self._output.local
        # Loaders prefer a single file to an index, so a file of an earlier export would hide the new ones.
        for name in stale:
            local.with_name(name).unlink(missing_ok=True)
        index = [self._write_index()] if len(paths) > 1 else []
        sync_directory(local.parent)
        # The index comes last: with it the export is whole.
        self._output.publish([*self._file_names, *index], stale - set(index))
        self._files.clear()

    def _write_index(self) -> str:
        """Write the index of several files, and return its name."""
        names = self._file_names
        weight_map = {name: names[location.file] for name, location in self._locations.items()}
        body = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        index = self._output.local.with_name(self._target.name.removesuffix(SUFFIX) + INDEX_SUFFIX)
        with _partial(index).open("w") as file:
            file.write(json.dumps(body, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        _partial(index).replace(index)
        return index.name

    def discard(self) -> None:
        """Remove the files that do not have their names yet; after ``commit`` there are none."""
        for file, path in zip(self._files, self._local_paths, strict=False):
            # Closing writes what is buffered, and fails again if writing has failed.
            with contextlib.suppress(OSError):
                file.close()
            with contextlib.suppress(FileNotFoundError):
                _partial(path).unlink()
        self._files.clear()
        self._output.discard()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def write_bytes(file: BinaryIO, tensor: Tensor) -> None:
    """Write the elements of ``tensor``, row-major and little-endian."""
    if sys.byteorder != "little":
        raise RuntimeError("dist_asgd: safetensors files are little-endian, this machine is not.")
    plain = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    if plain.nbytes:
        file.write(memoryview((ctypes.c_ubyte * plain.nbytes).from_address(plain.data_ptr())))
