"""Do IsoFLOP curves and a power law of model size appear at budgets that two CPU cores can train?

Published, at 6e18 FLOPs and above (arXiv:2510.02228): the loss at equal compute is a parabola in
the logarithm of the parameters, and its minimum a power law of compute with an exponent of about
0.55. Expected here: every run is within 10 % of its budget; in every family the lowest loss falls
with the budget; at least two thirds of the parabolas are convex; and the exponent is between 0.2
and 0.9. Nothing is claimed about which family is better.

    python experiments/scaling_micro.py                   # all runs, fits, one JSON file, one plot
    xlstm-jax sweep experiments/scaling_micro.py --dry-run            # plan and estimated minutes
    xlstm-jax sweep experiments/scaling_micro.py                      # the runs and their table

Byte-level models of 16,000 to 380,000 parameters on the standard library of Python, 128 bytes at a
time; each budget has three or four sizes. Finished runs are not repeated. Sizes: smoke (seconds),
cpu (42 runs), paper (two more budgets, for an accelerator).
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import record
from xlstm_jax import cpu, scaling
from xlstm_jax.data import DataConfig, tokenizers
from xlstm_jax.modules import LMConfig, MLSTMConfig, SLSTMConfig, at
from xlstm_jax.modules.baselines.options import AttentionConfig
from xlstm_jax.scaling import Point, Shape, Sweep
from xlstm_jax.train import ExperimentConfig, TrainConfig

VOCAB_SIZE = tokenizers.get("byte").vocab_size

SHAPES = {
    1e11: (Shape(16, 2, 4), Shape(24, 2, 4), Shape(32, 2, 4), Shape(48, 2, 4)),
    3e11: (Shape(24, 2, 4), Shape(32, 2, 4), Shape(48, 2, 4), Shape(64, 2, 4)),
    1e12: (Shape(32, 2, 4), Shape(48, 2, 4), Shape(64, 3, 4)),
    3e12: (Shape(48, 2, 4), Shape(64, 3, 4), Shape(96, 3, 4)),
    1e13: (Shape(64, 2, 4), Shape(96, 3, 4), Shape(128, 3, 4)),
    3e13: (Shape(96, 3, 4), Shape(128, 3, 4), Shape(192, 4, 4)),
}
"""Budget in FLOPs -> width, blocks and heads of its models: about 3 to 60 tokens per parameter."""

BUDGETS = {"smoke": (1e9, 3e9), "cpu": tuple(SHAPES)[:4], "paper": tuple(SHAPES)}
SMOKE_SHAPES = (Shape(16, 1, 2), Shape(16, 2, 2), Shape(24, 2, 2))
TRAIN = TrainConfig(
    lr=3e-3,
    warmup_steps=0.1,
    grad_clip=1.0,
    log_every=20,
    eval_every=1_000_000,  # only after the last step
    eval_batches=100,
    checkpoint_every=0,
    keep=1,
    watch="none",
)


def xlstm(shape: Shape) -> LMConfig:
    """xLSTM[1:0]: mLSTM blocks only."""
    return _model(shape, "m" * shape.num_blocks)


def mixed(shape: Shape) -> LMConfig:
    """Like xLSTM[7:1]: the second block is an sLSTM, of at most four."""
    return _model(shape, at(shape.num_blocks, slstm=[1] if shape.num_blocks > 1 else [0]))


def llama(shape: Shape) -> LMConfig:
    """The Transformer of the study."""
    attention = AttentionConfig(num_heads=shape.num_heads, rotary_base=5e5)
    fields: dict[str, Any] = dict(final_norm="rms", final_norm_eps=1e-6, attention=attention)
    return LMConfig(vocab_size=VOCAB_SIZE, dim=shape.dim, pattern="a" * shape.num_blocks, **fields)


def _model(shape: Shape, pattern: str) -> LMConfig:
    heads = shape.num_heads
    return LMConfig(
        vocab_size=VOCAB_SIZE,
        dim=shape.dim,
        pattern=pattern,
        mlstm=MLSTMConfig(num_heads=heads),
        slstm=SLSTMConfig(num_heads=heads),
    )


FAMILIES = {"xlstm_1:0": xlstm, "xlstm_7:1": mixed, "llama": llama}


def sweep(size: str = "cpu") -> Sweep:
    """The runs of one size, a key of `BUDGETS`.

    Raises:
        ConfigError: `size` is unknown.
    """
    record.check_size(size, BUDGETS)
    shapes = SMOKE_SHAPES if size == "smoke" else dict.fromkeys(sum(SHAPES.values(), ()))
    source = "grammar" if size == "smoke" else "stdlib"
    batches = 4 if size == "smoke" else TRAIN.eval_batches
    return Sweep(
        families=FAMILIES,
        shapes=list(shapes),
        budgets=BUDGETS[size],
        seq_len=32 if size == "smoke" else 128,
        batch_rule=lambda point: 4 if size == "smoke" else batch_size(point),
        lr_rule=learning_rate,
        include=lambda point: size == "smoke" or point.shape in SHAPES[point.budget or 0],
        data=DataConfig(source=source),
        train=dataclasses.replace(TRAIN, eval_batches=batches),
    )


def batch_size(point: Point) -> int:
    """Sequences of a step: twice as many from 1e12 FLOPs on, and from 1e13 on."""
    assert point.budget is not None
    return 8 * 2 ** ((point.budget >= 1e12) + (point.budget >= 1e13))


def learning_rate(point: Point) -> float:
    """The peak rate falls with the width, as in the study."""
    return 5e-3 if point.shape.dim <= 48 else 3e-3


def config(size: str = "cpu") -> ExperimentConfig:
    """The first run of a sweep, as an ordinary run."""
    return scaling.plan(sweep(size))[0].cfg


def analyze(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Parabolas and power law of every family, from the runs of a sweep."""
    families = {}
    for name in dict.fromkeys(run["model"] for run in runs):
        mine = [run for run in runs if run["model"] == name]
        budgets = [_fit_budget(mine, c) for c in dict.fromkeys(run["isoflop"] for run in mine)]
        valid = [one for one in budgets if one["inside"]]  # others extrapolate to their minimum
        law = None
        if len(valid) >= 2:
            flops = [one["flops"] for one in valid]
            law = scaling.fit_power_law([one["num_params"] for one in valid], flops)
        exponent = None if law is None else float(law.exponent)
        families[name] = {"budgets": budgets, "exponent": exponent}
    return families


def _fit_budget(runs: Sequence[Mapping[str, Any]], budget: float) -> dict[str, Any]:
    mine = [run for run in runs if run["isoflop"] == budget]
    parabola = scaling.fit_isoflop(
        [run["num_params"] for run in mine], [run["val_loss"] for run in mine]
    )
    return {
        "budget": budget,
        "flops": sum(run["train_flops"] for run in mine) / len(mine),
        "lowest_loss": min(run["val_loss"] for run in mine),
        "convex": bool(parabola.a > 0),
        "inside": bool(parabola.is_valid),
        "num_params": float(parabola.x_opt),
        "coefficients": [float(parabola.a), float(parabola.b), float(parabola.c)],
    }


def outcome(runs: Sequence[Mapping[str, Any]], families: Mapping[str, Any]) -> dict[str, bool]:
    """Expectation, in words -> whether it holds."""
    fits = [one for family in families.values() for one in family["budgets"]]
    exponents = [family["exponent"] for family in families.values()]
    return {
        "every run is within 10 % of its budget": all(
            abs(run["train_flops"] / run["isoflop"] - 1) < 0.1 for run in runs
        ),
        "the lowest loss falls with the budget in every family": all(
            a["lowest_loss"] > b["lowest_loss"]
            for family in families.values()
            for a, b in zip(family["budgets"], family["budgets"][1:], strict=False)
        ),
        "two thirds of the parabolas are convex": sum(x["convex"] for x in fits) * 3
        >= 2 * len(fits),
        "the exponent of the parameters is between 0.2 and 0.9 in every family": all(
            exponent is not None and 0.2 < exponent < 0.9 for exponent in exponents
        ),
    }


def plot(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """Validation loss against parameters, one panel per family and one curve per budget."""
    plt = record.pyplot()
    import numpy as np

    count = len(result["families"])
    figure, axes = plt.subplots(
        1, count, figsize=(3.6 * count, 3.8), sharey=True, layout="constrained"
    )
    for panel, (name, family) in zip(np.atleast_1d(axes), result["families"].items(), strict=True):
        for color, fit in zip("C0 C1 C2 C3 C4 C5".split(), family["budgets"], strict=False):
            mine = [
                run
                for run in result["rows"]
                if (run["model"], run["isoflop"]) == (name, fit["budget"])
            ]
            sizes = [run["num_params"] for run in mine]
            losses = [run["val_loss"] for run in mine]
            panel.plot(sizes, losses, "o", color=color, label=f"{fit['budget']:.0e} FLOPs")
            u = np.linspace(np.log10(min(sizes)), np.log10(max(sizes)), 50)
            panel.plot(10**u, np.polyval(fit["coefficients"], u), color=color, linewidth=1)
        exponent = family["exponent"]
        panel.set_title(f"{name}, N ~ C^{exponent:.2f}" if exponent is not None else name)
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter("")
        panel.set_xlabel("parameters")
    np.atleast_1d(axes)[0].set_ylabel("validation loss, nats per byte")
    handles, labels = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), loc="outside upper center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the script."""

    size: record.Size = "cpu"
    runs: pathlib.Path = pathlib.Path("runs/scaling_micro")  # folder of the runs
    out: pathlib.Path = record.RESULTS / "scaling_micro.json"  # the plot is written next to it


def main(options: Options) -> int:
    """Trains what is missing, fits, writes the record; returns the exit code."""
    result = record.start("scaling_micro", options.size)
    specs = scaling.plan(sweep(options.size))
    launcher = scaling.Local(on_end=lambda one: print(f"{one.name}: {one.state}", flush=True))
    states = scaling.run(specs, options.runs, launcher=launcher)
    if codes := [one.code for one in states if one.state != "finished"]:
        print(f"{len(codes)} of {len(states)} runs are not finished; repeat the command.")
        return max(1, *codes)
    rows = scaling.collect(options.runs).records
    families = analyze(rows)
    result |= {"rows": rows, "families": families, "outcome": outcome(rows, families)}
    return record.save(result, options.out, plot)


if __name__ == "__main__":
    cpu.prepare()
    record.run(main, Options, __doc__)
