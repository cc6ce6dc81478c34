"""The files of a checkpoint directory, and ``manifest.json``, which lists them with a hash of each.

The reader and the command line open every file of a checkpoint through this module: names stay inside the directory,
and sizes are known before memory is taken. The writer describes the files that it made as ``FileEntry`` and ``Chunk``.

chunk     one serialized region of a tensor, or one serialized object: a byte range of a data file, which DCP's
          ``.metadata`` gives as offset and length
hash      xxh3_128, 32 hex digits. It finds damage, and files that belong to another step; it is not a signature
own hash  the last entry of the manifest, the hash of all other entries, so that damage to the manifest is recognised
format    2: the hashes of chunks are in the index (see ``index``). Of format 1, which was written before there was an
          index, the manifest has them itself
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import add, le
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import xxhash

from ...comm.agreement import SharedError
from ...version import __version__
from . import stores
from .links import cached_file
from .nearby import hint_at
from .paths import AnyPath, is_store

if TYPE_CHECKING:
    from upath import UPath

MANIFEST_NAME = "manifest.json"
FORMAT = 2
_FORMAT_WITH_CHUNKS = 1
MAX_MANIFEST_BYTES = 1 << 28
_BLOCK_BYTES = 1 << 22
_HASH_KEY = "xxh3_128"
_KEYS = {"format", "dist_asgd", "step", "world_size", "files", _HASH_KEY}
_HEX_DIGITS = frozenset("0123456789abcdef")
_NAME = re.compile(r"[A-Za-z0-9._\-]{1,255}")


class CheckpointError(SharedError):
    """A checkpoint is damaged or incomplete, or it holds something that no checkpoint of this kind holds.

    It is a RuntimeError. If one rank has it in a collective call, all ranks raise it.
    """


class StoreError(SharedError):
    """A store could not be read: that says nothing about the checkpoint, which may be whole.

    It is a RuntimeError. If one rank has it in a collective call, all ranks raise it.
    """


def _unreadable(path: AnyPath, what: str, error: OSError) -> SharedError:
    """Return the error for a file that is there, and cannot be opened or read."""
    kind = StoreError if is_store(path) else CheckpointError
    return kind(f"dist_asgd: cannot {what} {path}: {error.strerror}.")


def check_name(name: object) -> str:
    """Return ``name`` if it can only mean a file right inside the directory: no folder, no ``..``, nothing to quote.

    Raises ValueError otherwise; callers add the place where they found the name.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (".", ".."):
        text = repr(name[:80]) if isinstance(name, str) else type(name).__name__
        raise ValueError(
            f"a file named {text}; files of a checkpoint lie right inside its directory, with names of letters, "
            f"digits, '.', '_' and '-'"
        )
    return name


def open_confined(directory: AnyPath, name: str) -> tuple[BinaryIO, int]:
    """Open ``directory/name`` for reading and return it with its size in bytes; raises CheckpointError if it cannot.

    ``name`` has passed ``check_name``. Devices and pipes are refused, and links, except those of ``links``.
    """
    if is_store(directory):
        return _open_in_store(directory, name)
    path = directory / name
    target = path
    if path.is_symlink():
        cached = cached_file(directory, name)
        if cached is None:
            gone = "" if path.exists() else f" to {os.readlink(path)}, which is not there"
            raise CheckpointError(
                f"dist_asgd: {path} is a symbolic link{gone}. A checkpoint holds its own files: links are followed "
                f"only into a cache beside it (blobs of Hugging Face, .dvc/cache, .git/annex). Copy the checkpoint "
                f"with cp -rL, which copies what links lead to."
            )
        target = cached
    # O_NONBLOCK: opening a pipe that nobody writes to must not hang; fstat() refuses it afterwards.
    try:
        descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(
            f"dist_asgd: {path} is missing: the checkpoint is not whole.{hint_at(directory)}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"dist_asgd: cannot open {path}: {error.strerror}.") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise CheckpointError(f"dist_asgd: {path} is not a regular file.")
    return os.fdopen(descriptor, "rb"), status.st_size


def _open_in_store(directory: UPath, name: str) -> tuple[BinaryIO, int]:
    try:
        return stores.open_object(directory / name)
    except FileNotFoundError:
        raise CheckpointError(
            f"dist_asgd: {directory / name} is missing: the checkpoint is not whole.{hint_at(directory)}"
        ) from None
    except OSError as error:
        raise _unreadable(directory / name, "open", error) from error


def read_range(file: BinaryIO, path: AnyPath, offset: int, length: int) -> bytes:
    """Read exactly ``length`` bytes from ``offset`` on; the caller has checked that the file is at least that long."""
    try:
        file.seek(offset)
        data = file.read(length)
    except OSError as error:
        raise _unreadable(path, "read", error) from error
    if len(data) != length:
        raise CheckpointError(f"dist_asgd: {path} ends {length - len(data)} bytes early: it is truncated.")
    return data


def read_whole(directory: AnyPath, name: str, max_bytes: int) -> bytes:
    """Read a whole small file; raises CheckpointError if it has more than ``max_bytes``."""
    file, size = open_confined(directory, name)
    with file:
        if size > max_bytes:
            raise CheckpointError(
                f"dist_asgd: {directory / name} has {size} bytes, more than the {max_bytes} that such a file may have."
            )
        return read_range(file, directory / name, 0, size)


def names_in(directory: AnyPath) -> list[str]:
    """List everything right inside the directory, sorted; raises CheckpointError if there is no such directory.

    In a store only objects are listed, and no folders.
    """
    try:
        if is_store(directory):
            return sorted(stores.sizes_in(directory))
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        raise CheckpointError(f"dist_asgd: there is no checkpoint at {directory}.{hint_at(directory)}") from None
    except NotADirectoryError:
        raise CheckpointError(
            f"dist_asgd: {directory} is not a directory; a checkpoint is one.{hint_at(directory)}"
        ) from None
    except OSError as error:
        raise _unreadable(directory, "read", error) from error


# --- the manifest ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and hash of one file."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk: its byte range in a data file, and the hash of these bytes."""

    offset: int
    length: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What ``manifest.json`` says.

    Attributes:
        step: the number of steps after which the checkpoint was saved.
        world_size: how many ranks saved it.
        files: every file of the directory except the manifest, by name.
        chunks: the chunks of each data file, by its name, in order of offset; None if they are in the index (format 2).
        version: the version of dist_asgd that wrote it.
    """

    step: int
    world_size: int
    files: Mapping[str, FileEntry]
    chunks: Mapping[str, Sequence[Chunk]] | None = None
    version: str = __version__


def hash_of(data: bytes | memoryview) -> str:
    """Return the xxh3_128 of ``data`` as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_file(directory: AnyPath, name: str) -> FileEntry:
    """Return size and hash of one file, which is read in blocks."""
    file, _ = open_confined(directory, name)
    digest, size = xxhash.xxh3_128(), 0
    with file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return FileEntry(size, digest.hexdigest())


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` under a temporary name, fsync it and rename it. The caller fsyncs the directory."""
    data = checked_bytes(directory, manifest)
    beside = directory / f".{MANIFEST_NAME}.tmp"
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(directory / MANIFEST_NAME)


def checked_bytes(directory: AnyPath, manifest: Manifest) -> bytes:
    """Return the bytes of ``manifest.json``; raises CheckpointError if no reader would take them."""
    data = encode(manifest)
    if len(data) > MAX_MANIFEST_BYTES:
        raise CheckpointError(
            f"dist_asgd: {directory / MANIFEST_NAME} would have {len(data):,} bytes, more than the "
            f"{MAX_MANIFEST_BYTES:,} that can be loaded. Save from fewer ranks."
        )
    # A manifest that the reader would refuse must fail the save, and not the restart.
    decode(data, directory / MANIFEST_NAME)
    return data


def read_manifest(directory: AnyPath) -> Manifest | None:
    """Read the directory's manifest; None if it has none, CheckpointError if it is damaged or not to be trusted."""
    if MANIFEST_NAME not in names_in(directory):
        return None
    return decode(read_whole(directory, MANIFEST_NAME, MAX_MANIFEST_BYTES), directory / MANIFEST_NAME)


def check_files(directory: AnyPath, manifest: Manifest) -> list[str]:
    """Return a line for each file of the manifest that is missing or has another size; no file is read.

    Other files are none of the checkpoint's: systems and tools leave theirs (``.DS_Store``, ``.nfs...``, a model's
    ``config.json``). They are never opened, and so do no harm.
    """
    problems = []
    for name, entry in sorted(manifest.files.items()):
        path = directory / name
        try:
            file, size = open_confined(directory, name)
        except CheckpointError as error:
            problems.append(str(error).removeprefix("dist_asgd: "))
            continue
        file.close()
        if size != entry.bytes:
            how = "it is truncated" if size < entry.bytes else "it is too long"
            problems.append(f"{path} has {size} bytes, the manifest says {entry.bytes}: {how}.")
    return problems


def superfluous(directory: AnyPath, manifest: Manifest) -> list[str]:
    """List the names in the directory that the manifest does not have; no reader opens such a file."""
    return [name for name in names_in(directory) if name != MANIFEST_NAME and name not in manifest.files]


def encode(manifest: Manifest) -> bytes:
    """Return the manifest as JSON. Equal manifests have equal bytes, and ``decode`` accepts no other form of them."""
    body: dict[str, Any] = {
        "format": FORMAT if manifest.chunks is None else _FORMAT_WITH_CHUNKS,
        "dist_asgd": manifest.version,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "files": {name: {"bytes": e.bytes, _HASH_KEY: e.xxh3_128} for name, e in manifest.files.items()},
    }
    if manifest.chunks is not None:
        body["chunks"] = {n: [[c.offset, c.length, c.xxh3_128] for c in cs] for n, cs in manifest.chunks.items()}
    plain = _dump(body)
    return _signed(plain, hash_of(plain))


def _signed(plain: bytes, own: str) -> bytes:
    """Return the bytes of a manifest that has its own hash, after all other keys, from those of one that has none."""
    return plain.removesuffix(b"}\n") + f',"{_HASH_KEY}":"{own}"}}\n'.encode()


def _dump(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def decode(data: bytes, path: AnyPath) -> Manifest:
    """Parse and check a manifest that anybody may have written; CheckpointError names ``path`` and what is wrong."""

    def refuse(what: str) -> NoReturn:
        raise CheckpointError(f"dist_asgd: {path} is damaged, or was not written by dist_asgd: {what}.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # json would keep the last of two equal keys, and other programs the first.
        body = dict(pairs)
        if len(body) != len(pairs):
            refuse("a key occurs twice")
        return body

    def constant(text: str) -> NoReturn:
        # NaN and Infinity, which Python reads and JSON does not have.
        refuse(f"{text} is not a number here")

    try:
        body = json.loads(data, object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        refuse(f"not JSON as it should be ({error})")
    if not isinstance(body, dict) or set(body) - {"chunks"} != _KEYS:
        refuse(f"wanted the keys {sorted(_KEYS)}")
    # The hash comes first: damage must not be reported as another format, or as a fault of whoever wrote the file.
    own = body.pop(_HASH_KEY)
    plain = _dump(body)
    if own != hash_of(plain) or data != _signed(plain, own):
        refuse("its content does not have the hash that it gives itself")
    if body["format"] not in (_FORMAT_WITH_CHUNKS, FORMAT) or isinstance(body["format"], bool):
        raise CheckpointError(
            f"dist_asgd: {path} has format {body['format']!r:.20}, this version reads {_FORMAT_WITH_CHUNKS} and "
            f"{FORMAT}: use the version of dist_asgd that wrote it ({body['dist_asgd']!r:.40})."
        )
    if (body["format"] == _FORMAT_WITH_CHUNKS) != ("chunks" in body):
        refuse(f"wanted the key 'chunks' in format {_FORMAT_WITH_CHUNKS} alone")
    if not isinstance(body["dist_asgd"], str):
        refuse("'dist_asgd' must be a version")
    try:
        step, world_size = _count(body["step"], "step"), _count(body["world_size"], "world_size")
        files = {check_name(name): _file_entry(name, entry) for name, entry in _dict(body, "files").items()}
        chunks: dict[str, tuple[Chunk, ...]] | None = None
        if "chunks" in body:
            chunks = {name: _chunks(name, rows, files) for name, rows in _dict(body, "chunks").items()}
        # It could not hold its own hash.
        if MANIFEST_NAME in files:
            raise ValueError("it lists itself")
        if not world_size:
            raise ValueError("world_size is 0")
    except ValueError as error:
        refuse(str(error))
    return Manifest(step, world_size, files, chunks, body["dist_asgd"])


def _dict(body: dict[str, Any], key: str) -> dict[str, Any]:
    value = body[key]
    if not isinstance(value, dict):
        raise ValueError(f"'{key}' must be an object")
    return value


def _count(value: object, what: str) -> int:
    # A bool is an int for isinstance(). Below 2^63, so that it fits wherever a file offset does.
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise ValueError(f"{what} must be a whole number from 0 on")
    return value


def _hash(value: object, what: str) -> str:
    if not isinstance(value, str) or len(value) != 32 or not set(value) <= _HEX_DIGITS:
        raise ValueError(f"the hash of {what} must be 32 hex digits")
    return value


def _file_entry(name: str, entry: object) -> FileEntry:
    if not isinstance(entry, dict) or set(entry) != {"bytes", _HASH_KEY}:
        raise ValueError(f"the entry of {name} must have 'bytes' and '{_HASH_KEY}'")
    return FileEntry(_count(entry["bytes"], f"bytes of {name}"), _hash(entry[_HASH_KEY], name))


def _chunks(name: str, rows: object, files: Mapping[str, FileEntry]) -> tuple[Chunk, ...]:
    if name not in files:
        raise ValueError(f"chunks of {name!r:.80}, which is not among the files")
    if not isinstance(rows, list):
        raise ValueError(f"chunks of {name} must be a list")
    return _chunks_at_once(rows, files[name].bytes) or _chunks_one_by_one(name, rows, files[name].bytes)


def _chunks_at_once(rows: list[Any], file_bytes: int) -> tuple[Chunk, ...] | None:
    """Return the chunks if all are as they should be, else None: there may be hundreds of thousands."""
    if not rows or set(map(type, rows)) != {list} or set(map(len, rows)) != {3}:
        return None
    offsets, lengths, hashes = zip(*rows, strict=True)
    kinds = set(map(type, offsets)) | set(map(type, lengths))
    if kinds != {int} or set(map(type, hashes)) != {str} or set(map(len, hashes)) != {32}:
        return None
    stops = list(map(add, offsets, lengths))
    is_ordered = all(map(le, stops, offsets[1:])) and stops[-1] <= file_bytes
    if not is_ordered or min(offsets) < 0 or min(lengths) < 0 or not set("".join(hashes)) <= _HEX_DIGITS:
        return None
    return tuple(map(Chunk, offsets, lengths, hashes))


def _chunks_one_by_one(name: str, rows: list[Any], file_bytes: int) -> tuple[Chunk, ...]:
    chunks = []
    stop = 0
    for row in rows:
        if not isinstance(row, list) or len(row) != 3:
            raise ValueError(f"a chunk of {name} must be [offset, length, hash]")
        chunk = Chunk(
            _count(row[0], f"a chunk offset of {name}"),
            _count(row[1], f"a chunk length of {name}"),
            _hash(row[2], f"a chunk of {name}"),
        )
        # In order and apart, so that every byte has at most one hash and one owner.
        if chunk.offset < stop:
            raise ValueError(f"chunks of {name} overlap or are out of order at byte {chunk.offset}")
        stop = chunk.offset + chunk.length
        if stop > file_bytes:
            raise ValueError(f"a chunk of {name} ends at byte {stop}, the file at {file_bytes}")
        chunks.append(chunk)
    return tuple(chunks)
