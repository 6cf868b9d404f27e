"""Shared by the experiments with language models: published settings, small models, runs.

Source: Beck et al. 2024, arXiv:2405.04517, appendix B.2: table of sizes with learning rates, and
the settings of the studies with 15B and 300B tokens of SlimPajama (tokenizer of GPT-2, context
2048). The warm-up of the study with 300B tokens is not published; that of the other one is used.
"""

import dataclasses
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments import record
from xlstm_jax.config import ConfigError
from xlstm_jax.data import DataConfig, eval_batches, load, tokenizers
from xlstm_jax.errors import quote, quote_path
from xlstm_jax.modules import LM, LMConfig, MLSTMConfig, SLSTMConfig, presets, ratio_pattern
from xlstm_jax.modules.baselines import presets as baselines
from xlstm_jax.modules.baselines.options import AttentionConfig
from xlstm_jax.train import ExperimentConfig, TrainConfig

Tokens = Literal["15b", "300b"]

FAMILIES = {
    "rwkv4": "rwkv4_{}",
    "llama": "llama_{}",
    "mamba": "mamba_{}",
    "xlstm_1:0": "xlstm_{}_1:0",
    "xlstm_7:1": "xlstm_{}_7:1",
}
"""Family -> its presets."""

LABELS = {
    "rwkv4": "RWKV-4",
    "llama": "Llama",
    "mamba": "Mamba",
    "xlstm_1:0": "xLSTM[1:0]",
    "xlstm_7:1": "xLSTM[7:1]",
}

SIZES = ("125m", "350m", "760m", "1.3b", "2.7b")

_XLSTM: dict[Tokens, tuple[float, ...]] = {
    "15b": (3e-3, 1e-3, 9e-4, 9e-4, 8e-4),
    "300b": (1.5e-3, 7.5e-4, 6.25e-4, 5e-4),
}
_LLAMA: dict[Tokens, tuple[float, ...]] = {
    "15b": (3e-3, 1.5e-3, 1.25e-3, 1e-3, 8e-4),
    "300b": (3e-3, 1.5e-3, 1.25e-3, 1e-3),
}
RATES: dict[str, dict[Tokens, tuple[float, ...]]] = {
    "rwkv4": {"15b": (3e-3, 1e-3, 2e-3, 1e-3, 8e-4), "300b": (6e-4, 4e-4, 2.5e-4, 2e-4)},
    "llama": _LLAMA,
    "mamba": _LLAMA,
    "xlstm_1:0": _XLSTM,
    "xlstm_7:1": _XLSTM,
}
"""Peak learning rates by `SIZES`; nothing larger than 1.3b was trained on 300B tokens."""

COMPARED_STEP = 28_170
"""Step of the study with 15B tokens at which models are compared: the end of one epoch."""

DATA = "slimpajama"
"""Folder of the prepared data unless `--data` or `--data.source` names another one."""

_TRAIN = TrainConfig(
    steps=30_000,
    lr=1e-3,
    warmup_steps=750,
    end_factor=0.1,
    b2=0.95,
    eps=1e-5,
    weight_decay=0.1,
    grad_clip=1.0,
    log_every=10,
    # A tenth of the compared step.
    eval_every=COMPARED_STEP // 10,
    checkpoint_every=COMPARED_STEP // 10,
    eval_batches=100,
)


def published(name: str, model: LMConfig, lr: float = 1e-3, tokens: Tokens = "15b"):
    """A run with the published settings.

    Args:
        lr: peak learning rate; 1e-3 in the comparison at 15B tokens and in the ablations.
        tokens: of the study. That with 300B tokens has 600,000 steps of 256 sequences, or half as
            many of 512 from 1.3b on.
    """
    train, batch_size = dataclasses.replace(_TRAIN, lr=lr), 256
    if tokens == "300b":
        is_large = model.dim >= 2048
        steps, batch_size = (300_000, 512) if is_large else (600_000, 256)
        train = dataclasses.replace(train, steps=steps, eval_every=5000, checkpoint_every=5000)
    data = DataConfig(source=DATA, seq_len=2048, batch_size=batch_size)
    return ExperimentConfig(name=name, model=model, data=data, train=train)


def check_data(folder: pathlib.Path) -> None:
    """Raises ConfigError unless the folder has prepared data."""
    if not (folder / "manifest.json").is_file():
        raise ConfigError(
            "--data must be a folder of `xlstm-jax data prepare` (manifest.json, tokenizer/, "
            f"train/, valid/) with SlimPajama in tokens of GPT-2, got {quote_path(folder)}; "
            "prepare it, see docs/data.md."
        )


def parse_size(size: str, sizes: Sequence[str], variants: Sequence[str], default: str):
    """The two parts of SIZE or SIZE:VARIANT, as `--size` of `xlstm-jax train` passes them.

    Raises:
        ConfigError: one of them is unknown.
    """
    name, _, variant = size.partition(":")
    record.check_size(name, sizes)
    variant = variant or default
    if variant not in variants:
        raise ConfigError(
            f"variant {quote(variant)} of size={quote(size)} is unknown; use one of: "
            f"{', '.join(variants)}."
        )
    return name, variant


def small_model(family: str, dim: int, blocks: int = 8) -> LMConfig:
    """A model of bytes with the proportions of its family.

    Args:
        blocks: of models without a feed-forward layer; others have half as many.
    """
    shared: dict[str, Any] = dict(vocab_size=tokenizers.get("byte").vocab_size, dim=dim)
    if family.startswith("xlstm"):
        # Not rounded to multiples of 64, which are large steps at these widths.
        cells: dict[str, Any] = dict(
            mlstm=MLSTMConfig(num_heads=4, inner_dim=2 * dim), slstm=SLSTMConfig(num_heads=4)
        )
        pattern = "m" * blocks if family == "xlstm_1:0" else ratio_pattern("7:1", blocks)
        return LMConfig(pattern=pattern, **shared, **cells)
    if family == "llama":
        attention = AttentionConfig(num_heads=4)
        return LMConfig(
            pattern="a" * (blocks // 2), final_norm="rms", **shared, attention=attention
        )
    if family == "mamba":
        return LMConfig(pattern="b" * blocks, final_norm="rms", **shared)
    model = baselines.rwkv4(shared["vocab_size"], dim, blocks // 2)
    return dataclasses.replace(model, dtype="float32", remat="none")


SMALL_TRAIN = TrainConfig(
    steps=200, warmup_steps=0.1, end_factor=0.1, grad_clip=1.0, log_every=50, watch="none"
)
SMALL_DATA = DataConfig(source="stdlib", seq_len=128, batch_size=8)
SMOKE_DATA = DataConfig(source="grammar", seq_len=16, batch_size=2)


class Losses(NamedTuple):
    """Validation losses of a grid, in bits per token, which is a byte or the end of a document."""

    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    by_lr: list[list[float]]  # per learning rate, of every seed
    parameters: int

    @property
    def best(self) -> int:
        """The index of the learning rate with the lowest mean."""
        means = [math.inf if math.isnan(m := np.mean(losses)) else m for losses in self.by_lr]
        return int(np.argmin(means))

    def to_json(self) -> dict[str, Any]:
        """Mean and values at the best learning rate, and the means at all of them."""
        losses = self.by_lr[self.best]
        return {
            "parameters": self.parameters,
            "lr": self.lrs[self.best],
            "bits_per_token": round(float(np.mean(losses)), 4),
            "by_seed": {str(s): round(x, 4) for s, x in zip(self.seeds, losses, strict=True)},
            "mean_by_lr": {
                f"{lr:g}": round(float(np.mean(losses)), 4)
                for lr, losses in zip(self.lrs, self.by_lr, strict=True)
            },
        }


def train_small(
    cfg: ExperimentConfig, seeds: Sequence[int], lrs: Sequence[float], num_eval: int = 40
) -> Losses:
    """Trains a model with every seed and learning rate at once, and evaluates all of them."""
    import jax

    from xlstm_jax.train.grid import batches_of, evaluate_grid, train_grid

    train, valid = load(cfg.data, "train"), load(cfg.data, "valid")

    batches = batches_of(train, cfg.data)
    model = LM(cfg.model)
    grid = train_grid(model, cfg.train, batches, seeds=tuple(seeds), lrs=tuple(lrs))
    spread = list(eval_batches(valid, cfg.data))
    spread = spread[:: max(1, len(spread) // num_eval)][:num_eval]
    sums = evaluate_grid(model, grid.params, spread, cfg.train)
    bits = np.asarray(sums.ce_sum / sums.weight_sum, np.float64) / math.log(2)
    parameters = sum(leaf[0].size for leaf in jax.tree.leaves(grid.params))
    by_lr = bits.reshape(len(seeds), len(lrs)).T.tolist()
    return Losses(tuple(lrs), tuple(seeds), by_lr, parameters)


def train_published(
    configs: Mapping[str, ExperimentConfig],
    data: pathlib.Path,
    runs: pathlib.Path,
    step: int | None = None,
) -> dict[str, float | None]:
    """Trains or resumes every run; the validation perplexity of each, None without one.

    Args:
        step: of the evaluation; None: the last one.
    """
    from xlstm_jax.train import fit, rundir

    check_data(data)
    perplexities = {}
    for name, cfg in configs.items():
        source = dataclasses.replace(cfg.data, source=str(data))
        cfg = dataclasses.replace(cfg, data=source)
        if not fit(cfg, runs / cfg.name, console=True).finished:
            sys.exit(f"{cfg.name}: stopped and saved; the same command resumes it")
        records = rundir.read_metrics(runs / cfg.name / rundir.METRICS)
        at = cfg.train.steps if step is None else step
        losses = [r["valid_loss"] for r in records if r["step"] == at and r.get("valid_loss")]
        perplexities[name] = math.exp(losses[-1]) if losses else None
    return perplexities


def published_preset(family: str, size: str) -> LMConfig:
    """The preset of a family at one of `SIZES`."""
    return presets.get(FAMILIES[family].format(size))


def small_run(size: str, family: str) -> ExperimentConfig:
    """The run of a small model, for experiments that evaluate trained ones."""
    is_smoke = size == "smoke"
    train = dataclasses.replace(SMALL_TRAIN, steps=300, lr=5e-3, eval_every=0)
    if is_smoke:
        train = dataclasses.replace(train, steps=4, log_every=2)
    model = small_model(family, 16 if is_smoke else 64, 2 if is_smoke else 8)
    data = SMOKE_DATA if is_smoke else dataclasses.replace(SMALL_DATA, batch_size=16)
    return ExperimentConfig(name=f"{size}_{family}", model=model, data=data, train=train)


def trained(cfg: ExperimentConfig, runs: pathlib.Path) -> pathlib.Path:
    """Trains a run unless it is finished; returns its folder."""
    from xlstm_jax.train import checkpoint, fit, rundir

    folder = runs / cfg.name
    is_finished = rundir.is_run(folder) and cfg.train.steps in checkpoint.steps(folder)
    if not is_finished:
        print(f"{cfg.name}: {cfg.train.steps} steps", flush=True)
        if not fit(cfg, folder).finished:
            sys.exit(f"{cfg.name}: stopped and saved; the same command resumes it")
    return folder
