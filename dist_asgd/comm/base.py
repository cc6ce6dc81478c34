"""The seam: what the optimizer asks of a backend, and one process, which has nobody to ask.

Every method that talks is collective: all ranks of the group call it, in the same order. The mean over ranks is a
sum in rank order on Gloo, whatever arrives first.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Wait = Callable[[], None]
SendList = Sequence[Sequence[tuple[int, Tensor]]]


def _done() -> None:
    """The wait of a transfer that has already finished."""


class PeerError(RuntimeError):
    """A collective failed: a peer died, was cut off, or did not arrive within the group's timeout."""


@contextmanager
def _peers(action: str, rank: int, world_size: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, PeerError):
            raise
        raise PeerError(
            f"dist_asgd: {action} failed on rank {rank} of {world_size}: a peer has died, was cut off, or did not "
            f"arrive within the process group's timeout. Parameters and state may differ between ranks now: "
            f"restart the job from its last checkpoint. The backend said: {error}"
        ) from error


class ShardCollectives(ABC):
    """What is asked of ranks that hold different shards, for tensors of one kind of device.

    ``rank`` of ``world_size`` is the shard that this one holds. Buffers are the caller's, and stay alive until the
    returned wait has been called; what a strategy itself needs it keeps between steps.
    """

    rank: int
    world_size: int

    @property
    def contiguous(self) -> bool:
        """Whether parts have to be one flat buffer of ``world_size * shard_numel``, one part a rank."""
        return False

    @abstractmethod
    def reduce_scatter(self, parts: SendList, shard: Tensor, accumulate: bool, tag: int) -> Wait:
        """Start ``shard (+)= mean over ranks of what they send for it``.

        ``parts[r]`` lists what goes into the shard of rank r, as (start in that shard, 1-D tensor), with the same
        places on every rank; elements that no part covers are left alone. SendList are only read, and must stay as
        they are until the wait. ``shard`` is ``(shard_numel,)`` and complete after the wait. ``tag`` tells apart
        transfers that are in flight together.
        """

    @abstractmethod
    def all_gather(self, flat: Tensor) -> Wait:
        """Start filling ``flat`` ``(world_size * shard_numel,)`` in place from every rank's shard of it."""

    @abstractmethod
    def collect(self, shard: Tensor, pieces: Sequence[Tensor] | None, to: int | None) -> None:
        """Bring every rank's ``shard`` to rank ``to`` (None: all), into ``pieces``: one ``(shard_numel,)`` a rank."""

    @abstractmethod
    def bring(self, piece: Tensor, places: Sequence[Tensor] | None, numels: Sequence[int], to: int | None) -> None:
        """Bring every rank's 1-D ``piece`` to rank ``to`` (None: all), into ``places``, one a rank; None elsewhere.

        Rank r brings ``numels[r]`` elements, all ranks know of how many; those that bring none take no part or
        little. Needs no room beside ``places`` there, and at most that of one piece elsewhere.
        """

    @abstractmethod
    def gather_rows(self, row: Tensor) -> Tensor:
        """Every rank's small ``row`` ``(n,)`` on the device, as ``(ranks, n)``; those of other replicas too."""

    def scratch_bytes(self) -> int:
        """Bytes of the buffers that this strategy keeps between steps."""
        return 0


class Communicator(ShardCollectives):
    """The collectives of one group of ranks."""

    @abstractmethod
    def all_reduce(self, values: Tensor, tag: int) -> Wait:
        """Start ``values = mean over ranks``, in place; 1-D, the same bits on all ranks. ``tag`` as above."""

    @abstractmethod
    def all_gather_parts(self, parts: Sequence[Sequence[Tensor]]) -> Wait:
        """Start filling ``parts[r]``, the 1-D tensors that rank r has, on every rank; the same sizes on all ranks.

        Where ``contiguous``: one tensor a rank, of one size, in one flat buffer.
        """

    @abstractmethod
    def exchange(self, words: Tensor) -> Callable[[], Tensor]:
        """Start an all-gather of int64 ``words`` ``(n,)`` on the host; calling the result gives ``(world_size, n)``."""

    @abstractmethod
    def exchange_objects(self, value: Any) -> list[Any]:
        """All ranks' picklable values, in rank order. For errors and construction, never on the hot path."""

    def gather_objects(self, value: Any, to: int) -> list[Any] | None:
        """All ranks' picklable values on rank ``to``, in rank order, its own as it is; None on the other ranks."""
        here = self.rank == to
        data = torch.frombuffer(bytearray(b"" if here else pickle.dumps(value)) or bytearray(1), dtype=torch.uint8)
        numels = self.exchange(torch.tensor([data.numel()], device="cpu"))().flatten().tolist()
        places = [torch.empty(numel, dtype=torch.uint8, device="cpu") for numel in numels] if here else None
        self.bring(data, places, numels, to)
        if places is None:
            return None
        return [value if r == to else pickle.loads(place.numpy().tobytes()) for r, place in enumerate(places)]


class SingleProcess(Communicator):
    """One process: nothing to send."""

    rank = 0
    world_size = 1

    def reduce_scatter(self, parts: SendList, shard: Tensor, accumulate: bool, tag: int) -> Wait:
        for start, part in parts[0]:
            place = shard[start : start + part.numel()]
            if accumulate:
                place.add_(part)
            else:
                place.copy_(part)
        return _done

    def all_reduce(self, values: Tensor, tag: int) -> Wait:
        return _done

    def all_gather(self, flat: Tensor) -> Wait:
        return _done

    def all_gather_parts(self, parts: Sequence[Sequence[Tensor]]) -> Wait:
        return _done

    def collect(self, shard: Tensor, pieces: Sequence[Tensor] | None, to: int | None) -> None:
        if pieces is not None:
            pieces[0].copy_(shard)

    def bring(self, piece: Tensor, places: Sequence[Tensor] | None, numels: Sequence[int], to: int | None) -> None:
        if places is not None:
            places[0].copy_(piece)

    def gather_rows(self, row: Tensor) -> Tensor:
        return row.unsqueeze(0)

    def exchange(self, words: Tensor) -> Callable[[], Tensor]:
        return lambda: words.unsqueeze(0)

    def exchange_objects(self, value: Any) -> list[Any]:
        return [value]


class GroupCommunicator(Communicator):
    """What the strategies that really communicate share."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def _guard(self, action: str) -> Any:
        return _peers(action, self.rank, self.world_size)

    def _waiting(self, works: Sequence[dist.Work | None], action: str, then: Wait = _done) -> Wait:
        def wait() -> None:
            with self._guard(action):
                for work in works:
                    if work is not None:
                        work.wait()
            then()

        return wait
