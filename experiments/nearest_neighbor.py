"""Can a model revise a stored value when it meets a closer match? The classic LSTM hardly can.

Expected: with the best of three learning rates, the mean squared error of xLSTM[0:1] on validation
sequences is below that of the LSTM, averaged over seeds, and every model that is trained at its
best learning rate is below 1/12, the error of the constant 1/2.

    python experiments/nearest_neighbor.py --size cpu        # four models, JSON and plot

The first vector of a sequence is the reference. At every later position the model outputs the value
attached to the vector that is closest to the reference so far. All seeds and learning rates of a
model train together under `jax.vmap`.

Source: Beck et al. 2024, arXiv:2405.04517, figure 2, left, which has no printed numbers. It states
that the LSTM is worst and needs very high learning rates, that the Transformer prefers the smallest
one, and that xLSTM[0:1] does about equally well with all of them. The batch size is not published;
paper uses 256. The sizes smoke and cpu draw fresh samples in every step; paper repeats 8,192.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any

import numpy as np

from experiments import record
from xlstm_jax import cpu
from xlstm_jax.data import DataConfig, eval_batches, load
from xlstm_jax.data.synthetic.nearest_neighbor import CONSTANT_MSE, VECTOR_DIM
from xlstm_jax.modules import LMConfig, MLSTMConfig, SLSTMConfig
from xlstm_jax.modules.baselines.options import AttentionConfig
from xlstm_jax.train import ExperimentConfig, TrainConfig

PATTERNS = {"LSTM": "ll", "xLSTM[0:1]": "ss", "xLSTM[1:0]": "mm", "Llama": "aa"}
PAPER_SAMPLES = 8192

CPU = ExperimentConfig(
    name="nearest_neighbor",
    model=LMConfig(
        vocab_size=1,  # of no effect: inputs are vectors
        dim=32,
        pattern="ss",
        mlstm=MLSTMConfig(num_heads=1),
        slstm=SLSTMConfig(num_heads=1),
        attention=AttentionConfig(num_heads=1),
    ),
    data=DataConfig(
        source="nearest_neighbor",
        seq_len=32,
        min_len=2,
        batch_size=64,
        num_eval_samples=4096,
        seed=1,
    ),
    train=TrainConfig(steps=1500, warmup_steps=0.1, grad_clip=1.0, log_every=100),
)
SMOKE = dataclasses.replace(
    CPU,
    model=dataclasses.replace(CPU.model, dim=16),
    data=dataclasses.replace(CPU.data, seq_len=8, batch_size=16, num_eval_samples=64),
    train=dataclasses.replace(CPU.train, steps=20, log_every=10),
)
PAPER = dataclasses.replace(
    CPU,
    model=dataclasses.replace(CPU.model, dim=128, dropout=0.1),
    data=dataclasses.replace(CPU.data, seq_len=64, batch_size=256, num_eval_samples=8192),
    train=dataclasses.replace(CPU.train, steps=100_000),
)
SIZES = {"smoke": SMOKE, "cpu": CPU, "paper": PAPER}
LRS = {
    "smoke": (1e-3, 1e-2),
    "cpu": (1e-3, 1e-2, 3e-2),
    "paper": (1e-4, 1e-3, 1e-2, 1e-1),
}
NUM_SEEDS = {"smoke": 1, "cpu": 2, "paper": 5}
END_LR = 1e-7


def config(size: str = "cpu") -> ExperimentConfig:
    """The data, training and blocks of xLSTM[0:1] at one size, a key of `SIZES`.

    Its model has vectors as inputs, so that only this script trains it, not `xlstm-jax train`.

    Raises:
        ConfigError: `size` is unknown.
    """
    record.check_size(size, SIZES)
    return SIZES[size]


def run_model(cfg: ExperimentConfig, name: str, size: str) -> dict[str, Any]:
    """Trains and evaluates one model with every seed and learning rate; returns its record."""
    import jax

    from xlstm_jax.modules.heads import PositionHead
    from xlstm_jax.train.grid import batches_of, evaluate_grid, train_grid
    from xlstm_jax.train.head_losses import squared_error_loss

    blocks = dataclasses.replace(cfg.model, pattern=PATTERNS[name])
    model = PositionHead(blocks, num_outputs=1, in_dim=VECTOR_DIM)
    loss_fn = functools.partial(squared_error_loss, model)
    num_samples = PAPER_SAMPLES if size == "paper" else None
    print(f"{name}: {cfg.train.steps} steps", flush=True)
    start = time.perf_counter()
    grid = train_grid(
        model,
        cfg.train,
        batches_of(load(cfg.data, "train"), cfg.data, num_samples),
        seeds=range(NUM_SEEDS[size]),
        lrs=LRS[size],
        end_lr=END_LR,
        loss_fn=loss_fn,
        report=record.print_loss,
    )
    valid = eval_batches(load(cfg.data, "valid"), cfg.data)
    sums = evaluate_grid(model, grid.params, valid, cfg.train, loss_fn)
    errors = (sums.ce_sum / sums.weight_sum).reshape(NUM_SEEDS[size], -1)
    best = int(np.argmin(np.nan_to_num(errors.mean(axis=0), nan=np.inf)))
    print(f"  MSE by seed and learning rate {errors.round(5).tolist()}", flush=True)
    return {
        "parameters": sum(leaf[0].size for leaf in jax.tree.leaves(grid.params)),
        "learning_rates": LRS[size],
        "mse": errors.tolist(),  # [seeds, learning rates]
        "diverged": grid.diverged.tolist(),
        "best_lr": LRS[size][best],
        "best_mse": errors[:, best].tolist(),
        "mean_mse": float(errors[:, best].mean()),
        "seconds": round(time.perf_counter() - start, 1),
    }


def outcome(models: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Whether each expectation holds."""
    errors = {name: model["mean_mse"] for name, model in models.items()}
    return {
        "xLSTM[0:1] has a smaller mean squared error than the LSTM": errors["xLSTM[0:1]"]
        < errors["LSTM"],
        "every model is below 1/12, the error of a constant": max(errors.values()) < CONSTANT_MSE,
    }


def confidence(values: list[float]) -> float:
    """Half of the 99 % confidence interval of the mean of normal values; 0 for a single one."""
    quantiles = {2: 63.66, 3: 9.925, 4: 5.841, 5: 4.604}  # of Student's t, by number of values
    n = len(values)
    return quantiles[n] * float(np.std(values, ddof=1)) / n**0.5 if n in quantiles else 0.0


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Mean squared error over the learning rate, a point per seed and a line for their mean."""
    plt = record.pyplot()
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for n, (name, model) in enumerate(result["models"].items()):
        errors, lrs = np.array(model["mse"]), model["learning_rates"]
        axes.plot(lrs, errors.mean(axis=0), "-", color=f"C{n}", label=name)
        axes.plot(lrs, errors.T, "o", color=f"C{n}", alpha=0.4)
    axes.axhline(CONSTANT_MSE, color="0.5", lw=0.8, ls=":")
    axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="mean squared error")
    axes.set_title("Nearest-neighbor search (dotted: a constant)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains all models and writes one JSON file and one plot."""

    size: record.Size = "cpu"
    out: pathlib.Path = record.RESULTS / "nearest_neighbor.json"  # the plot is next to it


def main(options: Options) -> int:
    """Runs the experiment; returns 0 if all expectations hold (smoke: always), else 1."""
    cpu.prepare()
    cfg = config(options.size)
    result = record.start("nearest_neighbor", options.size)
    models = {name: run_model(cfg, name, options.size) for name in PATTERNS}
    result |= {
        "dim": cfg.model.dim,
        "length": cfg.data.seq_len,
        "steps": cfg.train.steps,
        "constant_mse": CONSTANT_MSE,
        "confidence_99": {name: confidence(model["best_mse"]) for name, model in models.items()},
        "seconds": round(sum(model["seconds"] for model in models.values()), 1),
        "models": models,
        "outcome": outcome(models),
    }
    return record.save(result, options.out, plot)


if __name__ == "__main__":
    record.run(main, Options, __doc__)
