"""How fast are fits of a loss surface? Starts per second, compared with SciPy's L-BFGS-B.

    python experiments/benchmarks/scaling_fit.py --out RESULT.json

Both minimize the same objective, the summed Huber loss of arXiv:2510.02228 with delta = 1e-3, from
the same starts of its grid: ours all at once, SciPy one after the other, with NumPy gradients of
the closed form and the tolerances of the study. The losses are those of published coefficients with
1 % of log-normal noise, at as many points as the study's ladder (35) and all its runs (138) have.
Both alternate in one process, so that other load affects both alike; compilation is timed apart.
Also timed: a bootstrap of 500 resamples.
"""

import dataclasses
import functools
import os
import time
from typing import Any

import numpy as np

from experiments.benchmarks import measure
from xlstm_jax.errors import import_optional
from xlstm_jax.scaling import LossSurface, fit_loss_surface
from xlstm_jax.scaling.surface_fit import AT_BEST, GRID

DELTA = 1e-3
TRUTH = LossSurface(11.9917, 13.3581, 0.01189, 0.52733, 0.50817, 0.29338)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.TimedArguments):
    """`repeats`: timed fits of each kind."""

    repeats: int = 5
    starts: int = 500  # of ours, in each fit
    peer_starts: int = 20  # of SciPy, in each fit: the first of ours
    bootstraps: int = 500  # 0: no bootstrap


def main(args: Arguments) -> int:
    """Times both and writes the result."""
    result = measure.run_info("scaling_fit", (*measure.PACKAGES, "scipy"))
    result |= {"load_before": os.getloadavg(), "cases": []}
    for num_points in (35, 138):
        case = measure_case(num_points, args)
        result["cases"].append(case)
        ours, peer = case["ours"], case["scipy"]
        print(
            f"{num_points} points: {ours['starts_per_second']:.0f} starts/s, of which "
            f"{ours['at_best']:.0%} reach the best; SciPy {peer['starts_per_second']:.2f}, "
            f"{peer['at_best']:.0%}; {case['ratio']:.0f} times"
        )
    if args.bootstraps:
        columns = data(138)
        options: dict[str, Any] = dict(starts=args.starts, bootstraps=args.bootstraps)
        start = time.perf_counter()
        fit_loss_surface(*columns, **options)
        result["bootstrap_seconds"] = time.perf_counter() - start
        print(f"{args.bootstraps} bootstraps: {result['bootstrap_seconds']:.1f} s")
    result["load_after"] = os.getloadavg()
    measure.write(args.out, result)
    return 0


def data(num_points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parameters, tokens and noisy losses of random runs."""
    rng = np.random.default_rng(num_points)
    sizes = 10 ** rng.uniform(8.2, 9.85, num_points)
    tokens = sizes * 10 ** rng.uniform(1.3, 3.0, num_points)
    return sizes, tokens, TRUTH(sizes, tokens) * rng.lognormal(0, 0.01, num_points)


def measure_case(num_points: int, args: Arguments) -> dict[str, Any]:
    """Times of both for a number of points."""
    columns = data(num_points)
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*GRID.values(), indexing="ij"), axis=-1).reshape(-1, len(GRID))
    starts = grid[rng.permutation(len(grid))[: args.starts]]
    fit = functools.partial(fit_loss_surface, *columns, starts=starts, delta=DELTA)
    begin = time.perf_counter()
    ours = fit()
    first = time.perf_counter() - begin
    objectives: list[float] = []

    def peer() -> None:
        objectives[:] = peer_objectives(columns, starts[: args.peer_starts])

    times = measure.interleaved(
        {"ours": lambda n: measure.seconds(fit, n), "scipy": lambda n: measure.seconds(peer, n)},
        args.repeats,
    )
    best = min(ours.objective, *objectives)
    summary = {name: measure.summary(values) for name, values in times.items()}
    summary["ours"] |= {
        "first_seconds": first,  # with compilation
        "starts": args.starts,
        "best_objective": ours.objective,
        "at_best": ours.num_at_best / args.starts,
    }
    summary["scipy"] |= {
        "starts": args.peer_starts,
        "best_objective": min(objectives),
        "at_best": float(np.mean(np.array(objectives) <= (1 + AT_BEST) * best)),
    }
    for values in summary.values():
        values["starts_per_second"] = values["starts"] / values["median_seconds"]
    ratio = summary["ours"]["starts_per_second"] / summary["scipy"]["starts_per_second"]
    return {"num_points": num_points, "ratio": ratio, **summary}


def peer_objectives(columns: Any, starts: np.ndarray) -> list[float]:
    """Objectives where SciPy's L-BFGS-B ends, with the study's tolerances."""
    optimize = import_optional("scipy.optimize", "the comparison", install="scipy")
    log_n, log_d, log_loss = map(np.log, columns)

    def objective(params: np.ndarray) -> tuple[float, np.ndarray]:
        a, b, e, alpha, beta, gamma = params
        size_term, token_term = a - alpha * log_n, b - beta * log_d
        inner = np.logaddexp(size_term, token_term)
        fitted = np.logaddexp(gamma * inner, e)
        residuals = log_loss - fitted
        inside = np.clip(residuals, -DELTA, DELTA)
        share, size_share = np.exp(gamma * inner - fitted), np.exp(size_term - inner)
        by_size = gamma * share * size_share
        by_tokens = gamma * share * (1 - size_share)
        slopes = np.stack(
            [by_size, by_tokens, 1 - share, -by_size * log_n, -by_tokens * log_d, share * inner]
        )
        return float(np.sum(inside * (residuals - inside / 2))), -slopes @ inside

    options = {"ftol": 1e-32, "gtol": 1e-32, "maxls": 200, "maxiter": 15000, "maxfun": 100000}
    with np.errstate(all="ignore"):
        return [
            float(optimize.minimize(objective, x, jac=True, method="L-BFGS-B", options=options).fun)
            for x in starts
        ]


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
