"""The problems of ``average_experiments.py``, a noisy quadratic and logistic regression, and what is expected of SGD.

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
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

DTYPE = torch.float64


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
