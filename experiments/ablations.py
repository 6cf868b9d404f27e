"""Which parts of the xLSTM lower the loss, added to an LSTM one by one or varied alone?

Three tables (`--table`): `lstm_to_xlstm`, from a stack of LSTMs over residual blocks, blocks with
up-projection and exponential gates to the matrix memory; `gates`, which parts of the gates of
xLSTM[1:0] are learned; `blocks`, in which block the matrix memory is.

Expected, at equal steps on the built-in text and nearly equal parameters: validation losses in the
order LSTM > xLSTM[0:1] > xLSTM[7:1]. The two other tables have no expectation at that size, where
differences of a few percent depend on the seed; learned gates must beat fixed ones at the size
paper. Loss is in bits per token, a byte, at the better of two learning rates, mean of the seeds.

    python experiments/ablations.py --size cpu                        # the first table
    python experiments/ablations.py --size cpu --table gates
    python experiments/ablations.py --size paper --data PREPARED      # the published sizes
    xlstm-jax train experiments/ablations.py --size paper:post --data.source PREPARED   # one model

The LSTMs have one bias per gate less than printed, as PyTorch has two. xLSTM[0:1] has the printed
number of parameters with 24 blocks of 4 heads and a feed-forward factor of 3.6, which the paper
does not state. `train.freeze` fixes a bias; a forget gate of 1 has a bias of 1e30.

Source: Beck et al. 2024, arXiv:2405.04517, tables 2 and 8. Sizes: smoke (seconds), cpu (minutes),
paper (350M parameters, 15B tokens). `--size paper:VARIANT` of `xlstm-jax train` selects a model.
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal, NamedTuple

from experiments import language_models, record
from xlstm_jax import cpu
from xlstm_jax.data import tokenizers
from xlstm_jax.modules import LargeConfig, LMConfig, MLSTMConfig, SLSTMConfig, presets
from xlstm_jax.modules.baselines.options import LSTMConfig
from xlstm_jax.modules.options import first_generation_width
from xlstm_jax.modules.patterns import ratio_pattern
from xlstm_jax.train import ExperimentConfig

Table = Literal["lstm_to_xlstm", "gates", "blocks"]

SIZES = ("smoke", "cpu", "paper")
WIDTH = {"smoke": 16, "cpu": 64, "paper": 1024}
BLOCKS = {"smoke": 2, "cpu": 8, "paper": 48}  # without a feed-forward layer; others have half
SEEDS, RATES = (0, 1, 2), (3e-3, 1e-2)
RESULTS = pathlib.Path(__file__).parent / "results"


class Variant(NamedTuple):
    """A model of a table."""

    table: Table
    label: str
    millions: float | None  # published parameters; None: not printed
    perplexity: float  # published, after 15B tokens; NaN: diverged
    kind: str  # of blocks, see `model`
    options: dict[str, Any] = {}  # of these blocks
    freeze: str | None = None


_FIXED = {"input_gate_kernel": False, "forget_gate_kernel": False, "input_bias_std": 0.0}
_BIASES = r"mlstm/(input|forget)_gate/bias$"
_INPUT, _FORGET = r"mlstm/input_gate/bias$", r"mlstm/forget_gate/bias$"
_OPEN = _FIXED | {"forget_bias": (1e30, 1e30)}  # a forget gate of 1
_READS_F = {"input_gate_kernel": False, "input_bias_std": 0.0}
_READS_I = {"forget_gate_kernel": False}

VARIANTS = {
    "lstm": Variant("lstm_to_xlstm", "LSTM", 607.8, 2417.86, "lstm"),
    "residual": Variant("lstm_to_xlstm", "+ residual, pre-norm", 506.1, 35.46, "residual"),
    "up_projection": Variant("lstm_to_xlstm", "+ up-projection", 505.9, 26.01, "up_projection"),
    "xlstm_0:1": Variant("lstm_to_xlstm", "xLSTM[0:1]", 427.3, 17.70, "slstm"),
    "xlstm_7:1": Variant("lstm_to_xlstm", "xLSTM[7:1]", 408.4, 13.48, "mixed"),
    "forget_1": Variant(
        "gates", "none, forget gate 1", None, float("nan"), "mlstm", _OPEN, _BIASES
    ),
    "fixed": Variant("gates", "none", None, 13.95, "mlstm", _FIXED, _BIASES),
    "forget": Variant("gates", "forget gate", None, 13.58, "mlstm", _READS_F, _INPUT),
    "input": Variant("gates", "input gate", None, 13.69, "mlstm", _READS_I, _FORGET),
    "forget_bias": Variant("gates", "forget bias", None, 13.76, "mlstm", _FIXED, _INPUT),
    "biases": Variant(
        "gates", "both biases", None, 13.73, "mlstm", _FIXED | {"input_bias_std": 0.1}
    ),
    "forget_input_bias": Variant(
        "gates", "forget gate, input bias", None, 13.55, "mlstm", {"input_gate_kernel": False}
    ),
    "gates": Variant("gates", "both gates", 409.3, 13.43, "mlstm"),
    "post": Variant("blocks", "post up-projection", 430.4, 13.90, "post"),
    "no_conv": Variant(
        "blocks", "pre up-projection, no convolution", 408.8, 15.41, "mlstm", {"conv_width": 0}
    ),
    "pre": Variant("blocks", "pre up-projection", 409.3, 13.43, "mlstm"),
}
"""Name, as in `--size paper:NAME` -> variant of the model and its published figures."""


def model(variant: Variant, size: str) -> LMConfig:
    """The model of a variant."""
    dim, blocks = WIDTH[size], BLOCKS[size]
    shared: dict[str, Any] = dict(vocab_size=tokenizers.get("byte").vocab_size)
    if size == "paper":
        shared = dict(vocab_size=presets.VOCAB_SIZE, dtype="bfloat16", remat="names")
    if variant.kind == "lstm":
        return LMConfig(dim=dim * 3 // 2, pattern="l" * (blocks // 2), final_norm="none", **shared)
    shared["dim"] = dim
    if variant.kind == "residual":
        lstm = LSTMConfig(ffn_dim=0)
        return LMConfig(pattern="L" * blocks, lstm=lstm, final_norm="rms", **shared)
    if variant.kind == "up_projection":
        return LMConfig(pattern="L" * (blocks // 2), final_norm="rms", **shared)
    if variant.kind == "slstm":
        slstm = SLSTMConfig(ffn_dim=first_generation_width(dim, 3.6))
        return LMConfig(pattern="s" * (blocks // 2), slstm=slstm, **shared)
    if variant.kind == "post":
        large = LargeConfig(
            qk_dim=dim,
            ffn_dim=4 * dim,
            ffn_activation="relu2",
            gate_soft_cap=None,
            input_bias=0.0,
            input_bias_std=0.1,
        )
        return LMConfig(pattern="M" * (blocks // 2), large=large, final_norm="rms", **shared)
    pattern = "m" * blocks
    if variant.kind == "mixed":
        is_paper = size == "paper"
        published = presets.get("xlstm_350m_7:1").pattern
        pattern = published if is_paper else ratio_pattern("7:1" if blocks >= 8 else "1:1", blocks)
    return LMConfig(pattern=pattern, mlstm=MLSTMConfig(**variant.options), **shared)


def config(size: str = "cpu", variant: str = "xlstm_7:1") -> ExperimentConfig:
    """The run of a variant; `size` may be SIZE:VARIANT.

    Raises:
        ConfigError: the size or the variant is unknown.
    """
    size, variant = language_models.parse_size(size, SIZES, tuple(VARIANTS), variant)
    lm, freeze = model(VARIANTS[variant], size), VARIANTS[variant].freeze
    name = f"ablations_{variant}"
    if size == "paper":
        cfg = language_models.published(name, lm)
        return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, freeze=freeze))
    train = dataclasses.replace(language_models.SMALL_TRAIN, freeze=freeze, lr=RATES[0])
    data = language_models.SMALL_DATA
    if size == "smoke":
        data = language_models.SMOKE_DATA
        train = dataclasses.replace(train, steps=4, log_every=2, eval_every=2)
    return ExperimentConfig(name=name, model=lm, data=data, train=train)


def variants_of(table: Table) -> dict[str, Variant]:
    """The variants of a table, in the order of the paper."""
    return {name: variant for name, variant in VARIANTS.items() if variant.table == table}


def train_variant(size: str, name: str, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Trains a variant with all seeds and learning rates; returns its record."""
    cfg, start = config(size, name), time.perf_counter()
    losses = language_models.train_small(cfg, seeds, RATES, 2 if size == "smoke" else 40)
    result = losses.to_json() | {"seconds": round(time.perf_counter() - start, 1)}
    label = VARIANTS[name].label
    print(f"{label:36s} {result['bits_per_token']:.4f} {result['by_seed']}", flush=True)
    return result


def outcome(table: Table, results: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Whether each expectation holds."""
    if table != "lstm_to_xlstm":
        return {}
    order = ("lstm", "xlstm_0:1", "xlstm_7:1")
    losses = {name: results[name]["bits_per_token"] for name in order}
    pairs = zip(order, order[1:], strict=False)
    return {
        f"{VARIANTS[low].label} below {VARIANTS[high].label}": losses[low] < losses[high]
        for high, low in pairs
    }


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Loss of every variant: a line for the mean, a point per seed."""
    plt = record.pyplot()
    results = result["rows"]
    figure, axes = plt.subplots(figsize=(7, 1 + 0.45 * len(results)), layout="constrained")
    for y, name in enumerate(results):
        losses = list(results[name]["by_seed"].values())
        axes.plot(results[name]["bits_per_token"], y, "|", color="C0", ms=18, mew=3)
        axes.plot(losses, [y] * len(losses), "o", color="C0", ms=4)
    values = [x for entry in results.values() for x in entry["by_seed"].values()]
    low, high = min(values), max(values)
    axes.set_xlim(low - 0.15 * (high - low) - 0.01, high + 0.05 * (high - low) + 0.01)
    axes.set_yticks(range(len(results)), [VARIANTS[name].label for name in results])
    axes.invert_yaxis()
    axes.set_xlabel("validation bits per byte, mean and seeds")
    axes.set_title(f"Ablation {result['table']}, size {result['size']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains the variants of one table and writes one JSON file and one plot."""

    size: record.Size = "cpu"
    table: Table = "lstm_to_xlstm"
    seeds: tuple[int, ...] = SEEDS  # trained together; the size paper has one run per variant
    data: pathlib.Path = pathlib.Path(language_models.DATA)  # prepared, of the size paper
    runs: pathlib.Path = pathlib.Path("runs")  # folder of the runs of the size paper
    out: pathlib.Path | None = None  # None: in experiments/results


def main(options: Options) -> int:
    """Runs the experiment; returns 0 if all expectations hold (smoke: always), else 1."""
    cpu.prepare()
    name = "ablations" if options.table == "lstm_to_xlstm" else f"ablations_{options.table}"
    out = options.out or RESULTS / f"{name}.json"
    variants = variants_of(options.table)
    result = record.start("ablations", options.size) | {"table": options.table}
    result["command"] += f" --table {options.table}"
    if options.size == "paper":
        configs = {name: config("paper", name) for name in variants}
        step = language_models.COMPARED_STEP
        measured = language_models.train_published(configs, options.data, options.runs, step)
        result["rows"] = {
            name: {"perplexity": value, "published": VARIANTS[name].perplexity}
            for name, value in measured.items()
        }
        return record.save(result | {"outcome": paper_outcome(options.table, measured)}, out)
    results = {name: train_variant(options.size, name, options.seeds) for name in variants}
    result |= {"rows": results, "outcome": outcome(options.table, results)}
    return record.save(result, out, plot)


def paper_outcome(table: Table, measured: dict[str, float | None]) -> dict[str, bool]:
    """Whether the variants are in the published order."""
    values = {name: float("nan") if x is None else x for name, x in measured.items()}
    ordered = sorted(variants_of(table), key=lambda name: VARIANTS[name].perplexity)
    ordered = [name for name in ordered if VARIANTS[name].perplexity == VARIANTS[name].perplexity]
    pairs = zip(ordered, ordered[1:], strict=False)
    return {f"{a} below {b}": values[a] < values[b] for a, b in pairs}


if __name__ == "__main__":
    record.run(main, Options, __doc__)
