"""The memory of averages: while an average is a copy of its parameter, the parameter stands for it.

Until averaging begins, ``ax`` is the parameter to the bit (in the for-loop form). So steps leave its memory alone, and
whoever reads ``ax`` reads the parameter. On CPUs addresses are reserved at construction, and take no memory until they
are written. On other devices there is only a placeholder until then. Nothing here communicates, and ranks need not
agree on it.

stands for   the parameters of a buffer *stand for* their averages: ``average`` has no values of its own
shown        somebody may have a tensor over ``average``: from then on every step writes it
placeholder  one zero that is every element of ``average``: it has the shape, and takes no memory
reserved     ``average`` is memory of its own, and on CPUs the system was asked whether there is enough
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import huge_pages
from .pinned import HostWait, PinnedMemory
from .published import placeholder

if TYPE_CHECKING:
    from .buffers import ShardedParam
    from .layout import BucketLayout
    from .precision import Precision

# The keys of the scalars in the entry of a parameter.
SCALARS = ("step", "eta", "mu")


class StateOwner(Protocol):
    """Whoever publishes the state of buffers: ``ParamShards``."""

    def on_average_moved(self, buffer: Any) -> None:
        """Publish the average of ``buffer`` anew: it lies elsewhere now."""

    def published_average(self, index: int) -> Tensor:
        """Return ``ax`` of the parameter with this index, as it is published now."""

    def on_scalars_shown(self, index: int) -> None:
        """Note that somebody may write the scalars of the parameter with this index from now on."""


class AverageMemory(ABC):
    """The average of one state buffer; a base of ``StateBuffer``.

    average              (shard_numel,)  ``ax``: memory or a placeholder; its values, unless the parameters stand for it
    average_dtype        the dtype of ``average``, unless a load has made it wider
    is_offloaded         whether it is page-locked memory of the host, and the parameters lie on a device
    params_stand         whether the parameters stand for the averages
    average_is_shown     whether somebody may have a tensor over ``average``
    average_is_reserved  whether a step may write ``average``, without a question for memory
    """

    # The buffers of each parameter that has ever stood for an average; it keeps none of them alive.
    _buffers_of: ClassVar[MutableMapping[Tensor, weakref.WeakSet[AverageMemory]]] = WeakIdKeyDictionary()

    average: Tensor
    average_dtype: torch.dtype
    is_offloaded = False
    params_stand = False
    average_is_shown = False
    average_is_reserved = False
    # Memory that is made later is kept: nothing makes a device allocate and free in turns.
    _may_give_back = True
    # Weak, because it keeps the buffer.
    _owner: weakref.ref[StateOwner] | None = None
    # What keeps memory locked: that of ``average``, and what was made for a load that ranks have not agreed on.
    _pinned: Sequence[PinnedMemory] = ()
    # Lets the host wait for the update of offloaded averages that was begun last.
    _wait_for_update: Callable[[], None] | None = None

    layout: BucketLayout
    dtype: torch.dtype
    device: torch.device
    members: Sequence[ShardedParam]

    @property
    @abstractmethod
    def updates_in_float32(self) -> bool:
        """Whether 16-bit parameters are roundings of what averages are made of."""

    @property
    def params_can_stand(self) -> bool:
        """Whether a copy of the parameters has the bits of the averages, and this rank can read them at any time."""
        return self.average.dtype == self.dtype and not self.updates_in_float32

    @property
    def average_values(self) -> Tensor:
        """The averages ``(shard_numel,)`` of parameters that every rank has whole, to be read only."""
        return self.average

    # --- memory ------------------------------------------------------------------------------------------

    def make_average(self, precision: Precision) -> None:
        """Begin with averages in the dtype and in the place that ``precision`` asks for; called at construction."""
        # 16 bits cannot hold a running mean: after some hundred steps its changes are rounded away.
        asked = precision.average_dtype or (torch.float32 if self.dtype.itemsize == 2 else self.dtype)
        self.average_dtype = torch.promote_types(self.dtype, asked)
        self.is_offloaded = is_offloaded(self.device, precision.average_device)
        # State exists from construction on, with the same keys on every rank: saving needs no step before it.
        self.forget_average(self.average_dtype)

    @property
    def defers_average(self) -> bool:
        """Whether averages have no address before they are written: only CPUs have addresses without memory."""
        return self.device.type != "cpu"

    @property
    def average_has_address(self) -> bool:
        """Whether ``average`` is no placeholder."""
        return self.average_is_reserved or not self.defers_average

    @property
    def average_takes_memory(self) -> bool:
        """Whether ``average`` takes memory now; of zeros on CPUs only the system knows."""
        return self.average_is_reserved if self.defers_average else not self.params_stand

    def new_average(self, dtype: torch.dtype) -> Tensor:
        """Make memory for the averages, in ``dtype``: ``(shard_numel,)``, of zeros."""
        numel = self.layout.shard_numel
        if not self.is_offloaded:
            return huge_pages.zeros(numel, dtype, self.device)
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with on_device:
            memory = PinnedMemory([numel * dtype.itemsize])
        self._pinned = [*self._pinned, memory]
        return memory.tensors[0].view(dtype)

    def begin_update(self, wait: Callable[[], None], streams: Sequence[HostWait]) -> None:
        """Note that an update of offloaded averages begins on ``streams``; ``wait`` lets the host wait for its end."""
        self._wait_for_update = wait
        self._pinned = [memory for memory in self._pinned if memory.holds(self.average)]
        for memory in self._pinned:
            memory.used_by(streams)

    def settle(self) -> None:
        """Let the host wait until offloaded averages are up to date; called before anybody reads or writes them."""
        if self._wait_for_update is not None:
            self._wait_for_update()
            self._wait_for_update = None

    def forget_average(self, dtype: torch.dtype) -> None:
        """Begin with averages of zeros, in ``dtype``, that take no memory yet; the caller publishes them."""
        numel = self.layout.shard_numel
        place = torch.device("cpu") if self.is_offloaded else self.device
        self.average = placeholder(numel, dtype, place) if self.defers_average else self.new_average(dtype)
        self.params_stand = self.average_is_reserved = False

    def reserve_average(self, dtype: torch.dtype | None = None, memory: Tensor | None = None) -> None:
        """Make sure that averages can be written, in ``dtype`` if they are to have another: ``memory``, or new one."""
        dtype = dtype or self.average.dtype
        moves = dtype != self.average.dtype or not self.average_has_address
        if moves:
            self.average = self.new_average(dtype) if memory is None else memory
        self.average_is_reserved = True
        if moves:
            self._tell_moved()

    def lacks_memory(self, dtype: torch.dtype) -> bool:
        """Whether averages in ``dtype`` need memory that has to be made: of a device, or page-locked."""
        has_own = self.average_has_address and self.average.dtype == dtype
        return (self.defers_average or self.is_offloaded) and not has_own

    def overwrite_average(self, dtype: torch.dtype, memory: Tensor | None = None) -> None:
        """Get ready for averages that are about to be loaded, in ``dtype``, perhaps to ``memory``.

        The caller writes all of them.
        """
        self.reserve_average(dtype, memory)
        self.params_stand, self._may_give_back = False, True

    def _tell_moved(self) -> None:
        if (owner := self.owner) is not None:
            owner.on_average_moved(self)

    @property
    def owner(self) -> StateOwner | None:
        """Who publishes the state of this buffer; None before it does, and when another buffer has taken its place."""
        return None if self._owner is None else self._owner()

    def belong_to(self, owner: StateOwner | None) -> None:
        """Tell ``owner``, and nobody else, from now on when the average moves."""
        self._owner = None if owner is None else weakref.ref(owner)

    # --- values --------------------------------------------------------------------------------------------

    def let_params_stand(self) -> None:
        """Let the parameters, which are about to be written, stand for the averages; not if those are shown.

        Called before a step that would copy all parameters of the buffer to their averages.
        """
        # On CPUs memory may have been found for a step that was refused then: the next one has to ask again.
        is_done = self.params_stand and (self.defers_average or not self.average_is_reserved)
        if is_done or self.average_is_shown:
            return
        for member in self.members:
            self._buffers_of.setdefault(member.param, weakref.WeakSet()).add(self)
        # Loaded averages, or those of an earlier time, may have been written.
        if not self.defers_average:
            huge_pages.let_go(self.average)
            self.average_is_reserved = False
        elif self.average_is_reserved and self._may_give_back:
            if self.device.type == "cuda":
                # It may have been made on another stream than that of the kernels that use it.
                self.average.record_stream(torch.cuda.current_stream(self.device))
            self.forget_average(self.average.dtype)
            self._tell_moved()
        self._may_give_back = False
        self.params_stand = True

    @torch.no_grad()
    def write_average(self) -> None:
        """Copy the parameters to their averages if they stand for them, so that ``average`` has its own values."""
        if self.params_stand:
            self.reserve_average()
            for member in self.members:
                start, stop = member.fragment.start, member.fragment.stop
                self.average[start:stop].copy_(member.param_range(start, stop))
            self.params_stand = False

    @classmethod
    def before_swap(cls, params: Iterable[Tensor]) -> None:
        """Write the averages that ``params`` stand for, of whatever optimizer: other values take their place now."""
        for param in params:
            for buffer in list(cls._buffers_of.get(param, ())):
                buffer.write_average()

    def show_average(self) -> None:
        """Let every step from now on write ``average``, because somebody gets a tensor of that memory."""
        self.settle()
        self.write_average()
        if not self.average_has_address:
            self.reserve_average()
        self.average_is_shown = True


def is_offloaded(device: torch.device, average_device: torch.device | None) -> bool:
    """Whether averages of parameters on ``device`` lie in host memory if ``average_device`` is asked for."""
    return average_device is not None and average_device.type != device.type


def write_averages(buffers: Iterable[AverageMemory], shown: bool = False) -> None:
    """Give averages their values where parameters stand for them; ``shown``: for somebody who may keep them."""
    for buffer in buffers:
        if shown:
            buffer.show_average()
        else:
            buffer.write_average()


def peek(entry: dict[Any, Any], key: str) -> Any:
    """Return a value of an entry of ``optimizer.state``, for somebody who keeps no tensor and writes none."""
    return dict.__getitem__(entry, key)


class StateEntry(dict[Any, Any]):
    """The entry of a parameter in ``optimizer.state``: a dict that shows the average to whoever reads it.

    Whoever has read ``ax`` may keep it, write it or move it, and so whoever has read a scalar. A reader of keys, or of
    values of the user's own, shows nothing. Copies are plain dicts.
    """

    __slots__ = ("_buffer", "_member")

    def __init__(
        self, values: Any = (), buffer: AverageMemory | None = None, member: ShardedParam | None = None
    ) -> None:
        """``buffer`` has the average of ``member``; None in a copy that a trainer makes of the type of an entry."""
        super().__init__(values)
        # The member refers to its buffer weakly.
        self._buffer = buffer
        self._member = member

    def _show(self, *keys: Any) -> None:
        """Note that somebody gets the value of a key, or with none all values."""
        buffer, member = self._buffer, self._member
        if buffer is None or member is None:
            return
        owner = buffer.owner
        if owner is not None and (not keys or keys[0] in SCALARS):
            owner.on_scalars_shown(member.index)
        if not keys or keys[0] == "ax":
            before = None if owner is None else owner.published_average(member.index)
            buffer.show_average()
            # Nobody publishes to entries that are in no optimizer's state any more.
            if owner is not None and super().get("ax") is before:
                self["ax"] = owner.published_average(member.index)
            elif owner is None and buffer.defers_average and "ax" in self:
                self["ax"] = member.state_entry(member.average)

    def __getitem__(self, key: Any) -> Any:
        self._show(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """As of dict."""
        self._show(key)
        return super().get(key, default)

    def pop(self, key: Any, *default: Any) -> Any:
        """As of dict."""
        self._show(key)
        return super().pop(key, *default)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """As of dict."""
        self._show(key)
        return super().setdefault(key, default)

    def popitem(self) -> tuple[Any, Any]:
        """As of dict."""
        self._show()
        return super().popitem()

    def items(self) -> Any:
        """As of dict."""
        self._show()
        return super().items()

    def values(self) -> Any:
        """As of dict."""
        self._show()
        return super().values()

    def copy(self) -> dict[Any, Any]:
        """Return a plain dict of the same values."""
        return dict(self.items())

    # dict() and {**entry} read the values of a dict without its methods, unless it has an __iter__ of its own.
    def __iter__(self) -> Iterator[Any]:
        return super().__iter__()

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __eq__(self, other: object) -> bool:
        return self.copy() == other

    def __ne__(self, other: object) -> bool:
        return self.copy() != other

    __hash__ = None

    def __repr__(self) -> str:
        return repr(self.copy())

    def __reduce__(self) -> Any:
        return dict, (self.copy(),)
