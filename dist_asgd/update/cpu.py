"""The compiled CPU kernel (kernel.c): how it is loaded, checked and called.

The kernel computes the for-loop form (reference.py) to the bit. It cannot run if there was no compiler at
installation, or if torch does not use the vector instructions whose rounding the kernel reproduces; operators.py then
computes the same bits in cache-sized tiles of torch operators.
"""

from __future__ import annotations

import ctypes
import logging
import shutil
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from ..storage.buffers import StateBuffer
from . import backend
from .batch import Batch, StepContext
from .segments import NO_AVERAGES, UNSCALED, KernelDtypes, Segment, SegmentGradients

ABI = 5
# As ``enum dtype`` of kernel.c.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Starting a thread costs about as much as updating this many elements.
NUMEL_PER_THREAD = 1 << 17
# While mu is 1 an average is written and not read. If the averages of a step are larger than this, they are written
# past the caches: that pays as soon as they outgrow the caches that a core has for itself.
STREAMED_BYTES = 1 << 23
# Copies of fewer bytes go through the caches, which have room for them. Each thread copies at least so many.
COPIED_BYTES = 1 << 20
INCOMPLETE = "dist_asgd: a CPU kernel needs a gradient for every segment and scalars for every row."


class _Call(ctypes.Structure):
    """``call`` of kernel.c, field by field."""

    _fields_ = [
        ("segments", ctypes.c_void_p),
        ("gradients", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_segments", "num_threads")),
        *((name, ctypes.c_int64) for name in ("param", "gradient", "average", "mode")),
        *((name, ctypes.c_int64) for name in ("maximize", "scaled", "streamed", "unwritten")),
        *((name, ctypes.c_double) for name in ("weight_decay", "unscale", "clip")),
    ]


class _Means(ctypes.Structure):
    """``mean_call`` of kernel.c, field by field."""

    _fields_ = [
        ("pairs", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_pairs", "num_threads", "param")),
        ("weight", ctypes.c_double),
    ]


@cache
def _load() -> ctypes.CDLL | str:
    """The kernel's library, or why there is none."""
    folder = Path(__file__).parent
    files = [folder / f"_kernel{suffix}" for suffix in EXTENSION_SUFFIXES]
    found = next((file for file in files if file.exists()), None)
    if found is None:
        return _why_not_compiled(folder)
    try:
        library = ctypes.CDLL(str(found))
        library.dist_asgd_abi.restype = ctypes.c_int64
        library.dist_asgd_update.argtypes = [ctypes.POINTER(_Call)]
        library.dist_asgd_update.restype = ctypes.c_int64
        library.dist_asgd_means.argtypes = [ctypes.POINTER(_Means)]
        library.dist_asgd_means.restype = None
        library.dist_asgd_copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        library.dist_asgd_copy.restype = None
        abi = library.dist_asgd_abi()
    except (OSError, AttributeError) as error:
        return f"{found.name} does not load ({error})"
    return library if abi == ABI else f"{found.name} is of another version of dist_asgd: install it again"


def _why_not_compiled(folder: Path) -> str:
    """Why there is no library in ``folder``, and what to do about it."""
    installed = [Path(entry, "dist_asgd", "update") for entry in sys.path if entry]
    other = next((path for path in installed if path != folder and any(path.glob("_kernel*"))), None)
    if other is not None:
        return (
            f"dist_asgd was imported from its source tree ({folder.parent}), which is not compiled and hides the "
            f"installed package in {other.parent.parent}. Start Python in another folder, or run pip install -e . here"
        )
    if shutil.which("cc") is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "there was no C compiler when dist_asgd was installed. Install one (gcc), and install dist_asgd again"
    return "it was not compiled when dist_asgd was installed. There is a C compiler now: install dist_asgd again"


@cache
def why_unavailable() -> str | None:
    """Why the compiled kernel cannot be used on this machine with torch's bits; None if it can."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512"):
        return f"torch itself runs without fused multiply-adds here (CPU capability {capability})"
    library = _load()
    return library if isinstance(library, str) else None


@cache
def log_fallback(reason: str) -> None:
    """Log once that torch operators do the kernel's work, and why."""
    logging.getLogger("dist_asgd").warning(
        "the CPU kernel is not used: %s. The update runs in chunks of torch operators instead, with the same bits "
        "but at about half the speed.",
        reason,
    )


def supports(dtypes: KernelDtypes) -> bool:
    """Whether the kernel was compiled for these dtypes."""
    others = (dtypes.param, torch.float32) if dtypes.param.itemsize == 2 else (dtypes.param,)
    return dtypes.param in DTYPES and dtypes.average in others and dtypes.gradient in others


def can_update(buffer: StateBuffer) -> bool:
    """Whether the compiled kernel can update the parameters of ``buffer`` with torch's bits."""
    on_cpu = backend.of(buffer.device) is backend.C
    return on_cpu and why_unavailable() is None and supports(KernelDtypes.of(buffer))


def _check(tensor: Tensor, dtype: torch.dtype, numel: int, what: str) -> int:
    """The data pointer of ``tensor``; ValueError unless the tensor is as the kernel will read it."""
    if tensor.device.type != "cpu" or tensor.dtype != dtype or tensor.shape != (numel,) or not tensor.is_contiguous():
        raise ValueError(
            f"dist_asgd: the {what} of a CPU kernel must be contiguous {dtype} of shape ({numel},) on the CPU, got "
            f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}."
        )
    return tensor.data_ptr()


class Launch:
    """One kernel call for many segments; made once by ``plan.py``, run at every step.

    Segments may have different rows of scalars. Tensors are checked here, and kept alive as long as the launch.

    Args:
        segments: on the CPU, with the dtypes ``dtypes``; empty ones are left out.
        maximize, weight_decay: the hyperparameters of the segments' group.
        streamed: averages that are only written (while mu is 1) go past the caches.

    Raises:
        ValueError: a tensor has another dtype, shape, device or memory order than the kernel reads.
    """

    def __init__(
        self, segments: Sequence[Segment], dtypes: KernelDtypes, maximize: bool, weight_decay: float, streamed: bool
    ) -> None:
        library = _load()
        assert not isinstance(library, str), library
        self._update = library.dist_asgd_update
        self._segments = [segment for segment in segments if segment.numel]
        master_dtype = torch.int16 if dtypes.param == torch.bfloat16 else torch.float32
        table = array("q")
        gradients = array("Q")
        for s in self._segments:
            param = _check(s.param, dtypes.param, s.numel, "parameters")
            average = 0 if s.average is None else _check(s.average, dtypes.average, s.numel, "average")
            if dtypes.master != (s.master is not None):
                raise ValueError("dist_asgd: a CPU kernel got masters where it expected none, or none where it did.")
            master = 0 if s.master is None else _check(s.master, master_dtype, s.numel, "masters")
            gradients.append(0 if s.gradient is None else _check(s.gradient, dtypes.gradient, s.numel, "gradient"))
            table.extend((param, average, master, s.numel, s.row, s.lanes, s.first, s.key))
        numel = sum(s.numel for s in self._segments)
        self._table, self._gradients = table, gradients
        self._has_averages = all(s.average is not None for s in self._segments)
        self._last_row = max((s.row for s in self._segments), default=-1)
        self._max_threads = max(1, numel // NUMEL_PER_THREAD)
        self._call = _Call(
            segments=table.buffer_info()[0],
            num_segments=len(self._segments),
            param=DTYPES[dtypes.param],
            gradient=DTYPES[dtypes.gradient],
            average=DTYPES[dtypes.average],
            mode=1 if dtypes.master else 2 if dtypes.stochastic else 0,
            maximize=maximize,
            streamed=streamed,
            weight_decay=weight_decay,
        )

    def run(
        self,
        gradients: array[int] | None,
        rows: array[float],
        unscale: float,
        clip: float,
        unwritten: bool = False,
    ) -> None:
        """Update all segments.

        Args:
            gradients: the data pointers ("Q") of this step's gradients, one for each segment that is not empty: of
                the launch's gradient dtype, contiguous and as long as the segment. They are not checked. None if
                the segments have their own gradients.
            rows: (c, -eta, mu, t) of every row, in double precision.
            unscale, clip: factors that gradients are multiplied by, one after the other.
            unwritten: averages are left alone where mu is 1.

        Raises:
            ValueError: gradients or rows are too few, a gradient's pointer is 0, or averages have no memory that would
                be written; nothing has changed.
        """
        if not self._segments:
            return
        own = self._gradients if gradients is None else gradients
        if own.itemsize != 8 or len(own) != len(self._segments) or len(rows) < 4 * (self._last_row + 1):
            raise ValueError(INCOMPLETE)
        if not (unwritten or self._has_averages):
            raise ValueError(NO_AVERAGES)
        call = self._call
        call.gradients = own.buffer_info()[0]
        call.rows = rows.buffer_info()[0]
        call.num_threads = min(torch.get_num_threads(), self._max_threads)
        call.unscale, call.clip = unscale, clip
        call.scaled = not (unscale == 1 and clip == 1)
        call.unwritten = unwritten
        if self._update(ctypes.byref(call)):
            raise ValueError(INCOMPLETE)


@dataclass(frozen=True, slots=True)
class KernelBatch(Batch):
    """Everything that steps in one state ``buffer``, updated in one call of the compiled kernel.

    ``gradients`` is None if the segments have gradients of their own (stage 2).
    """

    launch: Launch
    gradients: SegmentGradients | None
    buffer: StateBuffer

    def run(self, step: StepContext) -> None:
        if self.gradients is None:
            pointers, scaling = None, step.reduced_scaling
        else:
            # The kernel reads addresses: copies of gradients are kept in ``_copies`` until it has returned.
            pointers, _copies = self.gradients.pointers(step.gradients.addresses)
            scaling = step.param_scaling
        unscale, clip = (1.0, 1.0) if scaling is UNSCALED else scaling.numbers()
        self.launch.run(pointers, step.rows, unscale, clip, self.buffer.params_stand)


class Means:
    """Takes many parameters into their averages in one kernel call; made once by ``means.py``, run at every update.

    Args:
        params, averages: 1-D, real and contiguous, on the CPU, of the dtypes of which ``can_take`` says so. They are
            checked here, and kept alive as long as this object.
    """

    def __init__(self, params: Sequence[Tensor], averages: Sequence[Tensor]) -> None:
        library = _load()
        assert not isinstance(library, str), library
        self._means = library.dist_asgd_means
        self._tensors = params, averages
        dtype, average_dtype = params[0].dtype, averages[0].dtype
        table = array("q")
        for param, average in zip(params, averages, strict=True):
            numel = param.numel()
            table.extend((_check(param, dtype, numel, "parameter"), _check(average, average_dtype, numel, "average")))
            table.append(numel)
        self._table = table
        self._max_threads = max(1, sum(param.numel() for param in params) // NUMEL_PER_THREAD)
        self._call = _Means(pairs=table.buffer_info()[0], num_pairs=len(params), param=DTYPES[dtype])

    @staticmethod
    def can_take(dtype: torch.dtype, average: Tensor) -> bool:
        """Whether the kernel can take parameters of ``dtype`` into averages such as ``average``, with torch's bits."""
        wanted = torch.float32 if dtype.itemsize == 2 else dtype
        on_cpu = backend.of(average.device) is backend.C
        return on_cpu and dtype in DTYPES and average.dtype == wanted and why_unavailable() is None

    def run(self, weight: float) -> None:
        """Take all parameters into their averages: ``ax <- lerp(ax, x, weight)``, as ``torch._foreach_lerp_`` does."""
        self._call.num_threads = min(torch.get_num_threads(), self._max_threads)
        self._call.weight = weight
        self._means(ctypes.byref(self._call))


def lanes(numel: int, start: int, stop: int) -> int:
    """How many of the elements ``start`` to ``stop`` of a 16-bit parameter torch rounds as full vector lanes."""
    return max(0, min(stop, numel // 32 * 32) - start)


def copy_bytes(to: Tensor, source: Tensor) -> None:
    """Copy ``source`` to ``to``, uint8 ``(num_bytes,)`` on the CPU, past the caches: for bytes that nobody reads soon.

    Called when a checkpoint is staged. Without the compiled kernel, or with few bytes, it is ``to.copy_(source)``.
    """
    library = _load()
    num_bytes = to.numel()
    if isinstance(library, str) or num_bytes < COPIED_BYTES:
        to.copy_(source)
        return
    pointers = [_check(tensor, torch.uint8, num_bytes, "bytes") for tensor in (to, source)]
    library.dist_asgd_copy(*pointers, num_bytes, min(torch.get_num_threads(), num_bytes // COPIED_BYTES))
