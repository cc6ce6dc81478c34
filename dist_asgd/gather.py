"""The gather phase of a step: updated shards become everyone's parameters, in place, while others are still updated."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from .comm import Communicators, Wait
from .comm.base import ShardCollectives
from .placements.presharded import PreshardedState
from .placements.replicas import ReplicaGroup
from .storage.buffers import StateBuffer
from .storage.send_layout import DIRECT_BYTES, SendLayout, SendRange, send_layout, whole_layout

# Buffers for packed local tensors: one arrives while the next is packed.
MAX_PACKED = 2


class Gatherer:
    """All-gathers buckets, and the local tensors that replica groups share.

    Used by ``step()``, ``averaged_parameters()`` and loads. Every rank launches the same gathers in the same order.
    """

    def __init__(self, communicators: Communicators) -> None:
        self._communicators = communicators
        self._collectives: dict[torch.device, ShardCollectives] = {}
        # Oldest first: gathers end in the order in which they were launched.
        self._in_flight: deque[Wait] = deque()
        self._buffers: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
        self._num_packed = 0
        self._layouts: dict[int, SendLayout] = {}

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the buffers for packed local tensors, which are kept between steps."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def forget_layouts(self) -> None:
        """Forget the layouts of state buffers; called when all of them are replaced."""
        self._layouts.clear()

    def launch(self, buffer: StateBuffer) -> None:
        """Start to bring every rank's shard of the parameters of ``buffer`` to all ranks that need it. Collective.

        Does nothing for DTensors without replicas: every rank already has all it needs. Returns at once; the
        parameters are complete after ``wait``.
        """
        if buffer.flat is not None:
            if buffer.device not in self._collectives:
                self._collectives[buffer.device] = self._communicators.on(buffer.device)
            self._in_flight.append(self._collectives[buffer.device].all_gather(buffer.flat))
        elif isinstance(buffer, PreshardedState) and buffer.replicas is not None:
            self._launch_among(buffer, buffer.replicas)

    def wait(self) -> None:
        """Wait for every gather launched so far."""
        while self._in_flight:
            self._in_flight.popleft()()

    def _launch_among(self, buffer: PreshardedState, replicas: ReplicaGroup) -> None:
        """Gather the local tensors that ``replicas`` share. Collective on these ranks.

        Large local tensors are filled where they lie; small ones are packed, so that they share messages.
        """
        communicator = replicas.on(buffer.device)
        if id(buffer) not in self._layouts:
            direct_numel = DIRECT_BYTES // buffer.dtype.itemsize
            whole = communicator.contiguous
            shard_numel = buffer.layout.shard_numel
            self._layouts[id(buffer)] = (
                whole_layout(buffer.layout) if whole else send_layout(buffer.layout, direct_numel, 0, shard_numel)
            )
        layout = self._layouts[id(buffer)]
        packed = self._packed_buffer(buffer, layout.packed_numel)
        small = [(buffer.members[piece.slot], piece.target) for piece in layout.pieces if piece.slot is not None]
        own = [(member, at + member.fragment.param_start) for member, at in small if member.fragment.numel]
        if own:
            torch._foreach_copy_(
                [packed[at : at + member.fragment.numel] for member, at in own],
                [member.param_range(member.fragment.start, member.fragment.stop) for member, _ in own],
            )
        parts = [[_place(buffer, packed, part) for part in ranges] for ranges in layout.ranges]
        arrived = communicator.all_gather_uneven(parts)

        def unpack() -> None:
            arrived()
            if small:
                torch._foreach_copy_(
                    [member.flat for member, _ in small],
                    [packed[at : at + member.slot.numel] for member, at in small],
                )

        self._in_flight.append(unpack)

    def _packed_buffer(self, buffer: StateBuffer, numel: int) -> Tensor:
        """Memory ``(numel,)`` for packed local tensors; ``MAX_PACKED`` such buffers take turns."""
        if not numel:
            return torch.empty(0, dtype=buffer.dtype, device=buffer.device)
        # The buffer that comes next is free once the gather before the last has ended and was unpacked.
        while len(self._in_flight) >= MAX_PACKED:
            self._in_flight.popleft()()
        self._num_packed += 1
        key = (buffer.device, buffer.dtype, self._num_packed % MAX_PACKED)
        if key not in self._buffers or self._buffers[key].numel() < numel:
            self._buffers[key] = torch.empty(numel, dtype=buffer.dtype, device=buffer.device)
        return self._buffers[key][:numel]


def _place(buffer: PreshardedState, packed: Tensor, send_range: SendRange) -> Tensor:
    """The elements of ``send_range``, 1-D: a view of the packed buffer, or of a large local tensor as it lies."""
    within = packed if send_range.slot is None else buffer.members[send_range.slot].flat
    return within[send_range.source : send_range.source + send_range.stop - send_range.start]
