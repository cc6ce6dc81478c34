"""What one rank writes of a state: boxes of tensors, and objects.

No plan travels between ranks, as each knows what it alone holds, and which copy on a mesh is the first. Only copies on
meshes that know nothing of each other (tensor parallelism inside DDP) have to be told.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from ..comm import Communicator
from ..placements.dtensor import is_dtensor, is_first_copy
from ..placements.shard_tensor import shard_tensor_of

State = dict[str, dict[str, Any]]
KeyPath = tuple[str | int, ...]
"""Where in nested dicts something stands; joined by dots its key."""


class ChunkToWrite(NamedTuple):
    """One box of a tensor, or an object, which has no ``shape`` and no ``offsets``.

    ``shape`` is that of the whole tensor. ``elsewhere``: another mesh may have it too.
    """

    key: str
    data: Any
    shape: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None
    elsewhere: bool = False


class LocalChunks(NamedTuple):
    """``pieces``: what this rank writes. ``paths``: all that is named in its state, in order, whoever holds it."""

    pieces: list[ChunkToWrite]
    paths: dict[str, KeyPath]


def local_chunks(state: State, world_size: int) -> LocalChunks:
    """All that this rank holds, in the order of ``state``; of copies on one mesh only the first rank has any."""
    pieces: list[ChunkToWrite] = []
    paths: dict[str, KeyPath] = {}
    for key, path, value in _flat(state):
        paths[key] = path
        part = shard_tensor_of(value)
        if part is not None:
            elsewhere = is_dtensor(value) and value.device_mesh.size() < world_size
            pieces += [
                ChunkToWrite(key, view, part.global_shape, offsets, elsewhere) for (offsets, _), view in part.regions()
            ]
        elif is_dtensor(value):
            if is_first_copy(value):
                pieces += _pieces_of_dtensor(key, value, value.device_mesh.size() < world_size)
        elif isinstance(value, Tensor):
            pieces.append(ChunkToWrite(key, value, tuple(value.shape), (0,) * value.dim()))
        else:
            pieces.append(ChunkToWrite(key, value))
    return LocalChunks(pieces, paths)


def _flat(state: State) -> Iterator[tuple[str, KeyPath, Any]]:
    """Keys and paths as DCP has them: containers are taken apart."""
    for part, entries in state.items():
        for key, value in entries.items():
            if isinstance(value, dict | list | tuple):
                flat, paths = flatten_state_dict({part: {key: value}})
                yield from ((name, paths[name], inner) for name, inner in flat.items())
            else:
                yield f"{part}.{key}", (part, key), value


def _pieces_of_dtensor(key: str, value: Any, elsewhere: bool) -> list[ChunkToWrite]:
    shape = tuple(value.shape)
    return [
        ChunkToWrite(key, value.__get_tensor_shard__(item.index), shape, tuple(item.index.offset), elsewhere)
        for item in value.__create_write_items__(key, value)
    ]


def without_copies(pieces: list[ChunkToWrite], communicator: Communicator) -> list[ChunkToWrite]:
    """Collective: ``pieces`` without those that a lower rank has on another mesh."""
    mine = [(piece.key, piece.offsets) for piece in pieces if piece.elsewhere]
    if not communicator.exchange(torch.tensor([len(mine)], device="cpu"))().any():
        return pieces
    copies: list[set[tuple[str, Any]]] = []
    taken: set[tuple[str, Any]] = set()
    for said in communicator.gather_objects(mine, 0) or ():
        copies.append(taken.intersection(said))
        taken.update(said)
    dropped = communicator.exchange_objects(copies)[0][communicator.rank]
    return [piece for piece in pieces if (piece.key, piece.offsets) not in dropped]
