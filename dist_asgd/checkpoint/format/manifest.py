"""``manifest.json``: what a checkpoint consists of, with a hash of every file and of every chunk in it.

chunk     the byte range of one serialized tensor, piece of one, or object in a data file, as DCP's metadata gives it
hash      xxh3_128, 32 hex digits: finds damage, and files of another step; it is no signature
own hash  the manifest ends its own content with a hash of the rest, so that damage to it is known as such
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import xxhash

from ...version import __version__
from .files import CheckpointError, check_name, names_in, open_confined, read_whole

MANIFEST_NAME = "manifest.json"
FORMAT = 1
MAX_MANIFEST_BYTES = 1 << 28
_BLOCK_BYTES = 1 << 22
_HASH_KEY = "xxh3_128"
_KEYS = {"format", "dist_asgd", "step", "world_size", "files", "chunks", _HASH_KEY}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and hash of one file."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """One byte range of a data file, and its hash."""

    offset: int
    length: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """``files`` has every file of the directory but the manifest; ``chunks`` those with chunks, in order of offset."""

    step: int
    world_size: int
    files: Mapping[str, FileEntry]
    chunks: Mapping[str, Sequence[Chunk]]
    version: str = __version__


def hash_of(data: bytes | memoryview) -> str:
    """xxh3_128 of ``data``, as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_file(directory: Path, name: str) -> FileEntry:
    """Size and hash of one file, read in blocks."""
    file, _ = open_confined(directory, name)
    digest, size = xxhash.xxh3_128(), 0
    with file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return FileEntry(size, digest.hexdigest())


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, whole or not at all: beside, fsync, rename. The caller fsyncs the directory."""
    data = encode(manifest)
    decode(data, directory / MANIFEST_NAME)
    beside = directory / f".{MANIFEST_NAME}.tmp"
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(directory / MANIFEST_NAME)


def read_manifest(directory: Path) -> Manifest | None:
    """The directory's manifest, None where it has none; CheckpointError where it is damaged or not to be trusted."""
    if MANIFEST_NAME not in names_in(directory):
        return None
    return decode(read_whole(directory, MANIFEST_NAME, MAX_MANIFEST_BYTES), directory / MANIFEST_NAME)


def check_files(directory: Path, manifest: Manifest) -> list[str]:
    """What is missing, of another size, or not in the manifest: one line each, without reading a byte of the files."""
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
    for name in names_in(directory):
        if name != MANIFEST_NAME and name not in manifest.files:
            problems.append(f"{directory / name} is not in the manifest: it does not belong to this checkpoint.")
    return problems


def encode(manifest: Manifest) -> bytes:
    """The manifest's only form in bytes."""
    body: dict[str, Any] = {
        "format": FORMAT,
        "dist_asgd": manifest.version,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "files": {name: {"bytes": e.bytes, _HASH_KEY: e.xxh3_128} for name, e in manifest.files.items()},
        "chunks": {
            name: [[c.offset, c.length, c.xxh3_128] for c in chunks] for name, chunks in manifest.chunks.items()
        },
    }
    return _dump({**body, _HASH_KEY: hash_of(_dump(body))})


def _dump(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def decode(data: bytes, path: Path) -> Manifest:
    """Read and check a manifest that anybody may have written; CheckpointError names ``path`` and what is wrong."""

    def refuse(what: str) -> NoReturn:
        raise CheckpointError(f"dist_asgd: {path} is damaged, or was not written by dist_asgd: {what}.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        body = dict(pairs)
        if len(body) != len(pairs):
            refuse("a key occurs twice")
        return body

    def constant(text: str) -> NoReturn:
        refuse(f"{text} is not a number here")

    try:
        body = json.loads(data, object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        refuse(f"not JSON as it should be ({error})")
    if not isinstance(body, dict) or set(body) != _KEYS:
        refuse(f"wanted the keys {sorted(_KEYS)}")
    own = body.pop(_HASH_KEY)
    if not isinstance(own, str) or own != hash_of(_dump(body)) or data != _dump({**body, _HASH_KEY: own}):
        refuse("its content does not have the hash that it gives itself")
    if body["format"] != FORMAT or isinstance(body["format"], bool):
        raise CheckpointError(
            f"dist_asgd: {path} has format {body['format']!r:.20}, this version reads {FORMAT}: use the version of "
            f"dist_asgd that wrote it ({body['dist_asgd']!r:.40})."
        )
    if not isinstance(body["dist_asgd"], str):
        refuse("'dist_asgd' must be a version")
    try:
        step, world_size = _count(body["step"], "step"), _count(body["world_size"], "world_size")
        files = {check_name(name): _file_entry(name, entry) for name, entry in _dict(body, "files").items()}
        chunks = {name: _chunks(name, rows, files) for name, rows in _dict(body, "chunks").items()}
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
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise ValueError(f"{what} must be a whole number from 0 on")
    return value


def _hash(value: object, what: str) -> str:
    if not isinstance(value, str) or len(value) != 32 or set(value) - set("0123456789abcdef"):
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
        if chunk.offset < stop:
            raise ValueError(f"chunks of {name} overlap or are out of order at byte {chunk.offset}")
        stop = chunk.offset + chunk.length
        if stop > files[name].bytes:
            raise ValueError(f"a chunk of {name} ends at byte {stop}, the file at {files[name].bytes}")
        chunks.append(chunk)
    return tuple(chunks)
