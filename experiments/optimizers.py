"""Does Muon, Lion or a schedule-free optimizer train a small xLSTM better than AdamW?

Published: Muon needs about half the computation of AdamW for the same loss of Transformers (Liu et
al. 2025, arXiv:2502.16982), Lion matches AdamW (Chen et al. 2023, arXiv:2302.06675), and the
schedule-free AdamW matches a tuned schedule (Defazio et al. 2024, arXiv:2405.15682). Expected: Muon
has fewer validation bits per byte than AdamW with every seed; the means of the other two are within
3 % of that of AdamW.

    python experiments/optimizers.py --size cpu             # all runs, one JSON file and one plot
    python experiments/optimizers.py --optimizers muon adamw --seeds 1      # a part of the runs
    xlstm-jax train experiments/optimizers.py               # only Muon, as an ordinary run

The model and the data are those of char_lm.py; only the optimizer and its learning rate differ. The
rate is the best of three (`RATES`) in short runs with seed 0; other seeds are then trained at this
rate. All schedules are cosine, except that the schedule-free one stays constant after warm-up.
Finished runs are not repeated, and the result has all finished ones. A larger model may rank
optimizers differently. Sizes: smoke (seconds), cpu (the experiment), paper (an accelerator).
"""

import dataclasses
import json
import pathlib
import statistics
import sys
from typing import Any, Literal

import tyro

from experiments import char_lm
from experiments.benchmarks import measure
from xlstm_jax import cpu
from xlstm_jax.train import ExperimentConfig, fit, rundir
from xlstm_jax.train.config import OptimizerName

RATES: dict[OptimizerName, tuple[float, ...]] = {
    "muon": (3e-3, 1e-2, 3e-2),
    "adamw": (1e-3, 3e-3, 1e-2),
    "lion": (3e-4, 1e-3, 3e-3),
    "schedule_free_adamw": (1e-3, 3e-3, 1e-2),
}
"""Optimizer -> candidates for its peak learning rate; the size smoke has only the second."""

LABELS = dict(zip(RATES, ("Muon", "AdamW", "Lion", "schedule-free AdamW"), strict=True))
SEARCH_STEPS = {"smoke": 10, "cpu": 100, "paper": 1000}  # of the run for each candidate
SEARCH_SEED, SEEDS = 0, (1, 2, 3)
RESULTS = pathlib.Path(__file__).parent / "results"


def config(
    size: str = "cpu",
    optimizer: OptimizerName = "muon",
    lr: float = 3e-3,
    seed: int = SEEDS[0],
    *,
    search: bool = False,
) -> ExperimentConfig:
    """One run; `search` makes it one of the short runs that select the learning rate.

    Raises:
        ConfigError: `size` is unknown.
    """
    cfg = char_lm.config(size)
    steps = SEARCH_STEPS[size] if search else cfg.train.steps
    train = dataclasses.replace(
        cfg.train,
        steps=steps,
        optimizer=optimizer,
        lr=lr,
        schedule="constant" if optimizer == "schedule_free_adamw" else "cosine",
        seed=seed,
        log_every=5,
        eval_every=steps if search else max(1, steps // 10),
        checkpoint_every=0,
    )
    data = dataclasses.replace(cfg.data, seed=seed)
    kind = "search" if search else "run"
    name = f"{size}_{kind}_{optimizer}_{lr:g}_{seed}"
    return dataclasses.replace(cfg, name=name, train=train, data=data)


def evaluations(cfg: ExperimentConfig, runs: pathlib.Path) -> list[dict[str, Any]] | None:
    """The validation metrics of a finished run; None if it is not finished."""
    records = rundir.read_metrics(runs / cfg.name / rundir.METRICS)
    valid = [record for record in records if "valid_bits_per_byte" in record]
    return valid if valid and valid[-1]["step"] == cfg.train.steps else None


def train(cfg: ExperimentConfig, runs: pathlib.Path) -> float:
    """Trains, resumes or reads one run; returns its final validation bits per byte."""
    if evaluations(cfg, runs) is None:
        print(f"{cfg.name}: {cfg.train.steps} steps", flush=True)
        fit(cfg, runs / cfg.name)
    valid = evaluations(cfg, runs)
    assert valid is not None
    print(f"{cfg.name}: {valid[-1]['valid_bits_per_byte']:.4f} bits per byte", flush=True)
    return valid[-1]["valid_bits_per_byte"]


def searches(size: str, optimizer: OptimizerName) -> dict[float, ExperimentConfig]:
    """A short run for each candidate rate."""
    rates = RATES[optimizer][1:2] if size == "smoke" else RATES[optimizer]
    return {lr: config(size, optimizer, lr, SEARCH_SEED, search=True) for lr in rates}


def finished(size: str, runs: pathlib.Path) -> list[dict[str, Any]]:
    """One record for each optimizer with a complete search and a finished run."""
    records = []
    for optimizer in RATES:
        results = {lr: evaluations(cfg, runs) for lr, cfg in searches(size, optimizer).items()}
        if None in results.values():
            continue  # the search is not complete
        losses = {lr: e[-1]["valid_bits_per_byte"] for lr, e in results.items() if e}
        lr = min(losses, key=losses.__getitem__)
        curves, times = {}, []
        for path in sorted(runs.glob(f"{size}_run_{optimizer}_{lr:g}_*")):
            seed = int(path.name.rsplit("_", 1)[1])
            cfg = config(size, optimizer, lr, seed)
            if (valid := evaluations(cfg, runs)) is not None:
                curves[seed] = {e["step"]: e["valid_bits_per_byte"] for e in valid}
                metrics = rundir.read_metrics(path / rundir.METRICS)
                times += [record["step_time"] for record in metrics if "step_time" in record]
        if curves:
            final = [list(curve.values())[-1] for curve in curves.values()]
            records.append(
                {
                    "optimizer": optimizer,
                    "lr": lr,
                    "search": losses,
                    "final": dict(zip(curves, final, strict=True)),
                    "mean": statistics.fmean(final),
                    "step_seconds": statistics.median(times) if times else None,
                    "curves": curves,
                }
            )
    return records


def outcome(records: list[dict[str, Any]]) -> dict[str, bool]:
    """Whether each expectation holds, as far as the optimizers are trained."""
    by_name = {record["optimizer"]: record for record in records}
    if (adamw := by_name.pop("adamw", None)) is None:
        return {}
    checks = {}
    if (muon := by_name.pop("muon", None)) is not None:
        seeds = muon["final"].keys() & adamw["final"].keys()
        better = [muon["final"][seed] < adamw["final"][seed] for seed in seeds]
        checks["Muon below AdamW with every seed"] = bool(better) and all(better)
    for name, record in by_name.items():
        difference = abs(record["mean"] / adamw["mean"] - 1)
        checks[f"{LABELS[name]} within 3 % of AdamW"] = difference < 0.03
    return checks


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table of all optimizers."""
    lines = [
        [
            LABELS[record["optimizer"]],
            f"{record['lr']:g}",
            ", ".join(f"{value:.3f}" for value in record["final"].values()),
            f"{record['mean']:.3f}",
            "" if record["step_seconds"] is None else f"{record['step_seconds']:.2f}",
        ]
        for record in records
    ]
    header = ["optimizer", "rate", "bits per byte of each seed", "mean", "seconds per step"]
    return measure.table(header, lines)


def plot(records: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Plots validation bits per byte over steps: the mean of the seeds, and their range."""
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for record, color in zip(records, ("C3", "C0", "C2", "C1"), strict=False):
        steps = list(next(iter(record["curves"].values())))
        by_seed = np.array([list(curve.values()) for curve in record["curves"].values()])
        label = f"{LABELS[record['optimizer']]}, rate {record['lr']:g}"
        axes.plot(steps, by_seed.mean(axis=0), "o-", ms=4, lw=2, color=color, label=label)
        axes.fill_between(
            steps, by_seed.min(axis=0), by_seed.max(axis=0), color=color, alpha=0.2, lw=0
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in (1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8) if low < tick < high])
    axes.set_xlabel("step", fontsize=13)
    axes.set_ylabel("validation bits per byte", fontsize=13)
    axes.tick_params(labelsize=12)
    axes.grid(alpha=0.3)
    axes.set_title("Optimizers at their best rates: mean and range of the seeds", fontsize=13)
    axes.legend(frameon=False, fontsize=12)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains what is not finished and writes one JSON file and one plot of all finished runs."""

    size: Literal["smoke", "cpu", "paper"] = "cpu"
    optimizers: tuple[OptimizerName, ...] = tuple(RATES)  # names in RATES
    seeds: tuple[int, ...] = SEEDS  # of the runs after the search
    runs: pathlib.Path = pathlib.Path("runs/optimizers")  # folder of all runs
    out: pathlib.Path = RESULTS / "optimizers.json"  # the plot is written next to it


def main(options: Options) -> int:
    """Runs the experiment; returns 0 if all expectations hold (smoke: always), else 1."""
    cpu.prepare()
    for optimizer in options.optimizers:
        short = searches(options.size, optimizer)
        losses = {lr: train(cfg, options.runs) for lr, cfg in short.items()}
        lr = min(losses, key=losses.__getitem__)
        for seed in options.seeds:
            train(config(options.size, optimizer, lr, seed), options.runs)
    records = finished(options.size, options.runs)
    expectations = outcome(records)
    result = measure.run_info("optimizers") | {"size": options.size, "outcome": expectations}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result | {"records": records}, indent=1) + "\n")
    plot(records, options.out.with_suffix(".png"))
    print(table(records))
    for expectation, holds in expectations.items():
        print(f"{'yes' if holds else 'NO '}  {expectation}")
    return 0 if options.size == "smoke" or all(expectations.values()) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
