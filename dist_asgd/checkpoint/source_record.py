"""What a checkpoint records of the parameters that entries of the model come from, for exports without the model.

Usually an entry is the parameter of the same name, and nothing is recorded. Ties (a parameter under several names) and
entries that state_dict hooks rename, split or compute are recorded as one object, ``optim.sources``. An empty record
says that an entry beside the parameters, which might have equal values, is no tie. ``state_to_save`` writes the record,
and ``checkpoint/offline/contents.py`` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from .format.archives import serialized
from .format.manifest import CheckpointError
from .format.writer import Serialized
from .names import Names
from .sources import Region, Source

SOURCES = "sources"
SOURCES_KEY = f"optim.{SOURCES}"


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """The sources of entries of the model, by name; of an entry that is not in it, the parameter of its own name.

    Attributes:
        whole: the parameter that the entry is, under another name.
        regions: the parameter of which the entry is a view: its name, and shape, strides and offset of the view in the
            parameter, laid out row by row.
        computed: the parameters from which a hook computed the entry; none if it has nothing of any.
    """

    whole: dict[str, str] = field(default_factory=dict)
    regions: dict[str, tuple[str, Region]] = field(default_factory=dict)
    computed: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.whole or name in self.regions or name in self.computed

    def serialize(self) -> Serialized:
        """The record in the form in which a checkpoint holds objects."""
        regions = {name: (param, asdict(region)) for name, (param, region) in self.regions.items()}
        return Serialized(serialized({"whole": self.whole, "regions": regions, "computed": self.computed}, SOURCES_KEY))

    @classmethod
    def parse(cls, value: Any, path: object) -> SourceRecord:
        """Return the record in ``value``, an object that anybody may have written; CheckpointError if it is none."""
        try:
            whole = {_name(name): _name(param) for name, param in value["whole"].items()}
            regions = {
                _name(name): (
                    _name(param),
                    Region(_numbers(region["shape"]), _numbers(region["strides"]), *_numbers((region["offset"],))),
                )
                for name, (param, region) in value["regions"].items()
            }
            computed = {_name(name): tuple(map(_name, params)) for name, params in value["computed"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"dist_asgd: {path} is damaged, or was not written by dist_asgd: {SOURCES_KEY} is no record of sources."
            ) from error
        return cls(whole, regions, computed)


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(type(value).__name__)
    return value


def _numbers(value: Sequence[object]) -> tuple[int, ...]:
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in value):
        raise TypeError("not a whole number")
    return tuple(value)  # type: ignore[arg-type]


def record_of(
    state: Mapping[str, Any],
    names: Names,
    params: Sequence[Tensor],
    others: Sequence[Tensor],
    source_of: Callable[[Any], Source],
) -> SourceRecord | None:
    """Return what has to be recorded of ``state``, which is ``model.state_dict(keep_vars=True)``; None if nothing has.

    Args:
        names: those of the model and of ``params``, the optimizer's parameters.
        others: the model's buffers and parameters.
        source_of: gives the source of an entry.
    """
    record = SourceRecord()
    number_of = {id(param): number for number, param in enumerate(params)}
    known = {id(tensor) for tensor in others}
    first = [aliases[0] for aliases in names.of_params]
    named = set(first)
    alike: set[tuple[Any, ...]] | None = None
    is_ambiguous = False
    for key, value in state.items():
        name, number = names.of_model[key], number_of.get(id(value))
        if number is not None:
            if name != first[number]:
                record.whole[name] = first[number]
            continue
        source = Source(frozenset()) if id(value) in known else source_of(value)
        roots = tuple(first[root] for root in sorted(source.roots))
        if source.whole:
            if name != roots[0]:
                record.whole[name] = roots[0]
        elif source.region is not None and params[min(source.roots)].is_contiguous():
            record.regions[name] = (roots[0], source.region)
        elif roots or name in named:
            record.computed[name] = roots
        elif isinstance(value, Tensor) and not value.is_nested and value.numel():
            if alike is None:
                alike = {(param.shape, param.dtype) for param in params}
            is_ambiguous = is_ambiguous or (value.shape, value.dtype) in alike
    return record if record.whole or record.regions or record.computed or is_ambiguous else None
