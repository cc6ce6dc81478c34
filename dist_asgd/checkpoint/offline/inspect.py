"""Summarizes a checkpoint for the command ``inspect``. Of the data it reads scalars and plain values only."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from ...update.weights import AVERAGE_KEY, AverageSchedule, UniformMean
from .contents import CheckpointContents, TensorEntry

# Names of data files: of DCP, and of DCP with safetensors.
_RANK = re.compile(r"__(?P<rank>\d+)_\d+\.distcp|shard-(?P<shard>\d+)-.+\.safetensors")
_EXTRA = "extra."


@dataclass(frozen=True, slots=True)
class OtherEntry:
    """A tensor that is no parameter of the optimizer, or a plain value, which has no dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str | None
    bytes: int


@dataclass(frozen=True, slots=True)
class ParameterEntry:
    """One parameter that the optimizer has.

    ``bytes`` are the parameter's, ``state_bytes`` those of its state. ``step``, ``eta``, ``mu`` and ``ax_dtype`` are
    None if the checkpoint has no state of it, and ``dtype`` is None if it has the state but not the parameter itself.
    ``own_state`` are the tensors of its state that are not those of an ASGD: all of them, if the optimizer is of
    another class, which has no ``eta``, ``mu`` and ``ax``; then ``step`` is None also if its state has none.
    ``t0`` is None if the checkpoint does not have it. ``averaged_steps`` is how many iterates the average holds: 0 if
    ``averaging`` (its averaging has begun) is false, and None if that is unknown. ``average_rule`` has the options of
    the rule of averaging, None for the mean of ``torch.optim.ASGD``.
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
    t0: float | None
    averaging: bool
    averaged_steps: int | None
    average_rule: dict[str, Any] | None
    own_state: list[OtherEntry] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class AverageEntry:
    """One average beside the optimizer.

    ``rule`` are the options of its rule, ``updates`` the calls of ``update()``, and ``iterates`` how many of them the
    average holds; both are of the parameter that has fewest. ``bytes`` are those of its state.
    """

    name: str
    rule: dict[str, Any]
    updates: int
    iterates: int
    num_parameters: int
    bytes: int

    def __str__(self) -> str:
        options = ", ".join(f"{k} {v}" for k, v in self.rule.items() if k != "rule" and (k, v) != ("every", 1))
        rule = f"{self.rule.get('rule', 'unknown')}{f' ({options})' if options else ''}"
        return f"{self.name}: {rule}, {self.updates} updates, average of {self.iterates} iterates"


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of ``summarize``.

    ``step`` and ``written_by``, the version of dist_asgd, come from the manifest and are None without one. ``others``
    are the model's buffers and the parameters that the optimizer does not have. ``extra`` are the values that the user
    saved. ``averages`` are those beside the optimizer, whose class is ``optimizer`` if it is no ASGD. ``other_keys`` is
    a sentence about keys of other layouts and other optimizers, or "".
    """

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
    others: list[OtherEntry]
    extra: list[OtherEntry]
    other_keys: str = ""
    optimizer: str | None = None
    averages: list[AverageEntry] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The summary as plain values for JSON, in which numbers that are not finite become None."""
        plain = asdict(self)
        for parameter in plain["parameters"]:
            for key in ("step", "eta", "mu", "t0"):
                parameter[key] = finite(parameter[key])
        return plain


def finite(value: float | None) -> float | None:
    """``value``, or None if JSON cannot express it."""
    return value if value is not None and math.isfinite(value) else None


def summarize(contents: CheckpointContents) -> Summary:
    """Collect everything that ``inspect`` prints. Not collective."""
    opened = contents.opened
    sizes = opened.file_sizes()
    optimized = contents.optimized
    steps = _own_steps(contents)
    parameters = [_parameter(contents, name, steps) for name in contents.model if name in optimized]
    parameters += [_parameter(contents, name, steps) for name in contents.state if name not in contents.model]
    tensors = contents.tensors.values()
    manifest = opened.manifest
    ranks = {match[match.lastgroup or 0] for name in sizes if (match := _RANK.fullmatch(name))}
    extra_tensors = [_other(t.key.removeprefix(_EXTRA), t) for t in tensors if t.key.startswith(_EXTRA)]
    extra_keys = [key for key in contents.objects if key.startswith(_EXTRA)]
    extra_objects = [OtherEntry(key.removeprefix(_EXTRA), (), None, 0) for key in extra_keys]
    return Summary(
        path=str(opened.path),
        step=None if manifest is None else manifest.step,
        num_ranks=max(1, len(ranks)) if manifest is None else manifest.world_size,
        written_by=None if manifest is None else manifest.version,
        verified=manifest is not None,
        num_files=len(sizes),
        file_bytes=sum(sizes.values()),
        num_elements=sum(math.prod(p.shape) for p in parameters),
        model_bytes=sum(entry.bytes for entry in contents.model.values()),
        state_bytes=sum(p.state_bytes for p in parameters),
        parameters=parameters,
        others=[_other(name, entry) for name, entry in contents.model.items() if name not in optimized],
        extra=sorted((*extra_tensors, *extra_objects), key=lambda entry: (len(entry.name), entry.name)),
        # Without names of parameters the state of another optimizer is listed by its keys.
        other_keys=contents.other_keys(optimized <= contents.model.keys()),
        optimizer=contents.optimizer_class,
        averages=[_average(name, contents.average(name)) for name in contents.average_names],
    )


def _average(name: str, contents: CheckpointContents) -> AverageEntry:
    rule: dict[str, Any] = {}
    counts: list[tuple[int, int]] = []
    for group in contents.groups:
        rule = options if isinstance(options := group.get(AVERAGE_KEY), dict) else {}
        # Which iterates count depends on ``every`` alone, so that a function of the user's is not needed.
        every = rule.get("every", 1)
        schedule = AverageSchedule(UniformMean(every=every if isinstance(every, int) and every > 0 else 1))
        for param in group["params"]:
            step = float(contents.scalars[param]["step"]) if param in contents.scalars else 0.0
            counts.append((int(step), schedule.num_iterates(step, float(group.get("t0", 0)))))
    size = sum(tensor.bytes for state in contents.state.values() for tensor in state.values())
    return AverageEntry(name, rule, *min(counts, default=(0, 0)), len(counts), size)


def _other(name: str, entry: TensorEntry) -> OtherEntry:
    return OtherEntry(name, entry.shape, _dtype(entry), entry.bytes)


def _dtype(entry: TensorEntry) -> str:
    return str(entry.dtype).removeprefix("torch.")


def _own_steps(contents: CheckpointContents) -> dict[str, float]:
    """Return the ``step`` of each parameter of an optimizer that is no ASGD, as far as it is one number."""
    keys = {
        name: entries["step"].key
        for name, entries in contents.own_tensors.items()
        if "step" in entries and entries["step"].num_chunks == 1 == math.prod(entries["step"].shape)
    }
    read = contents.values(keys.values())
    return {name: float(read[key].item()) for name, key in keys.items() if not read[key].is_complex()}


def _parameter(contents: CheckpointContents, name: str, own_steps: dict[str, float]) -> ParameterEntry:
    entry, state = contents.model.get(name), contents.state.get(name)
    own = contents.own_tensors.get(name, {})
    # Without the parameter itself, its ax has the same shape.
    shaped = entry or (state or {})["ax"]
    scalars = contents.scalars.get(name)
    return ParameterEntry(
        name=name,
        shape=shaped.shape,
        dtype=None if entry is None else _dtype(entry),
        bytes=0 if entry is None else entry.bytes,
        num_chunks=shaped.num_chunks,
        ax_dtype=None if state is None else _dtype(state["ax"]),
        state_bytes=sum(tensor.bytes for tensor in {**own, **(state or {})}.values()),
        step=own_steps.get(name) if scalars is None else float(scalars["step"]),
        eta=None if scalars is None else float(scalars["eta"]),
        mu=None if scalars is None else float(scalars["mu"]),
        t0=contents.first_average_steps.get(name),
        averaging=contents.has_begun_averaging(name),
        averaged_steps=contents.averaged_steps(name),
        average_rule=rule if isinstance(rule := contents.average_rule(name), dict) else None,
        own_state=[_other(key, tensor) for key, tensor in own.items()],
    )
