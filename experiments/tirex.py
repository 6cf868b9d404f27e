"""Does a state that reads a series patch by patch forecast like the model that reads it at once?

Expected: quantiles of TiRex-2 after a streamed series differ by at most 1e-4 of their range from
those of one call; and an appended patch takes at most half of the time of a forecast that reads
the context again.

    python experiments/tirex.py --weights FOLDER                    # or hf://ORG/NAME
    python experiments/tirex.py --weights FOLDER --series FILE.csv --future COLUMN
    python experiments/tirex.py                                     # random weights, offline

A CSV file has one line per time step and a header; empty cells are missing values. Columns are
targets, apart from those that `--past` and `--future` name; a column that is not of numbers, such
as a date, is ignored. Covariates with a known future also have values on the lines after the last
target. Without `--series` a synthetic one is used; without `--weights` forecasts mean nothing.

Source: Podest et al. 2026, arXiv:2607.01204.
"""

import csv
import dataclasses
import functools
import pathlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import forecaster, record
from experiments.benchmarks import measure
from xlstm_jax import convert, cpu
from xlstm_jax.errors import ConfigError, quote_path
from xlstm_jax.modules import tirex

SIZES = {
    "smoke": tirex.TiRexConfig(
        dim=32,
        blocks=tirex.TiRexConfig().blocks[:2],
        patch_size=8,
        context_len=64,
        future_len=16,
        embed_dim=32,
        head_dim=32,
    ),
    "cpu": tirex.TiRexConfig(),  # the published sizes
}
MAX_DIFFERENCE, MAX_COST = 1e-4, 0.5
SHOWN = 200  # values of a context in the plot


class Series(NamedTuple):
    """One series, NaN where a value is missing; float32."""

    name: str
    targets: np.ndarray  # variates, values
    past: np.ndarray | None = None
    future: np.ndarray | None = None  # longer than the targets


def config(size: str = "cpu") -> tirex.TiRexConfig:
    """The model of random weights at one size, a key of `SIZES`.

    Raises:
        ConfigError: `size` is unknown.
    """
    record.check_size(size, SIZES)
    return SIZES[size]


def synthetic(cfg: tirex.TiRexConfig) -> Series:
    """A seasonal series with gaps, as long as the context."""
    values, observed = forecaster.draw_series(0, 1, cfg.context_len)
    return Series("synthetic", np.where(observed, values, np.nan).astype(np.float32))


def read_series(path: pathlib.Path, past: tuple[str, ...], future: tuple[str, ...]) -> Series:
    """The series in a CSV file.

    Raises:
        ConfigError: a column does not exist or is not of numbers, or no target does.
    """
    columns = read_columns(path)
    for name in (*past, *future):
        if name not in columns:
            raise ConfigError(
                f"{name!r} must be a column of numbers in {quote_path(path)}, which has "
                f"{', '.join(columns)}; correct --past or --future."
            )
    targets = {n: x for n, x in columns.items() if n not in (*past, *future)}
    is_present = np.array([~np.isnan(x) for x in targets.values()])
    if not is_present.any():
        raise ConfigError(f"{quote_path(path)} must have a column of targets; add one.")
    length = np.nonzero(is_present.any(axis=0))[0][-1] + 1

    def stack(names: Any, stop: int | None) -> np.ndarray | None:
        return np.stack([columns[name][:stop] for name in names]) if names else None

    context = stack(targets, length)
    assert context is not None
    return Series(path.name, context, stack(past, length), stack(future, None))


def read_columns(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The columns of a CSV file that are of numbers, by name."""
    try:
        with path.open(newline="") as file:
            header, *lines = list(csv.reader(file))
    except (OSError, ValueError) as error:  # an empty file has no header
        raise ConfigError(
            f"{quote_path(path)} must be a CSV file with a header ({error}); correct the path."
        ) from error
    columns = {}
    for index, name in enumerate(header):
        cells = [line[index].strip() if index < len(line) else "" for line in lines]
        try:
            columns[name] = np.array([float(cell or "nan") for cell in cells], np.float32)
        except ValueError:
            print(f"column {name!r} of {path.name} is ignored, as it is not of numbers")
    return columns


def load(options: "Options") -> tuple[tirex.TiRexConfig, Any]:
    """Config and parameters: those of `--weights`, or random ones."""
    if options.weights:
        return convert.load_tirex(options.weights)
    print("random weights: forecasts mean nothing; pass --weights for those of TiRex-2")
    cfg = config(options.size)
    return cfg, jax.jit(functools.partial(tirex.init_params, cfg))(jax.random.key(0))


def stream(cfg: tirex.TiRexConfig, params: Any, series: Series, horizon: int) -> dict[str, Any]:
    """A forecast after half of the context and a stream of the other half, and what it costs."""
    T, P = series.targets.shape[1], cfg.patch_size
    split = T - T // 2 // P * P

    def part(values: np.ndarray | None, start: int, stop: int) -> Any:
        return None if values is None else values[:, start:stop]

    def append(state: Any, start: int, stop: int) -> Any:
        past = part(series.past, start, stop)
        return tirex.append(cfg, params, state, part(series.targets, start, stop), past=past)

    first = tirex.start(
        cfg, params, part(series.targets, 0, split), past=part(series.past, 0, split)
    )
    state = first
    for start in range(split, T, P):
        state = append(state, start, start + P)
    at_once = append(first, split, T) if split < T else first
    streamed, expected = (
        np.asarray(tirex.predict(cfg, params, s, horizon)) for s in (state, at_once)
    )
    calls = {
        "patch": functools.partial(append, first, split, split + P),
        "forecast": functools.partial(
            tirex.forecast, cfg, params, series.targets, horizon, past=series.past
        ),
    }
    if split == T:  # not even one patch is streamed
        calls = {}
    return {
        "patches": (T - split) // P,
        "difference": float(np.abs(streamed - expected).max() / np.ptp(expected)),
        "seconds": {name: min(measure.seconds(call, 5)) for name, call in calls.items()},
    }


def show(cfg: tirex.TiRexConfig, quantiles: np.ndarray) -> None:
    """Prints quantiles of the first target at a few steps."""
    steps = sorted({1, max(1, quantiles.shape[2] // 2), quantiles.shape[2]})
    print("  step " + "".join(f"{level:>10.2f}" for level in cfg.quantiles))
    for step in steps:
        print(f"  {step:4d} " + "".join(f"{value:10.4g}" for value in quantiles[0, :, step - 1]))


def describe_stream(result: dict[str, Any]) -> str:
    """One line on what `stream` returned."""
    times = [f"{1e3 * time:.1f} ms per {name}" for name, time in result["seconds"].items()]
    difference = f"difference from one call {result['difference']:.1e} of the range"
    return ", ".join([f"  streamed {result['patches']} patches: {difference}", *times])


def outcome(streams: list[dict[str, Any]]) -> dict[str, bool]:
    """Whether each expectation holds; none without a stream."""
    times = [s["seconds"] for s in streams if s["seconds"]]
    if not times:
        return {}
    return {
        f"streamed quantiles differ by at most {MAX_DIFFERENCE} of their range": all(
            s["difference"] <= MAX_DIFFERENCE for s in streams
        ),
        f"a patch takes at most {MAX_COST} of the time of a forecast from the context": all(
            t["patch"] <= MAX_COST * t["forecast"] for t in times
        ),
    }


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """The end of each context, and median and outer quantiles of the first target."""
    plt = record.pyplot()
    examples = result["examples"]
    figure, axes = plt.subplots(
        len(examples), 1, figsize=(7, 2 + 2 * len(examples)), layout="constrained", squeeze=False
    )
    for axis, example in zip(axes[:, 0], examples, strict=True):
        context = np.array(example["context"], float)  # None, where missing, becomes NaN
        low, median, high = np.array(example["quantiles"])
        future = len(context) + np.arange(len(median))
        axis.plot(context, color="0.4", lw=1)
        axis.plot(future, median, color="C0", label="median")
        axis.fill_between(future, low, high, color="C0", alpha=0.2, lw=0)
        axis.set_title(f"{example['name']}, {result['weights']} weights")
        axis.set_xlabel("time step")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def describe(series: Series, quantiles: np.ndarray) -> dict[str, Any]:
    """One forecast, for the plot."""
    context = series.targets[0, -SHOWN:].round(4)
    middle = quantiles.shape[1] // 2
    return {
        "name": series.name,
        "context": [None if np.isnan(value) else float(value) for value in context],
        "quantiles": quantiles[0, [0, middle, -1]].round(4).tolist(),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Forecasts series, streams them, and writes one JSON file and one plot."""

    weights: str | None = None  # a folder, or hf://ORG/NAME[@REVISION]; None: random ones
    series: tuple[pathlib.Path, ...] = ()  # CSV files; none: a synthetic series
    past: tuple[str, ...] = ()  # columns that are covariates with an unknown future
    future: tuple[str, ...] = ()  # columns that are covariates with a known future
    horizon: int | None = None  # steps; None: two patches
    size: Literal["smoke", "cpu"] = "cpu"  # of random weights
    out: pathlib.Path = record.RESULTS / "tirex.json"  # the plot is next to it


def main(options: Options) -> int:
    """Runs the experiment; returns 0 if all expectations hold (smoke: always), else 1."""
    cpu.prepare()
    cfg, params = load(options)
    horizon = options.horizon or min(2 * cfg.patch_size, cfg.future_len)
    result = record.start("tirex", options.size)
    files = [read_series(path, options.past, options.future) for path in options.series]
    streams, examples = [], []
    for series in files or [synthetic(cfg)]:
        covariates = {"past": series.past, "future": series.future}
        quantiles = tirex.forecast(cfg, params, jnp.asarray(series.targets), horizon, **covariates)
        print(f"{series.name}: {series.targets.shape[1]} values, horizon {horizon}")
        show(cfg, np.asarray(quantiles))
        examples.append(describe(series, np.asarray(quantiles)))
        if series.future is not None:
            print("  not streamed: covariates with a known future are read backward")
            continue
        streams.append(stream(cfg, params, series, horizon))
        print(describe_stream(streams[-1]))
    result |= {
        "weights": options.weights or "random",
        "config": dataclasses.asdict(cfg),
        "streams": streams,
        "outcome": outcome(streams),
        "examples": examples,
    }
    return record.save(result, options.out, plot)


if __name__ == "__main__":
    record.run(main, Options, __doc__)
