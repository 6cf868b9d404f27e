"""How does the perplexity of xLSTM fall with the size of the model, compared with Llama's?

The paper trains 125M to 2.7B parameters on 15B tokens and 125M to 1.3B on 300B tokens. The answer
is a line per family, ln perplexity = c - s ln N. Its published perplexities after 300B tokens give
s = 0.2376 (Llama) and 0.2289 (xLSTM[1:0]); at every size xLSTM is below Llama.

Expected at the size cpu, with small models on the built-in text at equal steps: the slope of both
families is positive, so that larger models are better; the fits of the published values have the
slopes above. Which small family is ahead is reported, not expected.

    python experiments/ladder.py --size cpu
    python experiments/ladder.py --size paper --tokens 15b --data PREPARED
    xlstm-jax train experiments/ladder.py --size "paper:xlstm_1:0_1.3b_300b" --data.source PREPARED

A name of a run is FAMILY_SIZE_TOKENS. Batches have 256 sequences of 2048 tokens; with 300B tokens,
512 from 1.3b on.

Source: Beck et al. 2024, arXiv:2405.04517, table 3, figures 6 and 8, table of sizes. Sizes: smoke
(seconds), cpu (minutes), paper (published).
"""

import dataclasses
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments import language_models, record
from experiments.language_models import FAMILIES, LABELS, Tokens
from xlstm_jax import cpu, flops
from xlstm_jax.train import ExperimentConfig

PERPLEXITY = {
    "rwkv4": (16.66, 12.62, 10.55, 9.83),
    "llama": (15.89, 12.19, 10.60, 9.44),
    "mamba": (15.08, 11.64, 10.24, 9.14),
    "xlstm_1:0": (14.63, 11.31, 9.86, 8.89),
    "xlstm_7:1": (14.60, 11.37, 9.91, 9.00),
}
"""Family -> published validation perplexity after 300B tokens, from 125m to 1.3b."""

SLOPES = {"llama": 0.2376, "xlstm_1:0": 0.2289}
"""Family -> s of a fit to these values with the exact numbers of parameters."""

UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
SMALL_FAMILIES = ("llama", "xlstm_1:0")
WIDTHS = {"smoke": (16, 32), "cpu": (32, 48, 64, 96)}
SEEDS, RATES = (0, 1), (3e-3, 1e-2)
RESULTS = pathlib.Path(__file__).parent / "results"


class Line(NamedTuple):
    """ln perplexity = intercept - slope * ln N."""

    slope: float
    intercept: float


def fit_line(parameters: list[int], perplexities: list[float]) -> Line:
    """Least squares in log-log."""
    slope, intercept = np.polyfit(np.log(parameters), np.log(perplexities), 1)
    return Line(-float(slope), float(intercept))


def published_line(family: str) -> Line:
    """The fit to the published perplexities after 300B tokens."""
    sizes = language_models.SIZES[: len(PERPLEXITY[family])]
    presets = (language_models.published_preset(family, size) for size in sizes)
    return fit_line([flops.count_params(cfg) for cfg in presets], list(PERPLEXITY[family]))


def runs_of(tokens: Tokens) -> list[str]:
    """Names of the runs of a study: FAMILY_SIZE_TOKENS."""
    rates = language_models.RATES
    return [
        f"{family}_{size}_{tokens}"
        for family in FAMILIES
        for size in language_models.SIZES[: len(rates[family][tokens])]
    ]


def config(size: str = "cpu", run: str = "") -> ExperimentConfig:
    """A run of the ladder; `size` may be SIZE:RUN.

    Args:
        run: of the size paper, a name of `runs_of`, by default the smallest xLSTM[1:0]; otherwise
            FAMILY_WIDTH, by default the narrowest of xLSTM[1:0].

    Raises:
        ConfigError: the size or the run is unknown.
    """
    kind = size.partition(":")[0]
    names = [*runs_of("15b"), *runs_of("300b")]
    default = "xlstm_1:0_125m_15b"
    if kind in WIDTHS:
        names = [f"{family}_{width}" for family in SMALL_FAMILIES for width in WIDTHS[kind]]
        default = f"xlstm_1:0_{WIDTHS[kind][0]}"
    kind, run = language_models.parse_size(size, (*WIDTHS, "paper"), names, run or default)
    if kind == "paper":
        family, model_size, tokens = run.rsplit("_", 2)
        study: Tokens = "15b" if tokens == "15b" else "300b"
        lr = language_models.RATES[family][study][language_models.SIZES.index(model_size)]
        model = language_models.published_preset(family, model_size)
        return language_models.published(f"ladder_{run}", model, lr, study)
    family, width = run.rsplit("_", 1)
    model = language_models.small_model(family, int(width), blocks=8 if kind == "cpu" else 2)
    train = dataclasses.replace(language_models.SMALL_TRAIN, lr=RATES[0])
    data = language_models.SMALL_DATA
    if kind == "smoke":
        train = dataclasses.replace(train, steps=4, log_every=2, eval_every=2)
        data = language_models.SMOKE_DATA
    return ExperimentConfig(name=f"ladder_{run}", model=model, data=data, train=train)


def small_runs(size: str, seeds: tuple[int, ...]) -> dict[str, list[dict[str, Any]]]:
    """Trains both families at all widths; family -> a record per width."""
    records: dict[str, list[dict[str, Any]]] = {}
    for family in SMALL_FAMILIES:
        for width in WIDTHS[size]:
            cfg = config(size, f"{family}_{width}")
            num_eval = 2 if size == "smoke" else 40
            one = language_models.train_small(cfg, seeds, RATES, num_eval).to_json()
            # Without the embedding and the head, most of a small model of bytes.
            one["blocks"] = one["parameters"] - 2 * cfg.model.vocab_size * cfg.model.dim
            print(f"{family} {width}: {one['blocks']:,} {one['bits_per_token']:.4f}", flush=True)
            records.setdefault(family, []).append(one | {"width": width})
    return records


def small_line(records: list[dict[str, Any]]) -> Line:
    """The fit over parameters of the blocks."""
    losses = [math.exp(one["bits_per_token"] * math.log(2)) for one in records]
    return fit_line([one["blocks"] for one in records], losses)


def outcome(lines: dict[str, Line]) -> dict[str, bool]:
    """Whether each expectation holds; `lines` are those of the small models."""
    expectations = {
        f"the published slope of {LABELS[family]} is {slope}": round(
            published_line(family).slope, 4
        )
        == slope
        for family, slope in SLOPES.items()
    }
    return expectations | {
        f"larger models of {LABELS[family]} are better": line.slope > 0
        for family, line in lines.items()
    }


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Published perplexities on the left, small models on the right, with their lines."""
    plt = record.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for number, family in enumerate(FAMILIES):
        sizes = language_models.SIZES[: len(PERPLEXITY[family])]
        presets = (language_models.published_preset(family, size) for size in sizes)
        parameters = [flops.count_params(cfg) for cfg in presets]
        _line(axes[0], parameters, PERPLEXITY[family], f"C{number}", family)
        if family in result["small"]:
            records = result["small"][family]
            losses = [math.exp(one["bits_per_token"] * math.log(2)) for one in records]
            _line(axes[1], [one["blocks"] for one in records], losses, f"C{number}", family)
    axes[0].set_title("published, 300B tokens")
    axes[1].set_title(f"small models of bytes, size {result['size']}")
    for ax in axes:
        ax.set(xscale="log", yscale="log", xlabel="parameters", ylabel="perplexity")
        for axis, low, high in ((ax.xaxis, *ax.get_xlim()), (ax.yaxis, *ax.get_ylim())):
            ticks = np.geomspace(low, high, 6)[1:-1]
            axis.set_ticks(ticks, [_short(tick) for tick in ticks])
            axis.set_minor_formatter("")
        ax.legend(frameon=False, fontsize=8)
    axes[1].set_xlabel("parameters of the blocks")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _short(number: float) -> str:
    """Three digits and a unit."""
    scale, unit = next((x for x in UNITS if number >= x[0]), (1, ""))
    return f"{number / scale:.3g}{unit}"


def _line(axes: Any, parameters: list[int], perplexities: Any, color: str, family: str) -> None:
    line = fit_line(parameters, list(perplexities))
    axes.plot(parameters, perplexities, "o", color=color)
    fitted = np.exp(line.intercept - line.slope * np.log(parameters))
    axes.plot(parameters, fitted, "-", color=color, label=f"{LABELS[family]}, s = {line.slope:.3f}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Fits the published values, trains the runs of a size, and writes one JSON file and a plot."""

    size: record.Size = "cpu"
    tokens: Tokens = "15b"  # study of the size paper
    names: tuple[str, ...] = ()  # of runs of the size paper, FAMILY_SIZE_TOKENS; (): all
    seeds: tuple[int, ...] = SEEDS  # of small models, trained together
    data: pathlib.Path = pathlib.Path(language_models.DATA)  # prepared, of the size paper
    runs: pathlib.Path = pathlib.Path("runs/ladder")  # folder of the runs of the size paper
    out: pathlib.Path = RESULTS / "ladder.json"  # the plot is written next to it


def main(options: Options) -> int:
    """Runs the experiment; returns 0 if all expectations hold (smoke: always), else 1."""
    cpu.prepare()
    result = record.start("ladder", options.size)
    published = {family: published_line(family)._asdict() for family in PERPLEXITY}
    result |= {"published_lines": published}
    if options.size == "paper":
        names = options.names or tuple(runs_of(options.tokens))
        configs = {name: config("paper", name) for name in names}
        step = language_models.COMPARED_STEP if options.tokens == "15b" else None
        values = language_models.train_published(configs, options.data, options.runs, step)
        result |= {"perplexity": values, "outcome": outcome({})}
        return record.save(result, options.out)
    small = small_runs(options.size, options.seeds)
    lines = {family: small_line(records) for family, records in small.items()}
    result |= {"small": small, "lines": {family: line._asdict() for family, line in lines.items()}}
    return record.save(result | {"outcome": outcome(lines)}, options.out, plot)


if __name__ == "__main__":
    record.run(main, Options, __doc__)
