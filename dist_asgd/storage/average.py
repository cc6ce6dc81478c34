"""The memory of averages: while an average is a copy of its parameter, the parameter stands for it.

Until averaging begins, ``ax`` is the parameter to the bit (in the for-loop form, on CPUs). So steps leave its memory
alone, which takes no memory until it is written, and whoever reads ``ax`` reads the parameter. Nothing here
communicates, and ranks need not agree on it: addresses are reserved from construction on.

stands for  the parameters of a buffer *stand for* their averages: ``average`` has no values of its own
shown       somebody may have a tensor over ``average``: from then on every step writes it
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import huge_pages
from .pinned import PinnedMemory

if TYPE_CHECKING:
    from .buffers import ShardedParam
    from .layout import BucketLayout
    from .precision import Precision


class AverageMemory(ABC):
    """The average of one state buffer; a base of ``StateBuffer``.

    average_dtype     the dtype of ``average``, unless a load has made it wider
    average           (shard_numel,)  memory for ``ax``; its values, unless the parameters stand for them
    is_offloaded      whether it is page-locked memory of the host, and the parameters lie on a device
    params_stand      whether the parameters stand for the averages
    average_is_shown  whether somebody may have a tensor over ``average``
    """

    # The buffer of each parameter that has ever stood for its average; it keeps neither of them alive.
    _buffer_of: ClassVar[WeakIdKeyDictionary] = WeakIdKeyDictionary()

    average: Tensor
    average_dtype: torch.dtype
    is_offloaded = False
    params_stand = False
    average_is_shown = False
    # What keeps the memory locked.
    _pinned: PinnedMemory | None = None
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
        on_cpu = self.device.type == "cpu"
        return on_cpu and self.average.dtype == self.dtype and not self.updates_in_float32

    @property
    def average_values(self) -> Tensor:
        """The averages ``(shard_numel,)`` of parameters that every rank has whole, to be read only."""
        return self.average

    def make_average(self, precision: Precision) -> None:
        """Make the averages, in the dtype and in the place that ``precision`` asks for; called at construction."""
        # 16 bits cannot hold a running mean: after some hundred steps its changes are rounded away.
        asked = precision.average_dtype or (torch.float32 if self.dtype.itemsize == 2 else self.dtype)
        self.average_dtype = torch.promote_types(self.dtype, asked)
        self.is_offloaded = is_offloaded(self.device, precision.average_device)
        # State exists from construction on, with the same keys on every rank: saving needs no step before it.
        self.average = self.new_average(self.average_dtype)

    def new_average(self, dtype: torch.dtype) -> Tensor:
        """Make memory for the averages, in ``dtype``: ``(shard_numel,)``, of zeros."""
        numel = self.layout.shard_numel
        if not self.is_offloaded:
            return huge_pages.zeros(numel, dtype, self.device)
        self._pinned = PinnedMemory([numel * dtype.itemsize])
        return self._pinned.tensors[0].view(dtype)

    def __del__(self) -> None:
        """Wait for an update that is in flight: it writes the memory that is freed next."""
        self.settle()

    def begin_update(self, wait: Callable[[], None]) -> None:
        """Note that an update of offloaded averages has begun, whose end ``wait`` lets the host wait for."""
        self._wait_for_update = wait

    def settle(self) -> None:
        """Let the host wait until offloaded averages are up to date; called before anybody reads or writes them."""
        if self._wait_for_update is not None:
            self._wait_for_update()
            self._wait_for_update = None

    def let_params_stand(self) -> None:
        """Let the parameters, which are about to be written, stand for the averages; not if those are shown.

        Called in a step that would copy all parameters of the buffer to their averages.
        """
        if not self.params_stand and not self.average_is_shown:
            self.params_stand = True
            self._buffer_of.update((member.param, weakref.ref(self)) for member in self.members)
            # Loaded averages, or those of an earlier time, may have been written.
            huge_pages.let_go(self.average)

    @torch.no_grad()
    def write_average(self) -> None:
        """Copy the parameters to their averages if they stand for them, so that ``average`` has its own values."""
        if self.params_stand:
            for member in self.members:
                start, stop = member.fragment.start, member.fragment.stop
                self.average[start:stop].copy_(member.param_range(start, stop))
            self.params_stand = False

    @classmethod
    def before_swap(cls, params: Iterable[Tensor]) -> None:
        """Write the averages that ``params`` stand for, of whatever optimizer: other values take their place now."""
        for param in params:
            if param in cls._buffer_of:
                buffer = cls._buffer_of[param]()
                if buffer is not None:
                    buffer.write_average()

    def show_average(self) -> None:
        """Let every step from now on write ``average``, because somebody gets a tensor of that memory."""
        self.settle()
        self.write_average()
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


class StateEntry(dict[Any, Any]):
    """The entry of a parameter in ``optimizer.state``: a dict that shows the average to whoever reads a value of it.

    Whoever has read ``ax`` may keep it, write it or move it. A reader of other values, or of keys, shows nothing.
    Copies are plain dicts.
    """

    __slots__ = ("_buffer",)

    def __init__(self, values: Any = (), buffer: AverageMemory | None = None) -> None:
        """``buffer`` has the parameter's average; None in a copy that a trainer makes of the type of an entry."""
        super().__init__(values)
        self._buffer = buffer

    def _show(self) -> None:
        if self._buffer is not None:
            self._buffer.show_average()

    def __getitem__(self, key: Any) -> Any:
        if key == "ax":
            self._show()
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """As of dict."""
        if key == "ax":
            self._show()
        return super().get(key, default)

    def pop(self, key: Any, *default: Any) -> Any:
        """As of dict."""
        if key == "ax":
            self._show()
        return super().pop(key, *default)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """As of dict."""
        if key == "ax":
            self._show()
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
