"""The parametric loss L(N, D) = E + (A N^-alpha + B D^-beta)^gamma, and its optima.

Sources: arXiv:2203.15556 (approach 3, gamma = 1), arXiv:2510.02228 (free gamma).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from xlstm_jax.errors import ArgumentError
from xlstm_jax.scaling.checks import Column, points
from xlstm_jax.scaling.parabolas import fit_isoflop
from xlstm_jax.typing import Float

COEFFICIENTS = ("a", "b", "e", "alpha", "beta", "gamma")
"""Of a surface, in the order of its samples."""

FlopsPerToken = Callable[[np.ndarray], np.ndarray]
"""Number of parameters -> FLOPs of training with one token, for arrays."""


class Optimum(NamedTuple):
    """The best use of a compute budget."""

    num_params: float
    tokens: float
    loss: float


class GridOptimum(NamedTuple):
    """The best architecture of a grid at a compute budget."""

    architecture: int  # its index
    num_params: float
    tokens: float
    loss: float


class LossSurface(NamedTuple):
    """ln L = lse(gamma * lse(a - alpha ln N, b - beta ln D), e); lse: log of a sum of two exps."""

    a: float
    b: float
    e: float
    alpha: float
    beta: float
    gamma: float
    objective: float = np.nan  # sum of Huber losses
    gradient_norm: float = np.nan  # largest component, where the best start ended
    num_starts: int = 0
    num_at_best: int = 0  # starts that ended at the best objective
    num_points: int = 0
    num_dropped: int = 0  # points with a NaN
    delta: float = np.nan
    samples: Float[np.ndarray, "bootstraps 6"] = np.zeros((0, 6))

    def __call__(self, num_params, tokens):
        """The loss in nats per token, for numbers or arrays that broadcast."""
        log_n, log_d = (np.log(np.asarray(x, np.float64)) for x in (num_params, tokens))
        inner = np.logaddexp(self.a - self.alpha * log_n, self.b - self.beta * log_d)
        return np.exp(np.logaddexp(self.gamma * inner, self.e))

    @property
    def size_exponent(self) -> float:
        """Exponent of the optimal number of parameters in the FLOPs, if these are 6 N D."""
        return self.beta / (self.alpha + self.beta)

    def optimum(self, flops: float, *, flops_per_token: FlopsPerToken | None = None) -> Optimum:
        """The minimum of the loss along a line of constant FLOPs.

        Args:
            flops_per_token: exact counts; the minimum is then searched numerically, between 1e3
                and 1e15 parameters. None: 6 N, with a closed form that does not depend on gamma.

        Raises:
            ArgumentError: `flops` is not positive, or the loss has no minimum along that line.
        """
        if not (flops > 0 and self.alpha > 0 and self.beta > 0 and self.gamma > 0):
            raise ArgumentError(
                "flops and the exponents alpha, beta and gamma must be positive, got "
                f"flops={flops:.4g}, alpha={self.alpha:.4g}, beta={self.beta:.4g}, "
                f"gamma={self.gamma:.4g}; fit the surface to runs that vary size and tokens."
            )
        if flops_per_token is not None:
            return self._numeric_optimum(flops, flops_per_token)
        log_ratio = np.log(self.alpha / self.beta) + self.a - self.b
        log_n = (log_ratio + self.beta * np.log(flops / 6)) / (self.alpha + self.beta)
        num_params = float(np.exp(log_n))
        tokens = flops / (6 * num_params)
        return Optimum(num_params, tokens, float(self(num_params, tokens)))

    def _numeric_optimum(self, flops: float, flops_per_token: FlopsPerToken) -> Optimum:
        low, high = np.log(1e3), np.log(1e15)
        for _ in range(12):  # each search is 100 times finer than the last
            log_sizes = np.linspace(low, high, 101)
            # The loss itself is too flat at its minimum to locate it to 1e-8; its slope is not.
            is_beyond = self._slope(np.exp(log_sizes), flops, flops_per_token) > 0
            after = int(np.clip(np.argmax(is_beyond), 1, 100)) if is_beyond.any() else 100
            low, high = log_sizes[[after - 1, after]]
        num_params = np.exp(np.array([low]))
        tokens = flops / flops_per_token(num_params)
        loss = self(num_params, tokens)
        return Optimum(float(num_params[0]), float(tokens[0]), float(loss[0]))

    def _slope(self, num_params, flops: float, flops_per_token: FlopsPerToken):
        """dL / d ln N along constant FLOPs, times a positive number."""
        tokens = flops / flops_per_token(num_params)
        step = 1e-5
        higher, lower = (flops_per_token(num_params * np.exp(s)) for s in (step, -step))
        elasticity = np.log(higher / lower) / (2 * step)  # -d ln D / d ln N
        size_term = np.exp(self.a - self.alpha * np.log(num_params))
        token_term = np.exp(self.b - self.beta * np.log(tokens))
        return self.beta * token_term * elasticity - self.alpha * size_term

    def best_of(self, flops: float, num_params: Column, flops_per_token: Column) -> GridOptimum:
        """The architecture with the lowest loss at a budget, by its exact FLOPs.

        Args:
            num_params: of each architecture.
            flops_per_token: of training, of each architecture.
        """
        columns = {"num_params": num_params, "flops_per_token": flops_per_token}
        (sizes, costs), _ = points(1, **columns)
        tokens = flops / costs
        losses = self(sizes, tokens)
        best = int(np.argmin(losses))
        return GridOptimum(best, float(sizes[best]), float(tokens[best]), float(losses[best]))

    def resampled(self) -> list["LossSurface"]:
        """The surfaces of the bootstrap."""
        return [
            self._replace(**dict(zip(COEFFICIENTS, sample.tolist(), strict=True)))
            for sample in self.samples
        ]


def parabola_bias(surface: LossSurface, num_params: Column, tokens: Column) -> float:
    """log10 of the parabola's optimum over the true one, if the losses were those of the surface.

    The parabola is a Taylor expansion: it is biased where the sampled sizes are wide or off center,
    even without noise (arXiv:2603.22339). The points are the runs of one budget.

    Raises:
        ArgumentError: as `fit_isoflop`, or the surface has no minimum.
    """
    (num_params, tokens), _ = points(3, num_params=num_params, tokens=tokens)
    parabola = fit_isoflop(num_params, surface(num_params, tokens))
    # The line of constant FLOPs that the runs follow, between and beyond their sizes.
    slope, level = np.polyfit(np.log(num_params), np.log(tokens), 1)
    true = surface.optimum(1.0, flops_per_token=lambda n: np.exp(-level - slope * np.log(n)))
    return float(np.log10(parabola.x_opt / true.num_params))
