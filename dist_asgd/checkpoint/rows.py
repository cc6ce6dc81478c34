"""Which rows of a parameter this rank saves, if the parameter is whole on every rank.

A rank has to save its fragment of an average, and the fragment of a matrix that begins and ends inside rows is three
regions. A parameter in a bucket is whole on every rank, so that of it each rank may save whole rows, one region: those
whose middle lies in its fragment, or in every other parameter those whose beginning does. All ranks together save every
row once, nearly as many bytes each, and nothing is sent or held for it. A load reads regions whole, and a fragment lies
in two or three of them then; so this is done where shards are short, as those of hundreds of ranks are: there the
number of regions counts, and not their bytes.

row    the elements with one index along the outermost dimension, in memory order; of a tensor of more dimensions whose
       rows are long, those with one index along several
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from ..placements.shard_tensor import ShardTensor, memory_order
from ..sharded_state import ShardedState
from ..state_dict.sharded import ShardTensorCache

# A shard has at least so many rows: then a rank writes at most a quarter more than its share of a parameter, and as
# neighbouring ones are cut at other places, an eighth more of all.
_LEAST_ROWS = 4
_MAX_SHARD_BYTES = 1 << 17


class FragmentCache:
    """What a save has made of the fragments of parameters, for the next save. One per ``Saver``.

    ``fragments`` are by the parameter's index.
    """

    def __init__(self) -> None:
        self.fragments: ShardTensorCache = {}
        # The fragment of which rows were made, the elements of a shard, and the rows.
        self._rows: dict[int, tuple[ShardTensor, int, ShardTensor]] = {}

    def rows(self, optimizer: Optimizer, fragments: Mapping[int, ShardTensor]) -> dict[int, ShardTensor]:
        """Return what this rank saves of each parameter, by its ``id()``: rows, or the fragment where rows are long.

        ``fragments`` are this rank's, which share memory with the whole parameters. The results do so too.
        """
        saved = dict(fragments)
        if not isinstance(optimizer, ShardedState):
            return saved
        for buffer in optimizer.shards.whole_buffers:
            for member in buffer.members:
                fragment = saved.get(id(member.param))
                if fragment is None:
                    continue
                shard_numel = buffer.layout.shard_numel // (2 if member.param.is_complex() else 1)
                known = self._rows.get(member.index)
                if known is None or known[0] is not fragment or known[1] != shard_numel:
                    rows = rows_of(fragment, member.param, shard_numel, member.index % 2 == 0)
                    known = self._rows[member.index] = fragment, shard_numel, rows
                saved[id(member.param)] = known[2]
        return saved


def rows_of(fragment: ShardTensor, whole: Tensor, shard_numel: int, by_middle: bool) -> ShardTensor:
    """Return the rows of ``whole`` that belong to ``fragment``, as a view; the fragment itself if rows are too long."""
    shape, strides, start, numel = fragment.extent
    in_memory = [shape[dim] for dim in memory_order(shape, strides)]
    first, stop = row_range(start, start + numel, in_memory, shard_numel, whole.element_size(), by_middle)
    if (first, stop) == (start, start + numel):
        return fragment
    rows = whole.detach().as_strided((stop - first,), (1,), whole.storage_offset() + first)
    return ShardTensor(rows, shape, strides, first)


def row_range(
    start: int, stop: int, shape: Sequence[int], shard_numel: int, itemsize: int, by_middle: bool
) -> tuple[int, int]:
    """Return the elements of the rows whose middle, or beginning, is in the fragment ``[start, stop)``.

    All ranks pass the same ``shard_numel``, the elements of a shard, so that their rows are as long. If a shard has
    too few rows, or too many bytes, these are the elements of the fragment.
    """
    row_numel = 1 if shard_numel * itemsize > _MAX_SHARD_BYTES else _row_numel(shape, shard_numel)
    point = row_numel // 2 if by_middle else 0
    first, end = (-(-(at - point) // row_numel) * row_numel for at in (start, stop))
    return first, end


def _row_numel(shape: Sequence[int], shard_numel: int) -> int:
    """Return the elements of the longest rows of which a shard has several; 1 if there are none."""
    inner = (math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return next((numel for numel in inner if numel and numel * _LEAST_ROWS <= shard_numel), 1)
