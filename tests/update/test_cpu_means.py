"""The compiled kernel takes parameters into averages with the bits of torch's lerp."""

import pytest
import torch
from torch import Tensor, nn

from dist_asgd import ShardedAverage
from dist_asgd.update import cpu
from dist_asgd.update.cpu import Means
from dist_asgd.update.means import LARGEST_WEIGHT
from tests.harness.bits import assert_same_bits

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason="no compiled kernel here")
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
# Beside vectors and cache lines of each size, and with several threads.
NUMELS = (1, 3, 7, 16, 17, 31, 33, 64, 100, 255, 257, 5000)
WEIGHTS = (0.0, 1e-10, 0.001, 0.25, 0.4999999999999, 0.5, 0.5000000000001, 0.75, 0.999, LARGEST_WEIGHT)


def odd_values(numel: int, dtype: torch.dtype, draw: torch.Generator) -> Tensor:
    """Numbers of all sizes, with zeros, infinities and NaN among them."""
    values = torch.randn(numel, generator=draw, dtype=torch.float64)
    values *= 10.0 ** torch.randint(-45, 39, (numel,), generator=draw)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    chosen = torch.rand(numel, generator=draw) < 0.1
    values[chosen] = special[torch.randint(5, (int(chosen.sum()),), generator=draw)]
    return values.to(dtype)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("dtype", "average_dtype"), DTYPES, ids=str)
def test_the_bits_are_those_of_lerp(dtype: torch.dtype, average_dtype: torch.dtype, weight: float) -> None:
    """In one thread, and in several that share parameters."""
    draw = torch.Generator().manual_seed(round(weight * 1000))
    params = [odd_values(numel, dtype, draw) for numel in NUMELS]
    averages = [odd_values(numel, average_dtype, draw) for numel in NUMELS]
    # Also equal ones, whose difference is zero.
    averages[-1][::3] = params[-1][::3].to(average_dtype)
    wanted = [
        average.clone().lerp_(param.to(average_dtype), weight) for param, average in zip(params, averages, strict=True)
    ]
    for num_threads in (1, 3):
        taken = [average.clone() for average in averages]
        kernel = Means(params, taken)
        kernel._max_threads = num_threads
        before, _ = torch.get_num_threads(), torch.set_num_threads(num_threads)
        kernel.run(weight)
        torch.set_num_threads(before)
        for mine, theirs in zip(taken, wanted, strict=True):
            # Which NaN comes of two is the compiler's choice, in torch as here.
            assert torch.equal(mine.isnan(), theirs.isnan())
            assert_same_bits(mine.nan_to_num(7.0), theirs.nan_to_num(7.0), f"{weight} in {num_threads}")


@pytest.mark.parametrize("flushes", [False, True])
def test_every_value_of_float16(flushes: bool) -> None:
    """Also if denormal numbers are flushed to zero: those of float16 are none of float32."""
    param = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    average = torch.zeros(1 << 16)
    try:
        torch.set_flush_denormal(flushes)
        wanted = average.clone().lerp_(param.float(), 0.5)
        Means([param], [average]).run(0.5)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(average.isnan(), wanted.isnan())
    assert_same_bits(average.nan_to_num(7.0), wanted.nan_to_num(7.0), "float16")


def test_a_weight_that_rounds_to_one_is_left_to_torch() -> None:
    """Its operators give zeros other signs in the last elements of a tensor."""
    weight = 1 - 1e-12
    values = [torch.full((21,), value) for value in (-0.0, -1.0, -0.0)]
    param = nn.Parameter(values[0].clone())
    average = ShardedAverage([param], weight=lambda _: weight)
    wanted = values[0].clone()
    for n, value in enumerate(values):
        with torch.no_grad():
            param.copy_(value)
        average.update()
        wanted = value.clone() if n == 0 else wanted.lerp_(value, weight)
    assert_same_bits(average.state[param]["ax"], wanted, "ax")


def test_wrong_memory_never_reaches_the_kernel() -> None:
    """It would read what is not there."""
    with pytest.raises(ValueError, match=r"the average of a CPU kernel must be contiguous torch\.float32"):
        Means([torch.zeros(5), torch.zeros(5)], [torch.zeros(5), torch.zeros(5, dtype=torch.float64)])
    with pytest.raises(ValueError, match=r"of shape \(5,\)"):
        Means([torch.zeros(5)], [torch.zeros(4)])
    assert not Means.can_take(torch.bfloat16, torch.zeros(1, dtype=torch.bfloat16))
    assert not Means.can_take(torch.complex64, torch.zeros(1))
