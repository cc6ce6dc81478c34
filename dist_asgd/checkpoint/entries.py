"""What a checkpoint holds of a model and its optimizer, by name, and which chunks of it this rank writes.

The keys are those of ``get_state_dict`` of ``torch.distributed.checkpoint`` (DCP):

``model.<name>``                      parameters and buffers, under their true shape
``optim.state.<name>.<key>``          step, eta, mu, ax, a master and own entries of the user of each parameter; of
                                      another optimizer than ASGD whatever it keeps
``optim.class``                       the class of an optimizer that is no ASGD
``optim.own``                         own entries that have no such key, see ``own_entries``
``optim.sources``                     parameters that entries of the model come from, see ``source_record``
``optim.param_groups.<name>.<key>``   the hyperparameters of its group, for each parameter
``averages.<average>.…``              the same as below ``optim`` of each average beside the optimizer
``extra.<rank>``                      the values that the caller adds on each rank
``containers.<key>``                  how a dict or list is built of its leaves, see ``containers``

Names are those of ``names.py``. Saving calls ``state_to_save``, ``flat_state``, ``local_chunks`` and ``without_copies``
in this order; loading uses the names and the fragments.

Unlike DCP, ranks exchange no save plan: each rank knows which fragments only it has, and on one mesh the first rank
with a copy writes it. Only copies on unrelated meshes (tensor parallelism inside DDP) are found by asking.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..averaging import Averages
from ..comm import Communicator
from ..placements.dtensor import is_dtensor, is_first_copy
from ..placements.shard_tensor import ShardTensor, shard_tensor_of
from ..sharded_state import ShardedState
from ..state_dict.own_entries import check_whole
from ..state_dict.sharded import AVERAGE, ShardTensorCache
from ..validation import params_of
from .containers import CONTAINERS, take_apart
from .format.writer import ChunkToWrite, KeyPath, Serialized
from .names import names_of
from .optimizer_entries import entries_of, is_own, refuse
from .rows import FragmentCache
from .sections import AVERAGES, EXTRA, MODEL, OPTIM
from .source_record import SOURCES, record_of
from .sources import traced
from .values import CONSTANTS, plain, savable_object, savable_tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# No such tensor is a DTensor or a ShardTensor; most tensors are of these types, and asking further is left out.
_PLAIN_TYPES = (Tensor, nn.Parameter)

State = dict[str, dict[str, Any]]
"""The sections of a checkpoint (``model``, ``optim``, ``averages``, ``extra``); keys follow the name and a dot."""


# inference_mode(False): in inference mode a DTensor could not be detached.
@torch.inference_mode(False)
@torch.no_grad()
def state_to_save(
    model: nn.Module,
    optimizer: Optimizer,
    extra: Any,
    rank: int,
    replica: int = 0,
    cache: FragmentCache | None = None,
    averages: Mapping[str, ShardedState] | None = None,
) -> State:
    """Return what this rank has to save of ``model``, ``optimizer``, ``averages`` and ``extra``, all live tensors.

    Not collective. Rank 0 saves whatever all ranks hold alike, the other ranks only their fragments.

    Args:
        replica: which copy of the shards this rank holds, in hybrid sharding; only the first copy is saved.
        cache: what was made of the fragments of parameters in the last call, which is used again.
        averages: those beside the optimizer, by name.
    """
    refuse(optimizer)
    for name, buffer in model.named_buffers():
        if is_lazy(buffer):
            savable_tensor(buffer, f"{MODEL}.{name}")
    params = params_of(optimizer.param_groups)
    Averages.refuse_swapped("saving a checkpoint", params)
    live, source_of = traced(model, params, keep_vars=True)
    names = names_of(model, optimizer, live)
    # Not state_dict() of a ShardedASGD, of which the next call may have to be the whole (consolidate_state_dict).
    if isinstance(optimizer, ShardedState):
        optimizer.shards.check_whole()
        # Of each parameter rows are saved that other ranks have updated.
        optimizer.wait_for_parameters()
    saved = optimizer.live_state(saved=True) if isinstance(optimizer, ShardedState) else optimizer.state_dict()
    cache = cache or FragmentCache()
    parts = cache.rows(optimizer, param_fragments(optimizer, saved, cache.fragments))
    model_state: dict[str, Any] = {}
    for key, value in live.items():
        # Every rank has the whole parameter and writes about as much of it as it updates.
        part = parts.get(id(value))
        if part is not None:
            value = part
        elif isinstance(value, Tensor):
            value = value.detach()
        if not rank or is_own(value, replica):
            model_state[names.of_model[key]] = value
    if isinstance(optimizer, ShardedState):
        check_whole(optimizer.state, optimizer.shards.members, optimizer.communicators)
    optim = entries_of(optimizer, saved, names, rank, replica)
    if not rank:
        record = record_of(live, names, params, [*model.parameters(), *model.buffers()], source_of)
        if record is not None:
            optim[SOURCES] = record.serialize()
    state: State = {MODEL: model_state, OPTIM: optim}
    for name, average in (averages or {}).items():
        below = state.setdefault(AVERAGES, {})
        below |= {f"{name}.{key}": value for key, value in _average_to_save(model, average, live, rank).items()}
    if extra is not None:
        # In a tuple, because DCP takes dicts and lists apart.
        state[EXTRA] = {str(rank): savable_object(plain(extra), "extra", in_tuple=True)}
    return state


def param_fragments(
    optimizer: Optimizer, state_dict: dict[str, Any], cache: ShardTensorCache
) -> dict[int, ShardTensor]:
    """Return this rank's fragment of each parameter that is whole on every rank, by ``id()`` of the parameter.

    Fragments share memory with their parameters. A fragment is the one of the parameter's ``ax`` in ``state_dict``,
    which is the optimizer's; a parameter whose ``ax`` is whole, or that is a DTensor, has none.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    fragments = {}
    for index, param in enumerate(params):
        if type(param) not in _PLAIN_TYPES and is_dtensor(param):
            continue
        average = shard_tensor_of(state_dict["state"].get(index, {}).get(AVERAGE))
        if average is None:
            continue
        own = cache.get(index)
        if own is None or not own.is_like(average, param):
            flat = average.fragment_view(param)
            if flat is None:
                cache.pop(index, None)
                continue
            own = cache[index] = average.like(flat)
        fragments[id(param)] = own
    return fragments


def _average_to_save(model: nn.Module, average: ShardedState, keys: Iterable[str], rank: int) -> dict[str, Any]:
    """Return what this rank has to save of an average beside the optimizer, by key below its root."""
    average.shards.check_whole()
    saved = average.live_state(saved=True)
    check_whole(average.state, average.shards.members, average.communicators)
    # Its mesh may have other replicas than that of the optimizer.
    return entries_of(average, saved, names_of(model, average, keys), rank, average.communicators.replica)


# --- the flat state --------------------------------------------------------------------------------------


class FlatState(NamedTuple):
    """What this rank saves, with a key for each tensor and each object; whatever is in it loads.

    Attributes:
        sections: as in ``State``, but without containers: DCP takes them apart. Objects that could change before they
            are written are serialized.
        paths: DCP's path of every key, the section's name included, in the order of ``sections``.
    """

    sections: State
    paths: dict[str, KeyPath]


def flat_state(state: State, rank: int, replica: int = 0) -> FlatState:
    """Take the containers in ``state`` apart, and check that a load could read everything. Not collective.

    Raises:
        ValueError: a load would refuse a value, or its key; the error names it.
    """
    sections: State = {section: {} for section in state}
    paths: dict[str, KeyPath] = {}
    objects = _Objects()
    skeletons: dict[str, Any] = {}
    # Containers that stay whole, such as the list of names that all parameters of a group share, are walked once.
    whole: set[int] = set()
    for section, entries in state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor | Serialized) or type(value) in CONSTANTS or id(value) in whole:
                leaves: dict[str, Any] = {f"{section}.{key}": value}
                leaf_paths: dict[str, KeyPath] = {f"{section}.{key}": (section, key)}
            else:
                kept = objects.plain(value)
                leaves, leaf_paths, skeleton = take_apart(section, key, kept)
                if kept is value and leaves.get(f"{section}.{key}") is value:
                    whole.add(id(value))
                if skeleton is not None and not rank:
                    skeletons[f"{section}.{key}"] = objects.skeleton(value, skeleton, f"{section}.{key}")
                if rank:
                    leaves = {name: leaf for name, leaf in leaves.items() if is_own(leaf, replica)}
            for name, leaf in leaves.items():
                if name in paths:
                    raise ValueError(f"dist_asgd: two entries of the state have the key {name} in a checkpoint.")
                paths[name] = leaf_paths[name]
                if isinstance(leaf, Tensor):
                    leaf = savable_tensor(leaf, name)
                sections[section][name[len(section) + 1 :]] = leaf if isinstance(leaf, Tensor) else objects(leaf, name)
    if skeletons:
        sections[CONTAINERS] = skeletons
        paths |= {f"{CONTAINERS}.{key}": (CONTAINERS, key) for key in skeletons}
    for key in paths:
        if not key.isascii():
            _check_text(key)
    return FlatState(sections, paths)


def _check_text(key: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"dist_asgd: the key {key!r} cannot be saved: it is no text ({error.reason}).") from error


class _Objects:
    """Checks and serializes objects, those that many parameters share once. It keeps them alive, by their id."""

    def __init__(self) -> None:
        self._plain: dict[int, tuple[Any, Any]] = {}
        self._serialized: dict[tuple[str, Any], tuple[Any, Any]] = {}

    def plain(self, value: Any) -> Any:
        """Return ``plain(value)``, the same object for the same ``value``."""
        if id(value) not in self._plain:
            self._plain[id(value)] = value, plain(value)
        return self._plain[id(value)][1]

    def __call__(self, value: Any, what: str) -> Any:
        """Return the object as it is to be written: a constant, or serialized."""
        kind = type(value)
        if kind in (bool, float, type(None), Serialized):
            return value
        constant = kind in CONSTANTS
        known = (kind.__name__, value) if constant else ("", id(value))
        if known not in self._serialized:
            self._serialized[known] = value, value if constant and _is_short(value) else savable_object(value, what)
        return value if constant else self._serialized[known][1]

    def skeleton(self, container: Any, skeleton: tuple[Any, Any], what: str) -> Serialized:
        """Return the skeleton of a container, serialized; once for all keys of a container without tensors."""
        known = ("skeleton", what if skeleton[1] else id(container))
        if known not in self._serialized:
            try:
                self._serialized[known] = container, savable_object(skeleton, what)
            except ValueError:
                # The same error, with the keys inside the container.
                savable_object(container, what)
                raise
        return cast(Serialized, self._serialized[known][1])


def _is_short(value: Any) -> bool:
    return value.isascii() if isinstance(value, str) else abs(value) < 1 << 62


# --- chunks ----------------------------------------------------------------------------------------------


class LocalChunks(NamedTuple):
    """``chunks`` are what this rank writes; ``paths`` has every key of its state in order, whoever writes it."""

    chunks: list[ChunkToWrite]
    paths: dict[str, KeyPath]


def local_chunks(state: FlatState, world_size: int) -> LocalChunks:
    """Cut this rank's ``state`` into chunks, in its order. Of copies on one mesh only the first rank writes any."""
    chunks: list[ChunkToWrite] = []
    values = (value for entries in state.sections.values() for value in entries.values())
    # The same strings as in ``paths``: pickle writes each once.
    for key, value in zip(state.paths, values, strict=True):
        if not isinstance(value, Tensor):
            chunks.append(ChunkToWrite(key, value))
            continue
        fragment = None if type(value) in _PLAIN_TYPES else shard_tensor_of(value)
        mesh = value.device_mesh if type(value) not in (*_PLAIN_TYPES, ShardTensor) and is_dtensor(value) else None
        # Another mesh may hold the same regions, unless this one has all ranks.
        may_be_copied = mesh is not None and mesh.size() < world_size
        if fragment is not None:
            shape = fragment.global_shape
            chunks += [
                ChunkToWrite(key, view, shape, offsets, may_be_copied) for (offsets, _), view in fragment.regions()
            ]
        elif mesh is None:
            chunks.append(ChunkToWrite(key, value, tuple(value.shape), (0,) * value.dim()))
        elif is_first_copy(cast("DTensor", value)):
            chunks += _dtensor_chunks(key, value, may_be_copied)
    return LocalChunks(chunks, state.paths)


def _dtensor_chunks(key: str, value: Any, may_be_copied: bool) -> list[ChunkToWrite]:
    shape = tuple(value.shape)
    return [
        ChunkToWrite(key, value.__get_tensor_shard__(item.index), shape, tuple(item.index.offset), may_be_copied)
        for item in value.__create_write_items__(key, value)
    ]


def without_copies(chunks: list[ChunkToWrite], communicator: Communicator) -> list[ChunkToWrite]:
    """Return ``chunks`` without those that a lower rank writes from another mesh. Collective on all ranks."""
    mine = [(chunk.key, chunk.offsets) for chunk in chunks if chunk.may_be_copied]
    # Most jobs have no such chunks, and one small message tells.
    if not communicator.any_of(bool(mine)):
        return chunks
    copies: list[set[tuple[str, Any]]] = []
    taken: set[tuple[str, Any]] = set()
    for theirs in communicator.gather_objects(mine, 0) or ():
        copies.append(taken.intersection(theirs))
        taken.update(theirs)
    dropped = communicator.exchange_objects(copies)[0][communicator.rank]
    return [chunk for chunk in chunks if (chunk.key, chunk.offsets) not in dropped]
