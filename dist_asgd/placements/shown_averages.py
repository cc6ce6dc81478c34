"""The averages as ``optimizer.state`` shows them: one tensor for each parameter, over the memory of its buffer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..storage.buffers import ShardedParam, StateBuffer
from ..storage.snapshots import PublishedAverages, TensorSnapshot
from .dtensor import plain_tensor


class ShownAverages:
    """``ax`` of each parameter, by its index among all parameters of the optimizer."""

    def __init__(self) -> None:
        self.by_index: dict[int, Tensor] = {}
        # With the members whose averages these are, in their order; by the ``id()`` of state buffers.
        self._of_buffers: dict[int, tuple[PublishedAverages, Sequence[ShardedParam]]] = {}
        # Of all tensors, so that most calls look at them in one pass; None if some are new.
        self._snapshot: TensorSnapshot | None = None

    def show(self, buffer: StateBuffer) -> list[Tensor | None]:
        """Make new tensors for the averages of ``buffer``, which lie elsewhere now; returns the ones before."""
        before = [self.by_index.get(member.index) for member in buffer.members]
        averages = [member.state_entry(member.average) for member in buffer.members]
        self.by_index.update(zip((member.index for member in buffer.members), averages, strict=True))
        self._of_buffers[id(buffer)] = (PublishedAverages(list(map(plain_tensor, averages))), list(buffer.members))
        self._snapshot = None
        return before

    def follow(self) -> None:
        """Follow tensors that were moved to other memory; RuntimeError if one has another shape, dtype or device."""
        if self._snapshot is not None and self._snapshot.is_current():
            return
        for published, members in self._of_buffers.values():
            published.follow(lambda position, members=members: members[position].name)  # type: ignore[misc]
        self._snapshot = TensorSnapshot.of(list(map(plain_tensor, self.by_index.values())))
