"""The gather phase of a step: updated shards become everyone's parameters, in place, while others are still updated."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .comm import Communicators, Wait
from .comm.base import ShardCollectives
from .gradients.sending import complete, complete_in_background
from .labels import Label, label
from .placements.presharded import PreshardedState
from .placements.replicas import ReplicaGroup
from .storage.buffers import StateBuffer
from .storage.send_layout import DIRECT_BYTES, SendLayout, SendRange, send_layout, whole_layout
from .storage.snapshots import mark_written

# Buffers for packed local tensors: one arrives while the next is packed.
MAX_PACKED = 2


class Arrivals:
    """The gathers of buckets that nobody has waited for yet, by the id of the bucket, oldest first.

    A step waits for those that it does not *defer*. Modules wait for the others, perhaps when the optimizer is no more,
    and ``on_failure`` is called if such a wait fails or is interrupted. On a device all waits are waits of the stream
    that was current in the step, and other streams that are current in a wait follow it.
    """

    # Those that have left gathers to modules, over all optimizers of the process; it keeps none of them alive.
    _deferring: ClassVar[weakref.WeakSet[Arrivals]] = weakref.WeakSet()

    def __init__(self) -> None:
        self._waits: dict[int, Wait] = {}
        # The parameters of deferred buckets.
        self._deferred: dict[int, Sequence[Tensor]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        # Forwards may run in several threads, and none may take a gather for complete that another one waits for.
        self._lock = threading.RLock()
        self.on_failure: Callable[[], None] = lambda: None
        # A step that waits ends only when the other ranks have everything, and so does a process now. A finalizer of
        # weakref would do so too, but in a collected cycle it comes before __del__: any code would wait for ranks then.
        self._at_exit = partial(_complete, self._waits)
        atexit.register(self._at_exit)

    def __del__(self) -> None:
        """Let a thread keep what is in flight until it has arrived: the other ranks wait for it."""
        atexit.unregister(self._at_exit)
        complete_in_background(list(self._waits.values()), before_exit=True)

    def add(self, key: int, wait: Wait) -> None:
        """Add a gather that was launched just now."""
        self._waits[key] = wait

    @property
    def keys(self) -> list[int]:
        """Those of the gathers in flight, oldest first."""
        return list(self._waits)

    def defer(self, params: Mapping[int, Sequence[Tensor]], devices: Iterable[torch.device]) -> None:
        """Leave the gathers in flight to those who read parameters: ``params`` of each, which lie on ``devices``."""
        self._deferring.add(self)
        self._deferred = dict(params)
        self._streams = {device: torch.cuda.current_stream(device) for device in devices if device.type == "cuda"}

    @classmethod
    def wait_for_deferred(cls) -> None:
        """Wait for the gathers that any optimizer of the process has left to modules.

        ``ShardedAverage`` reads parameters past the modules.
        """
        # To iterate over a WeakSet takes much longer, with every update of every average.
        if len(cls._deferring):
            for arrivals in list(cls._deferring):
                arrivals.wait()

    def wait_for(self, keys: Container[int]) -> None:
        """Wait for the gathers of these buckets, as far as nobody has waited for them. PeerError if one fails."""
        with self._lock:
            for key in self.keys:
                if key in keys:
                    self._wait(key)
            for device, stream in self._streams.items():
                if (current := torch.cuda.current_stream(device)) != stream:
                    current.wait_stream(stream)

    def wait(self) -> None:
        """Wait for all of them."""
        if self._waits or self._streams:
            self.wait_for(self.keys)

    def _wait(self, key: int) -> None:
        deferred = self._deferred.get(key)
        try:
            # First, because a wait is called once.
            wait = self._waits.pop(key)
            with ExitStack() as stack:
                for stream in self._streams.values() if deferred else ():
                    stack.enter_context(torch.cuda.stream(stream))
                wait()
            if deferred:
                # Whoever has read one before, past the modules, hears of it in backward.
                mark_written(deferred)
        except BaseException:
            if deferred:
                self.on_failure()
            raise
        self._deferred.pop(key, None)


def _complete(waits: dict[int, Wait]) -> None:
    """Wait for all gathers at the end of the process. Not a method, which would keep its object alive."""
    complete(list(waits.values()))


class Gatherer:
    """All-gathers buckets, and the local tensors that replica groups share.

    Used by ``step()``, ``averaged_parameters()`` and loads. Every rank launches the same gathers in the same order.
    """

    def __init__(self, communicators: Communicators) -> None:
        self._communicators = communicators
        self._collectives: dict[torch.device, ShardCollectives] = {}
        self.arrivals = Arrivals()
        # Those among replicas, oldest first: they end in the order in which they were launched.
        self._among: deque[Wait] = deque()
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
            wait = self._collectives[buffer.device].all_gather(buffer.flat)
            # The wait may outlive the optimizer, and so must the memory that it writes.
            self.arrivals.add(id(buffer), partial(_wait_for, wait, buffer.flat))
        elif isinstance(buffer, PreshardedState) and buffer.replicas is not None:
            self._launch_among(buffer, buffer.replicas)

    def wait(self) -> None:
        """Wait for every gather launched so far, also for those that a step has left to modules."""
        self.arrivals.wait()
        self.wait_among_replicas()

    def wait_among_replicas(self) -> None:
        """Wait for the gathers of local tensors that replica groups share."""
        while self._among:
            self._among.popleft()()

    def _launch_among(self, buffer: PreshardedState, replicas: ReplicaGroup) -> None:
        """Gather the local tensors that ``replicas`` share. Collective on these ranks.

        Large local tensors are filled where they lie; small ones are packed, so that they share messages.
        """
        communicator = replicas.on(buffer.device)
        if id(buffer) not in self._layouts:
            direct_numel = DIRECT_BYTES // buffer.dtype.itemsize
            whole = communicator.gathers_contiguous
            shard_numel = buffer.layout.shard_numel
            self._layouts[id(buffer)] = (
                whole_layout(buffer.layout) if whole else send_layout(buffer.layout, direct_numel, 0, shard_numel)
            )
        layout = self._layouts[id(buffer)]
        packed = self._packed_buffer(buffer, layout.packed_numel)
        small = [(buffer.members[piece.slot], piece.target) for piece in layout.pieces if piece.slot is not None]
        own = [(member, at + member.fragment.param_start) for member, at in small if member.fragment.numel]
        if own:
            with label(Label.PACK):
                torch._foreach_copy_(
                    [packed[at : at + member.fragment.numel] for member, at in own],
                    [member.param_range(member.fragment.start, member.fragment.stop) for member, _ in own],
                )
        parts = [[_place(buffer, packed, part) for part in ranges] for ranges in layout.ranges]
        arrived = communicator.all_gather_uneven(parts)

        def unpack() -> None:
            arrived()
            if small:
                with label(Label.UNPACK):
                    torch._foreach_copy_(
                        [member.flat for member, _ in small],
                        [packed[at : at + member.slot.numel] for member, at in small],
                    )

        self._among.append(unpack)

    def _packed_buffer(self, buffer: StateBuffer, numel: int) -> Tensor:
        """Memory ``(numel,)`` for packed local tensors; ``MAX_PACKED`` such buffers take turns."""
        if not numel:
            return torch.empty(0, dtype=buffer.dtype, device=buffer.device)
        # The buffer that comes next is free once the gather before the last has ended and was unpacked.
        while len(self._among) >= MAX_PACKED:
            self._among.popleft()()
        self._num_packed += 1
        key = (buffer.device, buffer.dtype, self._num_packed % MAX_PACKED)
        if key not in self._buffers or self._buffers[key].numel() < numel:
            self._buffers[key] = torch.empty(numel, dtype=buffer.dtype, device=buffer.device)
        return self._buffers[key][:numel]


def _wait_for(wait: Wait, _flat: Tensor) -> None:
    wait()


def _place(buffer: PreshardedState, packed: Tensor, send_range: SendRange) -> Tensor:
    """The elements of ``send_range``, 1-D: a view of the packed buffer, or of a large local tensor as it lies."""
    within = packed if send_range.slot is None else buffer.members[send_range.slot].flat
    return within[send_range.source : send_range.source + send_range.stop - send_range.start]
