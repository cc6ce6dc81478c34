"""The compiled CPU kernel has the bits of torch operators with every dtype and option; and its fallback."""

import itertools
import os
import platform
import shutil
import subprocess
import sys
from array import array

import pytest
import torch
from torch import Tensor

from dist_asgd import ShardedASGD
from dist_asgd.storage import masters
from dist_asgd.update import cpu, reference, rounding
from dist_asgd.update.schedule import Implementation, StepHyperparameters
from dist_asgd.update.segments import KernelDtypes, Segment
from tests.harness.bits import assert_same_bits
from tests.harness.ranks import run, run_errors

needs_kernel = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=f"no kernel: {cpu.why_unavailable()}")

NARROW = [torch.bfloat16, torch.float16]
KERNEL_DTYPES = [KernelDtypes(d, d, d) for d in (torch.float32, torch.float64)]
KERNEL_DTYPES += [
    KernelDtypes(p, g, a, master)
    for p in NARROW
    for g in (p, torch.float32)
    for a in (p, torch.float32)
    for master in (False, True)
]
KERNEL_DTYPES += [
    KernelDtypes(torch.bfloat16, g, a, stochastic=True)
    for g in (torch.bfloat16, torch.float32)
    for a in (torch.bfloat16, torch.float32)
]
ETA = torch.tensor(0.0371)
LAMBD, STEP, FIRST = 0.01, 5, 11
KEY = rounding.parameter_key(1_234_567_890_123, 3)


def spread(numel: int, dtype: torch.dtype, offset: int) -> Tensor:
    """Values over many binades, subnormal halves among them, that begin ``offset`` elements into their memory."""
    values = torch.randn(numel + offset) * torch.exp2(torch.randint(-24, 4, (numel + offset,)).float())
    return values.to(dtype)[offset:]


def oracle(
    dtypes: KernelDtypes,
    p: Tensor,
    g: Tensor,
    ax: Tensor,
    master: Tensor | None,
    hyper: StepHyperparameters,
    mu: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same step in torch operators, on copies."""
    p, ax = p.clone(), ax.clone()
    if dtypes.master and master is not None:
        exact = masters.read(p, master, torch.empty(p.shape))
        reference.update(exact, g.float(), ax, ETA, mu, hyper, None)
        new_master = torch.empty_like(master)
        masters.write(exact, p, new_master)
        return p, ax, new_master
    if dtypes.stochastic:
        exact = p.float()
        reference.update(exact, g.float(), torch.zeros(p.shape), ETA, mu, hyper, None)
        rounding.round_stochastically(exact, p, rounding.random_16(KEY, STEP, FIRST, p.numel(), p.device))
        if mu == 1:
            ax.copy_(p)
        else:
            ax.add_(torch.sub(p.float(), ax).mul_(mu))
        return p, ax, None
    reference.update(p, g.to(dtypes.param), ax, ETA, mu, hyper, None)
    return p, ax, None


def check(
    dtypes: KernelDtypes, numel: int, offset: int, maximize: bool, decay: float, mu: float, scale: float, clip: float
) -> None:
    """One call of the kernel beside the oracle."""
    torch.manual_seed(numel)
    p, g, ax = (spread(numel, dtype, offset) for dtype in (dtypes.param, dtypes.gradient, dtypes.average))
    master = None
    if dtypes.master and dtypes.param == torch.bfloat16:
        master = torch.randint(-(2**15), 2**15, (numel,), dtype=torch.int16)
    elif dtypes.master:
        master = p.float() * (1 + 1e-5)
        p[::7] += 1  # written by somebody else since the last step
    mu_tensor = torch.tensor(mu)
    wide = g.float() if dtypes.master or dtypes.stochastic else g
    scaled = wide * torch.tensor(scale) * torch.tensor(clip)
    hyper = StepHyperparameters(0.1, LAMBD, 0.75, 0.0, decay, maximize, Implementation.FORLOOP)
    expected = oracle(dtypes, p, scaled, ax, master, hyper, mu_tensor)
    segment = Segment(p, ax, master, g, 0, FIRST, KEY, cpu.lanes(numel, 0, numel))
    rows = array("d", [1 - LAMBD * ETA.item(), -ETA.item(), mu_tensor.item(), STEP])
    factors = [torch.tensor(factor).item() for factor in (scale, clip)]
    cpu.Launch([segment], dtypes, maximize, decay, streamed=numel % 2 == 1).run(None, rows, *factors)
    for found, wanted, what in zip((p, ax, master), expected, ("parameters", "average", "masters"), strict=True):
        if wanted is not None and found is not None:
            assert_same_bits(
                found, wanted, f"{what} of {dtypes}, {numel=} {offset=} {maximize=} {decay=} {mu=} {scale=}"
            )


def test_the_kernel_was_compiled_where_it_can_be() -> None:
    """So that the tests below do not all skip unseen: on x86-64 with a compiler and AVX2 there is a kernel."""
    has_compiler = any(map(shutil.which, ("cc", "gcc", "clang")))
    capable = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if platform.machine() == "x86_64" and has_compiler and capable:
        assert cpu.why_unavailable() is None
    else:
        assert cpu.why_unavailable() is not None or capable


EVERY_BFLOAT16 = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)


@needs_kernel
@pytest.mark.parametrize("average", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mu", [1.0, 0.3])
@pytest.mark.parametrize("decay", [0.0, 0.07])
@pytest.mark.parametrize("clip", [1.0, 0.5, torch.nan])
def test_every_value_of_bfloat16(average: torch.dtype, mu: float, decay: float, clip: float) -> None:
    """Also NaNs with any payload, infinities and subnormals: NaN where torch has NaN, and its bits elsewhere."""
    torch.manual_seed(0)
    dtypes = KernelDtypes(torch.bfloat16, torch.bfloat16, average)
    p, g, ax = (EVERY_BFLOAT16[torch.randperm(2**16)] for _ in range(3))
    ax = ax.to(average)
    # A NaN with all bits set, as a norm of such gradients is.
    clip_tensor = torch.tensor(-1, dtype=torch.int32).view(torch.float32) if clip != clip else torch.tensor(clip)
    mu_tensor = torch.tensor(mu)
    hyper = StepHyperparameters(0.1, LAMBD, 0.75, 0.0, decay, False, Implementation.FORLOOP)
    expected = oracle(dtypes, p, g * clip_tensor, ax, None, hyper, mu_tensor)
    rows = array("d", [1 - LAMBD * ETA.item(), -ETA.item(), mu_tensor.item(), STEP])
    segment = Segment(p, ax, None, g, 0, FIRST, KEY, cpu.lanes(p.numel(), 0, p.numel()))
    cpu.Launch([segment], dtypes, False, decay, streamed=False).run(None, rows, 1.0, clip_tensor.item())
    for found, wanted in zip((p, ax), expected, strict=False):
        assert wanted is not None
        assert torch.equal(found.isnan(), wanted.isnan())
        assert_same_bits(found[~found.isnan()], wanted[~wanted.isnan()], f"{average} {mu=} {decay=} {clip=}")


@needs_kernel
@pytest.mark.parametrize("dtypes", KERNEL_DTYPES, ids=str)
def test_every_dtype_and_option_has_the_bits_of_torch_operators(dtypes: KernelDtypes) -> None:
    """At awkward sizes and alignments."""
    sizes, options = (
        (1, 31, 32, 33, 1000, 1025, 4099),
        ((False, True), (0.0, 0.013), (1.0, 1 / 7), (1.0, 1 / 3), (1.0, 0.77)),
    )
    for index, numel in enumerate(sizes):
        for offset, option in enumerate(itertools.product(*options), index):
            check(dtypes, numel, offset % 2, *option)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_maximize_negates_nans_as_torch_does(dtype: torch.dtype) -> None:
    """A compiler that contracts the negation into the multiply-add after it would keep the sign of a NaN."""
    g = torch.tensor([torch.nan, -torch.nan, 1.0, -0.0] * 16, dtype=dtype)
    p, ax, mu = torch.ones(64, dtype=dtype), torch.zeros(64, dtype=dtype), torch.tensor(0.3)
    hyper = StepHyperparameters(0.1, LAMBD, 0.75, 0.0, 0.0, True, Implementation.FORLOOP)
    dtypes = KernelDtypes(dtype, dtype, dtype)
    expected = oracle(dtypes, p, g, ax, None, hyper, mu)
    rows = array("d", [1 - LAMBD * ETA.item(), -ETA.item(), mu.item(), STEP])
    cpu.Launch([Segment(p, ax, None, g, 0)], dtypes, True, 0.0, streamed=False).run(None, rows, 1.0, 1.0)
    assert_same_bits(p, expected[0], "parameters")
    assert_same_bits(ax, expected[1], "average")


@needs_kernel
@pytest.mark.parametrize(
    "dtypes",
    [KERNEL_DTYPES[0], KERNEL_DTYPES[1], KernelDtypes(torch.bfloat16, torch.bfloat16, torch.float32, True)],
    ids=str,
)
def test_two_million_elements_on_several_threads(dtypes: KernelDtypes) -> None:
    """The cut between threads falls anywhere."""
    torch.set_num_threads(3)
    try:
        check(dtypes, 2_000_019, 0, False, 0.01, 1 / 7, 1.0, 1.0)
    finally:
        torch.set_num_threads(1)


@needs_kernel
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_segments_have_rows_of_their_own(num_threads: int) -> None:
    """Many segments, some empty, some shorter than a block, with three rows, in one call."""
    dtypes = KERNEL_DTYPES[0]
    torch.manual_seed(0)
    hyper = StepHyperparameters(0.1, 0.0, 0.75, 0.0, 0.0, False, Implementation.FORLOOP)
    segments, expected, rows = [], [], array("d")
    mus = [torch.tensor(mu) for mu in (1.0, 1 / 3, 0.1)]
    for mu in mus:
        rows.extend((1.0, -ETA.item(), mu.item(), STEP))
    for number in range(300):
        p, g, ax = (torch.randn(number * 37 % 5000) for _ in range(3))
        segments.append(Segment(p, ax, None, g, number % 3))
        expected.append(oracle(dtypes, p, g, ax, None, hyper, mus[number % 3]))
    torch.set_num_threads(num_threads)
    try:
        cpu.Launch(segments, dtypes, False, 0.0, False).run(None, rows, 1.0, 1.0)
    finally:
        torch.set_num_threads(1)
    for number, (segment, (p, ax, _)) in enumerate(zip(segments, expected, strict=True)):
        assert_same_bits(segment.param, p, f"segment {number}")
        assert_same_bits(segment.average, ax, f"average of segment {number}")


@needs_kernel
def test_wrong_memory_never_reaches_the_kernel() -> None:
    """Dtype, length, strides, missing gradients and rows are checked in Python."""
    good = torch.zeros(8)
    for bad in (
        torch.zeros(7),
        torch.zeros(8, dtype=torch.float64),
        torch.zeros(16)[::2],
        torch.zeros(8, device="meta"),
    ):
        with pytest.raises(ValueError, match="CPU kernel"):
            cpu.Launch([Segment(good, bad, None, good, 0)], KERNEL_DTYPES[0], False, 0.0, False)
        with pytest.raises(ValueError, match="CPU kernel"):
            cpu.Launch([Segment(good, good, None, bad, 0)], KERNEL_DTYPES[0], False, 0.0, False)
    bare = cpu.Launch([Segment(good, None, None, good.clone(), 0)], KERNEL_DTYPES[0], False, 0.0, False)
    bare.run(None, array("d", [1.0, 0.0, 1.0, 1.0]), 1.0, 1.0, unwritten=True)
    with pytest.raises(ValueError, match="averages that have no memory"):
        bare.run(None, array("d", [1.0, 0.0, 1.0, 1.0]), 1.0, 1.0)
    launch = cpu.Launch([Segment(good, good.clone(), None, None, 1)], KERNEL_DTYPES[0], False, 0.0, False)
    before = good.clone()
    for gradients, rows in ((None, [1.0] * 8), ([good.data_ptr()], [1.0] * 4), ([], [1.0] * 8), ([0], [1.0] * 8)):
        with pytest.raises(ValueError, match="every"):
            launch.run(None if gradients is None else array("Q", gradients), array("d", rows), 1.0, 1.0)
    assert torch.equal(good, before)


FALLBACK = """
import logging, torch
logging.basicConfig(format="%(name)s %(message)s")
from dist_asgd import ShardedASGD
ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 1001)) for _ in range(2))
optimizers = ShardedASGD([ours], lr=0.1, t0=1, fused=True), torch.optim.ASGD([theirs], lr=0.1, t0=1, foreach=False)
ShardedASGD([torch.nn.Parameter(torch.ones(3))], fused=True)
for step in range(5):
    for p, optimizer in zip((ours, theirs), optimizers):
        p.grad = p.detach().sin() + step
        optimizer.step()
assert torch.equal(ours, theirs), "other bits"
"""


@needs_kernel
def test_bytes_are_copied_past_the_caches() -> None:
    """At any alignment and size, on several threads; nothing beside them is written."""
    threads = torch.get_num_threads()
    source = torch.randint(0, 256, (9_000_001,), dtype=torch.uint8)
    try:
        for num_threads, start, numel in itertools.product(
            (1, 3), (0, 1, 63), (0, 5, 1 << 20, (1 << 20) + 7, 8_999_900)
        ):
            torch.set_num_threads(num_threads)
            to = torch.zeros_like(source)
            cpu.copy_bytes(to[start + 7 :][:numel], source[start:][:numel])
            assert torch.equal(to[start + 7 :][:numel], source[start:][:numel])
            assert not to[: start + 7].any()
            assert not to[start + 7 + numel :].any()
    finally:
        torch.set_num_threads(threads)
    for wrong in (torch.zeros(1 << 20), torch.zeros(1 << 21, dtype=torch.uint8)[::2]):
        with pytest.raises(ValueError, match="contiguous"):
            cpu.copy_bytes(wrong, source[: 1 << 20])


def test_without_the_kernel_the_bits_are_the_same_and_the_log_says_so_once() -> None:
    """torch itself drops fused multiply-adds under this setting, so the kernel would differ."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the CPU kernel is not used") == 1, done.stderr


def test_fused_is_refused_where_it_cannot_be() -> None:
    """At construction, with the remedy."""
    for options in ({"foreach": True}, {"differentiable": True}):
        with pytest.raises(ValueError, match="fused=True with"):
            ShardedASGD([torch.nn.Parameter(torch.ones(3))], fused=True, **options)
    with pytest.raises(ValueError, match="fused must be"):
        ShardedASGD([torch.nn.Parameter(torch.ones(3))], fused=1)


def test_remainders_give_back_every_bit_of_the_master() -> None:
    """Joining what was split, and the parameter is the master rounded to nearest."""
    bits = torch.randint(-(2**31), 2**31, (1_000_000,), dtype=torch.int64).to(torch.int32)
    master = bits.view(torch.float32)
    master = torch.cat([master[master.isfinite()], torch.tensor([0.0, -0.0, 3.3895e38, 1e-45, torch.inf, -torch.inf])])
    param, remainder = torch.empty(master.shape, dtype=torch.bfloat16), torch.empty(master.shape, dtype=torch.int16)
    masters.write(master, param, remainder)
    assert_same_bits(masters.read(param, remainder, torch.empty(master.shape)), master, "master")
    ties = remainder == -(2**15)
    assert_same_bits(param[~ties], master[~ties].bfloat16(), "parameter")


def test_stochastic_rounding_is_unbiased() -> None:
    """The mean of many roundings of one value, within six standard deviations; and both neighbours occur."""
    value = 1 + 0.3 * 2**-7
    numel = 1 << 20
    rounded = torch.empty(numel, dtype=torch.bfloat16)
    random = rounding.random_16(KEY, 1, 0, numel, rounded.device)
    rounding.round_stochastically(torch.full((numel,), value), rounded, random)
    deviation = (rounded.double().mean() - value).abs().item()
    assert 0 < deviation < 6 * 2**-7 * (0.3 * 0.7 / numel) ** 0.5
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}


def test_bf16_averages_stay_exact_and_counters_go_on() -> None:
    """10,000 steps: ax in float32 by default, within 1e-5 of the exact mean; step counts past 2^24."""
    param = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = ShardedASGD([param], lr=0.5, lambd=0.0, t0=0)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(64, dtype=torch.float64)
    for step in range(1, 10_001):
        param.grad = torch.randn(64, generator=generator).bfloat16() + param.detach() - 1
        optimizer.step()
        if step > 1:
            total += param.detach().double()
    average = optimizer.state[param]["ax"].as_subclass(Tensor)
    assert average.dtype == torch.float32
    mean = total / 9_999
    assert ((average.double() - mean).square().mean().sqrt() / mean.square().mean().sqrt()).item() < 1e-5
    state = optimizer.consolidated_state_dict()
    state["state"][0]["step"] = torch.tensor(float(2**24))
    optimizer.load_state_dict(state)
    for _ in range(3):
        optimizer.step()
    assert optimizer.state[param]["step"].item() == 2**24 + 3


def disagrees(rank: int, _world_size: int, option: str, values: list[object]) -> None:
    """Job: every rank constructs with a value of its own."""
    ShardedASGD([torch.nn.Parameter(torch.ones(3))], **{option: values[rank % len(values)]})


@pytest.mark.parametrize(
    ("option", "values"), [("average_dtype", [None, torch.float64]), ("fused", [True, None]), ("fused", [False, 3])]
)
@pytest.mark.parametrize("backend", ["threads", "gloo"])
def test_ranks_that_differ_in_an_option_all_raise(backend: str, option: str, values: list[object]) -> None:
    """At construction, with the option's name."""
    for error in run_errors(backend, 2, disagrees, option, values):
        assert option in error.message


def hostile(_rank: int, _world_size: int, form: str, stage: int) -> list[Tensor]:
    """Job: fewer elements than ranks, an empty parameter, NaN and infinity in the gradients."""
    params = [torch.nn.Parameter(torch.ones(numel)) for numel in (1, 0, 3)]
    optimizer = ShardedASGD(params, lr=0.1, t0=0, stage=stage, foreach=form == "foreach", fused=form == "fused")
    for value in (1.0, torch.inf, torch.nan):
        optimizer.zero_grad()
        for p in params:
            p.grad = torch.full_like(p, value)
        optimizer.step()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_empty_shards_and_what_is_no_number(world_size: int, stage: int) -> None:
    """As the for-loop form has it: NaN where torch has NaN, and no crash."""
    expected = run("none", 1, hostile, "forloop", 1)[0]
    for found in run("gloo" if world_size > 1 else "none", world_size, hostile, "fused", stage):
        for p, q in zip(found, expected, strict=True):
            assert torch.equal(p.isnan(), q.isnan())


def test_average_dtype() -> None:
    """None, the parameter's own, a wider one; and what is no dtype for it."""
    for asked, wanted in ((None, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float64, torch.float64)):
        param = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
        optimizer = ShardedASGD([param], average_dtype=asked)
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert optimizer.state[param]["ax"].dtype == wanted
        assert optimizer.consolidated_state_dict()["state"][0]["ax"].dtype == wanted
    wide = torch.nn.Parameter(torch.ones(2))
    assert ShardedASGD([wide], average_dtype=torch.bfloat16).state[wide]["ax"].dtype == torch.float32
    with pytest.raises(ValueError, match="differentiable"):
        ShardedASGD([torch.nn.Parameter(torch.ones(2))], average_dtype=torch.float64, differentiable=True)
    for bad in (torch.int8, torch.complex64, "float32"):
        with pytest.raises(ValueError, match="average_dtype"):
            ShardedASGD([torch.nn.Parameter(torch.ones(2))], average_dtype=bad)
