"""Does memory mixing let a model learn parity and extrapolate far beyond its training lengths?

Expected: xLSTM[0:1] and xLSTM[1:1], which have sLSTM blocks, reach a scaled accuracy above 0.95 at
every length up to 256 with at least one of three seeds, trained on sequences of up to 40 tokens;
xLSTM[1:0], whose mLSTM blocks have no memory mixing, and a Transformer with rotary positions stay
below 0.3 at lengths 128 to 256 with every seed.

    python experiments/parity.py --size cpu                  # all four models, JSON and plot
    xlstm-jax train experiments/parity.py                    # only xLSTM[1:1], as an ordinary run

Scaled accuracy is (accuracy - 1/2) / (1 - 1/2): 0 is chance, 1 is perfect. The three seeds of a
model share their data and train together under `jax.vmap`.

Source of the task: Beck et al. 2024, arXiv:2405.04517, appendix B.1.1 (the sLSTM block has no
convolution). Sizes: smoke (seconds), cpu (minutes), paper (published number of steps).
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal

import numpy as np

from experiments import record
from experiments.record import RESULTS, Size
from xlstm_jax import cpu
from xlstm_jax.data import Batch, DataConfig, load
from xlstm_jax.data.synthetic import parity
from xlstm_jax.data.synthetic.samples import scaled_accuracy
from xlstm_jax.modules import LM, LMConfig, MLSTMConfig, SLSTMConfig
from xlstm_jax.modules.baselines.options import AttentionConfig
from xlstm_jax.train import ExperimentConfig, TrainConfig
from xlstm_jax.train.grid import Grid, batches_of, evaluate_grid, train_grid

CHANCE = 0.5
BUCKETS = ((3, 40), (40, 64), (64, 128), (128, 256))
"""Minimum and maximum length of the samples of each evaluation, answer included."""

PATTERNS = {"xLSTM[0:1]": "ss", "xLSTM[1:1]": "ms", "xLSTM[1:0]": "mm", "Llama": "aa"}

CPU = ExperimentConfig(
    name="parity",
    model=LMConfig(
        vocab_size=parity.VOCAB_SIZE,
        dim=32,
        pattern="ms",
        mlstm=MLSTMConfig(num_heads=1),
        slstm=SLSTMConfig(
            num_heads=1, conv_width=0, recurrent_init="standard", bias_init="small_init"
        ),
        attention=AttentionConfig(num_heads=2),
    ),
    data=DataConfig(source="parity", seq_len=39, batch_size=128, max_len=40, seed=1),
    train=TrainConfig(
        steps=1500,
        lr=5e-3,
        warmup_steps=0.1,
        end_factor=0.01,
        b2=0.99,
        grad_clip=1.0,
        # Large gradients are common and clipped. The guard would skip them and, after eight
        # consecutive ones, all further steps of the seed.
        guard_floor=1e9,
        log_every=100,
    ),
)
SMOKE = dataclasses.replace(
    CPU,
    data=dataclasses.replace(CPU.data, batch_size=16, num_eval_samples=64),
    train=dataclasses.replace(CPU.train, steps=20, log_every=10),
)
PAPER = dataclasses.replace(
    CPU,
    model=dataclasses.replace(CPU.model, dim=64),
    data=dataclasses.replace(CPU.data, batch_size=256),
    train=dataclasses.replace(CPU.train, steps=100_000, lr=1e-3, end_factor=1e-2),
)
SIZES = {"smoke": SMOKE, "cpu": CPU, "paper": PAPER}


def config(size: str = "cpu") -> ExperimentConfig:
    """The config of xLSTM[1:1] at one size, a key of `SIZES`.

    Raises:
        ConfigError: `size` is unknown.
    """
    record.check_size(size, SIZES)
    return SIZES[size]


def train_seeds(cfg: ExperimentConfig, num_seeds: int) -> Grid:
    """Trains seeds 0, 1, ... on the same batches."""

    def report(step: int, losses: np.ndarray) -> None:
        of_seeds = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"  step {step:5d}  loss of each seed {of_seeds}", flush=True)

    model, lrs = LM(cfg.model), (cfg.train.lr,)
    batches = batches_of(load(cfg.data, "train"), cfg.data)
    return train_grid(model, cfg.train, batches, seeds=range(num_seeds), lrs=lrs, report=report)


def samples(
    data: DataConfig, split: Literal["train", "test"], start: int, count: int, low: int, high: int
) -> Batch:
    """`count` samples of `low` to `high` tokens, padded to `high - 1` inputs."""
    data = dataclasses.replace(data, min_len=low, max_len=high, seq_len=high - 1)
    return load(data, split).batch(np.arange(start, start + count))


def scaled_accuracies(cfg: ExperimentConfig, params: Any) -> dict[str, list[float]]:
    """Scaled accuracy of every seed on test samples, by length bucket."""
    model, scores, count = LM(cfg.model), {}, cfg.data.num_eval_samples
    size = min(512, count)
    for low, high in BUCKETS:
        parts = (samples(cfg.data, "test", i, size, low, high) for i in range(0, count, size))
        sums = evaluate_grid(model, params, parts, cfg.train)
        accuracy = np.asarray(sums.correct_sum) / np.asarray(sums.weight_sum)
        scores[f"{low}-{high}"] = [float(a) for a in scaled_accuracy(accuracy, CHANCE)]
    return scores


def run_model(cfg: ExperimentConfig, name: str, num_seeds: int) -> dict[str, Any]:
    """Trains and evaluates one model; returns its record."""
    import jax

    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, pattern=PATTERNS[name]))
    print(f"{name}: {num_seeds} seeds, {cfg.train.steps} steps", flush=True)
    start = time.perf_counter()
    grid = train_seeds(cfg, num_seeds)
    scores = scaled_accuracies(cfg, grid.params)
    seconds = time.perf_counter() - start
    for bucket, values in scores.items():
        print(f"  lengths {bucket:8s} " + "  ".join(f"{v:6.3f}" for v in values), flush=True)
    return {
        "pattern": PATTERNS[name],
        "parameters": sum(leaf[0].size for leaf in jax.tree.leaves(grid.params)),
        "final_loss": [float(v) for v in grid.losses[-100:].mean(axis=0)],
        "scaled_accuracy": scores,
        "seconds": round(seconds, 1),
    }


def outcome(models: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Whether each expectation holds."""

    def solved(name: str) -> bool:
        by_seed = np.array(list(models[name]["scaled_accuracy"].values()))
        return bool((by_seed > 0.95).all(axis=0).any())

    def fails(name: str) -> bool:
        return bool(max(models[name]["scaled_accuracy"]["128-256"]) < 0.3)

    return {
        "xLSTM[0:1] above 0.95 at every length with some seed": solved("xLSTM[0:1]"),
        "xLSTM[1:1] above 0.95 at every length with some seed": solved("xLSTM[1:1]"),
        "xLSTM[1:0] below 0.3 at 128-256 with every seed": fails("xLSTM[1:0]"),
        "Llama below 0.3 at 128-256 with every seed": fails("Llama"),
    }


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Plots scaled accuracy over length: a point per seed, a line for the best one."""
    plt = record.pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    labels = [f"{low}–{high}" for low, high in BUCKETS]
    # Shift the models sideways: those that solve the task would overlap.
    styles = zip(("C0", "C2", "C3", "C1"), (-0.09, -0.03, 0.03, 0.09), strict=True)
    for (name, model), (color, shift) in zip(result["models"].items(), styles, strict=True):
        by_seed = np.array(list(model["scaled_accuracy"].values()))
        x = np.arange(len(labels)) + shift
        axes.plot(x, by_seed.max(axis=1), "-", color=color, label=f"{name}, best seed")
        axes.plot(x, by_seed, "o", color=color, alpha=0.35)
    axes.set_xticks(range(len(labels)), labels)
    axes.axhline(0, color="0.5", lw=0.8, ls=":")
    axes.axhspan(0.95, 1.05, color="C2", alpha=0.08)
    axes.set_ylim(top=1.05)
    axes.set_xlabel("length of the sample (training: 3–40)")
    axes.set_ylabel("scaled accuracy (0 is chance)")
    axes.set_title("Parity: only memory mixing extrapolates")
    axes.legend(frameon=False, loc="center right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains all four models and writes one JSON file and one plot."""

    size: Size = "cpu"
    num_seeds: int = 3  # trained together under `jax.vmap`
    out: pathlib.Path = RESULTS / "parity.json"  # the plot is written next to it


def main(options: Options) -> int:
    """Runs the experiment; returns 0 if all expectations hold (smoke: always), else 1."""
    cpu.prepare()
    cfg, result = config(options.size), record.start("parity", options.size)
    models = {name: run_model(cfg, name, options.num_seeds) for name in PATTERNS}
    seconds = round(sum(model["seconds"] for model in models.values()), 1)
    result |= {"seconds": seconds, "models": models, "outcome": outcome(models)}
    return record.save(result, options.out, plot)


if __name__ == "__main__":
    record.run(main, Options, __doc__)
