"""Which models learn fifteen formal languages, and extrapolate from length 40 to length 256?

Expected, as published: models with memory mixing (LSTM, LSTM in a Transformer block, xLSTM[0:1] and
[1:1]) solve the regular languages, of which parity is out of reach for all others; no model reaches
a scaled accuracy of 0.3 on odds first, reverse string, stack manipulation, repetition and set.

    python experiments/formal_languages.py                                  # all 120 cells
    python experiments/formal_languages.py --task parity --model xlstm_0_1  # one cell
    xlstm-jax train experiments/formal_languages.py                         # an ordinary run

A cell is a task and a model of two blocks: every learning rate with every seed, trained as one
program on samples of up to 40 tokens, evaluated at 40 to 256. Its figure is the mean over the seeds
at the best learning rate. A scaled accuracy of 0 is chance and 1 is perfect. Finished cells, in
`--run-dir` or in the result, are skipped, so that the same command resumes. The size cpu takes
about five hours of one core.

Source: Beck et al. 2024, arXiv:2405.04517, figures 4 and 12 and appendix B.1.1 (the sLSTM block has
no convolution; widths are not stated). Sizes: smoke (seconds for a cell), cpu (minutes for a cell),
paper (published steps, batch size and learning rates).
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import time
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments import record
from experiments.record import RESULTS, Size
from xlstm_jax import cpu
from xlstm_jax.config import ConfigError
from xlstm_jax.config.fields import to_dict
from xlstm_jax.data import DataConfig, load
from xlstm_jax.data.synthetic.registry import FORMAL_LANGUAGES
from xlstm_jax.data.synthetic.samples import scaled_accuracy
from xlstm_jax.errors import quote
from xlstm_jax.modules import LM, LMConfig, MLSTMConfig, SLSTMConfig
from xlstm_jax.modules.baselines.options import AttentionConfig, MambaConfig
from xlstm_jax.train import ExperimentConfig, TrainConfig
from xlstm_jax.train.grid import batches_of, evaluate_grid, train_grid

TASKS = {task.name: task for task in FORMAL_LANGUAGES}
TRAIN_LEN, LENGTHS = 40, (40, 256)
"""Most tokens in training, and fewest and most tokens in the evaluation that counts."""


class Model(NamedTuple):
    """A column of the map."""

    label: str
    pattern: str
    has_memory_mixing: bool  # recurrent weights from hidden states to gates


MODELS = {
    "lstm": Model("LSTM", "ll", True),
    "lstm_block": Model("LSTM (block)", "LL", True),
    "xlstm_0_1": Model("xLSTM[0:1]", "ss", True),
    "xlstm_1_1": Model("xLSTM[1:1]", "ms", True),
    "xlstm_1_0": Model("xLSTM[1:0]", "mm", False),
    "llama": Model("Llama", "aa", False),
    "mamba": Model("Mamba", "bb", False),
    "rwkv4": Model("RWKV-4", "rr", False),
}
UNSOLVED = ("odds_first", "reverse_string", "stack_manipulation", "repetition", "set")
"""Tasks of figure 12, with a scaled accuracy below 0.3 for every published model."""

_FIGURE_12 = {
    "lstm_block": (0.08, 0.17, 0.25, 0.15, 0.18),
    "xlstm_0_1": (0.09, 0.14, 0.13, 0.09, 0.17),
    "xlstm_1_1": (0.08, 0.20, 0.17, 0.09, 0.15),
    "xlstm_1_0": (0.15, 0.22, 0.25, 0.28, 0.17),
    "llama": (0.07, 0.06, 0.11, 0.08, 0.04),
    "mamba": (0.08, 0.13, 0.21, 0.15, 0.12),
    "rwkv4": (0.08, 0.12, 0.20, 0.10, 0.10),
}
PUBLISHED = {
    # Of figure 4, those that arXiv:2411.12537 quotes in a table.
    ("parity", "xlstm_0_1"): 1.00,
    ("parity", "xlstm_1_0"): 0.04,
    ("modular_arithmetic", "xlstm_0_1"): 1.00,
    ("modular_arithmetic", "xlstm_1_0"): 0.04,
    ("modular_arithmetic_brackets", "xlstm_0_1"): 0.57,
    ("modular_arithmetic_brackets", "xlstm_1_0"): 0.03,
} | {
    (task, model): value
    for model, values in _FIGURE_12.items()
    for task, value in zip(UNSOLVED, values, strict=True)
}
"""(task, model) -> published scaled accuracy at lengths 40 to 256, where it is printed."""


class Sweep(NamedTuple):
    """The settings of a size: the members of each grid, and the settings that they share."""

    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    dim: int
    batch_size: int
    steps: int
    num_eval_samples: int
    eval_batch_size: int = 128
    end_lr: float = 1e-5


SIZES: dict[str, Sweep] = {
    "smoke": Sweep((1e-2, 3e-3), (0, 1), 16, 8, 20, 16, 16),
    "cpu": Sweep((1e-2, 3e-3), (0, 1), 32, 64, 1200, 1024),
    "paper": Sweep((1e-2, 1e-3, 1e-4), (0, 1), 64, 256, 100_000, 8192, 512),
}


def config(
    size: str = "cpu", task: str = "parity", model: str = "xlstm_1_1", *, on_cpu: bool = False
) -> ExperimentConfig:
    """The config of one cell, at its first seed and learning rate.

    Raises:
        ConfigError: the size, task or model is unknown.
    """
    record.check_size(size, SIZES)
    for name, value, known in (("task", task, TASKS), ("model", model, MODELS)):
        if value not in known:
            raise ConfigError(f"{name}={quote(value)} is unknown; use one of: {', '.join(known)}.")
    sweep = SIZES[size]
    options = TASKS[task].complete({})
    data = DataConfig(
        source=task,
        seq_len=TRAIN_LEN - 1,
        min_len=max(3, TASKS[task].min_len(options)),
        max_len=TRAIN_LEN,
        batch_size=sweep.batch_size,
        num_eval_samples=sweep.num_eval_samples,
        seed=1,
    )
    return ExperimentConfig(
        name=f"{task}-{model}",
        model=LMConfig(
            vocab_size=TASKS[task].vocab_size(options),
            dim=sweep.dim,
            pattern=MODELS[model].pattern,
            mlstm=MLSTMConfig(num_heads=1),
            slstm=SLSTMConfig(
                num_heads=1, conv_width=0, recurrent_init="standard", bias_init="small_init"
            ),
            attention=AttentionConfig(num_heads=2),
            # The others recompute the states in the backward pass; these states are few.
            mamba=MambaConfig(implementation="recurrent" if on_cpu else "auto"),
        ),
        data=data,
        train=TrainConfig(
            steps=sweep.steps,
            lr=sweep.lrs[0],
            warmup_steps=0.1,
            end_factor=sweep.end_lr / sweep.lrs[0],
            b2=0.99,
            grad_clip=1.0,
            # Large gradients are common and clipped. The guard would skip them and, after eight
            # consecutive ones, all further steps of the member.
            guard_floor=1e9,
            seed=sweep.seeds[0],
            log_every=min(100, sweep.steps // 2),
        ),
    )


def run_cell(cfg: ExperimentConfig, sweep: Sweep) -> dict[str, Any]:
    """Trains and evaluates the grid of a cell; returns its figures, one value per member."""
    model, batches = LM(cfg.model), batches_of(load(cfg.data, "train"), cfg.data)
    start = time.perf_counter()
    grid = train_grid(
        model, cfg.train, batches, seeds=sweep.seeds, lrs=sweep.lrs, end_lr=sweep.end_lr
    )
    low, high = LENGTHS
    longer = dataclasses.replace(cfg.data, seq_len=high - 1, min_len=low, max_len=high)
    scores = {}
    for data in (cfg.data, longer):
        samples = load(data, "test")
        parts = np.split(np.arange(len(samples)), len(samples) // sweep.eval_batch_size)
        sums = evaluate_grid(model, grid.params, map(samples.batch, parts), cfg.train)
        accuracy = np.asarray(sums.correct_sum) / np.asarray(sums.weight_sum)
        accuracy = scaled_accuracy(accuracy, chance(cfg))
        scores[f"{data.min_len}-{data.max_len}"] = _rounded(accuracy)
    return {
        "seeds": grid.seeds,
        "lrs": grid.lrs,
        "scaled_accuracy": scores,
        "final_loss": _rounded(grid.losses[-cfg.train.log_every :].mean(axis=0)),
        "seconds": round(time.perf_counter() - start, 1),
    }


def chance(cfg: ExperimentConfig) -> float:
    """Accuracy of guessing in the task of a cell."""
    task = TASKS[cfg.data.source]
    return task.chance(task.complete(cfg.data.task))


def _rounded(values) -> list[float]:
    return [round(float(value), 4) for value in values]


def fingerprint(cfg: ExperimentConfig, sweep: Sweep) -> str:
    """Identifies what determines the figures of a cell."""
    text = json.dumps([to_dict(cfg), sweep], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cell(
    options: "Options", task: str, model: str, *, compute: bool = True
) -> dict[str, Any] | None:
    """The record of one cell from a file, or else computed; None if neither."""
    import jax

    sweep = SIZES[options.size]
    cfg = config(options.size, task, model, on_cpu=jax.default_backend() == "cpu")
    path = options.run_dir / options.size / f"{cfg.name}.json"
    key = fingerprint(cfg, sweep)
    stored = [json.loads(path.read_text())] if path.exists() else []
    stored += json.loads(options.out.read_text())["cells"] if options.out.exists() else []
    same = [one for one in stored if one["fingerprint"] == key]
    if same or not compute:
        return same[0] if same else None
    print(f"{task}, {MODELS[model].label}", flush=True)
    result = {"task": task, "model": model, "fingerprint": key, **run_cell(cfg, sweep)}
    jax.clear_caches()  # no other cell runs these programs
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")  # so that a killed run leaves no partial cell
    draft.write_text(json.dumps(result) + "\n")
    os.replace(draft, path)
    best = best_of(result)
    print(
        f"  {best.mean:6.3f} +- {best.spread:.3f} at {best.lr:g}, {best.at_train_lengths:.3f} at "
        f"lengths of training, {result['seconds']} s",
        flush=True,
    )
    return result


class Best(NamedTuple):
    """Scaled accuracy at lengths 40 to 256 with the learning rate whose mean over seeds is best."""

    lr: float
    mean: float
    spread: float  # half of the range over seeds
    at_train_lengths: float  # mean over seeds, at the same learning rate


def best_of(result: dict[str, Any]) -> Best:
    """The figures of a cell."""
    at_train, longer = (np.array(values) for values in result["scaled_accuracy"].values())
    lrs = np.array(result["lrs"])
    candidates = [
        Best(lr, *_rounded([scores.mean(), np.ptp(scores) / 2, at_train[lrs == lr].mean()]))
        for lr in dict.fromkeys(result["lrs"])
        for scores in [longer[lrs == lr]]
    ]
    return max(candidates, key=lambda best: best.mean)


def outcome(cells: list[dict[str, Any]]) -> dict[str, bool]:
    """Whether each expectation holds, as far as its cells are measured."""
    best = {(cell["task"], cell["model"]): best_of(cell).mean for cell in cells}
    highest = {
        (cell["task"], cell["model"]): max([*cell["scaled_accuracy"].values()][1]) for cell in cells
    }
    mixing = [name for name in MODELS if MODELS[name].has_memory_mixing]
    others = [name for name in MODELS if name not in mixing]
    regular = [name for name in TASKS if TASKS[name].category == "regular"]
    expected = {}
    for name in mixing:
        if ("parity", name) in highest:
            label = MODELS[name].label
            expected[f"parity: {label} above 0.95"] = highest["parity", name] > 0.95
    for name in others:
        if ("parity", name) in highest:
            label = MODELS[name].label
            expected[f"parity: {label} below 0.3"] = highest["parity", name] < 0.3
    if all((task, name) in best for task in regular for name in MODELS):
        mean = {name: np.mean([best[task, name] for task in regular]) for name in MODELS}
        holds = min(mean[name] for name in mixing) > max(mean[name] for name in others)
        expected["regular languages: every model with memory mixing above every other"] = bool(
            holds
        )
    for task in UNSOLVED:
        if all((task, name) in best for name in MODELS):
            values = [best[task, name] for name in MODELS]
            expected[f"{task}: every model below 0.3"] = bool(max(values) < 0.3)
    return expected


def table(cells: list[dict[str, Any]]) -> list[str]:
    """The table of README.md as lines of Markdown: a line per task, a column per model.

    A figure is the mean over seeds of the best learning rate, with the published one in brackets.
    """
    best = {(cell["task"], cell["model"]): best_of(cell).mean for cell in cells}
    labels = [model.label for model in MODELS.values()]
    lines = [["task", "test of the generator", "command", *labels], ["---"] * (3 + len(labels))]
    for task in TASKS:
        test = f"`pytest tests/data/test_formal_languages.py -k {task}`"
        command = f"`python experiments/formal_languages.py --task {task}`"
        figures = [
            (f"{best[task, model]:.2f}" if (task, model) in best else "not measured")
            + (f" ({PUBLISHED[task, model]:.2f})" if (task, model) in PUBLISHED else "")
            for model in MODELS
        ]
        lines.append([task, test, command, *figures])
    return [f"| {' | '.join(line)} |" for line in lines]


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the map: a line per task, a column per model, grouped by the class of the language."""
    plt = record.pyplot()
    cells = {(cell["task"], cell["model"]): best_of(cell) for cell in result["cells"]}
    tasks = [name for name in TASKS if any(name == task for task, _ in cells)]
    models = [name for name in MODELS if any(name == model for _, model in cells)]
    shape = len(tasks), len(models)
    values = np.array([getattr(cells.get((t, m)), "mean", np.nan) for t in tasks for m in models])
    figure, axes = plt.subplots(
        figsize=(2.6 + 0.82 * len(models), 1.8 + 0.46 * len(tasks)), layout="constrained"
    )
    image = axes.imshow(values.reshape(shape), cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (y, task), (x, model) in itertools.product(enumerate(tasks), enumerate(models)):
        if (best := cells.get((task, model))) is not None:
            text = f"{best.mean:.2f}"
            text += f"\n±{best.spread:.2f}" if best.spread >= 0.005 else ""
            color = "black" if best.mean > 0.6 else "white"
            axes.text(x, y, text, ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(models)), [MODELS[m].label for m in models], rotation=35, ha="right")
    axes.set_yticks(range(len(tasks)), [task.replace("_", " ") for task in tasks])
    for y in range(1, len(tasks)):
        if TASKS[tasks[y]].category != TASKS[tasks[y - 1]].category:
            axes.axhline(y - 0.5, color="white", lw=2.5)
    axes.set_title(f"Scaled accuracy at lengths {LENGTHS[0]}–{LENGTHS[1]} (size {result['size']})")
    figure.colorbar(image, ax=axes, shrink=0.6, label="0 is chance, 1 is perfect")
    figure.savefig(path, dpi=120)
    plt.close(figure)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Computes the chosen cells, then writes one JSON file and the map of all finished cells."""

    task: Literal["all", *TASKS] = "all"  # pyright: ignore[reportInvalidTypeForm]
    model: Literal["all", *MODELS] = "all"  # pyright: ignore[reportInvalidTypeForm]
    size: Size = "cpu"
    run_dir: pathlib.Path = pathlib.Path("runs/formal_languages")  # of finished cells, by size
    out: pathlib.Path = RESULTS / "formal_languages.json"  # the map is written next to it


def main(options: Options) -> int:
    """Runs the experiment; returns 0 if all expectations hold (smoke: always), else 1."""
    cpu.prepare()
    result = record.start("formal_languages", options.size)
    for task in TASKS if options.task == "all" else [options.task]:
        for model in MODELS if options.model == "all" else [options.model]:
            cell(options, task, model)
    finished = [cell(options, task, name, compute=False) for task in TASKS for name in MODELS]
    cells: list[dict[str, Any]] = [
        one | {"best": best_of(one)._asdict()} for one in finished if one is not None
    ]
    result |= {"seconds": round(sum(one["seconds"] for one in cells), 1), "cells": cells}
    result["outcome"] = outcome(cells)
    print(*table(cells), sep="\n")
    return record.save(result, options.out, plot)


if __name__ == "__main__":
    record.run(main, Options, __doc__)
