"""What a plan can be made of: modules, parameters, safetensors files, configurations, and numbers of parameters.

``shapes_of`` reads any of them. Of files only headers and JSON are read. Every error is a ValueError or an OSError that
says what was wanted.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.format.safetensors import DTYPE_NAMES, INDEX_SUFFIX, SUFFIX
from ..placements import fsdp1
from .config import shapes_of_config
from .shapes import ModelShapes, ParamShape

Source = nn.Module | Mapping[str, Any] | str | os.PathLike[str] | int | Iterable[Any]

WANTED = (
    f"wanted a module, its parameters, a number of parameters (7B), a file *{SUFFIX} or *{INDEX_SUFFIX}, a "
    f"config.json, or a folder with one of these files"
)
# A thousand trillion: what is larger is a typing error, and its bytes would overflow.
MOST_ELEMENTS = 10**15
# A model of which only the size is known is planned as so many equal parameters, in so many blocks.
_COUNTED_PARAMS, _COUNTED_BLOCKS = 256, 32
# Below so many elements a parameter of such a model is not cut further.
_LEAST_COUNTED = 4096
_COUNT = re.compile(r"\s*(-?[\d.,_]+(?:e\d+)?)\s*([KMBT]?)\s*", re.IGNORECASE)
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# safetensors refuses longer headers, too.
_MAX_HEADER_BYTES = 100_000_000
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def shapes_of(model: Source) -> ModelShapes:
    """The shapes of ``model``; ValueError if it has no parameters or is none of the sources."""
    if isinstance(model, nn.Module):
        found = _of_module(model)
    elif isinstance(model, (bool, float)):
        raise ValueError(f"dist_asgd: a plan of {model!r}: {WANTED}.")
    elif isinstance(model, int):
        found = of_count(model)
    elif isinstance(model, Mapping):
        found = shapes_of_config(model, "a configuration")
    elif isinstance(model, (str, os.PathLike)):
        found = _of_text(os.fspath(model))
    elif isinstance(model, Tensor) or not isinstance(model, Iterable):
        raise ValueError(f"dist_asgd: a plan of a {type(model).__name__}: {WANTED}.")
    else:
        found = _of_groups(list(model))
    if not any(True for _ in found.params):
        raise ValueError(f"dist_asgd: {found.source} has no parameters. {WANTED[0].upper()}{WANTED[1:]}.")
    if sum(param.numel for param in found.params) > MOST_ELEMENTS:
        raise ValueError(f"dist_asgd: {found.source} has more than {MOST_ELEMENTS:,} elements. Is the size right?")
    if not any(param.numel for param in found.trained):
        raise ValueError(
            f"dist_asgd: {found.source} has no parameter to train. Set requires_grad of those that are trained."
        )
    return found


# --- modules and parameters --------------------------------------------------------------------------------------


def _of_module(model: nn.Module) -> ModelShapes:
    group = tuple(_of_param(name, param) for name, param in model.named_parameters())
    buffer_bytes = sum(buffer.numel() * buffer.dtype.itemsize for buffer in model.buffers())
    return ModelShapes(type(model).__name__, (group,), buffer_bytes)


def _of_param(name: str, param: object) -> ParamShape:
    if not isinstance(param, Tensor):
        raise ValueError(f"dist_asgd: {name} is a {type(param).__name__}, wanted a parameter.")
    if fsdp1.is_managed(param):
        raise ValueError(
            f"dist_asgd: {name} was flattened by FSDP1, and its shape is lost. Plan the model before it is wrapped."
        )
    return ParamShape(name, tuple(param.shape), param.dtype, param.requires_grad)


def _of_groups(params: list[Any]) -> ModelShapes:
    """The shapes of what optimizers take: parameters, (name, parameter) pairs, or groups of either."""
    given = params if params and isinstance(params[0], dict) else [{"params": params}]
    seen: set[int] = set()
    groups: list[tuple[ParamShape, ...]] = []
    for index, group in enumerate(given):
        if not isinstance(group, dict) or "params" not in group:
            raise ValueError(f"dist_asgd: parameter group {index} has no 'params'. Pass what ShardedASGD takes.")
        members = group["params"]
        shapes: list[ParamShape] = []
        for position, entry in enumerate([members] if isinstance(members, Tensor) else members):
            name, param = entry if isinstance(entry, tuple) and len(entry) == 2 else (f"{index}.{position}", entry)
            if id(param) in seen:
                raise ValueError(f"dist_asgd: {name} is given twice. Pass each parameter once.")
            seen.add(id(param))
            # A number in a name that is none would be taken for a block of the model.
            shapes.append(_of_param(str(name) if isinstance(entry, tuple) else f"parameter {position}", param))
        groups.append(tuple(shapes))
    return ModelShapes("the parameters", tuple(groups))


# --- numbers -----------------------------------------------------------------------------------------------------


def of_count(count: int) -> ModelShapes:
    """A model of ``count`` parameters of which no shape is known: equal vectors in float32."""
    if not 0 < count <= MOST_ELEMENTS:
        raise ValueError(
            f"dist_asgd: a model of {count:,} parameters: wanted a positive number of at most "
            f"{MOST_ELEMENTS:,}, such as 7B."
        )
    number = min(_COUNTED_PARAMS, max(1, count // _LEAST_COUNTED))
    shapes = []
    for index in range(number):
        numel = count * (index + 1) // number - count * index // number
        block = index * _COUNTED_BLOCKS // number
        shapes.append(ParamShape(f"blocks.{block}.{index}", (numel,), torch.float32))
    assumption = (
        f"Only the number of parameters is known: they are taken for {number} tensors of one size, in "
        f"{min(number, _COUNTED_BLOCKS)} blocks. Shapes (a module, a config.json, safetensors) change buckets, "
        f"messages and what FSDP2 gathers."
    )
    return ModelShapes(f"{count:,} parameters", (tuple(shapes),), assumptions=(assumption,))


def _of_text(text: str) -> ModelShapes:
    number = _COUNT.fullmatch(text)
    if number and not Path(text).exists():
        try:
            value = float(re.sub("[,_]", "", number[1])) * _FACTORS[number[2].upper()]
        except ValueError:
            raise ValueError(
                f"dist_asgd: {text!r} is no number of parameters: wanted one such as 7B or 1.5e9."
            ) from None
        return of_count(round(value))
    return _of_path(Path(text).expanduser())


# --- files -------------------------------------------------------------------------------------------------------


def _of_path(path: Path) -> ModelShapes:
    if not path.exists():
        raise ValueError(f"dist_asgd: {path} does not exist, and is no number of parameters: {WANTED}.")
    if path.is_dir():
        return _of_path(_in_folder(path))
    if path.name.endswith(INDEX_SUFFIX):
        return _of_index(path)
    if path.name.endswith(SUFFIX):
        return _with_tensors(str(path), _header(path), ())
    if path.suffix == ".json":
        return shapes_of_config(_json_of(path), str(path))
    raise ValueError(f"dist_asgd: {path} is none of the files that a plan reads: {WANTED}.")


def _in_folder(folder: Path) -> Path:
    """The file of a folder that tells the most: tensors before a configuration."""
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    files = sorted(folder.glob(f"*{SUFFIX}"))
    for found in (indices, files if len(files) == 1 else []):
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"dist_asgd: {folder} has several models ({found[0].name}, {found[1].name}): pass the path of one."
            )
    if (folder / "config.json").exists():
        return folder / "config.json"
    if files:
        raise ValueError(
            f"dist_asgd: {folder} has {len(files)} files *{SUFFIX} and no index: pass the path of one, or add "
            f"model{INDEX_SUFFIX}."
        )
    raise ValueError(f"dist_asgd: {folder} has no *{SUFFIX}, no *{INDEX_SUFFIX} and no config.json: {WANTED}.")


def _json_of(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"dist_asgd: {path} is no JSON: {error}. Is it whole?") from None
    if not isinstance(found, dict):
        raise ValueError(f"dist_asgd: {path} is a JSON {type(found).__name__}, wanted an object: {WANTED}.")
    return found


def _of_index(path: Path) -> ModelShapes:
    """The tensors of all files that an index names; of the index alone, if they are not beside it."""
    index = _json_of(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"dist_asgd: {path} has no weight_map, or an empty one: wanted a name for each tensor.")
    names = sorted({str(name) for name in weight_map.values()})
    strange = [name for name in names if Path(name).name != name]
    if strange:
        raise ValueError(f"dist_asgd: {path} names the file {strange[0]!r}, wanted files beside the index.")
    missing = [name for name in names if not (path.parent / name).exists()]
    if not missing:
        tensors: dict[str, Any] = {}
        for name in names:
            tensors.update(_header(path.parent / name))
        return _with_tensors(str(path), {name: tensors[name] for name in weight_map if name in tensors}, ())
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(total, bool) or not isinstance(total, int) or total <= 0:
        raise ValueError(
            f"dist_asgd: {missing[0]}, which {path} names, is not beside it, and the index has no metadata.total_size. "
            f"Copy the files there (their first megabytes are enough), or pass a config.json or a number of parameters."
        )
    return _of_total(path, total, metadata, len(weight_map), missing[0])


def _of_total(path: Path, total: int, metadata: Any, num_tensors: int, missing: str) -> ModelShapes:
    """A model of which an index alone tells the bytes of all tensors, and perhaps their elements."""
    count = metadata.get("total_parameters")
    known = isinstance(count, int) and not isinstance(count, bool) and 0 < count <= total
    itemsize = total / count if known else 2
    dtype = {2: torch.bfloat16, 4: torch.float32}.get(round(itemsize), torch.bfloat16)
    found = of_count(count if known else total // 2)
    taken = "" if known else ", and bfloat16 is assumed for all"
    assumption = (
        f"{missing} is not beside the index, so of {num_tensors} tensors only the bytes are known ({total:,}{taken}). "
        f"Copy the files there, or their first megabytes, for the shapes."
    )
    groups = found.as_dtype(dtype).groups
    return ModelShapes(str(path), groups, assumptions=(assumption, *found.assumptions))


def _header(path: Path) -> dict[str, Any]:
    """The entries of a safetensors file by name; the tensors themselves are not read, and may be cut off."""
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= _MAX_HEADER_BYTES:
            raise ValueError(f"dist_asgd: {path} is no safetensors file: it does not begin with a header's length.")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        header = None
    if len(raw) < length or not isinstance(header, dict):
        raise ValueError(f"dist_asgd: the header of {path} is cut off or no JSON: copy the file again.")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _with_tensors(source: str, tensors: Mapping[str, Any], assumptions: tuple[str, ...]) -> ModelShapes:
    """The model of these entries of safetensors headers. Tensors that are no floating-point numbers are buffers."""
    shapes: list[ParamShape] = []
    buffer_bytes = 0
    for name in sorted(tensors, key=_by_number):
        entry = tensors[name]
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"dist_asgd: tensor {name} in {source} has no shape: is that a safetensors file?")
        dtype = _DTYPES.get(str(entry.get("dtype")))
        if dtype is not None and (dtype.is_floating_point or dtype.is_complex) and dtype.itemsize > 1:
            shapes.append(ParamShape(name, tuple(shape), dtype))
        elif dtype is None or dtype.is_floating_point:
            raise ValueError(
                f"dist_asgd: tensor {name} in {source} has dtype {entry.get('dtype')}, which cannot be trained. Plan "
                f"from the model's config.json, with the dtype of training."
            )
        else:
            buffer_bytes += math.prod(shape) * dtype.itemsize
    order = (
        "The file does not tell in which order the model registers its parameters: the order of their names is taken, "
        "and all are taken as trained."
    )
    return ModelShapes(source, (tuple(shapes),), buffer_bytes, (order, *assumptions))


def _by_number(name: str) -> list[tuple[int, str]]:
    """A key that sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
