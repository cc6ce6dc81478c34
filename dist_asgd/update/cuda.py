"""The rule in torch's for-loop form as Triton kernels: one launch for a state buffer, none per parameter.

    advance_kernel  the schedule: from (step, eta, mu) of every cohort to the factors (c, -eta, mu, t) of this step, and
                    on to the next step's scalars, with lr, lambd, alpha and t0 of the group
    update_kernel   the rule, for parameters x, gradients g and averages ax, with the factors of the segment's row:

        g  <- -g                      if maximize
        g  <- g + weight_decay * x    if weight_decay is not 0; fused
        x  <- x * c                   c = 1 - lambd * eta, in double precision
        x  <- x - eta * g             fused
        ax <- ax + (x - ax) * mu      a copy of x while mu is 1: ax is not read; left alone without AVERAGED

The bits are those of ``torch.optim.ASGD(foreach=False)`` in float32 and float64; 16-bit parameters round after every
operation, as torch's CUDA operators do. ``masters.py`` and ``rounding.py`` are the references for masters and for
stochastic rounding.

block   consecutive elements of one segment, updated by one program
table   int64 ``(num_segments, 8)``: addresses of param, average and master, numel, row, first, key, weight decay
column  int64 ``(num_segments,)``: addresses of the gradients, apart because they may change with every step

The kernels are compiled without contraction. ``plan.py`` and ``scalars.py`` import this module when they first need
it, as it needs triton.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton types its kernels itself.

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..storage.buffers import StateBuffer
from ..storage.masters import NAN_BITS
from . import rounding
from .addresses import ACCESS_BYTES, AddressColumn, to_device
from .batch import Batch, StepContext
from .schedule import scalar_dtype
from .segments import NO_AVERAGES, KernelDtypes, Segment, SegmentGradients

BLOCK_NUMEL = 4096
NUM_WARPS = 8
BLOCK_ROWS = 32
SEGMENT_ALIGNMENT_BYTES = 64

_TABLE_COLUMNS = tl.constexpr(8)
_GOLDEN = tl.constexpr(rounding.GOLDEN)
_NAN_BITS = tl.constexpr(NAN_BITS)


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """``x`` rounded to ``DTYPE``, in its own dtype."""
    return x.to(DTYPE).to(x.dtype)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["found_inf"])
def advance_kernel(scalars, hyper, factors, found_inf, num_rows, DOUBLE: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Advance ``BLOCK_ROWS`` rows of ``scalars``, ``hyper`` and ``factors`` (see ``advance``), one in every lane."""
    SCALAR: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    if found_inf is not None:  # noqa: SIM102 (the outer one is decided by the compiler)
        if tl.load(found_inf) != 0:
            return
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    scalars += row * 3
    hyper += row * 6
    factors += row * 4
    inside = row < num_rows
    active = tl.load(hyper + 4, mask=inside, other=0) != 0
    lr = tl.load(hyper, mask=active, other=0)
    lambd = tl.load(hyper + 1, mask=active, other=0)
    alpha = tl.load(hyper + 2, mask=active, other=0)
    t0 = tl.load(hyper + 3, mask=active, other=0)
    initial = tl.load(hyper + 5, mask=active, other=0)
    t = tl.load(scalars, mask=active, other=0)
    eta = tl.load(scalars + 1, mask=active, other=0)
    mu = tl.load(scalars + 2, mask=active, other=0)

    # torch takes the first eta from the lr of the first step, not from that of construction.
    eta = tl.where(tl.where(t == 0, initial, 0) != 0, _rounded(lr, SCALAR), eta)
    t += 1
    tl.store(factors, 1 - lambd * eta, mask=active)
    # Not 0 - eta: an eta of 0 must become -0.
    tl.store(factors + 1, eta * -1.0, mask=active)
    tl.store(factors + 2, mu, mask=active)
    tl.store(factors + 3, t, mask=active)

    power = tl.exp(alpha * tl.log(1 + lambd * lr * t))
    tl.store(scalars, t, mask=active)
    tl.store(scalars + 1, _rounded(lr / power, SCALAR), mask=active)
    tl.store(scalars + 2, _rounded(1 / tl.maximum(t - t0, 1.0), SCALAR), mask=active)


@triton.jit
def _pointer(address, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Element ``start`` of the array of ``DTYPE`` at ``address``; with ``ALIGNED`` loads may be 16 bytes wide."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def _mix(word):
    """``rounding.mix`` of uint32."""
    word = word ^ (word >> 16)
    word = word * 0x7FEB352D
    word = word ^ (word >> 15)
    word = word * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def _random_16(key, t, elements):
    """``rounding.random_16`` for int64 ``elements`` of a parameter, as int32."""
    step_key = _mix(key ^ _mix(t.to(tl.int64).to(tl.uint32)))
    words = _mix(elements.to(tl.uint32) ^ step_key)
    words = _mix(words + (elements >> 32).to(tl.uint32) * _GOLDEN + key)
    return (words >> 16).to(tl.int32)


@triton.jit(do_not_specialize_on_alignment=["unscale", "clip", "found_inf"])
def update_kernel(
    blocks,
    table,
    column,
    factors,
    unscale,
    clip,
    found_inf,
    PARAM: tl.constexpr,
    GRADIENT: tl.constexpr,
    AVERAGE: tl.constexpr,
    MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    AVERAGED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    PARAM_ALIGNED: tl.constexpr,
    GRADIENT_ALIGNED: tl.constexpr,
    BLOCK_NUMEL: tl.constexpr,
):
    """Update one block; ``blocks`` (num_blocks, 2) int32 has its segment, and its index among the segment's blocks."""
    WIDE: tl.constexpr = tl.float64 if tl.float64 == PARAM else tl.float32
    AVERAGE_WIDE: tl.constexpr = tl.float64 if tl.float64 == AVERAGE else WIDE
    # The dtype that every operation rounds to: that of torch's operators, float32 if only the result is rounded.
    EACH: tl.constexpr = tl.float32 if MASTER or STOCHASTIC else PARAM
    SCALED: tl.constexpr = tl.float32 if MASTER or STOCHASTIC else GRADIENT
    AVERAGE_EACH: tl.constexpr = EACH if AVERAGE == EACH else AVERAGE_WIDE
    # bfloat16 parameters are read as integers if the kernel joins them with masters or rounds them itself.
    BITS: tl.constexpr = (MASTER or STOCHASTIC) and tl.bfloat16 == PARAM
    if found_inf is not None:  # noqa: SIM102 (the outer one is decided by the compiler)
        if tl.load(found_inf) != 0:
            return
    segment = tl.load(blocks + tl.program_id(0) * 2)
    start = tl.load(blocks + tl.program_id(0) * 2 + 1).to(tl.int64) * BLOCK_NUMEL
    line = table + segment * _TABLE_COLUMNS
    param = _pointer(tl.load(line), start, tl.int16 if BITS else PARAM, PARAM_ALIGNED)
    if AVERAGED:
        average = _pointer(tl.load(line + 1), start, AVERAGE, True)
    master = _pointer(tl.load(line + 2), start, tl.int16 if BITS else tl.float32, True)
    gradient = _pointer(tl.load(column + segment), start, GRADIENT, GRADIENT_ALIGNED)
    left = tl.load(line + 3) - start
    factors += tl.load(line + 4) * 4
    c = tl.load(factors).to(WIDE)
    negative_eta = tl.load(factors + 1).to(WIDE)
    if AVERAGED:
        mu = tl.load(factors + 2)
    offsets = tl.arange(0, BLOCK_NUMEL)

    for full in tl.static_range(2):
        # With a constant for numel the masks fold away, and accesses are 16 bytes wide.
        numel = BLOCK_NUMEL if full else left.to(tl.int32)
        if left >= BLOCK_NUMEL if full else left < BLOCK_NUMEL:
            inside = offsets < numel
            x = tl.load(param + offsets, mask=inside, other=0)
            g = tl.load(gradient + offsets, mask=inside, other=0).to(WIDE)
            if AVERAGED:
                read = offsets < tl.where(mu == 1.0, 0, numel)
                ax = tl.load(average + offsets, mask=read, other=0).to(AVERAGE_WIDE)
            if MASTER:
                held = tl.load(master + offsets, mask=inside, other=0)
            if BITS:
                bits = x.to(tl.int32) << 16
                if MASTER:
                    bits += held.to(tl.int32)
                x = bits.to(tl.float32, bitcast=True)
            elif MASTER:
                # A parameter that was written since the last step is its own master.
                x = tl.where(held.to(PARAM) == x, held, x.to(tl.float32))
            else:
                x = x.to(WIDE)

            if unscale is not None:
                g = _rounded(g * tl.load(unscale).to(WIDE), SCALED)
            if clip is not None:
                g = _rounded(g * tl.load(clip).to(WIDE), SCALED)
            if MAXIMIZE:
                # Not 0 - g: the sign of a zero counts.
                g = g * -1.0
            g = _rounded(g, EACH)
            if WEIGHT_DECAY:
                weight_decay = tl.load(line + 7).to(tl.float64, bitcast=True).to(WIDE)
                g = _rounded(tl.fma(x, weight_decay, g), EACH)
            x = _rounded(x * c, EACH)
            x = _rounded(tl.fma(g, negative_eta, x), EACH)

            if BITS:
                bits = x.to(tl.int32, bitcast=True)
                if MASTER:
                    bits = tl.where(x != x, _NAN_BITS, bits)
                    rounded = (bits + 0x8000) >> 16
                    tl.store(master + offsets, (bits - (rounded << 16)).to(tl.int16), mask=inside)
                else:
                    elements = tl.load(line + 5) + start + offsets
                    random = _random_16(tl.load(line + 6).to(tl.uint32), tl.load(factors + 3), elements)
                    # An infinity stays one: its lower 16 bits are 0, and nothing carries.
                    rounded = tl.where(x != x, _NAN_BITS, bits + random) >> 16
                    x = (rounded << 16).to(tl.float32, bitcast=True)
                tl.store(param + offsets, rounded.to(tl.int16), mask=inside)
            else:
                if MASTER:
                    tl.store(master + offsets, x, mask=inside)
                tl.store(param + offsets, x.to(PARAM), mask=inside)
            if AVERAGED:
                x = x.to(AVERAGE_WIDE)
                moved = _rounded(_rounded(x - ax, AVERAGE_EACH) * mu.to(AVERAGE_WIDE), AVERAGE_EACH)
                tl.store(average + offsets, tl.where(mu == 1.0, x, ax + moved).to(AVERAGE), mask=inside)


def advance(scalars: Tensor, hyper: Tensor, factors: Tensor, found_inf: Tensor | None) -> None:
    """Write this step's ``factors`` and advance ``scalars`` to the next step's: one launch, no synchronisation.

    Args:
        scalars: (num_rows, 3) float64: step, eta, mu of each cohort; updated.
        hyper: (num_rows, 6) float64: lr, lambd, alpha, t0, active, initial. A row that is not active keeps its scalars;
            one that is initial takes eta from the lr while step is 0.
        factors: (num_rows, 4) float64: c = 1 - lambd * eta, -eta, mu, t; written.
        found_inf: (1,) float32; if it is nonzero nothing changes, and ``Launch.run`` is to get it too.
    """
    num_rows, double = len(scalars), scalar_dtype() == torch.float64
    if num_rows:
        with _on(scalars.device):
            advance_kernel[(-(-num_rows // BLOCK_ROWS),)](
                scalars, hyper, factors, found_inf, num_rows, double, BLOCK_ROWS, num_warps=1, enable_fp_fusion=False
            )


def _on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    # Triton launches on the current device, not on that of its arguments.
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _check(segment: Segment, position: int, dtypes: KernelDtypes) -> None:
    """ValueError unless a segment's tensors are as the kernel will read them, which gets addresses only."""
    master = (torch.int16 if dtypes.param == torch.bfloat16 else torch.float32) if dtypes.master else None
    gradient = None if segment.gradient is None else dtypes.gradient
    average = None if segment.average is None else dtypes.average
    wanted = {"param": dtypes.param, "average": average, "master": master, "gradient": gradient}
    for name, dtype in wanted.items():
        tensor: Tensor | None = getattr(segment, name)
        found = None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        expected = None if dtype is None else (dtype, (segment.numel,), (1,), segment.param.device)
        if found != expected:
            raise ValueError(f"segment {position}: {name} must be {expected}; got {found}")
        past = 0 if tensor is None else tensor.data_ptr() % SEGMENT_ALIGNMENT_BYTES
        if past and name in ("average", "master"):
            raise ValueError(
                f"segment {position}: {name} starts {past} bytes past a multiple of {SEGMENT_ALIGNMENT_BYTES}; "
                "pad segments to start at one"
            )


def default_block_numel(dtypes: KernelDtypes) -> int:
    """Elements of a block; half as many in double precision, or a processor has registers for one block only."""
    return BLOCK_NUMEL // 2 if dtypes.average == torch.float64 else BLOCK_NUMEL


class Launch:
    """The update of a table of segments in one launch; made once by ``plan.py``, run at every step.

    Tensors are checked here, and kept alive as long as the launch.

    Args:
        segments: on ``device``, with the dtypes ``dtypes``; all with a gradient, or none; empty ones are left out.
        maximize, weight_decay: the hyperparameters of the segments' group.
        device: where the kernel runs; a CPU if Triton interprets it.
        block_numel: elements of a block, a power of two; None is ``default_block_numel``.

    Raises:
        ValueError: a tensor has another dtype, shape, device, memory order or alignment than the kernel reads.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        dtypes: KernelDtypes,
        maximize: bool,
        weight_decay: float,
        device: torch.device,
        block_numel: int | None = None,
    ) -> None:
        block_numel = block_numel or default_block_numel(dtypes)
        chosen = [i for i, segment in enumerate(segments) if segment.numel]
        for i in chosen:
            _check(segments[i], i, dtypes)
        # The table has addresses only: the tensors must live as long as it does.
        self._segments = [segments[i] for i in chosen]
        self.device = device
        given = [s.gradient.data_ptr() for s in self._segments if s.gradient is not None]
        if len(given) not in (0, len(chosen)):
            raise ValueError(f"{len(given)} of {len(chosen)} segments have a gradient: give all of them, or none")
        self._given = given or None
        self._has_averages = all(s.average is not None for s in self._segments)
        self._column = AddressColumn(range(len(chosen)) if given else chosen, len(given or segments), device)
        by_name = {"PARAM": dtypes.param, "GRADIENT": dtypes.gradient, "AVERAGE": dtypes.average}
        self._constants: dict[str, Any] = {
            **{name: getattr(tl, str(dtype).removeprefix("torch.")) for name, dtype in by_name.items()},
            "MASTER": dtypes.master,
            "STOCHASTIC": dtypes.stochastic,
            "MAXIMIZE": maximize,
            "WEIGHT_DECAY": weight_decay != 0,
            "PARAM_ALIGNED": not any(s.param.data_ptr() % ACCESS_BYTES for s in self._segments),
            "BLOCK_NUMEL": block_numel,
            "num_warps": NUM_WARPS,
            "enable_fp_fusion": False,
        }
        decay_bits = torch.tensor(weight_decay, dtype=torch.float64, device="cpu").view(torch.int64).item()
        table = []
        for s in self._segments:
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (s.param, s.average, s.master)]
            table.append([*addresses, s.numel, s.row, s.first, s.key, decay_bits])
        # The set of parameters that step may change with every step (mixtures of experts), and so may the plan.
        self._table = to_device(torch.tensor(table, dtype=torch.int64, device="cpu"), device)
        counts = torch.tensor([-(-s.numel // block_numel) for s in self._segments], dtype=torch.int64, device="cpu")
        of_block = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
        place = torch.arange(len(of_block), device="cpu") - (counts.cumsum(0) - counts)[of_block]
        self._blocks = to_device(torch.stack([of_block, place], dim=1).to(torch.int32), device)

    def run(
        self,
        gradients: Sequence[int] | None,
        factors: Tensor,
        unscale: Tensor | None = None,
        clip: Tensor | None = None,
        found_inf: Tensor | None = None,
        unwritten: bool = False,
    ) -> None:
        """Update every segment: one launch, and an upload if gradients have other addresses; no synchronisation.

        Args:
            gradients: the data pointers of this step's gradients, one for each segment; they are not checked. None if
                the segments have their own gradients.
            factors: (num_rows, 4) float64, from ``advance``.
            unscale: (1,) float32; gradients are multiplied by it. None instead of 1.
            clip: (1,) float32 or float64; gradients are multiplied by it. None instead of 1.
            found_inf: (1,) float32; if it is nonzero nothing changes.
            unwritten: averages are left alone, as mu is 1 in every row.

        Raises:
            ValueError: gradients are given twice or not at all, their number is wrong, or averages have no memory that
                would be written.
            RuntimeError: a CUDA graph is captured and memory for new addresses is used up.
        """
        if not self._segments:
            return
        if (gradients is None) == (self._given is None):
            raise ValueError("gradients: pass data pointers if the segments have none, and None if they have their own")
        if not (unwritten or self._has_averages):
            raise ValueError(NO_AVERAGES)
        column, aligned = self._column.of(list(gradients or self._given or ()))
        inputs = (self._blocks, self._table, column, factors, unscale, clip, found_inf)
        with _on(self.device):
            update_kernel[(len(self._blocks),)](
                *inputs, GRADIENT_ALIGNED=aligned, AVERAGED=not unwritten, **self._constants
            )


@dataclass(frozen=True, slots=True)
class KernelBatch(Batch):
    """Everything that steps in one state ``buffer``, updated in one launch.

    ``gradients`` is None if the segments have gradients of their own (stage 2).
    """

    launch: Launch
    gradients: SegmentGradients | None
    buffer: StateBuffer

    def run(self, step: StepContext) -> None:
        if self.gradients is None:
            pointers, scaling = None, step.reduced_scaling
        else:
            # Copies of gradients may be freed once the kernel is launched: their memory is reused in stream order.
            pointers, _copies = self.gradients.pointers(step.gradients.addresses)
            scaling = step.param_scaling
        unscale, clip = (
            None if factor is None else factor.to(self.launch.device).reshape(1)
            for factor in (scaling.unscale, scaling.clip)
        )
        factors = step.factors[self.buffer.group_index]
        self.launch.run(pointers, factors, unscale, clip, step.found_inf, self.buffer.params_stand)
