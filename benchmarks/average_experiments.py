"""What averaging does to the error of SGD, measured on the problems of ``average_problems.py``, beside expectations.

The words, and the derivation of all expectations and bounds, stand at the top of that file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.average_problems import DTYPE, Problem, Quadratic, Regression, spread_of, variance_of_mean
from dist_asgd import ShardedASGD, ShardedAverage

NUM_SIGMAS = 4.0
# The slopes that the laws have for large n.
CONSTANT_LAST, AVERAGED, COSINE_LAST = 0.0, -1.0, -2 / 3


@dataclass(frozen=True)
class Size:
    """How much is run: replicates of each problem, and the largest number of iterates in an average."""

    replicates: int = 256
    quadratic_steps: int = 8192
    regression_steps: int = 8192
    share_steps: tuple[int, ...] = (512, 4096)

    @staticmethod
    def quick() -> Size:
        """A few seconds."""
        return Size(replicates=64, quadratic_steps=512, regression_steps=2048, share_steps=(512,))


@dataclass(frozen=True)
class Curve:
    """The errors of one way to train, with ``n`` iterates averaged, or after ``n`` steps of a schedule.

    ``law`` is the slope for large n, and ``spread`` the relative standard deviation of an error. ``bias`` is the part
    of the expected errors that does not fall.
    """

    problem: str
    name: str
    law: float
    n: tuple[int, ...]
    measured: tuple[float, ...]
    expected: tuple[float, ...]
    spread: float
    bias: float = 0.0

    @property
    def slope(self) -> float:
        """The measured slope."""
        return slope_of(self.n, self.measured)

    @property
    def expected_slope(self) -> float:
        """The slope of the expected errors."""
        return slope_of(self.n, self.expected)

    @property
    def bound(self) -> float:
        """How far the measured slope may lie from the expected one; derived in ``average_problems.py``."""
        weights = np.abs(_weights(self.n))
        of_bias = float(weights @ (self.bias / np.asarray(self.expected)))
        return NUM_SIGMAS * self.spread * float(weights.sum()) + of_bias

    def as_dict(self) -> dict[str, Any]:
        """The fields and the slopes, for JSON."""
        return {**asdict(self), "slope": self.slope, "expected_slope": self.expected_slope, "bound": self.bound}


def _weights(n: Sequence[int]) -> Any:
    u = np.log(np.asarray(n, dtype=float))
    return (u - u.mean()) / ((u - u.mean()) ** 2).sum()


def slope_of(n: Sequence[int], errors: Sequence[float]) -> float:
    """The slope of the line of least squares through log(error) over log(n)."""
    return float(_weights(n) @ np.log(np.asarray(errors)))


def doublings(first: int, last: int) -> list[int]:
    """``first``, and its doubles up to ``last``."""
    return [first << i for i in range(int(math.log2(last / first)) + 1)]


def error_of_average(problem: Problem, optimizer: ShardedASGD | ShardedAverage, x: torch.nn.Parameter) -> float:
    """The error of the average of ``x``."""
    with optimizer.averaged_parameters():
        return problem.error(x.detach())


def cosine(step: int, num_steps: int) -> float:
    """The factor of the learning rate in step 1, 2, ..., ``num_steps``: 1 at first, and 0 after the last one."""
    return 0.5 * (1 + math.cos(math.pi * (step - 1) / num_steps))


# --- how errors fall -----------------------------------------------------------------------------------------------


def quadratic_curves(size: Size, seed: int = 0) -> list[Curve]:
    """Run ``ShardedASGD`` on the quadratic: with a constant learning rate, and with a cosine of each length."""
    problem = Quadratic(size.replicates)
    generator = torch.Generator().manual_seed(seed)
    wanted = doublings(64, size.quadratic_steps)
    x = problem.start(generator)
    optimizer = ShardedASGD([x], lr=problem.lr, lambd=0.0, alpha=0.0, t0=0)
    last, averaged = [], []
    while optimizer.averaged_steps() < wanted[-1]:
        problem.set_gradient(x, generator)
        optimizer.step()
        if optimizer.averaged_steps() in wanted:
            last.append(problem.error(x.detach()))
            averaged.append(error_of_average(problem, optimizer, x))
    means = [variance_of_mean(problem.rho, problem.variance, n) for n in wanted]
    of_last = problem.expected(problem.variance)
    spread = problem.spread(problem.variance)
    curves = [
        ("constant lr, last iterate", CONSTANT_LAST, last, [of_last] * len(wanted), spread),
        (
            "constant lr, average",
            AVERAGED,
            averaged,
            list(map(problem.expected, means)),
            max(map(problem.spread, means)),
        ),
    ]
    ends = [_cosine_end(problem, n, generator) for n in wanted]
    variances = [_cosine_variance(problem, n) for n in wanted]
    expected = list(map(problem.expected, variances))
    curves.append(
        ("cosine, last iterate", COSINE_LAST, [end[0] for end in ends], expected, max(map(problem.spread, variances)))
    )
    return [
        Curve("quadratic", name, law, tuple(wanted), tuple(measured), tuple(exact), spread)
        for name, law, measured, exact, spread in curves
    ]


def _cosine_end(problem: Quadratic, num_steps: int, generator: torch.Generator) -> tuple[float, float]:
    """The errors of the last iterate and of the average of the last quarter, after a cosine of ``num_steps``."""
    x = problem.start(generator)
    optimizer = ShardedASGD([x], lr=problem.lr, lambd=0.0, alpha=0.0, t0=0.75 * num_steps)
    for step in range(1, num_steps + 1):
        # A change of lr acts one step late, as in torch.optim.ASGD, which stores eta.
        optimizer.param_groups[0]["lr"] = problem.lr * cosine(step + 1, num_steps)
        problem.set_gradient(x, generator)
        optimizer.step()
    return problem.error(x.detach()), error_of_average(problem, optimizer, x)


def _cosine_variance(problem: Quadratic, num_steps: int) -> Tensor:
    variance = problem.variance
    for step in range(1, num_steps + 1):
        lr = problem.lr * cosine(step, num_steps)
        variance = (1 - lr * problem.curvatures) ** 2 * variance + lr**2
    return variance


def regression_curves(size: Size, seed: int = 1) -> list[Curve]:
    """Run ``ShardedASGD`` on the regression, with a constant learning rate."""
    problem = Regression(size.replicates)
    generator = torch.Generator().manual_seed(seed)
    a, variance, moments, bias = problem.model()
    num_forgotten = problem.num_forgotten()
    wanted = doublings(512, size.regression_steps)
    w = torch.nn.Parameter(problem.minimum.repeat(problem.replicates, 1))
    optimizer = ShardedASGD([w], lr=problem.lr, lambd=0.0, alpha=0.0, t0=num_forgotten)
    last, averaged = [], []
    while optimizer.averaged_steps() < wanted[-1]:
        problem.set_gradient(w, generator)
        optimizer.step()
        if optimizer.averaged_steps() in wanted:
            last.append(problem.error(w.detach()))
            averaged.append(error_of_average(problem, optimizer, w))
    rho = 1 - problem.lr * a
    exact = [float((a * variance_of_mean(rho, variance, n) / 2).sum()) + bias for n in wanted]
    of_last = float((a * variance / 2).sum()) + bias
    spread = spread_of(moments, problem.replicates)
    # The iterates are nearer to each other in flat directions than M has it: their spread is that of one coordinate.
    widest = math.sqrt(2 / problem.replicates)
    n = tuple(wanted)
    return [
        Curve("regression", "constant lr, last iterate", 0.0, n, tuple(last), (of_last,) * len(n), widest, bias),
        Curve("regression", "constant lr, average", AVERAGED, n, tuple(averaged), tuple(exact), spread, bias),
    ]


# --- when to begin, and what lambd does ----------------------------------------------------------------------------

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
LAMBDS = (0.0, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class Start:
    """Errors at the end of a run of ``num_steps`` of the regression, from zero weights.

    ``averaged`` is the error of the average by the share of the run at which it begins; ``last`` and ``cosine`` are
    those of the last iterate, with a constant learning rate and with a cosine.
    """

    num_steps: int
    averaged: dict[str, float]
    last: float
    cosine: float


def starts(size: Size, seed: int = 2) -> list[Start]:
    """Run SGD once for each length, beside one ``ShardedAverage`` for each share: all of them see the same iterates."""
    problem = Regression(size.replicates)
    found = []
    for num_steps in size.share_steps:
        generator = torch.Generator().manual_seed(seed)
        w = torch.nn.Parameter(torch.zeros(problem.replicates, len(problem.minimum), dtype=DTYPE))
        optimizer = torch.optim.SGD([w], lr=problem.lr)
        averages = [ShardedAverage([w], start=math.floor(share * num_steps)) for share in SHARES]
        for _ in range(num_steps):
            problem.set_gradient(w, generator)
            optimizer.step()
            for average in averages:
                average.update()
        errors = [error_of_average(problem, average, w) for average in averages]
        cosine_end = _cosine_run(problem, num_steps, generator)
        by_share = {f"{share:g}": error for share, error in zip(SHARES, errors, strict=True)}
        found.append(Start(num_steps, by_share, problem.error(w.detach()), cosine_end))
    return found


def _cosine_run(problem: Regression, num_steps: int, generator: torch.Generator) -> float:
    w = torch.nn.Parameter(torch.zeros(problem.replicates, len(problem.minimum), dtype=DTYPE))
    optimizer = torch.optim.SGD([w], lr=problem.lr)
    for step in range(1, num_steps + 1):
        optimizer.param_groups[0]["lr"] = problem.lr * cosine(step, num_steps)
        problem.set_gradient(w, generator)
        optimizer.step()
    return problem.error(w.detach())


@dataclass(frozen=True)
class Floor:
    """The error of the average with one ``lambd``, and the excess loss of the minimum of the penalised loss."""

    lambd: float
    floor: float
    averaged: float
    averaged_with_alpha: float


def floors(size: Size, seed: int = 3) -> list[Floor]:
    """Run ``ShardedASGD`` on the regression with each lambd, with alpha = 0 and with torch's default of 0.75.

    ``x <- x (1 - lambd eta)`` is the gradient step of ``lambd / 2`` times the square of x, so that the average
    converges to the minimum of the loss with that penalty, whatever n is.
    """
    problem = Regression(size.replicates // len(LAMBDS) // 2)
    generator = torch.Generator().manual_seed(seed)
    cases = [(lambd, alpha) for lambd in LAMBDS for alpha in (0.0, 0.75)]
    params = [torch.nn.Parameter(problem.minimum.repeat(problem.replicates, 1)) for _ in cases]
    groups = [{"params": [w], "lambd": lambd, "alpha": alpha} for w, (lambd, alpha) in zip(params, cases, strict=True)]
    num_forgotten = problem.num_forgotten()
    optimizer = ShardedASGD(groups, lr=problem.lr, t0=num_forgotten)
    for _ in range(num_forgotten + size.regression_steps):
        # All cases at once, each replicate with a batch of its own.
        gradient = problem.gradient(torch.cat([w.detach() for w in params]), generator)
        for w, of_case in zip(params, torch.split(gradient, problem.replicates), strict=True):
            w.grad = of_case
        optimizer.step()
    with optimizer.averaged_parameters():
        errors = {case: problem.error(w.detach()) for case, w in zip(cases, params, strict=True)}
    return [
        Floor(lambd, problem.error(problem.minimum_with(lambd)[None]), errors[lambd, 0.0], errors[lambd, 0.75])
        for lambd in LAMBDS
    ]
