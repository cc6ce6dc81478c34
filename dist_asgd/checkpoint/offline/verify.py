"""Is a checkpoint whole? Every byte of every file is read once, and hashed for its file and for its chunk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from ..format.manifest import CheckpointError, Manifest, check_files, open_confined, read_manifest
from ..format.reader import OpenCheckpoint, needs_manifest
from .contents import Progress, no_progress

_BLOCK_BYTES = 1 << 22


@dataclass(slots=True)
class Verdict:
    """What was read, and what is wrong: one line each, none where the checkpoint is whole."""

    num_files: int = 0
    num_chunks: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)


def total_bytes(path: Path) -> int:
    """How many bytes ``verify`` will read; 0 where there is nothing to read."""
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return 0
    return 0 if manifest is None else sum(entry.bytes for entry in manifest.files.values())


def verify(path: Path, progress: Progress = no_progress) -> Verdict:
    """Read and check everything; never raises for what the checkpoint is like. Not collective."""
    verdict = Verdict()
    try:
        manifest = read_manifest(path)
        if manifest is None:
            raise needs_manifest(path)
    except CheckpointError as error:
        verdict.problems.append(_line(error))
        return verdict
    verdict.problems += check_files(path, manifest)
    whole = not verdict.problems
    for name in manifest.files:
        try:
            _read_file(path, name, manifest, verdict, progress)
        except CheckpointError as error:
            # What is missing or of another size has been said.
            if whole:
                verdict.problems.append(_line(error))
    if not verdict.problems:
        try:
            OpenCheckpoint(path)
        except CheckpointError as error:
            verdict.problems.append(_line(error))
    return verdict


def _line(error: CheckpointError) -> str:
    return str(error).removeprefix("dist_asgd: ")


def _read_file(path: Path, name: str, manifest: Manifest, verdict: Verdict, progress: Progress) -> None:
    entry = manifest.files[name]
    file, size = open_confined(path, name)
    with file:
        whole = xxhash.xxh3_128()

        def take(count: int, *digests: xxhash.xxh3_128) -> None:
            while count:
                block = file.read(min(count, _BLOCK_BYTES))
                if not block:
                    return
                for digest in (whole, *digests):
                    digest.update(block)
                count -= len(block)
                progress(len(block))

        for chunk in manifest.chunks.get(name, ()):
            part = xxhash.xxh3_128()
            take(chunk.offset - file.tell())
            take(chunk.length, part)
            verdict.num_chunks += 1
            if part.hexdigest() != chunk.xxh3_128:
                verdict.problems.append(
                    f"{path / name} is damaged between bytes {chunk.offset} and {chunk.offset + chunk.length}."
                )
        take(size - file.tell())
        verdict.num_files += 1
        verdict.bytes += size
        if whole.hexdigest() != entry.xxh3_128:
            verdict.problems.append(f"{path / name} is damaged: it does not have the hash that the manifest gives.")
