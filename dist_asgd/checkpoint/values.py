"""What a save accepts: every tensor and object is one that a load of the same file returns, or is refused by its name.

``entries`` and ``own_entries`` call this module before anything is written. Objects are serialized here and read again
by ``load_object``, which is what loading calls. So a save raises where the load would.
"""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, TypedStorage, UntypedStorage
from torch.nn.parameter import is_lazy

from ..placements.dtensor import is_dtensor
from ..placements.shard_tensor import shard_tensor_of
from .format.archives import MAX_DEPTH, serialized
from .format.metadata import DTYPES
from .format.writer import Serialized

_DTYPES = frozenset(DTYPES.values())
_DICTS = (dict, OrderedDict)
_SEQUENCES = (list, tuple, set)
# Values of these types are what they are whoever holds them: they are not copied before they are written.
CONSTANTS = (bool, int, float, str, type(None))


def plain(value: Any) -> Any:
    """Return ``value`` with numbers of Python in place of scalars and 0-dim arrays of numpy, in containers too.

    Files have no others: numpy's would have to be made by calling a function that the file names. Containers that
    hold none are returned as they are, the others are copied.
    """
    return _plain(value, {})


def _plain(value: Any, seen: dict[int, Any]) -> Any:
    kind = type(value)
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    if kind not in (*_DICTS, *_SEQUENCES) or id(value) in seen:
        return seen.get(id(value), value)
    # A container inside itself stays what it is.
    seen[id(value)] = value
    if kind in _DICTS:
        pairs = [(key, _plain(key, seen), inner, _plain(inner, seen)) for key, inner in value.items()]
        if any(key is not new_key or inner is not new for key, new_key, inner, new in pairs):
            value = kind((new_key, new) for _, new_key, _, new in pairs)
    else:
        items = [(item, _plain(item, seen)) for item in value]
        if any(item is not new for item, new in items):
            value = kind(new for _, new in items)
    return value


def savable_tensor(value: Tensor, what: str) -> Tensor:
    """Return ``value`` as a tensor that loads, which shares memory; ``what`` names it.

    Raises:
        ValueError: no file can hold it: it is sparse, quantized, without data, of a dtype that DCP does not know, or
            of a class whose data lies in other tensors.
    """
    usual = type(value) is Tensor and _has_bytes(value)
    if usual and value.dtype in _DTYPES:
        return value
    known = is_dtensor(value) or shard_tensor_of(value) is not None
    wraps = not known and type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__
    kind: object = None
    if is_lazy(value):
        kind = "not initialized: run the model once first"
    elif value.layout != torch.strided:
        kind = value.layout
    elif value.is_quantized or value.dtype not in _DTYPES:
        kind = value.dtype
    elif value.is_nested or value.is_meta or wraps:
        kind = "on the meta device" if value.is_meta else type(value).__qualname__
    if kind is not None:
        raise ValueError(
            f"dist_asgd: {what} is a tensor that a checkpoint cannot hold ({kind}): only dense tensors with data of "
            f"their own can be saved. Keep it elsewhere, or remove it while you save."
        )
    if known or type(value) in (Tensor, torch.nn.Parameter):
        return value
    # The file would name the subclass, and a load would have to run its code.
    return value.detach().as_subclass(Tensor)


def savable_object(value: Any, what: str, *, in_tuple: bool = False) -> Serialized:
    """Return ``value`` serialized, with ``in_tuple`` as the only item of a tuple. Tensors in it are copied.

    Raises:
        ValueError: the value would not load safely; the error names ``what``, and the key and type inside it.
    """
    try:
        return Serialized(serialized((value,) if in_tuple else value, what))
    except Exception as error:
        where, culprit = _culprit(value, what, 0)
        kind = type(culprit)
        module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
        raise ValueError(
            f"dist_asgd: {where} ({module}{kind.__qualname__}) cannot be saved so that it loads safely: use tensors, "
            f"numbers, strings, None, and dicts, lists and tuples of them (state_dict() of what is more, "
            f"torch.from_numpy() of an array). The reader said: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """Return the line of the error that says what was wrong, and not torch's advice."""
    lines = str(error.__cause__ or error).splitlines() or [type(error).__name__]
    unpickler = "WeightsUnpickler error: "
    told = next((line.partition(unpickler)[2] for line in lines if unpickler in line), lines[0])
    return told.partition(" Please use `torch.serial")[0].removeprefix("dist_asgd: ").strip()


def _culprit(value: Any, where: str, depth: int) -> tuple[str, Any]:
    """Return the name and value of the innermost part that does not load; ``value`` does not."""
    inner: list[tuple[str, Any]] = []
    if depth < MAX_DEPTH and isinstance(value, dict):
        inner = [(f"{where}[{key!r:.80}]", item) for key, item in value.items()]
        inner += [(f"the key {key!r:.80} of {where}", key) for key in value]
    elif depth < MAX_DEPTH and isinstance(value, list | tuple):
        inner = [(f"{where}[{index}]", item) for index, item in enumerate(value)]
    elif depth < MAX_DEPTH and isinstance(value, set | frozenset):
        inner = [(f"an element of {where}", item) for item in value]
    for name, item in inner:
        if type(item) in CONSTANTS and not isinstance(item, int | str):
            continue
        try:
            serialized(item, name)
        except Exception:
            return _culprit(item, name, depth + 1)
    return where, value


def same_values(a: Any, b: Any) -> bool:
    """Whether two values are equal, with all that they contain; tensors are compared to the bit, NaN equals itself.

    It takes whatever an object in a file may hold, also tensors that are sparse, quantized or on the meta device.
    """
    return _are_same(a, b, set())


def _are_same(a: Any, b: Any, compared: set[tuple[int, int]]) -> bool:
    """Compare two values; containers in ``compared`` hold themselves, and are being compared."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        comparable = isinstance(a, Tensor) and isinstance(b, Tensor) and (a.layout, a.dtype) == (b.layout, b.dtype)
        if not comparable or not (_has_bytes(a) and _has_bytes(b)):
            return comparable and _archive_of(a) == _archive_of(b)
        return a.shape == b.shape and same_bits(a, b)
    if type(a) is not type(b):
        return False
    if not isinstance(a, dict | list | tuple | set):
        if isinstance(a, io.BytesIO):
            return a.getvalue() == b.getvalue()  # type: ignore[no-any-return]
        if bool(a == b or (a != a and b != b)):
            return True
        # Storages are equal only to themselves.
        return isinstance(a, TypedStorage | UntypedStorage) and _archive_of(a) == _archive_of(b)
    if len(a) != len(b) or (id(a), id(b)) in compared:
        return len(a) == len(b)
    compared = compared | {(id(a), id(b))}
    if isinstance(a, dict) and a.keys() == b.keys():
        return all(_are_same(value, b[key], compared) for key, value in a.items())
    if isinstance(a, set):
        # Tensors and NaN are equal only to themselves as elements and as keys.
        others = list(b - a)
        for item in a - b:
            same = next((n for n, other in enumerate(others) if _are_same(item, other, compared)), None)
            if same is None:
                return False
            del others[same]
        return True
    if isinstance(a, dict):
        a, b = a.items(), b.items()
    return all(_are_same(item, other, compared) for item, other in zip(a, b, strict=True))


def _has_bytes(tensor: Tensor) -> bool:
    special = tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta
    return not special


def deep_copy(value: Any) -> Any:
    """Return a deep copy of ``value``, also of tensors that ``copy.deepcopy`` refuses, which are detached.

    These are tensors that autograd has computed, nested ones, and sparse ones in compressed layouts.
    """
    memo: dict[int, Any] = {}
    for tensor in tensors_in(value):
        try:
            copy.deepcopy(tensor, memo)
        except (RuntimeError, NotImplementedError):
            memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(value, memo)


def check_option(value: Any, what: str) -> None:
    """Raise ValueError, which names ``what``, if ``load_state_dict()`` of an optimizer could not copy its option."""
    for tensor in tensors_in(value):
        if not _has_bytes(tensor):
            try:
                copy.deepcopy(tensor.detach())
            except (RuntimeError, NotImplementedError) as error:
                kind = "nested" if tensor.is_nested else tensor.layout
                raise ValueError(
                    f"dist_asgd: {what} holds a tensor ({kind}) that copy.deepcopy() refuses, and loading an optimizer "
                    f"copies its options: it cannot be saved so that it loads. Keep it elsewhere."
                ) from error


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in ``value`` and its containers, however deep."""
    found: list[Tensor] = []
    waiting, seen = [value], set[int]()
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, dict | list | tuple | set | frozenset) and id(item) not in seen:
            seen.add(id(item))
            waiting += [*item, *item.values()] if isinstance(item, dict) else item
    return found


def _archive_of(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors of the same shape and dtype are equal to the bit: NaN is itself, -0.0 is not 0.0."""
    return torch.equal(bytes_of(a), bytes_of(b))


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a dense tensor, row by row, as a flat uint8 tensor."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # Not reshape(): a tensor of one element counts as contiguous with any strides.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
