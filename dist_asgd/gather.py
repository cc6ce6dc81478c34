"""The updated shards become everyone's parameters: in place, a bucket at a time, while others are still updated."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from .comm import Communicators, Wait
from .placements.presharded import PreshardedState
from .placements.replicas import ReplicaGroup
from .storage.buffers import StateBuffer
from .storage.layout import DIRECT_BYTES, SendLayout, SendRange, send_layout, whole_layout

# Buffers for what is packed of the stores on their way: one arrives while the next is packed.
MAX_PACKED = 2


class Gatherer:
    """All-gathers buckets, and what replicas share; every rank launches the same in the same order."""

    def __init__(self, communicators: Communicators) -> None:
        self._communicators = communicators
        self._in_flight: deque[Wait] = deque()
        self._buffers: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
        self._packed = 0
        self._layouts: dict[int, SendLayout] = {}

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the buffers for packed parameters, kept between steps."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def launch(self, store: StateBuffer) -> None:
        """Collective: start to bring every rank's part of the parameters to all; nothing where nobody lacks any."""
        if store.flat is not None:
            self._in_flight.append(self._communicators.on(store.device).all_gather(store.flat))
        elif isinstance(store, PreshardedState) and store.replicas is not None:
            self._launch_among(store, store.replicas)

    def _launch_among(self, store: PreshardedState, replicas: ReplicaGroup) -> None:
        """Collective on the replicas: large local tensors are filled where they lie, small ones share messages."""
        communicator = replicas.on(store.device)
        if id(store) not in self._layouts:
            direct_numel = DIRECT_BYTES // store.dtype.itemsize
            whole = communicator.contiguous
            self._layouts[id(store)] = whole_layout(store.layout) if whole else send_layout(store.layout, direct_numel)
        layout = self._layouts[id(store)]
        packed = self._buffer(store, layout.packed_numel)
        small = [(store.members[position], at) for position, at in layout.packed]
        own = [(member, at + member.fragment.param_start) for member, at in small if member.fragment.numel]
        if own:
            torch._foreach_copy_(
                [packed[at : at + member.fragment.numel] for member, at in own],
                [member.param_range(member.fragment.start, member.fragment.stop) for member, _ in own],
            )
        parts = [[_place(store, packed, stretch) for stretch in stretches] for stretches in layout.ranges]
        arrived = communicator.all_gather_parts(parts)

        def unpack() -> None:
            arrived()
            if small:
                torch._foreach_copy_(
                    [member.flat for member, _ in small],
                    [packed[at : at + member.slot.numel] for member, at in small],
                )

        self._in_flight.append(unpack)

    def _buffer(self, store: StateBuffer, numel: int) -> Tensor:
        """Room for what is packed, of which ``MAX_PACKED`` are in use at a time."""
        if not numel:
            return torch.empty(0, dtype=store.dtype, device=store.device)
        while len(self._in_flight) >= MAX_PACKED:
            self._in_flight.popleft()()
        self._packed += 1
        key = (store.device, store.dtype, self._packed % MAX_PACKED)
        if key not in self._buffers or self._buffers[key].numel() < numel:
            self._buffers[key] = torch.empty(numel, dtype=store.dtype, device=store.device)
        return self._buffers[key][:numel]

    def wait(self) -> None:
        """Wait for every gather launched so far."""
        while self._in_flight:
            self._in_flight.popleft()()


def _place(store: PreshardedState, packed: Tensor, stretch: SendRange) -> Tensor:
    """Where the elements of ``stretch`` lie, 1-D: in the packed buffer, or in a local tensor."""
    within = packed if stretch.slot is None else store.members[stretch.slot].flat
    return within[stretch.source : stretch.source + stretch.stop - stretch.start]
