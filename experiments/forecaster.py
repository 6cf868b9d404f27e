"""Can a small xLSTM beat the seasonal naive forecast on series with gaps, well calibrated?

Expected: on new series the pinball loss of the sLSTM is at most 0.8 times that of the seasonal
naive forecast, which knows the period; that of the mLSTM, which has no memory mixing to count
missing patches with, is below it; and the 80 % intervals of both cover 0.75 to 0.85.

    python experiments/forecaster.py --size cpu              # three models, JSON and plot

A series is two harmonics with random phases, a trend, noise and gaps: single values and entire
stretches are missing. A patch of 8 values and their mask is one input; the outputs at a patch are
quantiles of the next one. A forecast of several patches needs no loop: future patches are inputs
without an observed value, and in training such stretches occur anywhere in a series.

Sources: quantile loss, Koenker & Bassett 1978; patches, Nie et al. 2022, arXiv:2211.14730; missing
patches in training, Auer et al. 2025, arXiv:2505.23719, whose code and weights are not used.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import record
from xlstm_jax import compat, cpu
from xlstm_jax.modules import LayerNorm

Array = jax.Array | np.ndarray
PERIOD, PATCH = 24, 8
QUANTILES = tuple(round(0.1 * n, 1) for n in range(1, 10))
CELLS = {"LSTM": compat.LSTM, "sLSTM": compat.SLSTM, "mLSTM": compat.MLSTM}
NAIVE = "seasonal naive"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and numerics of the series and of the training of one model."""

    steps: int
    context: int = 16  # patches
    horizon: int = 3  # patches
    width: int = 64
    num_layers: int = 2
    batch_size: int = 64
    lr: float = 4e-3
    num_test: int = 512

    @property
    def length(self) -> int:
        """Values of a series."""
        return PATCH * (self.context + self.horizon)


SIZES = {
    "smoke": Config(steps=10, context=8, width=16, batch_size=8, num_test=16),
    "cpu": Config(steps=1500),
}


class Series(NamedTuple):
    """Values and which of them were observed; the others are zero."""

    values: np.ndarray  # B T, float32
    observed: np.ndarray  # B T, bool


def config(size: str = "cpu") -> Config:
    """The series and the training at one size, a key of `SIZES`.

    Raises:
        ConfigError: `size` is unknown.
    """
    record.check_size(size, SIZES)
    return SIZES[size]


def draw_series(seed: int, count: int, length: int) -> Series:
    """Seasonal series with trend, noise and gaps; no two seeds share one."""
    rng = np.random.default_rng(seed)
    t = np.arange(length)[None]
    values = rng.normal(0, 1, (count, 1)) + rng.normal(0, 2, (count, 1)) * t / length
    for harmonic, spread in ((1, 1.0), (2, 0.5)):
        size, phase = rng.normal(0, spread, (count, 1)), rng.uniform(0, 1, (count, 1))
        values = values + size * np.sin(2 * np.pi * (harmonic * t / PERIOD + phase))
    noise = rng.uniform(0.05, 0.5, (count, 1)) * rng.standard_normal((count, length))
    values = 10 ** rng.uniform(-1, 2, (count, 1)) * (values + noise)
    observed = rng.uniform(size=(count, length)) > rng.uniform(0, 0.2, (count, 1))
    for _ in range(2):  # gaps
        start, size = rng.integers(0, length, (count, 1)), rng.integers(0, PERIOD, (count, 1))
        observed &= (t < start) | (t >= start + size)
    observed[:, 0] = True  # a series has at least one value
    return Series(np.where(observed, values, 0).astype(np.float32), observed)


def hide(series: Series, cfg: Config, seed: int) -> np.ndarray:
    """What a model sees in training, B T: without the horizon, nor a random stretch of patches."""
    rng, count = np.random.default_rng(seed), len(series.values)
    patch = (np.arange(cfg.length) // PATCH)[None]
    start = rng.integers(1, cfg.context, (count, 1))
    size = rng.integers(0, cfg.horizon + 1, (count, 1))
    hidden = (patch >= cfg.context) | ((patch >= start) & (patch < start + size))
    return series.observed & ~hidden


class Forecaster(nn.Module):
    """Quantiles of the next patch at every patch, in units of the series."""

    cell: str  # of `CELLS`
    width: int
    num_layers: int

    @nn.compact
    def __call__(self, values: jax.Array, visible: jax.Array) -> jax.Array:
        """Of values B T, where `visible`: quantiles B T-PATCH Q of the values from PATCH on."""
        B, T = values.shape
        mean, scale = moments(values, visible)
        scaled = jnp.where(visible, (values - mean) / scale, 0)
        patches = [a.astype(jnp.float32).reshape(B, -1, PATCH) for a in (scaled, visible)]
        x = nn.gelu(nn.Dense(self.width, name="embed")(jnp.concatenate(patches, axis=-1)[:, :-1]))
        for index in range(self.num_layers):  # pre-norm residual blocks
            layer = CELLS[self.cell](self.width, self.width, num_heads=4, name=f"layer_{index}")
            h, _ = layer(LayerNorm(name=f"norm_{index}")(x))
            x = x + nn.Dense(self.width, name=f"out_{index}")(h)
        x = nn.gelu(nn.Dense(2 * self.width, name="hidden")(LayerNorm(name="norm")(x)))
        y = nn.Dense(PATCH * len(QUANTILES), name="quantiles")(x)
        y = y.reshape(B, T - PATCH, len(QUANTILES))
        return mean[..., None] + scale[..., None] * y


def moments(values: Array, visible: Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the visible values, B 1."""
    count = jnp.maximum(visible.sum(axis=1, keepdims=True), 1)
    mean = jnp.where(visible, values, 0).sum(axis=1, keepdims=True) / count
    square = jnp.where(visible, (values - mean) ** 2, 0).sum(axis=1, keepdims=True) / count
    return mean, jnp.sqrt(square) + 1e-3 * jnp.abs(mean) + 1e-6


def pinball(quantiles: Array, values: Array, weights: Array, scale: Array) -> jax.Array:
    """Mean over quantiles and weighted values of the quantile loss, times 2, in units of `scale`.

    For the median alone it is the mean absolute error.
    """
    error = (values[..., None] - quantiles) / scale[..., None]
    q = jnp.asarray(QUANTILES, jnp.float32)[None, None]
    loss = 2 * jnp.maximum(q * error, (q - 1) * error).mean(axis=-1)
    return (weights * loss).sum() / weights.sum()


def train(cfg: Config, cell: str) -> tuple[Any, Any]:
    """Trains one model; returns it with its variables."""
    model: Any = Forecaster(cell, cfg.width, cfg.num_layers)
    schedule = optax.warmup_cosine_decay_schedule(0.0, cfg.lr, cfg.steps // 10, cfg.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    def loss_fn(variables: Any, series: Series, visible: jax.Array) -> jax.Array:
        quantiles = model.apply(variables, series.values, visible)
        _, scale = moments(series.values, visible)
        observed = series.observed[:, PATCH:].astype(jnp.float32)
        return pinball(quantiles, series.values[:, PATCH:], observed, scale)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(variables: Any, opt_state: Any, series: Series, visible: jax.Array):
        loss, grads = jax.value_and_grad(loss_fn)(variables, series, visible)
        updates, opt_state = tx.update(grads, opt_state, variables)
        return optax.apply_updates(variables, updates), opt_state, loss

    first = draw_series(1, cfg.batch_size, cfg.length)
    variables = jax.jit(model.init)(jax.random.key(0), *first)
    opt_state, losses = tx.init(variables), []
    for number in range(cfg.steps):
        series = draw_series(1 + number, cfg.batch_size, cfg.length)
        visible = hide(series, cfg, seed=1 + number)
        variables, opt_state, loss = train_step(variables, opt_state, series, visible)
        losses.append(loss)
        if (number + 1) % max(1, cfg.steps // 5) == 0:
            recent = float(np.mean(losses[-cfg.steps // 5 :]))
            print(f"  {cell:6s} step {number + 1:5d}  pinball loss {recent:.4f}", flush=True)
    return model, variables


def seasonal_naive(series: Series, cfg: Config) -> np.ndarray:
    """Quantiles B H Q: the last observed value of a phase, plus quantiles of past differences."""
    start = PATCH * cfg.context
    seasons = [np.arange(start - PERIOD * k, start - PERIOD * (k - 1)) for k in range(1, 100)]
    seasons = [t for t in seasons if t[0] >= 0]
    last = np.zeros((len(series.values), PERIOD), np.float32)
    for t in reversed(seasons):  # later values replace earlier ones
        last = np.where(series.observed[:, t], series.values[:, t], last)
    before, after = (slice(0, start - PERIOD), slice(PERIOD, start))
    both = series.observed[:, before] & series.observed[:, after]
    difference = np.where(both, series.values[:, after] - series.values[:, before], np.nan)
    spread = np.stack(
        [
            np.nanquantile(d, QUANTILES) if m.any() else np.zeros(len(QUANTILES))
            for d, m in zip(difference, both, strict=True)
        ]
    )
    phase = np.arange(PATCH * cfg.horizon) % PERIOD
    return (last[:, phase, None] + spread[:, None]).astype(np.float32)


def measure(quantiles: np.ndarray, series: Series, cfg: Config) -> dict[str, float]:
    """Pinball loss of the horizon in units of the context's deviation, and interval coverage."""
    start = PATCH * cfg.context
    context = series.observed & (np.arange(cfg.length) < start)[None]
    _, scale = moments(jnp.asarray(series.values), jnp.asarray(context))
    target, observed = series.values[:, start:], series.observed[:, start:]
    loss = pinball(quantiles, target, observed.astype(np.float32), scale)
    inside = (target >= quantiles[..., 0]) & (target <= quantiles[..., -1])
    return {"pinball": round(float(loss), 4), "coverage": round(float(inside[observed].mean()), 4)}


def forecast(model: Any, variables: Any, series: Series, cfg: Config) -> np.ndarray:
    """Quantiles B H Q of the horizon, sorted, from what precedes it."""
    start = PATCH * cfg.context
    visible = series.observed & (np.arange(cfg.length) < start)[None]
    values = np.where(visible, series.values, 0)  # the future is not an input
    quantiles = jax.jit(model.apply)(variables, values, visible)
    return np.sort(np.asarray(quantiles)[:, start - PATCH :], axis=-1)


def outcome(models: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Whether each expectation holds."""
    losses = {name: model["pinball"] for name, model in models.items()}
    coverage = [models[name]["coverage"] for name in ("sLSTM", "mLSTM")]
    return {
        "the pinball loss of the sLSTM is at most 0.8 times that of the seasonal naive forecast": (
            losses["sLSTM"] <= 0.8 * losses[NAIVE]
        ),
        "that of the mLSTM is below it": losses["mLSTM"] < losses[NAIVE],
        "80 % intervals of both cover 0.75 to 0.85": 0.75 <= min(coverage) <= max(coverage) <= 0.85,
    }


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Forecasts of three test series: gaps, median and the 80 % interval."""
    plt = record.pyplot()
    examples = result["examples"]
    figure, axes = plt.subplots(len(examples), 1, figsize=(7, 6), layout="constrained")
    for axis, example in zip(axes, examples, strict=True):
        values = np.array(example["values"], float)  # None, where missing, becomes NaN
        future = np.arange(example["start"], len(values))
        axis.plot(values, color="0.4", lw=1)
        for n, (name, bands) in enumerate(example["quantiles"].items()):
            low, median, high = np.array(bands)
            axis.plot(future, median, color=f"C{n}", label=name)
            axis.fill_between(future, low, high, color=f"C{n}", alpha=0.2, lw=0)
        axis.axvline(example["start"], color="0.7", lw=0.8, ls=":")
    axes[0].set_title("Median and 80 % interval of three series with gaps")
    axes[0].legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def describe(index: int, series: Series, forecasts: dict[str, np.ndarray], start: int) -> dict:
    """One series and its forecasts, for the plot."""
    values = zip(series.values[index].round(4).tolist(), series.observed[index], strict=True)
    middle = len(QUANTILES) // 2
    return {
        "start": start,
        "values": [value if observed else None for value, observed in values],
        "quantiles": {
            name: forecasts[name][index][:, [0, middle, -1]].T.round(4).tolist()
            for name in ("sLSTM", NAIVE)
        },
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains all models and writes one JSON file and one plot."""

    size: Literal["smoke", "cpu"] = "cpu"
    out: pathlib.Path = record.RESULTS / "forecaster.json"  # the plot is next to it


def main(options: Options) -> int:
    """Runs the experiment; returns 0 if all expectations hold (smoke: always), else 1."""
    cpu.prepare()
    cfg = config(options.size)
    result = record.start("forecaster", options.size)
    test = draw_series(0, cfg.num_test, cfg.length)
    forecasts = {NAIVE: seasonal_naive(test, cfg)}
    models: dict[str, dict[str, Any]] = {NAIVE: measure(forecasts[NAIVE], test, cfg)}
    for name in CELLS:
        start = time.perf_counter()
        model, variables = train(cfg, name)
        forecasts[name] = forecast(model, variables, test, cfg)
        models[name] = measure(forecasts[name], test, cfg) | {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables)),
            "seconds": round(time.perf_counter() - start, 1),
        }
    print(f"{'':16s}pinball loss  coverage of the 80 % interval")
    for name, model in models.items():
        print(f"{name:16s}{model['pinball']:12.4f}  {model['coverage']:.3f}")
    result |= {
        "config": dataclasses.asdict(cfg),
        "seconds": round(sum(model.get("seconds", 0) for model in models.values()), 1),
        "models": models,
        "outcome": outcome(models),
        "examples": [describe(k, test, forecasts, PATCH * cfg.context) for k in range(3)],
    }
    return record.save(result, options.out, plot)


if __name__ == "__main__":
    record.run(main, Options, __doc__)
