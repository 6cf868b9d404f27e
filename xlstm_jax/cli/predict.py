"""`xlstm-jax predict --flops C`: the compute-optimal run at a budget, from fitted scaling laws."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from xlstm_jax.cli import console, options
from xlstm_jax.cli.exit_codes import DONE
from xlstm_jax.config import ConfigError, check_range
from xlstm_jax.modules import presets
from xlstm_jax.scaling import store
from xlstm_jax.scaling.prediction import Interval, Prediction, family_of, find_group, predict

DEFAULT_SEQ_LEN = 2048
"""Used if neither an option nor the table gives a context length."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictCommand:
    """Predicts size, tokens and loss of the best run at a compute budget."""

    flops: float  # budget of training, forward and backward
    fit: Path = Path("fits/fit.json")  # file of `xlstm-jax fit`
    family: str | None = None  # of the fit: "xlstm", "llama" or a model of the table
    seq_len: int | None = None  # tokens per sequence; that of the fit by default
    batch_tokens: int = 2**20  # tokens per step of the run that is proposed
    out: Path | None = None  # CONFIG.py to write: the run that is proposed
    json: bool = False  # print the figures as JSON


class Proposal(NamedTuple):
    """The run of the preset nearest to the prediction."""

    preset: str
    seq_len: int
    batch_size: int
    steps: int
    lr: float
    train: str  # command lines
    plan: str


class PredictResult(NamedTuple):
    """The output of `predict --json`."""

    prediction: Prediction
    proposal: Proposal | None


def run(argv: list[str]) -> int:
    """Runs `predict`; raises ConfigError if an option or the fit is invalid."""
    args = options.parse("predict", PredictCommand, argv)
    if args.out is not None:
        options.check_out(args.out)
    if args.batch_tokens < 1 or (args.seq_len is not None and args.seq_len < 1):
        raise ConfigError(
            "--batch-tokens and --seq-len must be at least 1, got "
            f"{args.batch_tokens} and {args.seq_len}; change them."
        )
    check_range("flops", args.flops, "above 0")
    fit = find_group(store.load(args.fit), family=args.family, seq_len=args.seq_len)
    family = family_of(args.family or fit.group.get("model", ""))
    seq_len = args.seq_len or _context_of(fit.group) or DEFAULT_SEQ_LEN
    prediction = predict(fit, args.flops, seq_len=seq_len, family=family)
    proposal = propose(prediction, family, seq_len, args) if prediction.choice else None
    if args.out is not None:
        if proposal is None:
            raise ConfigError(f"--out needs a family with presets, got {family!r}; leave it out.")
        args.out.write_text(config_file(prediction, proposal))
    if args.json:
        console.print_json(PredictResult(prediction, proposal))
        return DONE
    console.print_fields(_fields(prediction, proposal))
    return DONE


def propose(prediction: Prediction, family: str, seq_len: int, args: PredictCommand) -> Proposal:
    """The run of the nearest preset: batch size, steps and learning rate of arXiv:2510.02228."""
    choice = prediction.choice
    assert choice is not None
    batch_size = max(args.batch_tokens // seq_len, 1)
    steps = max(round(choice.tokens / (batch_size * seq_len)), 1)
    lr = learning_rate(family, presets.get(choice.preset).dim)
    config = args.out or Path("optimal.py")
    name = shlex.quote(str(config))
    train = f"xlstm-jax train {name} --data.source DATA"
    if args.out is None:
        family_option = f" --family {shlex.quote(args.family)}" if args.family else ""
        train = (
            f"xlstm-jax predict --flops {args.flops:g} --fit {shlex.quote(str(args.fit))}"
            f"{family_option} --seq-len {seq_len} --batch-tokens {args.batch_tokens} --out {name} "
            f"&& {train}"
        )
    plan = (
        f"xlstm-jax plan {choice.preset} --topology v5e:16x16 --data.seq-len {seq_len} "
        f"--data.batch-size {batch_size} --train.steps {steps} --train.lr {lr:g}"
    )
    return Proposal(choice.preset, seq_len, batch_size, steps, lr, train, plan)


def learning_rate(family: str, dim: int) -> float:
    """Peak learning rate of the IsoFLOP runs of arXiv:2510.02228, at 2^20 tokens a step."""
    if dim <= 1024:
        return 3e-3
    if family == "xlstm":
        return 2e-3
    return 1e-3 if dim < 2048 else 8e-4


def config_file(prediction: Prediction, proposal: Proposal) -> str:
    """A CONFIG.py that trains the proposed run."""
    return f'''"""Compute-optimal training of {proposal.preset} for {prediction.flops:.4g} FLOPs.

Predicted loss: {prediction.loss:.4f} nats per token of the data that the laws were fitted to.
"""

from xlstm_jax.data import DataConfig
from xlstm_jax.modules import presets
from xlstm_jax.train import ExperimentConfig, TrainConfig


def config() -> ExperimentConfig:
    """Pass --data.source and --data.tokenizer."""
    return ExperimentConfig(
        name="{proposal.preset}",
        model=presets.get("{proposal.preset}"),
        data=DataConfig(seq_len={proposal.seq_len}, batch_size={proposal.batch_size}),
        train=TrainConfig(steps={proposal.steps}, lr={proposal.lr}),
    )
'''


def _context_of(group: dict[str, str]) -> int | None:
    text = group.get("context_length", "")
    return int(text) if text.isdecimal() else None


def _fields(prediction: Prediction, proposal: Proposal | None) -> dict[str, str]:
    p = prediction
    fields: dict[str, Any] = {
        "parameters": f"{p.num_params:.4g}{_range(p.num_params_interval, '.4g')}",
        "tokens": f"{p.tokens:.4g}{_range(p.tokens_interval, '.4g')}, "
        f"{p.tokens / p.num_params:.1f} per parameter",
        "loss": f"{p.loss:.4f}{_range(p.loss_interval, '.4f')} nats per token",
        "method": p.method,
    }
    if p.extrapolation > 1:
        fields["extrapolation"] = f"{p.extrapolation:.1f} times the FLOPs of the largest fitted run"
    if proposal is not None and p.choice is not None:
        loss = "" if p.choice.loss != p.choice.loss else f", loss {p.choice.loss:.4f}"
        fields["nearest preset"] = (
            f"{proposal.preset}: {p.choice.num_params:,} parameters, {p.choice.tokens:.4g} tokens"
            f"{loss}"
        )
        fields["train"] = proposal.train
        fields["plan"] = proposal.plan
    return fields


def _range(interval: Interval | None, spec: str) -> str:
    if interval is None:
        return ""
    return f" ({interval.low:{spec}} to {interval.high:{spec}})"
