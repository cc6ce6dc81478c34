"""Where a checkpoint has model and optimizer, if something else than this package laid it out.

The keys of this package, and of torch's own recipe, begin with ``model.`` and ``optim.``. A *prefix* says what other
programs have in their place:

``"app"``                                ``app.model.…`` and ``app.optim.…``
``{"model": "", "optim": "optimizer"}``  the model's names without anything before them, and ``optimizer.…``

``OpenCheckpoint`` renames all keys when it opens a checkpoint, so that everything behind it knows one layout only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

Prefix = str | Mapping[str, str]
SECTIONS = ("model", "optim")
_KEPT = ("averages.", "extra.", "containers.")
_EXTRA_STATE = "_extra_state"
_MAX_SHOWN = 8
# Names have fewer words; a file that is not trusted may have any.
_MAX_WORDS = 64
_NUMBERED = re.compile(r"(?:.*\.)?state\.\d+\.(?:ax|step|mu|eta)")


def prefix_of_text(text: str) -> Prefix:
    """Return the prefix that the command line is given: ``app``, or ``model=NAME,optim=NAME`` with one or both."""
    if "=" not in text:
        return text
    return dict(part.split("=", 1) for part in text.split(",") if "=" in part)


def check_prefix(prefix: Prefix) -> None:
    """Raise ValueError unless ``prefix`` is one."""
    ok = isinstance(prefix, str) or (
        isinstance(prefix, Mapping)
        and set(prefix) <= set(SECTIONS)
        and all(isinstance(value, str) for value in prefix.values())
    )
    if not ok:
        raise ValueError(
            f"dist_asgd: prefix must be a string that stands before 'model' and 'optim' in the checkpoint's keys, or "
            f"a dict that says what stands in their place, such as {{'model': '', 'optim': 'optimizer'}}; got "
            f"{prefix!r:.80}."
        )


class _Renamed(NamedTuple):
    """A key of the file, what it is called here, and how many characters of the file's key its prefix has."""

    key: str
    section: str | None
    prefix: str


def renamed(metadata: Metadata, prefix: Prefix, where: str) -> Metadata:
    """Return ``metadata`` with the keys of this package; keys that are neither model nor optimizer are left out.

    Raises ValueError, which names ``where``, if no key has the prefix.
    """
    check_prefix(prefix)
    if not prefix:
        return metadata
    entries = metadata.state_dict_metadata
    new = {key: found for key in entries if (found := _rename(key, entries[key], prefix)) is not None}
    if not new:
        raise ValueError(f"dist_asgd: no key of {where} has the prefix {prefix!r}. {described(entries)}")
    paths = metadata.planner_data or {}
    return Metadata(
        {found.key: entries[key] for key, found in new.items()},
        {new[key].key: _path(path, new[key]) for key, path in paths.items() if key in new},
        {
            MetadataIndex(new[index.fqn].key, index.offset, index.index): info
            for index, info in (metadata.storage_data or {}).items()
            if index.fqn in new
        },
        metadata.storage_meta,
        metadata.version,
    )


def _rename(key: str, entry: Any, prefix: Prefix) -> _Renamed | None:
    if isinstance(prefix, str):
        before = f"{prefix}."
        return _Renamed(key.removeprefix(before), None, prefix) if key.startswith(before) else None
    # The longest first: "" is before every key.
    for section in sorted(SECTIONS, key=lambda section: -len(prefix.get(section, section))):
        name = prefix.get(section, section)
        before = f"{name}." if name else ""
        if not key.startswith(before):
            continue
        # Beside a model without a prefix lie values of others, such as the number of the epoch.
        if name or isinstance(entry, TensorStorageMetadata) or _EXTRA_STATE in key:
            return _Renamed(f"{section}.{key.removeprefix(before)}", section, name)
    return _Renamed(key, None, "") if key.startswith(_KEPT) else None


def _path(path: tuple[Any, ...], found: _Renamed) -> tuple[Any, ...]:
    """Return DCP's path of a key, with the section in place of the prefix."""
    head = () if found.section is None else (found.section,)
    if not found.prefix:
        return (*head, *path)
    for count in range(1, min(len(path), _MAX_WORDS)):
        if ".".join(map(str, path[:count])) == found.prefix:
            return (*head, *path[count:])
    section, _, rest = found.key.partition(".")
    return section, rest


# --- errors that help ------------------------------------------------------------------------------------


def described(entries: Mapping[str, Any], but: Collection[str] = ()) -> str:
    """Return which keys a checkpoint has, by their first words, those in ``but`` left out; "" if it has no others."""
    groups: dict[str, list[bool]] = {}
    children: dict[str, set[str]] = {}
    others = [key for key in entries if key.partition(".")[0] not in but]
    for key in others:
        words = key.split(".", 2)
        children.setdefault(words[0], set()).add(words[1] if len(words) > 2 else "")
    for key in others:
        words = key.split(".", 2)
        below = children[words[0]]
        name = words[0] if len(words) < 3 or not 1 <= len(below) <= _MAX_SHOWN else ".".join(words[:2])
        groups.setdefault(name, []).append(isinstance(entries[key], TensorStorageMetadata))
    shown = [f"{name} ({_count(kinds)})" for name, kinds in list(groups.items())[:_MAX_SHOWN]]
    more = f" and {len(groups) - _MAX_SHOWN} more" if len(groups) > _MAX_SHOWN else ""
    return f"The checkpoint has {', '.join(shown)}{more}." if shown else ""


def _count(kinds: list[bool]) -> str:
    tensors, values = sum(kinds), len(kinds) - sum(kinds)
    texts = [f"{n} {what}{'s' * (n != 1)}" for n, what in ((tensors, "tensor"), (values, "value")) if n]
    return ", ".join(texts)


def hint(entries: Mapping[str, Any], names: Iterable[str]) -> str:
    """Return what to do about a checkpoint in which names are missing: which prefix fits, if any.

    ``names`` are those of the model's parameters and buffers.
    """
    found = _fitting(entries, set(names))
    texts = [described(entries)]
    before = {section: name.removesuffix(section) for section, name in found.items() if _ends_with(name, section)}
    if found and any(name != section for section, name in found.items()):
        alike = len(before) == len(found) and len(set(before.values())) == 1
        prefix: Any = next(iter(before.values())).removesuffix(".") if alike else found
        text = prefix if alike else ",".join(f"{section}={name}" for section, name in found.items())
        texts.append(f"The names of this model are there with prefix={prefix!r} (--prefix {text}).")
    if "optim" not in found:
        if any(_NUMBERED.fullmatch(key) for key in entries):
            texts.append(
                "Its optimizer state has numbers in place of names, as optimizer.state_dict() has: load it with "
                "torch.distributed.checkpoint and optimizer.load_state_dict()."
            )
        elif found:
            texts.append(
                "It has no ASGD state of these parameters (accelerate writes it to a folder of its own, optimizer_0): "
                "load each folder with strict=False."
            )
    return " ".join(texts)


def _ends_with(name: str, section: str) -> bool:
    return name == section or name.endswith(f".{section}")


def _fitting(keys: Iterable[str], names: set[str]) -> dict[str, str]:
    """Return what most of the names, and of their states, have before them in ``keys``, by section."""
    before: dict[str, Counter[str]] = {section: Counter() for section in SECTIONS}
    for key in keys:
        words = key.split(".")
        for at in range(min(len(words), _MAX_WORDS)):
            if ".".join(words[at:]) in names:
                before["model"][".".join(words[:at])] += 1
            # Averages beside the optimizer have an ax as well.
            if words[0] == "averages":
                continue
            if words[-1] == "ax" and words[at] == "state" and ".".join(words[at + 1 : -1]) in names:
                before["optim"][".".join(words[:at])] += 1
    return {section: counts.most_common(1)[0][0] for section, counts in before.items() if counts}
