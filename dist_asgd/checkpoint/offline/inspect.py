"""A checkpoint at a glance: what ``inspect`` shows; of the data only scalars are read."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from ..format.manifest import names_in
from .contents import CheckpointContents, StoredTensor

_RANK = re.compile(r"__(\d+)_\d+\.distcp")
_EXTRA = "extra."


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor, or a plain value (no dtype)."""

    name: str
    shape: tuple[int, ...]
    dtype: str | None
    bytes: int


@dataclass(frozen=True, slots=True)
class ParameterEntry:
    """One parameter that the optimizer has; without ``step`` where it has no state of it.

    ``dtype`` is None where the checkpoint has state of it, but no model. ``bytes`` are the parameter's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | None
    bytes: int
    num_chunks: int
    ax_dtype: str | None
    state_bytes: int
    step: float | None
    eta: float | None
    mu: float | None
    averaging: bool


@dataclass(frozen=True, slots=True)
class Summary:
    """``step`` and ``written_by`` (a version) are the manifest's; ``others`` are buffers and the like."""

    path: str
    step: int | None
    num_ranks: int
    written_by: str | None
    verified: bool
    num_files: int
    file_bytes: int
    num_elements: int
    model_bytes: int
    state_bytes: int
    parameters: list[ParameterEntry]
    others: list[Entry]
    extra: list[Entry]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers that are not finite become None."""
        found = asdict(self)
        for parameter in found["parameters"]:
            for key in ("step", "eta", "mu"):
                parameter[key] = finite(parameter[key])
        return found


def finite(value: float | None) -> float | None:
    """``value`` where JSON can say it."""
    return value if value is not None and math.isfinite(value) else None


def summarize(contents: CheckpointContents) -> Summary:
    """Everything that ``inspect`` shows."""
    opened = contents.opened
    sizes = {name: (opened.path / name).stat().st_size for name in names_in(opened.path)}
    parameters = [_parameter(contents, name) for name in contents.model if name in contents.optimized]
    parameters += [_parameter(contents, name) for name in contents.state if name not in contents.model]
    tensors = contents.tensors.values()
    manifest = opened.manifest
    ranks = {match[1] for name in sizes if (match := _RANK.fullmatch(name))}
    extra_tensors = [_entry(s.key.removeprefix(_EXTRA), s) for s in tensors if s.key.startswith(_EXTRA)]
    extra_objects = [Entry(key.removeprefix(_EXTRA), (), None, 0) for key in contents.objects if key.startswith(_EXTRA)]
    return Summary(
        path=str(opened.path),
        step=None if manifest is None else manifest.step,
        num_ranks=len(ranks) if manifest is None else manifest.world_size,
        written_by=None if manifest is None else manifest.version,
        verified=manifest is not None,
        num_files=len(sizes),
        file_bytes=sum(sizes.values()),
        num_elements=sum(math.prod(p.shape) for p in parameters),
        model_bytes=sum(stored.bytes for stored in contents.model.values()),
        state_bytes=sum(p.state_bytes for p in parameters),
        parameters=parameters,
        others=[_entry(name, stored) for name, stored in contents.model.items() if name not in contents.optimized],
        extra=sorted((*extra_tensors, *extra_objects), key=lambda entry: (len(entry.name), entry.name)),
    )


def _entry(name: str, stored: StoredTensor) -> Entry:
    return Entry(name, stored.shape, _dtype(stored), stored.bytes)


def _dtype(stored: StoredTensor) -> str:
    return str(stored.dtype).removeprefix("torch.")


def _parameter(contents: CheckpointContents, name: str) -> ParameterEntry:
    stored, state = contents.model.get(name), contents.state.get(name)
    like = stored or (state or {})["ax"]
    scalars = contents.scalars.get(name)
    return ParameterEntry(
        name=name,
        shape=like.shape,
        dtype=None if stored is None else _dtype(stored),
        bytes=0 if stored is None else stored.bytes,
        num_chunks=like.num_chunks,
        ax_dtype=None if state is None else _dtype(state["ax"]),
        state_bytes=0 if state is None else sum(part.bytes for part in state.values()),
        step=None if scalars is None else float(scalars["step"]),
        eta=None if scalars is None else float(scalars["eta"]),
        mu=None if scalars is None else float(scalars["mu"]),
        averaging=contents.begun(name),
    )
