"""The Triton kernels: interpreted against torch's operators, to the bit, and compiled ahead of time for an H100.

Both in processes of their own (``harness.triton_kernels``), one for all cases: see there for the oracles.
"""

import importlib.util
import json
from functools import cache

import pytest
import torch

from ..harness import triton_optimizer
from ..harness.triton_kernels import AHEAD, KERNEL_DTYPES, all_cases, start

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(
        torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch's operators are not fused: no oracle"
    ),
]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
    ),
]
# Elements a thread; the kernel's two ways, full and last blocks, have as many each.
ELEMENTS = {name: 8 if KERNEL_DTYPES[name].average == torch.float64 else 16 for name in AHEAD}


@cache
def outcomes(device: str) -> dict[str, str]:
    """What went wrong in each case, empty where nothing did."""
    lines = [line.split("\t") for line in start(device).splitlines()]
    return {name: json.loads(outcome) for name, outcome in lines}


@cache
def optimizer_outcomes(device: str) -> dict[str, str]:
    """The like of ``outcomes`` for whole optimizers."""
    lines = [line.split("\t") for line in start(device, "tests.harness.triton_optimizer").splitlines()]
    return {name: json.loads(outcome) for name, outcome in lines}


@cache
def machine_code() -> dict[str, dict[str, int]]:
    """Counts of instructions by kernel."""
    facts: dict[str, dict[str, int]] = json.loads(start("ahead"))
    return facts


def count(facts: dict[str, int], *starts: str) -> int:
    """Instructions that begin so."""
    return sum(number for name, number in facts.items() if name.startswith(starts))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", all_cases())
def test_kernels_give_the_oracles_bits(case: str, device: str) -> None:
    """Interpreted on the CPU, and run on a GPU where there is one."""
    assert outcomes(device)[case] == ""


@pytest.mark.parametrize("case", triton_optimizer.all_cases("cpu"))
def test_optimizers_on_the_kernels_are_torch_to_the_bit(case: str) -> None:
    """``fused=True`` as on a GPU, interpreted: scalars that live and are skipped on the device, histories, ranks."""
    assert optimizer_outcomes("cpu")[case] == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("case", triton_optimizer.all_cases("cuda"))
def test_optimizers_on_a_gpu(case: str) -> None:
    """What can be compared there."""
    assert optimizer_outcomes("cuda")[case] == ""


@pytest.mark.parametrize("name", AHEAD)
def test_full_blocks_move_16_bytes_at_a_time(name: str) -> None:
    """Every array of a full block, read or written: no narrower access is among them."""
    dtypes, facts = KERNEL_DTYPES[name], machine_code()[name]
    master = 0 if not dtypes.master else dtypes.param.itemsize if dtypes.param == torch.bfloat16 else 4
    written = dtypes.param.itemsize + master + dtypes.average.itemsize
    read = written + dtypes.gradient.itemsize
    assert count(facts, "LDG.E.128") == read * ELEMENTS[name] // 16
    assert count(facts, "STG.E.128") == written * ELEMENTS[name] // 16
    # The others are the last block's: one an element and array.
    assert count(facts, "STG.E") - count(facts, "STG.E.128") == (2 + dtypes.master) * ELEMENTS[name]


def test_unaligned_gradients_do_not_narrow_the_rest() -> None:
    """Only the gradient is read one element at a time."""
    facts = machine_code()["fp32-unaligned"]
    assert count(facts, "LDG.E.128") == 2 * 4 * ELEMENTS["fp32"] // 16
    assert count(facts, "STG.E.128") == 2 * 4 * ELEMENTS["fp32"] // 16


def test_averages_that_are_left_alone_are_not_touched() -> None:
    """Parameters and gradients are read, and parameters written."""
    facts = machine_code()["fp32-unwritten"]
    assert count(facts, "LDG.E.128") == 2 * 4 * ELEMENTS["fp32"] // 16
    assert count(facts, "STG.E.128") == 4 * ELEMENTS["fp32"] // 16
    assert count(facts, "STG.E") - count(facts, "STG.E.128") == ELEMENTS["fp32"]


@pytest.mark.parametrize("name", [*AHEAD, "advance"])
def test_nothing_spills(name: str) -> None:
    """No local memory, no stack, and few enough registers for two blocks on a multiprocessor."""
    facts = machine_code()[name]
    assert facts["STACK"] == facts["LOCAL"] == count(facts, "LDL", "STL") == 0
    assert facts["REG"] <= 128


@pytest.mark.parametrize("name", AHEAD)
def test_only_written_fmas_are_fused(name: str) -> None:
    """With weight decay an element takes two fmas, two products, a difference and a sum; no denormal is flushed."""
    facts = machine_code()[name]
    letter = "D" if name == "fp64" else "F"
    both_ways = 2 * ELEMENTS[name]
    assert count(facts, f"{letter}FMA") == 2 * both_ways
    assert count(facts, f"{letter}MUL") == 2 * both_ways
    # Rounded to bfloat16 anyway, the difference and the sum become 16-bit instructions, with the same bits.
    narrow = name == "bf16-average16"
    assert count(facts, "HFMA2" if narrow else f"{letter}ADD") >= (1 if narrow else 2 * both_ways)
    assert not [instruction for instruction in facts if ".FTZ" in instruction]


def test_options_take_a_product_each() -> None:
    """Unscaling and clipping: two more products an element."""
    facts = machine_code()["fp32-options"]
    assert count(facts, "FMUL") == 4 * 2 * ELEMENTS["fp32"]
    assert facts["STACK"] == facts["LOCAL"] == count(facts, "LDL", "STL") == 0
