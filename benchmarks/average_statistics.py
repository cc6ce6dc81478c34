"""What averaging does to the error of SGD: a noisy quadratic and logistic regression, beside exact expectations.

Vocabulary
    iterate      the parameters after a step; ``n`` of them are in the average
    replicate    one of ``R`` independent runs, all of which are rows of one parameter
    error        the mean over replicates of the excess loss, that is the loss less its minimum
    slope        of the line of least squares through log(error) over log(n)

**The model of SGD.** In the eigenbasis of the Hessian, with eigenvalues a and learning rate eta, one coordinate of the
distance from the minimum is ``x <- rho x - eta xi``, ``rho = 1 - eta a``, with gradient noise ``xi`` of variance
``s2``. Once the start is forgotten its variance is ``v = eta^2 s2 / (1 - rho^2)``, for each iterate: the error of the
last one stays where it is, and its slope is 0. The mean of n iterates has the variance

    v / n * ((1 + rho) / (1 - rho) - 2 rho (1 - rho^n) / (n (1 - rho)^2))

which is ``s2 / (a^2 n)`` for large n: the slope of the averaged error is -1, for any learning rate (Polyak & Juditsky
1992). If the learning rate is ``eta_t``, ``v <- (1 - eta_t a)^2 v + eta_t^2 s2``. With a cosine that ends at 0 and k
steps to go it is about ``eta (pi k / 2T)^2``; noise of the last ``T^(2/3)`` steps is not forgotten, and so the last
iterate's error falls like ``T^(-2/3)``. On the quadratic all of this is exact. The expected errors have these
variances, and the expected slope is theirs.

**The bound of the slope.** The slope is ``sum_k c_k log(error_k)``, with ``c_k = (u_k - mean u) / sum_k (u_k - mean
u)^2`` and ``u_k = log n_k``. The error of one replicate is a quadratic form of a Gaussian vector (that of the quadratic
is Gaussian because its noise is, that of the regression by the central limit theorem) whose relative variance is
``2 tr(M^2) / tr(M)^2``, with M the covariance of the coordinates, each times the root of its eigenvalue. So
``log(error_k)`` has, over R replicates, a standard deviation of about ``d = sqrt(2 tr(M^2) / (R tr(M)^2))``. Errors at
several n are dependent, but by Minkowski's inequality the standard deviation of the slope is at most ``d sum_k |c_k|``
all the same. The bound is four times that. The bias of a logarithm, ``-d^2 / 2``, is the same at each n and drops out.

**The regression** is no quadratic: its average converges to a point beside the minimum (Dieuleveut, Durmus & Bach
2020), at ``b = -H^-1 f'''[V] / 2`` with V the covariance of the iterates, of which eta / 2 times the noise's is the
leading term. The expected error therefore has ``b^T H b / 2`` on top, which does not fall. That expansion ends after
its first order in eta, and so as much as that term is allowed as its error: ``sum_k |c_k| bias / error_k`` is added to
the bound. Other terms of that order change all errors by the same factor, and no slope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dist_asgd import ShardedASGD, ShardedAverage

DTYPE = torch.float64
NUM_SIGMAS = 4.0
# The slopes that the laws above have for large n.
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
        """How far the measured slope may lie from the expected one; the derivation stands at the top of this file."""
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


def variance_of_mean(rho: Tensor, v: Tensor, n: int) -> Tensor:
    """The variance of the mean of ``n`` iterates in each coordinate; ``rho`` and ``v`` are those of the model above."""
    return v / n * ((1 + rho) / (1 - rho) - 2 * rho * (1 - rho**n) / (n * (1 - rho) ** 2))


def spread_of(moments: Tensor, replicates: int) -> float:
    """The relative standard deviation of an error; ``moments`` is M of the derivation, or its diagonal."""
    matrix = moments if moments.dim() == 2 else torch.diag(moments)
    return math.sqrt(2 * float((matrix**2).sum()) / (replicates * float(torch.trace(matrix)) ** 2))


class Problem(Protocol):
    """Something whose excess loss at the rows of a parameter is known."""

    def error(self, x: Tensor, /) -> float:
        """The mean excess loss over the replicates ``x``."""
        ...


def error_of_average(problem: Problem, optimizer: ShardedASGD | ShardedAverage, x: torch.nn.Parameter) -> float:
    """The error of the average of ``x``."""
    with optimizer.averaged_parameters():
        return problem.error(x.detach())


# --- the noisy quadratic -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quadratic:
    """The loss ``sum_j a_j (x_j - x*)^2 / 2`` with gradient noise of variance 1; ``curvatures`` are the ``a``."""

    replicates: int
    lr: float = 0.5
    optimum: float = 0.0

    @property
    def curvatures(self) -> Tensor:
        """Sixteen, from 0.2 to 1."""
        return torch.logspace(math.log10(0.2), 0, 16, dtype=DTYPE)

    @property
    def rho(self) -> Tensor:
        """What is left of a distance after one step."""
        return 1 - self.lr * self.curvatures

    @property
    def variance(self) -> Tensor:
        """The variance of an iterate in each coordinate, once the start is forgotten."""
        return self.lr**2 / (1 - self.rho**2)

    def error(self, x: Tensor) -> float:
        """The mean excess loss over the replicates ``x`` ``(R, 16)``."""
        return float((self.curvatures * (x - self.optimum) ** 2 / 2).sum(-1).mean())

    def expected(self, variance: Tensor) -> float:
        """The expected error of a point that has this variance in each coordinate."""
        return float((self.curvatures * variance / 2).sum())

    def spread(self, variance: Tensor) -> float:
        """The relative standard deviation of the error of such a point."""
        return spread_of(self.curvatures * variance, self.replicates)

    def start(self, generator: torch.Generator) -> torch.nn.Parameter:
        """Replicates whose start is forgotten: each is drawn from the distribution of the iterates."""
        noise = torch.randn(self.replicates, len(self.rho), generator=generator, dtype=DTYPE)
        return torch.nn.Parameter(self.optimum + noise * self.variance.sqrt())

    def set_gradient(self, x: torch.nn.Parameter, generator: torch.Generator) -> None:
        """Give ``x`` a noisy gradient."""
        noise = torch.randn(x.shape, generator=generator, dtype=DTYPE)
        x.grad = self.curvatures * (x.detach() - self.optimum) + noise


def cosine(step: int, num_steps: int) -> float:
    """The factor of the learning rate in step 1, 2, ..., ``num_steps``: 1 at first, and 0 after the last one."""
    return 0.5 * (1 + math.cos(math.pi * (step - 1) / num_steps))


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


# --- logistic regression -------------------------------------------------------------------------------------------


class Regression:
    """Logistic regression on the elevation model of the Jacksboro fault, which matplotlib ships as sample data.

    The label of a cell is whether it lies above the median elevation, and its features are the products of Legendre
    polynomials of its two coordinates up to degree 2. Of the 344 x 403 cells each fourth in both directions is taken.
    """

    lr = 0.125
    batch = 64

    def __init__(self, replicates: int) -> None:
        from matplotlib import cbook

        self.replicates = replicates
        sample: Any = cbook.get_sample_data("jacksboro_fault_dem.npz")
        elevation = np.asarray(sample["elevation"], dtype=float)[::4, ::4]
        self.features = torch.from_numpy(
            _polynomials(elevation.shape[0], elevation.shape[1], degree=2)
        )  # (cells, features)
        self.labels = torch.from_numpy((elevation.ravel() > np.median(elevation)).astype(float))  # (cells,)
        self.minimum = self.minimum_with(0.0)
        self.least = float(self.losses(self.minimum[None])[0])

    def minimum_with(self, penalty: float) -> Tensor:
        """The minimum ``(features,)`` of the loss with ``penalty / 2`` times the square of w, by Newton's method."""
        w = torch.zeros(self.features.shape[1], dtype=DTYPE)
        for _ in range(20):
            hessian = self._hessian(w) + penalty * torch.eye(len(w), dtype=DTYPE)
            w = w - torch.linalg.solve(hessian, self._gradients(w).mean(0) + penalty * w)
        return w

    def losses(self, w: Tensor) -> Tensor:
        """The mean loss over all cells of each row of ``w`` ``(R, features)``: ``(R,)``."""
        logits = w @ self.features.T
        return (torch.nn.functional.softplus(logits) - logits * self.labels).mean(-1)

    def error(self, w: Tensor) -> float:
        """The mean excess loss over the replicates."""
        return float(self.losses(w).mean()) - self.least

    def set_gradient(self, w: torch.nn.Parameter, generator: torch.Generator) -> None:
        """Give each replicate, a row of ``w``, the gradient of a batch of its own, drawn with replacement."""
        w.grad = self.gradient(w.detach(), generator)

    def gradient(self, w: Tensor, generator: torch.Generator) -> Tensor:
        """The gradients of such batches at the rows of ``w`` ``(R, features)``."""
        cells = torch.randint(len(self.labels), (len(w), self.batch), generator=generator)
        features = self.features[cells]  # (R, batch, features)
        residuals = torch.sigmoid(torch.einsum("rbf,rf->rb", features, w)) - self.labels[cells]
        return torch.einsum("rbf,rb->rf", features, residuals) / self.batch

    def _gradients(self, w: Tensor) -> Tensor:
        """The gradient of each cell's loss at ``w``: ``(cells, features)``."""
        return self.features * (torch.sigmoid(self.features @ w) - self.labels)[:, None]

    def _hessian(self, w: Tensor) -> Tensor:
        p = torch.sigmoid(self.features @ w)
        return (self.features * (p * (1 - p))[:, None]).T @ self.features / len(self.labels)

    def num_forgotten(self) -> int:
        """The number of steps after which no more than exp(-4) of the start is left in any coordinate."""
        return math.ceil(4 / (self.lr * float(torch.linalg.eigvalsh(self._hessian(self.minimum)).min())))

    def model(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """The eigenvalues a ``(features,)``, variances v ``(features,)``, M up to a factor, and the bias of the error.

        v is the variance of iterates in the eigenbasis; M is that of the average for large n.
        """
        a, basis = torch.linalg.eigh(self._hessian(self.minimum))
        gradients = self._gradients(self.minimum) @ basis
        noise = gradients.T @ gradients / len(gradients) / self.batch
        rho = 1 - self.lr * a
        covariance = self.lr**2 * noise / (1 - rho[:, None] * rho[None, :])
        p = torch.sigmoid(self.features @ self.minimum)
        third = p * (1 - p) * (1 - 2 * p)
        rotated = self.features @ basis
        curved = torch.einsum("nf,fg,ng->n", rotated, covariance, rotated) * third
        shift = -(rotated * curved[:, None]).mean(0) / a / 2
        moments = noise / (a[:, None] * a[None, :]).sqrt()
        return a, covariance.diagonal(), moments, float((a * shift**2).sum() / 2)


def _polynomials(rows: int, columns: int, degree: int) -> Any:
    """Products of normalised Legendre polynomials over a grid, ``(rows * columns, features)``."""

    def along(count: int) -> Any:
        values = np.polynomial.legendre.legvander(np.linspace(-1, 1, count), degree)
        return values * np.sqrt(2 * np.arange(degree + 1) + 1)

    down, across = along(rows), along(columns)
    pairs = [(i, j) for i in range(degree + 1) for j in range(degree + 1 - i)]
    return np.stack([np.outer(down[:, i], across[:, j]).ravel() for i, j in pairs], axis=1)


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
