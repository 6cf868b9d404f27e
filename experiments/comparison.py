"""Which model predicts text best after equal training: xLSTM or another one?

Published perplexities, at 350M parameters and 15B tokens: xLSTM[1:0] 13.43, xLSTM[7:1]
13.48, Mamba 13.70, Llama 14.25, RWKV-4 15.62. Mamba-2, the gated delta net and the hybrid are not
in that table; an LSTM in a Transformer block is in the ablation of the same paper.

Expected of the size cpu: the parameters of all models are equal within 2 %, the validation loss of
every model falls at every evaluation, and ends below 3 bits per byte (byte frequencies alone have
about 4.8). No order of the models is expected: it is one seed of models of half a million
parameters, all trained at one learning rate on 1.2 million bytes, where the speed of early learning
matters most. The record lists every pair whose order differs from the published one.

    python experiments/comparison.py --size cpu             # all models, one JSON file and one plot
    python experiments/comparison.py --models Llama Mamba   # a part of the models
    xlstm-jax train experiments/comparison.py               # only xLSTM[1:0], as an ordinary run

Finished models are not trained again, an interrupted one is resumed, and the result has all
finished ones. As in the paper, two xLSTM or Mamba blocks replace one block with a feed-forward
layer of its own. "LSTM (block)" is the letter L, an LSTM instead of attention. Widths of
feed-forward or inner layers are chosen so that parameters are equal.

Source: Beck et al. 2024, arXiv:2405.04517, table 1. Sizes: smoke (seconds), cpu (the experiment),
paper (350M presets on SlimPajama, which `--source` names: a folder of `xlstm-jax data prepare`).
"""

import dataclasses
import itertools
import math
import pathlib
import re
from typing import Any

from experiments import record
from experiments.benchmarks import measure
from xlstm_jax import cpu
from xlstm_jax.config import to_dict
from xlstm_jax.data import DataConfig, tokenizers
from xlstm_jax.flops import count_params, train_flops
from xlstm_jax.modules import LMConfig, presets
from xlstm_jax.modules.baselines.options import (
    AttentionConfig,
    GatedDeltaConfig,
    HybridConfig,
    LSTMConfig,
    Mamba2Config,
    MambaConfig,
    RWKV4Config,
)
from xlstm_jax.train import ExperimentConfig, TrainConfig, fit, rundir

LEVEL = 3.0
"""Bits per byte that every model must go below at the size cpu."""

TOLERANCE = 0.02
"""Largest relative difference between the numbers of parameters at the size cpu."""

PUBLISHED = {
    "xLSTM[1:0]": 13.43,
    "xLSTM[7:1]": 13.48,
    "Mamba": 13.70,
    "Llama": 14.25,
    "RWKV-4": 15.62,
}
"""Perplexity at 350M parameters and 15B tokens; the best first."""

_RMS: dict[str, Any] = dict(final_norm="rms")
_RWKV: dict[str, Any] = dict(
    embedding_norm="layer_scale", final_norm="layer_scale", final_norm_bias=True
)
MODELS: dict[str, dict[str, Any]] = {
    "xLSTM[1:0]": dict(pattern="m" * 8),
    "xLSTM[7:1]": dict(pattern="mmmsmmmm"),
    "Llama": dict(pattern="a" * 4, attention=AttentionConfig(ffn_dim=312), **_RMS),
    "Mamba": dict(pattern="b" * 8, mamba=MambaConfig(inner_dim=180), **_RMS),
    "Mamba-2": dict(pattern="B" * 8, mamba2=Mamba2Config(head_dim=32, state_dim=32), **_RMS),
    "gated delta net": dict(pattern="d" * 4, gated_delta=GatedDeltaConfig(ffn_dim=240), **_RMS),
    "RWKV-4": dict(pattern="r" * 4, rwkv4=RWKV4Config(ffn_dim=416), **_RWKV),
    "LSTM (block)": dict(pattern="L" * 4, lstm=LSTMConfig(ffn_dim=280)),
    "hybrid": dict(pattern="h" * 4, hybrid=HybridConfig(window=64, ffn_dim=280), **_RMS),
}
"""Name -> fields of `LMConfig` at the size cpu, of width 96: 551,480 to 561,696 parameters."""

PRESETS = {
    "xLSTM[1:0]": "xlstm_350m_1:0",
    "xLSTM[7:1]": "xlstm_350m_7:1",
    "Llama": "llama_350m",
    "Mamba": "mamba_350m",
    "Mamba-2": "mamba2_350m",
    "gated delta net": "gated_delta_350m",
    "RWKV-4": "rwkv4_350m",
}
"""Name -> preset at the size paper; the other models have no preset."""

CPU = ExperimentConfig(
    name="xLSTM[1:0]",
    model=LMConfig(vocab_size=tokenizers.get("byte").vocab_size, dim=96, **MODELS["xLSTM[1:0]"]),
    data=DataConfig(source="stdlib", seq_len=256, batch_size=16),
    train=TrainConfig(
        steps=300,
        lr=3e-3,
        warmup_steps=0.1,
        grad_clip=1.0,
        eval_every=50,
        eval_batches=16,
        checkpoint_every=100,
        watch="none",
    ),
)
SMOKE = dataclasses.replace(
    CPU,
    model=dataclasses.replace(CPU.model, dim=32),
    data=dataclasses.replace(CPU.data, source="grammar", seq_len=32, batch_size=4),
    train=dataclasses.replace(
        CPU.train, steps=10, eval_every=5, eval_batches=2, log_every=5, checkpoint_every=0
    ),
)
PAPER = dataclasses.replace(
    CPU,
    model=presets.get(PRESETS["xLSTM[1:0]"]),
    data=DataConfig(source="slimpajama", seq_len=2048, batch_size=256),
    train=TrainConfig(
        steps=30_000,
        lr=1e-3,
        warmup_steps=750,
        eps=1e-5,
        grad_clip=1.0,
        eval_every=2817,  # compared after one epoch, at step 28,170
        eval_batches=None,
        watch="none",
    ),
)
SIZES = {"smoke": SMOKE, "cpu": CPU, "paper": PAPER}


def config(
    size: str = "cpu", name: str = "xLSTM[1:0]", source: str | None = None
) -> ExperimentConfig:
    """The run of one model, a key of `MODELS`.

    Args:
        source: of the data; None: that of the size.

    Raises:
        ConfigError: `size` or `name` is unknown.
    """
    record.check_size(size, SIZES)
    record.check_names((name,), MODELS)
    cfg = SIZES[size]
    data = cfg.data if source is None else dataclasses.replace(cfg.data, source=source)
    return dataclasses.replace(cfg, name=name, model=model_of(size, name), data=data)


def model_of(size: str, name: str) -> LMConfig:
    """One model at one size."""
    if size == "paper":
        if name in PRESETS:
            return presets.get(PRESETS[name])
        like = presets.get(PRESETS["Llama"])
        return dataclasses.replace(like, pattern=MODELS[name]["pattern"][0] * like.num_blocks)
    cfg, fields = SIZES[size].model, dict(MODELS[name])
    if size == "smoke":  # one block of each kind, which compiles in seconds
        fields["pattern"] = "".join(dict.fromkeys(fields["pattern"]))
    return LMConfig(vocab_size=cfg.vocab_size, dim=cfg.dim, **fields)


def folder_of(runs: pathlib.Path, size: str, name: str) -> pathlib.Path:
    """The folder of the run of one model."""
    return runs / re.sub(r"[^a-z0-9]+", "_", f"{size}_{name}".lower()).strip("_")


def finished(cfg: ExperimentConfig, folder: pathlib.Path) -> dict[str, Any] | None:
    """What a finished run measured; None if it is not finished."""
    records = rundir.read_metrics(folder / rundir.METRICS)
    valid = {r["step"]: r["valid_bits_per_byte"] for r in records if "valid_loss" in r}
    train = {r["step"]: r["loss"] / math.log(2) for r in records if "loss" in r}
    if not (valid and train) or max(valid) < cfg.train.steps:
        return None
    tokens, times = cfg.data.batch_size * cfg.data.seq_len, [r.get("step_time") for r in records]
    return {
        "pattern": cfg.model.pattern,
        "parameters": count_params(cfg.model),
        "flops_per_token": train_flops(cfg.model, cfg.data.seq_len) / cfg.data.seq_len,
        "bits_per_byte": valid[max(valid)],
        # Other load only slows steps down, so the fastest interval is the most accurate.
        "tokens_per_second": tokens / min(filter(None, times)),
        "curve": valid,
        "train_bits_per_token": train,
    }


def train(cfg: ExperimentConfig, folder: pathlib.Path) -> bool:
    """Trains or resumes one run, unless it is finished; returns whether it is now."""
    if finished(cfg, folder) is None:
        print(f"{cfg.name}: {count_params(cfg.model):,} parameters", flush=True)
        fit(cfg, folder)
    if (measured := finished(cfg, folder)) is None:
        return False
    print(
        f"{cfg.name}: {measured['bits_per_byte']:.4f} bits per byte, "
        f"{measured['tokens_per_second']:,.0f} tokens/s",
        flush=True,
    )
    return True


def outcome(size: str, models: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Whether each expectation holds, as far as the models are trained."""
    curves = [list(model["curve"].values()) for model in models.values()]
    falls = all(a > b for curve in curves for a, b in itertools.pairwise(curve))
    checks = {"the validation loss of every model falls at every evaluation": falls}
    if size == "cpu":
        counts = [model["parameters"] for model in models.values()]
        equal = max(counts) <= (1 + TOLERANCE) * min(counts)
        below = all(model["bits_per_byte"] < LEVEL for model in models.values())
        checks["parameters are equal within 2 %"] = equal
        checks[f"every model ends below {LEVEL:g} bits per byte"] = below
    return checks


def reversed_pairs(models: dict[str, dict[str, Any]]) -> list[str]:
    """The pairs of models whose order differs from the published one, in words."""
    names = [name for name in PUBLISHED if name in models]
    bits = {name: models[name]["bits_per_byte"] for name in names}
    return [
        f"{worse} ({bits[worse]:.3f}) is ahead of {better} ({bits[better]:.3f})"
        for better, worse in itertools.combinations(names, 2)
        if bits[worse] < bits[better]
    ]


def table(models: dict[str, dict[str, Any]]) -> str:
    """A Markdown table, the best model first."""
    header = ["model", "parameters", "FLOPs per token", "bits per byte", "tokens/s"]
    lines = [
        [
            name,
            f"{model['parameters']:,}",
            f"{model['flops_per_token'] / 1e6:.2f} M",
            f"{model['bits_per_byte']:.3f}",
            f"{model['tokens_per_second']:,.0f}",
        ]
        for name, model in sorted(models.items(), key=lambda item: item[1]["bits_per_byte"])
    ]
    return measure.table(header, lines)


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Plots validation bits per byte over steps, and the last value over tokens per second."""
    plt = record.pyplot()
    figure, (curves, speed) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for number, (name, model) in enumerate(result["models"].items()):
        style = dict(color=f"C{number}", lw=2.5 if name.startswith("xLSTM") else 1.4)
        steps, values = map(list, (model["curve"], model["curve"].values()))
        curves.plot(steps, values, "o-", ms=4, label=name, **style)
        point = model["tokens_per_second"] / 1e3, model["bits_per_byte"]
        speed.plot(*point, "o", ms=9, color=style["color"])
        label = dict(textcoords="offset points", fontsize=9, ha="center")
        speed.annotate(name, point, (0, 9 if number % 2 else -17), **label)  # may be close
    curves.set_xlabel("step")
    curves.set_ylabel("validation bits per byte")
    curves.legend(frameon=False, fontsize=9)
    speed.set_xlabel("thousand tokens per second")
    speed.set_ylabel("validation bits per byte after the last step")
    speed.margins(x=0.25, y=0.12)
    for axes in (curves, speed):
        axes.grid(alpha=0.3)
    figure.suptitle("Equal parameters, equal text, one learning rate, one seed")
    figure.savefig(path, dpi=110)
    plt.close(figure)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains what is not finished and writes one JSON file and one plot of all finished models."""

    size: record.Size = "cpu"
    models: tuple[str, ...] = tuple(MODELS)  # names in MODELS
    source: str | None = None  # of the data; None: that of the size
    runs: pathlib.Path = pathlib.Path("runs/comparison")  # folder of all runs
    out: pathlib.Path = record.RESULTS / "comparison.json"  # the plot is written next to it


def main(options: Options) -> int:
    """Runs the experiment; returns 0 if all expectations hold (smoke: always), else 1."""
    cpu.prepare()
    record.check_names(options.models, MODELS)
    configs = {name: config(options.size, name, options.source) for name in MODELS}
    folders = {name: folder_of(options.runs, options.size, name) for name in MODELS}
    for name in options.models:
        if not train(configs[name], folders[name]):
            break  # stopped; the same command resumes
    measured = {name: finished(cfg, folders[name]) for name, cfg in configs.items()}
    models = {name: model for name, model in measured.items() if model is not None}
    if not models:
        return 1
    result = record.start("comparison", options.size)
    result |= {"config": to_dict(SIZES[options.size]), "models": models}
    result["outcome"] = outcome(options.size, models)
    result["not_finished"] = [name for name in MODELS if name not in models]
    result["order_unlike_published"] = reversed_pairs(models)
    print(table(models))
    for pair in result["order_unlike_published"]:
        print(f"unlike at 350M parameters: {pair}")
    return record.save(result, options.out, plot)


if __name__ == "__main__":
    record.run(main, Options, __doc__)
