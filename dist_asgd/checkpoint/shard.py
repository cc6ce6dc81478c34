"""What marks one rank's part of the state, so that nobody takes it for the whole.

``AverageShard`` is a rank's slice of ``ax``: an ordinary tensor to look at, copy and pickle, but one that
``torch.distributed.checkpoint`` cannot write and ``torch.optim`` cannot load, where either would take a slice for
a whole. ``ShardMark`` says whose shard it is and on which layout; every param group of a sharded state dict
carries one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

MARK_KEY = "dist_asgd"

_REMEDY = (
    "dist_asgd: this is one rank's slice of ax, not the whole tensor: {what} would take it for the whole. Use "
    "optimizer.consolidated_state_dict(), which has torch.optim.ASGD's own layout; to save shards, torch.save each "
    "rank's state_dict() to a file of its own."
)


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(_REMEDY.format(what=what))


class AverageShard(torch.Tensor):
    """This rank's 1-D slice of one parameter's ``ax``; shares memory with the optimizer."""

    @classmethod
    def of(cls, slice_: Tensor) -> AverageShard:
        """Mark ``slice_`` ``(piece_numel,)``; no copy."""
        return slice_.detach().as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Plain tensors out of every operation; those with which savers and loaders begin are refused."""
        if func in _CONVERSIONS:
            _refuse(f"Tensor.{func.__name__}()")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> AverageShard:
        """A marked copy, as the original is marked."""
        return AverageShard.of(copy.deepcopy(self.as_subclass(Tensor), memo))

    def __create_write_items__(self, fqn: str, object: Any) -> NoReturn:
        """Called by ``torch.distributed.checkpoint`` to save."""
        _refuse(f"torch.distributed.checkpoint, saving {fqn},")

    def __create_chunk_list__(self) -> NoReturn:
        """Called by ``torch.distributed.checkpoint`` to load."""
        _refuse("torch.distributed.checkpoint, loading,")

    def __get_tensor_shard__(self, index: Any) -> NoReturn:
        """Called by ``torch.distributed.checkpoint`` to find the data."""
        _refuse("torch.distributed.checkpoint")


# With the first three loaders cast and move state; with the last DCP's asynchronous saver begins its copy.
_CONVERSIONS = (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.new_empty)


class ShardMark:
    """Whose shard a state dict is; no tensor, number or string, so that helpers that gather "full" state refuse it.

    ``layout`` is a digest of the layout it is a shard of, ``fresh`` the parameters that have never stepped.
    """

    def __init__(self, rank: int, world_size: int, layout: int, fresh: tuple[int, ...]) -> None:
        self.rank = rank
        self.world_size = world_size
        self.layout = layout
        self.fresh = fresh

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardMark) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.rank, self.world_size, self.layout, self.fresh))

    def __repr__(self) -> str:
        return f"ShardMark(rank={self.rank}, world_size={self.world_size}, layout={self.layout:#x})"


# Files that hold shards load with torch.load(weights_only=True), the default.
torch.serialization.add_safe_globals([AverageShard, ShardMark])
