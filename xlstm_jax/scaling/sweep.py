"""Sweeps of runs for scaling laws: from shapes, budgets and rules to a table of planned runs.

Source: arXiv:2510.02228 (runs of equal compute, and of equal tokens per parameter).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xlstm_jax import flops
from xlstm_jax.config import check_range, fingerprint
from xlstm_jax.data.config import DataConfig
from xlstm_jax.errors import ArgumentError, ConfigError, quote
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.train.config import ExperimentConfig, TrainConfig

MAX_DEVIATION = 0.1
"""Relative deviation of a run's FLOPs from its budget that rounding to full steps may cause."""


class Shape(NamedTuple):
    """Sizes of a model, from which a family makes a config."""

    dim: int
    num_blocks: int
    num_heads: int


class Point(NamedTuple):
    """A planned run apart from its seed: what the rules of a sweep may depend on."""

    family: str
    shape: Shape
    seq_len: int
    budget: float | None  # FLOPs of training; None: the length is that of `tokens_per_param`
    tokens_per_param: float | None


class RunSpec(NamedTuple):
    """A planned run."""

    run_id: str  # a hash of the config without its name
    model: str  # family
    cfg: ExperimentConfig
    isoflop: float | None  # the budget that it belongs to
    num_params: int
    train_tokens: int
    train_flops: float

    def record(self) -> dict[str, Any]:
        """The columns of the run in a table, before training."""
        model, train, data = self.cfg.model, self.cfg.train, self.cfg.data
        return {
            "run_id": self.run_id,
            "model": self.model,
            "num_params": self.num_params,
            "train_tokens": self.train_tokens,
            "train_flops": self.train_flops,
            "context_length": data.seq_len,
            "batch_size": data.batch_size,
            "steps": train.steps,
            "learning_rate": train.lr,
            "seed": train.seed,
            "isoflop": self.isoflop,
            "tokens_per_param": self.train_tokens / self.num_params,
            "embedding_dim": model.dim,
            "num_blocks": model.num_blocks,
            "vocab_size": model.vocab_size,
            "warmup_steps": train.parts.warmup,
            "name": self.cfg.name,
        }


Rule = Callable[[Point], float]
Rates = Callable[[Point], float | Sequence[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Every family with each of its shapes, every budget (or ratio), length, rate and seed.

    Raises:
        ConfigError: a field has the wrong type, is empty, or is out of range.
    """

    families: Mapping[str, Callable[[Shape], LMConfig]]  # name -> the config of a shape
    shapes: Sequence[Shape] | Mapping[str, Sequence[Shape]]  # of all families, or of each
    seq_len: int | Sequence[int]
    batch_rule: Rule  # sequences of a step
    lr_rule: Rates  # peak learning rate, or several to compare
    data: DataConfig  # of all runs; seq_len and batch_size are replaced
    train: TrainConfig  # of all runs; steps, lr and seed are replaced
    budgets: Sequence[float] = ()  # FLOPs of training, forward and backward
    tokens_per_param: Sequence[float] = ()  # training tokens per parameter, instead of a budget
    seeds: Sequence[int] = (0,)
    step_multiple: int = 1  # numbers of steps are rounded to a multiple of it
    include: Callable[[Point], bool] = lambda point: True  # which combinations to run
    count: str = "first"  # of the mLSTM cell, and
    attention: str = "causal"  # of attention: conventions of `flops.train_flops`

    def __post_init__(self):
        for name in ("families", "shapes", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must not be empty; a sweep needs at least one run.")
        check_range("step_multiple", self.step_multiple, "at least 1")
        if not self.budgets and not self.tokens_per_param:
            raise ConfigError(
                "budgets and tokens_per_param must not both be empty; set one of them, in FLOPs "
                "or in training tokens per parameter."
            )
        for name in ("budgets", "tokens_per_param"):
            for value in getattr(self, name):
                check_range(name, value, "above 0")
        if isinstance(self.shapes, Mapping) and set(self.shapes) != set(self.families):
            raise ConfigError(
                f"shapes must have an entry for each of {', '.join(self.families)}, got "
                f"{quote(list(self.shapes))}; add or remove some."
            )
        if not self.train.eval_every:
            raise ConfigError(
                "train.eval_every must be at least 1, got 0; the loss of a run in a table is its "
                "validation loss after the last step."
            )

    def points(self) -> Iterator[Point]:
        """The included combinations, apart from seeds, in order."""
        lengths = [self.seq_len] if isinstance(self.seq_len, int) else self.seq_len
        targets = [(budget, None) for budget in self.budgets]
        targets += [(None, ratio) for ratio in self.tokens_per_param]
        for family in self.families:
            shapes = self.shapes[family] if isinstance(self.shapes, Mapping) else self.shapes
            for length, target, shape in itertools.product(lengths, targets, shapes):
                point = Point(family, shape, length, *target)
                if self.include(point):
                    yield point


def plan(sweep: Sweep) -> list[RunSpec]:
    """The runs of a sweep: a pure function, which neither trains nor reads data.

    Raises:
        ArgumentError: no run is included, one is planned twice, or its FLOPs are more than
            `MAX_DEVIATION` away from its budget.
        ConfigError: a config is invalid.
    """
    specs = [spec for point in sweep.points() for spec in _specs(sweep, point)]
    if not specs:
        raise ArgumentError("include must be True for at least one run, got none; relax it.")
    names: dict[str, str] = {}
    for spec in specs:
        if spec.run_id in names:
            raise ArgumentError(
                f"the runs {quote(names[spec.run_id])} and {quote(spec.cfg.name)} have equal "
                f"configs (id {spec.run_id}); change shapes, budgets, seeds or step_multiple."
            )
        names[spec.run_id] = spec.cfg.name
    return specs


def run_id(cfg: ExperimentConfig) -> str:
    """A hash of everything but the name: the same run has one id, whatever it is called."""
    return fingerprint(dataclasses.replace(cfg, name=""))


def _specs(sweep: Sweep, point: Point) -> Iterator[RunSpec]:
    """The runs of every learning rate and seed."""
    rates = sweep.lr_rule(point)
    several, name = np.ndim(rates) > 0, _name(point)
    if np.size(rates) == 0:
        raise ArgumentError(
            f"lr_rule must return a learning rate, or several, got {quote(rates)} for "
            f"{quote(name)}; correct it."
        )
    for lr in np.ravel(rates).tolist():
        for seed in sweep.seeds:
            yield _spec(sweep, point, lr, seed, f"{name}{f'_lr{lr:g}' if several else ''}_s{seed}")


def _spec(sweep: Sweep, point: Point, lr: float, seed: int, name: str) -> RunSpec:
    model = sweep.families[point.family](point.shape)
    batch_size = _integer("batch_rule", sweep.batch_rule(point), name)
    num_params = flops.count_params(model)
    counted = dict(count=sweep.count, attention=sweep.attention)
    per_step = batch_size * flops.train_flops(model, point.seq_len, **counted)
    tokens_per_step = batch_size * point.seq_len
    if point.budget is not None:
        wanted = point.budget / per_step
    else:
        assert point.tokens_per_param is not None
        wanted = point.tokens_per_param * num_params / tokens_per_step
    steps = max(1, round(wanted / sweep.step_multiple)) * sweep.step_multiple
    if abs(steps / wanted - 1) > MAX_DEVIATION:
        raise ArgumentError(
            f"the steps of {quote(name)} must be a multiple of step_multiple="
            f"{sweep.step_multiple} within {MAX_DEVIATION:.0%} of {wanted:.4g}, got {steps}; make "
            "the batch or the multiple smaller, or leave the run out by include."
        )
    train = dataclasses.replace(sweep.train, steps=steps, lr=lr, seed=seed)
    data = dataclasses.replace(sweep.data, seq_len=point.seq_len, batch_size=batch_size)
    cfg = ExperimentConfig(name=name, model=model, data=data, train=train)
    return RunSpec(
        run_id=run_id(cfg),
        model=point.family,
        cfg=cfg,
        isoflop=point.budget,
        num_params=num_params,
        train_tokens=steps * tokens_per_step,
        train_flops=float(steps * per_step),
    )


def _name(point: Point) -> str:
    dim, blocks, heads = point.shape
    ratio, budget = point.tokens_per_param, point.budget
    target = f"r{ratio:g}" if budget is None else f"C{budget:g}"
    return f"{point.family}_d{dim}_l{blocks}_h{heads}_T{point.seq_len}_{target}"


def _integer(rule: str, value: float, name: str) -> int:
    if value != int(value) or value < 1:
        raise ArgumentError(
            f"{rule} must return an integer of at least 1 sequence, got {quote(value)} for "
            f"{quote(name)}; correct it."
        )
    return int(value)
