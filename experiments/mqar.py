"""Does a matrix memory recall as many key-value pairs as attention, and a vector memory fewer?

Expected: xLSTM[1:0], whose mLSTM blocks have matrix memories, and the Transformer recall more than
0.95 of the values with some seed; xLSTM[0:1], whose sLSTM blocks have vector memories, of the same
width stays below both by at least 0.1 with every seed after the same number of steps.

    python experiments/mqar.py --size cpu                    # three models, JSON and plot
    python experiments/mqar.py --size paper --length 2048 --num-pairs 256 --eval-lengths 4096 8192
    xlstm-jax train experiments/mqar.py                      # only xLSTM[1:0], as an ordinary run

Accuracy is over queries; guessing gives 2 / vocabulary. The result is that of the best learning
rate; all seeds and learning rates of a model train together under `jax.vmap`. The sizes smoke and
cpu draw fresh samples in every step, paper repeats 100,000 of them for 64 epochs.

Source of the task and of the settings: Beck et al. 2024, arXiv:2405.04517, appendix B.1.2; the
cited figures have no printed numbers. Among its statements: xLSTM[1:1] and [1:0] solve the three
settings up to (256, 16) at all widths, xLSTM[0:1] lacks the memory for them, and Llama is the upper
reference.
"""

import dataclasses
import pathlib
import time
from typing import Any

import numpy as np

from experiments import record
from xlstm_jax import cpu
from xlstm_jax.config import ConfigError
from xlstm_jax.data import DataConfig, load
from xlstm_jax.data.synthetic.mqar import TASK
from xlstm_jax.modules import LM, LMConfig, MLSTMConfig, SLSTMConfig
from xlstm_jax.modules.baselines.options import AttentionConfig
from xlstm_jax.train import ExperimentConfig, TrainConfig

PATTERNS = {"xLSTM[1:0]": "mm", "xLSTM[1:1]": "ms", "xLSTM[0:1]": "ss", "Llama": "aa"}
CPU_MODELS = ("xLSTM[1:0]", "xLSTM[0:1]", "Llama")
PAPER_BATCH = {64: 512, 128: 512, 256: 256, 756: 128, 1024: 96, 2048: 24}
"""Length -> batch size."""
PAPER_LRS = (1e-2, 2.15e-3, 4.6e-4, 1e-4)
PAPER_LRS_2048 = (1e-3, 2.2e-4, 5e-5, 1e-5)
PAPER_SAMPLES, PAPER_EPOCHS = 100_000, 64


def make_config(
    length: int, num_pairs: int, vocab_size: int, dim: int, batch_size: int, **train: Any
) -> ExperimentConfig:
    """xLSTM[1:0] and its data; every model has one head."""
    shared: dict[str, Any] = dict(warmup_steps=0.1, b2=0.99, grad_clip=1.0)
    return ExperimentConfig(
        name="mqar",
        model=LMConfig(
            vocab_size=vocab_size,
            dim=dim,
            pattern="mm",
            mlstm=MLSTMConfig(num_heads=1),
            slstm=SLSTMConfig(num_heads=1),
            attention=AttentionConfig(num_heads=1, cache_size=4 * length),
            # With the small embeddings of language models, the Transformer guesses among the
            # values of the sequence for more than 1,500 steps of the size cpu.
            embedding_std=1.0,
        ),
        data=DataConfig(
            source="mqar",
            seq_len=length,
            min_len=length + 1,
            batch_size=batch_size,
            num_eval_samples=3000,
            seed=1,
            task={"vocab_size": vocab_size, "num_pairs": num_pairs},
        ),
        train=TrainConfig(**shared | train),
    )


def paper(length: int = 64, num_pairs: int = 4, dim: int = 64) -> ExperimentConfig:
    """The published settings of a length; raises ConfigError for other lengths."""
    if length not in PAPER_BATCH:
        raise ConfigError(
            f"length={length} has no published settings; use one of: "
            f"{', '.join(map(str, PAPER_BATCH))}."
        )
    batch_size = PAPER_BATCH[length]
    steps = PAPER_EPOCHS * PAPER_SAMPLES // batch_size
    lr = (PAPER_LRS_2048 if length == 2048 else PAPER_LRS)[0]
    train: dict[str, Any] = dict(steps=steps, lr=lr, end_factor=1e-5 / lr, b2=0.95)
    return make_config(length, num_pairs, 8192, dim, batch_size, **train)


SIZES = {
    "smoke": make_config(16, 2, 24, 16, 16, steps=20, log_every=10, lr=5e-3),
    "cpu": make_config(32, 4, 64, 32, 64, steps=1500, log_every=100, lr=5e-3, end_factor=0.01),
    "paper": paper(),
}


def config(size: str = "cpu") -> ExperimentConfig:
    """The config of xLSTM[1:0] at one size, a key of `SIZES`.

    Raises:
        ConfigError: `size` is unknown.
    """
    record.check_size(size, SIZES)
    return SIZES[size]


def accuracies(cfg: ExperimentConfig, model: LM, params: Any, length: int) -> list[float]:
    """Accuracy of every member on validation samples of some length."""
    from xlstm_jax.data import eval_batches
    from xlstm_jax.train.grid import evaluate_grid

    data = dataclasses.replace(cfg.data, seq_len=length, min_len=length + 1)
    sums = evaluate_grid(model, params, eval_batches(load(data, "valid"), data), cfg.train)
    return [float(a) for a in sums.correct_sum / sums.weight_sum]


def run_model(cfg: ExperimentConfig, name: str, options: "Options") -> dict[str, Any]:
    """Trains and evaluates one model with every seed and learning rate; returns its record."""
    import jax

    from xlstm_jax.train.grid import batches_of, train_grid

    model = LM(dataclasses.replace(cfg.model, pattern=PATTERNS[name]))
    num_samples = PAPER_SAMPLES if options.size == "paper" else None
    print(f"{name}: {cfg.train.steps} steps", flush=True)
    start = time.perf_counter()
    grid = train_grid(
        model,
        cfg.train,
        batches_of(load(cfg.data, "train"), cfg.data, num_samples),
        seeds=range(options.num_seeds),
        lrs=learning_rates(cfg, options.size),
        end_lr=cfg.train.lr * cfg.train.end_factor,
        report=record.print_loss,
    )
    scores = {
        str(length): accuracies(cfg, model, grid.params, length)
        for length in (cfg.data.seq_len, *options.eval_lengths)
    }
    print(f"  accuracy {scores}", flush=True)
    return {
        "parameters": sum(leaf[0].size for leaf in jax.tree.leaves(grid.params)),
        "seeds": grid.seeds,
        "learning_rates": grid.lrs,
        "final_loss": [float(v) for v in grid.losses[-100:].mean(axis=0)],
        "accuracy": scores,
        "diverged": grid.diverged.tolist(),
        "loss_curve": grid.losses[:: max(1, len(grid.losses) // 100)].round(4).tolist(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def learning_rates(cfg: ExperimentConfig, size: str) -> tuple[float, ...]:
    """Those of the size; the largest one comes first."""
    if size != "paper":
        return (cfg.train.lr,)
    return PAPER_LRS_2048 if cfg.data.seq_len == 2048 else PAPER_LRS


def outcome(models: dict[str, dict[str, Any]], length: int) -> dict[str, bool]:
    """Whether each expectation holds at the length of training."""
    scores = {name: model["accuracy"][str(length)] for name, model in models.items()}
    gap = min(max(scores["xLSTM[1:0]"]), max(scores["Llama"])) - max(scores["xLSTM[0:1]"])
    return {
        "xLSTM[1:0] above 0.95 with some seed": max(scores["xLSTM[1:0]"]) > 0.95,
        "Llama above 0.95 with some seed": max(scores["Llama"]) > 0.95,
        "xLSTM[0:1] below both by at least 0.1 with every seed": gap >= 0.1,
    }


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Training loss, and validation accuracy by model and length: a line or a point per member."""
    plt = record.pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    models = result["models"]
    for n, (name, model) in enumerate(models.items()):
        curve = np.array(model["loss_curve"])
        left.plot(np.linspace(0, result["steps"], len(curve)), curve, f"C{n}", lw=1, alpha=0.7)
        left.plot([], [], f"C{n}", label=name)
        for shift, (length, values) in enumerate(model["accuracy"].items()):
            x = np.full(len(values), n + 0.2 * shift)
            right.plot(x, values, "osD^v"[shift % 5], color=f"C{n}", alpha=0.6)
            if n == 0:
                right.plot([], [], "osD^v"[shift % 5], color="0.4", label=f"length {length}")
    left.set(xlabel="step", ylabel="loss in nats", title="training, a line per run")
    left.legend(frameon=False)
    right.axhline(result["chance"], color="0.5", lw=0.8, ls=":")
    right.set(
        ylabel="accuracy", xlim=(-0.5, len(models)), ylim=(0, 1.03), title="validation queries"
    )
    right.set_xticks(range(len(models)), list(models))
    right.legend(frameon=False, loc="upper right")
    figure.suptitle(f"Associative recall of {result['num_pairs']} pairs (dotted: chance)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains all models and writes one JSON file and one plot."""

    size: record.Size = "cpu"
    num_seeds: int = 2  # trained together under `jax.vmap`
    length: int = 64  # of the size paper
    num_pairs: int = 4  # of the size paper
    dim: int = 64  # of the size paper: width of the models
    eval_lengths: tuple[int, ...] = ()  # further lengths to evaluate at
    out: pathlib.Path = record.RESULTS / "mqar.json"  # the plot is written next to it


def main(options: Options) -> int:
    """Runs the experiment; returns 0 if all expectations hold (smoke: always), else 1."""
    cpu.prepare()
    cfg = config(options.size)
    if options.size == "paper":
        cfg = paper(options.length, options.num_pairs, options.dim)
    names = PATTERNS if options.size == "paper" else CPU_MODELS
    result = record.start("mqar", options.size)
    models = {name: run_model(cfg, name, options) for name in names}
    result |= {
        "length": cfg.data.seq_len,
        "num_pairs": cfg.data.task["num_pairs"],
        "vocab_size": cfg.model.vocab_size,
        "dim": cfg.model.dim,
        "steps": cfg.train.steps,
        "chance": TASK.chance(TASK.complete(cfg.data.task)),
        "seconds": round(sum(model["seconds"] for model in models.values()), 1),
        "models": models,
        "outcome": outcome(models, cfg.data.seq_len),
    }
    return record.save(result, options.out, plot)


if __name__ == "__main__":
    record.run(main, Options, __doc__)
